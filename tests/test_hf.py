"""Others' checkpoints, in and out, against fixtures that their own library has computed.

fixtures/ is made by make_fixtures.py (`make parity`); test_parity.py has the library itself.
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanokl import UserError, checkpoint, hf, hf_tokenizer, weights
from nanokl.bert import BERT, embed, fill_mask, longest_text
from nanokl.classify import Classifier
from nanokl.export import export
from nanokl.gpt import GPT, PRESETS, GPTConfig
from nanokl.hf_tokenizer import load_tokenizer
from nanokl.logprob import linear_logprob
from nanokl.ppo import make_policy
from nanokl.reward import RewardModel
from nanokl.tokenizer import train_bpe
from nanokl.trunks import load_trunk
from nanokl.wordpiece import WordPiece

FIXTURES = Path(__file__).parent / "fixtures"
CLASSES = {"gpt2": GPT, "gpt2-untied": GPT, "bert": BERT, "bert-2018": BERT}
NAMES = pytest.mark.parametrize("name", CLASSES)


def expected(name: str) -> dict:
    return safetensors.torch.load_file(FIXTURES / name / "expected.safetensors")


def model(folder, name: str):
    return CLASSES[name].from_pretrained(folder, dropout=0.0).eval()


@pytest.fixture
def copy(tmp_path):
    """A fixture's folder to damage."""
    return lambda name: Path(shutil.copytree(FIXTURES / name, tmp_path / name))


# ---------------------------------------------------------------------------------------- models
@NAMES
@torch.no_grad()
def test_hidden_states_and_logits_are_the_librarys(name):
    x, m = expected(name), model(FIXTURES / name, name)
    h = m(x["idx"], x.get("mask"), x.get("segment"))
    counts = x.get("mask", torch.ones_like(x["idx"], dtype=torch.bool))[..., None]
    assert ((h - x["h"]) * counts).abs().max() < 1e-5
    if "logits" in x:
        assert ((m.logits(h) - x["logits"]) * counts).abs().max() < 1e-4
    else:
        with pytest.raises(UserError, match="no head for masked tokens"):
            m.logits(h)


def test_heads_are_tied_as_the_config_says():
    tied, untied = (model(FIXTURES / name, name) for name in ("gpt2", "gpt2-untied"))
    assert tied.head.weight is tied.wte.weight
    assert not torch.equal(untied.head.weight, untied.wte.weight)


# Radford et al. 2019, as counted by transformers' num_parameters()
@pytest.mark.parametrize("n_layer, n_head, n_embd, parameters", [
    (12, 12, 768, 124_439_808), (24, 16, 1024, 354_823_168), (36, 20, 1280, 774_030_080),
    (48, 25, 1600, 1_557_611_200),
])
def test_the_four_sizes_of_gpt2(n_layer, n_head, n_embd, parameters):
    with torch.device("meta"):
        m = GPT(GPTConfig(vocab_size=50257, block_size=1024, n_layer=n_layer, n_head=n_head,
                          n_embd=n_embd, **PRESETS["gpt2"]))
    parts = hf.parts("gpt2", {k: tuple(x.shape) for k, x in weights.tensors(m).items()})
    assert sum(math.prod(part.shape) for part in parts.values()) == parameters
    assert len(parts) == 12 * n_layer + 4
    assert parts["h.0.attn.c_attn.weight"].shape == (n_embd, 3 * n_embd)  # (in, out)


@NAMES
def test_tensors_go_out_as_they_came_in(name):
    kind, m = name.partition("-")[0], model(FIXTURES / name, name)
    theirs = {}
    for path in weights.files(FIXTURES / name):
        theirs.update(safetensors.torch.load_file(path))
    out = hf.tensors_out(kind, {k: x.detach() for k, x in weights.tensors(m).items()}, headed=True)
    known = {hf.canonical(kind, [raw], ["lm_head.weight"]).get(raw): x for raw, x in theirs.items()}
    for raw, x in out.items():
        assert torch.equal(x, known.pop(raw.removeprefix(hf.PREFIX[kind]))), raw
    assert set(known) <= {None, "cls.predictions.bias"}  # idle ones, and twins


@pytest.mark.parametrize("preset", ["gpt2", "nano"])
@torch.no_grad()
def test_left_padded_batches_are_unpadded_ones(preset):
    """Hidden states and log-probs, to rounding; the padding itself is no NaN."""
    m = model(FIXTURES / "gpt2", "gpt2")
    if preset == "nano":
        m = GPT(GPTConfig(vocab_size=320, block_size=24, n_layer=2, n_head=4, n_embd=16),
                torch.Generator().manual_seed(1)).eval()
        for p in m.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    rows, T = [expected("gpt2")["idx"][i, :n] for i, n in enumerate((20, 13, 1))], 20
    idx = torch.stack([torch.cat((row.new_zeros(T - len(row)), row)) for row in rows])
    mask = torch.arange(T) >= T - torch.tensor([len(row) for row in rows])[:, None]
    h = m(idx, mask)
    assert h.isfinite().all()
    for row, padded in zip(rows, h, strict=True):
        alone = m(row[None])[0]
        torch.testing.assert_close(padded[T - len(row) :], alone, rtol=0, atol=2e-5)
        logp = [linear_logprob(x[:-1], m.head.weight, row[1:]).logp
                for x in (padded[T - len(row) :], alone)]
        torch.testing.assert_close(*logp, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------ tokenizers
@NAMES
def test_ids_are_the_librarys_on_hostile_texts(name):
    tokenizer = load_tokenizer(FIXTURES / name)
    for row in json.loads((FIXTURES / name / "tokens.json").read_bytes()):
        assert tokenizer.encode(row["text"]) == row["ids"], row["text"]
        if name.startswith("gpt2"):
            assert tokenizer.decode(row["ids"]) == row["text"]


def test_each_file_of_a_tokenizer_will_do(copy):
    for name, files in (("bert", ("vocab.txt", "tokenizer.json")),
                        ("gpt2", ("vocab.json", "tokenizer.json"))):
        folder = copy(name)
        whole = load_tokenizer(folder)
        if name == "gpt2":
            text = json.dumps(hf_tokenizer.whole(whole, framed=False))
            (folder / "tokenizer.json").write_text(text)
            assert load_tokenizer(folder).tokens == whole.tokens  # both, and they agree
        for file in files:
            (folder / file).rename(folder / "away")
            assert load_tokenizer(folder).hash == whole.hash
            (folder / "away").rename(folder / file)


def test_wordpiece_by_hand():
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##aff", "##able", "!", "中", "a",
              "##a", "cafe", "##un"]
    w = WordPiece(pieces)
    assert w.encode("Unaffable UNAFFABLE!") == [5, 6, 7, 5, 6, 7, 8]
    assert w.encode("unaffablex") == [1]  # the longest pieces leave an x: the word is unknown
    assert w.encode("CAFÉ cafe\u0301 中a") == [12, 12, 9, 10]
    assert w.encode("a" * 100) == [10] + [11] * 99 and w.encode("a" * 101) == [1]
    assert w.decode([5, 6, 7, 8]) == "unaffable !"
    assert w.encode("[MASK] \x00\ufffd\u200b") == [1, 1, 1]  # brackets are punctuation: plain text
    assert WordPiece([*pieces, "Un"], lowercase=False).encode("Un CAFÉ") == [14, 1]
    assert w.tokens[5:8] == (b" un", b"aff", b"able") and w.tokens[4] == b""
    for wrong in (pieces[1:], [*pieces, "a"], [*pieces, ""]):
        with pytest.raises(UserError):
            WordPiece(wrong)


def test_wordpiece_round_trip(tmp_path):
    for options in ({}, {"lowercase": False}, {"strip_accents": False}, {"spaced_cjk": False}):
        pieces = load_tokenizer(FIXTURES / "bert").pieces
        before = WordPiece(pieces, **options)
        before.save(tmp_path)
        after = load_tokenizer(tmp_path)
        text = "Ünïcode 中文 THE café"
        assert after.hash == before.hash and after.encode(text) == before.encode(text)


# Sennrich's own example: merges that tiktoken would make, and a list would not
def test_merges_that_tiktoken_would_widen_are_refused():
    letters = list(hf_tokenizer.byte_letters().values())
    merges = [("b", "c"), ("a", "b"), ("ab", "c")]  # abc is never made: b c is merged before a b
    names = [*letters, *("".join(m) for m in merges)]
    with pytest.raises(UserError, match="does not come about by its merge, ab c"):
        hf_tokenizer.bpe({name: i for i, name in enumerate(names)}, merges, ())
    fine = [("a", "b"), ("ab", "c")]
    vocab = {name: i for i, name in enumerate([*letters, "ab", "abc", "<|endoftext|>"])}
    tokenizer = hf_tokenizer.bpe(vocab, fine, ["<|endoftext|>"])
    assert tokenizer.encode("abcab") == [257, 256] and tokenizer.special("<|endoftext|>") == 258
    with pytest.raises(UserError, match="not those of the vocabulary"):
        hf_tokenizer.bpe(vocab, fine[::-1], ["<|endoftext|>"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=4), st.booleans())
def test_a_tokenizer_comes_back_from_tokenizer_json(texts, lowercase):
    """Ours, as exported, read again: the same tokens, whatever the merges were learnt from."""
    tokenizer = train_bpe(["a banana, a bandana " * 3, *texts], 300, lowercase=lowercase)
    saved = hf_tokenizer.whole(tokenizer, framed=True)
    vocab = saved["model"]["vocab"] | {t["content"]: t["id"] for t in saved["added_tokens"]}
    again = hf_tokenizer.bpe(vocab, saved["model"]["merges"], tokenizer.specials,
                             pattern=tokenizer.pattern, lowercase=lowercase)
    assert again.hash == tokenizer.hash


# -------------------------------------------------------------------------------------- sentences
@torch.no_grad()
def test_embeddings_are_means_of_norm_one():
    m = model(FIXTURES / "bert-2018", "bert-2018")
    tokenizer = load_tokenizer(FIXTURES / "bert-2018")
    texts = ["a man is eating", "", "the girl", "a " * 60]
    out = embed(m, tokenizer, texts, longest=12)
    for text, row in zip(texts, out, strict=True):
        ids = [2, *tokenizer.encode(text)[:10], 3]
        mean = m(torch.tensor([ids]))[0].mean(0)
        torch.testing.assert_close(row, mean / mean.norm(), rtol=0, atol=1e-5)
    assert torch.equal(embed(m, tokenizer, texts[::-1], longest=12).flip(0), out)


@torch.no_grad()
def test_fill_mask_with_wordpiece():
    m, tokenizer = model(FIXTURES / "bert", "bert"), load_tokenizer(FIXTURES / "bert")
    found = fill_mask(m, tokenizer, "The man is [MASK] food.", top_k=221)
    assert sum(p for _, p, _ in found) == pytest.approx(1, abs=1e-4)
    ids = torch.tensor([[2, *tokenizer.encode("the man is"), 4, *tokenizer.encode("food."), 3]])
    p = m.logits(m(ids))[0, 1 + len(tokenizer.encode("the man is"))].softmax(-1)
    best = int(p.argmax())
    assert found[0][0] == tokenizer.decode([best]) and found[0][1] == pytest.approx(p[best].item())


# ----------------------------------------------------------------------------------------- export
def written_out(run: Path, out: Path) -> str:
    line = export(run, out)
    assert str(out) in line and (out / "README.md").read_text().startswith(f"# {out.name}")
    return line


@pytest.mark.parametrize("switches", [{}, {"tied": False}, {"value_head": True}])
def test_a_gpt2_of_ours_goes_out_and_comes_back(tmp_path, switches):
    tokenizer = train_bpe(["a banana, a bandana. " * 9], 280)
    sizes = {"vocab_size": tokenizer.vocab_size, "block_size": 16, "n_layer": 2, "n_head": 2,
             "n_embd": 8}
    m = GPT(GPTConfig(**sizes, **PRESETS["gpt2"], **switches), torch.Generator().manual_seed(3))
    checkpoint.save(tmp_path / "run" / "best", m, tokenizer=tokenizer)
    assert "GPT2LMHeadModel" in written_out(tmp_path / "run", tmp_path / "out")
    again = GPT.from_pretrained(tmp_path / "out").eval()
    idx = torch.arange(16)[None]
    with torch.no_grad():
        assert torch.equal(again.logits(again(idx)), m.eval().logits(m(idx)))
    text = "A banana \u00e9 [CLS]"
    assert load_tokenizer(tmp_path / "out").encode(text) == tokenizer.encode(text)
    assert load_tokenizer(tmp_path / "out").specials == tokenizer.specials
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.special("<|endoftext|>")
    assert config["tie_word_embeddings"] == switches.get("tied", True)


@pytest.mark.parametrize("name", ["bert", "bert-2018"])
def test_a_bert_goes_out_and_comes_back(tmp_path, name):
    line = written_out(FIXTURES / name, tmp_path / "out")
    assert ("BertForMaskedLM" if name == "bert" else "BertModel") in line
    x, again = expected(name), model(tmp_path / "out", name)
    with torch.no_grad():
        h = again(x["idx"], x["mask"], x["segment"])
    assert ((h - x["h"]) * x["mask"][..., None]).abs().max() < 1e-5
    assert load_tokenizer(tmp_path / "out").pieces == load_tokenizer(FIXTURES / name).pieces


def test_models_of_our_own_shape_are_plain_safetensors(tmp_path):
    tokenizer = train_bpe(["a banana"], 262)
    m = GPT(GPTConfig(vocab_size=262, block_size=16, n_layer=1, n_head=2, n_embd=8))
    checkpoint.save(tmp_path / "run", make_policy(m, critic_layers=1), tokenizer=tokenizer)
    line = written_out(tmp_path / "run", tmp_path / "out")
    assert "no class of transformers fits" in line
    assert "activation 'relu2'" in line and "position 'rotary'" in line
    again = GPT.from_pretrained(tmp_path / "out")  # without the critic
    assert torch.equal(again.wte.weight, m.wte.weight) and not again.config.value_head
    with pytest.raises(UserError, match="is there already: choose a new folder"):
        export(tmp_path / "run", tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("my own card")  # may be edited
    GPT.from_pretrained(tmp_path / "out")
    sizes = {"vocab_size": 262, "n_head": 2, "n_embd": 8}
    for switch, says in (({"n_segment": 2}, "n_segment 2"), ({"ngram_rows": [4]}, "ngram_rows [4]"),
                         ({"causal": False}, "causal False"),
                         ({"norm_first": False}, "norm_first False")):
        m = GPT(GPTConfig(**sizes | PRESETS["gpt2"] | switch))
        checkpoint.save(tmp_path / says, m, tokenizer=tokenizer)
        assert f"({says})" in written_out(tmp_path / says, tmp_path / f"{says} out")


# ----------------------------------------------------------------------------------------- safety
def edit_json(file: str, **change):
    def damage(folder: Path):
        old = json.loads((folder / file).read_text())
        new = {key: x for key, x in {**old, **change}.items() if x is not ...}
        (folder / file).write_text(json.dumps(new))
    return damage


def edit_text(file: str, old: str, new: str):
    def damage(folder: Path):
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new))
    return damage


def config(**change):
    return edit_json("config.json", **change)


def tensors(change):
    def damage(folder: Path):
        path = folder / "model.safetensors"
        found = safetensors.torch.load_file(path)
        change(found)
        safetensors.torch.save_file(found, path, {"format": "pt"})
    return damage


WTE, HEAD = "bert.embeddings.word_embeddings.weight", "cls.predictions.bias"
DAMAGE = {
    "another kind": ("bert", config(model_type="llama"), "model_type is 'llama': give a folder of"),
    "a list as kind": ("bert", config(model_type=[]), "config.json"),
    "layers": ("gpt2", config(n_layer=10**9), "asks for 1000000000 blocks, but there are 28 t"),
    "layers of a BERT": ("bert", config(num_hidden_layers=10**9), "asks for 1000000000 blocks"),
    "width": ("gpt2", config(n_embd=4 * 10**7), "does not fit this GPT"),
    "no eps": ("gpt2", config(layer_norm_epsilon=None, n_head=0), "n_head is 0: give a number ab"),
    "overflow": ("gpt2", config(n_embd=4 * 10**18), "cannot use"),
    "positions": ("gpt2", config(n_positions=10**12), "wpe.weight is .24, 16. F32, not"),
    "vocabulary": ("bert", config(vocab_size=10**10), "does not fit"),
    "negative": ("bert", config(num_attention_heads=-4), "give a number above 0"),
    "text": ("bert", config(hidden_size="16"), "config.json"),
    "half": ("gpt2", config(n_layer=2.5), "n_layer is 2.5: give a whole number"),
    "true": ("gpt2", config(n_head=True), "n_head is True: give a whole number"),
    "nan": ("gpt2", config(layer_norm_epsilon=float("nan")), "eps is nan: give a number"),
    "no width": ("gpt2", config(n_embd=...), "it has no n_embd: give a whole config"),
    "inner width": ("gpt2", config(n_inner=24), "n_inner is 24: only four times"),
    "other heads": ("gpt2", config(n_head=3), "3 heads do not divide a width of 16"),
    "relu": ("gpt2", config(activation_function="relu"), "activation_function is 'relu': only"),
    "relative": ("bert", config(position_embedding_type="relative_key"), "only 'absolute'"),
    "scaled": ("gpt2", config(scale_attn_by_inverse_layer_idx=True), "is True: only False"),
    "shape": ("bert", tensors(lambda t: t.update({HEAD: torch.ones(9)})), r"\(9,\) F32, not"),
    "integers": ("bert", tensors(lambda t: t.update({HEAD: t[HEAD].int()})), "I32, not"),
    "missing": ("bert", tensors(lambda t: t.pop(WTE)), "word_embeddings.weight is absent"),
    "extra": ("bert", tensors(lambda t: t.update(x=torch.ones(3))), r"x is \(3,\) F32, not absent"),
    "a classifier": ("bert", tensors(lambda t: t.update({"classifier.bias": torch.ones(3)})),
                     "classifier.bias"),
    "two spellings": ("bert", tensors(lambda t: t.update({WTE[5:]: t[WTE].clone()})), "twice"),
    "untied twin": ("gpt2", tensors(lambda t: t.update({"lm_head.weight": torch.ones(320, 16)})),
                    "lm_head.weight is not wte.weight"),
    "pickle": ("bert", lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
               "pytorch_model.bin, a pickle, which can run any code"),
    "no shard": ("gpt2-untied", lambda f: next(f.glob("model-*2-*")).unlink(), "is missing"),
    "shard elsewhere": ("gpt2-untied", edit_json("model.safetensors.index.json", weight_map={
        "x": "../../secret.safetensors"}), "it may name files beside it"),
    "a list as index": ("gpt2-untied", lambda f: (f / "model.safetensors.index.json").write_text(
        "[]"), "index.json is damaged"),
    "huge eps": ("gpt2", config(layer_norm_epsilon=10**400), "eps is 1000000"),
    "surrogate shard": ("gpt2-untied", edit_json("model.safetensors.index.json", weight_map={
        "x": "\ud800"}), "index.json is damaged"),
    "not said": ("bert", config(model_type=..., type_vocab_size=...), "not written by nanokl"),
    "deep": ("bert", lambda f: (f / "config.json").write_text("[" * 10**5), "is damaged"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_one_line(copy, case):
    name, damage, says = DAMAGE[case]
    folder = copy(name)
    damage(folder)
    with pytest.raises(UserError, match=says) as error:
        load_trunk(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def double(folder: Path, times: int) -> None:
    """a, aa, aaaa, ...: merges in order, whose check takes the square of their length."""
    letters = list(hf_tokenizer.byte_letters().values())
    parts = ["a" * 2**i for i in range(times)]
    vocab = {x: i for i, x in enumerate([*letters, *parts[1:], "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("".join(f"{x} {x}\n" for x in parts[:-1]))


VOCABULARY = {
    "a piece less": ("bert-2018", edit_text("vocab.txt", "\n##s\n", "\n"),
                     "220 tokens, its model 221"),
    "two that differ": ("bert", edit_text("vocab.txt", "\nthe\n", "\nteh\n"), "are not the same"),
    "latin-1": ("bert", lambda f: (f / "vocab.txt").write_bytes(b"\xff\xfe"), "is damaged"),
    "no merges": ("gpt2", lambda f: (f / "merges.txt").unlink(), "is damaged"),
    "a merge less": ("gpt2", lambda f: (f / "merges.txt").write_text("#version: 0.2\n"),
                     "no merge makes the token"),
    "a gap in the ids": ("gpt2", edit_json("vocab.json", a=10**6), "are not 0 to 319"),
    "an id as text": ("gpt2", edit_json("vocab.json", a="7"), "ids of 320"),
    "unigram": ("gpt2-untied", edit_json("tokenizer.json", model={"type": "Unigram"}), "only BPE"),
    "another splitter": ("gpt2-untied", edit_json("tokenizer.json", pre_tokenizer={
        "type": "Metaspace"}), "only ByteLevel is read"),
    "a switch as text": ("bert-2018", lambda f: (f / "tokenizer_config.json").write_text(
        '{"do_lower_case": "false"}'), "lowercase is 'false': give true or false"),
    "no splitter": ("gpt2-untied", edit_json("tokenizer.json", pre_tokenizer={
        "type": "Sequence", "pretokenizers": []}), "only ByteLevel is read"),
    "a pattern with gaps": ("gpt2-untied", edit_json("tokenizer.json", pre_tokenizer={
        "type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\p{L}+"}, "behavior": "Isolated"},
            {"type": "ByteLevel", "use_regex": False}]}), "only patterns of GPT-2 and nanokl"),
    "no normaliser": ("bert", edit_json("tokenizer.json", normalizer=None), "'BertNormalizer' is"),
    "long tokens": ("gpt2", lambda f: double(f, 15), "bytes: too long to check"),
    "none": ("bert-2018", lambda f: (f / "vocab.txt").unlink(), "no tokenizer at"),
}


@pytest.mark.parametrize("case", VOCABULARY)
def test_a_damaged_vocabulary_is_one_line(copy, case):
    name, damage, says = VOCABULARY[case]
    folder = copy(name)
    damage(folder)
    with pytest.raises(UserError, match=says) as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_a_config_of_2018_does_not_say_its_kind(copy):
    for name in ("bert-2018", "gpt2"):
        folder = copy(name)
        config(model_type=...)(folder)
        x = expected(name)
        with torch.no_grad():
            h = model(folder, name)(x["idx"], x.get("mask"), x.get("segment"))
        assert (h - x["h"])[0].abs().max() < 1e-5


def test_how_sentences_are_pooled(copy):
    folder = copy("bert-2018")
    assert longest_text(folder, 24) == 24
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 9}')
    (folder / "modules.json").write_text('[{"type": "sentence_transformers.models.Pooling"}]')
    assert longest_text(folder, 24) == 9
    (folder / "1_Pooling").mkdir()
    for name, text, says in (
            ("1_Pooling/config.json", '{"pooling_mode_cls_token": true}', "pooling_mode_cls_token"),
            ("1_Pooling/config.json", '{"pooling_mode": "cls"}', "has cls: only the mean"),
            ("modules.json", '[{"type": "x.Dense"}]', "x.Dense: only the mean"),
            ("modules.json", "[3]", "does not say how"),
            ("sentence_bert_config.json", '{"max_seq_length": 1e999}', None),
            ("sentence_bert_config.json", '{"max_seq_length": "x"}', "does not say how")):
        (folder / name).write_text(text)
        if says is None:
            assert longest_text(folder, 24) == 24
        else:
            with pytest.raises(UserError, match=says):
                longest_text(folder, 24)
        (folder / name).unlink()


def own_folder(folder: Path) -> Path:
    """A checkpoint of nanokl's, with all that it can have."""
    tokenizer = train_bpe(["a banana, a bandana. " * 9], 280)
    sizes = {"vocab_size": 280, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 8}
    m = GPT(GPTConfig(**sizes, ngram_rows=[3]), torch.Generator().manual_seed(3))
    checkpoint.save(folder, m, tokenizer=tokenizer)
    return folder


def reward_folder(folder: Path) -> Path:
    """A reward model of nanokl's on a BERT of others."""
    m = RewardModel.on(load_trunk(FIXTURES / "bert"), n_domain=2)
    checkpoint.save(folder, m, tokenizer=load_tokenizer(FIXTURES / "bert"))
    return folder


def classifier_folder(folder: Path) -> Path:
    m = Classifier.on(load_trunk(FIXTURES / "bert"), ["no", "yes"])
    checkpoint.save(folder, m, tokenizer=load_tokenizer(FIXTURES / "bert"))
    return folder


def full_folder(folder: Path) -> Path:
    """A BERT with every small file that a sentence encoder brings."""
    shutil.copytree(FIXTURES / "bert-2018", folder)
    load_tokenizer(folder).save(folder)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    (folder / "modules.json").write_text('[{"type": "sentence_transformers.models.Pooling"}]')
    return folder


MADE = {"own": own_folder, "reward": reward_folder, "classifier": classifier_folder,
        "full": full_folder}


def a_folder(tmp_path_factory, name: str) -> Path:
    """The fixture of that name, or one made once."""
    if name not in MADE:
        return FIXTURES / name
    folder = tmp_path_factory.getbasetemp() / f"made-{name}"
    return folder if folder.exists() else MADE[name](folder)


def use(folder: Path):
    """The folder's model and tokenizer, and a text run through both."""
    tokenizer = load_tokenizer(folder)
    kind = checkpoint.read_config(folder)["model"]
    if kind == "RewardModel":
        m = checkpoint.load(folder, RewardModel)
        m.score_texts(tokenizer, ["A man"])
    elif kind == "Classifier":
        m = checkpoint.load(folder, Classifier)
        m.predict(tokenizer, ["A man"])
    else:
        m = load_trunk(folder).eval()
        longest_text(folder, m.config.block_size)
        with torch.no_grad():
            m(torch.tensor([tokenizer.encode("A man")[: m.config.block_size]]))
    return m, tokenizer


# what JSON can hold and a config should not
ODD = [10**400, -(10**400), math.inf, math.nan, 1e-320, -1, 0, True, None, "", "x", "\ud800", [],
       {}, [[]], {"content": None}]
JSONS = [("own", "config.json"), ("own", "tokenizer.nanokl.json"), ("reward", "config.json"),
         ("classifier", "config.json"),
         ("reward", "tokenizer_config.json"), ("gpt2", "config.json"), ("gpt2", "vocab.json"),
         ("gpt2-untied", "tokenizer.json"), ("gpt2-untied", "model.safetensors.index.json"),
         ("bert", "config.json"), ("bert", "tokenizer.json"), ("full", "tokenizer_config.json"),
         ("full", "sentence_bert_config.json"), ("full", "modules.json")]


def places(x) -> list[tuple]:
    """Every place of a value in JSON, as its container and key."""
    items = list(x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ())
    return [(x, key) for key, _ in items] + [p for _, value in items for p in places(value)]


@pytest.mark.parametrize("name, file", JSONS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_odd_values_are_an_error_or_are_used(tmp_path_factory, name, file, data):
    """Any value at any place, with or without our hashes: no exception but a UserError's line."""
    source = a_folder(tmp_path_factory, name)
    folder = tmp_path_factory.mktemp("odd") / "m"
    shutil.copytree(source, folder)
    saved = json.loads((folder / file).read_bytes())
    found = places(saved)
    container, key = found[data.draw(st.integers(0, len(found) - 1))]
    container[key] = data.draw(st.sampled_from(ODD))
    (folder / file).write_text(json.dumps(saved))
    if name in ("own", "reward", "classifier"):  # somebody else keeps no hashes
        tensors(lambda t: None)(folder)
    try:
        use(folder)
    except UserError as error:
        assert "\n" not in str(error)
    shutil.rmtree(folder)


FILES = [("own", "config.json"), ("own", "model.safetensors"), ("own", "tokenizer.nanokl.json"),
         ("gpt2", "config.json"), ("gpt2", "model.safetensors"), ("gpt2", "vocab.json"),
         ("gpt2", "merges.txt"), ("gpt2-untied", "model.safetensors.index.json"),
         ("gpt2-untied", "tokenizer.json"), ("bert", "config.json"), ("bert", "model.safetensors"),
         ("bert", "vocab.txt"), ("bert", "tokenizer.json"), ("bert-2018", "vocab.txt"),
         ("reward", "config.json"), ("reward", "model.safetensors"), ("reward", "vocab.txt"),
         ("reward", "tokenizer_config.json"), ("full", "tokenizer_config.json")]


@pytest.mark.parametrize("name, file", FILES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_flipped_bytes_are_an_error_or_the_same_model(tmp_path_factory, name, file, data):
    """Only UserErrors of one line; whatever loads has the weights, and the words, of before.

    A config or a lone vocabulary of theirs that is whole and says something else is another model
    by the layout's own rules: then what was loaded is what the file says.
    """
    source = a_folder(tmp_path_factory, name)
    folder = tmp_path_factory.mktemp("flipped") / "m"
    shutil.copytree(source, folder)
    content = bytearray((folder / file).read_bytes())
    end = 8 + int.from_bytes(content[:8], "little") if file == "model.safetensors" else len(content)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, end - 1))
        content[place] ^= data.draw(st.integers(1, 255))
    (folder / file).write_bytes(bytes(content))
    try:
        got, words = use(folder)
    except UserError as error:
        assert "\n" not in str(error)
        return
    finally:
        shutil.rmtree(folder)
    want, known = use(source)
    assert all(torch.equal(a, b) for a, b in zip(weights.tensors(got).values(),
                                                 weights.tensors(want).values(), strict=True))
    if file == "config.json" and name not in MADE:
        try:
            fields = hf.config_in(json.loads(bytes(content)), weights.header(source))[1]
        except UserError:
            pytest.fail("a config was used that cannot be")
        assert all(getattr(got.config, key) == value for key, value in fields.items())
    else:
        assert got.config == want.config
    if (name, file) == ("bert-2018", "vocab.txt"):
        lines = bytes(content).decode().replace("\r\n", "\n").removesuffix("\n").split("\n")
        assert list(words.pieces) == lines
    elif (name, file) == ("full", "tokenizer_config.json"):
        assert words.pieces == known.pieces
    else:
        assert words.hash == known.hash


def test_weights_in_half_precision_become_float32(copy):
    folder = copy("bert")
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        shutil.copy(FIXTURES / "bert" / "model.safetensors", folder)
        tensors(lambda t, d=dtype: t.update({k: x.to(d) for k, x in t.items()}))(folder)
        m = model(folder, "bert")
        assert all(p.dtype is torch.float32 for p in m.parameters())
        rough = model(FIXTURES / "bert", "bert").wte.weight.to(dtype).float()
        assert np.array_equal(m.wte.weight.detach().numpy(), rough.detach().numpy())
