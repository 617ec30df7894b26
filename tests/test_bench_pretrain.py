"""bench pretrain: the recipe learns, losses are those of brute force, programs run whole."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from nanokl import bench, bench_pretrain
from nanokl.data import Shard
from nanokl.logprob import linear_logprob
from nanokl.tokenizer import Tokenizer

TEXT = " ".join(f"the cat number {i} sat on the mat; the rat ran {i * i} times." for i in range(99))
STEP = {"n_layer": 1, "n_head": 2, "n_embd": 16, "T": 16, "B": 4, "V": 64, "device": "cpu"}
pytestmark = pytest.mark.usefixtures("untuned")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("bench")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    words = ["data/text/prepare.py", folder / "text.txt", "--level", "char", "--out", folder / "d"]
    subprocess.run([sys.executable, *map(str, words)], check=True, cwd=ROOT, capture_output=True)
    return str(folder / "d")


def test_the_recipe_learns(data):
    torch.manual_seed(0)
    first, last = (bench_pretrain.train_recipe(data, n) for n in (1, 60))
    assert last < 0.7 * first and first < 1.1 * math.log(Tokenizer.load(data).vocab_size)


def test_evaluation_scores_each_token_once(data):
    """In windows of its own context; the separator that closes the text is scored as well."""
    tokenizer = Tokenizer.load(data)
    shard = Shard.open(f"{data}/val.bin", tokenizer)
    model = bench_pretrain.GPT(bench_pretrain.GPTConfig(
        vocab_size=tokenizer.vocab_size, block_size=50, n_layer=1, n_head=2, n_embd=8))
    idx, nats = torch.from_numpy(shard.tokens.astype("int64")), []
    for start in range(0, len(idx) - 1, 50):
        window = idx[start : start + 51]
        logp = model.logits(model(window[None, :-1]))[0].log_softmax(-1)
        nats += (-logp.gather(1, window[1:, None])[:, 0]).tolist()
    assert bench_pretrain.evaluate(model, shard) == pytest.approx(sum(nats) / len(nats), rel=1e-5)


def test_the_loader_draws_as_many_tokens(data):
    ready = bench_pretrain.VARIANTS["its loader"]({**STEP, "data": data})
    assert ready.run().shape == (4, 17) and ready.units == 64


def step(monkeypatch, variant: str, dtype: str = "float32") -> bench.Ready:
    monkeypatch.setattr(torch, "compile", lambda function: function)
    return bench_pretrain.VARIANTS[variant]({**STEP, "dtype": dtype})


@pytest.mark.parametrize("variant", ["nanokl", "plain"])
@pytest.mark.parametrize(("dtype", "limits"), [
    ("float32", (2e-6, 1e-5)), ("bfloat16", (2e-3, 3e-2))])
def test_a_step_is_right(monkeypatch, variant, dtype, limits):
    ready = step(monkeypatch, variant, dtype)
    ready.run()
    assert ready.units == 64 and ready.unit == "token" and ready.check["parameters"] > 4000
    assert ready.check["loss"] < limits[0]
    assert 0 < ready.check["embedding's gradient"] < limits[1]


@pytest.mark.parametrize("fault", [
    ("nanokl.transformer.rotate", lambda x, table: x),
    ("nanokl.layers.SquaredReLU.backward", lambda ctx, grad: grad * ctx.saved_tensors[0]),
    ("nanokl.bench_pretrain.linear_logprob", lambda h, w, y: linear_logprob(h, w, y.roll(1, 1)))])
def test_a_wrong_step_shows(monkeypatch, fault):
    monkeypatch.setattr(*fault)
    assert step(monkeypatch, "nanokl").check["embedding's gradient"] > 0.03


def test_a_program_runs_whole_and_tells_its_loss(data):
    ready = bench_pretrain.program(*bench_pretrain.QUICK, "--steps", "3")({"data": data})
    told = ready.run().told["check"]
    assert told["M tokens"] == 3 * 8 * 256 / 1e6
    assert 0 < told["nats per token"] < 1.2 * math.log(261)


def test_a_whole_case_is_timed_once(data, tmp_path):
    result = bench.run_suite("pretrain", tmp_path, cases=["tiny recipe"], data=Path(data),
                             rounds=3)
    (row,) = result["cases"][0]["variants"]
    assert len(row["seconds"]) == 1 and "memory_bytes" not in row, row
    assert row["check"]["nats per token"] > 0
    assert "nats per token" in bench.table(result)
