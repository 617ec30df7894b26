"""Where a policy stands between prior and posterior: its texts and the reference's, weighed.

    halves -> bayes.account -> frontier.py         for the run's own prompts, reward and beta

`python -m nanokl posterior RUN` and the evaluations of train_rlhf.py ppo both come here. The
estimators are in bayes.py; models, prompts and files are here. Left out: several prices at once
for one policy (its J belongs to the beta that it was trained at).
"""

import json
import math
from dataclasses import fields
from pathlib import Path

import torch

from nanokl import UserError, bayes, checkpoint, frontier
from nanokl import runtime as rt
from nanokl.evaluation import Stage, load_gpt, prompt_docs
from nanokl.gpt import GPT
from nanokl.reward import load_reward
from nanokl.samplers import draw_texts, log_probs
from nanokl.tokenizer import Tokenizer
from nanokl.trainers import TrainerConfig

SETS = 64  # sets of proposals that stand for all of them in SIR's law


class Ruler:
    """K texts of the reference for each of some prompts, kept: any number of policies to measure.

    Costs 2 P K texts sampled and scored (P prompts) and 3 P K read, and for each further policy
    P K sampled and scored and 3 P K read. Everything is a function of (seed, P, K).
    """

    def __init__(self, stage: Stage, docs: list[list[int]], *, prompts: int, samples: int):
        self.stage, self.samples = stage, samples
        self.prompts = stage.prompts(docs, prompts, rt.generator(stage.seed, "posterior prompts"))
        self.texts, self.score = self._draw(stage.ref, "reference")
        self.logp_ref = self._log_probs(stage.ref, self.texts)

    def _draw(self, model: GPT, who: str):
        rng = rt.generator(self.stage.seed, "posterior", who)
        return draw_texts(self.stage, model, self.prompts, self.samples, rng)

    def _log_probs(self, model: GPT, texts) -> torch.Tensor:
        return log_probs(model, texts, self.stage.config, self.stage.runtime)

    def halves(self, policy: GPT) -> tuple[bayes.Texts, bayes.Texts]:
        """The reference's texts and the policy's own, (P, K) each.

        The policy's KL is estimated by k1 of each text: then r / beta - KL is the text's log
        weight, which is nearly constant for a policy near pi*, so that its mean has little noise.
        """
        texts, score = self._draw(policy, "policy")
        logp, logp_ref = self._log_probs(policy, texts), self._log_probs(self.stage.ref, texts)
        mine = score, logp, logp_ref, logp - logp_ref
        theirs = self.score, self._log_probs(policy, self.texts), self.logp_ref
        shape = (len(self.prompts), self.samples)
        return tuple(bayes.Texts(*(x.view(shape) for x in half)) for half in (theirs, mine))

    def account(self, policy: GPT, beta: float) -> bayes.Account:
        """How far the policy is from the posterior at the price beta."""
        return bayes.account(*self.halves(policy), beta=beta)


def frontier_points(ref: bayes.Texts, policy: bayes.Texts) -> list[dict]:
    """R*(k) from both halves, each price where it is trusted, and the first where it is not."""
    score, logp, logp_ref = (torch.cat([getattr(x, k) for x in (ref, policy)], 1)
                             for k in ("score", "logp", "logp_ref"))
    log_q = logp_ref - bayes.mixture(logp_ref, logp)
    return frontier.frontier(score, log_q, frontier.prices())


def untrained(ref: bayes.Texts, beta: float, *, seed: int) -> list[dict]:
    """What best-of-n, SIR and Metropolis-Hastings reach at equal numbers of reference samples."""
    rows, r = [], ref.score
    for n in (4, 16, 64, 256):
        if n > r.shape[1] // 4:
            break  # the law of the best of n is not to be had from so few
        laws = {"best-of-n": frontier.best_of_n(r, n)}
        if beta > 0:
            laws["SIR"] = frontier.sir(r, beta, n, rng=rt.generator(seed, "sir", n), n_sets=SETS)
            laws["Metropolis"] = frontier.metropolis(r, beta, n - 1)
        rows += [{"sampler": name, "n": n, "kl_nats": kl.mean().item(),
                  "reward_mean": reward.mean().item(),
                  "objective": (reward - beta * kl).mean().item()}
                 for name, (kl, reward) in laws.items()]
    return rows


def whole_account(ruler: Ruler, policy: GPT, beta: float) -> tuple[bayes.Account, dict]:
    """The account, and its summary with the frontier and what needs no training."""
    ref, own = ruler.halves(policy)
    account = bayes.account(ref, own, beta=beta)
    return account, {**account.summary(), "frontier": frontier_points(ref, own),
                     "untrained": untrained(ref, beta, seed=ruler.stage.seed)}
