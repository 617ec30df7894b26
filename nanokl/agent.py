"""A language model as the agent of dialogues: a reply at a time, or whole batches for training.

`Agent.select_action` answers an observation of dialogue.py's environments. `play` is the same for
many dialogues at once, token by token, as PPO wants them: what the model says is True in the mask,
what the user says is not, and so is in no loss, no KL and no value. What improves the agent is
train_rlhf.py ppo --env. Left out: tools, several agents.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nanokl import UserError, checkpoint, one_line
from nanokl.chat import TURNS, encode_turn, prompt, reply_text, require_turns
from nanokl.dialogue import Message
from nanokl.generate import generate
from nanokl.gpt import GPT
from nanokl.hf_tokenizer import load_tokenizer
from nanokl.ppo import PPOConfig
from nanokl.rollout import Rollout, gather
from nanokl.runtime import generator
from nanokl.tokenizer import Tokenizer


@dataclass
class Agent:
    """A GPT that has seen turns (train_rlhf.py sft, or ppo on top of it)."""

    model: GPT
    tokenizer: Tokenizer
    max_new_tokens: int = 24  # longest reply
    temperature: float = 1.0  # 0 takes the likeliest token
    rng: torch.Generator = field(default_factory=lambda: generator(0, "agent"))

    @classmethod
    def load(cls, run: Path | str, **given) -> "Agent":
        """Of a run or checkpoint folder."""
        folder = checkpoint.resolve(Path(run))
        return cls(GPT.from_pretrained(folder, dropout=0.0).eval(), load_tokenizer(folder), **given)

    def select_action(self, obs: Sequence[Message]) -> str:
        """A reply to what was said so far, the oldest turns left out where there is no room."""
        room = self.model.config.block_size - self.max_new_tokens
        ids, _ = prompt(self.tokenizer, obs, room)
        stop = self.tokenizer.special("<|endoftext|>")
        reply = generate(self.model, [ids], self.max_new_tokens, temperature=self.temperature,
                         stop=stop, rng=self.rng).responses()[0]
        return reply_text(self.tokenizer, reply)


class Opening(list):
    """Token ids of what a user says first; with its environment and seed, all it will ever say."""

    def __init__(self, ids: Sequence[int], env, seed: int):
        super().__init__(ids)
        self.env, self.seed = env, seed


def openings(env, tokenizer: Tokenizer, n: int) -> list[Opening]:
    """The first n seeds' dialogues of an environment, up to where the model is to speak."""
    require_turns(tokenizer, "the policy's tokenizer")
    return [Opening(prompt(tokenizer, env.reset(seed=seed)[0], 1 << 20)[0], env, seed)
            for seed in range(n)]


class Talk:
    """One dialogue under way: ids (t,), and for each step of t - 1 what a Rollout has."""

    def __init__(self, opening: Opening, config: PPOConfig, tokenizer: Tokenizer):
        self.config, self.tokenizer = config, tokenizer
        self.env = copy.deepcopy(opening.env)
        obs, _ = self.env.reset(seed=opening.seed)
        if prompt(tokenizer, obs, 1 << 20)[0] != list(opening):
            raise UserError(f"{_name(self.env)} says something else at each reset(seed="
                            f"{opening.seed}): draw all chance from the seed")
        self.ids, self.n_prompt, self.stopped = list(opening), len(opening), False
        self.steps = [(False, 0.0, 0.0)] * (len(opening) - 1)  # mask, logp, paid

    def reply(self, ids: list[int], logp: list[float], stopped: bool, reward: float,
              line: str | None) -> bool:
        """What the model says, and what it hears; whether it is to speak again.

        A user's line of more than max_prompt tokens ends the dialogue, for which there is no room.
        """
        self.ids, self.stopped = self.ids + ids, stopped
        self.steps += [(True, x, 0.0) for x in logp]
        self.steps[-1] = (True, logp[-1], reward)
        if line is None:
            return False
        end = self.tokenizer.special("<|endoftext|>")
        answer = [*([] if stopped else [end]), *encode_turn(self.tokenizer, "user", line),
                  self.tokenizer.special(TURNS["assistant"])]
        if len(answer) > self.config.max_prompt:
            return False
        self.ids = self.ids + answer
        self.steps += [(False, 0.0, 0.0)] * len(answer)
        return True


def hear(talks: Sequence[Talk], replies: Sequence[list[int]]) -> list[tuple[float, str | None]]:
    """The reward of each talk's reply (token ids), and what its user says next, if anything.

    An environment's class may have `steps(envs, actions)`, `step` of many of its dialogues at once,
    which is called in its place. UserError for steps that break their word.
    """
    env, tokenizer = talks[0].env, talks[0].tokenizer
    said = [reply_text(tokenizer, ids) for ids in replies]
    try:
        if hasattr(type(env), "steps"):
            steps = type(env).steps([talk.env for talk in talks], said)
        else:
            steps = [talk.env.step(reply) for talk, reply in zip(talks, said, strict=True)]
        heard = []
        for obs, reward, terminated, truncated, _ in steps:
            last = None if terminated or truncated else obs[-1]
            heard.append((float(reward), last and last["role"], last and str(last["content"])))
    except UserError:
        raise
    except Exception as e:  # whatever the user's own code raises
        reason = one_line(e)
        raise UserError(f"{_name(env)}.step fails ({reason}): mend it") from e
    for reward, role, _ in heard:
        if not math.isfinite(reward) or role not in (None, "user"):
            raise UserError(f"{_name(env)}.step gives the reward {reward} and a last message of "
                            f"{role!r}: give a finite number, and end on what the user says")
    return [(reward, line) for reward, _, line in heard]


def _name(env) -> str:
    return type(env).__name__


@torch.no_grad()
def play(model: GPT, opened: Sequence[Opening], config: PPOConfig, runtime, tokenizer: Tokenizer, *,
         u: Tensor) -> Rollout:
    """Whole dialogues of up to config.turns replies, each rank playing its share.

    u (B, turns max_new_tokens): the uniform numbers, those of a reply side by side. `paid` (B, T-1)
    is the environment's reward for each reply, on the reply's last token.
    """
    talks = [Talk(opening, config, tokenizer) for opening in runtime.shard(opened)]
    u, M = runtime.shard(u), config.max_new_tokens
    going = list(range(len(talks)))
    for turn in range(config.turns):
        with runtime.autocast():
            said = generate(model, [talks[i].ids for i in going], M, u=u[going, turn * M :][:, :M],
                            temperature=config.temperature,
                            stop=tokenizer.special("<|endoftext|>"))
        logp = [row[mask].tolist() for row, mask in zip(said.logp, said.mask, strict=True)]
        heard = hear([talks[i] for i in going], said.responses())
        replies = zip(going, said.responses(), logp, said.stopped.tolist(), heard, strict=True)
        going = [i for i, *reply, (reward, line) in replies
                 if talks[i].reply(*reply, reward, line)]
        if not going:
            break
    return gather(_pack(talks, model.head.weight.device), config, runtime)


def _pack(talks: Sequence[Talk], device: torch.device) -> Rollout:
    """Padded on the right to the longest. A user's line that nobody answers is not the text's."""
    T = max(len(talk.ids) for talk in talks)
    idx = torch.tensor([[*talk.ids, *[0] * (T - len(talk.ids))] for talk in talks])
    steps = torch.tensor([[*talk.steps, *[(False, 0.0, 0.0)] * (T - len(talk.ids))]
                          for talk in talks])  # (B, T-1, 3)
    n_prompt = torch.tensor([talk.n_prompt for talk in talks])
    stopped = torch.tensor([talk.stopped for talk in talks])
    mask, logp, paid = steps.unbind(-1)
    return Rollout(*(x.to(device) for x in (idx, mask.bool(), logp, n_prompt, stopped, paid)))
