"""log p(y | h) of a linear head, forward and backward: linear_logprob beside what others have.

    N tokens, d channels, V vocabulary; h ~ N(0, 1), W ~ N(0, 4 / d), so that logits have sd 2

Every variant gets the same h (N, d), W (V, d) and y (N,), a random upstream gradient for each
token (so that nobody can have the gradient ready before backward), and returns log-probs, dh in
h's dtype and dW in W's. In bfloat16 that is as in training: h in 16 bits, W in 32, products under
autocast, or of W cast within the timed run where an op knows no autocast. The oracle is float64 on
the very numbers that are multiplied (rounded to 16 bits there). logp: largest error in nats; dh,
dW: norm of the error over norm. torch's chunk is the fastest of CHUNKS, looked for beforehand.
The bare matrix products are the floor: three, or four for those who compute the logits twice.
"""

import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from nanokl.bench import Ready
from nanokl.logprob import linear_logprob

CHUNKS = (64, 128, 256, 512, 1024, 2048)  # rows that F.linear_cross_entropy may take at a time
TRL_COLUMNS, LIGER_COLUMNS = 32768, 4096  # of the vocabulary at a time, as in their trainers
WRONG = 0.1  # a relative error that is no rounding any more
EVERYWHERE = ("nanokl", "naive", "torch auto chunk", "torch best chunk", "trl", "liger scaled",
              "3 products", "4 products")  # fmt: skip
ON_CPU = (*EVERYWHERE, "liger selective")
ON_CUDA = (*EVERYWHERE, "naive compiled", "liger linear ce")


def _case(n: int, d: int, v: int, dtype: str, *more: str, **keys) -> dict:
    name = " ".join([f"N {n}, d {d}, V {v}, {dtype}", *more])
    return {"name": name, "N": n, "d": d, "V": v, "dtype": dtype, "outputs": ["logp"], **keys}


CASES = (
    _case(1024, 256, 32768, "float32", device="cpu", variants=ON_CPU),
    _case(1024, 768, 32768, "float32", device="cpu", variants=ON_CPU),
    _case(1024, 256, 32768, "bfloat16", device="cpu", variants=ON_CPU),
    _case(1024, 768, 32768, "bfloat16", device="cpu",  # automatic chunks: half a minute a run
          variants=tuple(name for name in ON_CPU if name != "torch auto chunk")),
    _case(1024, 768, 32768, "float32", "15 % masked in", device="cpu", masked=0.15,
          variants=("nanokl", "nanokl dense", "naive", "naive of picked rows")),
    _case(1024, 256, 32768, "float32", "with entropy", device="cpu", outputs=["logp", "entropy"],
          variants=("nanokl", "naive", "trl", "liger scaled")),
    _case(1024, 256, 32768, "float32", "with entropy and KL", device="cpu",
          outputs=["logp", "entropy", "kl"], variants=("nanokl", "naive")),
    _case(8192, 768, 50304, "bfloat16", device="cuda", variants=ON_CUDA),
    _case(8192, 2048, 128256, "bfloat16", device="cuda", variants=ON_CUDA),
    {**_case(96, 16, 512, "float32", variants=ON_CPU), "name": "tiny", "extra": True},
    {**_case(96, 16, 512, "bfloat16", variants=ON_CPU), "name": "tiny bfloat16", "extra": True},
)  # fmt: skip


class Work:
    """The inputs of a case, and what a `forward(work)` makes of them."""

    def __init__(self, case: dict):
        self.case, self.device, self.names = case, case["device"], case["outputs"]
        n, d, v = case["N"], case["d"], case["V"]
        self.dtype = getattr(torch, case["dtype"])
        rng = torch.Generator().manual_seed(0)
        draw = lambda *size: torch.randn(*size, generator=rng).to(self.device)  # noqa: E731
        self.h = draw(n, d).to(self.dtype).requires_grad_()
        self.w = (draw(v, d) * (2 / d**0.5)).requires_grad_()
        self.y = torch.randint(v, (n,), generator=rng).to(self.device)
        self.upstream = [draw(n) for _ in self.names]
        share = case.get("masked", 1.0)
        self.mask = (torch.rand(n, generator=rng) < share).to(self.device)
        self.ref = (draw(n, d).to(self.dtype), draw(v, d) * (2 / d**0.5)) if "kl" in self.names \
            else None

    def run(self, forward: Callable) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
        """The outputs (N,), and dh and dW."""
        bf16 = self.dtype is torch.bfloat16
        with torch.autocast(self.device, torch.bfloat16, enabled=bf16):
            outputs = forward(self)
        upstream = [g.to(x.dtype) for g, x in zip(self.upstream, outputs, strict=True)]
        gradients = torch.autograd.grad(outputs, (self.h, self.w), upstream)
        return [x.detach() for x in outputs], gradients

    def ready(self, forward: Callable, **more: float) -> Ready:
        """The variant, if it is right; ValueError if it is far off."""
        check = self.errors(*self.run(forward))
        if max(check["dh"], check["dW"]) > WRONG:
            raise ValueError(f"wrong gradients, relative error {check['dh']:.2g} and "
                             f"{check['dW']:.2g}")
        returned = self.h.nbytes + self.w.nbytes
        return Ready(partial(self.run, forward), self.case["N"], "token", {**check, **more},
                     returned)

    def errors(self, outputs: list[Tensor], gradients: tuple[Tensor, Tensor]) -> dict[str, float]:
        """By name: largest error of each output, and each gradient's relative one."""
        exact, exact_gradients = self.oracle()
        check = {name: float((x.double() - e).abs().max())
                 for name, x, e in zip(self.names, outputs, exact, strict=True)}
        for name, x, e in zip(("dh", "dW"), gradients, exact_gradients, strict=True):
            check[name] = float((x.double() - e).norm() / e.norm())
        return check

    def oracle(self) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
        """What `run` should give, in float64, some rows at a time."""
        double = lambda x: x.detach().to(self.dtype).double()  # noqa: E731
        w, ref = double(self.w).requires_grad_(), [double(x) for x in self.ref or ()]
        dh, dw, outputs = [], torch.zeros_like(w), []
        for rows in torch.arange(self.case["N"], device=self.device).split(256):
            h = double(self.h)[rows].requires_grad_()
            q = (ref[0][rows] @ ref[1].t()).log_softmax(1) if ref else None
            out = _dense((h @ w.t()).log_softmax(1), q, self.y[rows], self.names)
            out = [torch.where(self.mask[rows], x, 0) for x in out]
            gradient = torch.autograd.grad(out, (h, w), [g[rows].double() for g in self.upstream])
            dh.append(gradient[0])
            dw += gradient[1]
            outputs.append([x.detach() for x in out])
        return [torch.cat(x) for x in zip(*outputs, strict=True)], (torch.cat(dh), dw)


# H = -sum_v p_v log p_v      KL = sum_v p_v (log p_v - log q_v)
def _dense(log_p: Tensor, log_q: Tensor | None, y: Tensor, names: list[str]) -> list[Tensor]:
    """The outputs that `names` has, of (N, V) log-probs."""
    make = {"logp": lambda: log_p.gather(1, y[:, None])[:, 0],
            "entropy": lambda: -(log_p.exp() * log_p).sum(1),
            "kl": lambda: (log_p.exp() * (log_p - log_q)).sum(1)}
    return [make[name]() for name in names]


def _nanokl(x: Work, masked: bool = True) -> list[Tensor]:
    mask = x.mask if masked and "masked" in x.case else None
    out = linear_logprob(x.h, x.w, x.y, mask=mask, ref=x.ref, entropy="entropy" in x.names)
    return [getattr(out, name) for name in x.names]


def _nanokl_dense(x: Work) -> list[Tensor]:
    return [torch.where(x.mask, t, 0) for t in _nanokl(x, masked=False)]


def _naive(x: Work) -> list[Tensor]:
    log_p = F.linear(x.h, x.w).log_softmax(1, dtype=torch.float32)
    log_q = F.linear(*x.ref).log_softmax(1, dtype=torch.float32) if x.ref else None
    out = _dense(log_p, log_q, x.y, x.names)
    return [torch.where(x.mask, t, 0) for t in out] if "masked" in x.case else out


def _naive_picked(x: Work) -> list[Tensor]:
    log_p = F.linear(x.h[x.mask], x.w).log_softmax(1, dtype=torch.float32)
    empty = torch.zeros(len(x.h), device=x.device)
    return [empty.masked_scatter(x.mask, t) for t in _dense(log_p, None, x.y[x.mask], x.names)]


def _naive_compiled(case: dict) -> Ready:
    return Work(case).ready(torch.compile(_naive))


def _torch_chunked(x: Work, **options) -> list[Tensor]:
    chunks = torch.nn.LinearCrossEntropyOptions(**options)
    return [-F.linear_cross_entropy(x.h, x.w.to(x.dtype), x.y, reduction="none", options=chunks)]


def _torch_best(case: dict) -> Ready:
    work, seconds = Work(case), {}
    forwards = {rows: partial(_torch_chunked, batch_chunk_size=rows, chunking_method=None)
                for rows in CHUNKS if rows <= case["N"]}
    for rows in [max(forwards), *forwards]:  # the first is a warm-up
        start = time.perf_counter()
        float(work.run(forwards[rows])[1][1][0, 0])  # waits for a GPU, too
        seconds[rows] = time.perf_counter() - start
    best = min(seconds, key=seconds.get)
    return work.ready(forwards[best], chunk=best)


def _trl(case: dict) -> Ready:
    from trl.kernels import ChunkedLogProbFunction

    more = tuple(case["outputs"][1:])

    def forward(x: Work) -> list[Tensor]:
        settings = (1.0, TRL_COLUMNS, None, 1.0, more)  # temperature, columns, soft-cap, scale
        out = ChunkedLogProbFunction.apply(x.h, x.w, None, x.y, *settings)
        return list(out[: 1 + len(more)])

    return Work(case).ready(forward)


def _liger_selective(case: dict) -> Ready:
    from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction as op

    return Work(case).ready(lambda x: [op.apply(x.h, x.w, x.y, None, 1.0, LIGER_COLUMNS)])


def _liger_scaled(case: dict) -> Ready:
    from liger_kernel.ops import fused_linear_scaled_cross_entropy as ops

    def forward(x: Work) -> list[Tensor]:
        settings = (1.0, -100, 1, "entropy" in x.names)  # temperature, no such token, clusters
        out = ops.LigerFusedLinearScaledCrossEntropyFunction.apply(
            x.h, x.w.to(x.dtype), x.y, *settings)
        return [-out[0], out[1]] if isinstance(out, tuple) else [-out]

    return Work(case).ready(forward)


def _liger_linear_ce(case: dict) -> Ready:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as op

    options = {"reduction": "none", "accum_dtype": torch.float32}
    return Work(case).ready(lambda x: [-op(x.h, x.w.to(x.dtype), x.y, **options)])


def _products(forwards: int, case: dict) -> Ready:
    """Only what must be multiplied: z = h W^T (once or twice), dz W, dz^T h, in ready memory."""
    x = Work(case)
    h, w = x.h.detach(), x.w.detach().to(x.dtype)
    z, dh, dw = (torch.ones(len(a), b, dtype=x.dtype, device=x.device)
                 for a, b in ((h, len(w)), (h, h.shape[1]), (w, h.shape[1])))

    def run() -> None:
        for _ in range(forwards):
            torch.mm(h, w.t(), out=z)
        torch.mm(z, w, out=dh)
        torch.mm(z.t(), h, out=dw)

    return Ready(run, case["N"], "token", {})


def _simple(forward: Callable) -> Callable[[dict], Ready]:
    return lambda case: Work(case).ready(forward)


VARIANTS = {
    "nanokl": _simple(_nanokl), "nanokl dense": _simple(_nanokl_dense), "naive": _simple(_naive),
    "naive of picked rows": _simple(_naive_picked), "naive compiled": _naive_compiled,
    "torch auto chunk": _simple(_torch_chunked), "torch best chunk": _torch_best, "trl": _trl,
    "liger selective": _liger_selective, "liger scaled": _liger_scaled,
    "liger linear ce": _liger_linear_ce, "3 products": partial(_products, 1),
    "4 products": partial(_products, 2),
}  # fmt: skip
ENVIRONMENT = dict.fromkeys((name for name in VARIANTS if name[:3] in ("trl", "lig")), "peers")
