"""bench: what workers answer, who runs when, and that every variant that is at hand is right."""

import json
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, Python

from nanokl import UserError, bench, bench_bpe, bench_logprob, bench_scaling
from nanokl.bench import Ready, Worker

TINY = {case["name"]: {**case, "device": "cpu"} for case in bench_logprob.CASES
        if case.get("extra")}  # fmt: skip
HERE = [name for name in bench_logprob.VARIANTS
        if name not in bench_logprob.ENVIRONMENT and "compiled" not in name]  # fmt: skip
TEXT = " ".join(f"the cat number {i} sat on the mat; the rat ran {i * i} times." for i in range(60))
pytestmark = pytest.mark.usefixtures("untuned")


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Python:
    return Python(ROOT, tmp_path_factory.mktemp("logs"))


@pytest.fixture
def text_file(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


class Double:
    """In place of a worker: takes what it is told, notes when it was asked, fails when told."""

    def __init__(self, name, cost, asked, fails_at=99):
        self.cost, self.asked, self.fails_at = cost, asked, fails_at
        self.row = {"name": name, "seconds": [], "units": 2, "unit": "thing", "check": {}}

    works = Worker.works

    def ask(self, run):
        assert run == "time"
        self.asked.append(self.row["name"])
        if len(self.row["seconds"]) == self.fails_at:
            return {"failed": "RuntimeError: no more"}
        return {"seconds": self.cost}


# --------------------------------------------------------------------------------- who runs when
def test_variants_run_in_turn():
    asked = []
    workers = [Double(name, cost, asked) for name, cost in (("A", 1.0), ("B", 2.0), ("C", 2.9))]
    bench.run_rounds(workers, 3, 60.0)
    assert asked == ["A", "B", "C"] * 3
    assert [w.row["seconds"] for w in workers] == [[1.0] * 3, [2.0] * 3, [2.9] * 3]


def test_the_slow_run_twice_and_the_failed_no_more():
    asked = []
    workers = [Double("A", 1.0, asked), Double("B", 3.1, asked), Double("C", 1.0, asked, 1)]
    bench.run_rounds(workers, 4, 60.0)
    assert asked == ["A", "B", "C", "A", "B", "C", "A", "A"]
    assert workers[2].row["failed"] == "RuntimeError: no more"


def test_two_rounds_whatever_they_take():
    asked = []
    bench.run_rounds([Double("A", 1.0, asked)], 5, 0.0)
    assert asked == ["A", "A"]


def test_ratios_are_per_unit_and_within_a_round():
    rows = [{"name": "A", "seconds": [1.0, 2.0, 4.0], "units": 10},
            {"name": "B", "seconds": [1.0, 1.0], "units": 5},
            {"name": "C", "seconds": [], "skipped": "no module named c"},
            {"name": "D", "seconds": [1.0], "units": 1, "failed": "E: x"}]  # fmt: skip
    bench.compare(rows)
    assert rows[0]["ratio"] == 1.0 and rows[0]["units_per_second"] == 5.0
    assert rows[1]["ratio"] == pytest.approx(1.5) and rows[1]["ratio_range"] == [1.0, 2.0]
    assert "ratio" not in rows[2] and "ratio" not in rows[3]


def test_table_shows_every_row():
    rows = [{"name": "A", "seconds": [0.01], "units": 10, "unit": "token", "memory_bytes": 3 << 20,
             "check": {"logp": 1.234e-6, "chunk": 256}},
            {"name": "B", "seconds": [], "skipped": "no module named b"},
            {"name": "C", "seconds": [], "failed": "ValueError: a | b"}]  # fmt: skip
    bench.compare(rows)
    text = bench.table({"suite": "s", "machine": "m", "device": "cpu", "date": "2026-01-02 03:04",
                        "commit": "abc", "cases": [{"case": {"name": "k"}, "variants": rows}]})
    assert text.splitlines()[0] == "bench s: m, cpu, 2026-01-02, commit abc"
    assert "| A | 1.00 (1.00-1.00) | 10 ms | 1,000 | 3 | logp 1.2e-06, chunk 256 |" in text
    assert "| B | skipped: no module named b |" in text
    assert "| C | failed: ValueError: a / b |" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


# ------------------------------------------------------------------------------------ real workers
@pytest.mark.skipif(find_spec("trl") is not None, reason="trl is here")
def test_logprob_as_a_user_runs_it(python, tmp_path):
    words = ("-m", "nanokl", "bench", "logprob", "--out", tmp_path, "--cases", "tiny",
             "--variants", "nanokl", "naive", "trl", "--rounds", 3, "--peers", sys.executable,
             "--device", "cpu")  # fmt: skip
    done = python.ok(*words)
    result = json.loads((tmp_path / "logprob.json").read_bytes())
    (entry,) = result["cases"]
    rows = {row["name"]: row for row in entry["variants"]}
    assert list(rows) == ["nanokl", "naive", "trl"] and entry["case"]["name"] == "tiny"
    assert rows["trl"] == {"name": "trl", "seconds": [], "skipped": "no module named trl"}
    assert len(rows["nanokl"]["seconds"]) == 3 and min(rows["nanokl"]["seconds"]) > 0
    assert rows["nanokl"]["ratio"] == 1.0 and rows["nanokl"]["threads"] == 1
    assert rows["naive"]["check"]["dW"] < 1e-6 and rows["naive"]["versions"]["torch"]
    assert {"machine", "date", "commit", "version"} <= set(result)
    assert "| trl | skipped: no module named trl |" in done.out
    assert done.err.splitlines()[-1] == "  trl: no module named trl"


def test_a_variant_that_fails_is_listed(tmp_path):
    result = bench.run_suite("bpe", tmp_path, cases=["tiny"], variants=["nanokl"],
                             data=tmp_path / "nowhere")
    (row,) = result["cases"][0]["variants"]
    assert row["failed"].startswith("UserError: no tokenizer at") and row["seconds"] == []
    assert "Traceback" in (tmp_path / "bpe.log").read_text()


@pytest.mark.skipif(shutil.which("false") is None, reason="no program that only fails")
def test_a_process_that_dies_is_listed(tmp_path):
    result = bench.run_suite("bpe", tmp_path, cases=["tiny"], variants=["tokenizers"],
                             pythons={"peers": shutil.which("false")})
    (row,) = result["cases"][0]["variants"]
    assert row["failed"] == "its process ended with status 1"


def test_an_answer_may_not_take_for_ever(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "TIMEOUT", 0.01)
    with Worker(sys.executable, "bpe", {"device": "cpu"}, "nanokl", tmp_path / "log") as worker:
        assert worker.ask() == {"failed": "its process ended with status -9"}


@pytest.mark.skipif(shutil.which("sh") is None, reason="no shell")
@pytest.mark.parametrize("ending", ["", "kill -9 $$"])
def test_what_a_worker_leaves_behind_goes(tmp_path, ending):
    """Whether it ends by itself or is killed."""
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nmkdir "$TMPDIR/left"\necho "$TMPDIR/left" >&2\n{ending}\n')
    script.chmod(0o755)
    with Worker(str(script), "bpe", {"device": "cpu"}, "nanokl", tmp_path / "log") as worker:
        assert "its process ended with status" in worker.ask()["failed"]
        left = Path((tmp_path / "log").read_text().strip())
        assert left.is_dir()
    assert not left.parent.exists()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="not Linux")
def test_memory_is_the_peak_beyond_what_is_returned():
    size = 64 << 20
    ready = Ready(lambda: torch.ones(size // 4) + 0, 1, "run", {})  # two of them at the peak
    assert bench._memory(ready, "cpu")["bytes"] == pytest.approx(2 * size, rel=0.1)
    ready.returned = size
    assert bench._memory(ready, "cpu")["bytes"] == pytest.approx(size, rel=0.1)


def test_time_is_that_of_a_run():
    assert 0.02 <= bench._time(Ready(lambda: time.sleep(0.02), 1, "run", {}), "cpu")["seconds"] < 1


@pytest.mark.parametrize(("flags", "says"), [
    ({"suite": "nosuch"}, "there is no suite 'nosuch': choose of"),
    ({"cases": ["big"]}, "there is no case 'big'"),
    ({"variants": ["nanokl2"]}, "there is no variant 'nanokl2'"),
    ({"variants": ["liger linear ce"]}, "nothing of logprob is for cpu"),
])  # fmt: skip
def test_wrong_names(tmp_path, flags, says):
    with pytest.raises(UserError, match=says):
        bench.run_suite(**{"suite": "logprob", "out": tmp_path, **flags})


def test_wrong_flags(python, tmp_path):
    words = ("-m", "nanokl", "bench", "logprob", "--out", tmp_path)
    python.fails(*words, "--device", "mps", says="choose auto, cpu or cuda")
    python.fails(*words, "--rounds", 0, says="rounds is 0")
    python.fails(*words, "--peers", tmp_path / "python", says="which is not there")


# ------------------------------------------------------------------------------------------ logprob
@pytest.mark.parametrize("case", [
    TINY["tiny"], TINY["tiny bfloat16"], {**TINY["tiny"], "masked": 0.15},
    {**TINY["tiny"], "outputs": ["logp", "entropy", "kl"]},
], ids=["float32", "bfloat16", "masked", "entropy and KL"])  # fmt: skip
@pytest.mark.parametrize("variant", HERE)
def test_variants_are_right(case, variant):
    if variant.startswith("torch"):
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            pytest.skip("this torch has no linear_cross_entropy")
        if "masked" in case or len(case["outputs"]) > 1:
            pytest.skip("it has no such output")
    if variant == "naive of picked rows" and "kl" in case["outputs"]:
        pytest.skip("it has no such output")
    ready = bench_logprob.VARIANTS[variant](case)
    ready.run()
    bf16 = case["dtype"] == "bfloat16"
    limits = {"dh": 1e-2, "dW": 1e-2} if bf16 else {"logp": 1e-5, "dh": 1e-6, "dW": 1e-6}
    assert all(ready.check.get(name, 0) < limit for name, limit in limits.items()), ready.check
    assert (ready.units, ready.unit) == (96, "token")
    if "products" not in variant:
        assert ready.returned == 96 * 16 * (2 if bf16 else 4) + 512 * 16 * 4


def test_the_oracle_is_cross_entropy():
    work = bench_logprob.Work({**TINY["tiny"], "N": 300})
    (logp,), (dh, dw) = work.oracle()
    h, w = (x.detach().double().requires_grad_() for x in (work.h, work.w))
    exact = -F.cross_entropy(h @ w.t(), work.y, reduction="none")
    exact.backward(work.upstream[0].double())
    for ours, theirs in ((logp, exact), (dh, h.grad), (dw, w.grad)):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_wrong_variant_is_no_result():
    with pytest.raises(ValueError, match="wrong gradients"):
        bench_logprob.Work(TINY["tiny"]).ready(lambda x: [1.2 * t for t in bench_logprob._naive(x)])


def test_logits_have_the_spread_that_is_said():
    work = bench_logprob.Work(TINY["tiny"])
    assert (work.h @ work.w.t()).std().item() == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("suite", [bench_logprob, bench_bpe, bench_scaling])
def test_suites_are_consistent(suite):
    assert len({case["name"] for case in suite.CASES}) == len(suite.CASES)
    assert json.loads(json.dumps(suite.CASES)) == [
        {key: list(x) if isinstance(x, tuple) else x for key, x in case.items()}
        for case in suite.CASES]  # fmt: skip
    for case in suite.CASES:
        assert set(case.get("variants", ())) <= set(suite.VARIANTS), case["name"]
    assert set(getattr(suite, "ENVIRONMENT", {})) <= set(suite.VARIANTS)
    assert set(getattr(suite, "ENVIRONMENT", {}).values()) <= {"peers", "peers_ppo"}


# --------------------------------------------------------------------------------- bpe and scaling
def test_bpe(text_file):
    case = {"vocab_size": 300, "device": "cpu", "data": str(text_file)}
    ready = bench_bpe.VARIANTS["nanokl"](case)
    assert ready.check["merges not most frequent"] == 0 and ready.check["bytes per token"] > 1.5
    assert len(ready.run().tokens) == 256 + ready.units == 300
    ready = bench_bpe.VARIANTS["tiktoken educational"](case)
    assert ready.check == {"tokens that differ": 0} and len(ready.run()) == 256 + ready.units


def test_bpe_sees_a_merge_that_is_not_the_most_frequent():
    tokens = tuple(bytes([b]) for b in range(256))
    chunks = bench_bpe._count_chunks([TEXT], bench_bpe.PATTERN)
    assert bench_bpe._is_most_frequent((*tokens, b" t"), 256, chunks) is False
    assert bench_bpe._is_most_frequent((*tokens, b"at"), 256, chunks) is True


def test_bpe_puts_a_data_folder_together_again(tmp_path):
    from nanokl.corpus import Corpus, prepare_corpus

    corpus = Corpus({"train": [TEXT[:999]], "val": [TEXT[999:]]})
    prepare_corpus(tmp_path / "data", lambda: corpus, settings={}, level="char")
    assert bench_bpe._text(str(tmp_path / "data")) == TEXT


def test_scaling_draws_what_was_measured(tmp_path):
    pytest.importorskip("matplotlib")
    step = next(case for case in bench_scaling.CASES if case["name"] == "tiny step")
    ready = bench_scaling.VARIANTS["training step"]({**step, "device": "cpu", "dtype": "float32"})
    ready.run()
    assert ready.units == 64 and ready.check["loss"] < 1e-5
    result = {"cases": []}
    for case in bench_scaling.CASES:  # as if time grew with V and N; one variant has failed
        rows = [{"name": name, "seconds_median": 1e-6 * case.get("N", 1) * case["V"],
                 "units_per_second": 100.0, "memory_bytes": case["V"] << 10,
                 "check": {"parameters": case.get("n_embd", 1) ** 2}}
                for name in case["variants"][:1]]  # fmt: skip
        result["cases"].append({"case": case, "variants": [*rows, {"name": "naive"}]})
    bench_scaling.finish(result, tmp_path)
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    x, _ = bench_scaling._points(result, "N", "nanokl", "seconds_median")
    assert x == [64, 256, 1024, 4096]
