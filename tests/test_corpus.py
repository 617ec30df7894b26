"""The prepare scripts on small sources made here: parsing, splits, faults, done only once."""

import gzip
import hashlib
import importlib.util
import io
import json
import multiprocessing
import random
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import grown, shard_bytes

from nanokl import corpus
from nanokl.data import Shard
from nanokl.judgements import Judgements
from nanokl.runtime import run_program
from nanokl.tokenizer import Rest, Tokenizer, train_bpe

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


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"12345678\0", "NUL byte at 8"),
        (b"\xef\xbb\xbf12345\0", "NUL byte at 8"),
        ("12345 caf\xe9s".encode("latin-1"), "not UTF-8 at byte 9 of 11"),
        (b"\xef\xbb\xbf12345\xff", "not UTF-8 at byte 8 of 9"),
        ("123 \u20ac".encode()[:-1], r"not UTF-8 at byte 4 of 6 \(unexpected end of data\)"),
        (b" " * 30, "is empty"),
    ],
)
@pytest.mark.parametrize("block", [1, 2, 3, 5, 1 << 20])
def test_bad_text_in_any_block(tmp_path, monkeypatch, content, says, block):
    monkeypatch.setattr(corpus, "BLOCK", block)
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(corpus.UserError, match=says):
        list(load("text").stream_text(tmp_path / "a.txt"))


def whole_text(files, split_on_blank_lines):
    """The oracle: (train, val) documents with all texts in memory."""
    docs = [content.decode("utf-8-sig") for content in files]
    if split_on_blank_lines:
        docs = [doc for text in docs for doc in re.split(r"\r?\n(?:[ \t]*\r?\n)+", text)]
    docs = [doc for doc in docs if doc.strip()]
    if len(docs) == 1:
        cut = len(docs[0]) * 9 // 10
        docs, cut = [docs[0][:cut], docs[0][cut:]], 1
    else:
        cut = len(docs) - max(1, len(docs) // 10)
    return [[doc for doc in part if doc.strip()] for part in (docs[:cut], docs[cut:])]


pieces = st.sampled_from(
    ["a", "bc", "caf\xe9", "\U0001f600", "d'll", "12", " ", "\t", "\n", "\r\n", "\r", "\n\n",
     "\r\n \r\n", "\n \t\n\n", "\x1c", "\xa0", "<|endoftext|>", "ends.\n", "\u2028", "\ufeff"]
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(
    texts=st.lists(st.lists(pieces, min_size=1, max_size=25), min_size=1, max_size=4),
    split=st.booleans(), block=st.integers(1, 9), part=st.sampled_from([60, 90, 1 << 18]),
)  # fmt: skip
def test_streamed_text_makes_the_same_shards(tmp_path_factory, texts, split, block, part):
    folder, files = tmp_path_factory.mktemp("x"), [b"\xef\xbb\xbf" * (len(t) % 2)
                                                  + "".join(t).encode() for t in texts]  # fmt: skip
    files = [content for content in files if content.strip()]
    for i, content in enumerate(files):
        (folder / f"{i}.txt").write_bytes(content)
    train, val = whole_text(files, split)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "BLOCK", block)
        patch.setattr(corpus, "PART", part)
        paths = [folder / f"{i}.txt" for i in range(len(files))]
        prepare = load("text")
        docs = prepare.Stream(lambda: prepare.documents(paths, split))
        source = corpus.Corpus(prepare.holdout(docs))
        if not (train and val):
            with pytest.raises(corpus.UserError, match="no text for the"):
                corpus.prepare_corpus(folder / "out", lambda: source, settings={}, vocab_size=270)
            return
        corpus.prepare_corpus(folder / "out", lambda: source, settings={}, vocab_size=270)
    tokenizer = train_bpe(train, 270)
    assert Tokenizer.load(folder / "out").hash == tokenizer.hash
    for name, docs in (("train", train), ("val", val)):
        n_bytes = sum(len(doc.encode()) for doc in docs)
        expected = shard_bytes([tokenizer.encode(doc) for doc in docs], tokenizer, n_bytes)
        assert (folder / "out" / f"{name}.bin").read_bytes() == expected


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.tuples(st.text(alphabet="ab \n", max_size=30), st.booleans())),
       size=st.integers(1, 9))  # fmt: skip
def test_parts_and_groups_keep_the_text_and_its_documents(texts, size):
    docs, whole = [], []
    for text, more in texts:
        docs.append(Rest(text) if more and docs else text)
        whole[-1:] = [whole[-1] + text] if more and whole else [*whole[-1:], text]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "PART", size)
        groups = list(corpus._groups(docs))
    assert all(0 < sum(map(len, group)) <= size for group in groups)
    got = []
    for text in (text for group in groups for text in group):
        got[-1:] = [got[-1] + text] if isinstance(text, Rest) else [*got[-1:], text]
    assert got == [doc for doc in whole if doc.strip()]


def test_bpe_sample_is_bounded_and_spread(monkeypatch):
    monkeypatch.setattr(corpus, "PART", 10)
    docs = [f"{i:010}" for i in range(1000)]
    assert corpus._sample(docs[:64]) == docs[:64]  # all of a small corpus
    assert corpus._sample(docs[:65]) == docs[:65:2]
    assert corpus._sample(iter(docs)) == docs[::16]  # 63 parts; with :8 they would be 125


def prepare_big(folder, split):
    """MiB by which the process grows when it prepares 40 MB, and what meta.json says."""
    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS, k=12)) + "\n" * rng.randint(1, 2) for _ in range(1000)]
    with (folder / "big.txt").open("w") as file:
        for _ in range(650):
            file.write("".join(lines))
    flags = ["--split-on-blank-lines"] if split else []
    sys.argv = ["prepare.py", str(folder / "big.txt"), "--out", str(folder / "out"), *flags]
    corpus.SAMPLE, corpus.os.cpu_count = 4, lambda: 2
    prepare = load("text")
    return (folder / "big.txt").stat().st_size / 2**20, grown(prepare.main)


@pytest.mark.parametrize("split", [False, True])
def test_memory_does_not_grow_with_the_text(tmp_path, split):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        size, growth = pool.apply(prepare_big, (tmp_path, split))
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    n = meta["splits"]
    assert size > 35 and growth < 40, growth  # of which 5 for 16 bytes a document
    assert n["train"]["bytes"] + n["val"]["bytes"] >= 0.97 * size * 2**20
    assert (n["train"]["documents"] > 100_000) == split
    assert 2 << 18 < meta["tokenizer"]["learnt_from_characters"] <= 4 << 18


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
