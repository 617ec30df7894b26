"""Dialogues as an environment: gymnasium's `reset` and `step`, without depending on it.

An observation is what was said so far, a tuple of {"role", "content"}; an action is the agent's
whole reply. All chance is in `reset(seed=...)`: what the user will ask and how, and each of its
answers follows from the seed and the agent's words, so that a dialogue is a text of one prompt and
the posterior of RLHF is defined for it (with chance in between, its formula would be optimistic).
`terminated`: the user has what it wanted, or no more to say; `truncated`: it would have gone on.
`train_rlhf.py ppo --env nanokl/dialogue.py:arithmetic` trains in one: a function like `arithmetic`
and `open_chat` here makes it. Left out: rendering, spaces.
"""

import copy
import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanokl import UserError
from nanokl.chat import Conversation, load_conversations, spell

Message = dict[str, str]  # {"role": "user" or "assistant", "content": text}
Score = Callable[[list[str]], list[float]]  # of whole texts
SPLITS = {"train": (0.0, 0.85), "val": (0.85, 0.9), "test": (0.9, 1.0)}  # of all pairs of numbers


class Step(NamedTuple):
    """What gymnasium's step returns."""

    obs: tuple[Message, ...]
    reward: float
    terminated: bool
    truncated: bool
    info: dict


class Words(NamedTuple):
    """What a user says in one language."""

    questions: tuple[str, ...]
    again: str
    thanks: str


WORDS = {
    "en": Words(("How do I add two numbers: {a} and {b}?", "What is {a} plus {b}?", "{a} + {b} = ?",
                 "Please add {a} and {b}."), "No, try again.", "Thank you."),
    "zh": Words(("如何计算两个数的和:{a}和{b}?", "{a}加{b}等于多少?", "{a} + {b} = ?",
                 "请把{a}和{b}加起来。"), "不对,再试一次。", "谢谢。"),
}  # fmt: skip


def split_of(a: int, b: int) -> str:
    """The split of a pair of numbers, whichever comes first: a hash decides."""
    digest = blake2b(f"{min(a, b)}+{max(a, b)}".encode(), digest_size=8).digest()
    share = int.from_bytes(digest, "big") / 2**64
    return next(name for name, (low, high) in SPLITS.items() if low <= share < high)


def numbers(text: str) -> list[int | None]:
    """The numbers in a text, None for one that is no whole number of at most 19 digits."""
    found = re.findall(r"(?<!\d)-?\d+(?:\.\d+)?", unicodedata.normalize("NFKC", text))
    return [int(x) if "." not in x and len(x) < 20 else None for x in found]


def last_number(text: str) -> int | None:
    """The number that a text ends on, which is its answer; None where there is none."""
    return (numbers(text) or [None])[-1]


def right(ids: list[list[int]], texts: list[str]) -> list[float]:
    """A reward function: 1 where a reply ends on the sum of the two numbers in the question.

    What follows the last <|assistant|> is the reply; the question is the last thing before it that
    the user says with two numbers. A reply that brings an <|assistant|> of its own, to ask itself
    something easier, gets 0: each reply before the last has its end in the ids, and the text its
    start.
    """
    scores = []
    for row, text in zip(ids, texts, strict=True):
        before, _, reply = text.rpartition("<|assistant|>")
        lines = [numbers(x.partition("<|assistant|>")[0]) for x in before.split("<|user|>")[1:]]
        asked = next((x[-2:] for x in reversed(lines) if len(x) > 1), [None])
        fair = text.count("<|assistant|>") <= (row[:-1].count(row[0]) if row else 0)
        scores.append(float(fair and None not in asked and last_number(reply) == sum(asked)))
    return scores


@dataclass
class Arithmetic:
    """A user asks for the sum of two numbers, and says whether the reply is right.

    Reward 1 for the right number at the end of a reply, which ends the dialogue, else 0 and another
    try, up to `turns` replies in all. The pairs of a split are in no other.
    """

    split: str = "train"
    languages: tuple[str, ...] = ("en", "zh")
    highest: int = 299  # of both numbers; the lowest is 0
    turns: int = 1
    messages: list[Message] = field(default_factory=list, repr=False)
    wanted: int | None = field(default=None, repr=False)  # None: no dialogue has begun, or goes on

    def __post_init__(self):
        unknown = set(self.languages) - WORDS.keys()
        if self.split not in SPLITS or unknown or not self.languages:
            raise UserError(f"split is {self.split!r}, languages {self.languages}: give one of "
                            f"{', '.join(SPLITS)}, and some of {', '.join(WORDS)}")
        if self.highest < 9 or self.turns < 1:
            raise UserError(f"highest is {self.highest} and turns {self.turns}: give at least 9 "
                            "and 1")

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """The question of this seed, or of options a, b, language, question; (obs, info)."""
        rng, given = np.random.default_rng(seed), options or {}
        a, b = (int(x) for x in rng.integers(self.highest + 1, size=2))
        while split_of(a, b) != self.split:
            a, b = (int(x) for x in rng.integers(self.highest + 1, size=2))
        a, b = given.get("a", a), given.get("b", b)
        if not all(type(x) is int and x >= 0 for x in (a, b)):
            raise UserError(f"a is {a!r} and b {b!r}: give whole numbers from 0 on")
        language = given.get("language", self.languages[int(rng.integers(len(self.languages)))])
        if language not in tuple(WORDS):
            raise UserError(f"language is {language!r}: give one of {', '.join(WORDS)}")
        self.words = WORDS[language]
        question = given.get("question", int(rng.integers(len(self.words.questions))))
        if type(question) is not int or question not in range(len(self.words.questions)):
            raise UserError(f"question is {question!r}: give 0 to {len(self.words.questions) - 1}")
        self.messages = [_say("user", self.words.questions[question].format(a=a, b=b))]
        self.wanted = a + b
        info = {"a": a, "b": b, "language": language, "model_reply": f"{a} + {b} = {a + b}"}
        return tuple(self.messages), info

    def step(self, action: str) -> Step:
        """The user's answer to a reply."""
        if self.wanted is None:
            raise UserError("this dialogue has not begun, or is over: call reset")
        right = last_number(action) == self.wanted
        replies = sum(m["role"] == "assistant" for m in self.messages) + 1
        self.messages += [_say("assistant", action),
                          _say("user", self.words.thanks if right else self.words.again)]
        info, truncated = {"wanted": self.wanted}, not right and replies >= self.turns
        if right or truncated:
            self.wanted = None
        return Step(tuple(self.messages), float(right), right, truncated, info)


@dataclass
class OpenChat:
    """A user who says the lines of a recorded conversation one by one, whatever it is answered.

    A reply's reward is what it adds to the score of the talk so far, which `score` gives to texts
    as `chat.spell` writes them: all together it is the last score less that of the first line.
    """

    talks: list[Conversation]
    score: Score
    turns: int = 2  # replies, at most
    messages: list[Message] = field(default_factory=list, repr=False)
    lines: list[str] = field(default_factory=list, repr=False)  # what the user has yet to say
    worth: float | None = field(default=None, repr=False)  # score of the talk so far, once asked
    replies: int = field(default=0, repr=False)

    def __post_init__(self):
        self.talks = [talk for talk in self.talks if talk.messages[0]["role"] == "user"]
        if not self.talks or self.turns < 1:
            raise UserError(f"{len(self.talks)} conversations begin with a user, and turns is "
                            f"{self.turns}: give at least 1 of either")

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """The first line of this seed's conversation, or of that of the number options["talk"]."""
        drawn = int(np.random.default_rng(seed).integers(len(self.talks)))
        number = (options or {}).get("talk", drawn)
        if number not in range(len(self.talks)):
            raise UserError(f"talk is {number!r}: give 0 to {len(self.talks) - 1}")
        talk = self.talks[number]
        self.lines = [m["content"] for m in talk.messages if m["role"] == "user"]
        self.messages = [_say("user", self.lines[0])]
        self.lines, self.worth, self.replies = self.lines[1:], None, 0
        return tuple(self.messages), {"id": talk.id}

    def __deepcopy__(self, memo) -> "OpenChat":
        return copy.copy(self)  # the talks are large, and nothing changes them

    def step(self, action: str) -> Step:
        """The user's next line, which the reply has no influence on."""
        return self.steps([self], [action])[0]

    @staticmethod
    def steps(envs: "Sequence[OpenChat]", actions: Sequence[str]) -> list[Step]:
        """`step` of many dialogues at once, whose texts are scored together."""
        if not all(env.messages and env.messages[-1]["role"] == "user" for env in envs):
            raise UserError("this dialogue has not begun, or is over: call reset")
        begun = [env for env in envs if env.worth is None]
        texts = [spell(env.messages) for env in begun]
        for env, action in zip(envs, actions, strict=True):
            env.messages = [*env.messages, _say("assistant", action)]  # obs of before stay
        scores = [float(x) for x in envs[0].score(texts + [spell(env.messages) for env in envs])]
        for env, worth in zip(begun, scores[: len(begun)], strict=True):
            env.worth = worth
        return [env._hear(worth) for env, worth in zip(envs, scores[len(begun) :], strict=True)]

    def _hear(self, worth: float) -> Step:
        reward, self.worth, self.replies = worth - self.worth, worth, self.replies + 1
        terminated = not self.lines
        truncated = not terminated and self.replies >= self.turns
        if not terminated and not truncated:
            self.messages.append(_say("user", self.lines[0]))
            self.lines = self.lines[1:]
        return Step(tuple(self.messages), reward, terminated, truncated, {})


def _say(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def arithmetic(*, split: str, turns: int, data: Path, score: Score | None) -> Arithmetic:
    """For --env: sums as large as in the data folder, whose reward is the environment's own."""
    meta = data / "meta.json"
    settings = json.loads(meta.read_bytes())["settings"] if meta.is_file() else {}
    return Arithmetic(split, turns=turns, highest=settings.get("highest", Arithmetic.highest))


def open_chat(*, split: str, turns: int, data: Path, score: Score | None) -> OpenChat:
    """For --env: the conversations of a data folder, paid by the --reward."""
    if score is None:
        raise UserError("open_chat is paid by a reward model, and none is given: give --reward")
    return OpenChat(load_conversations(data, split), score, turns)
