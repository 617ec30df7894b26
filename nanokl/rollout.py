"""Sampled texts: which prompts are continued and how, and what comes of it.

All tensors of tokens are (B, T), those of steps (B, T-1): step t is the choice of token t + 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from nanokl import require_positive


@dataclass(kw_only=True)
class SamplingConfig:
    """Which prompts, and how they are continued: this is what defines the reference's texts."""

    domains: str = "movie,product"  # snippets whose first tokens are the prompts; "" for all
    min_prompt: int = 3  # tokens of the shortest prompt
    max_prompt: int = 8  # tokens of the longest
    max_new_tokens: int = 24  # longest response
    temperature: float = 1.0  # of sampling, and of every log-prob

    def __post_init__(self):
        require_positive(self, "min_prompt", "max_prompt", "max_new_tokens", "temperature")

    @property
    def width(self) -> int:
        """Tokens of the longest text, with the one that starts it."""
        return 1 + self.max_prompt + self.max_new_tokens


@dataclass
class Rollout:
    """Prompts and sampled responses; logp is under the very distribution that was sampled."""

    idx: Tensor  # (B, T) int64, right of the last token arbitrary
    mask: Tensor  # (B, T-1) bool, True where idx[:, t+1] is a response token (the stop one too)
    logp: Tensor  # (B, T-1) float32, 0 outside the mask
    n_prompt: Tensor  # (B,) int64
    stopped: Tensor  # (B,) bool, the stop token was sampled
    paid: Tensor | None = None  # (B, T-1) of a dialogue: what each reply has earned, at its end

    def responses(self) -> list[list[int]]:
        """What follows each row's prompt; of a dialogue also what the user goes on to say."""
        return [row[k:] for row, k in zip(self.rows(), self.n_prompt.tolist(), strict=True)]

    def rows(self) -> list[list[int]]:
        """Each row's ids up to the last that is the model's, without padding."""
        places = torch.arange(2, self.idx.shape[1] + 1, device=self.idx.device)
        n_total = torch.maximum(self.n_prompt, (places * self.mask).amax(1)).tolist()
        return [row[:n] for row, n in zip(self.idx.tolist(), n_total, strict=True)]


def rows_of(rollout: Rollout, rows: Tensor) -> Rollout:
    return Rollout(**{k: x[rows] for k, x in vars(rollout).items() if x is not None})


def join(rollouts: list[Rollout]) -> Rollout:
    """All rows, of rollouts of one width."""
    names = [k for k, x in vars(rollouts[0]).items() if x is not None]
    return Rollout(**{k: torch.cat([getattr(r, k) for r in rollouts]) for k in names})


def gather(mine: Rollout, config: SamplingConfig, runtime) -> Rollout:
    """All ranks' rows, each rank's padded to the width that all have."""
    right = (0, config.width - mine.idx.shape[1])
    whole = {name: runtime.gather(x if x.ndim == 1 else pad(x, right))
             for name, x in vars(mine).items() if x is not None}
    return Rollout(**whole)
