r"""Byte-level BPE: trained here, exactly and reproducibly; run by tiktoken.

A pattern cuts the text into chunks (words, numbers, punctuation, spaces). Each chunk starts as its
UTF-8 bytes, and the merges, in the order in which they were learnt, join neighbours inside it.
Every byte is a token, so every text has ids and none is "unknown". Left out: Unigram, normalisation
but for lower-casing on demand, special tokens in a text (only code places them). WordPiece is
wordpiece.py's, and hf_tokenizer.py finds the tokenizer of a folder, whichever it has.
"""

import base64
import hashlib
import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import regex
import tiktoken

from nanokl import UserError

SPECIALS = ("<|endoftext|>", "[PAD]", "[CLS]", "[SEP]", "[MASK]")
FILE_NAME = "tokenizer.nanokl.json"
FORMAT = "nanokl tokenizer 1"

# GPT-2's classes, with two changes. Digits go in pairs, so that a small vocabulary is not spent on
# numbers; and runs are bounded, since a merge rewrites each chunk that it touches from end to end.
PATTERN = (
    r"'(?:[sdmt]|ll|re|ve)"  # the end of an English contraction
    r"| ?\p{L}[\p{L}\p{M}]{0,31}"  # a word and the space before it; combining marks stay on it
    r"| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]{1,16}"
    r"|\s{1,16}(?!\S)|\s"  # white space, but for the last, which goes with the word that follows
)
CHAR_PATTERN = r"(?s:.)"  # one character a chunk: merges only join the bytes of one character


class Rest(str):
    """More text of the document before it, for documents that come in parts."""


class Tokenizer:
    """Text to token ids and back: the BPE tokens in id order, then the special tokens.

    tokens holds the bytes of each BPE token, its index being its id and its priority in merging;
    b"" is the place of a special token, the first specials', the others follow. UserError if a
    token repeats, one of the 256 single bytes is missing, or the pattern is wrong.
    """

    def __init__(self, tokens: Sequence[bytes], *, specials: Sequence[str] = SPECIALS,
                 pattern: str = PATTERN, lowercase: bool = False):
        ranks = {token: i for i, token in enumerate(tokens) if token}
        places = [i for i, token in enumerate(tokens) if not token]
        # tiktoken accepts the first two mistakes, then panics (no Exception) or gives wrong ids.
        if missing := [b for b in range(256) if bytes([b]) not in ranks]:
            raise UserError(f"tokens must hold all 256 single bytes, {len(missing)} are missing")
        if repeated := len(tokens) - len(places) - len(ranks):
            raise UserError(f"tokens must differ, {repeated} are repeated")
        if len(places) > len(specials):
            raise UserError(f"{len(places)} tokens are empty, and {len(specials)} specials: give "
                            "each empty one a name")
        _utf8("".join(specials))
        if len(set(specials)) < len(specials) or "" in specials:
            raise UserError(f"specials must differ and none be empty, got {list(specials)}")
        self.tokens, self.specials, self.pattern = tuple(tokens), tuple(specials), pattern
        self.lowercase = lowercase  # as the text was that it learnt from
        self.vocab_size = len(ranks) + len(specials)
        places += range(len(tokens), self.vocab_size)
        self.special_ids = tuple(places)
        self._special_ids = dict(zip(specials, places, strict=True))
        try:
            self.encoding = tiktoken.Encoding(
                "nanokl", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self._special_ids)
        except ValueError as error:
            raise UserError(f"the pattern is not a regex: {_one_line(error)}") from error

    def encode(self, text: str) -> list[int]:
        """Ids of a text, no special among them; UserError for half a surrogate pair."""
        _utf8(text)  # tiktoken would turn half a surrogate pair into U+FFFD and say nothing
        try:
            return self.encoding.encode_ordinary(lower(text) if self.lowercase else text)
        except BaseException as error:  # tiktoken panics where a pattern asks too much
            if type(error).__name__ != "PanicException":
                raise
            raise UserError(f"the pattern {self.pattern!r} cannot cut this text "
                            f"({_one_line(error)}): use another tokenizer") from None

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Ids of each text, as `encode` gives them."""
        return [self.encode(text) for text in texts]  # for lines, 8 times faster than threads

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray:
        """Ids (n,) uint32 of documents, each behind <|endoftext|>; a Rest has none before it.

        One call of tiktoken for all of them, outside of Python's lock: threads pay.
        """
        end, end_id = SPECIALS[0], self.special(SPECIALS[0])
        text = "".join([text if isinstance(text, Rest) else end + text for text in texts])
        _utf8(text)
        text = lower(text) if self.lowercase else text
        if text.count(end) == sum(not isinstance(text, Rest) for text in texts):
            return self.encoding.encode_to_numpy(text, allowed_special={end}, disallowed_special=())
        # a document spells the special token, which is plain text there
        ids = [[end_id] * (not isinstance(text, Rest)) + self.encode(text) for text in texts]
        return np.concatenate(ids).astype(np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, specials by their names, U+FFFD where their bytes are not UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of the ids (any iterable, a tensor too); UserError outside the vocabulary."""
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise UserError(f"ids must be in 0..{self.vocab_size - 1}, got {min(ids)}..{max(ids)}; "
                            "were they made with another tokenizer?")
        return self.encoding.decode_bytes(ids)

    def special(self, name: str) -> int:
        """Id of a special token; UserError if this tokenizer has none of that name."""
        if name not in self._special_ids:
            raise UserError(f"this tokenizer has no special token {name!r}, only "
                            f"{list(self.specials)}; train one that has it with train_bpe")
        return self._special_ids[name]

    @cached_property
    def _text(self) -> str:
        saved = {"format": FORMAT, "pattern": self.pattern, "specials": self.specials,
                 "lowercase": self.lowercase,
                 "tokens": [base64.b64encode(token).decode() for token in self.tokens]}
        return json.dumps(saved, indent=0) + "\n"  # ASCII, a fixed order: one text, one hash

    @cached_property
    def hash(self) -> str:
        """SHA-256, in hex, of the text that `save` writes: equal for equal tokenizers only."""
        return hashlib.sha256(self._text.encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write folder/tokenizer.nanokl.json: text, one token a line."""
        path = Path(folder) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self._text.encode())  # bytes: the same file, line ends too, anywhere

    @classmethod
    def load(cls, folder_or_name: str | Path) -> "Tokenizer":
        """A saved tokenizer from its folder or file, or "gpt2"; UserError if missing or damaged."""
        if folder_or_name == "gpt2":
            return cls._gpt2()
        path = Path(folder_or_name)
        path = path / FILE_NAME if path.is_dir() else path
        try:
            saved = json.loads(path.read_bytes())
            if not isinstance(saved, dict) or saved.get("format") != FORMAT:
                raise UserError(f"its format is not {FORMAT!r}")
            tokens = [base64.b64decode(token, validate=True) for token in saved["tokens"]]
            return cls(tokens, specials=saved["specials"], pattern=saved["pattern"],
                       lowercase=saved["lowercase"])
        except OSError as error:
            raise UserError(f"no tokenizer at {path} ({error.strerror}); give a folder with "
                            f'{FILE_NAME}, that file, or "gpt2"') from error
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(f"{path} is not a whole tokenizer file: {_one_line(error)}; make it "
                            "again with the data folder's prepare.py") from error

    @classmethod
    def _gpt2(cls) -> "Tokenizer":
        try:
            gpt2 = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:  # no network; a file with the wrong hash
            raise UserError(f"tiktoken cannot get gpt2's files ({type(error).__name__}): connect "
                            "once, or set TIKTOKEN_CACHE_DIR to their folder") from error
        # Its single bytes have ids in an order of their own; its one special is the last id.
        tokens = [gpt2.decode_single_token_bytes(i) for i in range(gpt2.eot_token)]
        return cls(tokens, specials=SPECIALS[:1], pattern=gpt2._pat_str)


def lower(text: str) -> str:
    """Lower case by character: a capital sigma does not depend on whether it ends a word."""
    return text.replace("\u03a3", "\u03c3").lower()


def train_bpe(texts: Iterable[str], vocab_size: int, *, pattern: str = PATTERN,
              specials: Sequence[str] = SPECIALS, lowercase: bool = False) -> Tokenizer:
    """Learn byte-pair merges from texts until the vocabulary, specials counted, is full.

    `lowercase`: it, and encode, lower-case their texts first, and decode gives no capitals back.
    It stops early when no pair occurs twice. How often each chunk occurs decides everything.
    UserError if vocab_size is below 256 + specials, the texts are empty or the pattern is wrong.
    """
    n_merges = vocab_size - 256 - len(specials)
    if n_merges < 0:
        raise UserError(f"vocab_size must be at least {256 + len(specials)} (256 bytes + "
                        f"{len(specials)} specials), got {vocab_size}")
    texts = [texts] if isinstance(texts, str) else texts
    chunks = _count_chunks((lower(t) if lowercase else t for t in texts), pattern)
    tokens = [bytes([b]) for b in range(256)]
    words = [_utf8(chunk).decode("latin-1") for chunk in chunks]
    for left, right in _learn_merges(words, list(chunks.values()), n_merges):
        tokens.append(tokens[ord(left)] + tokens[ord(right)])
    return Tokenizer(tokens, specials=specials, pattern=pattern, lowercase=lowercase)


def _count_chunks(texts: Iterable[str], pattern: str) -> Counter[str]:
    """How often each chunk occurs, cut by `regex`; tiktoken cuts with another engine.

    On characters too new for one's Unicode tables they differ: this costs compression, no more.
    """
    try:
        splitter = regex.compile(pattern)
    except regex.error as error:
        raise UserError(f"the pattern is not a regex: {_one_line(error)}") from error
    chunks, length = Counter(), 0
    for text in texts:
        length += len(text)
        chunks.update(match.group() for match in splitter.finditer(text))
    if not length:
        raise UserError("there is no text to train on: all texts are empty")
    # tiktoken panics on an empty chunk, and drops what no chunk holds: decode cannot give it back.
    if left_out := length - sum(len(chunk) * n for chunk, n in chunks.items()):
        raise UserError(f"the pattern must match every character, it leaves out {left_out}")
    if "" in chunks:
        raise UserError("the pattern must not match the empty text; use + in place of *")
    return chunks


# Sennrich, Haddow & Birch (2016), algorithm 1. With n_w the occurrences of the unique chunk w, a
# string of one character chr(id) for each token, which gets shorter merge by merge:
#     count(a, b) = sum_w n_w |{i : (w_i, w_i+1) = (a, b)}|      overlaps count: aaa holds aa twice
#     next merge  = the pair of the largest count >= 2; of those, the smallest (a, b) by token id
# Recounting at each merge costs merges x corpus. Here a merge only visits the chunks that hold its
# pair. No two merges ever make the same bytes: a span between two token boundaries has only ever
# been merged from within, left to right, so at each step equal bytes are cut alike everywhere.
def _learn_merges(words: list[str], n: list[int], n_merges: int) -> list[tuple[str, str]]:
    count, where = defaultdict(int), defaultdict(set)  # where: the chunks that (may) hold a pair
    for w, word in enumerate(words):
        for pair in pairwise(word):
            count[pair] += n[w]
            where[pair].add(w)
    heap = [(-c, pair) for pair, c in count.items() if c > 1]
    heapq.heapify(heap)
    merges = []
    while heap and len(merges) < n_merges:
        negative, best = heapq.heappop(heap)
        if count[best] != -negative:
            continue  # out of date: the change of its count has pushed another entry
        change = defaultdict(int)
        for w in where.pop(best):
            for pair in pairwise(words[w]):
                change[pair] -= n[w]
            words[w] = words[w].replace("".join(best), chr(256 + len(merges)))
            for pair in pairwise(words[w]):
                change[pair] += n[w]
                where[pair].add(w)
        merges.append(best)
        for pair, difference in change.items():
            count[pair] += difference
            if difference and count[pair] > 1:
                heapq.heappush(heap, (-count[pair], pair))
    return merges


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"the text holds {text[error.start]!r}, half a surrogate pair; clean it "
                        "with text.encode('utf-8', 'replace').decode()") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
