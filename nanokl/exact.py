"""A world small enough to list: every text of T tokens, its probability, and the posterior itself.

What bayes.py estimates, samplers.py draws from and train_rlhf.py trains towards is computed here
by enumeration, in float64. A law over texts is a vector log p(y) (V^T,), the texts in the order of
`texts`; a policy is its T levels, log pi(a | s) of all prefixes s of one length, (V^t, V). After a
stop token nothing but further stops follows, at probability 1, so that all texts have T tokens.
Left out: prompts (one world each), rewards inside the text.

    J(pi) = E_pi[r] - beta KL(pi || ref)                        what PPO maximises
    pi*(y) = ref(y) exp(r(y) / beta) / Z,   Z = E_ref exp(r / beta)      prior x evidence
    J(pi) = beta log Z - beta KL(pi || pi*)                     so pi* is the maximum
    gap(pi) = log Z - J(pi) / beta = KL(pi || pi*)

beta = 0 is the limit: pi* is ref on the texts of the highest reward, log Z is infinite (its sign
is that reward's), and the gap is infinite for whatever says another text.
"""

import torch
from torch import Tensor

Levels = list[Tensor]


def texts(V: int, T: int) -> Tensor:
    """All V^T texts (V^T, T), in lexicographic order: a prefix's texts lie side by side."""
    place = V ** torch.arange(T - 1, -1, -1)
    return torch.arange(V**T)[:, None] // place % V


@torch.no_grad()
def levels_of(model, prompt: list[int], T: int, *, stop: int | None = None,
              temperature: float = 1.0) -> Levels:
    """log pi(a | prompt, s) of a GPT at each prefix s of fewer than T tokens, T levels (V^t, V)."""
    V = model.config.vocab_size
    tails = texts(V, T - 1)
    idx = torch.cat([torch.tensor(prompt).expand(len(tails), -1), tails], dim=1)
    h = model(idx)[:, len(prompt) - 1 :].double()  # (V^(T-1), T, C)
    logp = (h @ model.head.weight.double().T / temperature).log_softmax(-1)
    levels = [logp[:: V ** (T - 1 - t), t] for t in range(T)]
    return levels if stop is None else [absorb(x, t, stop) for t, x in enumerate(levels)]


def absorb(level: Tensor, t: int, stop: int) -> Tensor:
    """A level whose prefixes of t tokens go on with `stop` for sure once they have one."""
    V = level.shape[1]
    only = torch.full((V,), -torch.inf, dtype=level.dtype)
    only[stop] = 0
    ended = (texts(V, t) == stop).any(1, keepdim=True)
    return torch.where(ended, only, level)


def joint(levels: Levels) -> Tensor:
    """log p(y) = sum_t log p(y_t | y_<t) of all texts (V^T,)."""
    logp = levels[0].new_zeros(1)
    for level in levels:
        logp = (logp[:, None] + level).flatten()
    return logp


def expectation(logp: Tensor, x: Tensor) -> Tensor:
    """sum_y p(y) x(y) over what is possible: 0 times an infinity is 0, and so is its gradient."""
    p = logp.exp()
    return (p * x.masked_fill(p == 0, 0)).sum(-1)


def kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p || q) in nats; infinite where p has what q has not."""
    return expectation(logp, logp - logq)


def posterior(logp_ref: Tensor, r: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log pi* (V^T,) and log Z."""
    if beta == 0:
        top = r[logp_ref > -torch.inf].max()
        best = logp_ref.masked_fill(r != top, -torch.inf)
        log_z = best.logsumexp(0) if top == 0 else top * torch.inf
        return best.log_softmax(0), log_z
    tilted = logp_ref + r / beta
    log_z = tilted.logsumexp(0)
    return tilted - log_z, log_z


def objective(logp: Tensor, logp_ref: Tensor, r: Tensor, beta: float) -> Tensor:
    """J(pi), in units of the reward."""
    return expectation(logp, r) - (beta * kl(logp, logp_ref) if beta else 0)


def gap(logp: Tensor, logp_ref: Tensor, r: Tensor, beta: float) -> Tensor:
    """log Z - J(pi) / beta, nats from the posterior; the tests hold it against KL(pi || pi*)."""
    pi_star, log_z = posterior(logp_ref, r, beta)
    if beta == 0:  # the difference of two infinities
        return kl(logp, pi_star)
    return log_z - objective(logp, logp_ref, r, beta) / beta


# V(y) = r(y) at the leaves;  V(s) = beta log sum_a ref(a | s) exp(V(sa) / beta).
# Then V(root) = beta log Z and the optimal twist of a prefix is exp(V(s) / beta).
def soft_values(ref: Levels, r: Tensor, beta: float) -> list[Tensor]:
    """The soft Bellman values of all prefixes, T + 1 levels (V^t,): root first, rewards last."""
    assert beta > 0, beta
    values = [r]
    for level in reversed(ref):
        values.append(beta * (level + values[-1].view_as(level) / beta).logsumexp(1))
    return values[::-1]


# pi*(a | s) = ref(a | s) exp((V(sa) - V(s)) / beta)
def posterior_levels(ref: Levels, values: list[Tensor], beta: float) -> Levels:
    """The posterior as a policy, from the soft values."""
    return [level + (after.view_as(level) - here[:, None]) / beta
            for level, here, after in zip(ref, values[:-1], values[1:], strict=True)]


# V_pi(y) = r(y);  V_pi(s) = sum_a pi(a | s) (V_pi(sa) - beta log pi(a | s) / ref(a | s))
def policy_values(policy: Levels, ref: Levels, r: Tensor, beta: float) -> list[Tensor]:
    """What a perfect critic of a policy says of all prefixes, T + 1 levels (V^t,)."""
    values = [r]
    for logp, logp_ref in zip(reversed(policy), reversed(ref), strict=True):
        reward = values[-1].view_as(logp) - beta * (logp - logp_ref)
        values.append(torch.where(logp > -torch.inf, logp.exp() * reward, 0).sum(1))
    return values[::-1]


# With m_u = ref(r = u), F_u = ref(r <= u):  pi_n(y) = ref(y) / m_u (F_u^n - F_{u-}^n), u = r(y).
# In logs, with F_{u-} = F_u (1 - m_u / F_u), and F_u near 1 from what lies above it, so that
# neither small masses nor large n cancel.
def best_of_n(logp_ref: Tensor, r: Tensor, n: float) -> Tensor:
    """log law (..., K) of the best of n of the reference's samples, ties broken at random.

    Of all texts or, as if they were all, of K samples with their weights; n may lie between two
    whole numbers.
    """
    ordered, order = r.sort(-1)
    place = torch.nn.functional.pad((ordered.diff() > 0).cumsum(-1), (1, 0))
    level = torch.empty_like(place).scatter(-1, order, place)  # (..., K) texts of one reward: one
    mass = torch.zeros_like(logp_ref).scatter_add(-1, level, logp_ref.exp())
    cdf = mass.cumsum(-1)
    above = torch.nn.functional.pad(mass.flip(-1).cumsum(-1).flip(-1), (0, 1))[..., 1:]
    log_cdf = torch.where(cdf < 0.5, cdf.log(), torch.log1p(-above))
    top = -(n * torch.log1p(-(mass / cdf).clamp(max=1))).expm1()  # 1 - (F_{u-} / F_u)^n
    tilt = n * log_cdf + top.log() - mass.log()
    return logp_ref + torch.where(mass > 0, tilt, -torch.inf).gather(-1, level)
