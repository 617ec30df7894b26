"""stream.py: the tokens of `generate` at the same numbers; whole characters, no control ones."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanokl import UserError
from nanokl.generate import generate
from nanokl.gpt import GPT, GPTConfig
from nanokl.runtime import generator
from nanokl.stream import Characters, one_row, stream, visible

V, STOP, NEW = 11, 3, 12


@pytest.fixture(scope="module", params=[[], [64]], ids=["plain", "ngrams"])
def model(request):
    gpt = GPT(GPTConfig(vocab_size=V, block_size=20, n_layer=2, n_head=2, n_embd=16,
                        ngram_rows=request.param), generator(0))
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator(1, p.numel())))
    return gpt.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_the_tokens_of_generate(model, temperature, dtype):
    """Ends among them: at temperature above 0 some of 20 texts stop before 12 tokens, some do not.
    """
    lengths = set()
    for seed in range(20):
        prompt, u = [STOP, seed % V], torch.rand(1, NEW, generator=generator(seed))
        with torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
            theirs = generate(model, [prompt], NEW, stop=STOP, temperature=temperature, u=u)
            tokens = stream(model, prompt, u[0], stop=STOP, temperature=temperature)
            first = next(tokens)  # one that is asked for under autocast
        mine = [first, *tokens]
        assert [mine] == theirs.responses()
        row = one_row(prompt, mine, STOP, "cpu")
        for name in ("idx", "mask", "n_prompt", "stopped"):
            assert torch.equal(getattr(row, name), getattr(theirs, name)), name
        lengths.add(len(mine))
    assert temperature == 0 or (NEW in lengths and min(lengths) < NEW)


def test_a_token_costs_one_step(model):
    """With a cache a model reads each token once, when it is asked for."""
    read = []
    handle = model.register_forward_hook(lambda _, args, out: read.append(args[0].shape[1]))
    tokens = stream(model, [STOP, 1, 2], torch.full((5,), 0.5), stop=-1)
    next(tokens)
    assert read == [3]
    list(tokens)
    handle.remove()
    assert read == [3, 1, 1, 1, 1]


def test_what_cannot_be_continued(model):
    with pytest.raises(UserError, match="an empty prompt"):
        stream(model, [], torch.rand(3), stop=STOP)
    with pytest.raises(UserError, match="do not fit the context of 20"):
        stream(model, [1] * 18, torch.rand(3), stop=STOP)


@given(st.binary(max_size=40), st.lists(st.integers(1, 5)))
def test_any_cuts_give_the_same_characters(data, sizes):
    characters, out, at = Characters(), [], 0
    for size in [*sizes, len(data)]:
        out.append(characters.add(data[at : at + size]))
        at += size
    out.append(characters.end())
    assert "".join(out) == visible(data.decode("utf-8", "replace"))


def test_a_character_is_shown_when_it_is_whole():
    characters = Characters()
    assert [characters.add(bytes([b])) for b in "a你é".encode()] == ["a", "", "", "你", "", "é"]
    assert characters.add("你".encode()[:2]) == "" and characters.end() == "\ufffd"


def test_visible_by_hand():
    assert visible("a\tb\nc") == "a\tb\nc"
    assert visible("\x1b[31m\x07\r\x00\x7f") == "␛[31m␇␍␀␡"
    assert visible("\x9b2J \u202eabc\u2066") == "\ufffd2J \ufffdabc\ufffd"
    assert visible("你好 🙂 é") == "你好 🙂 é"


@given(st.text())
def test_nothing_that_steers_a_terminal_is_left(text):
    shown = visible(text)
    assert len(shown) == len(text)
    assert not any(ord(c) < 32 and c not in "\n\t" or 127 <= ord(c) < 160 for c in shown)
