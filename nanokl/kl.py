"""KL(policy || ref) in the objective: how it is estimated, and where it is charged.

With x the log-ratio log pi - log ref of a token that pi has sampled, or summed over its response:

    k1 = x                      has the KL as its mean, of either sign
    k2 = x^2 / 2                near the KL where pi is near ref, never negative
    k3 = exp(-x) - 1 + x        has the KL as its mean, never negative
    exact = sum_a pi(a | s) log pi(a | s) / ref(a | s)      of a step, whatever token it drew

Schulman 2020, http://joschu.net/blog/kl-approx.html; exact: Amini et al. arXiv:2504.10637. The
right mean does not make the right gradient, since the samples are drawn from pi itself:

    grad KL = E sum_t (x_t + x_t+1 + ...) grad log pi(y_t)                      k1 in the reward
            = E x grad log pi(y) = E grad x^2 / 2,  x of the response           k2 in the loss
            = E sum_t [grad exact_t + (exact_t+1 + ...) grad log pi(y_t)]       exact in both

Tang & Munos arXiv:2506.09477; Liu et al. arXiv:2510.01555; Shah et al. arXiv:2512.21852.
kl_table.py measures every choice. In the loss all hold while samples are from the policy itself;
later epochs on one batch have no importance weights there. Left out: those, and clamped estimates.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nanokl import UserError

MYOPIC = "wrong: myopic, blind to what a token costs later"
# (estimator, place, per): what it follows instead of, or as, the gradient of the KL, at gamma 1
MEANING = {
    ("k1", "reward", "token"): "right: a token pays for itself and what follows",
    ("k1", "reward", "sequence"): "right, noisier: pays for what came before, too",
    ("k2", "loss", "sequence"): "right on-policy, but noisier, without a critic",
    ("exact", "both", "token"): "right: own step in the loss, later in the reward",
    ("k1", "loss", "token"): "wrong: 0 in the mean, nothing but noise",
    ("k1", "loss", "sequence"): "wrong: 0 in the mean, nothing but noise",
    ("k2", "loss", "token"): MYOPIC,
    ("exact", "loss", "token"): MYOPIC,
    ("k3", "loss", "token"): "wrong: myopic, and of KL(ref || policy)",
    ("k3", "loss", "sequence"): "wrong: of the other KL, KL(ref || policy)",
    ("k2", "reward", "token"): "wrong: not of the KL; near ref hardly any",
    ("k2", "reward", "sequence"): "wrong: not of the KL; near ref hardly any",
    ("k3", "reward", "token"): "wrong: KL(ref || policy) taken off its own step",
    ("k3", "reward", "sequence"): "wrong: KL(policy || ref) - KL(ref || policy)",
    ("exact", "reward", "token"): "wrong: misses what a token costs at its own step",
}


@dataclass(kw_only=True)
class KLConfig:
    """How the KL is charged; the defaults are right, and MEANING says what the others do."""

    kl_estimator: Literal["k1", "k2", "k3", "exact"] = "k1"  # of KL(policy || ref)
    kl_place: Literal["reward", "loss", "both"] = "reward"  # where it is charged; both is for exact
    kl_per: Literal["token", "sequence"] = "token"  # what is estimated: each step, or the response

    def __post_init__(self):
        if self.kl_choice in MEANING:
            return
        if self.kl_estimator == "exact":
            raise UserError(f"kl_per is {self.kl_per}, which has no exact KL: choose --kl_per "
                            "token, or --kl_estimator k1, k2 or k3")
        if "both" in self.kl_choice:
            raise UserError(f"kl_place is both, kl_estimator {self.kl_estimator}, which would be "
                            "charged twice: choose --kl_place reward or loss, or the estimator "
                            "exact")
        raise UserError(f"the KL cannot be {' '.join(self.kl_choice)}: choose one of "
                        f"{', '.join(' '.join(key) for key in MEANING)}")

    @property
    def kl_choice(self) -> tuple[str, str, str]:
        return self.kl_estimator, self.kl_place, self.kl_per

    @property
    def kl_in_loss(self) -> bool:
        return self.kl_place != "reward"

    def kl_in_words(self, gamma: float = 1.0) -> str:
        """The choice and what it means at a discount, which takes from what the reward charges."""
        meaning = MEANING[self.kl_choice]
        if gamma < 1 and self.kl_place != "loss" and meaning.startswith("right"):
            meaning = MYOPIC + (f", of which gamma {gamma:g} leaves a part" if gamma else "")
        place = {"both": "loss and reward"}.get(self.kl_place, self.kl_place)
        return f"{self.kl_estimator} per {self.kl_per} in the {place} ({meaning})"


def k1(logp: Tensor, logp_ref: Tensor) -> Tensor:
    return logp - logp_ref


def k2(logp: Tensor, logp_ref: Tensor) -> Tensor:
    return (logp - logp_ref).square() / 2


def k3(logp: Tensor, logp_ref: Tensor) -> Tensor:
    return (logp_ref - logp).expm1() + (logp - logp_ref)


def estimates(logp: Tensor, logp_ref: Tensor, kl: Tensor | None, mask: Tensor,
              how: KLConfig) -> Tensor:
    """The KL in nats, of each token (B, T-1) and 0 outside the mask, or of the response (B, 1).

    `kl`: the exact one of each step, such as linear_logprob gives; the others do not read it.
    """
    if how.kl_estimator == "exact":
        return torch.where(mask, kl, 0)
    logp, logp_ref = (torch.where(mask, x, 0) for x in (logp, logp_ref))
    if how.kl_per == "sequence":
        logp, logp_ref = (x.sum(1, keepdim=True) for x in (logp, logp_ref))
    return {"k1": k1, "k2": k2, "k3": k3}[how.kl_estimator](logp, logp_ref)


def at_last(x: Tensor, mask: Tensor) -> Tensor:
    """x (B,) on each row's last True token, 0 elsewhere: (B, T-1)."""
    steps = torch.arange(mask.shape[1], device=mask.device)
    last = (steps * mask).argmax(1, keepdim=True)  # the stop token itself where there is one
    return x.new_zeros(mask.shape).scatter(1, last, x[:, None])


# exact_t is known before token t is drawn: in its reward it would be a baseline, whose gradient is
# 0 in the mean. A token's reward has the KL of the step that it leads to, exact_t+1.
def paid_in_reward(logp: Tensor, logp_ref: Tensor, kl: Tensor | None, mask: Tensor,
                   how: KLConfig) -> Tensor:
    """Nats (B, T-1) for which each token's reward pays beta; no gradient passes."""
    if how.kl_place == "loss":
        return torch.zeros_like(logp)
    with torch.no_grad():
        nats = estimates(logp, logp_ref, kl, mask, how)
    if how.kl_estimator == "exact":
        return torch.nn.functional.pad(nats[:, 1:], (0, 1)) * mask  # not the prompt's last token
    return nats if how.kl_per == "token" else at_last(nats[:, 0], mask)


# L = sum price nats / number of tokens: whole responses, on the scale of policy_loss, whose mean is
# over tokens. With whitened advantages a nat's price is beta / sd of them.
def kl_loss(logp: Tensor, logp_ref: Tensor, kl: Tensor | None, mask: Tensor, how: KLConfig, *,
            price: float | Tensor) -> Tensor:
    """The KL as a term of the loss, differentiable in logp and kl; a price, or one each row."""
    nats = estimates(logp, logp_ref, kl, mask, how)
    return (price * nats).sum() / mask.sum().clamp(min=1)


@dataclass
class BetaController:
    """Fixed beta, or Ziegler's: beta *= 1 + clip(kl/target - 1, +-.2) n / horizon."""

    beta: float
    target: float | None = None  # nats per sequence; None keeps beta fixed
    horizon: float = 10_000.0  # episodes

    def update(self, kl_nats_per_sequence: float, n_episodes: int) -> None:
        if self.target is not None:
            error = min(max(kl_nats_per_sequence / self.target - 1, -0.2), 0.2)
            self.beta *= 1 + error * n_episodes / self.horizon
