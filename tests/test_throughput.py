"""throughput.py: FLOPs against torch's own count, peaks by whole names, a clock set by hand."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nanokl import bert, gpt, throughput
from nanokl.runtime import Runtime
from nanokl.throughput import Meter, medians, model_flops, peak_flops

SIZES = {"vocab_size": 37, "block_size": 16, "n_layer": 3, "n_head": 2, "n_embd": 8}
B, T = 5, 16


@pytest.mark.parametrize("preset", ["nano", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_gpt_flops_equal_torchs_count(preset, tied):
    model = gpt.GPT(gpt.GPTConfig(**SIZES | gpt.PRESETS[preset], tied=tied))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.logits(model(torch.zeros(B, T, dtype=torch.long))).sum().backward()
    assert model_flops(model, B * T, B * T * T, B * T) == counter.get_total_flops()


@pytest.mark.parametrize("preset", ["nano", "bert"])
def test_bert_flops_equal_torchs_count(preset):
    """The head runs on the masked tokens alone; rows of several lengths come one by one."""
    model = bert.BERT(bert.BERTConfig(**SIZES | bert.PRESETS[preset]))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for length in (4, 9, 16):
            h = model(torch.zeros(1, length, dtype=torch.long))
            model.logits(h[0, :2]).sum().backward()
    assert model_flops(model, 29, 16 + 81 + 256, 6) == counter.get_total_flops()


def test_flops_of_gpt2_124m():
    """.857 GFLOP a token, and 1.6 % fewer where biases and norms are left out of N."""
    config = gpt.GPTConfig(**gpt.PRESETS["gpt2"], vocab_size=50257, block_size=1024, n_layer=12,
                           n_head=12, n_embd=768)  # fmt: skip
    with torch.device("meta"):
        model = gpt.GPT(config)
    n = 12 * 12 * 768**2 + 50257 * 768
    assert model_flops(model, 1, 1024, 1) == 6 * n + 12 * 12 * 768 * 1024
    assert model_flops(model, 1, 1024, 1) == pytest.approx(0.857e9, rel=0.01)


@pytest.mark.parametrize(
    ("name", "bf16", "float32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA H200", 989e12, 67e12),
        ("Tesla V100-SXM2-16GB", None, 15.7e12),  # it has no bfloat16
        ("NVIDIA H200 MIG 1g.18gb", None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA GeForce RTX 4090 D", None, None),
        ("NVIDIA H100", None, None),
        ("GRID A100X-40C", None, None),
    ],
)
def test_peak_is_known_or_none(monkeypatch, name, bf16, float32):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    device = torch.device("cuda", 0)
    assert peak_flops(Runtime(device, torch.bfloat16)) == bf16
    assert peak_flops(Runtime(device, torch.float32)) == float32
    if bf16:
        assert peak_flops(Runtime(device, torch.bfloat16, rank=1, world=4)) == 4 * bf16
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_flops(Runtime(device, torch.float32)) is None  # TF32
    assert peak_flops(Runtime(torch.device("cpu"), torch.bfloat16)) is None


@pytest.fixture
def clock(monkeypatch):
    """clock[0] is the time in seconds."""
    now = [1000.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    return now


def test_meter_leaves_out_what_is_between_the_steps(clock, monkeypatch):
    model = gpt.GPT(gpt.GPTConfig(**SIZES))
    monkeypatch.setattr(throughput, "peak_flops", lambda runtime: 1e6)
    meter = Meter(model, None, tokens_seen=100)

    def step(lengths, loading, seconds):
        with meter:
            clock[0] += loading
            meter.loaded(torch.tensor(lengths), predicted=3)
            clock[0] += seconds
        clock[0] += 777.0  # evaluation, saving

    step([16, 4], 0.5, 1.5)
    step([10], 1.5, 4.5)
    work = model_flops(model, 30, 256 + 16 + 100, 6)
    assert meter.rates() == {"tokens_seen": 130, "loader_share": 0.25, "tokens_per_second": 4,
                             "mfu": pytest.approx(work / 8 / 1e6)}  # fmt: skip
    step([16], 0.0, 2.0)  # since the last call only
    mfu = pytest.approx(model_flops(model, 16, 256, 3) / 2e6)
    assert meter.rates() == {"tokens_seen": 146, "loader_share": 0.0, "tokens_per_second": 8,
                             "mfu": mfu}  # fmt: skip


def test_meter_without_a_known_peak_has_no_mfu(clock):
    meter = Meter(gpt.GPT(gpt.GPTConfig(**SIZES)), Runtime(torch.device("cpu"), torch.bfloat16))
    with meter:
        meter.loaded(torch.tensor([4]), 4)
        clock[0] += 1.0
    assert meter.rates() == {"tokens_seen": 4, "loader_share": 0.0, "tokens_per_second": 4}


def test_medians_over_the_rows_that_have_them(tmp_path):
    rows = [{"step": 1, "tokens_per_second": 5}, {"step": 2, "val": 1.0},
            {"step": 3, "tokens_per_second": 70, "mfu": 0.4},
            {"step": 4, "tokens_per_second": 72, "mfu": 0.5}]  # fmt: skip
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert medians(tmp_path / "m.jsonl") == {"tokens_per_second": 70, "mfu": 0.45}
    assert medians(tmp_path / "none.jsonl") == {}
