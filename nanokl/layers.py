"""The transformer's small parts, each with a faster way than torch's own.

Left out: their initialisation, which is the transformer's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS, LARGE_WEIGHT = 32, 1 << 19  # measured on a CPU with AMX


class Linear(nn.Linear):
    """x W^T + b in the weight's precision, or autocast's.

    Without gradient, for few rows and a large W on a CPU it is (W x^T)^T, which reads W in order
    and takes half the time; the result is a transposed view then.
    """

    def forward(self, x: Tensor) -> Tensor:
        rows, W = x.numel() // x.shape[-1], self.weight
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(W.dtype)
        few = rows <= FEW_ROWS and W.numel() >= LARGE_WEIGHT and x.device.type == "cpu"
        if not few or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        xT = x.reshape(rows, -1).t()
        y = W @ xT if self.bias is None else torch.addmm(self.bias[:, None], W, xT)  # (out, rows)
        return y.t().unflatten(0, x.shape[:-1])


class Dropout(nn.Dropout):
    """0 with probability p, else x / (1 - p), for p in steps of 2^-16 on a CPU.

    There 16 random bits a number, from torch's global generator, take half of F.dropout's time.
    """

    def forward(self, x: Tensor) -> Tensor:
        drops = self.training and self.p > 0
        if not drops or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        zero = min(round(self.p * 2**16), 2**16 - 1)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64)
        bits = bits.random_(-(2**63), None).view(torch.int16)[: x.numel()].view(x.shape)
        return (x * (bits >= zero - 2**15).to(x.dtype)) * (1 / (1 - zero / 2**16))


class SquaredReLU(torch.autograd.Function):
    """relu(x)^2 (arXiv:2109.08668), two passes over memory fewer than autograd's own."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        r = F.relu(x)
        ctx.save_for_backward(r)
        return r * r

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (r,) = ctx.saved_tensors
        return (grad * r).mul_(2)


def gelu_tanh(x: Tensor) -> Tensor:
    """x (1 + tanh u) / 2 = x sigmoid(2u), u = sqrt(2/pi) (x + .044715 x^3); arXiv:1606.08415.

    Compiled it is the second form, for an exp costs less than a tanh.
    """
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    return x * torch.sigmoid((8 / torch.pi) ** 0.5 * (x + 0.044715 * x * x * x))


ACTIVATIONS = {"relu2": SquaredReLU.apply, "gelu": F.gelu, "gelu_tanh": gelu_tanh}
