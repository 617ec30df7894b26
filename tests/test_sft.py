"""sft.py: rows, masks and batches by brute force; the loss against full logits in float64."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanokl import UserError, checkpoint
from nanokl.chat import CHAT_SPECIALS, Conversation, encode
from nanokl.data import BUCKET
from nanokl.generate import generate
from nanokl.gpt import GPT, GPTConfig
from nanokl.runtime import Runtime, generator
from nanokl.sft import SFTConfig, SFTTask, pack, rows_of, which_rows, word_for_word
from nanokl.tokenizer import train_bpe

CPU = Runtime(torch.device("cpu"), torch.float32, 0, 1)
TOKENIZER = train_bpe("what is 7 plus 5? 7 + 5 = 12 thank you. " * 9, 300, specials=CHAT_SPECIALS)
END, USER, ASSISTANT = map(TOKENIZER.special, ("<|endoftext|>", "<|user|>", "<|assistant|>"))


def talk(*contents, first=0):
    roles = ("user", "assistant")
    return Conversation("x", "train", [{"role": roles[(i + first) % 2], "content": c}
                              for i, c in enumerate(contents)], {})  # fmt: skip


def test_a_talk_that_fits_is_one_row():
    t = talk("what is 7 plus 5?", "7 + 5 = 12", "thank you.")
    assert rows_of(TOKENIZER, [t], 64) == [encode(TOKENIZER, t.messages)]
    assert rows_of(TOKENIZER, [talk("only a user")], 64) == []


@settings(deadline=None)
@given(st.lists(st.lists(st.text("abc 7", min_size=1, max_size=9), min_size=1, max_size=6),
                min_size=1, max_size=3), st.integers(6, 40))  # fmt: skip
def test_rows_hold_every_reply_once_behind_what_it_replies_to(contents, block_size):
    """A reply may be cut, to half of the room at the least; its question, to the end of it."""
    talks = [talk(*c, first=i) for i, c in enumerate(contents)]
    rows = rows_of(TOKENIZER, talks, block_size)
    assert all(len(ids) == len(mine) <= block_size and ids[0] == END and any(mine)
               for ids, mine in rows)
    said = []  # (what is read between the last reply and this one, the reply)
    for ids, mine in rows:
        read, reply = [], []
        for i, m, after in zip(ids, mine, [*mine[1:], False], strict=True):
            (reply if m else read).append(i)
            if m and not after:
                said.append((read, reply))
                read, reply = [], []
    wanted = []
    for t in talks:
        asked = None
        for m in t.messages:
            (_, *turn), _ = encode(TOKENIZER, [m])
            if m["role"] == "user":
                asked = turn
            else:
                wanted.append((asked, turn[1:]))
    assert len(said) == len(wanted)
    for (read, reply), (asked, turn) in zip(said, wanted, strict=True):
        assert reply == turn[: len(reply)]
        assert len(reply) == len(turn) or len(reply) >= block_size // 2 - 2
        assert read[-1] == ASSISTANT and len(set(read[:-1]) & {ASSISTANT}) == 0
        heard = [i for i in read[:-1] if i not in (END, USER)]
        assert heard == ([] if asked is None else asked[len(asked) - len(heard) :])


def test_every_row_once_an_epoch_and_like_lengths_together():
    """32 rows a bucket of 16 steps of 2: an epoch of 32."""
    lengths = torch.arange(32).flip(0)
    steps = [which_rows(lengths, s, batch_size=2, seed=3) for s in range(2 * BUCKET)]
    for epoch in (steps[:BUCKET], steps[BUCKET:]):
        assert sorted(torch.cat(epoch).tolist()) == list(range(32))
        assert all((lengths[a] - lengths[b]).abs() == 1 for a, b in epoch)
    assert [x.tolist() for x in steps[:BUCKET]] != [x.tolist() for x in steps[BUCKET:]]
    again = which_rows(lengths, 20, batch_size=2, seed=3)
    assert torch.equal(again, steps[20])
    few = torch.cat([which_rows(torch.ones(3), s, batch_size=4, seed=0) for s in range(3)])
    assert set(few.tolist()) == {0, 1, 2}  # fewer rows than a batch


def test_pack_by_hand():
    idx, mask = pack([([9, 1, 2], [False, False, True]), ([9, 3], [False, True])], fill=7)
    assert idx.tolist() == [[9, 1, 2], [9, 3, 7]]
    assert mask.tolist() == [[False, True], [True, False]]


@dataclass
class Flags(SFTConfig):
    data: Path = None
    out: Path = None
    seed: int = 0
    freeze: int = 0
    config: dict = field(default_factory=dict)


@pytest.fixture
def folder(tmp_path):
    """A data folder of few dialogues, and a GPT that has seen none."""
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"split": split, "messages": talk(f"what is {a} plus {b}?", f"{a} + {b} = {a + b}",
                                              "thank you.").messages}
            for split in ("train", "val", "test") for a in range(3) for b in range(4)]
    (data / "conversations.jsonl").write_text("\n".join(map(json.dumps, rows)))
    TOKENIZER.save(data)
    gpt = GPT(GPTConfig(vocab_size=TOKENIZER.vocab_size, block_size=48, n_layer=1, n_head=2,
                        n_embd=16), generator(0))
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator(1, p.numel())))
    checkpoint.save(tmp_path / "gpt", gpt, tokenizer=TOKENIZER)
    return tmp_path


@pytest.mark.parametrize("kl_coef", [0.0, 0.7])
def test_loss_by_full_logits(folder, kl_coef):
    flags = Flags(data=folder / "data", init=folder / "gpt", kl_coef=kl_coef, batch_size=4)
    task = SFTTask(flags, CPU)
    with torch.no_grad():
        for p in task.core.parameters():
            p.add_(0.05)
    loss = task.loss(task.core, 0)
    ref = GPT.from_pretrained(folder / "gpt").double()
    model = GPT(task.core.config).double()
    model.load_state_dict(task.core.state_dict())
    n = sum(sum(mine) for _, mine in task.rows["train"]) / len(task.rows["train"])
    total = 0.0
    for i in which_rows(task.lengths, 0, batch_size=4, seed=0).tolist():
        ids, mine = task.rows["train"][i]
        logp, logp_ref = ((m.head(m(torch.tensor([ids]))[0])).log_softmax(-1)
                          for m in (model, ref))
        for t in range(len(ids) - 1):
            if mine[t + 1]:
                kl = (logp[t].exp() * (logp[t] - logp_ref[t])).sum()
                total = total - logp[t, ids[t + 1]] + kl_coef * kl
    torch.testing.assert_close(loss.double(), total / (4 * n), atol=1e-4, rtol=1e-4)
    loss.backward()  # users' words are read, not learnt: no gradient but through the assistant's
    assert all(p.grad is not None for p in task.core.parameters() if p.requires_grad)
    other = GPT.from_pretrained(folder / "gpt")  # what is validated is an average, not the core
    report = task.validate(other)
    task.core = other
    assert task.validate(other) == report
    assert ("kl_nats_per_reply_token" in report) == (kl_coef > 0)
    assert 0 <= report["reply_token_accuracy"] <= 1 and report["nats_per_reply_token"] > 0


def test_long_rows_weigh_as_much(folder):
    """Rows of unlike length: the gradient of an epoch's steps is that of a mean over all tokens.

    A bucket is an epoch: 16 rows in batches of one, each of its own length.
    """
    rows = [{"split": split, "messages": talk("what is 7?", "7 " * k).messages}
            for split in ("train", "val", "test") for k in range(1, 17)]
    (folder / "data" / "conversations.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = SFTTask(Flags(data=folder / "data", init=folder / "gpt", batch_size=1), CPU)
    assert len(set(task.lengths.tolist())) == BUCKET
    (sum(task.loss(task.core, step) for step in range(BUCKET)) / BUCKET).backward()
    idx, mask = pack(task.rows["train"], END)
    model = GPT.from_pretrained(folder / "gpt")
    logp = model.logits(model(idx[:, :-1])).log_softmax(-1)
    (-logp.gather(2, idx[:, 1:, None])[..., 0][mask].mean()).backward()
    for p, q in zip(task.core.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-3)


def test_word_for_word(folder):
    """A model that has learnt three answers by heart says these and no other."""
    rows = rows_of(TOKENIZER, [talk(q, a, "thank you.") for q, a in zip("abc", "757", strict=True)],
                   48)
    model = GPT.from_pretrained(folder / "gpt")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        idx, mask = pack(rows, END)
        logp = model.logits(model(idx[:, :-1])).log_softmax(-1)
        loss = -(logp.gather(2, idx[:, 1:, None])[..., 0] * mask).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert word_for_word(model.eval(), rows, END)["replies_word_for_word"] == 1
    longer = [*rows, ([END, *range(40), USER, 3], [False] * 42 + [True])]  # cuts none of the others
    assert word_for_word(model, longer, END)["replies_word_for_word"] >= 3 / 4
    for ids, mine in rows:  # what greedy decoding says
        first = mine.index(True)
        said = generate(model, [ids[:first]], 8, temperature=0.0, stop=END).responses()[0]
        assert said == [i for i, m in zip(ids, mine, strict=True) if m][: len(said)]
    wrong = rows_of(TOKENIZER, [talk("a", "7"), talk("b", "7"), talk("c", "7 7")], 48)
    s = word_for_word(model, wrong, END)
    assert s["replies_word_for_word"] == pytest.approx(1 / 3) and s["replies"] == 3
    assert word_for_word(model, wrong, END, most=1)["replies_word_for_word"] == 1


def test_what_cannot_be_tuned(folder):
    plain = train_bpe("what is 7 plus 5? " * 9, 290)
    checkpoint.save(folder / "plain", GPT(GPTConfig(vocab_size=plain.vocab_size, block_size=16,
                                                    n_layer=1, n_head=2, n_embd=16)),
                    tokenizer=plain)  # fmt: skip
    with pytest.raises(UserError, match=r"no <\|assistant\|> and no <\|user\|>: give a model"):
        SFTTask(Flags(data=folder / "data", init=folder / "plain"), CPU)
    with pytest.raises(UserError, match="kl_coef is 1.0 and init None"):
        Flags(kl_coef=1.0)
    path = folder / "data" / "conversations.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["split"] == "val":
            row["messages"] = row["messages"][:1]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match="no reply of an assistant in val"):
        SFTTask(Flags(data=folder / "data"), CPU)
