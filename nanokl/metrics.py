"""Numbers on their way out: a JSONL log, a status line with rate and ETA, standard errors.

A run folder gets `metrics.jsonl` (a row for each step or evaluation) and `summary.json` (its last
word). Names carry units (`loss_nats_per_token`); a non-finite number is written as null, since
JSON has none. Nothing here draws (figures.py does), and nothing is sent anywhere.
"""

import contextlib
import json
import math
import os
import platform
import shutil
import sys
import time
from collections import deque
from datetime import datetime, timedelta, timezone
from pathlib import Path

import torch

from nanokl import UserError, __version__

TTY_SECONDS, LINE_SECONDS = 1.0, 5.0  # how often the status shows: overwritten, or as a line
RATE_STATUSES = 20  # the rate and the ETA look back over this many of them


# mean = sum x / n,   se = sqrt(sum (x - mean)^2 / (n - 1) / n): the sd of that mean over samples
def mean_se(x) -> tuple[float, float]:
    """Mean and standard error of independent samples x (n,), in float64; se is NaN for n = 1."""
    x = torch.as_tensor(x).detach().cpu().double()  # on the CPU: not every device has float64
    assert x.ndim == 1 and len(x) > 0, f"mean_se takes a non-empty vector, got {tuple(x.shape)}"
    se = x.std().item() / math.sqrt(len(x)) if len(x) > 1 else math.nan
    return x.mean().item(), se


def distinct_n(rows: list[list[int]], n: int = 2) -> float:
    """Different n-grams over all n-grams, within rows: 1 where nothing is said twice."""
    grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss; ? when unknown."""
    return str(timedelta(seconds=round(seconds))) if math.isfinite(seconds) else "?"


def machine() -> str:
    """What computes here, in words."""
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    parts = [platform.system(), platform.machine(), f"{os.cpu_count()} CPU cores", *gpu,
             f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    return ", ".join(parts)


def _plain(obj):
    """obj in the types of JSON: tensors and arrays become lists, paths text, NaN and Inf None."""
    text = json.dumps(obj, default=lambda x: x.tolist() if hasattr(x, "tolist") else os.fspath(x))
    # Python writes NaN and Infinity, which every other reader of JSON refuses
    return json.loads(text, parse_constant=lambda _: None)


def _dumps(obj, **options) -> str:
    return json.dumps(_plain(obj), ensure_ascii=False, **options) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file so that a reader finds the old text or the new one, never a part."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(tmp, "wb") as file:
            file.write(text.encode("utf-8", "replace"))  # a lone surrogate is no reason to fail
            file.flush()
            os.fsync(file.fileno())  # else a power cut could keep the rename and lose the bytes
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def write_json(path: Path, obj) -> None:
    """Write obj as JSON, atomically; NaN and Inf as null, tensors and arrays as lists."""
    write_text(path, _dumps(obj, indent=1))


def read_rows(path: Path) -> list[dict]:
    """The whole lines of a JSONL file, none of a missing one; UserError names a damaged line."""
    rows, text = [], path.read_bytes() if path.exists() else b""
    for number, line in enumerate(text.split(b"\n")[:-1], 1):  # not a half one after a crash
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            raise UserError(f"{path} line {number} is damaged: {line[:40]!r} is no JSON object; "
                            "delete that line or run the stage again") from None
    return rows


def _show(metrics: dict, prefix: str = "") -> list[str]:
    """`name value` of each number, four digits, for the eye; lists stay in the files."""
    texts = []
    for key, value in _plain(metrics).items():
        if isinstance(value, dict):
            texts += _show(value, f"{prefix}{key}.")
        elif not isinstance(value, list):
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            texts.append(f"{prefix}{key} {text}")
    return texts


class Log(contextlib.AbstractContextManager):
    """The log of one run: rows in OUT/metrics.jsonl, a status on the screen, OUT/summary.json.

    step, total count in `unit` ("step", "batch"); metrics are numbers, names with units.
    A resumed run passes its checkpoint's step: later rows are dropped, as if it had never stopped.
    `seconds` counts all sittings. Only the main process (is_main) writes and prints; a warning,
    such as KLConfig's, goes to stderr first.
    """

    def __init__(self, out: Path, *, total: int, unit: str, is_main=True, resume_step=0,
                 warning: str | None = None):
        self.out, self.total, self.unit, self.is_main = Path(out), total, unit, is_main
        path, kept = self.out / "metrics.jsonl", []
        if warning and is_main:
            print(warning, file=sys.stderr, flush=True)
        if is_main:
            self.out.mkdir(parents=True, exist_ok=True)
            kept = [row for row in read_rows(path) if row["step"] <= resume_step]
            write_text(path, "".join(map(_dumps, kept)))
            # line buffered: a row is on its way to the disk when the call returns
            self.file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        now = time.monotonic()
        self.start = now - (kept[-1]["seconds"] if kept else 0.0)
        self.marks = deque([(now, resume_step)], RATE_STATUSES)  # (time, step) of each status
        self.dirty = False  # a status stands on the terminal's last line

    def step(self, step: int, **metrics) -> None:
        """Log one training step and, when it is time, show step/total, rate, ETA and metrics."""
        if not self.is_main:
            return
        self._row(step, metrics)
        now, tty = time.monotonic(), sys.stdout.isatty()
        if now - self.marks[-1][0] < (TTY_SECONDS if tty else LINE_SECONDS) and step < self.total:
            return
        # A recent rate: one slow step (compiling, a pause) does not spoil the ETA for long.
        then, step_then = self.marks[0]
        self.marks.append((now, step))
        rate = (step - step_then) / max(now - then, 1e-9)
        eta = duration((self.total - step) / rate if rate > 0 else math.inf)
        text = (f"{self.out.name} {step:,}/{self.total:,} {self.unit}  {rate:.3g} {self.unit}/s"
                f"  ETA {eta}  {'  '.join(_show(metrics))}")
        if tty:
            width = shutil.get_terminal_size().columns - 1  # a wrapped line cannot be overwritten
            print("\r\x1b[K" + text[:width], end="", flush=True)
            self.dirty = True
        else:
            self.line(text)

    def event(self, step: int, **metrics) -> None:
        """Log an evaluation: a row, and always a line of its own."""
        if self.is_main:
            self._row(step, metrics)
            self.line(f"{self.out.name} {step:,}/{self.total:,}  {'  '.join(_show(metrics))}")

    def line(self, text: str) -> None:
        """Print a line that stays, also where a status line is being overwritten."""
        if self.is_main:
            print(("\r\x1b[K" if self.dirty else "") + text, flush=True)
            self.dirty = False

    def __exit__(self, *_):
        """Leave the file closed and the cursor on a fresh line, whatever ended the run."""
        if self.is_main:
            self.file.close()
            if self.dirty:
                print(flush=True)

    def close(self, summary: dict, told: tuple[str, ...] = ()) -> None:
        """Write OUT/summary.json (with wall_seconds, version, machine, date); say where it is.

        `told`: what need not be printed, because it has been.
        """
        if not self.is_main:
            return
        wall = round(time.monotonic() - self.start, 3)
        about = {"wall_seconds": wall, "version": __version__, "machine": machine(),
                 "date": datetime.now(timezone.utc).isoformat(" ", "seconds")}
        with contextlib.suppress(ImportError):  # no such module on Windows
            import resource
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; bytes on macOS
            about["peak_memory_gib"] = peak / (2**30 if sys.platform == "darwin" else 2**20)
        write_json(self.out / "summary.json", {**about, **summary})
        self.line(f"{self.out.name} done in {duration(wall)}")
        for text in _show({k: x for k, x in summary.items() if k not in told}):
            self.line(f"  {text}")
        self.line(f"numbers: {self.out / 'summary.json'}  curves: {self.out / 'metrics.jsonl'}")

    def _row(self, step: int, metrics: dict) -> None:
        seconds = round(time.monotonic() - self.start, 3)
        self.file.write(_dumps({"step": step, "seconds": seconds, **metrics}))
