"""Twisted sequential Monte Carlo: texts from the posterior, grown token by token, no training.

Particles are steered by a twist psi(prefix) > 0, here PPO's critic or any function, and weighed

    w <- w ref(a | s) psi(sa) / (q(a | s) psi(s))      psi(prompt) = 1, psi(text) = exp(score/beta)

at each token a from q; where the effective number of a prompt's particles is low, they are drawn
anew in proportion to w. The product of the mean weights has the mean Z for every psi. It is Z
itself for psi(s) = exp(V(s) / beta), V the soft values, with q = pi*: a critic knows its policy's
values, not V, which costs variance and nothing else. Zhao et al. arXiv:2404.17546. Left out: the
optimal q for a given psi, an upper bound from a pinned path.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nanokl import UserError, ppo
from nanokl.bayes import effective_sample_size, log_mean_exp
from nanokl.generate import cast_once, pack_prompts, sample
from nanokl.rollout import Rollout, join, rows_of
from nanokl.samplers import Draws, Target, check, kept, pick

Twist = Callable[[Tensor], Tensor]  # prefixes (b, t), prompts included -> log psi (b,)


@torch.no_grad()
def smc(target: Target, prompts: list[list[int]], n: int, rng: torch.Generator, *,
        particles: int = 256, proposal: str = "ref", twist: Twist | None = None,
        threshold: float = 0.5, systematic: bool = True) -> Draws:
    """n texts a prompt, drawn from the final weighted particles; log_z is unbiased in Z.

    Resamples where ESS < threshold * particles: 0 is never; systematically, or each particle for
    itself. Without `twist` it is exp(V / beta) of the policy's critic. Each rank does all of it.
    """
    check(target, prompts, proposal, n=n, particles=particles)
    if proposal == "mixture":
        raise UserError("smc cannot propose from a mixture: give ref or policy")
    if twist is None and not hasattr(target.policy, "value"):
        raise UserError("smc needs a twist, and there is no critic: give the target a policy of "
                        "PPO, or smc a twist")
    P, K, steps = len(prompts), particles, target.stage.config.max_new_tokens
    u = torch.rand(P, K, steps, generator=rng)
    points = torch.rand(P, steps, 1 if systematic else K, generator=rng, dtype=torch.float64)
    if systematic:
        points = (torch.arange(K) + points) / K
    last = torch.rand(P, n, generator=rng, dtype=torch.float64)
    swarms = []
    for group in torch.arange(P).split(max(1, target.chunk // K)):
        swarm = Swarm(target, [prompts[i] for i in group], K, proposal, twist)
        swarm.run(u[group].flatten(0, 1), points[group], threshold)
        swarms.append(swarm)
    score, logw, log_z = (torch.cat([getattr(s, name) for s in swarms])
                          for name in ("score", "logw", "log_z"))
    logw, rows = logw.view(P, K), pick(logw.view(P, K), last.to(logw.device))
    return kept(join([s.text for s in swarms]), score, rows, K, log_z + log_mean_exp(logw),
                ess=effective_sample_size(logw))


class Readers:
    """Models that read the same rows, each with a cache; h (b, C) are their last hidden states."""

    def __init__(self, models: dict, batch: int, length: int):
        self.models = models
        self.caches = {name: model.new_cache(batch, length) for name, model in models.items()}
        self.h = {}

    def read(self, idx: Tensor) -> None:
        """What follows in each row, (b, t)."""
        self.h = {name: model(idx, cache=self.caches[name])[:, -1]
                  for name, model in self.models.items()}

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows alone, in this order."""
        for cache in self.caches.values():
            cache.keep(rows)
        self.h = {name: h[rows] for name, h in self.h.items()}


class Swarm:
    """K particles of each of some prompts: B = P K rows, at one position together.

    Those that have ended are carried along; `rows` (b,) has the others, which the models read.
    """

    def __init__(self, target: Target, prompts: list[list[int]], K: int, proposal: str,
                 twist: Twist | None):
        config, self.device = target.stage.config, target.stage.runtime.device
        self.target, self.K, self.proposal, self.twist = target, K, proposal, twist
        self.stop = target.stage.tokenizer.special("<|endoftext|>")
        repeated, self.steps = [p for p in prompts for _ in range(K)], config.max_new_tokens
        idx, n_prompt = pack_prompts(repeated, target.stage.ref.config, self.steps)
        idx = F.pad(idx, (0, 1 + config.max_prompt + self.steps - idx.shape[1]))
        B, T = idx.shape
        text = (idx, torch.zeros(B, T - 1, dtype=torch.bool), torch.zeros(B, T - 1), n_prompt,
                torch.zeros(B, dtype=torch.bool))
        self.text = Rollout(*(x.to(self.device) for x in text))
        self.rows = torch.arange(B, device=self.device)
        self.score = torch.zeros(B, device=self.device)
        self.logw, self.log_psi = torch.zeros(2, B, dtype=torch.float64, device=self.device)
        self.log_z = torch.zeros(len(prompts), dtype=torch.float64, device=self.device)

    def run(self, u: Tensor, points: Tensor, threshold: float) -> None:
        """Grows all texts to their ends: u (B, steps) of tokens, points (P, steps, K)."""
        u, points = u.to(self.device), points.to(self.device)
        with self.target.stage.runtime.autocast():
            readers = self.readers = Readers(self._models(), *self.text.idx.shape)
        first = self.text.n_prompt
        begin, prompts = int(first.min()), torch.arange(len(self.log_z), device=self.device)
        with torch.autocast(self.device.type, enabled=False):
            readers.read(self.text.idx[:, :begin])
            for t in range(begin, self.text.idx.shape[1]):
                self._extend(t, u[self.rows, (t - first[self.rows]).clamp(0, self.steps - 1)])
                if not self._thin(t + 1):
                    return
                readers.read(self.text.idx[self.rows, t : t + 1])
                self._weigh(t + 1)
                new = (t + 1 - first[:: self.K]).clamp(0, self.steps - 1)
                self._resample(t + 1, points[prompts, new], threshold)
                if not len(self.rows):  # only particles that have ended were drawn
                    return

    def _models(self) -> dict:
        """Those whose states are needed, in the dtype in which texts are sampled."""
        policy, models = self.target.policy, {"ref": cast_once(self.target.stage.ref, self.device)}
        own = self.twist is None and policy.config.critic_layers
        if self.proposal == "policy" or (self.twist is None and not own):
            models["policy"] = cast_once(policy, self.device)
        if own:
            models["critic"] = cast_once(policy.critic, self.device)
        return models

    def _going(self, t: int) -> Tensor:
        """(B,) True where a text of t tokens is not at its end."""
        return ~self.text.stopped & (t < self.text.n_prompt + self.steps)

    def _extend(self, t: int, u: Tensor) -> None:
        """The token at place t of each row, at its u (b,): the prompt's own, or one from q."""
        text, rows, T = self.text, self.rows, self.target.stage.config.temperature
        alive = (t >= text.n_prompt[rows]) & self._going(t)[rows]
        models, h = self.readers.models, self.readers.h
        token, logq = sample(models[self.proposal].logits(h[self.proposal]), u, temperature=T)
        token = torch.where(alive, token, text.idx[rows, t])
        text.idx[rows, t], text.mask[rows, t - 1], text.logp[rows, t - 1] = (
            token, alive, logq * alive)
        text.stopped[rows] = text.stopped[rows] | (alive & (token == self.stop))
        if self.proposal != "ref":
            logp = (models["ref"].logits(h["ref"]) / T).log_softmax(-1).gather(1, token[:, None])
            self.logw[rows] += (logp[:, 0].double() - logq.double()) * alive
        self._finish(rows[alive & ~self._going(t + 1)[rows]])

    def _finish(self, rows: Tensor) -> None:
        """psi = exp(score / beta) for texts that end here."""
        if not len(rows):
            return
        stage = self.target.stage
        score = ppo.score_rollouts(stage.reward, rows_of(self.text, rows), stage.tokenizer,
                                   replace(stage.runtime, rank=0, world=1))
        self.score[rows] = score
        self.logw[rows] += score.double() / self.target.beta - self.log_psi[rows]

    def _thin(self, t: int) -> bool:
        """Lets texts that have ended out of the batch, when they are a quarter; False: all have."""
        at = self._going(t)[self.rows].nonzero()[:, 0]
        if 0 < len(at) <= 0.75 * len(self.rows):
            self.rows = self.rows[at]
            self.readers.keep(at)
        return len(at) > 0

    def _weigh(self, t: int) -> None:
        """The twist of prefixes of t tokens, in the place of the one before."""
        at = (self._going(t) & (t > self.text.n_prompt))[self.rows]
        rows = self.rows[at]
        if not len(rows):
            return
        if self.twist is not None:
            log_psi = self.twist(self.text.idx[rows, :t])
        else:
            h = self.readers.h["critic" if "critic" in self.readers.h else "policy"]
            log_psi = self.target.policy.value(h[at]).float()[:, 0].double() / self.target.beta
        if log_psi.shape != rows.shape or not log_psi.isfinite().all():
            raise UserError(f"the twist gave shape {tuple(log_psi.shape)} for {len(rows)} prefixes,"
                            f" or numbers that are not finite: give one finite log psi for each")
        self.logw[rows] += log_psi - self.log_psi[rows]
        self.log_psi[rows] = log_psi.double()

    def _resample(self, t: int, points: Tensor, threshold: float) -> None:
        """Particles (P, K) of a low ESS are drawn anew at points (P, K) of the CDF of w."""
        logw, going, K = self.logw.view(-1, self.K), self._going(t), self.K
        low = (effective_sample_size(logw) < threshold * K) & going.view(-1, K).any(1)
        if not low.any():
            return
        parent = torch.arange(len(going), device=self.device).view(-1, K)
        parent[low] = pick(logw[low], points[low]) + parent[low, :1]
        self.log_z[low] += log_mean_exp(logw[low])
        logw[low] = 0
        parent, place = parent.flatten(), self.rows.new_empty(len(going))
        place[self.rows] = torch.arange(len(self.rows), device=self.device)
        self.text = rows_of(self.text, parent)
        self.score, self.log_psi = self.score[parent], self.log_psi[parent]
        self.rows = going[parent].nonzero()[:, 0]
        self.readers.keep(place[parent[self.rows]])
