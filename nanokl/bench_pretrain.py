"""Learning to write Shakespeare: nanokl beside nanoGPT's published recipe for a CPU.

The case "tiny Shakespeare" runs whole programs, each once, from the start of its process to its
last evaluation: train_pretrain.py twice, as quickly as it gets to the recipe's loss and as far as
it gets in the recipe's time, and the recipe: 4 layers, 4 heads, 128 wide, context 64, 12 rows,
2,000 iterations, AdamW at 1e-3 falling to 1e-4, float32, no dropout, an evaluation of 20 batches of
both splits every 250. Its steps are plain PyTorch over the same transformer with GPT-2's switches.
check is no error here: nats per token over the whole last tenth of the text, in windows that do not
overlap, each token scored once. Characters are tokens for all; case["data"] is a folder that
data/shakespeare/prepare.py has filled.

The others time a training step, on random tokens: beside the time that the loader takes for as
many, and on a GPU at the 124M-parameter GPT-2 shape beside a plain, compiled PyTorch loop. check:
error of the first loss in nats, and relative one of the embedding's gradient, which has been
through every layer, against the forward pass written once more in float64 (`nano_logits` here,
`plain_logits` for GPT-2); and where the device's peak is known (throughput.py) the seconds that it
would take: over the median, the MFU.
"""

import itertools
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from nanokl import optim, throughput
from nanokl import runtime as rt
from nanokl.bench import ROOT, Ready
from nanokl.bench_generate import gpt2_weights, plain_logits
from nanokl.data import Shard, eval_batches, lm_batch
from nanokl.gpt import GPT, PRESETS, GPTConfig
from nanokl.logprob import linear_logprob
from nanokl.tokenizer import Tokenizer
from nanokl.training import gradient_step

RECIPE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64}
SHARED = ("--block_size", "256", "--eval_every", "10000")
QUICK = ("--n_layer", "1", "--steps", "44", "--batch_size", "8", "--ngrams", "4", "--lr", "1e-2",
         "--muon_lr", "1e-2", "--ngram_dropout", "0.2", "--warmup", "6")
FULL = ("--n_layer", "2", "--steps", "400", "--batch_size", "16", "--ngrams", "5", "--lr", "3e-3",
        "--muon_lr", "6e-3", "--ngram_dropout", "0.5", "--warmup", "20")
GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "V": 50304, "T": 1024, "B": 32}
CASES = (
    {"name": "tiny Shakespeare", "whole": True, "device": "cpu", "iterations": 2000,
     "variants": ("nanokl, quick", "nanokl, same time", "nanoGPT's recipe")},
    {"name": "step: 4 layers, 192 wide, T 64", "n_layer": 4, "n_head": 6, "n_embd": 192, "T": 64,
     "B": 64, "V": 4096, "variants": ("nanokl", "its loader")},
    {"name": "step: GPT-2 124M", **GPT2, "device": "cuda", "variants": ("nanokl", "plain")},
    {"name": "tiny recipe", "whole": True, "iterations": 3, "extra": True,
     "variants": ("nanoGPT's recipe",)},
)  # fmt: skip


def program(*flags: str) -> Callable[[dict], Ready]:
    """train_pretrain.py as its user runs it."""
    def set_up(case: dict) -> Ready:
        def run() -> SimpleNamespace:
            with tempfile.TemporaryDirectory() as folder:
                words = [sys.executable, str(ROOT / "train_pretrain.py"), "gpt", "--data",
                         case["data"], "--out", f"{folder}/run", *SHARED, *flags]
                subprocess.run(words, check=True, cwd=ROOT, stdout=sys.stderr)
                summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
            return _told(summary["nats_per_token"], summary["tokens_seen"])

        return Ready(run, 1, "run", {})

    return set_up


def recipe(case: dict) -> Ready:
    """nanoGPT's, in a process of its own as well."""
    words = [sys.executable, "-m", "nanokl.bench_pretrain", case["data"], str(case["iterations"])]

    def run() -> SimpleNamespace:
        done = subprocess.run(words, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        return _told(float(done.stdout.split()[-1]), case["iterations"] * 12 * 64)

    return Ready(run, 1, "run", {})


def _told(nats: float, tokens: int) -> SimpleNamespace:
    """What a program's run has to say of itself, when it has ended."""
    return SimpleNamespace(told={"check": {"nats per token": nats, "M tokens": tokens / 1e6}})


def train_recipe(data: str, iterations: int) -> float:
    """Nats per token of the validation split after nanoGPT's recipe."""
    tokenizer, folder, T = Tokenizer.load(data), Path(data), RECIPE["block_size"]
    train, val = (Shard.open(folder / f"{name}.bin", tokenizer) for name in ("train", "val"))
    switches = {**PRESETS["gpt2"], "bias": False, "activation": "gelu"}
    config = GPTConfig(vocab_size=tokenizer.vocab_size, **RECIPE, **switches)
    rng = rt.generator(0, "recipe")
    model = GPT(config, rng)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1},
                                   {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.99))

    def loss(shard: Shard) -> Tensor:
        start = torch.randint(len(shard.tokens) - T - 1, (12, 1), generator=rng)
        idx = torch.from_numpy(shard.tokens[start.numpy() + range(T + 1)].astype("int64"))
        logits = model.logits(model(idx[:, :-1]))
        return F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten())

    for step in range(iterations):
        if step % 250 == 0:
            with torch.no_grad():
                _ = [loss(shard).item() for shard in (train, val) for _ in range(20)]
        fall = 0.5 * (1 + math.cos(math.pi * max(step - 100, 0) / max(iterations - 100, 1)))
        for group in optimizer.param_groups:
            group["lr"] = min((step + 1) / 101, 1) * (1e-4 + fall * 9e-4)
        optimizer.zero_grad()
        loss(train).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return evaluate(model, val)


@torch.no_grad()
def evaluate(model: GPT, shard: Shard) -> float:
    """Nats per token over the whole shard, from the whole logits."""
    nats = n = 0.0
    for idx, mask in eval_batches(shard, block_size=model.config.block_size, batch_size=64):
        logp = model.logits(model(idx[:, :-1])).log_softmax(-1)
        nats -= logp.gather(-1, idx[:, 1:, None])[..., 0][mask].double().sum().item()
        n += mask.sum().item()
    return nats / n


# Pre-norm residuals; norms are LayerNorms with a gain alone; queries and keys are normalised, then
# turned by t 10000^(-2i/D); MLP(x) = W_down relu(W_up x)^2; the head is the embedding.
def nano_logits(w: dict[str, Tensor], idx: Tensor, n_head: int) -> Tensor:
    """nano's logits (B, T, V) from its weights: the oracle, in which no layer has a part."""
    T, D = idx.shape[1], w["wte.weight"].shape[1] // n_head
    past = torch.ones(T, T, dtype=torch.bool, device=idx.device).tril()
    theta = 1e4 ** (-torch.arange(0, D, 2, device=idx.device).double() / D)
    angle = torch.arange(T, device=idx.device)[:, None] * theta  # (T, D/2)

    def norm(x: Tensor, name: str, eps: float = 1e-6) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w.get(f"{name}.weight", 1.0)

    def turned(x: Tensor) -> Tensor:
        a, b = (x := norm(x, "", 1e-5))[..., ::2], x[..., 1::2]  # (B, H, T, D/2)
        pair = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
        return torch.stack(pair, -1).flatten(-2)

    x = norm(w["wte.weight"][idx], "norm_embed")
    for i in range(sum(name.endswith("qkv.weight") for name in w)):
        qkv = (norm(x, f"blocks.{i}.norm1") @ w[f"blocks.{i}.attn.qkv.weight"].T).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (n_head, D)).transpose(1, 2) for y in qkv)  # (B, H, T, D)
        score = (turned(q) @ turned(k).mT / math.sqrt(D)).masked_fill(~past, -torch.inf)
        y = (score.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + y @ w[f"blocks.{i}.attn.proj.weight"].T
        y = norm(x, f"blocks.{i}.norm2") @ w[f"blocks.{i}.mlp.up.weight"].T
        x = x + y.relu().square() @ w[f"blocks.{i}.mlp.down.weight"].T
    return norm(x, "norm_final") @ w["wte.weight"].T


def _setting(case: dict, preset: str) -> tuple[rt.Runtime, GPT, Tensor]:
    """Where to compute, the model, its blocks' matrices no zeros, and random tokens (B, T + 1)."""
    runtime = rt.setup(case["device"], case.get("dtype", "auto"))
    sizes = {name: case[name] for name in ("n_layer", "n_head", "n_embd")}
    config = GPTConfig(vocab_size=case["V"], block_size=case["T"], **sizes, **PRESETS[preset])
    rng = rt.generator(0, "weights")
    model = GPT(config, rng)
    with torch.no_grad():  # else the blocks had no part in the loss, and no error could be seen
        for p in model.blocks.parameters():
            if p.ndim == 2:
                p.normal_(std=p.shape[1] ** -0.5, generator=rng)
    idx = torch.randint(case["V"], (case["B"], case["T"] + 1), generator=rng)
    return runtime, model.to(runtime.device), idx.to(runtime.device)


def _errors(model: GPT, loss: Tensor, idx: Tensor) -> dict[str, float]:
    """Of the loss and of the embedding's gradient, against the oracle's, some rows at a time."""
    (gradient,) = torch.autograd.grad(loss, model.wte.weight)
    if model.config.position == "learned":
        weights, logits = gpt2_weights(model), plain_logits
    else:
        weights, logits = dict(model.named_parameters()), nano_logits
    w = {k.removeprefix("transformer."): x.detach().double() for k, x in weights.items()}
    wte, nats, exact = w["wte.weight"].requires_grad_(), 0.0, torch.zeros_like(w["wte.weight"])
    for rows in idx.split(max(1, 2048 // idx.shape[1])):
        z = logits(w, rows[:, :-1], model.config.n_head).flatten(0, 1)
        part = F.cross_entropy(z, rows[:, 1:].flatten(), reduction="sum") / idx[:, 1:].numel()
        nats += part.item()
        exact += torch.autograd.grad(part, wte)[0]
    return {"loss": abs(loss.item() - nats),
            "embedding's gradient": ((gradient - exact).norm() / exact.norm()).item()}


def _ready(run: Callable, loss: Callable, model: GPT, idx: Tensor, runtime: rt.Runtime) -> Ready:
    """The step `run`, warm, and the errors of its loss()."""
    n, check = idx[:, 1:].numel(), _errors(model, loss(), idx)
    for _ in range(3):
        run()
    check["parameters"] = sum(p.numel() for p in model.parameters())
    if peak := throughput.peak_flops(runtime):
        flops = throughput.model_flops(model, n, n * (idx.shape[1] - 1), n)
        check["seconds at the device's peak"] = flops / peak
    return Ready(run, n, "token", check)


def step(case: dict) -> Ready:
    """A training step of train_pretrain.py; compiled on a GPU, as --compile has it."""
    runtime, core, idx = _setting(case, "nano")
    model = torch.compile(core) if case["device"] == "cuda" else core
    optimizers = optim.make_optimizers(core, lr=1e-3, muon_lr=1e-3, weight_decay=0.1,
                                       betas=(0.9, 0.98), dtype=runtime.dtype)

    def loss() -> Tensor:
        with runtime.autocast():
            return -linear_logprob(model(idx[:, :-1]), core.head.weight, idx[:, 1:]).logp.mean()

    def run() -> None:
        gradient_step(loss(), core.parameters(), optimizers, step=1, out=Path(), max_grad_norm=1.0)
        core.zero_grad()  # so that the memory of a run is with the gradients

    return _ready(run, loss, core, idx, runtime)


def plain(case: dict) -> Ready:
    """GPT-2's switches, whole logits, one fused AdamW, all of it compiled: nanoGPT's loop."""
    runtime, core, idx = _setting(case, "gpt2")
    optimizer = torch.optim.AdamW(core.parameters(), lr=6e-4, betas=(0.9, 0.95), fused=True)

    @torch.compile
    def forward(x: Tensor) -> Tensor:
        logits = core.head(core(x[:, :-1]))
        return F.cross_entropy(logits.flatten(0, 1).float(), x[:, 1:].flatten())

    def loss() -> Tensor:
        with runtime.autocast():
            return forward(idx)

    def run() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(core.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return _ready(run, loss, core, idx, runtime)


def loader(case: dict) -> Ready:
    """Drawing a batch of the same size from the corpus: what a step waits for."""
    data = Path(case["data"])
    shard = Shard.open(data / "train.bin", Tokenizer.load(data))
    sizes = {"batch_size": case["B"], "block_size": case["T"], "seed": 0}
    steps = itertools.count()
    return Ready(lambda: lm_batch(shard, next(steps), **sizes), case["B"] * case["T"], "token", {})


VARIANTS = {"nanokl, quick": program(*QUICK), "nanokl, same time": program(*FULL),
            "nanoGPT's recipe": recipe, "nanokl": step, "plain": plain, "its loader": loader}


if __name__ == "__main__":
    print(train_recipe(sys.argv[1], int(sys.argv[2])))
