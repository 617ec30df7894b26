"""The tokenizer of a folder: nanokl's, or GPT-2's and BERT's in Hugging Face's files; both ways.

    tokenizer.nanokl.json                          BPE trained here
    vocab.json, merges.txt      tokenizer.json     GPT-2: byte-level BPE -> Tokenizer
    vocab.txt                   tokenizer.json     BERT: WordPiece -> WordPiece

tiktoken merges whatever pair makes a known token, theirs only the pairs of a list. The two agree
where each token, cut by what was learnt before it, falls into the two parts of its own merge; that
is checked. Left out: other normalisers and models, tokens that were added to be found in a text.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from nanokl import UserError
from nanokl.tokenizer import CHAR_PATTERN, FILE_NAME, PATTERN, Tokenizer
from nanokl.wordpiece import LONGEST, OPTIONS, VOCAB, WordPiece

BPE_VOCAB, MERGES, WHOLE = "vocab.json", "merges.txt", "tokenizer.json"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PATTERNS = (GPT2_PATTERN, PATTERN, CHAR_PATTERN)
MOST_WORK = 10**8  # bytes squared, over the tokens whose merges are checked; GPT-2 has 2.5 million


def byte_letters() -> dict[int, str]:
    """A visible character for each byte: itself where Latin-1 shows one, else from U+0100 on."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [b for b in range(256) if b not in shown]
    return {b: chr(b) if b in shown else chr(256 + hidden.index(b)) for b in range(256)}


def load_tokenizer(folder: str | Path) -> Tokenizer | WordPiece:
    """The tokenizer of a model's folder; UserError if it is missing, damaged or of another size."""
    folder = Path(folder)
    own = (folder / FILE_NAME).is_file() or not any((folder / name).is_file() for name in READERS)
    try:
        found = [Tokenizer.load(folder)] if own else [
            read(folder) for name, read in READERS.items() if (folder / name).is_file()]
        same = len({tokenizer.hash for tokenizer in found}) == 1
        size = _model_size(folder)
    except UserError as error:
        if own:
            raise
        raise UserError(f"the tokenizer of {folder} cannot be used: {error}") from None
    # somebody else's files may hold any values, and fail anywhere
    except (OSError, ValueError, LookupError, ArithmeticError, TypeError, AttributeError,
            RecursionError) as error:
        raise UserError(f"the tokenizer of {folder} is damaged ({type(error).__name__}: "
                        f"{' '.join(str(error).split())}): use another folder") from None
    if not same:
        raise UserError(f"{folder / WHOLE} and the vocabulary beside it are not the same: use "
                        "another folder")
    if size not in (None, found[0].vocab_size):
        raise UserError(f"the tokenizer of {folder} has {found[0].vocab_size} tokens, its model "
                        f"{size}: use a folder in which they agree")
    return found[0]


def _model_size(folder: Path) -> int | None:
    """The vocabulary of the model beside a tokenizer; None without one."""
    config = _json(folder / "config.json")
    config = config.get("config", config)  # nanokl's
    return config.get("trunk_config", config).get("vocab_size")


def _json(path: Path) -> dict:
    saved = json.loads(path.read_bytes()) if path.is_file() else {}
    if not isinstance(saved, dict):
        raise UserError(f"{path.name} holds no object")
    return saved


def _require(given: Mapping, where: str, **wanted) -> None:
    """UserError for the first of some options that is there and not as wanted."""
    for name, value in wanted.items():
        if given.get(name, value) != value:
            raise UserError(f"{where} has {name} {given[name]!r}: only {value!r} is read")


def _wordpiece(pieces: Sequence[str], normalizer: Mapping) -> WordPiece:
    return WordPiece(pieces, lowercase=normalizer.get("lowercase", True),
                     strip_accents=normalizer.get("strip_accents"),
                     spaced_cjk=normalizer.get("handle_chinese_chars", True))


def read_vocab_txt(folder: Path) -> WordPiece:
    """From vocab.txt, a piece a line, and the options of tokenizer_config.json."""
    text = (folder / VOCAB).read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    given = _json(folder / OPTIONS)
    _require(given, OPTIONS, do_basic_tokenize=True, never_split=None)
    names = {"do_lower_case": "lowercase", "strip_accents": "strip_accents",
             "tokenize_chinese_chars": "handle_chinese_chars"}
    options = {ours: given[theirs] for theirs, ours in names.items() if theirs in given}
    return _wordpiece(text.removesuffix("\n").split("\n"), options)


def read_merges(folder: Path) -> Tokenizer:
    """From vocab.json and merges.txt, and the special tokens that the other files name."""
    given, added = _json(folder / OPTIONS), _json(folder / "added_tokens.json")
    _require(given, OPTIONS, add_prefix_space=False)
    named = {**given, **_json(folder / "special_tokens_map.json")}
    specials = {"<|endoftext|>", *added}
    for key, value in named.items():
        if key.endswith("_token"):
            specials.add(value["content"] if isinstance(value, dict) else value)
    lines = (folder / MERGES).read_bytes().decode().replace("\r\n", "\n").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    return bpe({**_json(folder / BPE_VOCAB), **added}, merges, specials)


def read_whole(folder: Path) -> Tokenizer | WordPiece:
    """From tokenizer.json, of either kind."""
    saved = _json(folder / WHOLE)
    model, normalizer, splitter = (saved.get(k) or {} for k in
                                   ("model", "normalizer", "pre_tokenizer"))
    added = {token["content"]: token["id"] for token in saved.get("added_tokens") or ()}
    kind = model.get("type") or ("BPE" if "merges" in model else "WordPiece")  # of before 2021
    if kind == "WordPiece":
        _require(model, WHOLE, unk_token="[UNK]", continuing_subword_prefix="##",
                 max_input_chars_per_word=LONGEST)
        _require({"type": None, **normalizer}, WHOLE, type="BertNormalizer", clean_text=True)
        _require({"type": None, **splitter}, WHOLE, type="BertPreTokenizer")
        if set(added) - set(model["vocab"]):
            raise UserError(f"{WHOLE} adds tokens to its vocabulary, which is not read")
        return _wordpiece(_in_order(model["vocab"]), normalizer)
    if kind != "BPE":
        raise UserError(f"{WHOLE} holds a {kind!r} model: only BPE and WordPiece are read")
    _require(model, WHOLE, dropout=None, unk_token=None, byte_fallback=False, ignore_merges=False)
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UserError(f"{WHOLE} marks its subwords: only byte-level BPE is read")
    _require(normalizer, WHOLE, type="Lowercase")
    steps = splitter.get("pretokenizers", [splitter])
    pattern = GPT2_PATTERN
    if len(steps) == 2:
        _require(steps[0], WHOLE, type="Split", behavior="Isolated", invert=False)
        pattern = steps[0]["pattern"]["Regex"]
        if pattern not in PATTERNS:
            raise UserError(f"{WHOLE} cuts texts by {pattern!r}: only patterns of GPT-2 and nanokl "
                            "are read, which leave nothing out")
    if (len(steps) not in (1, 2) or steps[-1].get("type") != "ByteLevel"
            or steps[-1].get("use_regex", True) != (len(steps) == 1)):
        raise UserError(f"{WHOLE} cuts texts in another way: only ByteLevel is read, by itself or "
                        "behind one Split")
    _require(steps[-1], WHOLE, add_prefix_space=False)
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    return bpe({**model["vocab"], **added}, merges, set(added), pattern=pattern,
               lowercase=bool(normalizer))


READERS = {VOCAB: read_vocab_txt, BPE_VOCAB: read_merges, WHOLE: read_whole}


def _in_order(vocab: Mapping[str, int]) -> list[str]:
    """The tokens by id; UserError unless the ids are 0, 1, 2, ..."""
    names = {i: name for name, i in vocab.items()}
    if set(names) != set(range(len(vocab))) or not all(type(i) is int for i in vocab.values()):
        raise UserError(f"the ids of {len(vocab)} tokens are not 0 to {len(vocab) - 1}")
    return [names[i] for i in range(len(vocab))]


def bpe(vocab: Mapping[str, int], merges: Sequence[Sequence[str]], specials: Collection[str], *,
        pattern: str = GPT2_PATTERN, lowercase: bool = False) -> Tokenizer:
    """A Tokenizer of byte-level tokens in their letters; UserError if tiktoken would differ.

    A token is one byte, merged, or one of the specials.
    """
    byte = {letter: b for b, letter in byte_letters().items()}
    names, plain = _in_order(vocab), {*byte, *("".join(merge) for merge in merges)}
    if stray := [name for name in names if name not in plain and name not in specials]:
        raise UserError(f"no merge makes the token {stray[0]!r}")
    tokens = [bytes(byte[c] for c in name) if name in plain else b"" for name in names]
    specials = [name for name in names if name not in plain]
    while tokens and not tokens[-1]:
        tokens.pop()  # specials at the end need no place
    ids = [vocab.get("".join(merge), -1) for merge in merges]
    if -1 in ids or any(a >= b for a, b in pairwise(ids)):
        raise UserError("the merges are not those of the vocabulary, in its order")
    if sum(len(token) ** 2 for token in tokens) > MOST_WORK:
        raise UserError(f"its tokens have up to {max(map(len, tokens))} bytes: too long to check")
    ranks = {token: i for i, token in enumerate(tokens) if token}
    for (a, b), i in zip(merges, ids, strict=True):
        if halves(tokens[i], ranks) != (tokens[vocab[a]], tokens[vocab[b]]):
            raise UserError(f"token {i} does not come about by its merge, {a} {b}, alone: tiktoken "
                            "would cut texts in another way")
    return Tokenizer(tokens, specials=specials, pattern=pattern, lowercase=lowercase)


def halves(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, ...]:
    """The parts into which a token falls under the merges before its own: two, its merge."""
    parts, last = [bytes([b]) for b in token], ranks[token]
    while len(parts) > 2:
        found = [ranks.get(a + b, last) for a, b in pairwise(parts)]
        if (least := min(found)) == last:
            break
        i = found.index(least)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)


def whole(tokenizer: Tokenizer | WordPiece, *, framed: bool) -> dict:
    """tokenizer.json of a tokenizer, as data; `framed`: a text becomes [CLS] text [SEP]."""
    specials = sorted(zip(tokenizer.special_ids, tokenizer.specials, strict=True))
    # a word's leading space is part of its token, so a mask in its place swallows it (fill_mask)
    special = [{"id": i, "content": name, "single_word": False, "rstrip": False, "special": True,
                "lstrip": name == "[MASK]", "normalized": False} for i, name in specials]
    saved = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
             "post_processor": _template(tokenizer) if framed and "[CLS]" in tokenizer.specials
             else None}
    if isinstance(tokenizer, WordPiece):
        model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                 "max_input_chars_per_word": LONGEST,
                 "vocab": {piece: i for i, piece in enumerate(tokenizer.pieces)}}
        return {**saved, "pre_tokenizer": {"type": "BertPreTokenizer"}, "model": model,
                "normalizer": {"type": "BertNormalizer", "clean_text": True,
                               "handle_chinese_chars": tokenizer.spaced_cjk,
                               "strip_accents": tokenizer.strip_accents,
                               "lowercase": tokenizer.lowercase},
                "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}
    letters = byte_letters()
    spell = {token: "".join(letters[b] for b in token) for token in tokenizer.tokens if token}
    ranks = {token: i for i, token in enumerate(tokenizer.tokens) if token}
    merges = [[spell[part] for part in halves(token, ranks)] for token in ranks if len(token) > 1]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    cut = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated",
           "invert": False}
    return {**saved, "normalizer": {"type": "Lowercase"} if tokenizer.lowercase else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                cut, {**level, "use_regex": False}]},
            "decoder": {**level, "use_regex": True},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "byte_fallback": False,
                      "ignore_merges": False, "merges": merges,
                      "vocab": {**{spell[token]: i for token, i in ranks.items()},
                                **{name: i for i, name in specials}}}}


def _template(tokenizer) -> dict:
    """[CLS] text [SEP], and of pairs [CLS] text [SEP] text [SEP]."""
    first, last = ({"SpecialToken": {"id": name, "type_id": 0}} for name in ("[CLS]", "[SEP]"))
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {"type": "TemplateProcessing", "single": [first, text, last],
            "pair": [first, text, last, {"Sequence": {"id": "B", "type_id": 1}},
                     {"SpecialToken": {"id": "[SEP]", "type_id": 1}}],
            "special_tokens": {name: {"id": name, "ids": [tokenizer.special(name)],
                                      "tokens": [name]} for name in ("[CLS]", "[SEP]")}}
