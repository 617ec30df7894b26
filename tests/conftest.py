"""Programs as processes of their own, at 30 ms each: forks of one process that has torch loaded.

And `untuned`, for those that call in their own process what is meant for one of its own.
"""

import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORKS = multiprocessing.get_context("forkserver")
PRELOAD = ["pytest", "torch", "torch._dynamo", "tyro", "nanokl.evaluation", "nanokl.training"]
FORKS.set_forkserver_preload(PRELOAD)
# of the make or torchrun above these tests, and nothing may be fetched
FOREIGN = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "RANK", "WORLD_SIZE", "LOCAL_RANK")
OURS = {"OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1", "CUDA_VISIBLE_DEVICES": ""}
HEADER = Path(sysconfig.get_paths()["include"]) / "Python.h"
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") and HEADER.is_file()),
    reason="no g++, or no Python.h: torch.compile needs both on a CPU")


def environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in FOREIGN}
    return {**kept, **OURS, **more}


def become(words: list[str], cwd: str, env: dict[str, str], log: str) -> None:
    """What `python WORDS...` does, in a fresh process."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for fd, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(log + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, cwd)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def wait_for_rows(path: Path, n: int, process) -> None:
    """Until the file has n lines; the process must not end before."""
    while not path.exists() or path.read_bytes().count(b"\n") < n:
        assert process.is_alive(), f"ended with {process.exitcode} before {n} rows of {path}"
        time.sleep(0.001)


@pytest.fixture
def untuned(monkeypatch):
    """Set-ups in the tests' own process leave it its denormals, its allocator and its threads."""
    import torch

    monkeypatch.setattr("nanokl.runtime._tune_cpu", lambda: None)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread():
    """For tiny tensors: a second thread is only waited for."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Done:
    """How a program ended."""

    status: int
    out: str
    err: str


@dataclass
class Python:
    """Starts programs in `cwd`."""

    cwd: Path
    logs: Path
    count: int = field(default=0)

    def start(self, *words, **env: str):
        """A running process; `end` waits for it."""
        self.count += 1
        log = str(self.logs / str(self.count))
        args = ([str(w) for w in words], str(self.cwd), environment(**env), log)
        process = FORKS.Process(target=become, args=args, daemon=True)
        process.log = log
        process.start()
        return process

    def end(self, process, timeout: float = 120.0) -> Done:
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            pytest.fail(f"no end after {timeout} s: {Path(process.log + '.err').read_text()}")
        out, err = (Path(process.log + x).read_text(encoding="utf-8") for x in (".out", ".err"))
        return Done(process.exitcode, out, err)  # -15 is death by SIGTERM

    def __call__(self, *words, **env: str) -> Done:
        return self.end(self.start(*words, **env))

    def ok(self, *words, **env: str) -> Done:
        done = self(*words, **env)
        assert done.status == 0, f"{words}: {done}"
        return done

    def fails(self, *words, says=(), status: int = 2, **env: str) -> Done:
        """The program ends in this status and one line on stderr that has all of `says`."""
        done = self(*words, **env)
        assert done.status == status and "Traceback" not in done.err, f"{words}: {done}"
        assert done.err.count("\n") == 1 and done.err.startswith("error: "), done.err
        for text in [says] if isinstance(says, str) else says:
            assert text in done.err, f"{text!r} is not in {done.err!r}"
        return done

    def signalled(self, number: int, *words, rows: int) -> Done:
        """Sends a signal when metrics.jsonl in the --out of WORDS has some rows."""
        process = self.start(*words)
        out = self.cwd / words[words.index("--out") + 1]
        wait_for_rows(out / "metrics.jsonl", rows, process)
        os.kill(process.pid, number)
        return self.end(process)

    def shell(self, line: str, **env: str) -> subprocess.CompletedProcess:
        """A line for a shell, from scratch."""
        options = {"cwd": self.cwd, "env": environment(**env), "capture_output": True, "text": True}
        return subprocess.run(["bash", "-c", line], timeout=240, **options)
