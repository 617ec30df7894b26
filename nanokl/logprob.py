"""Log-probs, normalisers, entropies and exact KLs of a linear head, without its (N, V) logits.

Logits z = (h W^T + b) / T give log p = z - lse with lse = log sum_v exp z_v. `linear_logprob`
takes blocks of rows (tokens) and the whole vocabulary of each, so every statistic is exact in one
pass; backward makes the logits again unless what it needs is small enough to keep. Also: means and
whitening under a mask. Left out: second derivatives, soft-caps, a sharded V.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

KEEP_BYTES = 128 << 20  # up to here p - 1_y is kept for backward: 6 N V C flops instead of 8
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
    keep: bool  # p - 1_y, for backward
    vocab: int
    temperature: float
    entropy: bool


def _plan(x: Tensor, heads: list[tuple], *, chunk: int | None, vocab: int | None,
          temperature: float, entropy: bool) -> _Plan:
    kind, n, v = x.device.type, len(x), len(heads[0][1])
    autocast = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
    stats = torch.float64 if dtype == torch.float64 else torch.float32
    # CUDA gives the float32 sums of a 16-bit product (torch >= 2.8); elsewhere they are rounded.
    product = stats if x.is_cuda and hasattr(torch.ops.aten.mm, "dtype_out") else dtype
    # Measured: below 256 rows the products starve; above 512 a CPU gains nothing, and it is faster
    # when its pointwise passes stay in L2 (2^18 numbers). A GPU wants few, large kernels.
    least, most, budget = (256, 512, 32 << 20) if kind == "cpu" else (512, 8192, 256 << 20)
    rows = chunk or min(max(budget // (v * product.itemsize), least), most)
    rows = -(-max(n, 1) // -(-max(n, 1) // rows))  # equal blocks: no short one at the end
    tile = max(1, (1 << 18) // v) if kind == "cpu" else rows
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in heads[0])
    keep = grad and not (entropy or heads[1:]) and n * v * product.itemsize <= KEEP_BYTES
    return _Plan(dtype, product, stats, rows, tile, keep, vocab or v, temperature, entropy)


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
        heads, n, v = _heads(flat, plan), len(y), len(flat[1])
        logp, lse, H, KL, lse_q = (flat[0].new_zeros(n, 1, dtype=plan.stats) for _ in range(5))
        buffer = flat[0].new_empty(n if plan.keep else plan.rows, v, dtype=plan.product)
        for block in _slices(n, plan.rows):
            products = buffer[block] if plan.keep else buffer[: block.stop - block.start]
            for i, g, z, *q in _tiles(heads, block, products, plan):
                lse[i], p = _lse(z, probabilities=plan.keep or plan.entropy or bool(q))
                logp[i] = z.gather(1, y[i]) - lse[i]
                if plan.keep:
                    # p - 1_y before any rounding to 16 bits: 1 - p_y may be lost in that
                    g.copy_(p.scatter_add_(1, y[i], -torch.ones_like(lse[i])))
                elif p is not None:
                    log_p = _log_softmax(z, lse[i])
                if plan.entropy:
                    H[i] = -(p * log_p).sum(1, keepdim=True)
                if q:
                    lse_q[i], _ = _lse(q[0])
                    KL[i] = p.mul_(log_p.sub_(_log_softmax(q[0], lse_q[i]))).sum(1, keepdim=True)
        kept = buffer.to(plan.dtype) if plan.keep else None
        ctx.save_for_backward(y, lse, H, KL, lse_q, kept, *(t for head in heads for t in head))
        return logp, lse, H if plan.entropy else None, KL if len(heads) > 1 else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream):
        plan, (x, w), needs = ctx.plan, ctx.saved_tensors[6:8], ctx.needs_input_grad[2:5]
        dh = torch.empty_like(x, dtype=ctx.h_dtype) if needs[0] else None
        dW = db = None
        for block, dz, scale in _dlogits(ctx.saved_tensors, upstream, plan):
            if needs[0]:
                dh[block] = scale * _mm(dz, w, x.new_empty(len(dz), w.shape[1], dtype=plan.product))
            if needs[1]:
                dW = _add_mm(dW, dz.t(), (scale * x[block]).to(x.dtype), plan)
            if needs[2]:
                db = _add_mm(db, dz.t(), scale.to(x.dtype), plan)
        no_grad = [None] * (len(ctx.needs_input_grad) - 5)  # of h_ref, W_ref, b_ref
        return None, None, dh, dW, db if db is None else db[:, 0], *no_grad


def _dlogits(saved: tuple, upstream: tuple, plan: _Plan) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of rows as (rows, dz, scale (R, 1)): the gradient of the logits h W^T is scale dz."""
    y, lse, H, KL, lse_q, kept, *flat = saved
    plain = all(t is None for t in upstream[1:])
    a, s, e, k = (torch.zeros_like(lse) if t is None else t for t in upstream)
    scale = (-a if plain else torch.ones_like(a)) / plan.temperature
    if plain and kept is not None:
        yield slice(0, len(y)), kept, scale
        return
    heads = _heads(flat, plan)[: 1 if upstream[3] is None else 2]
    A, B = s - a - e * H - k * KL, k - e
    buffer = flat[0].new_empty(plan.rows, len(flat[1]), dtype=plan.product)
    for block in _slices(len(y), plan.rows):
        dz = buffer[: block.stop - block.start]
        for i, g, z, *q in _tiles(heads, block, dz, plan):
            log_p = _log_softmax(z, lse[i])
            if plain:
                g.copy_(log_p.exp_().scatter_add_(1, y[i], -torch.ones_like(lse[i])))
                continue
            factor = log_p * B[i] + A[i]
            if q:
                factor -= _log_softmax(q[0], lse_q[i]).mul_(k[i])
            g.copy_(log_p.exp_().mul_(factor).scatter_add_(1, y[i], a[i]))
        yield block, dz.to(plan.dtype), scale[block]


def _heads(flat: tuple, plan: _Plan) -> list[tuple]:
    """[(h, W, b)] or [(h, W, b), (h_ref, W_ref, b_ref)], in the dtype of the products."""
    return [(x.to(plan.dtype), w.to(plan.dtype), bias)
            for x, w, bias in zip(flat[::3], flat[1::3], flat[2::3], strict=True)]


def _slices(n: int, size: int) -> list[slice]:
    """range(n) in slices; an empty one for n = 0, so that no rows give zeros for gradients."""
    return [slice(i, min(i + size, n)) for i in range(0, max(n, 1), size)]


def _tiles(heads: list[tuple], block: slice, g: Tensor, plan: _Plan) -> Iterator[tuple]:
    """Writes a block's h W^T to g, then gives its tiles: rows, their part of g, z of each head."""
    products = [g, *(torch.empty_like(g) for _ in heads[1:])]
    for (x, w, _), product in zip(heads, products, strict=True):
        _mm(x[block], w.t(), product)
    for r in _slices(len(g), plan.tile):
        z = (_logits(p[r], bias, plan) for p, (_, _, bias) in zip(products, heads, strict=True))
        yield slice(block.start + r.start, block.start + r.stop), g[r], *z


def _logits(product: Tensor, bias: Tensor | None, plan: _Plan) -> Tensor:
    """z = (h W^T + b) / T, in the products' own memory where they have its precision already."""
    z = product.to(plan.stats)  # (R, V)
    if bias is not None:
        z += bias
    if plan.temperature != 1:
        z /= plan.temperature
    if plan.vocab < z.shape[1]:
        z[:, plan.vocab :] = -torch.inf  # and so p = 0 and dz = 0 exactly
    return z


# lse = m + log S  with m = max_v z_v,  S = sum_v exp(z_v - m);  p_v = exp(z_v - m) / S
def _lse(z: Tensor, *, probabilities: bool = False) -> tuple[Tensor, Tensor | None]:
    m = z.amax(1, keepdim=True)
    e = (z - m).exp_()  # step by step: torch.logsumexp takes twice the time on a CPU
    total = e.sum(1, keepdim=True)
    return total.log() + m, e.div_(total) if probabilities else None


def _log_softmax(z: Tensor, lse: Tensor) -> Tensor:
    return z.sub_(lse).clamp_(min=LOG_ZERO)


def _mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a b; with `out` given, an autocast that is on around backward changes nothing."""
    return torch.mm(a, b, out=out, **({} if out.dtype == a.dtype else {"out_dtype": out.dtype}))


def _add_mm(total: Tensor | None, a: Tensor, b: Tensor, plan: _Plan) -> Tensor:
    """total + a b, in place; each block's product is exact, or rounded once, before the sum."""
    if total is not None and total.dtype == a.dtype:
        return total.addmm_(a, b)
    product = _mm(a, b, a.new_empty(a.shape[0], b.shape[1], dtype=plan.product)).to(plan.stats)
    return product if total is None else total.add_(product)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask is True, whatever lies elsewhere; 0 (with a graph) where none is."""
    return torch.where(mask, x, 0).sum() / mask.sum().clamp(min=1)


# (x - mean) / sqrt(var + 1e-8), var biased like TensorFlow's moments, which PPO's settings assume
def masked_whiten(x: Tensor, mask: Tensor) -> Tensor:
    """x at mean 0 and variance 1 over the True tokens; 0 elsewhere."""
    x = x - masked_mean(x, mask)
    return torch.where(mask, x * (masked_mean(x.square(), mask) + 1e-8).rsqrt(), 0)
