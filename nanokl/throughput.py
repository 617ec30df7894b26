"""How fast training goes: tokens a second, and how much of the device's peak that is (MFU).

The clock runs in training steps only, loading included: not in evaluation, not while saving. Left
out: profiling, what padding and recomputation cost the device (they are no useful FLOPs).
"""

import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from nanokl.metrics import read_rows
from nanokl.runtime import Runtime

# The data sheets' dense FLOP/s of bfloat16 on tensor cores, and of float32 without TF32, by the
# whole name of the device: a MIG slice, a laptop's or a cut-down GPU of the family has another.
PEAK = {
    "NVIDIA A100-SXM4-40GB": (312e12, 19.5e12), "NVIDIA A100-SXM4-80GB": (312e12, 19.5e12),
    "NVIDIA A100-PCIE-40GB": (312e12, 19.5e12), "NVIDIA A100 80GB PCIe": (312e12, 19.5e12),
    "NVIDIA H100 80GB HBM3": (989e12, 67e12), "NVIDIA H100 PCIe": (756e12, 51e12),
    "NVIDIA H200": (989e12, 67e12), "NVIDIA B200": (2250e12, None),
    "NVIDIA L4": (121e12, 30.3e12), "NVIDIA L40S": (362e12, 91.6e12),
    "NVIDIA A10": (125e12, 31.2e12), "NVIDIA GeForce RTX 4090": (165e12, 82.6e12),
    "NVIDIA GeForce RTX 3090": (71e12, 35.6e12), "Tesla T4": (None, 8.1e12),
    "Tesla V100-SXM2-16GB": (None, 15.7e12), "Tesla V100-SXM2-32GB": (None, 15.7e12),
}  # fmt: skip
RATES = ("tokens_per_second", "loader_share", "mfu")


def peak_flops(runtime: Runtime) -> float | None:
    """Of all processes' devices together, in the compute dtype; None where that is not known."""
    if runtime.device.type != "cuda":
        return None
    bf16, float32 = PEAK.get(torch.cuda.get_device_name(runtime.device), (None, None))
    if runtime.dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return None  # TF32 has a peak of its own
    one = {torch.bfloat16: bf16, torch.float32: float32}[runtime.dtype]
    return one and one * runtime.world


# 6 N + 12 L T C a token: a weight of a matrix product takes 2 FLOPs forward and 4 backward (Kaplan
# et al., arXiv:2001.08361, 2.1); so does each of a head's two products with T keys (PaLM,
# arXiv:2204.02311, appendix B; the causal half is not taken off). Embeddings, being looked up, are
# not in N; the head is, for the tokens that it predicts.
def model_flops(model: nn.Module, tokens: int, pairs: int, predicted: int) -> float:
    """Forward and backward, for so many tokens, pairs of tokens in a row, and predictions."""

    def n(name: str) -> int:
        parameters = getattr(model, name, nn.Identity()).parameters()
        return sum(p.numel() for p in parameters if p.dim() == 2)

    weights = n("blocks") * tokens + (n("head") + n("transform")) * predicted
    return 6.0 * weights + 12.0 * model.config.n_layer * model.config.n_embd * pairs


class Meter:
    """Times the `with meter:` of each training step and counts its tokens, those of all ranks."""

    def __init__(self, model: nn.Module, runtime: Runtime, tokens_seen: float = 0):
        self.model, self.peak, self.tokens_seen = model, peak_flops(runtime), tokens_seen
        self._restart()

    def _restart(self) -> None:
        self.seconds = self.loading = 0.0
        self.work = torch.zeros(3, dtype=torch.int64)  # tokens, pairs, predicted

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def loaded(self, lengths: Tensor, predicted: int) -> None:
        """To be called inside, when the batch is there: lengths (B,) of its rows, its targets."""
        self.loading += time.perf_counter() - self.start
        tokens = int(lengths.sum())
        self.tokens_seen += tokens
        self.work += torch.tensor([tokens, int(lengths.square().sum()), predicted])

    def __exit__(self, *_) -> None:
        # no waiting for a GPU: each step's check of the loss does that
        self.seconds += time.perf_counter() - self.start

    def rates(self) -> dict:
        """tokens_seen, and the rates since the last call; no mfu where the peak is not known."""
        work = self.work.tolist()
        rates = {"tokens_seen": self.tokens_seen, "loader_share": self.loading / self.seconds,
                 "tokens_per_second": round(work[0] / self.seconds)}
        if self.peak:
            rates["mfu"] = model_flops(self.model, *work) / self.seconds / self.peak
        self._restart()
        return rates


def medians(log: Path) -> dict:
    """The rates' medians over the rows of a metrics.jsonl, of all sittings of the run."""
    rows = read_rows(log)
    columns = {name: [row[name] for row in rows if name in row] for name in RATES}
    return {name: statistics.median(column) for name, column in columns.items() if column}
