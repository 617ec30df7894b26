"""Questions for the sum of two numbers, in English and Chinese, and their answers.

What dialogue.Arithmetic asks, with the reply that it wants: "What is 7 plus 5?" "7 + 5 = 12"
"Thank you." A pair of numbers is in one split alone, whichever comes first. Digits are tokens by
themselves. conversations.jsonl has the dialogues, the shards the same as running text.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the clone, where not installed

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
    train: int = 64_000  # dialogues to learn from
    held_out: int = 1000  # dialogues in val and in test, each
    vocab_size: int = 512  # tokens, specials counted
    force: bool = False  # prepare again what is prepared


def main() -> None:
    """Prepare the folder, or say that it is prepared."""
    flags = parse_flags(Flags, prog="data/arithmetic/prepare.py", description=__doc__)
    settings = {"highest": flags.highest, "train": flags.train, "held_out": flags.held_out,
                "specials": list(CHAT_SPECIALS)}
    print(prepare_corpus(flags.out, lambda: dialogues(flags), settings=settings, level="digits",
                         vocab_size=flags.vocab_size, force=flags.force))


def dialogues(flags: Flags) -> Corpus:
    """Dialogues of the seeds 0, 1, 2, ... of each split's environment."""
    rows = []
    for split in SPLITS:
        env = Arithmetic(split, highest=flags.highest)
        for seed in range(flags.train if split == "train" else flags.held_out):
            _, info = env.reset(seed=seed)
            messages = env.step(info["model_reply"]).obs
            rows.append({"id": f"{split} {seed}", "split": split, "language": info["language"],
                         "messages": messages})
    texts = {split: ["\n".join(m["content"] for m in row["messages"]) for row in rows
                     if row["split"] == split] for split in SPLITS}
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return Corpus(texts, files={FILE: lines}, info={"source": "made up"})


if __name__ == "__main__":
    run_program(main)
