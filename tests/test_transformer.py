"""transformer.py against loops in float64, torch's own encoder layer and turning matrices.

The numpy helpers here (attention64, nano64, ...) are the oracles of test_gpt and test_bert too.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from nanokl import UserError
from nanokl.layers import Dropout, SquaredReLU, gelu_tanh
from nanokl.transformer import (
    Attention,
    Block,
    KVCache,
    Transformer,
    TransformerConfig,
    rotary_table,
    rotate,
)

GPT2 = {"norm": "layer", "embed_norm": False, "position": "learned", "activation": "gelu_tanh",
        "bias": True, "qk_norm": False, "zero_init": False, "eps": 1e-5}  # fmt: skip
SIZES = {"vocab_size": 29, "block_size": 12, "n_layer": 2, "n_head": 3, "n_embd": 12}
SWITCHES = [{}, GPT2, {"norm": "rms"}, {"position": "learned"},
            {"qk_norm": False, "embed_norm": False}]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors: a second thread is only waited for, on a busy machine ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randomise(model, seed=0):
    """Every parameter random, gains around 1: nothing is zero, so every switch shows."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.3, generator=rng(seed + len(name)))
            if "norm" in name and name.endswith("weight"):
                p.add_(1.0)
    return model.eval()


def trunk(seed=0, **switches):
    return randomise(Transformer(TransformerConfig(**SIZES | switches)), seed)


def tokens(*shape, seed=0, vocab=SIZES["vocab_size"]):
    return torch.randint(vocab, shape, generator=rng(seed))


# ------------------------------------------------------------------ the oracles: numpy, float64
def weights64(model):
    return {name: x.detach().double().numpy() for name, x in model.state_dict().items()}


def linear64(w, name, x):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def rms64(x, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def centred64(x):
    return x - x.mean(-1, keepdims=True)


def layer_norm64(w, name, x, eps):
    return rms64(centred64(x), eps) * w[f"{name}.weight"] + w.get(f"{name}.bias", 0.0)


def rms_norm64(w, name, x, eps):
    return rms64(x, eps) * w[f"{name}.weight"]


def heads(x, H):
    """(B, T, C) -> (B, H, T, D): head a owns channels a D to (a + 1) D."""
    D = x.shape[-1] // H
    return np.stack([x[..., a * D : (a + 1) * D] for a in range(H)], axis=1)


def visible64(B, T, *, causal, mask=None):
    """(B, T, T) bool: which keys each query sees."""
    seen = np.ones((B, T, T), dtype=bool)
    if causal:
        seen &= np.array([[s <= t for s in range(T)] for t in range(T)])
    return seen if mask is None else seen & np.asarray(mask)[:, None, :]


def attention64(q, k, v, visible):
    """softmax(q k^T / sqrt(D)) v, one query of one head at a time; (B, H, T, D) -> (B, T, C)."""
    B, H, T, D = q.shape
    y = np.zeros((B, T, H * D))
    for b, a, t in np.ndindex(B, H, T):
        seen = np.flatnonzero(visible[b, t])
        score = np.array([(q[b, a, t] * k[b, a, s]).sum() for s in seen]) / math.sqrt(D)
        p = np.exp(score - score.max())
        y[b, t, a * D : (a + 1) * D] = sum(p[i] / p.sum() * v[b, a, s] for i, s in enumerate(seen))
    return y


def turn64(x, base=10_000.0):
    """Rotary positions: (x_2i, x_2i+1) turned by the 2 x 2 matrix of angle t base^(-2i/D)."""
    y = np.empty_like(x)
    for t, i in np.ndindex(x.shape[-2], x.shape[-1] // 2):
        angle = t * base ** (-2 * i / x.shape[-1])
        turn = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        y[..., t, 2 * i : 2 * i + 2] = x[..., t, 2 * i : 2 * i + 2] @ np.array(turn).T
    return y


def self_attention64(w, name, x, H, visible, *, qk_norm=None, rotary=False):
    q, k, v = (heads(part, H) for part in np.split(linear64(w, f"{name}.qkv", x), 3, axis=-1))
    if qk_norm:
        q, k = qk_norm(q), qk_norm(k)
    if rotary:
        q, k = turn64(q), turn64(k)
    return linear64(w, f"{name}.proj", attention64(q, k, v, visible))


def nano64(model, idx, *, causal, mask=None, rms=False):
    """The `nano` switches, written out: rotary, norms without bias, QK-norm, ReLU^2, no bias.

    With rms, RMSNorm instead of LayerNorm. QK-norms have no weights and torch's own eps.
    """
    w, c = weights64(model), model.config
    norm = rms_norm64 if rms else layer_norm64
    qk_norm = (lambda z: rms64(z, 2.0**-52)) if rms else (lambda z: rms64(centred64(z), 1e-5))
    seen = visible64(*idx.shape, causal=causal, mask=mask)
    x = norm(w, "norm_embed", w["wte.weight"][idx.numpy()], 1e-6)
    for i in range(c.n_layer):
        b = f"blocks.{i}"
        x = x + self_attention64(w, f"{b}.attn", norm(w, f"{b}.norm1", x, 1e-6), c.n_head, seen,
                                 qk_norm=qk_norm, rotary=True)  # fmt: skip
        up = linear64(w, f"{b}.mlp.up", norm(w, f"{b}.norm2", x, 1e-6))
        x = x + linear64(w, f"{b}.mlp.down", np.maximum(up, 0) ** 2)
    return norm(w, "norm_final", x, 1e-6)


def close(got, expected, atol):
    np.testing.assert_allclose(got.detach().double().numpy(), expected, rtol=0, atol=atol)


# --------------------------------------------------------------------------------- attention
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 2e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_the_loop(causal, padded, dtype, atol):
    config = TransformerConfig(**SIZES | GPT2, causal=causal)
    attention = randomise(Attention(config, 0)).to(dtype)
    x = torch.randn(2, 7, 12, generator=rng(1), dtype=dtype)
    mask = torch.arange(7) < torch.tensor([[7], [4]]) if padded else None
    visible = visible64(2, 7, causal=causal, mask=mask)
    seen = torch.from_numpy(visible)[:, None] if padded else None
    w = {f"a.{name}": value for name, value in weights64(attention).items()}
    expected = self_attention64(w, "a", x.double().numpy(), 3, visible)
    got = attention(x, seen, None, None)
    assert got.dtype is dtype
    close(got, expected, atol)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_qk_norm_ignores_the_length_of_queries_and_keys(norm):
    attention = randomise(Attention(TransformerConfig(**SIZES, norm=norm), 0))
    x = torch.randn(2, 7, 12, generator=rng(1))
    before = attention(x, None, None, None)
    with torch.no_grad():
        attention.qkv.weight[:12] *= 7.0  # queries
        attention.qkv.weight[12:24] *= 3.0  # keys
    torch.testing.assert_close(attention(x, None, None, None), before, rtol=0, atol=1e-4)
    with torch.no_grad():
        attention.qkv.weight[24:] *= 2.0  # values do count
    assert (attention(x, None, None, None) - before).abs().max() > 0.1


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_block_is_torchs_encoder_layer(norm_first, activation):
    switches = GPT2 | {"activation": activation, "norm_first": norm_first}
    block = randomise(Block(TransformerConfig(**SIZES | switches), 0)).double()
    gelu = nn.GELU(approximate="tanh" if activation == "gelu_tanh" else "none")
    theirs = nn.TransformerEncoderLayer(12, 3, 48, dropout=0.0, activation=gelu, batch_first=True,
                                        norm_first=norm_first, layer_norm_eps=1e-5)  # fmt: skip
    theirs = theirs.double()
    pairs = {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.",
             "linear1.": "mlp.up.", "linear2.": "mlp.down.", "norm1.": "norm1.",
             "norm2.": "norm2."}  # fmt: skip
    ours = block.state_dict()
    theirs.load_state_dict({a + kind: ours[b + kind] for a, b in pairs.items()
                            for kind in ("weight", "bias")})  # fmt: skip
    x = torch.randn(2, 9, 12, generator=rng(1), dtype=torch.float64)
    later = torch.ones(9, 9, dtype=torch.bool).triu(1)
    expected = theirs.train()(x, src_mask=later)  # train: the layer's plain path, dropout 0
    torch.testing.assert_close(block(x, None, None, None), expected, rtol=0, atol=1e-12)


def test_squared_relu_and_its_gradient():
    x = torch.tensor([-2.0, -0.0, 0.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    assert SquaredReLU.apply(x).tolist() == [0.0, 0.0, 0.0, 0.25, 9.0]
    grad = torch.tensor([1.0, 2.0, 3.0, 4.0, -5.0], dtype=torch.float64)
    SquaredReLU.apply(x).backward(grad)
    assert x.grad.tolist() == [0.0, 0.0, 0.0, 4.0, -30.0]
    y = torch.randn(40, generator=rng(), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SquaredReLU.apply, y)


# ------------------------------------------------------------------------------------ rotary
@pytest.mark.parametrize("D", [2, 4, 10])
def test_rotary_turns_pairs_by_their_positions(D):
    x = torch.randn(2, 3, 50, D, generator=rng(), dtype=torch.float64)
    got = rotate(x, rotary_table(50, D))  # the table is float32
    close(got, turn64(x.numpy()), 1e-6)
    theta = 10_000.0 ** (-np.arange(0, D, 2) / D)  # and as a product of complex numbers
    z = x[..., ::2].numpy() + 1j * x[..., 1::2].numpy()
    z = z * np.exp(1j * np.arange(50)[:, None] * theta)
    close(got[..., ::2], z.real, 1e-6)
    close(got[..., 1::2], z.imag, 1e-6)
    assert rotate(x.bfloat16(), rotary_table(50, D)).dtype is torch.float32


def test_rotary_table_is_exact_far_out():
    cos, sin = rotary_table(30_000, 6).unbind(-1)
    for t in (0, 1, 29_999):
        angle = [t * 10_000 ** (-2 * i / 6) for i in range(3)]
        np.testing.assert_allclose(cos[t].numpy(), np.cos(angle), atol=1e-7)
        np.testing.assert_allclose(sin[t].numpy(), np.sin(angle), atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([2, 4, 8]))
def test_rotary_products_depend_on_the_distance_only(seed, D):
    q, k = torch.randn(2, D, generator=rng(seed), dtype=torch.float64)
    table = rotary_table(40, D)
    product = rotate(q.expand(1, 1, 40, D), table) @ rotate(k.expand(1, 1, 40, D), table).mT
    product = product[0, 0]  # [m, n] = <q at m, k at n>
    for distance in range(-39, 40):
        assert np.ptp(product.diagonal(distance).numpy()) < 1e-5
    torch.testing.assert_close(product[0, 0], q @ k)
    assert np.ptp(product[0].numpy()) > 1e-3 * q.norm() * k.norm()  # but on the distance it does


# ----------------------------------------------------------------------- who sees which token
def gradient_by_token(model, t, **kwargs):
    """|d (random projection of h[0, t]) / d embedding of token s| for each s; ids differ."""
    idx = torch.randperm(SIZES["vocab_size"], generator=rng(3))[:10][None]
    h = model(idx, **kwargs)
    model.zero_grad()
    (h[0, t] @ torch.randn(12, generator=rng(4))).backward()
    return model.wte.weight.grad[idx[0]].abs().amax(-1)


@pytest.mark.parametrize("switches", SWITCHES)
def test_causal_trunk_sees_the_past_only(switches):
    model = trunk(**switches)
    for t in range(10):
        seen = gradient_by_token(model, t)
        assert (seen[: t + 1] > 0).all() and (seen[t + 1 :] == 0).all(), (t, seen)


@pytest.mark.parametrize("switches", SWITCHES)
def test_encoder_sees_everything_but_padding(switches):
    model = trunk(**switches, causal=False)
    assert all((gradient_by_token(model, t) > 0).all() for t in range(10))
    mask = torch.arange(10)[None] < 7
    for t in range(7):
        seen = gradient_by_token(model, t, mask=mask)
        assert (seen[:7] > 0).all() and (seen[7:] == 0).all(), (t, seen)


def test_causal_trunk_with_a_mask():
    model, idx = trunk(), tokens(2, 10)
    mask = torch.arange(10) < torch.tensor([[10], [6]])
    h, masked = model(idx), model(idx, mask)
    torch.testing.assert_close(masked[mask], h[mask], rtol=0, atol=1e-5)  # right padding: no need
    for t in range(7):
        seen = gradient_by_token(model, t, mask=torch.arange(10)[None] < 7)
        assert (seen[: t + 1] > 0).all() and (seen[t + 1 :] == 0).all(), (t, seen)


def test_segments_are_added():
    model = trunk(n_segment=2, causal=False)
    idx = tokens(2, 8)
    zeros, ones = torch.zeros_like(idx), torch.ones_like(idx)
    assert torch.equal(model(idx), model(idx, segment=zeros))
    assert (model(idx) - model(idx, segment=ones)).abs().max() > 0.1
    moved = trunk(n_segment=2, causal=False)
    with torch.no_grad():  # segment 1 everywhere = its vector added to every word
        moved.wte.weight += model.wse.weight[1] - model.wse.weight[0]
    torch.testing.assert_close(moved(idx), model(idx, segment=ones), rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------- cache
@pytest.mark.parametrize("cuts", [[12], [1] * 12, [5] + [1] * 7, [3, 4, 5], [1, 10, 1], [11, 1]])
@pytest.mark.parametrize("switches", SWITCHES)
def test_cached_equals_uncached(switches, cuts):
    model, idx = trunk(**switches), tokens(3, 12)
    cache = model.new_cache(3, 12)
    h = torch.cat([model(part, cache=cache) for part in idx.split(cuts, dim=1)], dim=1)
    assert cache.pos == 12
    torch.testing.assert_close(h, model(idx), rtol=0, atol=1e-5)


@pytest.mark.parametrize("switches", SWITCHES)
def test_static_cache_equals_uncached(switches):
    """Slots beyond the position hide, be they few or many, and whatever memory held there."""
    model, idx = trunk(**switches), tokens(3, 12)
    cache = model.new_cache(3, 20)
    for x in (*cache.k, *cache.v):
        x.fill_(torch.nan)
    parts = [model(idx[:, :5], cache=cache)]
    cache.make_static()
    for x in cache.k:
        x[:, :, 5:] = torch.rand(3, 1, 15, 1) * 100
    for t in range(5, 12):
        cache.slots = torch.arange(t + 1 if t % 2 else 20)
        parts.append(model(idx[:, t : t + 1], cache=cache))
    assert cache.pos.item() == 12
    torch.testing.assert_close(torch.cat(parts, 1), model(idx), rtol=0, atol=1e-5)
    with pytest.raises(AssertionError, match="one token at a time, not 2"):
        model(idx[:, :2], cache=cache)


def test_gelu_is_the_same_when_compiled(monkeypatch):
    x = torch.linspace(-12, 12, 4001)
    x64 = x.double()
    want = x64 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x64 + 0.044715 * x64**3))) / 2
    torch.testing.assert_close(gelu_tanh(x), want.float(), rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(gelu_tanh(x), want.float(), rtol=1e-5, atol=1e-6)


def test_cached_equals_uncached_in_bfloat16_on_a_cpu():
    model, idx = trunk(), tokens(3, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = model.new_cache(3, 12)
        h = torch.cat([model(part, cache=cache) for part in idx.split([3, 4, 5], dim=1)], dim=1)
        torch.testing.assert_close(h, model(idx), rtol=0, atol=0.1)
    torch.testing.assert_close(h.float(), model(idx), rtol=0, atol=0.3)


def test_cache_overflow_asserts():
    model, idx = trunk(), tokens(2, 12)
    cache = model.new_cache(2, 6)
    model(idx[:, :5], cache=cache)
    with pytest.raises(AssertionError, match="cache of 6 positions is full at 7"):
        model(idx[:, 5:7], cache=cache)
    model(idx[:, 5:6], cache=cache)  # what fits still does
    with pytest.raises(AssertionError, match="13 tokens > 12"):
        model(tokens(2, 13))
    full = KVCache(model.config, 2, 20, device="cpu", dtype=torch.float32)
    model(idx, cache=full)
    with pytest.raises(AssertionError, match="13 tokens > 12"):
        model(idx[:, :1], cache=full)
    with pytest.raises(AssertionError, match="padding mask"):
        model(idx, torch.ones_like(idx, dtype=torch.bool), cache=model.new_cache(2, 12))


# ------------------------------------------------------------------------------ initialisation
@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_zero_init_makes_the_blocks_the_identity(position):
    model = Transformer(TransformerConfig(**SIZES, position=position))
    model.init_weights(rng())
    x = torch.randn(2, 5, 12, generator=rng(1))
    rotary = rotary_table(5, 4)
    assert all(torch.equal(block(x, None, rotary, None), x) for block in model.blocks)
    model.config.zero_init = False
    model.init_weights(rng())
    assert not any(torch.equal(block(x, None, rotary, None), x) for block in model.blocks)


def test_init_is_gpt2s_and_depends_on_the_generator_alone():
    config = TransformerConfig(**SIZES | GPT2 | {"n_embd": 96, "n_layer": 8, "vocab_size": 500})
    first, second, third = (Transformer(config) for _ in range(3))
    first.init_weights(rng(5))
    torch.rand(3)  # the global generator moves on
    second.init_weights(rng(5))
    third.init_weights(rng(6))
    a, b, c = (model.state_dict() for model in (first, second, third))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["wte.weight"], c["wte.weight"])
    for name, x in first.named_parameters():
        if name.endswith("bias"):
            assert not x.any(), name
        elif "norm" in name:
            assert (x == 1).all(), name
        else:  # relative error of a sd from n numbers: 1/sqrt(2n); 6 of those, odds 1e-7 in all
            closing = name.endswith(("proj.weight", "down.weight"))
            std = 0.02 / math.sqrt(16) if closing else 0.02
            assert abs(x.std().item() / std - 1) < 6 / math.sqrt(2 * x.numel()), name
            assert abs(x.mean().item()) < 6 * std / math.sqrt(x.numel()), name


def test_dropout_acts_in_train_mode_only():
    model, idx = trunk(dropout=0.5), tokens(2, 8)
    assert torch.equal(model(idx), trunk()(idx))  # the same weights without dropout
    assert not torch.equal(model.train()(idx), model(idx))


@pytest.mark.parametrize("p", [0.1, 0.5, 1 / 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropout_draws_each_number_by_itself_and_keeps_the_mean(p, dtype):
    """Shares within 5 sd, odds below 6e-7 each: alone, side by side, in every fourth place."""
    drop, n = Dropout(p).train(), 1_000_001  # whose bits do not fill the last word
    with torch.random.fork_rng():
        torch.manual_seed(1)
        x = torch.full((n,), 3.0, dtype=dtype, requires_grad=True)
        y = drop(x)
        torch.manual_seed(1)
        assert torch.equal(drop(x), y) and not torch.equal(drop(x), y)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    zero = y == 0
    assert y.dtype == dtype and y[~zero].unique().numel() == 1
    torch.testing.assert_close(y[~zero][0].item(), 3 / (1 - p), rtol=2e-5 + torch.finfo(dtype).eps,
                               atol=0)
    torch.testing.assert_close(grad * 3, y.detach(), rtol=2 * torch.finfo(dtype).eps, atol=0)
    zero, alone = zero.double(), p * (1 - p)
    both = p**2 * (1 - p**2) + 2 * (p**3 - p**4)  # neighbouring pairs share a number
    for of, odds, var in [(zero, p, alone), (zero[1:] * zero[:-1], p * p, both),
                          *((zero[i::4], p, alone) for i in range(4))]:
        assert abs(of.mean().item() - odds) < 5 * math.sqrt(var / len(of)) + 2**-17, (p, odds)


@pytest.mark.parametrize("norm_first", [True, False])
def test_dropout_takes_each_sublayers_output(norm_first):
    """At 1 - 1e-7 nothing gets through: only the residual path is left; odds .004, a fixed seed."""
    config = TransformerConfig(**SIZES | GPT2, norm_first=norm_first, dropout=1 - 1e-7)
    block = randomise(Block(config, 0)).train()
    x = torch.randn(2, 5, 12, generator=rng(1))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rest = x if norm_first else block.norm2(block.norm1(x))
        assert torch.equal(block(x, None, None, None), rest)


# -------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("wrong, message", [
    ({"n_head": 5}, "5 heads do not divide a width of 12"),
    ({"n_head": 4}, "even head width, n_embd / n_head is 3"),
    ({"block_size": 0}, "block_size is 0"), ({"block_size": 1 << 30}, "block_size is 1073741824"),
    ({"n_layer": 2.0}, "n_layer is 2.0: give a whole number"),
    ({"bias": 1}, "bias is 1: give true or false"),
    ({"vocab_size": 0}, "vocab_size is 0"),
    ({"n_layer": -1}, "n_layer is -1"),
    ({"n_head": 0}, "n_head is 0"),
    ({"dropout": 1.0}, "dropout is 1.0"),
    ({"dropout": -0.1}, "dropout is -0.1"),
    ({"dropout": math.nan}, "dropout is nan"),
    ({"activation": "swish"}, "activation is .swish.: give one of relu2, gelu, gelu_tanh"),
    ({"norm": "batch"}, "norm is .batch."),
    ({"position": "none"}, "position is .none."),
])  # fmt: skip
def test_config_errors_are_the_users(wrong, message):
    with pytest.raises(UserError, match=message) as error:
        TransformerConfig(**SIZES | wrong)
    assert "\n" not in str(error.value)
    TransformerConfig(**SIZES | {"n_head": 4, "position": "learned"})  # odd heads may be learned
