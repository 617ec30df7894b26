"""Side by side: nanokl and its peers at the same work, on this machine, in turn.

A suite is a module nanokl/bench_SUITE.py that has
    CASES        ({"name": ..., ...}, ...): the shapes, in types of JSON. Four keys are read here:
                 "device": only there; "variants": only these; "extra": only when asked for by name;
                 "whole": a run is a whole program, timed once; its memory is not looked at
    VARIANTS     {name: set_up(case) -> Ready}, nanokl's own first. case["device"] is where to run,
                 case["data"] the folder of a corpus
    ENVIRONMENT  {variant: "peers" or "peers_ppo"}: whose Python runs it. Not given: this one
    finish       (result, folder) -> None, called after the table: a figure, say. Optional
and a docstring that says what is compared and what makes it fair.

Each variant has a fresh process, so that none profits from another's memory. Those of a case live
side by side and run in turn, A B C A B C, so that a machine that slows down slows all of them; the
ratio of two is taken within a round. All have the machine's own allocator, except for what sets
nanokl's runtime up (generate, ppo, objective, training steps), which has it keep memory;
MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=2147483647 around the program have all of them do
so: on a CPU that is faster, for who builds large tensors most of all.
"""

import contextlib
import ctypes
import gc
import importlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from nanokl import UserError, __version__
from nanokl.metrics import machine, write_json

ROOT = Path(__file__).resolve().parent.parent
SUITES = tuple(sorted(p.stem.removeprefix("bench_") for p in Path(__file__).parent.glob("bench_*")))
PACKAGES = ("torch", "numpy", "tiktoken", "transformers", "trl", "liger-kernel", "tokenizers")
TIMEOUT = 900.0  # seconds that one answer may take
SLOW = 3.0  # a ratio that need not be known to the last percent


@dataclass
class Ready:
    """A variant that is set up, and has shown how right it is."""

    run: Callable[[], object]  # the timed work; what it returns is held until memory is read
    units: float  # of work in one run
    unit: str  # such as "token" or "episode"
    check: dict[str, float]  # errors against an oracle, by name
    returned: int = 0  # bytes that every variant has to hand back, such as gradients


def serve(suite: str, case: str, variant: str) -> None:
    """A worker: sets the variant up, then answers each line of stdin with one run's cost."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    tell = lambda **answer: print(json.dumps(answer), file=answers, flush=True)  # noqa: E731
    try:
        case = json.loads(case)
        ready = importlib.import_module(f"nanokl.bench_{suite}").VARIANTS[variant](case)
        loaded = [name for name in PACKAGES if name.replace("-", "_") in sys.modules]
        tell(units=ready.units, unit=ready.unit, check=ready.check, threads=torch.get_num_threads(),
             versions={name: importlib.metadata.version(name) for name in loaded})
        for line in sys.stdin:
            tell(**{"time": _time, "memory": _memory}[line.strip()](ready, case["device"]))
    except ModuleNotFoundError as error:
        tell(skipped=f"no module named {error.name}")
    except Exception as error:
        traceback.print_exc()
        tell(failed=" ".join(f"{type(error).__name__}: {error}".split())[:300])


def _time(ready: Ready, device: str) -> dict:
    gc.collect()
    wait = torch.cuda.synchronize if device == "cuda" else int  # int() does nothing
    wait()
    start = time.perf_counter()
    held = ready.run()
    wait()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, **getattr(held, "told", {})}


def _memory(ready: Ready, device: str) -> dict:
    """Peak of one run beyond what was there before it and what everyone returns; None: unknown."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()  # of the set-up: there are other workers on this GPU
        torch.cuda.reset_peak_memory_stats()
        before, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
    else:
        with contextlib.suppress(AttributeError, OSError, TypeError):
            ctypes.CDLL(None).malloc_trim(0)  # else freed blocks would be reused and not counted
        try:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at VmRSS
        except OSError:  # not Linux
            return {"bytes": None}
        before, peak = _status("VmRSS"), lambda: _status("VmHWM")
    held = ready.run()
    grown = peak() - before
    del held
    return {"bytes": max(0, grown - ready.returned)}


def _status(name: str) -> int:
    """Bytes that /proc tells of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


class Worker(contextlib.AbstractContextManager):
    """The process of one variant; `row` gathers what is known of it.

    Its temporary files go when it does, also those of a peer that leaves them lying.
    """

    def __init__(self, python: str, suite: str, case: dict, variant: str, log: Path):
        self.row = {"name": variant, "seconds": []}
        self.scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TMPDIR": self.scratch.name}
        words = [python, "-m", "nanokl.bench", suite, json.dumps(case), variant]
        with open(log, "ab") as err:
            self.process = subprocess.Popen(words, env=env, stdin=subprocess.PIPE, text=True,
                                            stdout=subprocess.PIPE, stderr=err, cwd=ROOT)

    @property
    def works(self) -> bool:
        return not {"skipped", "failed"} & set(self.row)

    def settle(self, *, memory: bool = True) -> str:
        """Waits until it is set up, and has it measure memory; says how it is."""
        self.row |= self.ask()
        if self.works and memory:
            answer = self.ask("memory")
            self.row |= {"memory_bytes": answer.pop("bytes", None), **answer}
        return self.row.get("skipped") or self.row.get("failed") or "ready"

    def ask(self, run: str | None = None) -> dict:
        """Its next answer, after one run ("time", "memory") if that is asked for."""
        timer = threading.Timer(TIMEOUT, self.process.kill)
        timer.start()
        try:
            if run:
                print(run, file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        return json.loads(line) if line else {
            "failed": f"its process ended with status {self.process.wait()}"}

    def __exit__(self, *_) -> None:
        try:
            self.process.communicate(timeout=10)  # the end of stdin is that of its loop
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
        self.scratch.cleanup()


def run_rounds(workers: Sequence[Worker], rounds: int, seconds: float) -> None:
    """Times the workers in turn, `rounds` times; no third or later round begins after `seconds`.

    Who takes more than SLOW times as long as the first is timed twice, and no more.
    """
    start = time.monotonic()
    for number in range(rounds):
        if number >= 2 and time.monotonic() - start > seconds:
            break
        compare([worker.row for worker in workers])
        for worker in workers:
            if worker.works and (number < 2 or worker.row.get("ratio", 1.0) <= SLOW):
                answer = worker.ask("time")
                worker.row["seconds"] += [answer.pop("seconds")] if "seconds" in answer else []
                worker.row |= answer


# ratio = median over rounds of (seconds per unit of the variant / those of the first that ran)
def compare(rows: list[dict]) -> None:
    """Adds to each row its median, and its ratio to the first that ran, with least and most."""
    base = next((row for row in rows if row.get("seconds")), None)
    for row in rows:
        if "failed" in row or not row["seconds"]:
            continue
        row["seconds_median"] = statistics.median(row["seconds"])
        row["units_per_second"] = row["units"] / row["seconds_median"]
        ratios = [(a / row["units"]) / (b / base["units"])
                  for a, b in zip(row["seconds"], base["seconds"], strict=False)]
        row["ratio"], row["ratio_range"] = statistics.median(ratios), [min(ratios), max(ratios)]


def table(result: dict) -> str:
    """The result as Markdown: a table a case, a line a variant."""
    parts = [f"bench {result['suite']}: {result['machine']}, {result['device']}, "
             f"{result['date'][:10]}, commit {result['commit']}"]
    for case in result["cases"]:
        rows, first = case["variants"], case["variants"][0]["name"]
        unit = next((row["unit"] for row in rows if "unit" in row), "unit")
        parts += ["", f"**{case['case']['name']}**", "",
                  f"| variant | time, x {first}'s | median | {unit}s/s | memory, MiB | check |",
                  "|---|---|---|---|---|---|", *(f"| {' | '.join(_cells(row))} |" for row in rows)]
    return "\n".join(parts)


def _cells(row: dict) -> list[str]:
    for word in ("skipped", "failed"):
        if word in row:
            return [row["name"], f"{word}: {row[word].replace('|', '/')}", "", "", "", ""]
    low_high = "-".join(f"{x:.2f}" for x in row.get("ratio_range", ()))
    ratio = f"{row['ratio']:.2f} ({low_high})" if "ratio" in row else ""
    t, memory = row["seconds_median"], row.get("memory_bytes")
    return [row["name"], ratio, f"{t:.3g} s" if t >= 1 else f"{1e3 * t:.3g} ms",
            f"{row['units_per_second']:,.4g}", "" if memory is None else f"{memory / 2**20:,.0f}",
            ", ".join(f"{name} {value:.{4 if abs(value) >= 1 else 2}g}"
                      for name, value in row["check"].items())]


def _named(what: str, known: Sequence[str], wanted: Sequence[str]) -> None:
    if unknown := [name for name in wanted if name not in known]:
        raise UserError(f"there is no {what} {unknown[0]!r}: choose of {', '.join(known)}")


def _variants(module, case: dict, wanted: Sequence[str]) -> list[str]:
    """The variants of a case, in the suite's order, that are wanted; all where nothing is."""
    return [name for name in module.VARIANTS if name in case.get("variants", [name])
            and (not wanted or name in wanted)]


def run_suite(suite: str, out: Path, *, rounds: int = 5, seconds: float = 60.0,
              device: str = "cpu", cases: Sequence[str] = (), variants: Sequence[str] = (),
              data: Path = ROOT / "data" / "shakespeare", pythons: dict[str, str] | None = None,
              tell: Callable = str) -> dict:
    """Measures the suite's cases and writes OUT/SUITE.json; what workers say is in OUT/SUITE.log.

    `pythons`: the interpreter of each environment. `tell` gets a line at each step.
    """
    _named("suite", SUITES, [suite])
    module = importlib.import_module(f"nanokl.bench_{suite}")
    _named("case", [case["name"] for case in module.CASES], cases)
    _named("variant", list(module.VARIANTS), variants)
    chosen = [(case, names) for case in module.CASES if case.get("device", device) == device
              and (case["name"] in cases if cases else not case.get("extra"))
              and (names := _variants(module, case, variants))]
    if not chosen:
        raise UserError(f"nothing of {suite} is for {device} and these cases and variants: "
                        "give fewer of these flags")
    result = {"suite": suite, "version": __version__, "machine": machine(), "device": device,
              "date": datetime.now(timezone.utc).isoformat(" ", "seconds"), "commit": commit(),
              "rounds": rounds, "cases": []}
    place = {"device": device, "data": str(data.absolute())}
    out.mkdir(parents=True, exist_ok=True)
    (log := out / f"{suite}.log").write_text("")
    for case, names in chosen:
        tell(f"{suite} {case['name']}")
        with contextlib.ExitStack() as stack:
            workers = []
            for name in names:
                home = getattr(module, "ENVIRONMENT", {}).get(name)
                python = (pythons or {}).get(home) or sys.executable
                worker = Worker(python, suite, {**case, **place}, name, log)
                workers.append(stack.enter_context(worker))
                tell(f"  {name}: {worker.settle(memory=not case.get('whole'))}")  # one by one
            run_rounds(workers, 1 if case.get("whole") else rounds, seconds)
        rows = [worker.row for worker in workers]
        compare(rows)
        result["cases"].append({"case": case, "variants": rows})
        write_json(out / f"{suite}.json", result)  # after each case: an interrupt keeps the others
    return result


def finish_suite(result: dict, out: Path) -> None:
    """What the suite does with its result beyond the table, if anything."""
    module = importlib.import_module(f"nanokl.bench_{result['suite']}")
    getattr(module, "finish", lambda *_: None)(result, out)


def commit() -> str:
    """The checkout's commit, with + for changes on top of it."""
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    serve(*sys.argv[1:])
