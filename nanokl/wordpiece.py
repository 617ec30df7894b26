"""WordPiece, BERT's tokenizer, with a vocabulary that somebody has learnt.

    clean, spaces around CJK, no accents, lower case -> words and punctuation -> longest pieces

A word is cut from the left into the longest pieces that the vocabulary has, those after the first
written with ## in front; one that cannot be cut so is [UNK], as one of over 100 characters is.
Schuster & Nakajima 2012; Devlin et al. arXiv:1810.04805. Left out: learning a vocabulary, special
tokens in a text (only code places them).
"""

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

from nanokl import UserError
from nanokl.tokenizer import lower

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LONGEST = 100  # characters of a word
VOCAB, OPTIONS = "vocab.txt", "tokenizer_config.json"  # the files
CJK = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F),
       (0x2B740, 0x2B81F), (0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))


@lru_cache(1 << 16)
def clean(c: str) -> str:
    """A character, a space in the place of white space, nothing in that of control characters."""
    kind = unicodedata.category(c)
    if c in "\t\n\r" or (c.isspace() and kind != "Cc"):
        return " "
    return "" if c == "\ufffd" or kind in ("Cc", "Cf", "Co", "Cs") else c


@lru_cache(1 << 16)
def stands_alone(c: str) -> bool:
    """Punctuation, ASCII's symbols among it."""
    return unicodedata.category(c)[0] == "P" or (c.isascii() and unicodedata.category(c)[0] == "S")


def is_cjk(c: str) -> bool:
    """A character of a script that puts no spaces between words; of Chinese's blocks alone."""
    return any(low <= ord(c) <= high for low, high in CJK)


class WordPiece:
    """Text to token ids and back, as Tokenizer; text does not come back as it was.

    pieces: in id order, the special tokens among them. strip_accents: as lowercase unless given.
    UserError if a piece repeats or is empty, or a special token is missing.
    """

    def __init__(self, pieces: Sequence[str], *, lowercase: bool = True,
                 strip_accents: bool | None = None, spaced_cjk: bool = True):
        self.pieces, self.lowercase, self.spaced_cjk = tuple(pieces), lowercase, spaced_cjk
        self.strip_accents = lowercase if strip_accents is None else strip_accents
        for name in ("lowercase", "spaced_cjk", "strip_accents"):
            if type(getattr(self, name)) is not bool:
                raise UserError(f"{name} is {getattr(self, name)!r}: give true or false")
        self.specials, self.vocab_size = SPECIALS, len(self.pieces)
        self._ids = {piece: i for i, piece in enumerate(self.pieces)}
        if len(self._ids) < len(self.pieces) or "" in self._ids:
            raise UserError(f"{len(self.pieces) - len(self._ids)} pieces of the vocabulary are "
                            f"repeated, {self.pieces.count('')} empty: each has a text of its own")
        if missing := [name for name in SPECIALS if name not in self._ids]:
            raise UserError(f"the vocabulary has no {', '.join(missing)}: give one of BERT's kind")
        self.special_ids = tuple(self._ids[name] for name in SPECIALS)
        self._cut = lru_cache(1 << 16)(self._pieces_of)

    @cached_property
    def tokens(self) -> tuple[bytes, ...]:
        """Each piece's bytes as a Tokenizer has them: a space begins a word, b"" is special."""
        return tuple(b"" if piece in SPECIALS else piece[2:].encode() if piece.startswith("##")
                     else b" " + piece.encode() for piece in self.pieces)

    def normalise(self, text: str) -> str:
        """The text as pieces see it."""
        text = "".join(map(clean, text))
        if text.isascii():  # neither Chinese nor accents
            return lower(text) if self.lowercase else text
        if self.spaced_cjk:
            text = "".join(f" {c} " if is_cjk(c) else c for c in text)
        if self.strip_accents:
            text = unicodedata.normalize("NFD", text)
            text = "".join(c for c in text if unicodedata.category(c) != "Mn")
        return lower(text) if self.lowercase else text

    def words(self, text: str) -> Iterator[str]:
        """Words and single punctuation of a normalised text."""
        for run in text.split():
            start = 0
            for i, c in enumerate(run):
                if stands_alone(c):
                    if start < i:
                        yield run[start:i]
                    yield c
                    start = i + 1
            if start < len(run):
                yield run[start:]

    def _pieces_of(self, word: str) -> tuple[int, ...]:
        unknown = (self._ids["[UNK]"],)
        if len(word) > LONGEST:
            return unknown
        ids, start = [], 0
        while start < len(word):
            begin = "##" if start else ""
            for end in range(len(word), start, -1):
                if (found := self._ids.get(begin + word[start:end])) is not None:
                    break
            else:
                return unknown
            ids.append(found)
            start = end
        return tuple(ids)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, no special token but [UNK] among them."""
        return [i for word in self.words(self.normalise(text)) for i in self._cut(word)]

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Ids of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Pieces, a space before each that begins a word; UserError outside the vocabulary."""
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise UserError(f"ids must be in 0..{self.vocab_size - 1}, got {min(ids)}..{max(ids)}; "
                            "were they made with another tokenizer?")
        return " ".join(self.pieces[i] for i in ids).replace(" ##", "")

    def special(self, name: str) -> int:
        """Id of a special token; UserError if there is none of that name."""
        if name not in self.specials:
            raise UserError(f"WordPiece has no special token {name!r}, only {list(self.specials)}")
        return self._ids[name]

    @cached_property
    def files(self) -> dict[str, bytes]:
        """What `save` writes, by name."""
        options = {"tokenizer_class": "BertTokenizer", "do_lower_case": self.lowercase,
                   "strip_accents": self.strip_accents, "tokenize_chinese_chars": self.spaced_cjk}
        return {VOCAB: "".join(f"{piece}\n" for piece in self.pieces).encode(),
                OPTIONS: (json.dumps(options, indent=1) + "\n").encode()}

    @cached_property
    def hash(self) -> str:
        """SHA-256, in hex, of `files`: equal for equal tokenizers only."""
        return hashlib.sha256(b"".join(self.files.values())).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write vocab.txt, a piece a line, and tokenizer_config.json: BERT's own layout."""
        for name, data in self.files.items():
            (Path(folder) / name).write_bytes(data)
