"""gpt.py against GPT-2 written out in numpy float64, and known parameter counts."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_transformer import (
    close,
    layer_norm64,
    linear64,
    nano64,
    one_thread,  # noqa: F401
    randomise,
    rng,
    self_attention64,
    tokens,
    visible64,
    weights64,
)

from nanokl import UserError
from nanokl.bert import BERT, BERTConfig
from nanokl.gpt import GPT, PRESETS, GPTConfig

SIZES = {"vocab_size": 29, "block_size": 12, "n_layer": 2, "n_head": 3, "n_embd": 12}


def make(preset, seed=0, **switches):
    return randomise(GPT(GPTConfig(**SIZES | PRESETS[preset] | switches)), seed)


def gpt2_64(model, idx):
    """Radford et al. (2019): pre-norm, learned positions, tanh GELU, biases."""
    w, c = weights64(model), model.config
    seen = visible64(*idx.shape, causal=True)
    x = w["wte.weight"][idx.numpy()] + w["wpe.weight"][: idx.shape[1]]
    for i in range(c.n_layer):
        b = f"blocks.{i}"
        x = x + self_attention64(w, f"{b}.attn", layer_norm64(w, f"{b}.norm1", x, 1e-5), c.n_head,
                                 seen)  # fmt: skip
        u = linear64(w, f"{b}.mlp.up", layer_norm64(w, f"{b}.norm2", x, 1e-5))
        gelu = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        x = x + linear64(w, f"{b}.mlp.down", gelu)
    return layer_norm64(w, "norm_final", x, 1e-5)


@pytest.mark.parametrize("preset, norm", [("gpt2", "layer"), ("nano", "layer"), ("nano", "rms")])
def test_forward_is_the_preset_written_out(preset, norm):
    model, idx = make(preset, norm=norm), tokens(3, 11)
    expected = (gpt2_64(model, idx) if preset == "gpt2"
                else nano64(model, idx, causal=True, rms=norm == "rms"))  # fmt: skip
    h = model(idx)
    close(h, expected, 2e-5)
    close(model.logits(h), expected @ weights64(model)["wte.weight"].T, 5e-5)
    model = model.double()  # rotary tables stay as exact as float32 has them
    close(model(idx), expected, 1e-12 if preset == "gpt2" else 2e-6)


def test_presets_are_switches_only():
    assert all(not preset.keys() & SIZES.keys() for preset in PRESETS.values())
    assert set(PRESETS) == {"nano", "gpt2"}
    assert GPTConfig(**PRESETS["nano"]) == GPTConfig()


def test_gpt2_has_124_439_808_parameters():
    sizes = {"vocab_size": 50257, "block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768}
    with torch.device("meta"):
        model = GPT(GPTConfig(**sizes, **PRESETS["gpt2"]))
        untied = GPT(GPTConfig(**sizes, **PRESETS["gpt2"], tied=False))
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    assert sum(p.numel() for p in untied.parameters()) == 124_439_808 + 50257 * 768


def test_nano_has_no_bias():
    """V C + L (12 C^2 + 2 C) + 2 C parameters: matrices and gains."""
    model = GPT(GPTConfig(**SIZES))
    assert sum(p.numel() for p in model.parameters()) == 29 * 12 + 2 * (12 * 144 + 24) + 24
    assert not any("bias" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("preset", ["gpt2", "nano"])
def test_tied_head_is_one_tensor_with_both_gradients(preset):
    tied, untied = make(preset), make(preset, tied=False)
    assert tied.head.weight is tied.wte.weight
    assert untied.head.weight is not untied.wte.weight
    assert "head.weight" not in dict(tied.named_parameters())
    with torch.no_grad():
        untied.load_state_dict(tied.state_dict())
    idx = tokens(2, 9)
    for model in (tied, untied):
        logits = model.logits(model(idx[:, :-1]))
        F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten()).backward()
    both = untied.wte.weight.grad, untied.head.weight.grad
    assert all(grad.abs().max() > 1e-3 for grad in both)
    torch.testing.assert_close(tied.wte.weight.grad, sum(both), rtol=0, atol=1e-6)


def test_a_new_model_scores_all_tokens_almost_alike():
    model = GPT(GPTConfig(vocab_size=500, n_embd=48, n_head=4, n_layer=2), rng=rng())
    logp = model.logits(model(tokens(2, 20, vocab=500))).log_softmax(-1)
    nats = -logp.mean().item()
    assert math.log(500) <= nats < math.log(500) + 0.05
    assert logp.exp().max() < 0.01


def test_value_head_starts_at_zero_and_learns():
    model = GPT(GPTConfig(**SIZES, value_head=True), rng=rng())
    value = model.value(model(tokens(2, 8)))
    assert value.shape == (2, 8, 1) and not value.any()
    value.sum().backward()
    assert model.value.weight.grad.abs().max() > 0
    assert not hasattr(GPT(GPTConfig(**SIZES)), "value")


def test_logits_are_float32_under_autocast():
    model, idx = make("nano"), tokens(2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model.logits(model(idx))
    assert logits.dtype is torch.float32
    torch.testing.assert_close(logits, model.logits(model(idx)), rtol=0, atol=0.5)


def test_forward_depends_on_the_weights_alone():
    """One seed, one model; and no two rows of a batch talk to each other."""
    a, b = (GPT(GPTConfig(**SIZES), rng=rng(7)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    model, idx = make("nano"), tokens(4, 9)
    alone = torch.cat([model(row[None]) for row in idx])
    torch.testing.assert_close(model(idx), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_saved_model_comes_back(tmp_path, tied):
    model, idx = make("gpt2", tied=tied, value_head=True), tokens(2, 9)
    model.save_pretrained(tmp_path / "m")
    again = GPT.from_pretrained(tmp_path / "m", dropout=0.25)
    assert again.config == GPTConfig(**vars(model.config) | {"dropout": 0.25})
    assert (again.head.weight is again.wte.weight) == tied
    again.eval()
    assert torch.equal(again(idx), model(idx))
    assert torch.equal(again.logits(again(idx)), model.logits(model(idx)))
    BERT(BERTConfig(**SIZES)).save_pretrained(tmp_path / "b")
    with pytest.raises(UserError, match="holds a BERT but a GPT is needed"):
        GPT.from_pretrained(tmp_path / "b")
