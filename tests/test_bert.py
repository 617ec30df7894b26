"""bert.py against BERT written out in numpy float64; fill_mask against its own definition."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_transformer import (
    close,
    layer_norm64,
    linear64,
    nano64,
    one_thread,  # noqa: F401
    randomise,
    rng,
    self_attention64,
    tokens,
    visible64,
    weights64,
)

from nanokl import UserError
from nanokl.bert import BERT, PRESETS, BERTConfig, fill_mask
from nanokl.tokenizer import train_bpe

SIZES = {"vocab_size": 29, "block_size": 12, "n_layer": 2, "n_head": 3, "n_embd": 12}
SENTENCE = "The capital of France is Paris."
ERF = np.vectorize(math.erf)


def make(preset, seed=0, **switches):
    return randomise(BERT(BERTConfig(**SIZES | PRESETS[preset] | switches)), seed)


def gelu64(x):
    return x * 0.5 * (1 + ERF(x / math.sqrt(2)))


def bert_64(model, idx, mask=None, segment=None):
    """Devlin et al. (2019): post-norm, learned positions, segments, exact GELU, biases."""
    w, c = weights64(model), model.config
    seen = visible64(*idx.shape, causal=False, mask=mask)
    segment = torch.zeros_like(idx) if segment is None else segment
    x = w["wte.weight"][idx.numpy()] + w["wpe.weight"][: idx.shape[1]]
    x = layer_norm64(w, "norm_embed", x + w["wse.weight"][segment.numpy()], 1e-12)
    for i in range(c.n_layer):
        b = f"blocks.{i}"
        x = x + self_attention64(w, f"{b}.attn", x, c.n_head, seen)
        x = layer_norm64(w, f"{b}.norm1", x, 1e-12)
        x = x + linear64(w, f"{b}.mlp.down", gelu64(linear64(w, f"{b}.mlp.up", x)))
        x = layer_norm64(w, f"{b}.norm2", x, 1e-12)
    return x


def head64(model, h):
    """Dense, GELU, norm, then the tied embedding and a bias of its own."""
    w = weights64(model)
    h = layer_norm64(w, "transform.2", gelu64(linear64(w, "transform.0", h)), 1e-12)
    return linear64(w, "head", h)


def padded(lengths, T):
    return torch.arange(T) < torch.tensor(lengths)[:, None]


# ------------------------------------------------------------------------------------ forward
@pytest.mark.parametrize("lengths", [None, (11, 7, 1)])
@pytest.mark.parametrize("segments", [False, True])
def test_forward_is_bert_written_out(lengths, segments):
    model, idx = make("bert"), tokens(3, 11)
    mask = padded(lengths, 11) if lengths else None
    segment = tokens(3, 11, seed=1, vocab=2) if segments else None
    expected = bert_64(model, idx, mask, segment)
    h = model(idx, mask, segment)
    close(h, expected, 2e-5)
    close(model.logits(h), head64(model, expected), 1e-4)
    close(model.double()(idx, mask, segment), expected, 1e-11)


@pytest.mark.parametrize("lengths", [None, (11, 7, 1)])
def test_forward_is_the_nano_encoder_written_out(lengths):
    model, idx = make("nano"), tokens(3, 11)
    mask = padded(lengths, 11) if lengths else None
    expected = nano64(model, idx, causal=False, mask=mask)
    h = model(idx, mask)
    close(h, expected, 2e-5)
    close(model.logits(h), linear64(weights64(model), "head", expected), 5e-5)
    close(model.double()(idx, mask), expected, 2e-6)  # rotary tables are float32


@pytest.mark.parametrize("preset", ["bert", "nano"])
def test_padding_changes_nothing(preset):
    model, lengths = make(preset), [12, 8, 5, 1]
    idx, mask = tokens(4, 12), padded(lengths, 12)
    h = model(idx, mask)
    junk = torch.where(mask, idx, tokens(4, 12, seed=9))
    assert (junk != idx).any()
    assert torch.equal(model(junk, mask)[mask], h[mask])  # not one bit
    for row, n in zip(range(4), lengths, strict=True):  # alone, without padding or mask
        torch.testing.assert_close(model(idx[row : row + 1, :n])[0], h[row, :n], rtol=0, atol=1e-5)
    assert (model(idx)[1:, 0] - h[1:, 0]).abs().amax(-1).min() > 1e-3  # the mask was needed


def test_bert_base_has_109_514_298_parameters():
    """bert-base-uncased with its masked-language-model head, as published."""
    sizes = {"vocab_size": 30522, "block_size": 512, "n_layer": 12, "n_head": 12, "n_embd": 768}
    with torch.device("meta"):
        model = BERT(BERTConfig(**sizes, **PRESETS["bert"]))
    assert sum(p.numel() for p in model.parameters()) == 109_514_298


def test_head_is_tied_and_its_bias_free():
    model, idx = make("bert"), tokens(2, 9)
    assert model.head.weight is model.wte.weight
    F.cross_entropy(model.logits(model(idx)).flatten(0, 1), idx.flatten()).backward()
    unused = sorted(set(range(29)) - set(idx.flatten().tolist()))
    assert unused and (model.wte.weight.grad[unused].abs().amax(1) > 0).all()  # as outputs
    assert (model.head.bias.grad.abs() > 0).all()
    assert not BERT(BERTConfig(**SIZES), rng=rng()).head.bias.any()


@pytest.mark.parametrize("preset", ["bert", "nano"])
def test_saved_model_comes_back(tmp_path, preset):
    model, idx = make(preset), tokens(2, 9)
    model.save_pretrained(tmp_path / "m")
    again = BERT.from_pretrained(tmp_path / "m").eval()
    assert again.config == model.config and again.head.weight is again.wte.weight
    assert torch.equal(again.logits(again(idx)), model.logits(model(idx)))


# ---------------------------------------------------------------------------------- fill_mask
@pytest.fixture(scope="module")
def tokenizer():
    """Each word of the sentence, its space before it, is one token."""
    return train_bpe([SENTENCE] * 2, 400)


@pytest.fixture(scope="module")
def random_bert(tokenizer):
    return make("bert", vocab_size=tokenizer.vocab_size, block_size=24)


def probabilities(model, tokenizer, left, right):
    """softmax at the mask of [CLS] left [MASK] right [SEP], the ids put together by hand."""
    cls, mask, sep = (tokenizer.special(name) for name in ("[CLS]", "[MASK]", "[SEP]"))
    ids = [cls, *tokenizer.encode(left), mask, *tokenizer.encode(right), sep]
    logits = model.logits(model(torch.tensor([ids])))[0, ids.index(mask)]
    return torch.softmax(logits.detach().double(), 0)


@pytest.mark.parametrize("text, left, right, space", [
    ("The capital of France is [MASK].", "The capital of France is", ".", " "),
    ("The capital of [MASK] is Paris.", "The capital of", " is Paris.", " "),
    ("[MASK] capital of France", "", " capital of France", ""),
    ("The capital of Fr[MASK]ce", "The capital of Fr", "ce", ""),
    ("is  [MASK]", "is ", "", " "),  # one of two spaces is the token's
    ("[MASK]", "", "", ""),
])  # fmt: skip
def test_fill_mask_gives_the_softmax_at_the_mask(random_bert, tokenizer, text, left, right, space):
    p = probabilities(random_bert, tokenizer, left, right)
    V = tokenizer.vocab_size
    found = fill_mask(random_bert, tokenizer, text, top_k=V)
    got = [probability for _, probability, _ in found]
    np.testing.assert_allclose(got, p.sort(descending=True).values, rtol=0, atol=1e-6)
    assert got == sorted(got, reverse=True) and abs(sum(got) - 1) < 1e-5
    order = p.argsort(descending=True).tolist()
    texts = [(tokenizer.decode([i]).removeprefix(space), p[i].item(),
              tokenizer.decode([*tokenizer.encode(left), i, *tokenizer.encode(right)]))
             for i in order]  # fmt: skip
    for k in (1, 5):
        for (name, q, filled), expected in zip(
                fill_mask(random_bert, tokenizer, text, k), texts, strict=False):  # fmt: skip
            assert (name, filled) == (expected[0], expected[2]) and abs(q - expected[1]) < 1e-6
        assert len(fill_mask(random_bert, tokenizer, text, k)) == k
    assert len(fill_mask(random_bert, tokenizer, text)) == 5


def test_fill_mask_puts_the_space_into_the_text_and_not_into_the_name(random_bert, tokenizer):
    paris = tokenizer.encode(" Paris")
    assert len(paris) == 1
    with torch.no_grad():
        model = make("bert", vocab_size=tokenizer.vocab_size, block_size=24)
        model.head.bias[paris[0]] = 1e4
    (name, p, filled), *_ = fill_mask(model, tokenizer, "The capital of France is [MASK].")
    assert (name, p, filled) == ("Paris", 1.0, SENTENCE)
    name, _, filled = fill_mask(model, tokenizer, "Fr[MASK]!", top_k=1)[0]
    assert (name, filled) == (" Paris", "Fr Paris!")  # nothing swallowed, nothing stripped


@pytest.mark.parametrize("text, top_k, message", [
    ("no mask here", 5, "holds 0 [MASK]: write exactly one"),
    ("", 5, "holds 0 [MASK]"),
    ("[MASK] and [MASK]", 5, "holds 2 [MASK]"),
    ("[MASK][MASK][MASK]", 5, "holds 3 [MASK]"),
    ("a [MASK]", 0, "top_k is 0: give 1 to "),
    ("a [MASK]", -1, "top_k is -1"),
    ("a [MASK]", 10**6, "top_k is 1000000"),
    ("word " * 30 + "[MASK]", 5, "the model's context 24: shorten it"),
])  # fmt: skip
def test_fill_mask_errors_are_the_users(random_bert, tokenizer, text, top_k, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        fill_mask(random_bert, tokenizer, text, top_k)
    assert "\n" not in str(error.value)


def test_fill_mask_needs_a_tokenizer_with_a_mask(random_bert):
    plain = train_bpe([SENTENCE], 300, specials=("<|endoftext|>",))
    with pytest.raises(UserError, match=re.escape("[CLS]")):
        fill_mask(random_bert, plain, "a [MASK]")


@pytest.mark.parametrize("preset", ["bert", "nano"])
def test_a_small_bert_learns_the_capital_of_france(tokenizer, preset):
    """Masks at random places of one sentence: each word is found again, Paris among them."""
    config = BERTConfig(vocab_size=tokenizer.vocab_size, block_size=16, n_layer=1, n_head=2,
                        n_embd=32, **PRESETS[preset])  # fmt: skip
    model, draws = BERT(config, rng=rng()), rng(1)
    cls, mask, sep = (tokenizer.special(name) for name in ("[CLS]", "[MASK]", "[SEP]"))
    row = torch.tensor([cls, *tokenizer.encode(SENTENCE), sep])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(80):
        hidden = torch.rand(16, len(row) - 2, generator=draws) < 0.25
        hidden = F.pad(hidden, (1, 1), value=False)  # never [CLS] or [SEP]
        hidden[:, -3] |= ~hidden.any(1)  # at least one a row
        idx = row.expand(16, -1).masked_fill(hidden, mask)
        loss = F.cross_entropy(model.logits(model(idx)[hidden]), row.expand(16, -1)[hidden])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    for word in ("Paris", "France", "capital"):
        name, p, filled = fill_mask(model, tokenizer, SENTENCE.replace(word, "[MASK]"))[0]
        assert name == word and filled == SENTENCE and p > 0.8, (name, p, filled)
