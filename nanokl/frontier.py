"""The most reward that any policy can have at a KL, and where samplers without training lie.

    R*(k) = inf_b { b k + b log Z_b }         no policy with KL(pi || ref) = k has more
    at the price b:   k = E*[r] / b - log Z_b,   R* = E*[r],   slope dR*/dk = b

The posterior, best-of-n, SIR and independence Metropolis-Hastings look at a text through its
reward alone, so that what they reach is a function of the reference's rewards: the rewards r (K,)
of one prompt's samples stand for all of its texts. Prompts are averaged at equal b, never pooled.
Beirami et al. arXiv:2401.01879 (best-of-n); Gao et al. arXiv:2210.10760 (reward against KL).
"""

import math

import torch
from torch import Tensor

from nanokl import bayes


def tilted(score: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """KL(pi* || ref), E*[r] and effective sample size, (P,) each, of texts (P, K).

    `log_q` is log ref - log proposal of each text, 0 where the reference itself has drawn them.
    """
    log_w = score / beta + log_q
    p = log_w.softmax(-1)
    reward = (p * score).sum(-1)
    return (reward / beta - bayes.log_mean_exp(log_w), reward,
            bayes.effective_sample_size(log_w))


def frontier(score: Tensor, log_q: Tensor, betas) -> list[dict]:
    """R*(k) at the prices `betas`, means over prompts; trusted while the ESS is large enough."""
    out = []
    for beta in betas:
        kl, reward, ess = tilted(score, log_q, beta)
        out.append({"beta": beta, "kl_nats": kl.mean().item(), "reward_mean": reward.mean().item(),
                    "ess_median": ess.median().item(),
                    "trusted": bool(ess.median() >= bayes.LEAST_ESS)})
    return out


# R*(k) <= b k + b log Z_b for each b
def most_reward(score: Tensor, log_q: Tensor, kl: float, betas) -> float:
    """R*(kl): the least over b of b kl + b log Z_b, mean over prompts."""
    log_z = torch.stack([bayes.log_mean_exp(score / b + log_q).mean() for b in betas])
    b = torch.as_tensor(list(betas), dtype=log_z.dtype)
    return (b * (kl + log_z)).min().item()


def _kl(p: Tensor) -> Tensor:
    """KL of laws p (..., K) over equally likely texts."""
    return torch.special.xlogy(p, p * p.shape[-1]).sum(-1)


# p_k = (1 - S_k)^n - (1 - S_{k-1})^n,  S_k the reference's share of texts above the k-th
def best_of_n(score: Tensor, n: float, log_q: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """KL and E[r] of the best of n texts, (P,) each, from texts (P, K) without ties.

    `log_q` as in `tilted`: texts of a proposal that knows the best ones tell of an n that the
    reference's own, log_q = 0, do not reach.
    """
    score, order = score.sort(-1)
    log_q = torch.zeros_like(score) if log_q is None else log_q.gather(-1, order)
    q = log_q.softmax(-1)
    above = torch.nn.functional.pad(q.flip(-1).cumsum(-1), (1, 0)).flip(-1)  # (P, K + 1), 1 to 0
    p = (n * torch.log1p(-above.clamp(max=1))).exp().diff()
    return torch.special.xlogy(p, p / q).sum(-1), (p * score).sum(-1)


def best_of_n_at(score: Tensor, log_q: Tensor, kl: float) -> tuple[float, float]:
    """The n whose best-of-n has this KL, mean over prompts, and its E[r], by bisection of log n."""
    low, high = 0.0, 60.0
    for _ in range(40):
        middle = (low + high) / 2
        now, reward = best_of_n(score, math.exp(middle), log_q)
        low, high = (middle, high) if now.mean() < kl else (low, middle)
    return math.exp(middle), reward.mean().item()


# P(y) = E over the m - 1 others of w(y) / (w(y) + sum of theirs), times m / K
def sir(r: Tensor, beta: float, m: int, *, rng: torch.Generator,
        n_sets: int = 256) -> tuple[Tensor, Tensor]:
    """KL and E[r] of one draw out of m proposals with odds exp(r / beta), (P,) each."""
    w = ((r - r.amax(-1, keepdim=True)) / beta).exp()  # (P, K)
    K = r.shape[-1]
    others = torch.randint(K, (n_sets, m - 1), generator=rng)
    rest = w[:, others].sum(-1)  # (P, n_sets)
    p = torch.stack([(w / (w + s[:, None])).nan_to_num(1.0) for s in rest.T]).mean(0)
    p = p / p.sum(-1, keepdim=True)  # sums to K / m up to the noise of the sets
    return _kl(p), (p * r).sum(-1)


# p'(j) = sum_i p(i) min(1, w_j / w_i) / K + p(j) P(j's own proposal is rejected)
def metropolis(r: Tensor, beta: float, steps: int) -> tuple[Tensor, Tensor]:
    """KL and E[r] after some steps of a chain whose proposals and start are the reference's."""
    r = r.sort(-1).values
    K, log_w = r.shape[-1], r / beta
    w = (log_w - log_w[..., -1:]).exp()
    p = torch.full_like(r, 1 / K)
    below = torch.nn.functional.pad(w.cumsum(-1), (1, 0))[..., :-1]  # of smaller weights
    at_least = torch.arange(K, 0, -1, dtype=r.dtype)  # texts no lighter than this one
    stay = 1 - (at_least + below / w) / K  # a lighter proposal may be refused
    for _ in range(steps):
        lighter = p.cumsum(-1)  # those that this text is no lighter than: always accepted
        heavier = (p / w).flip(-1).cumsum(-1).flip(-1) - p / w
        p = (lighter + w * heavier) / K + stay * p
    return _kl(p), (p * r).sum(-1)


def prices(n: int = 41) -> list[float]:
    """Prices b from 30 down to .03, evenly on a logarithmic scale."""
    return [30 * math.exp(-i * math.log(1000) / (n - 1)) for i in range(n)]
