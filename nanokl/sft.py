"""Supervised fine-tuning on conversations: what the assistant says is learnt, the rest is read.

    loss = 1 / (B n)  sum over the assistant's tokens in B rows of
               -log pi(y_t | y_<t) + kl_coef KL(pi || ref)(y_<t)

The first term is KL(data || pi) less what no model can change: of a point mass on one text it is
that text's -log pi, while KL(pi || point mass) is infinite for every pi that can say anything else.
The second is exact, over the whole vocabulary, at each of those tokens; ref is the model that it
starts from. n is what the assistant says in a row, a mean over all training rows: the rows of a
batch are of like length, and divided by their own number of tokens those of long rows would weigh
less than those of short ones. Left out: packing of several conversations into a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from nanokl import UserError, checkpoint, require_positive, training
from nanokl.chat import Conversation, encode_turn, load_conversations, require_turns
from nanokl.data import BUCKET, shuffled
from nanokl.gpt import GPT, GPTConfig
from nanokl.hf_tokenizer import load_tokenizer
from nanokl.logprob import linear_logprob
from nanokl.metrics import mean_se
from nanokl.runtime import Runtime, generator

Row = tuple[list[int], list[bool]]  # ids, and which of them the assistant has said


@dataclass(kw_only=True)
class SFTConfig:
    """What fine-tuning needs to know; the script adds the loop's settings."""

    init: Path | None = None  # the GPT to start from; without one a fresh model of these sizes
    n_layer: int = 4  # blocks of a fresh model
    n_head: int = 4  # its attention heads
    n_embd: int = 128  # its width
    block_size: int = 64  # its context, tokens
    kl_coef: float = 0.0  # price of a nat of KL to the model that it starts from
    batch_size: int = 64  # rows a step, over all processes

    def __post_init__(self):
        require_positive(self, "batch_size")
        if not 0 <= self.kl_coef < float("inf") or (self.kl_coef and self.init is None):
            raise UserError(f"kl_coef is {self.kl_coef} and init {self.init}: give 0 or more, and "
                            "the model to stay near")


def rows_of(tokenizer, talks: Sequence[Conversation], block_size: int) -> list[Row]:
    """Conversations as rows of at most block_size tokens, cut between turns; long turns are cut.

    A row that would begin with a reply begins with what it replies to, which is read again: the end
    of it, as in `chat.prompt`. Rows in which the assistant says nothing are left out.
    """
    start, rows = tokenizer.special("<|endoftext|>"), []
    for talk in talks:
        ids, mine, asked = [start], [False], []
        for message in talk.messages:
            turn = encode_turn(tokenizer, message["role"], message["content"])
            if len(ids) > 1 and len(ids) + len(turn) > block_size:
                rows.append((ids, mine))
                room = max(block_size - 1 - len(turn), block_size // 2 - 1)
                again = asked if message["role"] == "assistant" else []
                ids = [start, *again[:1], *again[1:][max(0, len(again) - room) :]]
                mine = [False] * len(ids)
            if message["role"] == "user":
                asked = turn
            turn = turn[: block_size - len(ids)]
            ids = ids + turn
            mine = mine + [False] + [message["role"] == "assistant"] * (len(turn) - 1)
        rows.append((ids, mine))
    return [row for row in rows if any(row[1])]


def which_rows(lengths: Tensor, step: int, *, batch_size: int, seed: int) -> Tensor:
    """A step's rows (batch_size,), of like length: all of them, shuffled, then all again."""
    (bucket, turn), size = divmod(step, BUCKET), BUCKET * batch_size
    rows = shuffled(len(lengths), bucket * size, size, seed=seed, stream="talks")
    by_length = rows[lengths[rows].argsort(stable=True)].view(BUCKET, batch_size)
    return by_length[torch.randperm(BUCKET, generator=generator(seed, "turns", bucket))[turn]]


def pack(rows: Sequence[Row], fill: int) -> tuple[Tensor, Tensor]:
    """idx (B, T), padded on the right, and mask (B, T-1), True where idx[:, t+1] is learnt."""
    T = max(len(ids) for ids, _ in rows)
    idx = torch.tensor([[*ids, *[fill] * (T - len(ids))] for ids, _ in rows])
    mine = torch.tensor([[*mine, *[False] * (T - len(mine))] for _, mine in rows])
    return idx, mine[:, 1:]


# Greedy decoding says y exactly if at each of y's tokens, after those before it, y_t is likeliest.
@torch.no_grad()
def word_for_word(model: GPT, rows: Sequence[Row], fill: int, most: int = 512) -> dict:
    """Of the first replies in (at most `most`) rows, how many the model's likeliest words are."""
    right = []
    for i in range(0, min(len(rows), most), 128):
        some = pack(rows[i : min(i + 128, most)], fill)
        idx, mask = (x.to(model.head.weight.device) for x in some)
        ended = pad(mask[:, 1:] < mask[:, :-1], (1, 0)).cumsum(1) > 0  # after a reply's end
        first = mask & ~ended
        likeliest = model.logits(model(idx[:, :-1])).argmax(-1)
        right.append(((likeliest == idx[:, 1:]) | ~first).all(1).float())
    share, se = mean_se(torch.cat(right))
    return {"replies": len(torch.cat(right)), "replies_word_for_word": share,
            "replies_word_for_word_se": se}


class SFTTask:
    """A GPT that answers; RewardTask's methods."""

    metric, loss_name = "reply_token_accuracy", "loss_nats_per_token"  # the more the better

    def __init__(self, flags, runtime: Runtime):
        folder = flags.data if flags.init is None else checkpoint.resolve(flags.init)
        self.flags, self.runtime, self.tokenizer = flags, runtime, load_tokenizer(folder)
        require_turns(self.tokenizer, f"the tokenizer of {folder}")
        if flags.init is None:
            config = GPTConfig(vocab_size=self.tokenizer.vocab_size, block_size=flags.block_size,
                               n_layer=flags.n_layer, n_head=flags.n_head, n_embd=flags.n_embd)
            self.core = GPT(config, generator(flags.seed, "weights"))
        else:
            self.core = GPT.from_pretrained(folder, dropout=0.0, ngram_dropout=0.0)
        self.core.to(runtime.device)
        self.ref = None
        if flags.kl_coef:
            self.ref = GPT.from_pretrained(folder, dropout=0.0).to(runtime.device).eval()
            self.ref.requires_grad_(False)
        training.freeze(self.core, flags.freeze)
        self.rows = {split: rows_of(self.tokenizer, load_conversations(flags.data, split),
                                    self.core.config.block_size)
                     for split in ("train", "val", "test")}
        if empty := [split for split, rows in self.rows.items() if not rows]:
            raise UserError(f"{flags.data} has no reply of an assistant in {', '.join(empty)}: "
                            "give more conversations")
        self.lengths = torch.tensor([len(ids) for ids, _ in self.rows["train"]])
        self.n_mean = sum(sum(mine) for _, mine in self.rows["train"]) / len(self.lengths)

    def _measure(self, model, head: Tensor, rows: Sequence[Row]):
        """idx (B, T), mask (B, T-1), hidden states, and log-probs of replies, with KL if asked."""
        fill = self.tokenizer.special("<|endoftext|>")
        idx, mask = (x.to(self.runtime.device) for x in pack(rows, fill))
        ref = None
        if self.ref is not None:
            with torch.no_grad():
                ref = self.ref(idx[:, :-1]), self.ref.head.weight
        h = model(idx[:, :-1])
        return idx, mask, h, linear_logprob(h, head, idx[:, 1:], mask=mask, ref=ref)

    def loss(self, model, step: int) -> Tensor:
        """The formula above; a mean over processes and an epoch's steps is nats a reply token."""
        flags = self.flags
        mine = which_rows(self.lengths, step, batch_size=flags.batch_size, seed=flags.seed)
        rows = [self.rows["train"][i] for i in mine.tolist()]
        with self.runtime.autocast():
            *_, out = self._measure(model, self.core.head.weight, self.runtime.shard(rows))
        nats = -out.logp.sum() if self.ref is None else (flags.kl_coef * out.kl - out.logp).sum()
        return nats * self.runtime.world / (flags.batch_size * self.n_mean)

    @torch.no_grad()
    def _report(self, model: GPT, split: str) -> dict:
        nats = kl = right = n = 0.0
        rows = sorted(self.rows[split], key=lambda row: -len(row[0]))
        for i in range(0, len(rows), 128):
            with self.runtime.autocast():
                idx, mask, h, out = self._measure(model, model.head.weight, rows[i : i + 128])
                likeliest = model.logits(h[mask]).argmax(-1)
            nats -= out.logp.double().sum().item()
            kl += 0.0 if out.kl is None else out.kl.double().sum().item()
            right += (likeliest == idx[:, 1:][mask]).sum().item()
            n += mask.sum().item()
        report = {"nats_per_reply_token": nats / n, "reply_token_accuracy": right / n}
        return report | ({"kl_nats_per_reply_token": kl / n} if self.ref is not None else {})

    def validate(self, model: GPT) -> dict:
        """Of the validation conversations, teacher-forced."""
        model.eval()
        return self._report(model, "val")

    def finish(self) -> dict:
        """The best model on the test conversations."""
        model = GPT.from_pretrained(self.flags.out / "best").to(self.runtime.device).eval()
        return {"rows": len(self.rows["train"]), **self._report(model, "test"),
                **word_for_word(model, self.rows["test"],
                                self.tokenizer.special("<|endoftext|>"))}
