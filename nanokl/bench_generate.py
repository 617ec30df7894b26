"""Sampling: tokens per second of nanokl.generate and of transformers' `generate`.

Both continue the same prompts with the same weights: a GPT-2-shaped model with random weights,
whose state is renamed and transposed for GPT2LMHeadModel. All rows make every new token: they are
sampled at temperature 1 from the whole distribution, and there is no stop token. Each runs in
float32 and in bfloat16, nanokl the way its programs do (weights in float32, products in the
device's best dtype), transformers the faster way (all weights in bfloat16), with the cache that is
its default and, on a GPU, also with the static one, which it compiles. "nanokl compiled" is the
model that `Compiled` has made of it; the seconds of its first rollout stand beside its check, and
its packed copy of the weights, like transformers' own in bfloat16, is not in its memory.

check: largest error of the log-probs of sampled tokens, of a rollout's own for nanokl and of a full
forward pass for transformers, against `plain_logits`: GPT-2 written once more, in float64, from
the published layout of the weights.
"""

import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nanokl import runtime as rt
from nanokl.bench import Ready
from nanokl.generate import Compiled, generate
from nanokl.gpt import GPT, PRESETS

SMALL = {"n_layer": 6, "n_head": 4, "n_embd": 256, "vocab_size": 4096, "block_size": 64}
GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257, "block_size": 1024}
ON_CPU = ["nanokl compiled", "nanokl", "nanokl float32", "transformers bfloat16",
          "transformers float32"]
CASES = (
    {"name": "6 x 256", "model": SMALL, "batch": 64, "prompt": 16, "new": 48, "device": "cpu",
     "variants": ON_CPU},
    {"name": "GPT-2 124M", "model": GPT2, "batch": 16, "prompt": 32, "new": 48, "device": "cpu",
     "variants": ON_CPU},
    {"name": "6 x 256 (cuda)", "model": SMALL, "batch": 64, "prompt": 16, "new": 48,
     "device": "cuda"},
    {"name": "GPT-2 124M (cuda)", "model": GPT2, "batch": 64, "prompt": 32, "new": 48,
     "device": "cuda"},
)  # fmt: skip
PARTS = {"norm1": "ln_1", "attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj", "norm2": "ln_2",
         "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}  # of a block, and their names in GPT-2


def gpt2_shaped(shape: dict, seed: int = 0) -> GPT:
    """A GPT-2 of nanokl's with random weights, the same in every process."""
    return GPT(GPT.Config(**shape, **PRESETS["gpt2"]), rt.generator(seed, "weights")).eval()


def gpt2_weights(model: GPT) -> dict[str, Tensor]:
    """The weights under GPT-2's names; its linear maps are stored as (in, out)."""
    out = {"wte.weight": model.wte.weight, "wpe.weight": model.wpe.weight}
    for end in ("weight", "bias"):
        out[f"ln_f.{end}"] = getattr(model.norm_final, end)
        for i, block in enumerate(model.blocks):
            for ours, theirs in PARTS.items():
                x = block.get_parameter(f"{ours}.{end}")
                out[f"h.{i}.{theirs}.{end}"] = x.T if x.ndim == 2 else x
    return {f"transformer.{name}": x.detach().contiguous() for name, x in out.items()}


def plain_logits(weights: dict[str, Tensor], idx: Tensor, n_head: int) -> Tensor:
    """GPT-2's logits (B, T, V) in float64: the oracle, in which nobody's layer has a part."""
    w = {name.removeprefix("transformer."): x.double() for name, x in weights.items()}
    linear = lambda x, name: x @ w[f"{name}.weight"] + w[f"{name}.bias"]  # noqa: E731
    past = torch.ones(2 * idx.shape[1:], dtype=torch.bool, device=idx.device).tril()  # (T, T)

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] \
            + w[f"{name}.bias"]

    x = w["wte.weight"][idx] + w["wpe.weight"][: idx.shape[1]]
    for i in range(sum(name.endswith("c_attn.bias") for name in w)):
        qkv = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").chunk(3, -1)
        q, k, v = (y.unflatten(-1, (n_head, -1)).transpose(1, 2) for y in qkv)  # (B, H, T, D)
        score = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~past, -torch.inf)
        y = (score.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(y, f"h.{i}.attn.c_proj")
        y = F.gelu(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"), approximate="tanh")
        x = x + linear(y, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


def plain_logp(weights: dict[str, Tensor], idx: Tensor, n_head: int) -> Tensor:
    """log p(idx[:, t+1] | idx[:, :t+1]) (B, T-1), float64."""
    logp = plain_logits(weights, idx[:, :-1], n_head).log_softmax(-1)
    return logp.gather(-1, idx[:, 1:, None])[..., 0]


def peer_model(model: GPT):
    """The same model as transformers has it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    c = model.config
    config = GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None,
        eos_token_id=None)
    peer = GPT2LMHeadModel(config)
    missing, extra = peer.load_state_dict(gpt2_weights(model), strict=False)
    assert set(missing) <= {"lm_head.weight"} and not extra, (missing, extra)  # it is tied
    return peer.to(model.head.weight.device).eval()


def set_up(case: dict) -> tuple[GPT, Tensor]:
    """The model and the prompts (B, prompt)."""
    model = gpt2_shaped(case["model"]).to(case["device"])
    shape = (case["batch"], case["prompt"])
    prompts = torch.randint(case["model"]["vocab_size"], shape, generator=rt.generator(0, "idx"))
    return model, prompts.to(case["device"])


def check(case: dict, model: GPT, idx: Tensor, logp: Tensor) -> dict[str, float]:
    """What the first rows' log-probs of sampled tokens (rows, new) are off by, and tokens short."""
    want = plain_logp(gpt2_weights(model), idx[: len(logp)], case["model"]["n_head"])
    error = (logp.double() - want[:, -case["new"] :]).abs().max().item()
    return {"logp": error, "tokens short": case["prompt"] + case["new"] - idx.shape[1]}


def ours(dtype: str, *, compiled: bool = False) -> Callable[[dict], Ready]:
    def variant(case: dict) -> Ready:
        runtime = rt.setup(case["device"], dtype)
        model, prompts = set_up(case)
        with runtime.autocast():
            sampler = Compiled(model) if compiled else model
        rng, rows = rt.generator(0, "u"), prompts.tolist()

        def run():
            with runtime.autocast():
                return generate(sampler, rows, case["new"], rng=rng)

        start = time.perf_counter()
        rollout = run()
        told = {"first s": time.perf_counter() - start} if compiled else {}
        seen = rollout.logp[:2, -case["new"] :]
        return Ready(run, case["batch"] * case["new"], "token",
                     check(case, model, rollout.idx, seen) | told)

    return variant


def theirs(dtype: torch.dtype, **cache) -> Callable[[dict], Ready]:
    def variant(case: dict) -> Ready:
        model, prompts = set_up(case)
        peer = peer_model(model).to(dtype)
        torch.manual_seed(0)

        @torch.no_grad()
        def run():
            return peer.generate(
                prompts, attention_mask=torch.ones_like(prompts), do_sample=True, temperature=1.0,
                top_k=0, top_p=1.0, max_new_tokens=case["new"], pad_token_id=0, **cache)

        idx = run()
        with torch.no_grad():
            logp = peer(idx[:2, :-1]).logits.float().log_softmax(-1)
        logp = logp.gather(-1, idx[:2, 1:, None])[:, -case["new"] :, 0]
        return Ready(run, case["batch"] * case["new"], "token", check(case, model, idx, logp))

    return variant


VARIANTS = {
    "nanokl compiled": ours("auto", compiled=True),
    "nanokl": ours("auto"),
    "nanokl float32": ours("float32"),
    "transformers bfloat16": theirs(torch.bfloat16),
    "transformers float32": theirs(torch.float32),
    "transformers bfloat16 static": theirs(torch.bfloat16, cache_implementation="static"),
}
ENVIRONMENT = {name: "peers" for name in VARIANTS if name.startswith("transformers")}
