"""Texts from the posterior pi* = ref exp(score / beta) / Z without any training.

Every sampler takes a Target, P prompts, the number n of texts wanted for each, and a generator on
the CPU, and gives `Draws`. Proposals are whole texts of the reference, of the policy or half of
each; weights make up for the difference. All log-probs are those of PPO: at the temperature of
sampling, nothing truncated. Left out: proposals that change a part of a text.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanokl import UserError, bayes
from nanokl.evaluation import Stage
from nanokl.gpt import GPT
from nanokl.logprob import linear_logprob
from nanokl.rollout import Rollout, SamplingConfig, join, rows_of


@dataclass
class Target:
    """The posterior of any prompt, and a policy (with its critic) that may help to find it."""

    stage: Stage
    beta: float
    policy: GPT | None = None
    chunk: int = 1024  # texts that are sampled at once: memory and speed; a GPU can take more

    def __post_init__(self):
        if not 0 < self.beta < float("inf"):
            raise UserError(f"beta is {self.beta}: give a number above 0")


@dataclass
class Draws:
    """n texts for each of P prompts, and what is known of how they were found."""

    rollout: Rollout  # P n rows, grouped by prompt
    score: Tensor  # (P n,)
    proposals: Tensor  # (P,) texts that were sampled for these
    log_z: Tensor | None = None  # (P,) estimates of log Z
    accepted: Tensor | None = None  # (P,) share of the proposals that were accepted
    ess: Tensor | None = None  # (P,) effective number of the weighted texts
    valid: Tensor | None = None  # (P n,) False where a text is missing; None where none is


def pick(logw: Tensor, points: Tensor) -> Tensor:
    """Columns (P, n) of logw (P, K): where the CDF of the weights reaches points (P, n)."""
    cdf = logw.double().softmax(1).cumsum(1)
    return torch.searchsorted(cdf, points * cdf[:, -1:], right=True).clamp(max=logw.shape[1] - 1)


def check(target: Target, prompts: list[list[int]], proposal: str = "ref", **counts: int) -> None:
    """UserError for what no sampler takes."""
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name} is {value}: give at least 1")
    if proposal not in ("ref", "policy", "mixture"):
        raise UserError(f"proposal is {proposal!r}: give ref, policy or mixture")
    if proposal != "ref" and target.policy is None:
        raise UserError(f"proposal {proposal} needs a policy: give the target one, or take ref")
    longest, most = max(map(len, prompts), default=0), 1 + target.stage.config.max_prompt
    if not 0 < longest <= most:
        raise UserError(f"the longest of {len(prompts)} prompts has {longest} tokens: give prompts "
                        f"of up to {most}, or raise max_prompt")


@torch.no_grad()
def log_probs(model: GPT, rollout: Rollout, config: SamplingConfig, runtime,
              chunk: int = 256) -> Tensor:
    """log p(response | prompt) (B,) in float64, by the code of ppo.measure but log-probs alone."""
    device = rollout.idx.device
    out = torch.zeros(len(rollout.idx), dtype=torch.float64, device=device)
    # All positions and not the response's alone: shapes that vary would scatter over the memory
    # that these programs keep (runtime.py), 40 MiB a chunk.
    for rows in torch.arange(len(out), device=device).split(chunk):
        mine = runtime.shard(rows)
        idx, mask = rollout.idx[mine], rollout.mask[mine]
        with runtime.autocast():
            logp = linear_logprob(model(idx)[:, :-1], model.head.weight, idx[:, 1:],
                                  temperature=config.temperature).logp
        out[rows] = runtime.gather(torch.where(mask, logp, 0).double().sum(1))
    return out


def draw_texts(stage: Stage, model: GPT, prompts: list[list[int]], k: int, rng: torch.Generator,
               chunk: int = 1024) -> tuple[Rollout, Tensor]:
    """k texts of a model for each prompt, rows grouped by prompt, and their scores (P k,)."""
    u = stage.uniform(len(prompts) * k, rng)
    return _draw_rows(stage, model, [p for p in prompts for _ in range(k)], u, chunk)


def _draw_rows(stage: Stage, model: GPT, prompts: list[list[int]], u: Tensor,
               chunk: int) -> tuple[Rollout, Tensor]:
    """A text for each prompt, from uniform numbers u of its own, a row of `Stage.uniform`."""
    parts, scores = zip(*(stage.rollouts(model, prompts[i : i + chunk], u=u[i : i + chunk])
                          for i in range(0, len(prompts), chunk)), strict=True)
    return join(parts), torch.cat(scores)


# w = ref exp(score / beta) / q has the mean Z under q; half of the reference in q keeps it below
# 2 exp(score / beta) wherever the policy does not go (Owen & Zhou 2000).
def log_weights(target: Target, rollout: Rollout, score: Tensor, proposal: str) -> Tensor:
    """log w (B,), float64, of texts from the proposal."""
    score, stage = score.double(), target.stage
    if proposal == "ref":
        return score / target.beta
    ref, policy = (log_probs(model, rollout, stage.config, stage.runtime)
                   for model in (stage.ref, target.policy))
    q = policy if proposal == "policy" else bayes.mixture(ref, policy)
    return bayes.log_weights(score, ref, q, beta=target.beta)


def propose(target: Target, prompts: list[list[int]], k: int, rng: torch.Generator, proposal: str,
            *, iid: bool = False) -> tuple[Rollout, Tensor, Tensor]:
    """k weighted texts a prompt: rollout and scores (P k,), grouped by prompt, and log w (P, k).

    Of a mixture every second text is the policy's, a coin has the last of an odd k; `iid` tosses
    one for each. So half of the texts are the policy's on average, and the weights' mean is Z.
    """
    stage, n = target.stage, len(prompts) * k
    u = stage.uniform(n, rng)
    from_ref = (torch.arange(k) % 2 == 0).repeat(len(prompts))
    if proposal != "mixture":
        from_ref[:] = proposal == "ref"
    elif iid:
        from_ref = torch.rand(n, generator=rng) < 0.5
    elif k % 2:
        from_ref[k - 1 :: k] = torch.rand(len(prompts), generator=rng) < 0.5
    parts, order = [], []
    for model, chosen in ((stage.ref, from_ref), (target.policy, ~from_ref)):
        rows = chosen.nonzero()[:, 0]
        if len(rows):
            rows_prompts = [prompts[i // k] for i in rows.tolist()]
            parts.append(_draw_rows(stage, model, rows_prompts, u[rows], target.chunk))
            order.append(rows)
    back = torch.cat(order).argsort().to(stage.runtime.device)
    rollout = rows_of(join([r for r, _ in parts]), back)
    score = torch.cat([s for _, s in parts])[back]
    return rollout, score, log_weights(target, rollout, score, proposal).view(-1, k)


def kept(rollout: Rollout, score: Tensor, columns: Tensor, k: int, log_z: Tensor | None = None,
         **measured: Tensor) -> Draws:
    """Draws of some (P, n) of k proposals a prompt, all P k of which are given."""
    first = k * torch.arange(len(columns), device=columns.device)
    rows = (columns + first[:, None]).flatten()
    return Draws(rows_of(rollout, rows), score[rows], torch.full_like(first, k), log_z, **measured)


# ------------------------------------------------------------------------------ the samplers
# Accept with probability exp((score - r_max) / beta): on average Z exp(-r_max / beta).
def rejection(target: Target, prompts: list[list[int]], n: int, rng: torch.Generator, *,
              r_max: float, trials: int = 16_384, partial: bool = False) -> Draws:
    """Exact and independent texts, for a reward that never exceeds r_max.

    Up to `trials` proposals a prompt. Where they do not give n texts: UserError, or with `partial`
    rows that are not `valid`. `accepted` is the mean probability, which says log Z, too.
    """
    check(target, prompts, n=n, trials=trials)
    stage, P, parts, used, k = target.stage, len(prompts), [], 0, max(n, 16)
    most = r_max / target.beta  # of log w
    found, spent = torch.zeros(2, P, dtype=torch.int64, device=stage.runtime.device)
    total = torch.zeros(P, dtype=torch.float64, device=found.device)  # of w over its bound
    while used < trials and len(going := (found < n).nonzero()[:, 0]):
        k = min(k, trials - used)
        wanted = [prompts[i] for i in going.tolist()]
        rollout, score = draw_texts(stage, stage.ref, wanted, k, rng, target.chunk)
        ok = bayes.accepted(score.cpu().double(), beta=target.beta, r_max=r_max, rng=rng)
        ok, logw = ok.to(score.device), log_weights(target, rollout, score, "ref")
        owner, keep = going.repeat_interleave(k), ok.clone()
        keep[::k] = True  # a text for each prompt, to stand where none is found
        parts.append((rows_of(rollout, keep), score[keep], owner[keep], ok[keep]))
        found += torch.bincount(owner[ok], minlength=P)
        total.index_add_(0, owner, (logw - most).exp())
        spent[going] += k
        used, k = used + k, 2 * k
    if (found < n).any() and not partial:
        few = int(found.argmin())
        raise UserError(f"{int((found < n).sum())} of {P} prompts have fewer than {n} texts after "
                        f"{trials} trials, one has {int(found[few])} (acceptance rate "
                        f"{(total / spent)[few].item():.2g}): raise trials or beta, lower r_max "
                        "if the reward allows it, or take partial=True")
    return _first_accepted(parts, n, found, spent, total / spent, most)


def _first_accepted(parts: list[tuple], n: int, found: Tensor, spent: Tensor, rate: Tensor,
                    scale: float) -> Draws:
    """Each prompt's first n accepted texts, of those of all rounds."""
    texts, *rest = zip(*parts, strict=True)
    score, owner, ok = (torch.cat(x) for x in rest)
    rows = []
    for p in range(len(found)):
        mine = ((owner == p) & ok).nonzero()[:n, 0]
        rows += [mine, (owner == p).nonzero()[0].expand(n - len(mine))]
    rows = torch.cat(rows)
    valid = torch.arange(n, device=found.device) < found[:, None]
    return Draws(rows_of(join(list(texts)), rows), score[rows], spent, rate.log() + scale,
                 accepted=rate, valid=None if valid.all() else valid.flatten())


# Of m weighted proposals, n with probabilities in proportion to w: exact as m grows.
def sir(target: Target, prompts: list[list[int]], n: int, rng: torch.Generator, *, m: int = 1024,
        proposal: str = "mixture") -> Draws:
    """Sampling-importance-resampling (Rubin 1987), with replacement."""
    check(target, prompts, proposal, n=n, m=m)
    rollout, score, logw = propose(target, prompts, m, rng, proposal)
    points = torch.rand(len(prompts), n, generator=rng, dtype=torch.float64).to(logw.device)
    return kept(rollout, score, pick(logw, points), m, bayes.log_mean_exp(logw),
                ess=bayes.effective_sample_size(logw))


# Go from y to a fresh proposal y' with probability min(1, w(y') / w(y)): pi* is stationary.
def imh(target: Target, prompts: list[list[int]], n: int, rng: torch.Generator, *,
        steps: int = 64, proposal: str = "mixture", start: Draws | None = None) -> Draws:
    """Independence Metropolis-Hastings: n chains a prompt, their states after some steps.

    They start at proposals, or at the n texts a prompt of `start`. All n (steps + 1) proposals of
    a prompt are in memory together (half a kB each), and log_z is of them.
    """
    check(target, prompts, proposal, n=n, steps=steps)
    P, S = len(prompts), steps + (start is None)
    rollout, score, logw = propose(target, prompts, n * S, rng, proposal, iid=True)
    log_z, logw = bayes.log_mean_exp(logw), logw.view(P * n, S)
    rows = torch.arange(P * n * S, device=logw.device).view(P * n, S)
    if start is not None:
        first = log_weights(target, start.rollout, start.score, proposal)
        rows = torch.cat([rows.numel() + torch.arange(P * n, device=rows.device)[:, None], rows], 1)
        logw = torch.cat([first[:, None], logw], dim=1)
        rollout, score = join([rollout, start.rollout]), torch.cat([score, start.score])
    u = torch.rand(P * n, steps, generator=rng, dtype=torch.float64).log().to(logw.device)
    at, w, moves = rows[:, 0], logw[:, 0], torch.zeros_like(logw[:, 0])
    for t in range(1, steps + 1):
        move = u[:, t - 1] < logw[:, t] - w
        at, w = torch.where(move, rows[:, t], at), torch.where(move, logw[:, t], w)
        moves += move
    return Draws(rows_of(rollout, at), score[at], torch.full_like(at[:P], n * S), log_z,
                 accepted=moves.view(P, n).mean(1) / steps)


# Not pi*, but near it: the law is ref(y) / m_u (F_u^N - F_{u-}^N) at u = score(y), m_u and F_u the
# reference's probability of scores equal to u, and up to u; KL(law || ref) is the sum over u of
# g_u log(g_u / m_u), g_u = F_u^N - F_{u-}^N, and at most log N - (N - 1) / N.
def best_of_n(target: Target, prompts: list[list[int]], n: int, rng: torch.Generator, *,
              best_of: int = 16) -> Draws:
    """n texts a prompt, each the best of `best_of` = N from the reference; beta plays no part.

    Which of equals is taken depends on their places, and these are random.
    """
    check(target, prompts, n=n, best_of=best_of)
    stage, k = target.stage, n * best_of
    rollout, score = draw_texts(stage, stage.ref, prompts, k, rng, target.chunk)
    best = score.view(-1, n, best_of).argmax(2)
    return kept(rollout, score, best + best_of * torch.arange(n, device=best.device), k)
