"""Learning to write Shakespeare: nanokl beside nanoGPT's published recipe for a CPU.

The case "tiny Shakespeare" runs whole programs, each once, from the start of its process to its
last evaluation: train_pretrain.py twice, as quickly as it gets to the recipe's loss and as far as
it gets in the recipe's time, and the recipe: 4 layers, 4 heads, 128 wide, context 64, 12 rows,
2,000 iterations, AdamW at 1e-3 falling to 1e-4, float32, no dropout, an evaluation of 20 batches of
both splits every 250. Its steps are plain PyTorch over the same transformer with GPT-2's switches.
check is no error here: nats per token over the whole last tenth of the text, in windows that do not
overlap, each token scored once. Characters are tokens for all; case["data"] is a folder that
data/shakespeare/prepare.py has filled.

The others time a training step: with the loader's share of it on any device, and on a GPU that of
the 124M-parameter GPT-2 shape beside a plain, compiled PyTorch loop of the same shape, with the MFU
where the device's peak is known (throughput.py).
"""

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

from nanokl import optim, throughput
from nanokl import runtime as rt
from nanokl.bench import ROOT, Ready
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
            return SimpleNamespace(told={"check": {"nats per token": summary["nats_per_token"],
                               "M tokens": summary["tokens_seen"] / 1e6}})

        return Ready(run, 1, "run", {})

    return set_up


def recipe(case: dict) -> Ready:
    """nanoGPT's, in a process of its own as well."""
    words = [sys.executable, "-m", "nanokl.bench_pretrain", case["data"], str(case["iterations"])]

    def run() -> SimpleNamespace:
        done = subprocess.run(words, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        return SimpleNamespace(told={"check": {"nats per token": float(done.stdout.split()[-1]),
                           "M tokens": case["iterations"] * 12 * 64 / 1e6}})

    return Ready(run, 1, "run", {})


def train_recipe(data: str, iterations: int) -> float:
    """Nats per token of the validation split after nanoGPT's recipe."""
    tokenizer, folder, T = Tokenizer.load(data), Path(data), RECIPE["block_size"]
    train, val = (Shard.open(folder / f"{name}.bin", tokenizer) for name in ("train", "val"))
    config = GPTConfig(vocab_size=tokenizer.vocab_size, **RECIPE, **PRESETS["gpt2"])
    config.bias, config.activation = False, "gelu"
    rng = rt.generator(0, "recipe")
    model = GPT(config, rng)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1},
                                   {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.99))

    def loss(shard: Shard) -> torch.Tensor:
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


def _batch(case: dict) -> tuple[rt.Runtime, torch.Tensor]:
    runtime = rt.setup(case["device"])
    rng = rt.generator(0, "idx")
    return runtime, torch.randint(case["V"], (case["B"], case["T"] + 1), generator=rng)


def _model(case: dict, preset: str, runtime: rt.Runtime) -> GPT:
    sizes = {name: case[name] for name in ("n_layer", "n_head", "n_embd")}
    config = GPTConfig(vocab_size=case["V"], block_size=case["T"], **sizes, **PRESETS[preset])
    return GPT(config, rt.generator(0, "weights")).to(runtime.device)


def _check(case: dict, model: GPT, loss: Callable, runtime: rt.Runtime) -> dict:
    """The loss against the one of the whole logits in float32; MFU needs the time, not here."""
    with torch.no_grad(), runtime.autocast():
        got = loss().item()
    flops = throughput.model_flops(model, case["B"] * case["T"], case["B"] * case["T"] ** 2,
                                   case["B"] * case["T"])
    peak = throughput.peak_flops(runtime)
    best = {"seconds at the device's peak": flops / peak} if peak else {}
    return {"nats at the start / log V": got / math.log(case["V"]), **best}


def step(case: dict) -> Ready:
    """A training step of train_pretrain.py; compiled on a GPU, as --compile has it."""
    runtime, idx = _batch(case)
    core = _model(case, "nano", runtime)
    model = torch.compile(core) if case["device"] == "cuda" else core
    optimizers = optim.make_optimizers(core, lr=1e-3, muon_lr=1e-3, weight_decay=0.1,
                                       betas=(0.9, 0.98), dtype=runtime.dtype)

    def loss() -> torch.Tensor:
        x = idx.to(runtime.device)
        return -linear_logprob(model(x[:, :-1]), core.head.weight, x[:, 1:]).logp.mean()

    def run() -> None:
        with runtime.autocast():
            total = loss()
        gradient_step(total, core.parameters(), optimizers, step=1, out=None, max_grad_norm=1.0)

    check = _check(case, core, loss, runtime)
    for _ in range(3):
        run()
    return Ready(run, case["B"] * case["T"], "token", check)


def plain(case: dict) -> Ready:
    """GPT-2's switches, whole logits, one fused AdamW, all of it compiled: nanoGPT's loop."""
    runtime, idx = _batch(case)
    core = _model(case, "gpt2", runtime)
    optimizer = torch.optim.AdamW(core.parameters(), lr=6e-4, betas=(0.9, 0.95), fused=True)

    @torch.compile
    def forward(x: torch.Tensor) -> torch.Tensor:
        logits = core.head(core(x[:, :-1]))
        return F.cross_entropy(logits.flatten(0, 1).float(), x[:, 1:].flatten())

    def loss() -> torch.Tensor:
        return forward(idx.to(runtime.device))

    def run() -> None:
        with runtime.autocast():
            total = loss()
        total.backward()
        torch.nn.utils.clip_grad_norm_(core.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    check = _check(case, core, loss, runtime)
    for _ in range(3):
        run()
    return Ready(run, case["B"] * case["T"], "token", check)


def loader(case: dict) -> Ready:
    """Drawing a batch of the same size from the corpus: what a step waits for."""
    data = Path(case["data"])
    shard = Shard.open(data / "train.bin", Tokenizer.load(data))
    sizes = {"batch_size": case["B"], "block_size": case["T"], "seed": 0}
    steps = iter(range(1 << 30))
    return Ready(lambda: lm_batch(shard, next(steps), **sizes), case["B"] * case["T"], "token", {})


VARIANTS = {"nanokl, quick": program(*QUICK), "nanokl, same time": program(*FULL),
            "nanoGPT's recipe": recipe, "nanokl": step, "plain": plain, "its loader": loader}


if __name__ == "__main__":
    print(train_recipe(sys.argv[1], int(sys.argv[2])))
