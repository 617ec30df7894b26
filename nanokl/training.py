"""What the training loops share: one update, state on the disk, leaving on a signal.

The loops themselves are written out in train_pretrain.py, train_rlhf.py and supervise.py. Nothing
random carries over from step to step: `seed_step` makes even dropout a function of (seed, step,
rank), so the state of a run is its weights, its optimisers and a few numbers.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from nanokl import UserError, checkpoint
from nanokl.hf_tokenizer import load_tokenizer
from nanokl.metrics import Log
from nanokl.runtime import Interrupt, NonFiniteLoss, Runtime, generator

SHARED = {"batch_size", "batch", "minibatch", "n_groups", "n_samples", "n_eval"}  # by processes
MAY_CHANGE = {"out", "resume", "device", "log_every", "save_every"}  # flags of a resumed run


def seed_step(seed: int, step: int, runtime: Runtime) -> None:
    """Dropout's randomness for one step, the same whether or not the run was interrupted."""
    torch.manual_seed(generator(seed, "dropout", step, runtime.rank).initial_seed())


def gradient_step(loss: Tensor, parameters, optimizers, *, max_grad_norm: float, step: int,
                  out: Path) -> Tensor:
    """One update; returns the norm before clipping. NonFiniteLoss comes before any weight moves."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    check_finite(bool(loss.isfinite() & norm.isfinite()), step, out)  # so nothing spoilt is saved
    for optimizer in optimizers:
        optimizer.step()
    return norm


def freeze(model: nn.Module, n: int) -> None:
    """Keeps the tokens' embeddings and the lowest n blocks as they are; UserError: too many."""
    if not 0 <= n <= model.config.n_layer:
        raise UserError(f"--freeze is {n}: give 0 to {model.config.n_layer}, the model's blocks")
    for name, p in model.named_parameters() if n else ():
        block = re.match(r"blocks\.(\d+)\.", name)
        below = name.startswith(("wte.", "wpe.", "wse.", "norm_embed.", "ngrams."))
        if below or (block and int(block[1]) < n):
            p.requires_grad_(False)


def check_finite(finite: bool, step: int, out: Path) -> None:
    """NonFiniteLoss, which names OUT/last where it exists, unless `finite`."""
    if not finite:
        last = Path(out) / "last"
        raise NonFiniteLoss(step, last if last.exists() else None)


def save_last(out: Path, model: nn.Module, optimizers, *, tokenizer, **state) -> None:
    """OUT/last: everything that a resumed run needs; `state` is plain data."""
    state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    checkpoint.save(Path(out) / "last", model, tokenizer=tokenizer, state=state)


def load_last(out: Path, model: nn.Module, optimizers, *, tokenizer) -> dict:
    """Restores weights and optimisers from OUT/last; returns the rest of its state."""
    checkpoint.load_weights(Path(out) / "last", model)
    state = checkpoint.load_state(Path(out) / "last")
    if load_tokenizer(Path(out) / "last").hash != tokenizer.hash:
        raise UserError(f"{out} was trained with another tokenizer than --data's, or that of its "
                        "pretrained model: give it its own")
    try:
        for optimizer, saved in zip(optimizers, state.pop("optimizers"), strict=True):
            optimizer.load_state_dict(saved)
    except (ValueError, KeyError) as error:
        raise UserError(f"{out}/last/state.pt is of another model ({error}): there is no "
                        "resuming") from None
    return state


def open_run(flags, runtime: Runtime) -> bool:
    """Claims flags.out; True when an old run goes on, whose flags must be the same."""
    for name in SHARED & vars(flags).keys():
        if getattr(flags, name) % runtime.world:
            raise UserError(f"--{name} must be a multiple of the {runtime.world} processes")
    resuming = checkpoint.open_run(flags.out, vars(flags), resume=flags.resume,
                                   frozen=vars(flags).keys() - MAY_CHANGE, is_main=runtime.is_main)
    runtime.barrier()
    return resuming


@contextlib.contextmanager
def nothing_half_written(out: Path, runtime: Runtime) -> Iterator[None]:
    """An error that shows only in the loop takes OUT away again if no checkpoint is in it."""
    try:
        yield
    except NonFiniteLoss:
        raise  # its curve shows why
    except Exception:
        if runtime.is_main and not any(Path(out).glob("*/config.json")):
            for name in ("flags.json", "metrics.jsonl"):
                (Path(out) / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # somebody's own files are in it
                Path(out).rmdir()
        raise


def leave(interrupt: Interrupt, log: Log, step: int, out: Path) -> None:
    """Ends the program after a signal; the caller has saved."""
    log.line(f"stopped by {interrupt.signal.name} after step {step}, saved in {out}/last: "
             "go on with the same command and --resume")
    raise SystemExit(interrupt.status)
