"""Conversations as tokens: turns between special tokens, and what of them is the assistant's.

    <|endoftext|> <|user|> How are you? <|assistant|> Fine. <|endoftext|> <|user|> Good. ...

What an assistant says ends in <|endoftext|>, which means "that is all" here as after any text. Its
words and that end are learnt and scored (`mine`); what a user says is only read. A data folder has
conversations.jsonl: a line of JSON each, with id, split and messages. Left out: system turns,
tools.
"""

import json
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from nanokl import UserError
from nanokl.tokenizer import SPECIALS, Tokenizer

ROLES = ("user", "assistant")
TURNS = {role: f"<|{role}|>" for role in ROLES}
CHAT_SPECIALS = (*SPECIALS, *TURNS.values())
FILE = "conversations.jsonl"


def clean(text: str) -> str:
    """A line as a person may type it: no control or half characters, white space as one blank."""
    kept = (" " if c.isspace() else c for c in text)
    return " ".join("".join(c for c in kept if unicodedata.category(c) not in ("Cc", "Cs")).split())


def require_turns(tokenizer: Tokenizer, whose: str) -> None:
    """UserError where a tokenizer has no special tokens for turns."""
    if missing := set(TURNS.values()) - set(tokenizer.specials):
        raise UserError(f"{whose} has no {' and no '.join(sorted(missing))}: give a model that was "
                        "trained on data/chat, data/arithmetic or another folder of conversations")


def encode_turn(tokenizer: Tokenizer, role: str, content: str) -> list[int]:
    """A turn's ids, from its special token to its end."""
    if role not in ROLES:
        raise UserError(f"a role is {role!r}: give one of {', '.join(ROLES)}")
    end = [tokenizer.special("<|endoftext|>")] if role == "assistant" else []
    words = tokenizer.encode(" " + said) if (said := content.strip()) else []
    return [tokenizer.special(TURNS[role]), *words, *end]


def spell(messages: Sequence[dict]) -> str:
    """A conversation as one text, as its ids are decoded: what reward models read."""
    return "".join(f"{TURNS[m['role']]} {m['content'].strip()}" for m in messages)


def reply_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """What a reply says: up to its end, or to a token that would begin somebody else's turn."""
    ends = {tokenizer.special(token) for token in ("<|endoftext|>", *TURNS.values())
            if token in tokenizer.specials}
    return tokenizer.decode(list(takewhile(lambda i: i not in ends, ids))).strip()


def encode(tokenizer: Tokenizer, messages: Sequence[dict]) -> tuple[list[int], list[bool]]:
    """Ids of a conversation and which of them the assistant has said, ends included."""
    ids, mine = [tokenizer.special("<|endoftext|>")], [False]
    for message in messages:
        turn = encode_turn(tokenizer, message["role"], message["content"])
        ids += turn
        mine += [False] + [message["role"] == "assistant"] * (len(turn) - 1)
    return ids, mine


def prompt(tokenizer: Tokenizer, messages: Sequence[dict], room: int) -> tuple[list[int], int]:
    """Ids after which the assistant speaks, at most `room`, and how many messages were dropped.

    The oldest turns go, so that a user's comes first; of a last turn that is too long by itself its
    beginning. UserError where there is no room for any.
    """
    start, speak = tokenizer.special("<|endoftext|>"), tokenizer.special(TURNS["assistant"])
    turns = [encode_turn(tokenizer, m["role"], m["content"]) for m in messages]
    dropped, left = 0, room - 2
    while turns and sum(map(len, turns[dropped:])) > left and dropped < len(turns) - 1:
        dropped += 1
        while messages[dropped]["role"] != "user" and dropped < len(turns) - 1:
            dropped += 1
    if not turns or left < 2:
        raise UserError(f"{len(turns)} turns and room for {room} tokens: give a user's turn, and a "
                        "larger context or a smaller --max_new_tokens")
    ids = [i for turn in turns[dropped:] for i in turn]
    if len(ids) > left:
        ids = [ids[0], *ids[1 - left :]]
    return [start, *ids, speak], dropped


@dataclass(frozen=True)
class Conversation:
    """Messages in turn, and what people thought of them, by name; no ratings where none were."""

    id: str
    split: str
    messages: list[dict]
    ratings: dict[str, list[float]]


def load_conversations(folder: Path, split: str | None) -> list[Conversation]:
    """One split of a data folder's conversations, None: all; UserError: the file and line at fault.
    """
    path = Path(folder) / FILE if Path(folder).is_dir() else Path(folder)
    if not path.is_file():
        raise UserError(f"no conversations at {path}: run data/chat/prepare.py or "
                        "data/arithmetic/prepare.py, or give a .jsonl file")
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            messages = [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
            if not messages or any(m["role"] not in ROLES or not m["content"].strip()
                                   for m in messages):
                raise ValueError(messages)
            "".join(m["content"] for m in messages).encode()  # half characters are not text
            its_split = str(row.get("split", "train"))
            ratings = {str(k): [float(x) for x in v] for k, v in row.get("ratings", {}).items()}
            if not all(math.isfinite(x) for v in ratings.values() for x in v):
                raise ValueError(ratings)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            raise UserError(f"{path} line {number} is no conversation: give {{\"messages\": "
                            "[{\"role\": \"user\" or \"assistant\", \"content\": text}, ...]}, and"
                            " numbers in \"ratings\" if it has them: {name: [number, ...]}"
                            ) from None
        if split in (None, its_split):
            found.append(Conversation(str(row.get("id", number)), its_split, messages, ratings))
    if not found:
        where = f" in the split {split}: prepare it again" if split else ": give one a line"
        raise UserError(f"{path} has no conversation{where}")
    return found
