"""A run that answers: the prior's word on a prompt, and the posterior's by policy or sampler.

    sampler     answer                                        its KL to the reference
    ref         the reference's, token by token               0
    policy      the policy's, token by token                  exact, summed over the answer's steps
    best-of-n   the best of n of the reference's              at most log n - (n - 1) / n
    sir         one of n, in proportion to its weight         about r / beta - log Z, the answer's
    mh          a chain's state after n steps                 own log pi*(y) / ref(y), with Z by
    smc         one of n particles, steered by a twist        the mean of the weights

Prior and policy draw at the same random numbers, so that they differ where the policy has learnt
something. All is a function of seed, turn and prompt. Left out: top-k and top-p, which no
posterior has.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from nanokl import UserError, checkpoint, one_line, ppo, samplers
from nanokl import runtime as rt
from nanokl.evaluation import Stage
from nanokl.gpt import GPT
from nanokl.hf_tokenizer import load_tokenizer
from nanokl.posterior import open_run, shaped_twist
from nanokl.reward import RewardFunction, load_reward
from nanokl.samplers import Draws, Target
from nanokl.smc import smc
from nanokl.stream import one_row, stream

SAMPLERS = ("policy", "ref", "best-of-n", "sir", "mh", "smc")
STREAMED = ("policy", "ref")
TILTED = ("sir", "mh", "smc")  # they heed beta
LEAST = 4  # tokens that there must be room for before an answer
NEW_TOKENS = 40  # of an answer, where no run says how many
COLDEST = 1e-3  # temperature: colder, and logits over it have no float32


@dataclass
class Answers:
    """Who answers, at which price and temperature; `stage.ref` or `policy` may be None."""

    stage: Stage
    policy: GPT | None
    sampler: str
    n: int = 64  # of best-of-n, proposals, particles, steps
    beta: float | None = None  # price of a nat
    seed: int = 0
    critic: bool = False  # PPO has taught the policy's value head

    def __post_init__(self):
        """UserError for a sampler that lacks what it needs."""
        if self.sampler not in SAMPLERS:
            raise UserError(f"sampler is {self.sampler!r}: give one of {', '.join(SAMPLERS)}")
        if self.n < 1:
            raise UserError(f"n is {self.n}: give at least 1")
        if self.sampler == "policy" and self.policy is None:
            raise UserError("with --reward this run is the reference, and there is no policy: give "
                            f"--sampler {', '.join(SAMPLERS[1:])}, or leave out --reward")
        if self.sampler not in STREAMED and self.policy and self.stage.ref and (
                self.stage.reward is None):
            raise UserError(f"--sampler {self.sampler} needs a reward, and this run was paid by an "
                            "environment: give --reward (a reward run or FILE.py:FUNCTION)")
        if self.sampler != "policy" and self.stage.ref is None:
            raise UserError(f"--sampler {self.sampler} needs a reference and a reward: give a run "
                            "of train_rlhf.py ppo, or --reward (a reward run or FILE.py:FUNCTION) "
                            "and --beta, and this run is the reference")
        if self.sampler in TILTED and not self.beta:
            raise UserError(f"--sampler {self.sampler} and beta {self.beta}: give --beta, the "
                            "price of a nat, above 0")

    @property
    def names(self) -> list[str]:
        """Who answers each prompt, in turn; the last one's word counts."""
        alone = self.sampler == "ref" or self.stage.ref is None
        return [self.sampler] if alone else ["ref", self.sampler]

    @property
    def room(self) -> int:
        """Tokens that a prompt may have."""
        model = self.policy if self.stage.ref is None else self.stage.ref
        return model.config.block_size - self.stage.config.max_new_tokens

    @property
    def stop(self) -> int:
        return self.stage.tokenizer.special("<|endoftext|>")

    def at(self, *, beta: float | None = None, temperature: float | None = None) -> "Answers":
        """The same at another price or temperature, of sampling and of every log-prob."""
        positive("beta", beta)
        positive("temperature", temperature, COLDEST)
        if beta is not None:
            return replace(self, beta=beta)
        config = replace(self.stage.config, temperature=temperature)
        return replace(self, stage=replace(self.stage, config=config))

    def stream(self, name: str, prompt: list[int], turn: int) -> Iterator[int]:
        """The tokens of `ref` or `policy`, `stop` included."""
        config, rng = self.stage.config, rt.generator(self.seed, "chat", turn)
        u = torch.rand(1, config.max_new_tokens, generator=rng)[0]
        model = self.policy if name == "policy" else self.stage.ref
        with self.stage.runtime.autocast():
            return stream(model, prompt, u, stop=self.stop, temperature=config.temperature)

    def _stage(self, prompt: list[int]) -> Stage:
        """The stage of one prompt: rollouts are as wide as max_prompt says."""
        return replace(self.stage, config=replace(self.stage.config, max_prompt=len(prompt) - 1))

    def draw(self, prompt: list[int], turn: int) -> Draws:
        """One text by a sampler of whole texts."""
        stage, rng = self._stage(prompt), rt.generator(self.seed, "chat", turn, self.sampler)
        target = Target(stage, self.beta if self.sampler in TILTED else 1.0, self.policy)
        asked, proposal = (target, [prompt], 1, rng), "mixture" if self.policy else "ref"
        if self.sampler == "best-of-n":
            return samplers.best_of_n(*asked, best_of=self.n)
        if self.sampler == "sir":
            return samplers.sir(*asked, m=self.n, proposal=proposal)
        if self.sampler == "mh":
            return samplers.imh(*asked, steps=self.n, proposal=proposal)
        twist = shaped_twist(stage, self.policy, self.beta) if self.critic else (
            guess_twist(stage, self.beta))
        return smc(*asked, particles=self.n, twist=twist)

    def judge(self, name: str, prompt: list[int], response: list[int]) -> str:
        """Reward and KL of a streamed answer, in words, as far as there are any."""
        if self.stage.ref is None or not response:
            return ""
        stage, kl, reward = self._stage(prompt), 0.0, ""
        rollout = one_row(prompt, response, self.stop, stage.runtime.device)
        if stage.reward is not None:  # else the environment has paid
            score = ppo.score_rollouts(stage.reward, rollout, stage.tokenizer, stage.runtime)
            reward = f"reward {score.item():+.2f}  "
        if name == "policy":
            rows = [torch.zeros(1, dtype=torch.int64, device=rollout.idx.device)]
            measured = ppo.measure(self.policy, stage.ref, rollout, rows, stage.config,
                                   stage.runtime)
            kl = max(measured[2].sum().item(), 0.0)  # of equal laws it is a rounding error
        return f"{reward}KL {kl:.2f} nats"

    def tell(self, draws: Draws) -> str:
        """Reward and KL of a chosen text, and among how many it was chosen."""
        score, n = draws.score.item(), int(draws.proposals)
        if self.sampler == "best-of-n":
            most = math.log(self.n) - (self.n - 1) / self.n
            return f"reward {score:+.2f}  KL at most {most:.2f} nats  best of {n}"
        kl = score / self.beta - draws.log_z.item()
        how = (f"accepted {draws.accepted.item():.2f} of {self.n} steps" if draws.ess is None else
               f"one of {n}, ESS {draws.ess.item():.1f}")
        return f"reward {score:+.2f}  KL about {kl:.2f} nats  {how}"


# psi(s) = exp(guess(s) / beta), the reward's own guess of a text that is not done
def guess_twist(stage: Stage, beta: float):
    """A twist for smc where no critic was trained; any would do, a better one needs fewer."""
    def twist(idx: Tensor) -> Tensor:
        guess = ppo.score_ids(stage.guess, idx.tolist(), stage.tokenizer)
        return guess.to(idx.device).double() / beta

    return twist


def guarded(reward: RewardFunction) -> RewardFunction:
    """The same, where a failure is the user's one line and no end of the conversation."""
    def guard(ids, texts):
        try:
            return reward(ids, texts)
        except UserError:
            raise
        except Exception as e:  # whatever the user's own code raises
            reason = one_line(e)
            raise UserError(f"the reward failed ({reason}): mend it, or ask otherwise") from e

    return guard


def positive(name: str, x: float | None, least: float = 0.0) -> None:
    """UserError for a number that is given and not above 0, below `least`, or has no end."""
    if x is not None and not (0 < x < math.inf and x >= least):
        raise UserError(f"{name} is {x}: give " + (f"{least:g} or more" if least else
                                                   "a number above 0"))


def _of_ppo(run: Path) -> bool:
    """Whether the folder says that it is a run of train_rlhf.py ppo."""
    try:
        return {"policy", "reward"} <= json.loads((run / "flags.json").read_bytes()).keys()
    except (OSError, ValueError, AttributeError):
        return False


def _trained(run: Path, device: str) -> tuple[Stage, GPT, float, bool]:
    """Of a run of ppo: stage, policy, beta, and whether there is a critic."""
    stage, policy, _, beta = open_run(run, device)
    critic = stage.config.method == "ppo"
    stage.config = ppo.PPOConfig(**{key: getattr(stage.config, key) for key in (
        "max_new_tokens", "temperature", "shaping")})
    return stage, policy, beta, critic


def _untrained(run: Path, device: str, *, alone: bool) -> tuple[Stage, GPT | None, None, bool]:
    """Of any GPT: it is the policy where it is `alone`, else the reference."""
    runtime, folder = rt.setup(device, "float32"), checkpoint.resolve(run)
    model = GPT.from_pretrained(folder, dropout=0.0).to(runtime.device).eval()
    model.requires_grad_(False)
    ref, policy = (None, model) if alone else (model, None)
    config = ppo.PPOConfig(max_new_tokens=NEW_TOKENS)
    return Stage(config, runtime, load_tokenizer(folder), ref, None, 0), policy, None, False


def open_answers(run: Path, *, sampler: str = "policy", reward: str | None = None,
                 beta: float | None = None, n: int = 64, temperature: float | None = None,
                 max_new_tokens: int | None = None, seed: int = 0,
                 device: str = "auto") -> Answers:
    """A run of train_rlhf.py ppo, or any GPT, alone or, with a reward, as the reference.

    What is None is the run's own. UserError where sampler, reward and run do not go together.
    """
    sampling = {"temperature": temperature, "max_new_tokens": max_new_tokens}
    for name, x in {"beta": beta, **sampling}.items():
        positive(name, x, COLDEST * (name == "temperature"))
    stage, policy, its_beta, critic = (_trained(run, device) if _of_ppo(run) else
                                       _untrained(run, device, alone=reward is None))
    if reward is not None:
        stage.reward, stage.guess = load_reward(reward, stage.runtime)
    if stage.reward is not None:
        stage.reward, stage.guess = guarded(stage.reward), guarded(stage.guess)
    given = {key: x for key, x in sampling.items() if x is not None}
    stage.config = replace(stage.config, **given)
    answers = Answers(stage, policy, sampler, n, its_beta if beta is None else beta, seed, critic)
    if answers.room < LEAST:
        new = stage.config.max_new_tokens
        raise UserError(f"max_new_tokens is {new}: give at most {answers.room + new - LEAST}, "
                        f"so that the prompt has {LEAST} tokens of the context")
    return answers
