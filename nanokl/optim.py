"""Optimisers and the learning-rate schedule: Muon for the blocks' matrices, AdamW for the rest.

Left out: sharded optimiser states, closures, sparse gradients, parameters in half precision.
"""

import math

import torch
from torch import Tensor, nn

from nanokl import UserError

# Each step maps a singular value s to a s + b s^3 + c s^5: steep at 0, never settling at 1, which
# does no harm (Jordan et al. 2024, Muon).
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(x: Tensor, *, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """About U V^T of each matrix U S V^T, by Newton-Schulz iteration; zeros stay zeros.

    x (N, m, n) -> (N, m, n) in `dtype`; singular values above .002 |x|_F end up in .68 to 1.21.
    """
    a, b, c = QUINTIC
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x  # the Gram matrix of the short side is the smaller one
    for _ in range(steps):
        gram = x @ x.mT  # (N, m, m)
        inner = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b gram + c gram^2
        x = torch.baddbmm(x, inner, x, beta=a)  # a x + inner x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for matrices only.

        M <- mu M + (1 - mu) G                          momentum
        O = orthogonalize((1 - mu) G + mu M)            Nesterov
        W <- W - lr (weight_decay W + .2 sqrt(max(m, n)) O)

    .2 sqrt(max(m, n)) gives the update the size of AdamW's, so that its lr and weight decay serve
    (Liu et al. 2025, Muon is scalable). The `split` parts of a matrix along dim 0, such as query,
    key and value, are orthogonalised apart; all in `dtype`, where bfloat16 is enough.
    """

    def __init__(self, params, lr: float, *, weight_decay: float = 0.0, momentum: float = 0.95,
                 split: int = 1, dtype: torch.dtype = torch.float32) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "split": split}
        super().__init__(params, defaults)
        self.dtype = dtype  # not in the groups: a resumed run may be on another machine
        for group in self.param_groups:
            for p in group["params"]:
                assert p.ndim == 2 and p.shape[0] % group["split"] == 0, (p.shape, group["split"])

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        batches: dict[tuple, list[tuple[Tensor, Tensor, dict]]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, split = self.state[p], group["split"]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                moment = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(moment, group["momentum"])
                for w, u in zip(p.chunk(split), update.chunk(split), strict=True):
                    key = (*sorted(w.shape), w.device)  # a tall matrix joins the wide ones
                    batches.setdefault(key, []).append((w, u, group))
        for (m, n, _), batch in batches.items():
            wide = torch.stack([u if len(u) == m else u.mT for _, u, _ in batch])  # (N, m, n)
            wide = orthogonalize(wide, dtype=self.dtype)
            for (w, _, group), o in zip(batch, wide.to(torch.float32), strict=True):
                w.mul_(1 - group["lr"] * group["weight_decay"])
                w.add_(o if len(w) == m else o.mT, alpha=-group["lr"] * 0.2 * math.sqrt(n))


def make_optimizers(model: nn.Module, *, lr: float, muon_lr: float, weight_decay: float,
                    betas: tuple[float, float], momentum: float = 0.95,
                    dtype: torch.dtype = torch.float32,
                    speed: dict[str, float] | None = None) -> list[torch.optim.Optimizer]:
    """Muon for matrices in `blocks.`, AdamW for the rest (1-D: no decay); UserError: bad values.

    `momentum` is Muon's, `betas` are AdamW's; with a muon_lr of 0 AdamW has all. `speed`: what
    parameters whose names start so have their rates multiplied by.
    """
    if not 0 < lr < math.inf or not 0 <= muon_lr < math.inf:
        raise UserError(f"lr is {lr} and muon_lr {muon_lr}: give numbers above 0, such as 0.003, "
                        "or a muon_lr of 0, for AdamW alone")
    if not 0 <= weight_decay < math.inf:
        raise UserError(f"weight_decay is {weight_decay}: give 0 or more")
    if not all(0 <= beta < 1 for beta in (*betas, momentum)):
        raise UserError(f"betas are {betas}, momentum is {momentum}: give 0 to below 1 each")
    by_split, by_decay = {}, {}  # and by speed
    for name, p in model.named_parameters():  # a tied weight comes once
        fast = next((x for start, x in (speed or {}).items() if name.startswith(start)), 1.0)
        if p.requires_grad and p.ndim == 2 and "blocks." in name and muon_lr:
            split = 3 if name.endswith("qkv.weight") else 1
            by_split.setdefault((fast, -split), []).append(p)
        elif p.requires_grad:
            by_decay.setdefault((fast, p.ndim == 1), []).append(p)
    muon = [{"params": ps, "split": -split, "lr": muon_lr * fast}
            for (fast, split), ps in sorted(by_split.items(), key=lambda x: x[0])]
    adamw = [{"params": ps, "weight_decay": weight_decay * (not flat), "lr": lr * fast}
             for (fast, flat), ps in sorted(by_decay.items(), key=lambda x: x[0])]
    optimizers = []
    if muon:
        optimizers.append(Muon(muon, muon_lr, weight_decay=weight_decay, momentum=momentum,
                               dtype=dtype))
    if adamw:
        fused = all(p.device.type in ("cpu", "cuda") for group in adamw for p in group["params"])
        optimizers.append(torch.optim.AdamW(adamw, lr=lr, betas=betas, fused=fused))
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["initial_lr"] = group["lr"]  # for set_lr
    return optimizers


# scale(step) = min(up, down, 1), up = (step + 1) / warmup, down = (total - step) / (decay total);
# it would be 0 after the last step.
def lr_scale(step: int, total: int, *, warmup: int, decay: float) -> float:
    """Share of the peak rate (`warmup` in steps, `decay` of the run); UserError: out of range."""
    if warmup < 0 or not 0 <= decay <= 1:
        raise UserError(f"warmup is {warmup}, decay {decay}: give warmup of 0 or more steps, decay "
                        "from 0 to 1")
    up = min(1.0, (step + 1) / max(warmup, 1))
    down = min(1.0, (total - step) / (decay * total)) if decay * total > 0 else 1.0
    return min(up, down)


def set_lr(optimizers: list[torch.optim.Optimizer], scale: float) -> None:
    """Sets every group's learning rate to `scale` times its own peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * scale
