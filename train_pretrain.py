"""Pretrain a GPT (next token) or a BERT-style encoder (masked token) on a prepared corpus.

    python train_pretrain.py gpt  --data data/hutto --out runs/gpt
    python train_pretrain.py bert --data data/hutto --out runs/bert
    torchrun --nproc_per_node 2 train_pretrain.py gpt --data data/hutto --out runs/gpt

The batch of a step is a function of (seed, step) alone, so a resumed run is the same run.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from nanokl import (
    UserError,
    bert,
    checkpoint,
    data,
    gpt,
    metrics,
    optim,
    require_positive,
    throughput,
    training,
)
from nanokl import runtime as rt
from nanokl.logprob import linear_logprob
from nanokl.ngram_embedding import frequent_ngrams
from nanokl.tokenizer import Tokenizer


@dataclass
class Pretrain:
    """Flags that both models share."""

    data: Path  # a prepared folder, such as data/hutto
    out: Path  # the run's folder; must not hold another run
    resume: bool = False  # go on with the run in --out
    preset: str = "nano"  # the transformer's switches: nano, or gpt2 / bert for the original's
    block_size: int = 64  # context, tokens
    n_layer: int = 4  # blocks
    n_head: int = 6  # attention heads
    n_embd: int = 192  # width
    dropout: float = 0.0  # in training only
    steps: int = 1500  # gradient steps
    batch_size: int = 64  # rows a step, over all processes
    lr: float = 3e-3  # AdamW's peak learning rate (embeddings, norms, biases)
    muon_lr: float = 3e-3  # Muon's peak learning rate (the blocks' matrices)
    weight_decay: float = 0.1  # decoupled, on matrices
    warmup: int = 50  # steps of linear warm-up
    decay: float = 0.6  # last part of the run in which the rate falls linearly to 0
    max_grad_norm: float = 1.0  # gradient clipping
    eval_every: int = 250  # steps between full passes over the validation slice
    log_every: int = 10  # steps between rows of metrics.jsonl
    seed: int = 0  # of weights, order and masks
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "auto"  # auto, float32 or bfloat16
    compile: bool = False  # torch.compile the model: minutes at the start, then faster on a GPU

    def __post_init__(self):
        require_positive(self, "lr", "muon_lr", "steps", "batch_size", "eval_every", "log_every",
                         "max_grad_norm")


@dataclass
class GPTFlags(Pretrain):
    """Next-token prediction."""

    ngrams: int = 0  # up to so many tokens have an embedding together if seen twice; 0: none
    ngram_dropout: float = 0.5  # of each of those, in training only

    def __post_init__(self):
        super().__post_init__()
        if not (self.ngrams == 0 or 2 <= self.ngrams <= 8):
            raise UserError(f"--ngrams is {self.ngrams}: give 0, or 2 to 8")


@dataclass
class BERTFlags(Pretrain):
    """Masked-token prediction."""

    lr: float = 4e-3
    muon_lr: float = 6e-3
    n_layer: int = 2  # blocks; on 2 MB of text more depth learns no more and costs twice the time
    mask_prob: float = 0.2  # share of tokens to predict in training; validation always uses .15

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.mask_prob < 1:
            raise UserError(f"--mask_prob is {self.mask_prob}: give 0 < mask_prob < 1")


class GPTTask:
    """-log p(idx[:, t+1] | idx[:, :t+1]), mean over all tokens."""

    best_metric = "val_nats_per_token"
    model, presets = gpt.GPT, gpt.PRESETS

    def __init__(self, flags: GPTFlags, tokenizer: Tokenizer, runtime: rt.Runtime):
        self.flags, self.runtime = flags, runtime
        self.train = data.Shard.open(flags.data / "train.bin", tokenizer)
        self.val = data.Shard.open(flags.data / "val.bin", tokenizer)

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """The rows (B, T + 1) of all processes, how many tokens of each are read, and targets."""
        f = self.flags
        idx = data.lm_batch(self.train, step, batch_size=f.batch_size, block_size=f.block_size,
                            seed=f.seed)
        return idx, torch.full((f.batch_size,), f.block_size), f.batch_size * f.block_size

    def loss(self, model, core, idx: torch.Tensor) -> torch.Tensor:
        f = self.flags
        idx = self.runtime.shard(idx).to(self.runtime.device)
        h = model(idx[:, :-1])
        logp = linear_logprob(h, core.head.weight, idx[:, 1:]).logp
        return -logp.sum() * self.runtime.world / (f.batch_size * f.block_size)

    def evaluate(self, core) -> dict:
        """Every token of the validation slice once: nats per token, bits per byte."""
        nats = tokens = 0.0
        for idx, mask in data.eval_batches(self.val, block_size=self.flags.block_size,
                                           batch_size=self.flags.batch_size):
            idx, mask = idx.to(self.runtime.device), mask.to(self.runtime.device)
            logp = linear_logprob(core(idx[:, :-1]), core.head.weight, idx[:, 1:], mask=mask).logp
            nats -= logp.double().sum().item()
            tokens += mask.sum().item()
        return {"val_nats_per_token": nats / tokens,
                "val_bits_per_byte": nats / (self.val.n_bytes * math.log(2))}


class BERTTask:
    """-log p(masked token | the rest), mean over the masked positions of the global batch."""

    best_metric = "mlm_nats_per_token"
    model, presets = bert.BERT, bert.PRESETS

    def __init__(self, flags: BERTFlags, tokenizer: Tokenizer, runtime: rt.Runtime):
        self.flags, self.runtime, self.tokenizer = flags, runtime, tokenizer
        self.train = data.Shard.open(flags.data / "train.bin", tokenizer)
        self.val = data.Shard.open(flags.data / "val.bin", tokenizer)

    def batch(self, step: int) -> tuple[data.MLMBatch, torch.Tensor, int]:
        """The rows of all processes, how many tokens of each are no padding, and targets."""
        f = self.flags
        batch = data.mlm_batch(self.train, self.tokenizer, step, batch_size=f.batch_size,
                               block_size=f.block_size, seed=f.seed, mask_prob=f.mask_prob)
        return batch, batch.mask.sum(1), int(batch.predict.sum())

    def loss(self, model, core, batch: data.MLMBatch) -> torch.Tensor:
        r = self.runtime
        idx, mask, targets, predict = (
            r.shard(x).to(r.device) for x in (batch.idx, batch.mask, batch.targets, batch.predict))
        h = core.transform(model(idx, mask)[predict])  # (N, C): the head runs on these alone
        logp = linear_logprob(h, core.head.weight, targets[predict], bias=core.head.bias).logp
        return -logp.sum() * r.world / batch.predict.sum()

    def evaluate(self, core) -> dict:
        """The validation slice under fixed 15 % masks: nats per masked token, accuracy."""
        f, device = self.flags, self.runtime.device
        nats = right = n = 0.0
        for batch in data.mlm_eval_batches(self.val, self.tokenizer, block_size=f.block_size,
                                           batch_size=f.batch_size, seed=0):
            predict, targets = batch.predict.to(device), batch.targets.to(device)
            h = core(batch.idx.to(device), batch.mask.to(device))[predict]
            logp = core.logits(h).log_softmax(-1)  # (N, V), N masked tokens
            nats -= logp.gather(1, targets[predict][:, None]).double().sum().item()
            right += (logp.argmax(-1) == targets[predict]).sum().item()
            n += predict.sum().item()
        return {"mlm_nats_per_token": nats / n, "mlm_accuracy": right / n}


def build(flags: Pretrain, task, tokenizer: Tokenizer, runtime: rt.Runtime):
    """The fresh model and its optimisers."""
    if flags.preset not in task.presets:
        raise UserError(f"--preset is {flags.preset!r}: give one of {', '.join(task.presets)}")
    ngrams, switches = [], {**task.presets[flags.preset]}
    if getattr(flags, "ngrams", 0):
        ngrams = frequent_ngrams(task.train.tokens, flags.ngrams, tokenizer.vocab_size)
        switches |= {"ngram_rows": list(map(len, ngrams)), "ngram_dropout": flags.ngram_dropout}
    config = task.model.Config(
        vocab_size=tokenizer.vocab_size, block_size=flags.block_size, n_layer=flags.n_layer,
        n_head=flags.n_head, n_embd=flags.n_embd, dropout=flags.dropout, **switches)
    model = task.model(config, rt.generator(flags.seed, "weights"))
    if ngrams:
        model.ngrams.know(ngrams)
    model.to(runtime.device)
    optimizers = optim.make_optimizers(model, lr=flags.lr, muon_lr=flags.muon_lr,
                                       weight_decay=flags.weight_decay, betas=(0.9, 0.98),
                                       dtype=runtime.dtype)
    return model, optimizers


def validate(task, model, runtime: rt.Runtime) -> dict:
    """The task's metrics over the whole validation slice, in eval mode."""
    model.eval()
    with torch.no_grad(), runtime.autocast():
        return task.evaluate(model)


def pretrain(flags: Pretrain) -> None:
    """The whole run."""
    # 1. Data, model, optimisers; on --resume their state.
    runtime = rt.setup(flags.device, flags.dtype)
    tokenizer = Tokenizer.load(flags.data)
    task = (GPTTask if isinstance(flags, GPTFlags) else BERTTask)(flags, tokenizer, runtime)
    core, optimizers = build(flags, task, tokenizer, runtime)
    start, best, seen = 0, {"step": 0, task.best_metric: math.inf}, 0
    if training.open_run(flags, runtime):
        state = training.load_last(flags.out, core, optimizers, tokenizer=tokenizer)
        start, best, seen = state["step"], state["best"], state.get("tokens_seen", math.nan)
    model = runtime.wrap(torch.compile(core) if flags.compile else core)
    meter = throughput.Meter(core, runtime, seen)
    log = metrics.Log(flags.out, total=flags.steps, unit="step", is_main=runtime.is_main,
                      resume_step=start)
    # 2. Gradient steps; now and then a validation pass. The best and the last model are kept.
    with training.nothing_half_written(flags.out, runtime), log, rt.Interrupt() as interrupt:
        for step in range(start + 1, flags.steps + 1):
            core.train()
            training.seed_step(flags.seed, step, runtime)
            optim.set_lr(optimizers, optim.lr_scale(step - 1, flags.steps, warmup=flags.warmup,
                                                    decay=flags.decay))
            with meter:
                batch, *sizes = task.batch(step - 1)
                meter.loaded(*sizes)
                with runtime.autocast():
                    loss = task.loss(model, core, batch)
                training.gradient_step(loss, core.parameters(), optimizers, step=step,
                                       out=flags.out, max_grad_norm=flags.max_grad_norm)
            if step % flags.log_every == 0 or step == 1:
                log.step(step, loss_nats_per_token=runtime.mean(loss.detach()).item(),
                         **meter.rates())
            stop = runtime.any(interrupt.set)
            if step % flags.eval_every == 0 or step == flags.steps:
                result = validate(task, core, runtime)
                log.event(step, **result)
                training.check_finite(math.isfinite(result[task.best_metric]), step, flags.out)
                if result[task.best_metric] < best[task.best_metric]:
                    best = {"step": step, **result}
                    if runtime.is_main:
                        checkpoint.save(flags.out / "best", core, tokenizer=tokenizer)
            if runtime.is_main and (stop or step % flags.eval_every == 0 or step == flags.steps):
                training.save_last(flags.out, core, optimizers, tokenizer=tokenizer, step=step,
                                   best=best, tokens_seen=meter.tokens_seen)
            if stop and step < flags.steps:
                runtime.barrier()  # the main process has saved
                training.leave(interrupt, log, step, flags.out)
        # 3. The numbers of the best checkpoint.
        numbers = {key.removeprefix("val_"): x for key, x in best.items() if key != "step"}
        log.close({"steps": flags.steps, "best_step": best["step"], "seed": flags.seed,
                   "parameters": sum(p.numel() for p in core.parameters()), **numbers,
                   "tokens_seen": meter.tokens_seen,
                   **throughput.medians(flags.out / "metrics.jsonl")})


def main() -> None:
    pretrain(rt.parse_flags({"gpt": GPTFlags, "bert": BERTFlags}, prog="train_pretrain.py",
                            description=__doc__))


if __name__ == "__main__":
    rt.run_program(main)
