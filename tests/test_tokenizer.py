"""Tokenizer: against a trainer that recounts everything and an encoder that tries every pair."""

import base64
import json
import math
import random
from collections import Counter

import numpy as np
import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from nanokl import UserError
from nanokl.tokenizer import (
    CHAR_PATTERN,
    FILE_NAME,
    PATTERN,
    SPECIALS,
    Rest,
    Tokenizer,
    train_bpe,
)

WHOLE = r"(?s:.+)"  # the whole text is one chunk
BYTES = [bytes([b]) for b in range(256)]
few = settings(max_examples=25, deadline=None)
# Few characters make many repeats: runs, overlaps, ties, merges of merges, characters of 2-4 bytes.
repetitive = st.text(alphabet="aab é😀\n1'", max_size=60)

HOSTILE = {
    "empty": "",
    "nul": "\x00a\x00\x00b",
    "emoji": "I ❤️ 👩‍👩‍👧‍👦 and 👍🏽👍🏽, 🇩🇪🇫🇷",
    "combining": "e\u0301tude Z\u0335\u0321\u0322a\u0300lgo " + "\u0301" * 50,
    "right to left": "שלום \u202eעולם\u202c مرحبا بِالعالَم",
    "indic": "नमस्ते दुनिया क्षत्रिय",
    "no spaces": "吾輩は猫である。名前はまだ無い。",
    "line ends": "a\r\nb\r\n\r\n c\rd\n\n\te \u2028 \u00a0 \u3000f",
    "controls": "\x1b[31m\x7f\x85\x1c\x1f\ufeff\u200b\u200d\uffff",
    "special-looking": "<|endoftext|>[MASK] [CLS]<|endoftext|><|end [SEP][PAD]",
    "digits": "1 22 333 4444 55555 3.14159 ٣٤٥ ½ Ⅷ",
    "quotes": "don't we'll 'tis I'VE 'quoted' ''' ’s",
    "last planes": "\U0010ffff\ue000\ufffd𝔘𝔫𝔦",
    **{f"run of {c!r}": c * 3001 for c in ("a", " ", "\n", "7", "!", "é", "\u0301", "😀")},
}


def texts_of(seed, n=200):
    """Texts of invented words, the short ones frequent."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdluéß", k=rng.randint(1, 8))) for _ in range(80)]
    return [" ".join(rng.choices(words, k=12)).capitalize() + ".\n" for _ in range(n)]


TRAINED = train_bpe([*texts_of(0), *HOSTILE.values()], 600)


def slow_train(texts, n_merges, pattern):
    """Every chunk kept, everything recounted for every merge: the merged bytes, the final cut."""
    chunks = [[*map(int, c.encode())] for text in texts for c in regex.findall(pattern, text)]
    tokens = list(BYTES)
    for _ in range(n_merges):
        counts = Counter((c[i], c[i + 1]) for c in chunks for i in range(len(c) - 1))
        if not counts or max(counts.values()) < 2:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        for c in chunks:
            i = 0
            while i < len(c) - 1:
                if (c[i], c[i + 1]) == best:
                    c[i : i + 2] = [len(tokens)]
                i += 1
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens, [i for c in chunks for i in c]


def slow_encode(text, tokens, pattern):
    """In each chunk: the neighbours whose joint bytes have the lowest id are joined, leftmost."""
    rank, ids = {token: i for i, token in enumerate(tokens)}, []
    for chunk in regex.findall(pattern, text):
        parts = [bytes([b]) for b in chunk.encode()]
        while len(parts) > 1:
            joint = [rank.get(parts[i] + parts[i + 1], math.inf) for i in range(len(parts) - 1)]
            if min(joint) == math.inf:
                break
            i = joint.index(min(joint))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [rank[part] for part in parts]
    return ids


def test_wikipedia_example():
    tokenizer = train_bpe(["aaabdaaabac"], 256 + 3, pattern=WHOLE, specials=())
    assert tokenizer.tokens[256:] == (b"aa", b"ab", b"aaab")
    assert tokenizer.encode("aaabdaaabac") == [258, ord("d"), 258, ord("a"), ord("c")]
    # After these three no pair occurs twice, so a larger vocabulary is not filled.
    assert train_bpe(["aaabdaaabac"], 999, pattern=WHOLE).vocab_size == 256 + 3 + len(SPECIALS)


def test_overlapping_pairs_and_ties():
    assert train_bpe(["abab"], 256, specials=()).tokens == tuple(BYTES)
    # aa is in "aaa" twice, as often as bc in "bc bc"; the tie goes to the smaller pair of ids.
    assert train_bpe(["bcbcaaa"], 257, pattern=WHOLE, specials=()).tokens[256:] == (b"aa",)
    assert train_bpe(["bcbcbcaaa"], 257, pattern=WHOLE, specials=()).tokens[256:] == (b"bc",)
    # aaaaa: 4 overlapping aa; then (aa)(aa)a holds each pair once.
    assert train_bpe(["aaaaa"], 999, pattern=WHOLE, specials=()).tokens[256:] == (b"aa",)


@few
@given(
    texts=st.lists(repetitive, min_size=1, max_size=6).filter(any),
    pattern=st.sampled_from([PATTERN, WHOLE]),
)
def test_training_equals_full_recount(texts, pattern):
    tokens, cut = slow_train(texts, 40, pattern)
    tokenizer = train_bpe(texts, 256 + 40 + len(SPECIALS), pattern=pattern)
    assert list(tokenizer.tokens) == tokens
    # The encoder ends where the training ended on the very texts that it was trained on.
    assert sum(tokenizer.encode_batch(texts), []) == cut


def test_training_equals_full_recount_on_a_corpus():
    texts = texts_of(1, n=60)
    assert list(train_bpe(texts, 400, specials=()).tokens) == slow_train(texts, 144, PATTERN)[0]


@pytest.mark.parametrize("name", HOSTILE)
def test_encoding_of_hostile_text_equals_slow_encoder(name):
    text = HOSTILE[name]
    ids = TRAINED.encode(text)
    assert ids == slow_encode(text, TRAINED.tokens, PATTERN)
    assert TRAINED.decode(ids) == text and TRAINED.decode_bytes(ids) == text.encode()
    assert max(ids, default=0) < len(TRAINED.tokens)  # no special, however the text looks
    assert sum(len(TRAINED.tokens[i]) for i in ids) == len(text.encode())


def test_encoding_of_long_chunks_equals_slow_encoder():
    tokenizer = train_bpe(texts_of(2, n=40), 500, pattern=WHOLE)
    text = "".join(texts_of(3, n=12)) + "aaaaaaa"  # some 700 bytes
    assert tokenizer.encode(text) == slow_encode(text, tokenizer.tokens, WHOLE)


@few
@given(text=st.text(max_size=80) | repetitive)
def test_any_text_comes_back(text):
    ids = TRAINED.encode(text)
    assert TRAINED.decode(ids) == text
    assert max(ids, default=0) < len(TRAINED.tokens)
    assert sum(len(TRAINED.tokens[i]) for i in ids) == len(text.encode())


@pytest.mark.parametrize("character", [*"a \n7!é\u0301😀", "\r\n", "a\u0301", "\t "])
def test_chunks_are_bounded_whatever_the_run(character):
    text = "x" + character * 100_000 + "x"
    assert max(map(len, regex.findall(PATTERN, text))) <= 33
    assert TRAINED.decode(TRAINED.encode(text)) == text


def test_half_a_surrogate_pair_is_an_error_not_a_question_mark():
    for call in (TRAINED.encode, lambda text: train_bpe([text], 300)):
        with pytest.raises(UserError, match=r"surrogate pair.*clean it") as caught:
            call("so \ud83d far")
        assert "\n" not in str(caught.value)
    assert TRAINED.decode(TRAINED.encode("\U0001f600")) == "\U0001f600"


@pytest.mark.parametrize(
    "text, chunks",
    [
        ("Hello, world!", ["Hello", ",", " world", "!"]),
        ("don't we'll", ["don", "'t", " we", "'ll"]),
        ("in 12345 x", ["in", " 12", "34", "5", " x"]),
        ("a   b\n\nc  ", ["a", "  ", " b", "\n", "\n", "c", "  "]),
        ("a\r\nb\t", ["a", "\r", "\n", "b", "\t"]),
        ("été e\u0301te\u0301 ok", ["été", " e\u0301te\u0301", " ok"]),
        ("❤️ x", ["❤️", " x"]),
        ("[MASK]<|endoftext|>", ["[", "MASK", "]<|", "endoftext", "|>"]),
        ("a" * 40, ["a" * 32, "a" * 8]),
        (" " * 20 + "b", [" " * 16, " " * 3, " b"]),
    ],
)
def test_pattern_cuts(text, chunks):
    assert regex.findall(PATTERN, text) == chunks


@few
@given(text=st.text(max_size=80))
def test_patterns_lose_no_character(text):
    assert "".join(regex.findall(PATTERN, text)) == text
    assert regex.findall(CHAR_PATTERN, text) == list(text)


def test_character_level():
    text = "naïve café: 😀 😀 ï é\n" * 3
    tokenizer = train_bpe([text], 1000, pattern=CHAR_PATTERN)
    assert len(tokenizer.encode(text)) == len(text)  # one token a character, those of 4 bytes too
    assert {*tokenizer.tokens[256:]} >= {"ï".encode(), "é".encode(), "😀".encode()}
    assert all(len(tokenizer.encode(c)) == 1 for c in set(text))
    assert tokenizer.encode("漢字") == list("漢字".encode())  # not seen in training


def test_training_depends_on_chunk_counts_alone():
    texts = texts_of(4)
    shuffled = random.Random(0).sample(texts, len(texts))
    tokenizer = train_bpe(texts, 500)
    assert tokenizer.hash == train_bpe(iter(shuffled), 500).hash == train_bpe(texts, 500).hash
    assert tokenizer.hash == train_bpe("".join(texts), 500).hash  # each text ends a line
    longer = train_bpe(texts, 520)
    assert longer.tokens[: len(tokenizer.tokens)] == tokenizer.tokens  # merges do not look ahead


def test_specials_follow_the_tokens():
    n = len(TRAINED.tokens)
    assert TRAINED.vocab_size == 600 == n + len(SPECIALS) == TRAINED.encoding.n_vocab
    assert [TRAINED.special(name) for name in SPECIALS] == list(range(n, n + 5))
    assert TRAINED.decode([TRAINED.special("[CLS]"), 65, TRAINED.special("[SEP]")]) == "[CLS]A[SEP]"
    with pytest.raises(UserError, match=r"no special token '\[USER\]'.*\[PAD\]"):
        TRAINED.special("[USER]")


def test_batch_and_kinds_of_ids():
    texts = texts_of(5, n=3)
    batch = TRAINED.encode_batch(text for text in texts)
    assert batch == [TRAINED.encode(text) for text in texts]
    assert TRAINED.decode(np.array(batch[0], dtype=np.uint16)) == texts[0]
    assert TRAINED.decode([]) == "" and TRAINED.decode([0xC3]) == "\ufffd"
    assert TRAINED.decode_bytes([0xC3, 0xA9]) == "é".encode()
    for wrong in (-1, 600):
        with pytest.raises(UserError, match=r"ids must be in 0\.\.599"):
            TRAINED.decode([65, wrong])


@pytest.mark.parametrize("lowercase", [False, True])
def test_documents_are_encoded_as_one_by_one(lowercase):
    tokenizer = train_bpe(texts_of(5), 400, lowercase=lowercase)
    end = tokenizer.special("<|endoftext|>")
    texts = [*texts_of(7, n=4), "\u039f\u03a3", "", " ", "a\n", "\n\nb", "[MASK] \u0130"]
    for docs in (texts, [*texts, "so <|endoftext|> ends <|ENDOFTEXT|>"], texts[::-1]):
        ids = [i for doc in docs for i in (end, *tokenizer.encode(doc))]
        got = tokenizer.encode_documents(docs)
        assert got.tolist() == ids and got.dtype == np.uint32
        cut = [docs[0], Rest(" " + docs[0]), *docs[1:]]
        ids = [end, *tokenizer.encode(docs[0]), *tokenizer.encode(" " + docs[0])]
        assert tokenizer.encode_documents(cut).tolist()[: len(ids)] == ids
        assert tokenizer.encode_documents([Rest("b c")]).tolist() == tokenizer.encode("b c")
    with pytest.raises(UserError, match="half a surrogate pair"):
        tokenizer.encode_documents(["a", "\ud800"])


@pytest.mark.parametrize("pattern", [PATTERN, CHAR_PATTERN])
def test_save_and_load(tmp_path, pattern):
    tokenizer = train_bpe(texts_of(6), 320, pattern=pattern, specials=("<|endoftext|>", "[A]"))
    folder = tmp_path / "deep" / "er"
    tokenizer.save(folder)
    for source in (folder, str(folder / FILE_NAME)):
        loaded = Tokenizer.load(source)
        assert loaded.hash == tokenizer.hash and loaded.vocab_size == tokenizer.vocab_size
        assert loaded.special("[A]") == tokenizer.special("[A]")
        for text in HOSTILE.values():
            assert loaded.encode(text) == tokenizer.encode(text)
    assert [p.name for p in folder.iterdir()] == [FILE_NAME]
    assert Tokenizer.load(source).hash != TRAINED.hash


def b64(token):
    return base64.b64encode(token).decode()


DAMAGE = {
    "another format": (lambda saved: saved.update(format="x"), "format is not"),
    "no tokens": (lambda saved: saved.pop("tokens"), "not a whole .*'tokens'"),
    "not base64": (lambda saved: saved["tokens"].append("*"), "not a whole"),
    "tokens of another type": (lambda saved: saved.update(tokens=[1, 2]), "not a whole"),
    "repeated token": (lambda saved: saved["tokens"].append(b64(b"a")), "1 are repeated"),
    "missing byte": (lambda saved: saved["tokens"].remove(b64(b"a")), "1 are missing"),
    "repeated special": (lambda saved: saved["specials"].append("[PAD]"), "specials must differ"),
    "no regex": (lambda saved: saved.update(pattern="(a"), "not a regex"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_file(tmp_path, name):
    edit, message = DAMAGE[name]
    TRAINED.save(tmp_path)
    saved = json.loads((tmp_path / FILE_NAME).read_text())
    edit(saved)
    (tmp_path / FILE_NAME).write_text(json.dumps(saved))
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value) and FILE_NAME in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\x00\x80", b"hello", None])
def test_file_that_is_no_tokenizer(tmp_path, content):
    TRAINED.save(tmp_path)
    half = (tmp_path / FILE_NAME).read_bytes()[:3000]
    (tmp_path / FILE_NAME).write_bytes(half if content is None else content)
    with pytest.raises(UserError, match="not a whole tokenizer file.*make it again") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    for path in (tmp_path, tmp_path / "absent", tmp_path / "absent.json"):
        with pytest.raises(UserError, match=r"no tokenizer at .*gpt2"):
            Tokenizer.load(path)


def test_gpt2_by_name(tmp_path, monkeypatch):
    # A stand-in with gpt2's traits: bytes in another order, one special. No network in tests.
    tokens = [*reversed(BYTES), b"th", b"the"]
    small = tiktoken.Encoding(
        "gpt2",
        pat_str=r"\S+|\s+",
        mergeable_ranks={token: i for i, token in enumerate(tokens)},
        special_tokens={"<|endoftext|>": 258},
    )
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": small}.__getitem__)
    tokenizer = Tokenizer.load("gpt2")
    for text in HOSTILE.values():
        assert tokenizer.encode(text) == small.encode_ordinary(text)
    assert tokenizer.encode("the") == [257] and tokenizer.tokens[257] == b"the"
    assert tokenizer.special("<|endoftext|>") == 258 and tokenizer.vocab_size == 259
    with pytest.raises(UserError, match=r"\[MASK\]"):
        tokenizer.special("[MASK]")
    tokenizer.save(tmp_path)  # a checkpoint keeps its own copy
    assert Tokenizer.load(tmp_path).hash == tokenizer.hash


@pytest.mark.parametrize("error", [ConnectionError("a\nb"), ValueError("Hash mismatch\nfor")])
def test_gpt2_out_of_reach(monkeypatch, error):
    def unreachable(name):
        raise error

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR") as caught:
        Tokenizer.load("gpt2")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "texts, kwargs, message",
    [
        (["abc"], {"vocab_size": 260}, "at least 261.*got 260"),
        (["abc"], {"vocab_size": 0, "specials": ()}, "at least 256"),
        ([], {}, "no text"),
        (["", ""], {}, "no text"),
        (["abc"], {"pattern": "(a"}, "not a regex"),
        (["abc\nd"], {"pattern": "[a-z]"}, "leaves out 1"),
        (["aab"], {"pattern": "a*|b"}, "must not match the empty"),
        (["abc"], {"pattern": r"(?s:.)(?=\m|\M|)"}, "not a regex"),  # for tiktoken, it is for regex
        (["abc"], {"specials": ("[A]", "[A]")}, "specials must differ"),
        (["abc"], {"specials": ("",)}, "none be empty"),
    ],
)
def test_bad_training_input(texts, kwargs, message):
    with pytest.raises(UserError, match=message) as caught:
        train_bpe(texts, **{"vocab_size": 300, **kwargs})
    assert "\n" not in str(caught.value)


def test_lowercase_is_of_training_encoding_and_saving(tmp_path):
    tokenizer = train_bpe(["Low LOW low Lower"], 265, lowercase=True)
    assert b"low" in tokenizer.tokens and b"Low" not in tokenizer.tokens
    assert tokenizer.decode(tokenizer.encode("LOW İ")) == "LOW İ".lower()
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.lowercase and loaded.encode("A Low") == tokenizer.encode("a low")
    assert loaded.hash == tokenizer.hash != Tokenizer(tokenizer.tokens).hash
