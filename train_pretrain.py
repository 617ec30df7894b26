"""Pretrain a GPT (next token), a BERT-style encoder (masked token) or a VAE on a prepared corpus.

    python train_pretrain.py gpt  --data data/hutto --out runs/gpt
    python train_pretrain.py bert --data data/hutto --out runs/bert
    python train_pretrain.py vae  --data data/hutto --out runs/vae
    torchrun --nproc_per_node 2 train_pretrain.py gpt --data data/hutto --out runs/gpt

The batch of a step is a function of (seed, step) alone, so a resumed run is the same run.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from nanokl import (
    UserError,
    bert,
    checkpoint,
    data,
    gpt,
    latent,
    metrics,
    optim,
    require_positive,
    throughput,
    training,
    vae,
)
from nanokl import runtime as rt
from nanokl.logprob import linear_logprob
from nanokl.ngram_embedding import frequent_ngrams
from nanokl.tokenizer import Tokenizer
from nanokl.trunks import hide_tokens


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


@dataclass
class VAEFlags(Pretrain):
    """Numbers first, then the text: the evidence lower bound."""

    steps: int = 1200
    dropout: float = 0.1
    arch: Literal["transformer", "lstm"] = "transformer"  # of encoder and decoder
    n_latent: int = 32  # numbers a text is drawn as; 0: the plain language model on the same rows
    encoder_layers: int = 2
    free_bits: float = 0.12  # nats that each of those numbers may cost for nothing
    kl_warmup: float = 0.3  # part of the run in which the KL's weight grows from 0 to 1
    word_dropout: float = 0.0  # share of tokens that the decoder does not see, in training only
    iwae_samples: int = 32  # of z for each test text, in the final bound
    lm: Path | None = None  # a run with --n_latent 0, to stand beside this one on the test texts

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "iwae_samples")
        shares = (self.kl_warmup, self.word_dropout, self.free_bits)
        if not (0 <= shares[0] <= 1 and 0 <= shares[1] < 1 and 0 <= shares[2] < math.inf):
            raise UserError("kl_warmup is {}, word_dropout {}, free_bits {}: give 0 to 1, 0 to "
                            "below 1, and 0 or more".format(*shares))


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


class VAETask:
    """E_q [-log p(text | z)] + weight KL(q(z | text) || p(z)), in nats a token; rows are texts."""

    best_metric = "val_iwae_nll_nats_per_sequence"
    model, presets = vae.VAE, vae.VAE.presets

    def __init__(self, flags: VAEFlags, tokenizer: Tokenizer, runtime: rt.Runtime):
        self.flags, self.runtime, self.tokenizer = flags, runtime, tokenizer
        self.train, self.val, self.test = (
            data.Shard.open(flags.data / f"{split}.bin", tokenizer)
            for split in ("train", "val", "test" if (flags.data / "test.bin").exists() else "val"))
        self.lm = flags.lm and latent.load_plain(flags.lm, tokenizer, flags)

    def batch(self, step: int) -> tuple[tuple, torch.Tensor, int]:
        """idx, mask, what the decoder sees, all (B, T), noise (B, Z) and the KL's weight."""
        f, rng = self.flags, rt.generator(self.flags.seed, "vae", step)
        idx, mask = data.document_batch(self.train, step, batch_size=f.batch_size,
                                        block_size=f.block_size, seed=f.seed)
        hide = torch.rand(idx.shape, generator=rng) < f.word_dropout
        shown = idx.clone()
        hide_tokens(self.tokenizer, shown, hide)
        noise = torch.randn(f.batch_size, f.n_latent, generator=rng)
        weight = min(1.0, (step + 1) / max(f.kl_warmup * f.steps, 1))
        return (idx, mask, shown, noise, weight), mask.sum(1) - 1, int(mask[:, 1:].sum())

    def loss(self, model, core, batch: tuple) -> torch.Tensor:
        (*tensors, weight), r = batch, self.runtime
        idx, mask, shown, noise = (r.shard(x).to(r.device) for x in tensors)
        h, mu, logvar = model(idx, mask, shown, noise)
        nll = -linear_logprob(h, core.head.weight, idx[:, 1:], mask=mask[:, 1:]).logp.sum(1)
        loss, _ = vae.negative_elbo(nll, vae.gaussian_kl(mu, logvar), weight=weight, mean=r.mean,
                                    free_bits=self.flags.free_bits)
        # Nats a token of this batch, whose texts are of like length: those of a batch of long texts
        # weigh less than short ones. A plain model without z is trained by the same weights.
        return loss * (len(batch[0]) / batch[1][:, 1:].sum())

    def evaluate(self, core) -> dict:
        """Bound, reconstruction and KL of the validation texts."""
        numbers, _ = latent.account(core, self.val, samples=4, whole=False)
        return {f"val_{name}": x for name, x in numbers.items()}

    def final(self, core) -> dict:
        """All that is said of the test texts; beside the plain language model's bound of each."""
        numbers, bound = latent.account(core, self.test, samples=self.flags.iwae_samples)
        if self.lm:
            _, plain = latent.account(self.lm.to(self.runtime.device), self.test, samples=1)
            numbers |= latent.beside(bound, plain)
        return numbers


def build(flags: Pretrain, task, tokenizer: Tokenizer, runtime: rt.Runtime):
    """The fresh model and its optimisers."""
    if flags.preset not in task.presets:
        raise UserError(f"--preset is {flags.preset!r}: give one of {', '.join(task.presets)}")
    own = {name: getattr(flags, name) for name in ("arch", "n_latent", "encoder_layers")
           if hasattr(flags, name)}
    ngrams, switches = [], {**task.presets[flags.preset], **own}
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
    kinds = {GPTFlags: GPTTask, BERTFlags: BERTTask, VAEFlags: VAETask}
    task = kinds[type(flags)](flags, tokenizer, runtime)
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
        # 3. The numbers of the best checkpoint; a VAE's are of the test texts.
        numbers = {key.removeprefix("val_"): x for key, x in best.items() if key != "step"}
        if isinstance(task, VAETask):
            runtime.barrier()  # the main process has saved
            checkpoint.load_weights(flags.out / "best", core)
            numbers |= task.final(core.eval())
        log.close({"steps": flags.steps, "best_step": best["step"], "seed": flags.seed,
                   "parameters": sum(p.numel() for p in core.parameters()), **numbers,
                   "tokens_seen": meter.tokens_seen,
                   **throughput.medians(flags.out / "metrics.jsonl")})


def main() -> None:
    commands = {"gpt": GPTFlags, "bert": BERTFlags, "vae": VAEFlags}
    pretrain(rt.parse_flags(commands, prog="train_pretrain.py", description=__doc__))


if __name__ == "__main__":
    rt.run_program(main)
