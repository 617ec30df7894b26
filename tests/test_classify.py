"""classify.py and labelled.py: scores by hand, files by line, training on what can be learnt."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_reward import BYTES, CPU, make_trunk

from nanokl import UserError, checkpoint, trunks
from nanokl.bert import BERT
from nanokl.classify import Classifier, ClassTask, load_split, scores
from nanokl.data import text_batch
from nanokl.gpt import GPT
from nanokl.hf_tokenizer import load_tokenizer
from nanokl.judgements import Judgements
from nanokl.labelled import read_labelled
from nanokl.optim import make_optimizers
from nanokl.tokenizer import Tokenizer
from nanokl.training import freeze

pytestmark = pytest.mark.usefixtures("one_thread")
TRUNKS = pytest.mark.parametrize("cls", [BERT, GPT])


# ---------------------------------------------------------------------------------------- scores
def test_scores_by_hand():
    """Class a: 3 texts, 2 right; b: 2, both right; c: 1, called b; d: none, never called."""
    truth, called = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 1])
    out = scores(truth, called, ["a", "b", "c", "d"])
    assert out["accuracy"] == pytest.approx(4 / 6) and out["majority_accuracy"] == 0.5
    assert out["confusion"] == [[2, 1, 0, 0], [0, 2, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    # precision of a 1, recall 2/3; of b 2/4 and 1
    assert out["f1"] == pytest.approx({"a": 0.8, "b": 2 / 3, "c": 0, "d": 0})
    assert out["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 4)
    assert out["accuracy_se"] == pytest.approx(math.sqrt(4 / 6 * 2 / 6 / 6))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60))
def test_scores_are_counted(pairs):
    truth, called = np.array(pairs).T
    out = scores(truth, called, list("abcde"))
    assert out["accuracy"] == pytest.approx(np.mean(truth == called))
    for k, name in enumerate("abcde"):
        both = sum(t == c == k for t, c in pairs)
        precision = both / max(1, sum(c == k for _, c in pairs))
        recall = both / max(1, sum(t == k for t, _ in pairs))
        f1 = 2 * precision * recall / (precision + recall) if both else 0
        assert out["f1"][name] == pytest.approx(f1)


# ---------------------------------------------------------------------------------------- files
def labelled(tmp_path, lines):
    path = tmp_path / "texts.tsv"
    path.write_bytes("\n".join(lines).encode())
    return path


def test_read_labelled(tmp_path):
    path = labelled(tmp_path, [f"text {i}\ttab inside\tlabel {i % 2}\r" for i in range(400)] + [""])
    rows = read_labelled(path)
    assert len(rows) == 400 and rows[7].text == "text 7\ttab inside"
    assert rows[7].label == "label 1" and rows[7].line == 8
    share = [sum(row.split == s for row in rows) / 400 for s in ("train", "val", "test")]
    assert share == pytest.approx([0.8, 0.1, 0.1], abs=0.06)  # 4 standard deviations of 400 draws
    more = labelled(tmp_path, [f"text {i}\ttab inside\tlabel 0" for i in range(500)])
    assert [row.split for row in read_labelled(more)[:400]] == [row.split for row in rows]


@pytest.mark.parametrize("lines, says", [
    (["a\tb", "no tab"], "no text<TAB>label in line 2"),
    (["\tb"], "no text<TAB>label in line 1"),
    (["a\t"], "no text<TAB>label in line 1"),
    (["one\tx"], "none of them in the split"),
    ([], "0 labelled texts"),
])
def test_broken_files_are_one_line(tmp_path, lines, says):
    with pytest.raises(UserError, match=says):
        read_labelled(labelled(tmp_path, lines))
    (tmp_path / "latin.tsv").write_bytes(b"fine\tx\ncaf\xe9\ty\n")
    with pytest.raises(UserError, match="not UTF-8 in line 2"):
        read_labelled(tmp_path / "latin.tsv")


def test_ratings_from_a_file(tmp_path):
    """Each text has one rating, and so no human to hold a model against."""
    path = labelled(tmp_path, [f"text {i}\t{i % 5 - 2}" for i in range(200)])
    j = Judgements.load(path, "train")
    assert j.domain_names == ["text"] and set(j.n_ratings) == {1}
    assert j.mean().tolist() == [int(text.split()[1]) % 5 - 2 for text in j.texts]
    assert abs(j.standard.mean()) < 1e-6 and j.standard.std() == pytest.approx(1)
    assert np.isnan(j.pairs.human).all() and j.pairs.wins.sum() + j.pairs.loses.sum() == (
        pytest.approx(1))
    with pytest.raises(UserError, match="the label 'good' in line 1: give numbers"):
        Judgements.load(labelled(tmp_path, ["x\tgood"] + [f"t{i}\t1" for i in range(99)]), "train")
    with pytest.raises(UserError, match="the label 'nan' in line 1"):
        Judgements.load(labelled(tmp_path, ["x\tnan"] + [f"t{i}\t1" for i in range(99)]), "train")


# ---------------------------------------------------------------------------------------- models
@TRUNKS
@torch.no_grad()
def test_logits_are_those_of_each_text_alone(cls):
    """In batches of any length; pooled by the mean, or a causal model's last token."""
    trunk = make_trunk(cls)
    model = Classifier.on(trunk, ["x", "y", "z"]).eval()
    model.score.weight.normal_(generator=torch.Generator().manual_seed(0))
    texts = ["a", "a longer text", "", "é!", "something much longer than that", "b"]
    p = model.predict(BYTES, texts)
    for text, row in zip(texts, p, strict=True):
        idx, _ = text_batch(BYTES, [text], block_size=24)
        h = trunk.eval()(idx)[0]
        top = h[-1] if cls is GPT else h.mean(0)
        want = (top @ model.score.weight.T + model.score.bias).softmax(-1)
        torch.testing.assert_close(row, want, rtol=0, atol=1e-5)
    assert torch.equal(model.predict(BYTES, texts[::-1], batch=2).argmax(1).flip(0), p.argmax(1))


@TRUNKS
def test_what_can_be_learnt_is_learnt(tmp_path, cls):
    """Whether a text has a q in it: chance is 1/2, and 60 steps are enough for .9."""
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcde"), 8)) for _ in range(300)]
    texts = [t[:i] + "q" + t[i + 1 :] if k % 2 else t
             for k, (t, i) in enumerate(zip(texts, rng.integers(8, size=300), strict=True))]
    path = labelled(tmp_path, [f"{t}\t{'yes' if 'q' in t else 'no'}" for t in texts])
    checkpoint.save(tmp_path / "trunk", make_trunk(cls), tokenizer=BYTES)
    flags = SimpleNamespace(init=tmp_path / "trunk", data=path, dropout=0.0, seed=0, freeze=0,
                            n_groups=4, group_size=8, word_dropout=0.0, out=tmp_path)
    task = ClassTask(flags, CPU)
    assert task.core.config.labels == ["no", "yes"]
    optimizers = make_optimizers(task.core, lr=3e-3, muon_lr=3e-3, weight_decay=0.0,
                                 betas=(0.9, 0.98))
    for step in range(60):
        for optimizer in optimizers:
            optimizer.zero_grad()
        task.loss(task.core, step).backward()
        for optimizer in optimizers:
            optimizer.step()
    report = task.validate(task.core)
    assert report["accuracy"] > 0.9 and report["nats_per_text"] < 0.4
    checkpoint.save(tmp_path / "best", task.core, tokenizer=BYTES)
    test = task.finish()
    assert test["accuracy"] > 0.9 and test["majority_accuracy"] < 0.75
    assert (tmp_path / "figures" / "confusion.png").stat().st_size > 1000


def test_labels_that_cannot_be_learnt(tmp_path):
    checkpoint.save(tmp_path / "trunk", make_trunk(BERT), tokenizer=BYTES)
    flags = SimpleNamespace(init=tmp_path / "trunk", dropout=0.0, seed=0, freeze=0)
    flags.data = labelled(tmp_path, [f"text {i}\tsame" for i in range(99)])
    with pytest.raises(UserError, match="1 different labels: classes need 2 to 1000"):
        ClassTask(flags, CPU)
    lines = [f"text {i}\tlabel {i % 2}" for i in range(99)]
    rows = read_labelled(labelled(tmp_path, lines))
    i = next(i for i, row in enumerate(rows) if row.split == "test")
    flags.data = labelled(tmp_path, [*lines[:i], f"text {i}\trare", *lines[i + 1 :]])
    with pytest.raises(UserError, match="the label 'rare' in no text to train on"):
        ClassTask(flags, CPU)


def test_ratings_as_sentiment(tmp_path):
    (tmp_path / "judgements.jsonl").write_text("".join(
        f'{{"id": "{i}", "domain": "d", "split": "val", "text": "t{i}", "ratings": {r}}}\n'
        for i, r in enumerate(([-1, 0], [1, 0], [0, 1, 1], [-4, 0], [0, 0]))))
    texts, names = load_split(tmp_path, "val")
    assert texts == ["t0", "t1", "t2", "t3", "t4"]
    assert names == ["neutral", "positive", "positive", "negative", "neutral"]


# ---------------------------------------------------------------------------------------- trunks
def test_gpt2s_one_special_token_stands_for_all(tmp_path):
    """Its texts open and close with <|endoftext|>, which also pads and hides."""
    one = Tokenizer(BYTES.tokens, specials=["<|endoftext|>"])
    idx, mask = text_batch(one, ["ab", "c"], block_size=9)
    end = one.special("<|endoftext|>")
    assert idx.tolist() == [[end, 32, 97, 98, end], [end, 32, 99, end, end]]
    assert mask.tolist() == [[True] * 5, [True] * 4 + [False]]
    trunks.hide_tokens(one, idx, torch.ones(2, 9, dtype=torch.bool))
    assert (idx == end).all()


@TRUNKS
def test_frozen_blocks_stay(cls):
    trunk = make_trunk(cls, n_layer=3)
    freeze(trunk, 2)
    moved = {name for name, p in trunk.named_parameters() if p.requires_grad}
    assert any(name.startswith("blocks.2.") for name in moved)
    assert not any(name.startswith(("blocks.0.", "blocks.1.", "wte.")) for name in moved)
    assert "head.weight" not in moved  # tied to the embeddings
    for options in ({"n_segment": 2}, {"ngram_rows": [3]} if cls is GPT else {}):
        trunk = make_trunk(cls, **options)
        freeze(trunk, 1)
        left = {name for name, p in trunk.named_parameters() if p.requires_grad}
        assert left <= {"norm_final.weight", "norm_final.bias", "head.bias"}
    freeze(make_trunk(cls), 0)
    for n in (-1, 4):
        with pytest.raises(UserError, match=f"--freeze is {n}: give 0 to 3"):
            freeze(make_trunk(cls, n_layer=3), n)


def test_tokenizers_of_runs_are_found(tmp_path):
    BYTES.save(tmp_path)
    assert load_tokenizer(tmp_path).hash == BYTES.hash
