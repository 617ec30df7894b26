"""Log-probs, normalisers, entropies and exact KLs of a linear head, without its (N, V) logits.

Logits z = (h W^T + b) / T give log p = z - lse with lse = log sum_v exp z_v. `linear_logprob`
takes blocks of rows (tokens) and the whole vocabulary of each, so every statistic is exact in one
pass. All blocks share one buffer: backward finds the last one as forward left it, and makes the
others' logits again. Left out: second derivatives, soft-caps, a sharded V.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CPU_BLOCK_BYTES, GPU_BLOCK_BYTES = 44 << 20, 192 << 20  # of the logits of one block of rows
SUM_BYTES = 8 << 20  # of a product that waits to be added to dW: measured, within a CPU's caches
LOG_ZERO = -1e30  # log p of an impossible token: finite, so that p log p is 0 and not nan


class LogProbs(NamedTuple):
    """Results of each token in nats, shaped like targets, 0 where masked; None if not asked for."""

    logp: Tensor  # log p(y | h)
    lse: Tensor  # log sum_v exp z_v
    entropy: Tensor | None  # H = -sum_v p_v log p_v
    kl: Tensor | None  # KL(p || q) = sum_v p_v (log p_v - log q_v), q that of ref


def linear_logprob(h: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None,
                   mask: Tensor | None = None, temperature: float = 1.0, vocab: int | None = None,
                   ref: tuple[Tensor, ...] | None = None, entropy: bool = False,
                   chunk: int | None = None) -> LogProbs:
    """log p(targets | h) under softmax((h weight^T + bias) / temperature), and its relatives.

    h (..., C), weight (V, C), bias (V,), targets (...) int64, mask (...) bool: what lies under
    False is not read and gets gradient 0. `vocab`: columns of a padded head that are true ones.
    `ref` = (h_ref, weight_ref[, bias_ref]), divided by the same temperature, gets no gradient.
    Products run in autocast's dtype where that is on, else in h's; statistics, results and the sum
    of dW over blocks in float32 (float64 for float64). `chunk`: rows of a block.
    """
    assert h.shape == (*targets.shape, weight.shape[1]), (h.shape, targets.shape, weight.shape)
    assert mask is None or (mask.dtype == torch.bool and mask.shape == targets.shape), mask.dtype
    assert temperature > 0 and 0 < (vocab or 1) <= len(weight), (temperature, vocab, len(weight))
    heads = [(h, weight, bias)]
    if ref is not None:
        assert len(ref[1]) == len(weight), (ref[1].shape, weight.shape)
        heads.append((*(t.detach() for t in ref), None)[:3])
    rows, y = [x.reshape(-1, x.shape[-1]) for x, _, _ in heads], targets.reshape(-1, 1)
    if mask is not None:  # compute no others: 15 % of the rows count in an MLM
        picked = mask.reshape(-1).nonzero()  # (N, 1)
        rows, y = [x.index_select(0, picked[:, 0]) for x in rows], y[picked[:, 0]]
    plan = _plan(rows[0], heads, chunk=chunk, vocab=vocab, temperature=temperature, entropy=entropy)
    flat = [t for x, (_, w, b) in zip(rows, heads, strict=True) for t in (x, w, b)]
    out = _LinearLogProb.apply(plan, y, *flat)
    if mask is not None:
        empty = out[0].new_zeros(targets.numel(), 1)
        out = [t if t is None else empty.scatter(0, picked, t) for t in out]
    return LogProbs(*(t if t is None else t.view(targets.shape) for t in out))


class _Plan(NamedTuple):
    dtype: torch.dtype  # of what is multiplied
    product: torch.dtype  # of what matrix products give
    stats: torch.dtype  # of everything after them
    rows: int  # of a block: one matrix product
    tile: int  # rows of a block that the pointwise passes take at a time
    keep: bool  # the last block's p - 1_y, for backward
    vocab: int
    temperature: float
    entropy: bool
    compiled: bool  # the pointwise passes, into one kernel each


def _plan(x: Tensor, heads: list[tuple], *, chunk: int | None, vocab: int | None,
          temperature: float, entropy: bool) -> _Plan:
    kind, n, v = x.device.type, len(x), len(heads[0][1])
    autocast = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
    stats = torch.float64 if dtype == torch.float64 else torch.float32
    # CUDA gives the float32 sums of a 16-bit product (torch >= 2.8); elsewhere they are rounded.
    product = stats if x.is_cuda and hasattr(torch.ops.aten.mm, "dtype_out") else dtype
    # Measured: with fewer rows the products starve. A CPU is fastest when its pointwise passes stay
    # in L2 (2^18 numbers).
    least, budget = (256, CPU_BLOCK_BYTES) if kind == "cpu" else (1024, GPU_BLOCK_BYTES)
    rows = min(chunk or max(budget // (v * product.itemsize), least), max(n, 1))
    tile = max(1, (1 << 18) // v) if kind == "cpu" else rows
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in heads[0])
    keep = grad and not (entropy or heads[1:])
    return _Plan(dtype, product, stats, rows, tile, keep, vocab or v, temperature, entropy,
                 _compiles(x.device))


def _compiles(device: torch.device) -> bool:
    """Whether kernels are launched one by one, so that fusing them pays, and can be compiled."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


# With p = softmax(z), H its entropy and KL = KL(p || q), the derivatives with respect to z are
#     d logp = 1_y - p      d lse = p      dH = -p (log p + H)      dKL = p (log p - log q - KL)
# so the upstream gradients a, s, e, k of one token's logp, lse, H, KL give
#     dz = a 1_y + p (A + B log p - k log q)      A = s - a - e H - k KL      B = k - e
# which for a alone is -a (p - 1_y): one number a row, times what forward can have kept. Then
#     dh = dz W / T      dW = dz^T h / T      db = sum_n dz / T
class _LinearLogProb(torch.autograd.Function):
    """(plan, y (N, 1), h, W, b[, h_ref, W_ref, b_ref]) -> logp, lse, H, KL, each (N, 1) or None."""

    @staticmethod
    def forward(ctx, plan, y, *flat):
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.h_dtype = plan, flat[0].dtype
        heads, n = _heads(flat, plan), len(y)
        stats = [flat[0].new_zeros(n, 1, dtype=plan.stats) for _ in range(7)]
        # A process's first exp, if several threads share it, has errors of 1e-4 in one of seven
        # processes (torch 2.13 with MKL); after one in a single thread it had none in 40.
        stats[0][:1].exp()
        function = _compile(_forward_rows) if plan.compiled else _forward_rows
        buffers = _buffers(heads, plan)
        for block in _blocks(n, plan.rows):
            keep = plan.keep and block.stop == n
            for i, g, *products in _tiles(heads, block, buffers, plan):
                for stat, of_rows in zip(stats, function(plan, keep, y[i], g, *products),
                                         strict=True):
                    if of_rows is not None:
                        stat[i] = of_rows
                if keep:
                    _put(g, y[i], stats[0][i].expm1())
        # Not saved_for_backward: the first backward takes it and uses its memory, a second one
        # makes it again.
        ctx.kept = buffers[0] if plan.keep else None
        logp, lse, H, KL = stats[:4]
        ctx.save_for_backward(y, *stats, *(t for head in heads for t in head))
        return logp, lse, H if plan.entropy else None, KL if len(heads) > 1 else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream):
        plan, (x, w), needs = ctx.plan, ctx.saved_tensors[8:10], ctx.needs_input_grad[2:5]
        kept, ctx.kept = ctx.kept, None
        dh = torch.empty_like(x, dtype=ctx.h_dtype) if needs[0] else None
        dW = db = None
        for block, dz, scale in _dlogits(ctx.saved_tensors, upstream, kept, plan):
            if needs[0]:
                dh[block] = scale * _mm(dz, w, x.new_empty(len(dz), w.shape[1], dtype=plan.product))
            if needs[1]:
                dW = _add_mm(dW, dz.t(), (scale * x[block]).to(x.dtype), plan)
            if needs[2]:
                db = _add_mm(db, dz.t(), scale.to(x.dtype), plan)
        no_grad = [None] * (len(ctx.needs_input_grad) - 5)  # of h_ref, W_ref, b_ref
        return None, None, dh, dW, db if db is None else db[:, 0], *no_grad


def _dlogits(saved: tuple, upstream: tuple, kept: Tensor | None,
             plan: _Plan) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of rows as (rows, dz, scale (R, 1)): the gradient of the logits h W^T is scale dz."""
    y, logp, lse, H, KL, lse_q, m, total, *flat = saved
    plain = all(t is None for t in upstream[1:])
    a, s, e, k = (torch.zeros_like(lse) if t is None else t for t in upstream)
    scale = (-a if plain else torch.ones_like(a)) / plan.temperature
    rows = (logp, m, total) if plain else (lse, lse_q, a, s - a - e * H - k * KL, k - e, k)
    heads = _heads(flat, plan)[: 1 if upstream[3] is None else 2]
    buffers = _buffers(heads, plan, kept)
    function = _plain_backward_rows if plain else _backward_rows
    function = _compile(function) if plan.compiled else function
    for block in reversed(_blocks(len(y), plan.rows)):
        if not (plain and kept is not None and block.stop == len(y)):
            for i, g, *products in _tiles(heads, block, buffers, plan):
                _put(g, y[i], function(plan, y[i], [t[i] for t in rows], g, *products))
        yield block, buffers[0][: block.stop - block.start], scale[block]


def _forward_rows(plan: _Plan, keep: bool, y: Tensor, g: Tensor, *products) -> tuple:
    """logp, lse, H, KL, lse_q, m, S of some rows, (R, 1) or None; keep: writes p to g."""
    z, *q = _logits(products, plan)
    z_y, more = z.gather(1, y), plan.entropy or bool(q)
    lse, m, total, e = _exp(z.clone() if more else z)
    logp = z_y - lse
    H = KL = lse_q = None
    if keep:
        g.copy_(e.div_(total))
    elif more:
        p, log_p = e.div_(total), _log_softmax(z, lse)
        if plan.entropy:
            H = -(p * log_p).sum(1, keepdim=True)
        if q:
            lse_q, *_ = _exp(q[0].clone())
            KL = p.mul_(log_p.sub_(_log_softmax(q[0], lse_q))).sum(1, keepdim=True)
    return logp, lse, H, KL, lse_q, m, total


def _plain_backward_rows(plan: _Plan, y: Tensor, rows: list, g: Tensor, *products) -> Tensor:
    """Writes p to g, bit for bit what forward kept of other rows; returns (p - 1_y)_y (R, 1)."""
    logp, m, total = rows
    (z,) = _logits(products, plan)
    g.copy_(z.sub_(m).exp_().div_(total))
    return logp.expm1()


def _backward_rows(plan: _Plan, y: Tensor, rows: list, g: Tensor, *products) -> Tensor:
    """Writes dz - a 1_y to g; returns dz_y (R, 1)."""
    lse, lse_q, a, A, B, k = rows
    z, *q = _logits(products, plan)
    log_p = _log_softmax(z, lse)
    factor = log_p * B + A
    if q:
        factor -= _log_softmax(q[0], lse_q).mul_(k)
    dz = log_p.exp_().mul_(factor)
    g.copy_(dz)
    return dz.gather(1, y) + a


def _put(dz: Tensor, y: Tensor, dz_y: Tensor) -> None:
    """Sets dz at y, summed before it was rounded to 16 bits: 1 - p_y may be lost in that."""
    dz.scatter_(1, y, dz_y.to(dz.dtype))


@functools.cache
def _compile(function: Callable) -> Callable:
    return torch.compile(function)


def _heads(flat: tuple, plan: _Plan) -> list[tuple]:
    """[(h, W, b)] or [(h, W, b), (h_ref, W_ref, b_ref)], in the dtype of the products."""
    return [(x.to(plan.dtype), w.to(plan.dtype), bias)
            for x, w, bias in zip(flat[::3], flat[1::3], flat[2::3], strict=True)]


def _blocks(n: int, size: int) -> list[slice]:
    """range(n) in slices of `size`, the first the rest; one for n = 0, so that it gives zeros."""
    stops = range(n, 0, -size) or [0]
    return [slice(max(stop - size, 0), stop) for stop in reversed(stops)]


def _buffers(heads: list[tuple], plan: _Plan, kept: Tensor | None = None) -> list[Tensor]:
    """(rows, V) blocks: of dz, then each head's products; the first two are one if of one dtype."""
    x, w, _ = heads[0]
    dz = x.new_empty(plan.rows, len(w), dtype=plan.dtype) if kept is None else kept
    same = plan.product == plan.dtype
    return [dz, *(dz if same and i == 0 else dz.new_empty(dz.shape, dtype=plan.product)
                  for i in range(len(heads)))]


def _tiles(heads: list[tuple], block: slice, buffers: list, plan: _Plan) -> Iterator[tuple]:
    """Fills the buffers with a block's h W^T; its tiles: rows, dz, each head's (product, b)."""
    n = block.stop - block.start
    for (x, w, _), products in zip(heads, buffers[1:], strict=True):
        _mm(x[block], w.t(), products[:n])
    for start in range(0, n, plan.tile):
        r = slice(start, min(start + plan.tile, n))
        dz, *products = (t[r] for t in buffers)
        yield (slice(block.start + r.start, block.start + r.stop), dz,
               *((t, bias) for t, (_, _, bias) in zip(products, heads, strict=True)))


def _logits(products: tuple, plan: _Plan) -> Iterator[Tensor]:
    """z = (h W^T + b) / T, in the products' own memory where they have its precision already."""
    for product, bias in products:
        z = product.to(plan.stats, copy=plan.compiled)  # (R, V); a copy in registers
        if bias is not None:
            z += bias
        if plan.temperature != 1:
            z /= plan.temperature
        if plan.vocab < z.shape[1]:
            z[:, plan.vocab :] = -torch.inf  # and so p = 0 and dz = 0 exactly
        yield z


# lse = m + log S  with m = max_v z_v,  S = sum_v e_v,  e_v = exp(z_v - m);  p_v = e_v / S
def _exp(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """lse, m, S and e, e in z's place: torch.logsumexp takes twice the time on a CPU."""
    m = z.amax(1, keepdim=True)
    e = z.sub_(m).exp_()
    total = e.sum(1, keepdim=True)
    return total.log() + m, m, total, e


def _log_softmax(z: Tensor, lse: Tensor) -> Tensor:
    return z.sub_(lse).clamp_(min=LOG_ZERO)


def _mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a b; with `out` given, an autocast that is on around backward changes nothing."""
    return torch.mm(a, b, out=out, **({} if out.dtype == a.dtype else {"out_dtype": out.dtype}))


def _add_mm(total: Tensor | None, a: Tensor, b: Tensor, plan: _Plan) -> Tensor:
    """total + a b in place, in float32: 16-bit products are exact, or rounded once, before it."""
    first = total is None
    if first:
        total = b.new_empty(len(a), b.shape[1], dtype=plan.stats)
    if total.dtype == a.dtype:
        return torch.addmm(total, a, b, beta=0 if first else 1, out=total)
    size = SUM_BYTES if a.device.type == "cpu" else GPU_BLOCK_BYTES  # caches, or few launches
    rows = max(1, size // (b.shape[1] * plan.product.itemsize))
    for start in range(0, len(a), rows):
        part, here = a[start : start + rows], total[start : start + rows]
        product = _mm(part, b, b.new_empty(here.shape, dtype=plan.product))
        torch.add(product, 0 if first else here, out=here)
    return total
