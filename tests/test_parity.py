"""The same numbers as transformers' and tokenizers', where they are installed (`make parity`).

Elsewhere test_hf.py keeps them, with fixtures that make_fixtures.py has made by these libraries.
"""

import json
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanokl import checkpoint, hf_tokenizer, weights
from nanokl.bert import BERT, BERTConfig, embed
from nanokl.bert import PRESETS as BERT_PRESETS
from nanokl.export import export
from nanokl.gpt import GPT, PRESETS, GPTConfig
from nanokl.hf_tokenizer import load_tokenizer
from nanokl.tokenizer import train_bpe
from nanokl.wordpiece import WordPiece

transformers = pytest.importorskip("transformers", reason="parity: transformers is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="parity: tokenizers is not installed")
from make_fixtures import HOSTILE, TEXTS, byte_level, ids, randomise, wordpiece  # noqa: E402

MINILM = Path(__file__).parent.parent / "data" / "minilm" / "model"
FIXTURES = Path(__file__).parent / "fixtures"
# hostile texts; half a surrogate pair is no text
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(HOSTILE)


def same_unicode(text: str) -> bool:
    """Whether each character is known to Python's tables: theirs may be older or newer."""
    return all(unicodedata.category(c) != "Cn" for c in text)


# ---------------------------------------------------------------------------------------- models
@pytest.mark.parametrize("tied, activation", [(True, "gelu_new"), (False, "gelu_pytorch_tanh")])
@pytest.mark.parametrize("shape", [(2, 4, 32), (3, 1, 20), (1, 6, 48)])
@torch.no_grad()
def test_gpt2_logits(tmp_path, shape, tied, activation):
    n_layer, n_head, n_embd = shape
    theirs = randomise(transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=97, n_positions=40, n_embd=n_embd, n_layer=n_layer, n_head=n_head,
        activation_function=activation, tie_word_embeddings=tied, bos_token_id=0,
        eos_token_id=0)), 5)
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    ours = GPT.from_pretrained(tmp_path).eval()
    idx = torch.randint(97, (3, 40), generator=torch.Generator().manual_seed(0))
    assert (theirs(idx).logits - ours.logits(ours(idx))).abs().max() < 1e-4
    # padded on the left, with the positions that their generate() gives
    mask = torch.arange(40) >= torch.tensor([0, 13, 39])[:, None]
    position = (mask.cumsum(1) - 1).clamp(min=0)
    out = theirs(idx, attention_mask=mask.long(), position_ids=position).logits
    assert ((out - ours.logits(ours(idx, mask))) * mask[..., None]).abs().max() < 1e-4


@torch.no_grad()
def test_gpt2_logits_in_the_small_ones_own_shape(tmp_path):
    """124 million parameters, as they are first drawn."""
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path).eval()
    idx = torch.randint(50257, (1, 200))
    assert (theirs(idx).logits - ours.logits(ours(idx))).abs().max() < 1e-4


@pytest.mark.parametrize("cls", ["BertModel", "BertForMaskedLM", "BertForPreTraining"])
@torch.no_grad()
def test_bert_hidden_states_and_logits(tmp_path, cls):
    theirs = randomise(getattr(transformers, cls)(transformers.BertConfig(
        vocab_size=97, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=96, max_position_embeddings=40)), 6)
    theirs.save_pretrained(tmp_path)
    ours = BERT.from_pretrained(tmp_path).eval()
    rng = torch.Generator().manual_seed(0)
    idx, segment = torch.randint(97, (3, 40), generator=rng), torch.randint(2, (3, 40))
    mask = torch.arange(40) < torch.tensor([40, 17, 1])[:, None]
    out = theirs(idx, attention_mask=mask.long(), token_type_ids=segment, output_hidden_states=True)
    h = ours(idx, mask, segment)
    assert ((out.hidden_states[-1] - h) * mask[..., None]).abs().max() < 1e-4
    assert ours.config.mlm_head == (cls != "BertModel")
    if ours.config.mlm_head:
        logits = out.logits if cls == "BertForMaskedLM" else out.prediction_logits
        assert ((logits - ours.logits(h)) * mask[..., None]).abs().max() < 1e-4


# ------------------------------------------------------------------------------------ tokenizers
def read_back(tokenizer, folder: Path):
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


@pytest.mark.parametrize("special_first", [False, True])
def test_byte_level_ids(tmp_path, special_first):
    theirs = byte_level(340, special_first=special_first)
    ours = read_back(theirs, tmp_path)

    @settings(max_examples=400, deadline=None)
    @given(TEXT.filter(same_unicode))
    def check(text):
        assert ours.encode(text) == ids(theirs, [text])[0]
        assert ours.decode(ours.encode(text)) == text

    check()


def test_wordpiece_ids(tmp_path):
    theirs = wordpiece()
    ours = read_back(theirs, tmp_path)

    @settings(max_examples=600, deadline=None)
    @given(TEXT.filter(same_unicode))
    def check(text):
        assert ours.encode(text) == ids(theirs, [text])[0]

    check()


def test_wordpiece_of_every_character():
    """Each alone between two letters; 503 of a million differ, by the age of Unicode's tables.

    (Python 3.11, tokenizers 0.23.) None of them is in the scripts of Europe.
    """
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b", "b", "##a"]
    theirs = tokenizers.Tokenizer(tokenizers.models.WordPiece(
        {p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    theirs.normalizer = tokenizers.normalizers.BertNormalizer()
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    ours = WordPiece(pieces)
    texts = [f"a{chr(i)}b" for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    found = theirs.encode_batch(texts, add_special_tokens=False)
    wrong = [text[1] for text, x in zip(texts, found, strict=True) if ours.encode(text) != x.ids]
    assert len(wrong) < 700 and min(map(ord, wrong)) > 0x05FF, (len(wrong), wrong[:9])


# ---------------------------------------------------------------------------------------- export
@pytest.mark.parametrize("lowercase", [False, True])
@torch.no_grad()
def test_a_gpt_of_ours_opens_as_theirs(tmp_path, lowercase):
    tokenizer = train_bpe(TEXTS, 400, lowercase=lowercase)
    sizes = {"vocab_size": tokenizer.vocab_size, "block_size": 40, "n_layer": 2, "n_head": 2,
             "n_embd": 24}
    ours = randomise(GPT(GPTConfig(**sizes, **PRESETS["gpt2"])), 7)
    checkpoint.save(tmp_path / "run", ours, tokenizer=tokenizer)
    export(tmp_path / "run", tmp_path / "out")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in HOSTILE[1:] + TEXTS:
        if any(name in text for name in tokenizer.specials):
            continue  # theirs looks for special tokens in a text
        idx = tokenizer.encode(text)
        assert words(text)["input_ids"] == idx, text
        if idx and not lowercase:
            assert words.decode(idx, clean_up_tokenization_spaces=False) == text
        if idx := idx[:40]:
            x = torch.tensor([idx])
            assert (theirs(x).logits - ours.logits(ours(x))).abs().max() < 1e-4
    assert words.eos_token == "<|endoftext|>" and words.pad_token == "[PAD]"


@torch.no_grad()
def test_a_bert_of_ours_opens_as_theirs(tmp_path):
    """With our BPE, and with WordPiece."""
    for name, tokenizer in (("bpe", train_bpe(TEXTS, 400)),
                            ("wordpiece", load_tokenizer(FIXTURES / "bert"))):
        sizes = {"vocab_size": tokenizer.vocab_size, "block_size": 40, "n_layer": 2, "n_head": 2,
                 "n_embd": 24}
        ours = randomise(BERT(BERTConfig(**sizes, **BERT_PRESETS["bert"])), 8)
        checkpoint.save(tmp_path / name, ours, tokenizer=tokenizer)
        export(tmp_path / name, tmp_path / f"{name}-out")
        theirs = transformers.BertForMaskedLM.from_pretrained(tmp_path / f"{name}-out").eval()
        words = transformers.AutoTokenizer.from_pretrained(tmp_path / f"{name}-out")
        for text in TEXTS:
            inner = tokenizer.encode(text)
            full = [tokenizer.special("[CLS]"), *inner, tokenizer.special("[SEP]")]
            assert words(text)["input_ids"] == full
            x = torch.tensor([full[:40]])
            assert (theirs(x).logits - ours.logits(ours(x))).abs().max() < 1e-4
        mask = tokenizer.special("[MASK]")
        assert words.mask_token_id == mask
        # what fill_mask reads: the mask stands for a word and the space before it
        full = [full[0], *tokenizer.encode("A man"), mask, *tokenizer.encode(" food."), full[-1]]
        assert words("A man [MASK] food.")["input_ids"] == full


@pytest.mark.parametrize("name", ["gpt2", "gpt2-untied", "bert"])
def test_fixtures_go_out_bit_for_bit(tmp_path, name):
    """What theirs saved, in and out again: the same tensors under the same names."""
    export(FIXTURES / name, tmp_path / "out")
    cls = {"bert": transformers.BertForMaskedLM}.get(name, transformers.GPT2LMHeadModel)
    before, after = (cls.from_pretrained(folder).state_dict() for folder in
                     (FIXTURES / name, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    words, tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer(
        FIXTURES / name)
    for special in tokenizer.specials:
        assert words.convert_tokens_to_ids(special) == tokenizer.special(special)
    for text in TEXTS:
        assert words(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)


def test_their_tokenizer_reads_ours(tmp_path):
    tokenizer = train_bpe(TEXTS, 400)
    (tmp_path / "t.json").write_text(json.dumps(hf_tokenizer.whole(tokenizer, framed=True)))
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))

    @settings(max_examples=300, deadline=None)
    @given(TEXT.filter(same_unicode))
    def check(text):
        assert ids(theirs, [text])[0] == tokenizer.encode(text)

    check()


# ------------------------------------------------------------------------------------------ MiniLM
@pytest.mark.skipif(not MINILM.is_dir(), reason="parity: no data/minilm/model, see its prepare.py")
@torch.no_grad()
def test_minilm_embeddings():
    ours, tokenizer = BERT.from_pretrained(MINILM, dropout=0.0).eval(), load_tokenizer(MINILM)
    theirs = transformers.AutoModel.from_pretrained(MINILM).eval()
    words = transformers.AutoTokenizer.from_pretrained(MINILM)
    texts = [t for t in HOSTILE if "[" not in t] + TEXTS + [TEXTS[1] * 20]
    batch = words(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    h, mask = theirs(**batch).last_hidden_state, batch["attention_mask"][..., None]
    mean = torch.nn.functional.normalize((h * mask).sum(1) / mask.sum(1), dim=1)
    assert (embed(ours, tokenizer, texts, longest=256) - mean).abs().max() < 1e-4
    assert len(weights.tensors(ours)) == 1 + 1 + 1 + 2 + 6 * 12
