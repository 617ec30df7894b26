"""The prepare scripts on small sources made here: parsing, splits, faults, done only once."""

import gzip
import hashlib
import importlib.util
import io
import json
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from nanokl.data import Shard
from nanokl.judgements import Judgements
from nanokl.runtime import run_program
from nanokl.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
WORDS = ["good", "bad", "film", "plot", "phone", "battery", "screen", "love", "hate", "not"]


def load(name):
    """data/<name>/prepare.py as a module."""
    path = ROOT / "data" / name / "prepare.py"
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script in this process: (exit status, stdout, stderr)."""

    def call(module, *flags):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, flags)])
        status = 0
        try:
            run_program(module.main)
        except SystemExit as error:
            status = error.code or 0
        return status, *capsys.readouterr()

    return call


def fails(result, *says):
    """The run ended in exit status 2 and one line that says this."""
    status, out, err = result
    assert status == 2 and err.count("\n") == 1 and "prepared" not in out, result
    assert all(text in err for text in says), err


def tar_gz(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return gzip.compress(buffer.getvalue(), mtime=0)  # the same bytes at any time


def fake_files(n=40):
    """The ratings' files: CRLF, ids of two kinds, one file with a BOM and in another order."""
    rng, files = random.Random(0), {}
    for domain, stem in load("hutto").DOMAINS.items():
        truth, rated = [], []
        for i in range(n):
            key = f"{i // 5 + 1}_{i % 5 + 1}" if domain in ("product", "news") else f"{i + 1}"
            text = f"{domain} {i} " + " ".join(rng.choices(WORDS, k=rng.randint(1, 9)))
            ratings = [rng.randint(-4, 4) for _ in range(rng.randint(15, 20))]
            truth.append(f"{key}\t0.5\t{text}".encode())
            rated.append(f"{key}\t0.5\t1.0\t{ratings}".encode())
        if domain == "movie":
            truth[3] = "4\t1\tcaf\xe9 &amp; bar &lt;3  a\tb ".encode("cp1252")
            truth[4] = "5\t1\tna\xefve \u2013 fine".encode()
        if domain == "product":
            rated[0], rated[9] = rated[9], rated[0]
            rated[0] = b"\xef\xbb\xbf" + rated[0]
        files[f"{stem}_GroundTruth.txt"] = b"\r\n".join(truth)
        files[f"{stem}_anonDataRatings.txt"] = b"\r\n".join(rated) + b"\r\n"
    files["vader_sentiment_lexicon.txt"] = (
        b":-)\t1\t1\t[1, 2, 3]\nlol\t1\t1\t[0, 2]\nlol\t1\t1\t[1, 1]\n:\xde\t1\t1\t[2, -1]\n"
    )
    return files


def fake_sdist(path, files):
    """An sdist of the layout of vaderSentiment-3.3.2; returns the flags that have it used."""
    inner = tar_gz({f"hutto_ICWSM_2014/{name}": content for name, content in files.items()})
    name = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    path.write_bytes(tar_gz({"vaderSentiment-3.3.2/README.rst": b"x", name: inner}))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return ["--sdist", path, "--sha256", sha256, "--vocab-size", 300]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def judged(folder):
    lines = (folder / "judgements.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def shard_texts(folder, split):
    tokenizer = Tokenizer.load(folder)
    shard = Shard.open(folder / f"{split}.bin", tokenizer)
    bounds = zip(shard.starts, shard.starts[1:], strict=False)
    return [tokenizer.decode(shard.tokens[a + 1 : b].tolist()) for a, b in bounds]


@pytest.mark.parametrize(("flag", "thorn"), [("--lowercase", "\xfe"), ("--no-lowercase", "\xde")])
def test_hutto_parses_the_quirks(tmp_path, run, flag, thorn):
    files = fake_files()
    status, out, err = run(
        load("hutto"), *fake_sdist(tmp_path / "x.tar.gz", files), flag, "--out", tmp_path / "out"
    )
    assert status == 0 and err == "" and out.count("\n") == 1
    rows = {(row["domain"], row["id"]): row for row in judged(tmp_path / "out")}
    assert rows["movie", "4"]["text"] == "caf\xe9 & bar <3 a b"
    assert rows["movie", "5"]["text"] == "na\xefve \u2013 fine"
    assert [rows["lexicon", i]["text"] for i in "1234"] == [":-)", "lol", "lol", ":" + thorn]
    assert rows["lexicon", "1"]["ratings"] == [1, 2, 3]
    first = files["amazonReviewSnippets_anonDataRatings.txt"].split(b"\r\n")
    ratings = {"1_1": first[9], "2_5": first[0]}  # swapped in that file
    for key, line in ratings.items():
        assert rows["product", key]["ratings"] == json.loads(line.split(b"\t")[3])
    assert len(rows) == 4 * 40 + 4


def test_hutto_splits(tmp_path, run):
    run(load("hutto"), *fake_sdist(tmp_path / "x.tar.gz", fake_files()), "--out", tmp_path / "out")
    rows = judged(tmp_path / "out")
    for split in ("train", "val", "test"):
        here = {row["text"] for row in rows if row["split"] == split and row["domain"] != "lexicon"}
        assert here and sorted(here) == sorted(shard_texts(tmp_path / "out", split))
        j = Judgements.load(tmp_path / "out", split)
        assert ("lexicon" in {j.domain_names[d] for d in j.domains}) == (split == "train")
    for row in rows:
        key = f"{row['domain']}:{row['id']}"
        u = int(hashlib.sha256(key.encode()).hexdigest()[:16], 16) / 16**16
        expected = "test" if u < 0.1 else "val" if u < 0.15 else "train"
        assert row["split"] == ("train" if row["domain"] == "lexicon" else expected)
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    for name, recorded in meta["files"].items():
        content = (tmp_path / "out" / name).read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        assert recorded == {"bytes": len(content), "sha256": sha256}
    documents = [row["text"] for row in rows if row["split"] == "val"]
    assert meta["splits"]["val"]["bytes"] == sum(len(text.encode()) for text in documents)


def test_no_test_text_in_any_training_set(tmp_path, run):
    """Every snippet and word has twins in other splits that differ in case and punctuation."""
    hutto, files = load("hutto"), fake_files()
    for stem in hutto.DOMAINS.values():
        lines = files[f"{stem}_GroundTruth.txt"].split(b"\r\n")
        keys = [line.split(b"\t")[0] for line in lines]
        texts = [b"Good, %d films!" % (i % 9) for i in range(10)]
        texts += [b"GOOD %d films" % (i % 9) for i in range(10, 20)]
        texts += [line.split(b"\t", 2)[2] for line in lines[20:]]
        files[f"{stem}_GroundTruth.txt"] = b"\n".join(
            key + b"\t0\t" + text for key, text in zip(keys, texts, strict=True)
        )
    files["vader_sentiment_lexicon.txt"] += b"good 1 FILMS\t1\t1\t[1, 2]\n"
    status, _, err = run(
        hutto, *fake_sdist(tmp_path / "x.tar.gz", files), "--out", tmp_path / "out"
    )
    assert status == 0, err

    def letters(texts):
        return {"".join(filter(str.isalnum, text.lower())) for text in texts} - {""}

    rows = judged(tmp_path / "out")
    by_split = {
        split: letters(row["text"] for row in rows if row["split"] == split)
        | letters(shard_texts(tmp_path / "out", split))
        for split in ("train", "val", "test")
    }
    assert not by_split["test"] & by_split["train"]
    assert not by_split["test"] & by_split["val"]
    assert not by_split["val"] & by_split["train"]
    assert ":-)" in {row["text"] for row in rows}  # no letters, yet like no other text
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert sum(meta["dropped_as_leaks"].values()) == 165 - len(rows) > 0


def test_leaks_by_hand():
    kept = ["test/Great film!", "test/great FILM", "test/:-)", "val/a bore", "val/:-(", "train/:-D"]
    dropped = ["val/Great, film.", "train/Great film", "train/A bore!", "train/:-  )"]
    rows = [dict(zip(("split", "text"), row.split("/"), strict=True)) for row in kept + dropped]
    left = load("hutto").without_leaks(rows)
    assert [f"{row['split']}/{row['text']}" for row in left] == kept


def test_prepared_once(tmp_path, run):
    hutto, out = load("hutto"), tmp_path / "out"
    flags = [*fake_sdist(tmp_path / "x.tar.gz", fake_files()), "--out", out]
    run(hutto, *flags)
    before = contents(out)
    (tmp_path / "x.tar.gz").unlink()  # the source is not even opened
    status, text, err = run(hutto, *flags)
    assert status == 0 and "prepared already" in text and text.count("\n") == 1
    fails(run(hutto, *flags, "--seed", "1"), "seed 0, not 1", "--force", "--out")
    fails(run(hutto, *flags, "--force"), "no file at")
    assert contents(out) == before
    fake_sdist(tmp_path / "x.tar.gz", fake_files())
    status, text, _ = run(hutto, *flags, "--force", "--seed", "1")
    assert status == 0 and contents(out)["train.bin"] != before["train.bin"]
    assert run(hutto, *flags, "--force")[0] == 0 and contents(out) == before  # the same bytes
    (out / "train.bin").write_bytes(before["train.bin"][:-1])
    assert run(hutto, *flags)[0] == 0 and contents(out) == before  # was incomplete


def without(name):
    return lambda files: files.pop(name) and files


def changed(name, edit):
    return lambda files: {**files, name: edit(files[name])}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without("tweets_anonDataRatings.txt"), "tweets_anonDataRatings.txt is missing or empty"),
        (changed("tweets_GroundTruth.txt", lambda b: b" \n"), "is missing or empty"),
        (changed("tweets_GroundTruth.txt", lambda b: b[:900]), "truncated"),
        (changed("tweets_GroundTruth.txt", lambda b: b + b"\r\n41"), "line 41 has 1 fields"),
        (changed("tweets_GroundTruth.txt", lambda b: b + b"\r\n1\t0\tx"), "ids twice"),
        (changed("tweets_anonDataRatings.txt", lambda b: b[:-5]), "no list of ratings"),
        (changed("vader_sentiment_lexicon.txt", lambda b: b"a\t1\t1\t[1, 5]"), "from -4 to 4"),
    ],
)
def test_broken_archive_leaves_nothing(tmp_path, run, damage, says):
    flags = fake_sdist(tmp_path / "x.tar.gz", damage(fake_files()))
    fails(run(load("hutto"), *flags, "--out", tmp_path / "new" / "out"), says)
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar.gz"]


def test_broken_sdist_leaves_nothing(tmp_path, run):
    hutto, path, out = load("hutto"), tmp_path / "x.tar.gz", tmp_path / "out"
    fake_sdist(path, fake_files())
    whole = path.read_bytes()
    fails(run(hutto, "--sdist", path, "--out", out), "sha256", hutto.SDIST_SHA256)
    for content, says in [
        (whole[: len(whole) // 2], "no whole .tar.gz"),
        (b"x" * 999, "no whole .tar.gz"),
        (tar_gz({"a/README": b"x"}), "holds no additional_resources"),
        (b"", "is empty"),
    ]:
        path.write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        fails(run(hutto, "--sdist", path, "--sha256", sha256, "--out", out), says)
    fails(run(hutto, "--sdist", tmp_path / "none.tar.gz", "--out", out), "no file at")
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar.gz"]


def test_failed_download_leaves_nothing(tmp_path, run, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # pip asks nobody, and finds nothing
    fails(run(load("hutto"), "--out", tmp_path / "out"), "pip could not fetch", "--sdist FILE")
    assert not any(tmp_path.iterdir())


def test_vocabulary_too_small(tmp_path, run):
    flags = fake_sdist(tmp_path / "x.tar.gz", fake_files())[:-1]
    fails(run(load("hutto"), *flags, 260, "--out", tmp_path / "out"), "vocab_size", "261", "260")
    assert not (tmp_path / "out").exists()


def test_text_documents(tmp_path, run):
    text, out = load("text"), tmp_path / "out"
    docs = [f"document {i}\nhas two lines, caf\xe9" for i in range(25)]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + "\n\n".join(docs[:12]).encode())
    (tmp_path / "b.txt").write_bytes("\r\n \r\n\r\n".join(docs[12:]).encode())
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    assert run(text, *files, "--split-on-blank-lines", "--out", out)[0] == 0
    assert shard_texts(out, "train") == docs[:23] and shard_texts(out, "val") == docs[23:]
    assert "prepared already" in run(text, *files, "--split-on-blank-lines", "--out", out)[1]
    fails(run(text, *files, "--out", out), "split_on_blank_lines True, not False")
    files[0].write_text("another text")
    fails(run(text, *files, "--split-on-blank-lines", "--out", out), "sha256", "--force")
    assert run(text, *files, "--out", out, "--force")[0] == 0  # a document a file
    assert shard_texts(out, "train") == ["another text"] and len(shard_texts(out, "val")) == 1
    alone = "".join(chr(97 + i % 26) for i in range(1000))
    (tmp_path / "c.txt").write_text(alone)
    assert run(text, tmp_path / "c.txt", "--out", tmp_path / "c")[0] == 0
    assert shard_texts(tmp_path / "c", "train") == [alone[:900]]
    assert shard_texts(tmp_path / "c", "val") == [alone[900:]]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no file at"),
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"some text\0and more", "NUL byte at 9"),
        ("caf\xe9 and more".encode("latin-1"), "not UTF-8 at byte 3"),
        ("cut caf\xe9".encode()[:-1], "not UTF-8 at byte 7"),
        (b"x", "too small"),
    ],
)
def test_bad_text(tmp_path, run, content, says):
    path, good = tmp_path / "a.txt", tmp_path / "good.txt"
    if content is not None:
        path.write_bytes(content)
    good.write_text("good text")
    files = [path] if content == b"x" else [good, path]
    fails(run(load("text"), *files, "--out", tmp_path / "out"), says)
    assert not (tmp_path / "out").exists()
    fails(run(load("text"), tmp_path, "--out", tmp_path / "out"), "no file at")
    fails(run(load("text"), "--out", tmp_path / "out"), "no FILE was given")
    fails(run(load("text"), "--vocab", "x"), "vocab")


def test_shakespeare(tmp_path, run, monkeypatch):
    shakespeare, copy = load("shakespeare"), tmp_path / "input.txt"
    play = "First Citizen:\nBefore we proceed, h\xe9ar me speak.\n\n" * 20
    copy.write_bytes(play.encode())
    fails(run(shakespeare, copy, "--out", tmp_path / "out"), "sha256", "truncated")
    monkeypatch.setattr(shakespeare, "URL", (tmp_path / "none.txt").as_uri())
    fails(run(shakespeare, "--out", tmp_path / "out"), "could not fetch", "local copy")
    monkeypatch.setattr(shakespeare, "URL", copy.as_uri())
    fails(run(shakespeare, "--out", tmp_path / "out"), "sha256")  # a broken download
    assert [path.name for path in tmp_path.iterdir()] == ["input.txt"]
    monkeypatch.setattr(shakespeare, "SHA256", hashlib.sha256(play.encode()).hexdigest())
    for out, source in [("local", [copy]), ("fetched", [])]:
        assert run(shakespeare, *source, "--out", tmp_path / out)[0] == 0
    assert contents(tmp_path / "local") == contents(tmp_path / "fetched")
    (train,), (val,) = (shard_texts(tmp_path / "local", split) for split in ("train", "val"))
    assert train + val == play and len(train) == len(play) * 9 // 10
    tokenizer = Tokenizer.load(tmp_path / "local")
    assert len(tokenizer.encode(play)) == len(play)  # a token a character
    assert run(shakespeare, copy, "--level", "bpe", "--out", tmp_path / "bpe")[0] == 0
    assert len(Tokenizer.load(tmp_path / "bpe").encode(play)) < len(play) / 2


def test_help_of_a_clone_that_is_not_installed(tmp_path):
    command = [sys.executable, ROOT / "data" / "hutto" / "prepare.py", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "--sdist" in done.stdout and done.stderr == ""
