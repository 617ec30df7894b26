"""What a program stands on: device, compute dtype, ranks, seeds, interrupts, flags, exit statuses.

Many processes are `torchrun` and DistributedDataParallel; there is no launcher, no sharding of
weights and no configuration file here.
"""

import contextlib
import ctypes
import errno
import gc
import hashlib
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nanokl import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# glibc (malloc.h): M_TRIM_THRESHOLD, keep freed heap; M_TOP_PAD, grow it by 64 MiB; M_MMAP_MAX,
# serve big blocks from it and not by mmap.
MALLOPT = {-1: 2**31 - 1, -2: 2**26, -4: 0}


@dataclass(frozen=True)
class Runtime:
    """Where this process computes, and its place among the processes of the run."""

    device: torch.device
    dtype: torch.dtype  # of the matrix products; weights and statistics stay float32
    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files and prints."""
        return self.rank == 0

    def autocast(self) -> contextlib.AbstractContextManager:
        """Matrix products in bfloat16 where that is the compute dtype; else in the tensors' own."""
        bf16 = self.dtype is torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module whose backward averages gradients over ranks; `module` itself for one.

        The average is over ranks, not rows: a mean over unequal counts must be weighted by the
        caller. Every parameter must take part in each backward.
        """
        if self.world == 1:
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=ids)

    def shard(self, x):
        """Every world-th row of `x` (tensor, array or list), from this rank's own on."""
        return x[self.rank :: self.world]

    def mean(self, tensor: Tensor) -> Tensor:
        """The average over ranks, detached; `tensor` itself for one rank."""
        if self.world == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total / self.world

    def gather(self, tensor: Tensor) -> Tensor:
        """Rows of all ranks, detached, in the order that undoes `shard`: gather(shard(x)) == x."""
        if self.world == 1:
            return tensor
        rows = torch.tensor(len(tensor), device=tensor.device)
        dist.all_reduce(rows)
        n = int(rows)
        mine = len(range(self.rank, n, self.world))
        assert len(tensor) == mine, f"gather: {len(tensor)} rows, a shard of {n} has {mine}"
        padded = tensor.detach().new_zeros(-(-n // self.world), *tensor.shape[1:])
        padded[:mine] = tensor
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return torch.stack(parts, dim=1).flatten(0, 1)[:n]

    def any(self, flag: bool) -> bool:
        """True on every rank if `flag` is True on one: all stop together, or some wait for ever."""
        return bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0)

    def barrier(self) -> None:
        """Waits until every rank is here."""
        if self.world > 1:
            dist.barrier()


def setup(device: str = "auto", dtype: str = "auto") -> Runtime:
    """Picks device and dtype and joins torchrun's process group; call it once, before any work.

    auto is cuda, else cpu (mps lacks float64); bfloat16 on CUDA from Ampere and on CPUs with AMX,
    else float32. UserError for a device that is not there or a name that means nothing.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    where = _device(device, local_rank=int(os.environ.get("LOCAL_RANK", 0)), world=world)
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"dtype is {dtype!r}: choose auto, float32 or bfloat16")
    compute = _fast_dtype(where) if dtype == "auto" else DTYPES[dtype]
    if where.type == "cuda":
        torch.cuda.set_device(where)
    elif where.type == "cpu":
        _tune_cpu()
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    return Runtime(where, compute, rank, world)


def _device(name: str, *, local_rank: int, world: int) -> torch.device:
    count, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    there = {"cuda": count > 0, "mps": mps and world == 1, "cpu": True}  # gloo carries no mps
    if name == "auto":
        name = "cuda" if there["cuda"] else "cpu"
    if name not in there:
        raise UserError(f"device is {name!r}: choose auto, cpu, cuda or mps")
    if not there[name] or (name == "cuda" and local_rank >= count):
        raise UserError(f"device {name} was asked for but is not there ({count} GPUs, {world} "
                        "processes): use --device auto or cpu, or fewer processes")
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def _fast_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        amx = getattr(torch.cpu, "_is_amx_tile_supported", bool)  # private; bool() is False
        fast = device.type == "cpu" and amx()
    return torch.bfloat16 if fast else torch.float32


def _tune_cpu() -> None:
    """Flushes denormals, and has glibc keep freed blocks: page faults can be a third of a step."""
    torch.set_flush_denormal(True)  # False where the CPU cannot: no harm
    torch.zeros(1).exp()  # the first one must not be in several threads: see logprob.py
    # Not glibc: CDLL(None) fails on Windows, mallopt is missing on macOS and musl.
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in MALLOPT.items():
            mallopt(parameter, value)


def generator(seed: int, *stream: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one use: its own stream for each (seed, stream), such as (0, "ppo", step).

    A hash makes the streams unrelated; PyTorch's CPU generator keeps 32 bits of it, so two of n
    streams coincide with odds of about n^2 / 2^33.
    """
    digest = hashlib.blake2b(repr((seed, *stream)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


class Interrupt:
    """Within `with Interrupt() as stop`, SIGINT and SIGTERM only set `stop.set`: finish and save.

    A second SIGINT raises KeyboardInterrupt. `stop.status` is the exit status that tells a shell
    (130 or 143). The old handlers are back afterwards.
    """

    def __init__(self) -> None:
        self.set, self.signal = False, signal.SIGINT
        # torchrun passes the terminal's Ctrl-C on, so that its workers get every one twice.
        self._twice = "TORCHELASTIC_RUN_ID" in os.environ

    @property
    def status(self) -> int:
        """128 + signal number, as shells count."""
        return 128 + int(self.signal)

    def __enter__(self) -> "Interrupt":
        self._old = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_exc) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame) -> None:
        if self.set and number == signal.SIGINT and not self._twice:
            raise KeyboardInterrupt
        if not self.set:
            self.set, self.signal = True, signal.Signals(number)


class NonFiniteLoss(RuntimeError):
    """A loss became NaN or infinite at `step`; `checkpoint` is the last good one, None without."""

    def __init__(self, step: int, checkpoint: str | os.PathLike | None = None) -> None:
        self.step, self.checkpoint = step, checkpoint
        good = f"last good checkpoint: {checkpoint}" if checkpoint else "no checkpoint before it"
        super().__init__(f"the loss is not finite at step {step}; {good}; try a lower lr")


def run_program(main: Callable[[], None]) -> None:
    """Calls `main`; a user's mistake or a full disk is one line on stderr and exit status 2.

    NonFiniteLoss is exit status 3, Ctrl-C 130. Other exceptions are bugs and keep their traceback.
    """
    status: int | str | None = None
    try:
        main()
    except SystemExit as leave:
        status = leave.code
    except (UserError, NonFiniteLoss) as error:
        status = _complain(str(error), 2 if isinstance(error, UserError) else 3)
    except KeyboardInterrupt:
        status = _complain("interrupted; nothing was saved after the last checkpoint", 130)
    except BrokenPipeError:  # the reader of our output (head, less) has gone: nothing to tell it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where += "; what was saved before is intact: make room and go on with --resume"
        status = _complain(f"{error.strerror or error}{where}", 2)
    if dist.is_initialized():
        gc.collect()  # A DDP module must go before its group: freed after it, it can hang in
        # ending gloo's threads while it holds the lock that they wait for.
        dist.destroy_process_group()
    if status is not None:
        raise SystemExit(status)


def _complain(message: str, status: int) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return status


def parse_flags(subcommands: dict[str, type] | type, *, prog: str, description: str,
                args: Sequence[str] | None = None):
    """An instance of the dataclass, or of the subcommand's, from `args` (the command line's).

    The comment beside a field is its help. A wrong flag ends in one line on stderr and status 2.
    """
    many = isinstance(subcommands, dict)
    parse = tyro.extras.subcommand_cli_from_dict if many else tyro.cli
    box = io.StringIO()  # for the message that tyro draws on stderr before SystemExit
    try:
        with contextlib.redirect_stderr(box):
            return parse(subcommands, prog=prog, description=description, args=args)
    except SystemExit as error:
        if error.code in (0, None):  # --help
            raise
        raise SystemExit(_complain(_flatten(box.getvalue()), 2)) from None


def _flatten(box: str) -> str:
    """The text of a box of lines: no colours, no frame, `;` where a rule divides it."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    rows = [line.strip(" │|") for line in plain.splitlines() if line[:1] not in "╭╰+"]
    text = re.sub(r"[\s.]*[─-]{8,}\s*", "; ", " ".join(rows))
    return text.strip().removeprefix("Error parsing ")
