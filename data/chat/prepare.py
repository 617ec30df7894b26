"""Conversations in English and Chinese: what people said to each other, and what a bot was taught.

chitchat-dataset 0.9.0 (MIT; Myers, Etchart & Fulda, Conversational Scaffolding, ICAART 2020) has
conversations of two people each, many rated for wit, interest and mood; chatterbot-corpus 1.3.3
(BSD) short dialogues of a bot, of which English and Chinese are taken. Both come from PyPI, by
their hashes. Whoever speaks first is the user. conversations.jsonl has all of them, turn by turn;
the shards have the same as running text, a line a turn.
"""

import hashlib
import io
import json
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the clone, where not installed

from nanokl import UserError
from nanokl.chat import CHAT_SPECIALS, FILE, ROLES, clean
from nanokl.corpus import Corpus, fetch, prepare_corpus, read_bytes
from nanokl.runtime import parse_flags, run_program

HERE = Path(__file__).resolve().parent
RELEASES = {  # name: release, sha256 of the wheel, size
    "chitchat": ("chitchat-dataset==0.9.0",
                 "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e", "8 MB"),
    "chatterbot": ("chatterbot-corpus==1.3.3",
                   "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154", "346 kB"),
}
LANGUAGES = {"english": "en", "chinese": "zh", "traditionalchinese": "zh"}
SPLITS = ((0.9, "train"), (0.95, "val"), (1.0, "test"))  # by a hash of the conversation's id


@dataclass
class Flags:
    """Fetch, clean and tokenise the conversations."""

    out: Path = HERE  # folder to write to
    vocab_size: int = 8192  # tokens, specials counted
    chitchat: Path | None = None  # use this wheel, fetch nothing
    chatterbot: Path | None = None  # and this one
    sha256: tuple[str, str] = (RELEASES["chitchat"][1], RELEASES["chatterbot"][1])  # of the two
    force: bool = False  # prepare again what is prepared


def main() -> None:
    """Prepare the folder, or say that it is prepared."""
    flags = parse_flags(Flags, prog="data/chat/prepare.py", description=__doc__)
    settings = {"sha256": list(flags.sha256), "cleaning": 1, "specials": list(CHAT_SPECIALS)}
    print(prepare_corpus(flags.out, lambda: read_all(flags), settings=settings,
                         vocab_size=flags.vocab_size, force=flags.force))


def read_all(flags: Flags) -> Corpus:
    """Both sources, in one file and in shards."""
    rows = []
    for (name, read), sha256 in zip((("chitchat", chitchat), ("chatterbot", chatterbot)),
                                    flags.sha256, strict=True):
        rows += read(wheel(name, getattr(flags, name), sha256))
    for row in rows:
        row["split"] = split_of(row["id"])
    texts = {split: ["\n".join(m["content"] for m in row["messages"]) for row in rows
                     if row["split"] == split] for _, split in SPLITS}
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    counts = {name: sum(row["source"] == name for row in rows) for name in RELEASES}
    return Corpus(texts, files={FILE: lines}, info={"conversations": counts, "licences": {
        "chitchat": "MIT", "chatterbot": "BSD"}})


def wheel(name: str, path: Path | None, sha256: str) -> zipfile.ZipFile:
    """A wheel of that hash, fetched where no path is given."""
    release, _, size = RELEASES[name]
    with tempfile.TemporaryDirectory() as folder:
        if path is None:
            path = fetch(release, sha256, Path(folder), size=size, flag=f"--{name}")
        try:
            return zipfile.ZipFile(io.BytesIO(read_bytes(path, sha256)))
        except zipfile.BadZipFile:
            raise UserError(f"{path} is no wheel: give that of {release}") from None


def split_of(name: str) -> str:
    """A conversation's split, by its id alone."""
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return next(split for end, split in SPLITS if share < end)


def chitchat(archive: zipfile.ZipFile) -> Iterator[dict]:
    """Conversations in which both have said something; what one says at a stretch is one turn."""
    found = json.loads(archive.read("chitchat_dataset/dataset.json"))
    for name, talk in sorted(found.items()):
        said = [(u["sender"], text) for turn in talk["messages"] for u in turn
                if (text := clean(u["text"]))]
        senders = list(dict.fromkeys(sender for sender, _ in said))
        if len(senders) != 2:
            continue
        messages = [{"role": ROLES[senders.index(sender)], "content": " ".join(t for _, t in turn)}
                    for sender, turn in groupby(said, key=lambda x: x[0])]
        ratings = {key: [int(x)] for key, x in sorted(talk.get("ratings", {}).items())}
        yield {"id": f"chitchat {name}", "source": "chitchat", "language": "en",
               "messages": messages, "ratings": ratings}


def chatterbot(archive: zipfile.ZipFile) -> Iterator[dict]:
    """The dialogues of two languages, each different one once."""
    seen = set()
    for path in sorted(archive.namelist()):
        *folder, file = path.split("/")
        if folder[:2] != ["chatterbot_corpus", "data"] or folder[-1] not in LANGUAGES:
            continue
        if not file.endswith(".yml"):
            continue
        for i, turns in enumerate(conversations(archive.read(path).decode("utf-8-sig"), path)):
            turns = tuple(filter(None, map(clean, turns)))
            if len(turns) < 2 or turns in seen:
                continue
            seen.add(turns)
            messages = [{"role": ROLES[j % 2], "content": text} for j, text in enumerate(turns)]
            yield {"id": f"chatterbot {folder[-1]} {file} {i}", "source": "chatterbot",
                   "language": LANGUAGES[folder[-1]], "messages": messages, "ratings": {}}


def conversations(text: str, path: str) -> list[list[str]]:
    """`conversations:` of a corpus file: a list of lists of texts, the part of YAML that is used.

    Plain and quoted scalars, in one line or more, and literal blocks. The one conversation that
    lacks its second dash, and so would be a text, is read as it is meant.
    """
    found: list[list[list[str]]] = []  # conversations of turns of lines
    head, _, body = text.partition("conversations:\n")
    for number, line in enumerate(body.splitlines(), head.count("\n") + 2):
        if line.startswith("- "):
            found.append([])
        if line.startswith(("- ", "  -")) and found:
            found[-1].append([line.removeprefix("- ").lstrip().removeprefix("-").strip()])
        elif found and (line.startswith("    ") or not line.strip()):
            found[-1][-1].append(line)
        else:
            raise UserError(f"{path} line {number} is not a turn: {line[:40]!r}")
    return [[scalar(turn) for turn in talk] for talk in found]


def scalar(lines: list[str]) -> str:
    """The text of a turn's lines, the first without its dash."""
    if lines[0] in ("|", "|-", "|+"):
        return "\n".join(line.strip() for line in lines[1:])
    text = " ".join(filter(None, (line.strip() for line in lines)))
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1].replace("''", "'") if text[0] == "'" else json.loads(text)
    return text


if __name__ == "__main__":
    run_program(main)
