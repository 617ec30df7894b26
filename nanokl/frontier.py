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

from nanokl import bayes, exact


def tilted(score: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """KL(pi* || ref), E*[r] and effective sample size, (P,) each, of texts (P, K).

    `log_q` is log ref - log proposal of each text, 0 where the reference itself has drawn them.
    """
    log_w = score / beta + log_q
    p = log_w.softmax(-1)
    reward = (p * score).sum(-1)
    return (reward / beta - bayes.log_mean_exp(log_w), reward,
            bayes.effective_sample_size(log_w))


def _enough(ess: Tensor) -> bool:
    """Whether prompts of these effective sample sizes (P,) can be believed."""
    return bool(ess.median() >= bayes.LEAST_ESS and ess.min() >= bayes.WORST_ESS)


def frontier(score: Tensor, log_q: Tensor, betas) -> list[dict]:
    """R*(k) at the prices `betas`, means over prompts; trusted while the ESS is large enough."""
    out = []
    for beta in betas:
        kl, reward, ess = tilted(score, log_q, beta)
        out.append({"beta": beta, "kl_nats": kl.mean().item(), "reward_mean": reward.mean().item(),
                    "ess_median": ess.median().item(), "trusted": _enough(ess)})
    return out


# R*(k) <= b k + b log Z_b for each b
def most_reward(score: Tensor, log_q: Tensor, kl: float, betas) -> tuple[float, bool]:
    """R*(kl): the least over b of b kl + b log Z_b, mean over prompts; and whether to trust it.

    A log Z_b of too few texts is too low, and so is R* then.
    """
    most = [b * (kl + bayes.log_mean_exp(score / b + log_q).mean().item()) for b in betas]
    least = min(most)
    return least, _enough(tilted(score, log_q, betas[most.index(least)])[2])


def best_of_n(score: Tensor, n: float, log_q: Tensor | None = None) -> tuple[Tensor, ...]:
    """KL, E[r] and effective number of texts of the best of n's law, (P,) each, of texts (P, K).

    `log_q` as in `tilted`: texts of a proposal that knows the best ones tell of an n that the
    reference's own, log_q = 0, do not reach.
    """
    log_ref = (torch.zeros_like(score) if log_q is None else log_q).log_softmax(-1)
    log_p = exact.best_of_n(log_ref, score, n)
    return (exact.kl(log_p, log_ref), exact.expectation(log_p, score),
            bayes.effective_sample_size(log_p))


def best_of_n_at(score: Tensor, log_q: Tensor, kl: float) -> dict:
    """The n whose best-of-n has this KL, mean over prompts, by bisection of log n, and its E[r].

    Trusted while its law has enough texts; too few of the best fall short of E[r].
    """
    low, high = 0.0, 60.0
    for _ in range(40):
        middle = (low + high) / 2
        now, reward, ess = best_of_n(score, math.exp(middle), log_q)
        low, high = (middle, high) if now.mean() < kl else (low, middle)
    return {"n": math.exp(middle), "reward_mean": reward.mean().item(),
            "trusted": _enough(ess)}


def _of(log_p: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """KL and E[r], (P,) each, of laws log_p (P, K) over equally likely texts."""
    return (exact.expectation(log_p, log_p + math.log(r.shape[-1])),
            exact.expectation(log_p, r))


# P(y) = E over the m - 1 others of w(y) / (w(y) + sum of theirs), times m / K
def sir(r: Tensor, beta: float, m: int, *, rng: torch.Generator,
        n_sets: int = 256) -> tuple[Tensor, Tensor]:
    """KL and E[r] of one draw out of m proposals with odds exp(r / beta), (P,) each."""
    log_w = r / beta  # (P, K)
    others = torch.randint(r.shape[-1], (n_sets, m - 1), generator=rng)
    rest = log_w[:, others].logsumexp(-1)  # (P, n_sets)
    p = torch.stack([(log_w - s[:, None]).sigmoid() for s in rest.T]).mean(0)
    # p sums to K / m up to the noise of the sets
    return _of((p / p.sum(-1, keepdim=True)).log(), r)


# p'(j) = sum_i p(i) min(1, w_j / w_i) / K + p(j) P(j's own proposal is rejected)
def metropolis(r: Tensor, beta: float, steps: int) -> tuple[Tensor, Tensor]:
    """KL and E[r] after some steps of a chain whose proposals and start are the reference's."""
    r = r.sort(-1).values
    K, log_w = r.shape[-1], r / beta
    none = torch.full_like(r[..., :1], -torch.inf)
    below = torch.cat([none, log_w.logcumsumexp(-1)[..., :-1]], -1)  # of smaller weights
    at_least = torch.arange(K, 0, -1, dtype=r.dtype)  # texts no lighter than this one
    # a lighter proposal may be refused
    log_stay = (1 - (at_least + (below - log_w).exp()) / K).clamp(min=0).log()
    log_p = torch.full_like(r, -math.log(K))
    for _ in range(steps):
        lighter = log_p.logcumsumexp(-1)  # those that this text is no lighter than: all accepted
        heavier = (log_p - log_w)[..., 1:].flip(-1).logcumsumexp(-1).flip(-1)
        moved = torch.logaddexp(lighter, log_w + torch.cat([heavier, none], -1)) - math.log(K)
        log_p = torch.logaddexp(moved, log_stay + log_p)
    return _of(log_p, r)


def prices(n: int = 41) -> list[float]:
    """Prices b from 30 down to .03, evenly on a logarithmic scale."""
    return [30 * math.exp(-i * math.log(1000) / (n - 1)) for i in range(n)]
