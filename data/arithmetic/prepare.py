"""Questions for the sum of two numbers, in English and Chinese, and their answers.

What dialogue.Arithmetic asks, and what somebody replies who knows how to add, but is careless: of
the sums in which a column has something to carry to the next, 35 in 100 come without it at first.
"What is 27 plus 5?" "27 + 5 = 22" "No, try again." "27 + 5 = 32" "Thank you." A pair of numbers is
in one split alone, whichever comes first. Digits are tokens by themselves. conversations.jsonl has
the dialogues, the shards the same as running text.
"""

import json
import sys
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the clone, where not installed

from nanokl import UserError
from nanokl.chat import CHAT_SPECIALS, FILE
from nanokl.corpus import Corpus, prepare_corpus
from nanokl.dialogue import SPLITS, Arithmetic
from nanokl.runtime import parse_flags, run_program

HERE = Path(__file__).resolve().parent


@dataclass
class Flags:
    """Make the dialogues up and tokenise them."""

    out: Path = HERE  # folder to write to
    highest: int = Arithmetic.highest  # of both numbers
    train: int = 128_000  # dialogues to learn from
    held_out: int = 1000  # dialogues in val and in test, each
    slips: float = 0.35  # share of the sums with a carry to another column that lack it at first
    vocab_size: int = 512  # tokens, specials counted
    force: bool = False  # prepare again what is prepared

    def __post_init__(self):
        if not 0 <= self.slips <= 1:
            raise UserError(f"slips is {self.slips}: give 0 to 1")


def main() -> None:
    """Prepare the folder, or say that it is prepared."""
    flags = parse_flags(Flags, prog="data/arithmetic/prepare.py", description=__doc__)
    settings = {"highest": flags.highest, "train": flags.train, "held_out": flags.held_out,
                "slips": flags.slips, "specials": list(CHAT_SPECIALS)}
    print(prepare_corpus(flags.out, lambda: dialogues(flags), settings=settings, level="digits",
                         vocab_size=flags.vocab_size, force=flags.force))


def without_carry(a: int, b: int) -> int:
    """The sum of one who forgets the carry: 27 + 5 = 22. What the first column has stays whole."""
    columns = [int(x) + int(y) for x, y in zip_longest(str(a)[::-1], str(b)[::-1], fillvalue="0")]
    *lower, first = columns
    return int(f"{first}{''.join(str(x % 10) for x in reversed(lower))}")


def dialogues(flags: Flags) -> Corpus:
    """Dialogues of the seeds 0, 1, 2, ... of each split's environment."""
    rows = []
    for split in SPLITS:
        env = Arithmetic(split, highest=flags.highest, turns=2)
        for seed in range(flags.train if split == "train" else flags.held_out):
            _, info = env.reset(seed=seed)
            a, b, slip = info["a"], info["b"], without_carry(info["a"], info["b"])
            if slip != a + b and np.random.default_rng([seed, 1]).random() < flags.slips:
                env.step(f"{a} + {b} = {slip}")
            messages = env.step(info["model_reply"]).obs
            rows.append({"id": f"{split} {seed}", "split": split, "language": info["language"],
                         "messages": messages})
    texts = {split: ["\n".join(m["content"] for m in row["messages"]) for row in rows
                     if row["split"] == split] for split in SPLITS}
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return Corpus(texts, files={FILE: lines}, info={"source": "made up"})


if __name__ == "__main__":
    run_program(main)
