"""GPT-2 and BERT as Hugging Face lays them out: config keys, names of tensors, transposes.

A folder of theirs has a model_type in its config.json. Here plain data is mapped, both ways;
checkpoint.py and export.py read and write the files, hf_tokenizer.py the vocabularies. Left out:
what needs their code (trust_remote_code), quantised weights, pickles.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from nanokl import UserError

CLASSES = {"gpt2": "GPT", "bert": "BERT"}
# Our fields and their keys, with the value where a config has none; None: it must have one.
FIELDS = {
    "gpt2": {"vocab_size": ("vocab_size", None), "block_size": ("n_positions", None),
             "n_layer": ("n_layer", None), "n_head": ("n_head", None), "n_embd": ("n_embd", None),
             "eps": ("layer_norm_epsilon", 1e-5), "dropout": ("resid_pdrop", 0.1),
             "tied": ("tie_word_embeddings", True)},
    "bert": {"vocab_size": ("vocab_size", None), "block_size": ("max_position_embeddings", None),
             "n_layer": ("num_hidden_layers", None), "n_head": ("num_attention_heads", None),
             "n_embd": ("hidden_size", None), "eps": ("layer_norm_eps", 1e-12),
             "n_segment": ("type_vocab_size", 2), "dropout": ("hidden_dropout_prob", 0.1)},
}
# Their switches, and the values that our models compute; the first one where a config has none.
SWITCHES = {
    "gpt2": {"activation_function": ("gelu_new", "gelu_pytorch_tanh"),
             "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
             "add_cross_attention": (False,), "quantization_config": (None,)},
    "bert": {"hidden_act": ("gelu",), "position_embedding_type": ("absolute",),
             "is_decoder": (False,), "add_cross_attention": (False,),
             "tie_word_embeddings": (True,), "quantization_config": (None,)},
}
INNER = {"gpt2": ("n_inner", None), "bert": ("intermediate_size", 3072)}  # the MLPs' width
# Our switches that decide what is computed.
COMPUTED = ("causal", "norm", "norm_first", "embed_norm", "position", "activation", "bias",
            "qk_norm", "head_transform", "ngram_rows")
BLOCK, LAYER = "blocks.{}.", "encoder.layer.{}."
# Our modules and theirs, of which several are joined to one of ours.
MODULES = {
    "gpt2": {"wte": "wte", "wpe": "wpe", "norm_final": "ln_f", "head": "lm_head",
             BLOCK + "norm1": "h.{}.ln_1", BLOCK + "norm2": "h.{}.ln_2",
             BLOCK + "attn.qkv": "h.{}.attn.c_attn", BLOCK + "attn.proj": "h.{}.attn.c_proj",
             BLOCK + "mlp.up": "h.{}.mlp.c_fc", BLOCK + "mlp.down": "h.{}.mlp.c_proj"},
    "bert": {"wte": "embeddings.word_embeddings", "wpe": "embeddings.position_embeddings",
             "wse": "embeddings.token_type_embeddings", "norm_embed": "embeddings.LayerNorm",
             "transform.0": "cls.predictions.transform.dense",
             "transform.2": "cls.predictions.transform.LayerNorm", "head": "cls.predictions",
             BLOCK + "attn.qkv": [LAYER + f"attention.self.{x}" for x in ("query", "key", "value")],
             BLOCK + "attn.proj": LAYER + "attention.output.dense",
             BLOCK + "norm1": LAYER + "attention.output.LayerNorm",
             BLOCK + "mlp.up": LAYER + "intermediate.dense",
             BLOCK + "mlp.down": LAYER + "output.dense",
             BLOCK + "norm2": LAYER + "output.LayerNorm"},
}
PREFIX = {"gpt2": "transformer.", "bert": "bert."}  # of the trunk's tensors, in a model with a head
HEAD = {"gpt2": ("lm_head.",), "bert": ("cls.",)}
# A tensor that repeats another.
TWINS = {"gpt2": {"lm_head.weight": "wte.weight"},
         "bert": {"cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
                  "cls.predictions.decoder.bias": "cls.predictions.bias"}}
# Tensors that play no part in hidden states or logits.
IDLE = {"gpt2": r"h\.\d+\.attn\.(masked_)?bias",
        "bert": r"pooler\..*|cls\.seq_relationship\..*|embeddings\.position_ids"}


class Part(NamedTuple):
    """A tensor of theirs: the one of ours that it is (a part of), whether it lies transposed."""

    ours: str
    transposed: bool
    shape: tuple[int, ...]


def kind_of(config: Mapping):
    """Its model_type; configs of before 2020 have none, and show theirs by their keys."""
    if "model_type" in config:
        return config["model_type"]
    marks = {"gpt2": {"n_embd", "n_positions"}, "bert": {"hidden_size", "type_vocab_size"}}
    return next((kind for kind, keys in marks.items() if keys <= config.keys()), None)


def config_in(theirs: Mapping, names: Iterable[str]) -> tuple[str, dict]:
    """Our class, and the fields of it that its preset leaves open, for a config of theirs.

    names: of the folder's tensors; a BERT without a masked-token head among them has none here.
    UserError for what our models do not compute.
    """
    kind = kind_of(theirs)
    if kind not in ("gpt2", "bert"):
        raise UserError(f"its model_type is {kind!r}: give a folder of {' or '.join(CLASSES)}")
    for key, allowed in SWITCHES[kind].items():
        value = theirs.get(key, allowed[0])
        if not any(type(value) is type(x) and value == x for x in allowed):
            raise UserError(f"its {key} is {value!r}: only {allowed[0]!r} is computed here")
    fields = {}
    for name, (key, default) in FIELDS[kind].items():
        fields[name] = default if theirs.get(key) is None else theirs[key]
        if fields[name] is None:
            raise UserError(f"it has no {key}: give a whole config")
    key, default = INNER[kind]
    if theirs.get(key, default) not in (None, 4 * fields["n_embd"]):
        raise UserError(f"its {key} is {theirs.get(key, default)!r}: only four times the width of "
                        f"{fields['n_embd']!r} is computed here")
    if kind == "bert":
        fields["mlm_head"] = any(name.startswith("cls.predictions.") for name in names)
    return CLASSES[kind], fields


def idle(kind: str, name: str) -> bool:
    """Whether a tensor plays no part in hidden states or logits."""
    return bool(re.fullmatch(IDLE[kind], name.removeprefix(PREFIX[kind])))


def canonical(kind: str, names: Iterable[str], wanted: Collection[str]) -> dict[str, str]:
    """Their tensors that count, each with its name in `parts`; UserError where two have one name.

    Gone are a model's prefix, the gamma and beta that a norm's weight and bias were in 2018, idle
    tensors, and twins of others unless they are `wanted`.
    """
    out = {}
    for raw in names:
        name = raw.removeprefix(PREFIX[kind])
        name = re.sub(r"LayerNorm\.(gamma|beta)$",
                      lambda m: "LayerNorm." + {"gamma": "weight", "beta": "bias"}[m[1]], name)
        if not idle(kind, name):
            out[raw] = name
    for raw, name in list(out.items()):
        twin = TWINS[kind].get(name)
        if twin and name not in wanted:
            if twin in out.values():
                del out[raw]
            else:
                out[raw] = twin
    if twice := [name for name, n in Counter(out.values()).items() if n > 1]:
        raise UserError(f"{twice[0]} is there twice, under two spellings: use another folder")
    return out


def parts(kind: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Part]:
    """Their tensors, by canonical name, that make up ours, which have these names and shapes."""
    out = {}
    for name, shape in shapes.items():
        module, _, last = name.rpartition(".")
        layer = re.match(r"blocks\.(\d+)\.", module)
        modules = MODULES[kind].get(re.sub(r"^blocks\.\d+\.", BLOCK, module), module)
        modules = [modules] if isinstance(modules, str) else modules
        # GPT-2's Conv1D keeps a matrix as (in, out)
        turned = kind == "gpt2" and layer is not None and len(shape) == 2
        shape = shape[::-1] if turned else (shape[0] // len(modules), *shape[1:])
        for theirs in modules:
            theirs = theirs.format(layer and layer.group(1))
            out[f"{theirs}.{last}"] = Part(name, turned, shape)
    return out


def tensors_in(kind: str, theirs: Mapping[str, Tensor],
               shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Our tensors, of these shapes, made of theirs; UserError where twins differ."""
    layout = parts(kind, shapes)
    names = canonical(kind, theirs, layout)
    found = {name: theirs[raw] for raw, name in names.items()}
    for raw in theirs.keys() - names.keys():
        twin = TWINS[kind].get(raw.removeprefix(PREFIX[kind]))
        if twin and not torch.equal(theirs[raw], found[twin]):
            raise UserError(f"{raw} is not {twin}, to which the config ties it: use another folder")
    pieces: dict[str, list[Tensor]] = {}
    for name, part in layout.items():
        x = found[name]
        pieces.setdefault(part.ours, []).append(x.T if part.transposed else x)
    return {name: torch.cat(xs) if len(xs) > 1 else xs[0] for name, xs in pieces.items()}


def tensors_out(kind: str, ours: Mapping[str, Tensor], *, headed: bool) -> dict[str, Tensor]:
    """Their tensors, made of ours; `headed`: of a model with a head, whose trunk has a prefix."""
    layout = parts(kind, {name: tuple(x.shape) for name, x in ours.items()})
    done, out = dict.fromkeys(ours, 0), {}
    for name, part in layout.items():
        x, at = ours[part.ours], done[part.ours]
        x = x.T if part.transposed else x[at : at + part.shape[0]]
        done[part.ours] += part.shape[0]
        prefix = "" if name.startswith(HEAD[kind]) or not headed else PREFIX[kind]
        out[prefix + name] = x.contiguous()
    return out


def config_out(kind: str, config: Mapping) -> dict:
    """Their config for a model of ours of that kind's switches."""
    theirs = {"model_type": kind, "torch_dtype": "float32"}
    theirs |= {key: config[name] for name, (key, _) in FIELDS[kind].items() if name in config}
    theirs |= {key: allowed[0] for key, allowed in SWITCHES[kind].items() if allowed[0] is not None}
    if kind == "gpt2":
        return {**theirs, "attn_pdrop": 0.0, "embd_pdrop": config["dropout"]}
    return {**theirs, "intermediate_size": 4 * config["n_embd"],
            "attention_probs_dropout_prob": 0.0}


def unlike(config: Mapping, theirs: Mapping) -> list[str]:
    """What keeps a model of ours from being one of theirs, by their preset's config, as text."""
    reasons = [f"{name} {config[name]!r}" for name in COMPUTED
               if name in config and config[name] != theirs[name]]
    if bool(config["n_segment"]) != bool(theirs["n_segment"]):
        reasons.append(f"n_segment {config['n_segment']}")
    return reasons
