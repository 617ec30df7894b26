"""A run's model for other tools: Hugging Face's layout where a class of theirs computes the same.

    README.md  config.json  model.safetensors  tokenizer.json  tokenizer_config.json

Models of nanokl's own shape, reward models and classifiers are plain safetensors with nanokl's
config, which nanokl opens again. Left out: optimiser state, critics, half precision.
"""

import json
from dataclasses import asdict
from pathlib import Path

from torch import nn

from nanokl import UserError, __version__, checkpoint, hf, hf_tokenizer, weights
from nanokl.bert import BERT
from nanokl.classify import Classifier
from nanokl.gpt import GPT
from nanokl.reward import RewardModel

MODELS = {"GPT": GPT, "BERT": BERT, "RewardModel": RewardModel, "Classifier": Classifier}
KINDS = {"GPT": "gpt2", "BERT": "bert"}
CRITIC = ("value.", "critic.")  # PPO's; no part of the policy
ROLES = {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "[UNK]", "pad": "[PAD]",
         "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
CARD = """# {name}

A {model} of {parameters:,} parameters, trained with nanokl {version}: {what}.

{use}

Files: `config.json`, `model.safetensors` (float32), `tokenizer.json`. {text}

{numbers}"""
USE = """```python
from transformers import AutoTokenizer, {cls}
model, tokenizer = {cls}.from_pretrained("{name}"), AutoTokenizer.from_pretrained("{name}")
```"""


def export(run: Path, folder: Path) -> str:
    """Writes the model of a run, or of a checkpoint, to a new folder; returns what it is, a line.

    UserError where the folder holds something already, or the run no model.
    """
    # 1. The model, and the class of theirs, if there is one.
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} is there already: choose a new folder")
    source = checkpoint.resolve(run)
    name = checkpoint.read_config(source)["model"]
    if name not in MODELS:
        raise UserError(f"{source} holds a {name}: give one of {', '.join(MODELS)}")
    model, tokenizer = checkpoint.load(source, MODELS[name]), hf_tokenizer.load_tokenizer(source)
    config = asdict(model.config)
    if name == "GPT":
        config |= {"value_head": False, "critic_layers": 0}
    values = {key: x.detach() for key, x in weights.tensors(model).items()
              if name != "GPT" or not key.startswith(CRITIC)}
    differs = [f"a {name} has a head of its own"]
    if name in KINDS:
        preset = MODELS[name].presets[KINDS[name]]
        differs = hf.unlike(config, asdict(MODELS[name].Config(**preset)))
    # 2. Its config and tensors, theirs or ours.
    if differs:
        cls, theirs = None, {"nanokl": __version__, "model": name, "config": config}
        what = f"plain safetensors, as no class of transformers fits ({', '.join(differs)})"
    else:
        headed = config.get("mlm_head", True)
        cls = {"GPT": "GPT2LMHeadModel", "BERT": "BertForMaskedLM" if headed else "BertModel"}[name]
        theirs = {**hf.config_out(KINDS[name], config), "architectures": [cls]}
        theirs |= {f"{role}_token_id": tokenizer.special(special)
                   for role, special in ROLES.items() if special in tokenizer.specials
                   and role in ("bos", "eos", "pad")}
        values = hf.tensors_out(KINDS[name], values, headed=headed)
        what = f"a {cls} of transformers"
    # 3. The folder, as a whole or not at all.
    with checkpoint.replacing(folder) as tmp:
        if differs:
            tokenizer.save(tmp)
        words = hf_tokenizer.whole(tokenizer, framed=name != "GPT")
        files = {checkpoint.CONFIG: theirs, hf_tokenizer.WHOLE: words,
                 hf_tokenizer.OPTIONS: _options(tokenizer, config)}
        for file, data in files.items():
            (tmp / file).write_bytes((json.dumps(data, indent=1) + "\n").encode())
        card = _card(model, folder.name, what, cls, source, tokenizer)
        (tmp / "README.md").write_bytes(card.encode())
        weights.write(tmp, {key: x.contiguous() for key, x in values.items()})
    return f"{folder}: {what}"


def _options(tokenizer, config: dict) -> dict:
    """tokenizer_config.json: which special token plays which role."""
    roles = {f"{role}_token": special for role, special in ROLES.items()
             if special in tokenizer.specials}
    options = {"tokenizer_class": "PreTrainedTokenizerFast", **roles}
    if isinstance(tokenizer, hf_tokenizer.WordPiece):
        options = {**json.loads(tokenizer.files[hf_tokenizer.OPTIONS]), **roles}
    room = config.get("block_size") or config["trunk_config"]["block_size"]
    return {**options, "model_max_length": room}


def _card(model: nn.Module, name: str, what: str, cls: str | None, source: Path, tokenizer) -> str:
    """The model card: what it is, how to open it, what was measured."""
    use = USE.format(cls=cls, name=name) if cls else (
        f"Open it with nanokl: `nanokl.checkpoint.load(\"{name}\", {type(model).__name__})`; the "
        "names of the tensors are those of nanokl's modules.")
    text = "Texts are lower-cased. " if tokenizer.lowercase else ""
    run = source.parent if source.name in ("best", "last") else source
    summary = run / "summary.json"
    measured = json.loads(summary.read_bytes()) if summary.is_file() else {}
    rows = [f"| `{key}` | {value:.6g} |" for key, value in measured.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)]
    numbers = "\n".join(["| measured by the run that made it | |", "|---|---|", *rows, ""])
    return CARD.format(name=name, model=type(model).__name__, version=__version__, what=what,
                       parameters=sum(p.numel() for p in model.parameters()), use=use, text=text +
                       "The tokenizer finds special tokens by name in a text, which nanokl's own "
                       "does not.", numbers=numbers if rows else "")
