"""Where a policy stands between prior and posterior: its texts and the reference's, weighed.

    halves -> bayes.account -> frontier.py         for the run's own prompts, reward and beta

`python -m nanokl posterior RUN` and the evaluations of train_rlhf.py ppo both come here. The
estimators are in bayes.py; models, prompts and files are here. Left out: several prices at once
for one policy (its J belongs to the beta that it was trained at).
"""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import torch

from nanokl import UserError, bayes, checkpoint, frontier, ppo
from nanokl import runtime as rt
from nanokl.evaluation import Stage, open_stage
from nanokl.gpt import GPT
from nanokl.metrics import write_json
from nanokl.samplers import Target, draw_texts, log_probs
from nanokl.smc import smc
from nanokl.trainers import TrainerConfig

SETS = 64  # sets of proposals that stand for all of them in SIR's law


def check_samples(name: str, n: int, besides: str = "") -> None:
    """UserError for a number of texts whose eighth, an evaluation's, is not of two even halves."""
    if n < 32 or n % 32:
        raise UserError(f"{name} is {n}: give a multiple of 32{besides}")


class Ruler:
    """K texts of the reference for each of some prompts, kept: any number of policies to measure.

    2 P K texts are sampled, scored and read once, by the model that did not sample them, for the
    first of the policies; for each further one P K less are sampled and scored. A function of
    (seed, P, K).
    """

    def __init__(self, stage: Stage, docs: list[list[int]], *, prompts: int, samples: int):
        self.stage, self.samples = stage, samples
        self.prompts = stage.prompts(docs, prompts, rt.generator(stage.seed, "posterior prompts"))
        self.texts, self.score = self._draw(stage.ref, "reference")

    @classmethod
    def of(cls, stage: Stage, docs: list[list[int]], share: int = 1) -> "Ruler":
        """Of the sizes in a run's flags, with a `share`-th of the samples."""
        flags = stage.config
        return cls(stage, docs, prompts=flags.posterior_prompts,
                   samples=flags.posterior_samples // share)

    def _draw(self, model: GPT, who: str):
        rng = rt.generator(self.stage.seed, "posterior", who)
        return draw_texts(self.stage, model, self.prompts, self.samples, rng)

    def _log_probs(self, model: GPT, texts) -> torch.Tensor:
        return log_probs(model, texts, self.stage.config, self.stage.runtime).cpu()

    def halves(self, policy: GPT) -> tuple[bayes.Texts, bayes.Texts]:
        """The reference's texts and the policy's own, (P, K) each.

        The policy's KL is k1 of each text here, not the exact one of training: r / beta - KL is
        the text's log weight then, nearly constant near pi*, so that its mean has little noise.
        """
        texts, score = self._draw(policy, "policy")
        logp, logp_ref = _total(texts.logp), self._log_probs(self.stage.ref, texts)
        mine = score, logp, logp_ref, logp - logp_ref
        theirs = self.score, self._log_probs(policy, self.texts), _total(self.texts.logp)
        shape = (len(self.prompts), self.samples)
        return tuple(bayes.Texts(*(x.view(shape) for x in half)) for half in (theirs, mine))

    def account(self, policy: GPT, beta: float) -> bayes.Account:
        """How far the policy is from the posterior at the price beta."""
        return bayes.account(*self.halves(policy), beta=beta)


def _total(logp: torch.Tensor) -> torch.Tensor:
    """log p (B,) of whole responses from their tokens', in float64, which MPS has not."""
    return logp.cpu().double().sum(1)


def both(ref: bayes.Texts, policy: bayes.Texts) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (P, 2 K) of both halves' texts, and log ref - log mixture, as frontier.py wants."""
    score, logp, logp_ref = (torch.cat([getattr(x, k) for x in (ref, policy)], 1)
                             for k in ("score", "logp", "logp_ref"))
    return score, logp_ref - bayes.mixture(logp_ref, logp)


def untrained(ref: bayes.Texts, beta: float, *, seed: int) -> list[dict]:
    """What best-of-n, SIR and Metropolis-Hastings reach at equal numbers of reference samples."""
    rows, r = [], ref.score
    for n in (4, 16, 64, 256):
        if n > r.shape[1] // 4:
            break  # the law of the best of n is not to be had from so few
        laws = {"best-of-n": frontier.best_of_n(r, n)[:2]}
        if beta > 0:
            laws["SIR"] = frontier.sir(r, beta, n, rng=rt.generator(seed, "sir", n), n_sets=SETS)
            laws["Metropolis"] = frontier.metropolis(r, beta, n - 1)
        rows += [{"sampler": name, "n": n, "kl_nats": kl.mean().item(),
                  "reward_mean": reward.mean().item(),
                  "objective": (reward - beta * kl).mean().item()}
                 for name, (kl, reward) in laws.items()]
    return rows


def brief(account: bayes.Account) -> dict:
    """What an evaluation logs: the ends of gap and Bayes fraction, and whether to trust them."""
    known = account.summary()
    return {name: known.get(name) for name in (
        "gap_nats_lower", "gap_nats_upper", "bayes_fraction_lower", "bayes_fraction_upper",
        "ess_median", "trusted")}


def whole_account(ruler: Ruler, policy: GPT, beta: float) -> tuple[bayes.Account, dict]:
    """The account, and its summary with the frontier and what needs no training."""
    ref, own = ruler.halves(policy)
    account, weighed, prices = bayes.account(ref, own, beta=beta), both(ref, own), frontier.prices()
    numbers = account.summary()
    here = *weighed, numbers["kl_nats_per_sequence"]
    most, trusted = frontier.most_reward(*here, prices)
    return account, {**numbers, "most_reward_at_this_kl": most, "most_reward_trusted": trusted,
                     "best_of_n_at_this_kl": frontier.best_of_n_at(*here),
                     "frontier": frontier.frontier(*weighed, prices),
                     "untrained": untrained(ref, beta, seed=ruler.stage.seed)}


def open_run(folder: Path, device: str = "auto") -> tuple[Stage, GPT, list[list[int]], float]:
    """A finished run of train_rlhf.py ppo: its stage, policy, held-out texts, and its last beta.

    UserError where flags.json is missing or what it names is not there (paths are as in training).
    """
    path, summary = (Path(folder) / name for name in ("flags.json", "summary.json"))
    try:
        flags = json.loads(path.read_bytes())
        known = {f.name: flags[f.name] for f in fields(TrainerConfig) if f.name in flags}
        config, data = TrainerConfig(**known), Path(flags["data"])
        last = json.loads(summary.read_bytes()) if summary.exists() else {}  # of --kl_target
        beta = float(last.get("beta", flags["beta"]))
        config = SimpleNamespace(**vars(config), width=config.width, policy=Path(flags["policy"]),
                                 data=data, reward=flags["reward"], gold=None,
                                 seed=int(flags["seed"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} does not say how a policy was trained: give the folder of a run "
                        "of train_rlhf.py ppo, such as runs/demo/ppo") from None
    runtime = rt.setup(device, flags.get("dtype", "auto"))
    stage, (docs,) = open_stage(config, runtime, "val")
    policy = GPT.from_pretrained(checkpoint.resolve(folder), dropout=0.0).to(runtime.device).eval()
    return stage, policy, docs, beta


def tell(run: Path, *, prompts: int, samples: int, particles: int, device: str = "auto",
         say: Callable[[str], None] = lambda line: None) -> str:
    """The account of a finished run in words; RUN/posterior.json gets it in numbers.

    `say` is told what is being drawn: it takes minutes.
    """
    stage, policy, docs, beta = open_run(run, device)
    path = Path(run) / "posterior.json"
    say(f"drawing {samples} texts each of reference and policy for each of {prompts} prompts")
    ruler = Ruler(stage, docs, prompts=prompts, samples=samples)
    account, numbers = whole_account(ruler, policy, beta)
    write_json(path, numbers)
    # The other methods have no critic, and smc steers texts, not dialogues.
    if beta and particles and stage.config.method == "ppo" and not stage.config.env:
        say(f"{path} is written; drawing a text for each prompt by SMC of {particles} particles")
        numbers["untrained"].append(by_critic(ruler, policy, beta, particles))
        write_json(path, numbers)
    return "\n".join([*account.lines(), *_reward_lines(numbers)])


def _reward_lines(numbers: dict) -> list[str]:
    """The most reward at a KL, and what needs no training, of a whole account."""
    most, best = numbers["most_reward_at_this_kl"], numbers["best_of_n_at_this_kl"]
    most = _least(most, numbers["most_reward_trusted"])
    rows = [f"most reward     {most} at this KL, by any policy; {numbers['reward_mean']:.2f} by "
            f"this one, {_least(best['reward_mean'], best['trusted'])} by the best of "
            f"{best['n']:,.0f}", "",
            f"{'without training':18}{'n':>6}{'KL, nats':>10}{'reward':>8}{'objective':>11}"]
    rows += [f"{x['sampler']:18}{x['n']:6}{x['kl_nats']:10.2f}{x['reward_mean']:8.2f}"
             f"{x['objective']:11.2f}" for x in numbers["untrained"]]
    known = [x for x in numbers["frontier"] if x["trusted"]]
    rows += ["", f"{'most reward at a KL':24}{'KL, nats':>10}{'reward':>8}{'slope':>11}"]
    return rows + [f"{'':24}{x['kl_nats']:10.2f}{x['reward_mean']:8.2f}{x['beta']:11.2f}"
                   for x in known[:: max(1, len(known) // 10)]]


def _least(x: float, trusted: bool) -> str:
    """A number that too few texts leave too low: plain where it is trusted."""
    return f"{x:.2f}" if trusted else f">= {x:.2f} (unreliable)"


# psi(s) = exp((Phi(s) + v(s)) / beta): with shaping the critic has only the rest to learn.
def shaped_twist(stage: Stage, policy: GPT, beta: float):
    """The twist of a policy that was trained with shaping; None, the critic's own, for others."""
    if not stage.config.shaping:
        return None

    def twist(idx: torch.Tensor) -> torch.Tensor:
        score = ppo.score_ids(stage.guess, idx.tolist(), stage.tokenizer).to(idx.device)
        with stage.runtime.autocast():
            value = policy.values(idx, policy(idx))[:, -1].float()
        return (score + value).double() / beta

    return twist


# With y ~ q and Zhat from the same particles, KL(q || pi*) <= log Z - E log Zhat, hence
# J(q) / beta >= E log Zhat and KL(q || ref) <= E r / beta - E log Zhat.
def by_critic(ruler: Ruler, policy: GPT, beta: float, particles: int) -> dict:
    """A text drawn by twisted SMC: its reward, and the most that its KL and gap can be."""
    rng = rt.generator(ruler.stage.seed, "posterior", "smc")
    draws = smc(Target(ruler.stage, beta, policy), ruler.prompts, 1, rng, particles=particles,
                twist=shaped_twist(ruler.stage, policy, beta))
    reward, log_z = draws.score.mean().item(), draws.log_z.mean().item()
    return {"sampler": "SMC, at most", "n": particles, "kl_nats": reward / beta - log_z,
            "reward_mean": reward, "objective": beta * log_z}
