"""logprob.py against dense float64 log_softmax under autograd, closed forms, and its promises."""

import math
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st

from nanokl import logprob
from nanokl.logprob import linear_logprob

NAMES = ("logp", "lse", "entropy", "kl")


def rand(*shape, seed=0, dtype=torch.float64, grad=False, scale=1.0):
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.standard_normal(shape) * scale, dtype=dtype).requires_grad_(grad)


def make(n, c, v, *, dtype=torch.float64, seed=0):
    """h, W, b that want gradients; targets; (h_ref, W_ref, b_ref) of another width."""
    args = [rand(n, c, seed=seed, dtype=dtype), rand(v, c, seed=seed + 1, dtype=dtype),
            rand(v, seed=seed + 2, dtype=dtype)]
    y = torch.tensor(np.random.default_rng(seed + 3).integers(v, size=n))
    ref = (rand(n, c + 2, seed=seed + 4, dtype=dtype), rand(v, c + 2, seed=seed + 5, dtype=dtype),
           rand(v, seed=seed + 6, dtype=dtype))
    return [t.requires_grad_() for t in args], y, ref


def dense(h, w, b, y, ref=None, *, temperature=1.0, vocab=None):
    """What linear_logprob says it gives, with all logits at once."""
    z = ((h @ w.t() + (0 if b is None else b)) / temperature)[..., :vocab]
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    out = [log_p.gather(-1, y[..., None])[..., 0], z.logsumexp(-1), -(p * log_p).sum(-1)]
    if ref is not None:
        log_q = ((ref[0] @ ref[1].t() + ref[2]) / temperature)[..., :vocab].log_softmax(-1)
        out.append((p * (log_p - log_q)).sum(-1))
    return out


def upstream(outs, seed=9):
    """sum <u, out>: each token of each output gets an upstream gradient of its own."""
    return sum((rand(*o.shape, seed=seed + i, dtype=o.dtype) * o).sum() for i, o in enumerate(outs))


def grads(loss, inputs):
    return torch.autograd.grad(loss, inputs, retain_graph=True)


def assert_close(got, want, tol):
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        assert torch.allclose(g.double(), w.double(), rtol=tol, atol=tol), (g - w).abs().max()


# ---- values and gradients against the dense reference


@settings(max_examples=25, deadline=None)
@given(n=st.integers(0, 17), v=st.integers(2, 23), chunk=st.sampled_from([None, 1, 3, 16, 24]),
       temperature=st.sampled_from([0.3, 1.0, 2.0]), padded=st.booleans(), bias=st.booleans(),
       kl=st.booleans(), seed=st.integers(0, 99))
def test_all_outputs_and_gradients_equal_the_dense_ones(n, v, chunk, temperature, padded, bias, kl,
                                                        seed):
    (h, w, b), y, ref = make(n, 5, v, seed=seed)
    vocab = max(1, v - 3) if padded else None
    y, b, ref = y % (vocab or v), b if bias else None, ref if kl else None
    want = dense(h, w, b, y, ref, temperature=temperature, vocab=vocab)
    got = linear_logprob(h, w, y, bias=b, temperature=temperature, vocab=vocab, ref=ref,
                         entropy=True, chunk=chunk)
    assert (got.kl is None) == (not kl)
    got = [t for t in got if t is not None]
    assert_close(got, want, 1e-12)
    inputs = [t for t in (h, w, b) if t is not None]
    assert_close(grads(upstream(got), inputs), grads(upstream(want), inputs), 1e-11)


@pytest.mark.parametrize("chunk", [4, None])
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (3,), (0, 1), (0, 2), (1, 3), (2, 3)])
def test_each_subset_of_outputs_has_its_gradient(which, chunk):
    (h, w, b), y, ref = make(13, 4, 9)
    ask = {"entropy": 2 in which, "ref": ref if 3 in which else None}
    got = linear_logprob(h, w, y, bias=b, chunk=chunk, temperature=0.7, **ask)
    want = dense(h, w, b, y, ref, temperature=0.7)
    pick = grads(upstream([got[i] for i in which]), (h, w, b))
    assert_close(pick, grads(upstream([want[i] for i in which]), (h, w, b)), 1e-12)


def test_gradcheck():
    (h, w, b), y, ref = make(5, 3, 7)

    def outputs(h, w, b):
        return tuple(linear_logprob(h, w, y, bias=b, ref=ref, entropy=True, chunk=2,
                                    temperature=0.8))

    assert torch.autograd.gradcheck(outputs, (h, w, b))


@pytest.mark.parametrize("shape", [(6,), (2, 3), (3, 1, 2)])
def test_any_leading_shape(shape):
    (h, w, _), y, _ = make(6, 4, 8)
    got = linear_logprob(h.view(*shape, 4), w, y.view(shape)).logp
    assert torch.equal(got.flatten(), linear_logprob(h, w, y).logp) and got.shape == shape


def test_backward_twice_over_one_graph_and_no_second_derivative():
    (h, w, b), y, _ = make(9, 4, 8)
    out = linear_logprob(h, w, y, bias=b, chunk=4).logp
    assert_close(grads(out.sum(), (h, w, b)), grads(out.sum(), (h, w, b)), 0)
    (g,) = torch.autograd.grad(out.square().sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


# ---- rows, blocks, masks


@pytest.mark.parametrize("entropy", [False, True])
def test_blocks_and_batches_do_not_matter(entropy):
    (h, w, b), y, ref = make(41, 8, 33, dtype=torch.float32)
    ask = {"bias": b, "ref": ref if entropy else None, "entropy": entropy}
    whole = linear_logprob(h, w, y, **ask)
    for chunk in (1, 3, 40, 41, 48):
        part = linear_logprob(h, w, y, chunk=chunk, **ask)
        assert_close([t for t in part if t is not None], [t for t in whole if t is not None], 1e-5)
    alone = linear_logprob(h[7:8], w, y[7:8], bias=b)
    assert_close([alone.logp, alone.lse], [whole.logp[7:8], whole.lse[7:8]], 1e-5)


def test_masked_rows_are_zero_and_their_contents_are_not_read():
    (h, w, b), y, ref = make(12, 4, 9)
    mask = torch.tensor([True, False, True] * 4)
    want = dense(h, w, b, y, ref)
    want_grads = grads(upstream([t * mask for t in want]), (h, w, b))
    junk = h.detach().clone()
    junk[~mask] = torch.nan
    junk.requires_grad_()
    y_junk, h_ref = torch.where(mask, y, -100), ref[0].masked_fill(~mask[:, None], torch.inf)
    got = linear_logprob(junk, w, y_junk, bias=b, mask=mask, ref=(h_ref, *ref[1:]), entropy=True)
    assert_close(got, [t * mask for t in want], 1e-12)
    assert all((t[~mask] == 0).all() for t in got)
    dh, dw, db = grads(upstream(got), (junk, w, b))
    assert_close((dh, dw, db), want_grads, 1e-12)
    assert (dh[~mask] == 0).all()


@pytest.mark.parametrize("entropy", [False, True])
def test_no_row_at_all_still_has_a_graph(entropy):
    (h, w, b), y, ref = make(6, 4, 9)
    ask = {"entropy": entropy, "ref": ref if entropy else None}
    out = linear_logprob(h, w, y, bias=b, mask=torch.zeros(6, dtype=torch.bool), **ask)
    assert all((t == 0).all() for t in out if t is not None)
    for g, t in zip(grads(sum(t.sum() for t in out if t is not None), (h, w, b)), (h, w, b),
                    strict=True):
        assert g.shape == t.shape and (g == 0).all()


def test_padding_of_a_head_does_not_exist():
    (h, w, b), y, ref = make(10, 4, 9)
    pad = [F.pad(w, (0, 0, 0, 3), value=1e4), F.pad(b, (0, 3), value=1e4)]
    pad = [t.detach().requires_grad_() for t in pad]
    ref_pad = (ref[0], F.pad(ref[1], (0, 0, 0, 3), value=1e4), F.pad(ref[2], (0, 3), value=-1e4))
    got = linear_logprob(h, pad[0], y, bias=pad[1], vocab=9, ref=ref_pad, entropy=True)
    assert_close(got, dense(h, w, b, y, ref), 1e-12)
    dw, db = grads(upstream(got), pad)
    assert (dw[9:] == 0).all() and (db[9:] == 0).all() and (dw[:9] != 0).all()


def test_frozen_and_tied_weights():
    (h, w, b), y, _ = make(11, 4, 11)
    full = grads(upstream([linear_logprob(h, w, y, bias=b).logp]), (h, w, b))
    for i, (hh, ww, bb) in enumerate([(h, w.detach(), b.detach()), (h.detach(), w, b.detach()),
                                      (h.detach(), w.detach(), b)]):
        out = linear_logprob(hh, ww, y, bias=bb).logp
        assert torch.equal(grads(upstream([out]), (h, w, b)[i])[0], full[i])
    assert not linear_logprob(h.detach(), w.detach(), y).logp.requires_grad
    (tied,) = grads(upstream([linear_logprob(torch.tanh(w[y]), w, y).logp]), w)
    (want,) = grads(upstream(dense(torch.tanh(w[y]), w, None, y)[:1]), w)
    assert_close([tied], [want], 1e-12)


def test_bad_calls_say_which_shapes():
    (h, w, _), y, ref = make(6, 4, 9)
    for call in (lambda: linear_logprob(h, w, y[:5]), lambda: linear_logprob(h[:, :3], w, y),
                 lambda: linear_logprob(h, w, y, mask=torch.ones(6)),
                 lambda: linear_logprob(h, w, y, temperature=0.0),
                 lambda: linear_logprob(h, w, y, vocab=10),
                 lambda: linear_logprob(h, w, y, ref=(ref[0], ref[1][:8]))):
        with pytest.raises(AssertionError, match=r"\w"):
            call()


# ---- extremes and identities


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_extreme_logits_stay_finite(dtype, scale):
    (h, w, b), y, ref = make(14, 6, 30, dtype=dtype)
    got = linear_logprob(h * scale, w, y, bias=b * scale, ref=ref, entropy=True, chunk=5)
    want = dense(*(t.double() for t in (h * scale, w, b * scale)), y, [t.double() for t in ref])
    assert_close(got, want, 2e-6 if dtype == torch.float32 else 1e-12)
    assert all(torch.isfinite(g).all() for g in grads(upstream(got), (h, w, b)))
    if scale == 0:
        assert_close(got[:3], [got.lse * -1, got.lse, torch.full_like(got.lse, math.log(30))], 1e-6)


def test_impossible_tokens():
    """-inf in a bias: as if those columns were not there; a target on one has log p = -inf."""
    (h, w, b), y, ref = make(10, 4, 9)
    y = y % 6
    b_inf = b.detach().clone()
    b_inf[6:] = -torch.inf
    ref_inf = (ref[0], ref[1], torch.where(torch.arange(9) < 6, ref[2], -torch.inf))
    b_inf.requires_grad_()
    got = linear_logprob(h, w, y, bias=b_inf, ref=ref_inf, entropy=True)
    want = dense(h, w, b, y, ref, vocab=6)
    assert_close(got, want, 1e-12)
    g, g_want = (grads(upstream(o), (h, w)) for o in (got, want))
    assert_close(g, g_want, 1e-11)
    y[3] = 7
    for more in ({}, {"ref": ref_inf, "entropy": True}):
        out = linear_logprob(h, w, y, bias=b_inf, **more)
        rest = torch.arange(10) != 3
        assert out.logp[3] == -torch.inf and torch.isfinite(out.logp[rest]).all()
        (dh,) = grads(upstream([t for t in out if t is not None]), h)
        assert torch.isfinite(dh[rest]).all() and torch.isfinite(out.lse).all()


def test_identities():
    (h, w, b), y, _ = make(20, 6, 31, dtype=torch.float32)
    h2, ref = h.detach(), rand(20, 6, seed=8, dtype=torch.float32)
    same = linear_logprob(h, w, y, bias=b, ref=(h2, w, b), entropy=True)
    assert (same.kl == 0).all()
    far = linear_logprob(h, w, y, bias=b, ref=(ref, w, b), entropy=True)
    assert (far.kl > 0).all()
    assert (far.entropy > 0).all() and (far.entropy < math.log(31)).all()
    every = torch.arange(31).repeat(20, 1)  # (20, 31): log p of each token of the vocabulary
    logp = linear_logprob(h[:, None].expand(-1, 31, -1), w, every, bias=b).logp
    assert torch.allclose(logp.exp().sum(1), torch.ones(20), atol=1e-5)
    assert torch.allclose((logp.exp() * logp).sum(1), -far.entropy, atol=1e-5)
    # logp, H and KL do not feel a shift of all logits, so the rows of dz sum to 0, and so does db.
    (db,) = grads(upstream([far.logp, far.entropy, far.kl]), b)
    assert abs(db.sum()) < 1e-4 * db.abs().sum()


# ---- 16 bits, autocast, ratios


def bf16_error(f, h, w, b, y, want):
    with torch.autocast("cpu", torch.bfloat16):
        logp = f(h, w, b, y)
    got = (logp, *grads(upstream([logp]), (h, w, b)))
    assert all(g.dtype == torch.float32 for g in got)
    return [(g.double() - t).square().mean().sqrt() for g, t in zip(got, want, strict=True)]


@pytest.mark.parametrize("chunk", [64, None])
def test_autocast_is_as_exact_as_log_softmax_in_float32(chunk):
    """Root mean square errors against float64 from the same bf16 operands: <= naive, or + 10 %."""
    (h, w, b), y, _ = make(512, 64, 500, dtype=torch.float32)
    w.data /= 4
    round64 = [t.detach().bfloat16().double().requires_grad_() for t in (h, w)]
    exact = dense(*round64, b.double(), y)[0]
    want = (exact, *grads(upstream([exact]), (*round64, b)))
    naive = bf16_error(lambda h, w, b, y: F.linear(h, w, b).float().log_softmax(-1).gather(
        1, y[:, None])[:, 0], h, w, b, y, want)
    ours = bf16_error(lambda h, w, b, y: linear_logprob(h, w, y, bias=b, chunk=chunk).logp,
                      h, w, b, y, want)
    for ours_, naive_ in zip(ours, naive, strict=True):
        assert ours_ <= 1.1 * naive_, (ours, naive)


def test_blocks_of_bf16_do_not_lose_dw():
    """The rounding of 64 blocks' dW does not add up: its error stays that of one block."""
    (h, w, _), y, _ = make(256, 16, 40, dtype=torch.bfloat16)
    h64, w64 = (t.detach().double().requires_grad_() for t in (h, w))
    (want,) = grads(upstream(dense(h64, w64, None, y)[:1]), w64)
    h32, w32 = h.detach().float(), w.detach().float().requires_grad_()
    errors = []
    for chunk in (256, 4):
        with torch.autocast("cpu", torch.bfloat16):
            out = linear_logprob(h32, w32, y, chunk=chunk, entropy=True)
        assert out.logp.dtype == torch.float32
        errors.append((grads((rand(256, seed=9) * out.logp).sum(), w32)[0] - want).norm())
    assert errors[1] < 1.5 * errors[0], errors
    low = linear_logprob(h, w, y)
    assert low.logp.dtype == torch.float32 and grads(low.logp.sum(), w)[0].dtype == torch.bfloat16


def test_sure_tokens_keep_their_gradient_in_bf16():
    """With p_y = .9995 the bf16 of p_y is 1: the gradient -(1 - p_y) must not vanish with it."""
    h, w = torch.ones(1, 1, requires_grad=True), torch.tensor([[7.6], [0.0]], requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_logprob(h, w, torch.tensor([0])).logp
    for _ in range(2):  # from what forward kept, then made again
        (dw,) = torch.autograd.grad(out.sum(), w, retain_graph=True)
        assert dw[0, 0] == pytest.approx(1 / (1 + math.exp(7.59375)), rel=0.01)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_second_backward_gives_the_same(autocast):
    (h, w, b), y, _ = make(50, 8, 20, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = upstream([linear_logprob(h, w, y, bias=b, chunk=16).logp])
    first = torch.autograd.grad(loss, (h, w, b), retain_graph=True)
    assert_close(torch.autograd.grad(loss, (h, w, b)), first, 1e-6)


@needs_compiler
@pytest.mark.parametrize(("plain", "autocast"), [(True, True), (False, False)])
def test_compiled_rows_equal_eager_ones(plain, autocast, monkeypatch):
    """The pointwise passes as a GPU has them, fused by torch.compile; here for the CPU."""
    (h, w, b), y, ref = make(50, 8, 24, dtype=torch.float32)
    ask = {} if plain else {"ref": ref, "entropy": True}

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = linear_logprob(h, w, y, bias=b, chunk=16, vocab=21, temperature=0.7, **ask)
        out = [t for t in out if t is not None]
        return *out, *torch.autograd.grad(upstream(out), (h, w, b))

    want = run()
    monkeypatch.setattr(logprob, "_compiles", lambda _device: True)
    assert_close(run(), want, 2e-2 if autocast else 1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_ratio_of_one_policy_with_itself_is_exactly_one(autocast):
    """Measured without gradient and with entropy and KL, then again in the update."""
    h, w = rand(700, 32, dtype=torch.float32), rand(300, 32, seed=1, dtype=torch.float32)
    y, mask = torch.arange(700) % 300, torch.arange(700) % 3 > 0
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with torch.no_grad():
            old = linear_logprob(h, w, y, mask=mask, entropy=True, ref=(h, w), temperature=0.9)
        new = linear_logprob(h.requires_grad_(), w.requires_grad_(), y, mask=mask, temperature=0.9)
    assert ((new.logp - old.logp).exp() == 1).all() and (old.kl == 0).all()


def test_autocast_around_backward_changes_nothing():
    (h, w, b), y, _ = make(30, 8, 20, dtype=torch.float32)
    out = linear_logprob(h, w, y, bias=b).logp
    plain = grads(out.sum(), (h, w, b))
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(grads(out.sum(), (h, w, b)), plain, 0)


# ---- memory, processes, compilation


def status(key):
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith(key)) / 1024


def grown(n, grad):
    """MiB by which the process grows at most in a call with n rows, and backward."""
    h = torch.randn(n, 16, requires_grad=grad)
    w, y = torch.randn(16384, 16, requires_grad=grad), torch.zeros(n, dtype=torch.long)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    out = linear_logprob(h, w, y, entropy=True, chunk=64)
    if grad:
        (out.logp + out.entropy).sum().backward()
    return status("VmHWM") - before


def peaks():
    grown(64, True)
    return [grown(n, grad) for grad in (False, True) for n in (512, 2048)]


class Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(6, 6)
        self.weight = torch.nn.Parameter(rand(11, 6, seed=1, dtype=torch.float32))
        with torch.no_grad():
            self.body.weight.copy_(rand(6, 6, seed=2))
            self.body.bias.zero_()

    def forward(self, x, y, mask):
        h = torch.relu(self.body(x))
        return -linear_logprob(h, self.weight, y, mask=mask, chunk=2).logp.sum() / 5


def head_batch():
    x, y = rand(2, 5, 6, seed=3, dtype=torch.float32), torch.arange(10).view(2, 5)
    return x, y, torch.tensor([[True] * 5, [False] * 5])


def ddp_gradients(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
                            timeout=timedelta(seconds=60))
    model = torch.nn.parallel.DistributedDataParallel(Head())
    x, y, mask = (t[rank : rank + 1] for t in head_batch())
    for _ in range(2):  # the second would hang if the first left a gradient out
        model.zero_grad()
        model(x, y, mask).backward()
    gradients = [p.grad for p in model.parameters()]
    del model  # before its group: see run_program
    dist.destroy_process_group()
    return gradients


def second(_index, folder):
    torch.set_num_threads(1)
    linux = Path("/proc/self/clear_refs").exists()
    torch.save([peaks() if linux else None, ddp_gradients(1, folder)], f"{folder}/second.pt")


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Peaks of memory in a fresh process; gradients of rank 0, this one, and of rank 1, that."""
    folder = str(tmp_path_factory.mktemp("ranks"))
    options = {"join": False, "daemon": True, "start_method": "forkserver"}
    other = mp.start_processes(second, (folder,), **options)
    try:
        mine = ddp_gradients(0, folder)
    finally:
        assert other.join(60)  # raises with the other's traceback
    peak, theirs = torch.load(f"{folder}/second.pt")
    return peak, (mine, theirs)


def test_memory_is_that_of_a_block(processes):
    """(N, V) float32 would be 32 and 128 MiB; a block of 64 rows is 4, two gradients 1.2."""
    if processes[0] is None:
        pytest.skip("reads Linux's VmHWM")
    assert max(processes[0]) < 16, processes[0]


def test_two_processes_one_of_them_without_a_token(processes):
    """DDP averages over ranks, and all tokens are on rank 0: half the single process's gradient."""
    model = Head()
    model(*head_batch()).backward()
    for got in processes[1]:
        assert_close(got, [p.grad / 2 for p in model.parameters()], 1e-6)


def test_torch_compile_around_it():
    model = Head()
    want = model(*head_batch())
    want_grads = grads(want, list(model.parameters()))
    got = torch.compile(model, backend="aot_eager")(*head_batch())
    got.backward()
    assert_close([got, *(p.grad for p in model.parameters())], [want, *want_grads], 1e-6)
