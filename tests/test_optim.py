"""optim.py against the SVD in float64, torch's own Muon, and closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nanokl import UserError
from nanokl.optim import Muon, lr_scale, make_optimizers, orthogonalize, set_lr

SHAPES = [(8, 8), (8, 20), (20, 8), (16, 4), (1, 5)]


def quintic(s, steps=5):
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


def svd_orthogonalize(g):
    """What Newton-Schulz computes, through the SVD: U p(S / |S|) V^T, float64."""
    u, s, vh = torch.linalg.svd(g.double(), full_matrices=False)
    return (u * quintic(s / s.norm())) @ vh


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalize_is_the_quintic_of_the_singular_values(shape):
    g = randn(3, *shape, dtype=torch.float64)
    expected = torch.stack([svd_orthogonalize(x) for x in g])
    got = orthogonalize(g, dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(orthogonalize(g.float()).double(), expected, rtol=0, atol=1e-5)
    bf16 = orthogonalize(g.float(), dtype=torch.bfloat16)
    assert bf16.dtype is torch.bfloat16
    assert (bf16.double() - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("condition", [1.0, 10.0, 100.0])
def test_singular_values_end_in_the_band(condition):
    u, _, vh = torch.linalg.svd(randn(12, 30, dtype=torch.float64), full_matrices=False)
    s = torch.logspace(0, -math.log10(condition), 12, dtype=torch.float64)
    out = torch.linalg.svdvals(orthogonalize(((u * s) @ vh)[None], dtype=torch.float64))
    assert out.min() > 0.68 and out.max() < 1.21, out


def test_zero_gradient_gives_a_zero_update():
    assert not orthogonalize(torch.zeros(2, 3, 4)).any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_muon_equals_a_float64_reference(shape, decay):
    lr, mu = 0.01, 0.95
    p = nn.Parameter(randn(*shape, seed=1))
    optimizer = Muon([p], lr, weight_decay=decay)
    w, m = p.detach().double(), torch.zeros(shape, dtype=torch.float64)
    for step in range(5):
        p.grad = randn(*shape, seed=10 + step)
        optimizer.step()
        g = p.grad.double()
        m = mu * m + (1 - mu) * g
        o = svd_orthogonalize((1 - mu) * g + mu * m)
        w = w - lr * decay * w - lr * 0.2 * max(shape) ** 0.5 * o
    torch.testing.assert_close(p.detach().double(), w, rtol=0, atol=2e-6)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is not there")
@pytest.mark.parametrize("shape", SHAPES)
def test_muon_equals_torch_muon_to_bfloat16(shape):
    lr, start = 0.02, randn(*shape, seed=2)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    a = Muon([ours], lr, weight_decay=0.1, dtype=torch.bfloat16)
    b = torch.optim.Muon([theirs], lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        ours.grad = theirs.grad = randn(*shape, seed=20 + step)
        a.step()
        b.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.05 * moved, ((ours - theirs).norm(), moved)


def run(params, grads, **options):
    optimizer = Muon(params, 0.1, **options)
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    optimizer.step()
    return [p.detach() for p in params]


def test_fused_qkv_is_three_matrices():
    w, g = randn(24, 8, seed=3), randn(24, 8, seed=4)
    (fused,) = run([nn.Parameter(w.clone())], [g], split=3)
    apart = run([nn.Parameter(x.clone()) for x in w.chunk(3)], list(g.chunk(3)))
    torch.testing.assert_close(fused, torch.cat(apart), rtol=0, atol=1e-6)
    (whole,) = run([nn.Parameter(w.clone())], [g], split=1)
    assert (whole - fused).abs().max() > 0.01  # orthogonalising them together differs


def test_batched_equals_one_by_one():
    shapes = [*SHAPES, *SHAPES, (20, 8), (8, 8)]
    ws = [randn(*s, seed=i) for i, s in enumerate(shapes)]
    gs = [randn(*s, seed=50 + i) for i, s in enumerate(shapes)]
    together = run([nn.Parameter(w.clone()) for w in ws], gs)
    for w, g, got in zip(ws, gs, together, strict=True):
        (alone,) = run([nn.Parameter(w.clone())], [g])
        torch.testing.assert_close(got, alone, rtol=0, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.floats(1e-3, 1e4))
def test_first_update_does_not_depend_on_the_size_of_the_gradient(size):
    w, g = torch.zeros(6, 9), randn(6, 9, seed=5)
    (a,) = run([nn.Parameter(w.clone())], [g])
    (b,) = run([nn.Parameter(w.clone())], [g * size])
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_muon_leaves_a_parameter_without_gradient_alone():
    p, q = nn.Parameter(randn(3, 3)), nn.Parameter(randn(3, 3))
    run([p, q], [None, randn(3, 3, seed=6)], weight_decay=0.5)
    assert torch.equal(p, randn(3, 3)) and not torch.equal(q, randn(3, 3))


class Block(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.norm = nn.LayerNorm(C)
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.up, self.down = nn.Linear(C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + self.proj(q * k.tanh() + v) + self.down(self.up(x).relu())


class Net(nn.Module):
    def __init__(self, C=8, V=11):
        super().__init__()
        self.wte = nn.Embedding(V, C)
        self.blocks = nn.ModuleList(Block(C) for _ in range(2))
        self.head = nn.Linear(C, V, bias=False)
        self.head.weight = self.wte.weight
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(randn(*p.shape, seed=i) / 3)

    def forward(self, idx):
        h = self.wte(idx)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


OPTIONS = {"lr": 0.003, "muon_lr": 0.02, "weight_decay": 0.1, "betas": (0.9, 0.95)}


def train(net, optimizers, steps):
    for step in steps:
        idx = torch.randint(11, (4, 7), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(net(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return loss.item()


def test_each_parameter_goes_to_its_optimizer():
    net = Net()
    muon, adamw = make_optimizers(net, **OPTIONS)
    name_of = {id(p): name for name, p in net.named_parameters()}
    names = [{name_of[id(p)] for p in group["params"]}
             for optimizer in (muon, adamw) for group in optimizer.param_groups]
    blocks = [f"blocks.{i}." for i in range(2)]
    assert names == [
        {b + "qkv.weight" for b in blocks},
        {b + m + ".weight" for b in blocks for m in ("proj", "up", "down")},
        {"wte.weight"},
        {b + v for b in blocks for v in ("norm.weight", "norm.bias", "qkv.bias", "proj.bias")},
    ]
    assert [g["split"] for g in muon.param_groups] == [3, 1]
    assert [g["momentum"] for g in muon.param_groups] == [0.95, 0.95]
    assert make_optimizers(net, **OPTIONS, momentum=0.7)[0].param_groups[0]["momentum"] == 0.7
    assert [g["weight_decay"] for g in (*muon.param_groups, *adamw.param_groups)] == [.1, .1, .1, 0]
    assert all(g["initial_lr"] == g["lr"] == 0.02 for g in muon.param_groups)
    assert all(g["initial_lr"] == g["lr"] == 0.003 for g in adamw.param_groups)


def test_frozen_parameters_and_models_without_blocks():
    net = Net()
    net.wte.requires_grad_(False)
    before = net.wte.weight.clone()
    optimizers = make_optimizers(net, **OPTIONS)
    train(net, optimizers, range(2))
    assert torch.equal(net.wte.weight, before)
    assert [type(o).__name__ for o in make_optimizers(nn.Linear(3, 3), **OPTIONS)] == ["AdamW"]


def test_vectors_do_not_decay():
    net = Net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizers = make_optimizers(net, **OPTIONS)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.step()
    for name, p in net.named_parameters():
        keep = 1.0 if p.ndim == 1 else 1 - 0.1 * (0.02 if "blocks" in name else 0.003)
        torch.testing.assert_close(p, before[name] * keep, rtol=1e-6, atol=1e-8)


def test_training_lowers_the_loss():
    net = Net()
    optimizers = make_optimizers(net, **OPTIONS)
    first = train(net, optimizers, [0])
    assert train(net, optimizers, [0] * 30) < 0.5 * first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_round_trip_is_bit_for_bit(dtype, tmp_path):
    net = Net()
    optimizers = make_optimizers(net, **OPTIONS, dtype=dtype)
    train(net, optimizers, range(3))
    torch.save([net.state_dict(), *(o.state_dict() for o in optimizers)], tmp_path / "state.pt")
    weights, *states = torch.load(tmp_path / "state.pt", weights_only=True)
    other = Net()
    other.load_state_dict(weights)
    resumed = make_optimizers(other, **OPTIONS, dtype=dtype)
    for optimizer, state in zip(resumed, states, strict=True):
        optimizer.load_state_dict(state)
    train(net, optimizers, range(3, 6))
    train(other, resumed, range(3, 6))
    for (name, a), b in zip(net.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("change", [
    {"lr": 0.0}, {"lr": -1.0}, {"lr": math.nan}, {"lr": math.inf}, {"muon_lr": -1.0},
    {"weight_decay": -0.1}, {"weight_decay": math.nan}, {"betas": (0.9, 1.0)}, {"betas": (-1, 0.9)},
    {"momentum": 1.0}, {"momentum": -0.1},
])
def test_bad_values_are_one_line(change):
    with pytest.raises(UserError, match=next(iter(change))) as error:
        make_optimizers(Net(), **{**OPTIONS, **change})
    assert "\n" not in str(error.value) and "give" in str(error.value)


def test_without_muon_adamw_has_all():
    (adamw,) = make_optimizers(Net(), **{**OPTIONS, "muon_lr": 0})
    assert isinstance(adamw, torch.optim.AdamW)
    held = sum(len(group["params"]) for group in adamw.param_groups)
    assert held == len(list(Net().parameters()))


def test_lr_scale_by_hand():
    scale = [lr_scale(s, 10, warmup=2, decay=0.4) for s in range(11)]
    assert scale == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])
    assert [lr_scale(s, 5, warmup=0, decay=0.0) for s in range(6)] == [1.0] * 6
    assert [lr_scale(s, 4, warmup=0, decay=1.0) for s in range(5)] == [1, 0.75, 0.5, 0.25, 0]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 500), st.integers(0, 600), st.floats(0, 1))
def test_lr_scale_rises_then_falls(total, warmup, decay):
    scale = [lr_scale(s, total, warmup=warmup, decay=decay) for s in range(total)]
    assert all(0 < s <= 1 for s in scale)
    top = scale.index(max(scale))
    assert scale[: top + 1] == sorted(scale[: top + 1])
    assert scale[top:] == sorted(scale[top:], reverse=True)


@pytest.mark.parametrize("bad", [{"warmup": -1}, {"decay": 1.5}, {"decay": -0.1}])
def test_lr_scale_bad_values(bad):
    with pytest.raises(UserError, match="give"):
        lr_scale(0, 10, **{"warmup": 0, "decay": 0.5, **bad})


def test_set_lr_scales_each_group_from_its_peak():
    optimizers = make_optimizers(Net(), **OPTIONS)
    for scale in (0.5, 0.1):  # not of the last value but of the peak
        set_lr(optimizers, scale)
        assert [g["lr"] for o in optimizers for g in o.param_groups] == pytest.approx(
            [0.02 * scale] * 2 + [0.003 * scale] * 2)
