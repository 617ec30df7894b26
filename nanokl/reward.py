"""Reward models: a scalar head on any trunk, learnt from people's judgements; and any function.

A reward function takes token ids and texts, one each per sample, and returns one number each.
A RewardModel is one; so is anything of the form `def reward(ids, texts): return [...]`.
"""

import runpy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanokl import UserError, checkpoint, one_line, require_types
from nanokl.data import text_batch
from nanokl.hf_tokenizer import load_tokenizer
from nanokl.judgements import HumanPairs, Judgements
from nanokl.ngrams import NOTHING, PIECES, NgramScore, Vocabulary, ngrams, pieces, vocabulary
from nanokl.tokenizer import Tokenizer
from nanokl.trunks import TRUNKS, embed, hide_tokens, mean, pooled, without_heads

RewardFunction = Callable[[list[list[int]], list[str]], Sequence[float]]


@dataclass
class RewardConfig:
    trunk: str = "BERT"  # BERT or GPT
    trunk_config: dict = field(default_factory=dict)  # the trunk's own config
    dropout: float = 0.0  # on the pooled hidden state, in train mode only
    ngram_dropout: float = 0.0  # share of n-grams hidden, in train mode only
    n_ngrams: int = 1  # known n-grams, the unknown one included
    members: int = 1

    def __post_init__(self):
        require_types(self)


class Member(nn.Module):
    """Two margins (B, 2) of texts: encoder and linear.

    encoder = w . [pooled, mean(x)]: of hidden states, and of x, the blocks' input, a bag of words.
    To a token's embedding are added those of its domain, as BERT's segment, since people rate news
    by another measure than films, and the mean of those of its word's pieces, which rare words
    share (fastText, arXiv:1607.04606). linear is a sum over n-grams (ngrams.py).
    """

    def __init__(self, config: RewardConfig):
        super().__init__()
        cls = TRUNKS[config.trunk]
        self.trunk = cls(cls.Config(**config.trunk_config))
        without_heads(self.trunk)
        C = self.trunk.config.n_embd
        self.drop = nn.Dropout(config.dropout)
        self.score = nn.Linear(2 * C, 1, bias=False)  # comparisons cannot see a constant
        nn.init.normal_(self.score.weight, std=(2 * C + 1) ** -0.5)  # Ziegler et al. 2019
        self.pieces = nn.EmbeddingBag(PIECES, C, mode="mean")
        nn.init.zeros_(self.pieces.weight)  # the trunk starts as it was pretrained
        self.linear = NgramScore(config.n_ngrams, self.trunk.config.n_segment, config.ngram_dropout)

    def forward(self, idx: Tensor, mask: Tensor, domain: Tensor, hashes: Tensor, start: Tensor,
                rows: Tensor, row_start: Tensor) -> Tensor:
        """One batch of `RewardModel.inputs` -> (B, 2), float32."""
        segment = domain[:, None].expand_as(idx)
        extra = self.pieces(rows, row_start).view(*idx.shape, -1)
        x = embed(self.trunk, idx, segment, extra)
        features = torch.cat((pooled(self.trunk, x, mask), mean(x, mask)), dim=1)
        encoder = self.score(self.drop(features)).float()[:, 0]
        return torch.stack((encoder, self.linear(hashes, start, domain)), dim=1)


class RewardModel(nn.Module):
    """score = gain * (v . margins) + bias, (B,); margins are the mean of the members' (B, 2).

    Each margin learns as if it were alone, since of two that are trained on their sum the faster
    one leaves the other nothing to learn; they err in different places, and `stack` weighs them.
    More members, each with comparisons of its own, are an ensemble (arXiv:2310.02743).
    """

    Config = RewardConfig

    def __init__(self, config: RewardConfig):
        super().__init__()
        self.config = config
        self.members = nn.ModuleList(Member(config) for _ in range(config.members))
        self.register_buffer("v", torch.full((2,), 0.5))
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("bias", torch.zeros(()))

    @property
    def block_size(self) -> int:
        """Tokens that a text may have, [CLS] and [SEP] counted."""
        return self.members[0].trunk.config.block_size

    @classmethod
    def on(cls, trunk: nn.Module, *, n_domain: int, dropout: float = 0.0,
           ngram_dropout: float = 0.0, vocabulary: Vocabulary = NOTHING,
           members: int = 1) -> "RewardModel":
        """Fresh heads on a pretrained trunk (its weights are copied), one segment a domain."""
        config = {**asdict(trunk.config), "n_segment": n_domain, "dropout": dropout}
        model = cls(RewardConfig(type(trunk).__name__, config, dropout, ngram_dropout,
                                 len(vocabulary.known), members))
        weights = trunk.state_dict()
        first = weights["wse.weight"][0] if trunk.config.n_segment else torch.zeros(())
        weights["wse.weight"] = first.expand(n_domain, trunk.config.n_embd)
        for member in model.members:
            member.trunk.load_state_dict(weights)
            member.linear.load_state_dict(vocabulary._asdict(), strict=False)
        return model

    def inputs(self, tokenizer: Tokenizer, texts: Sequence[str], domain: Tensor,
               hide: Tensor | None = None) -> tuple:
        """A batch for a member: idx, mask (B, T); domain (B,); ngrams; pieces.

        hide (B, block_size) is True where the encoder sees [MASK] in the place of a token.
        """
        idx, mask = text_batch(tokenizer, texts, block_size=self.block_size)
        grams = ngrams(texts, idx, mask, domain.tolist(), keep=self.training)
        if hide is not None:
            hide_tokens(tokenizer, idx, hide)
        return idx, mask, domain, *grams, *pieces(tokenizer.tokens, idx)

    def forward(self, *batches: Sequence[Tensor]) -> Tensor:
        """A batch of `inputs` for each member -> their margins (members, B, 2)."""
        parts = [member(*batch) for member, batch in zip(self.members, batches, strict=True)]
        return torch.stack(parts)

    @torch.no_grad()
    def normalise(self, score: Tensor) -> None:
        """Shifts and scales so that these samples would score mean 0, sd 1 (Ziegler et al.)."""
        sd, mean = torch.std_mean(score.float())
        if not sd > 0:
            raise UserError("all samples of the reference policy score alike: the reward model "
                            "cannot be normalised; train it longer")
        self.gain /= sd
        self.bias.copy_((self.bias - mean) / sd)

    # Wolpert 1992, Platt 1999: P(a beats b) = sigmoid(v . (m_a - m_b)), as in bradley_terry; v has
    # the least nats per pair + .0005 |v - 1/2|^2, which decides where pairs say nothing. By Newton.
    @torch.no_grad()
    def stack(self, margins: Tensor, pairs: HumanPairs) -> None:
        """Sets v from margins (N, 2) of texts that no part has learnt, and people's comparisons."""
        d = (margins[pairs.a] - margins[pairs.b]).double()  # (P, 2)
        wins, loses = torch.from_numpy(pairs.wins), torch.from_numpy(pairs.loses)
        v = d.new_full((2,), 0.5)
        for _ in range(20):
            p = torch.sigmoid(d @ v)  # (P,)
            slope = 0.001 * (v - 0.5) + ((wins + loses) * p - wins) @ d
            each = (wins + loses) * p * (1 - p)
            curvature = 0.001 * torch.eye(2) + (each[:, None] * d).T @ d  # (2, 2)
            v = v - torch.linalg.solve(curvature, slope)
        self.v.copy_(v)

    def score_texts(self, tokenizer: Tokenizer, texts: Sequence[str], domain=0,
                    batch: int = 256) -> Tensor:
        """Scores (N,) of texts on the CPU; the arguments are those of `margins_of`."""
        margins = self.margins_of(tokenizer, texts, domain, batch)
        score = (margins * self.v.cpu()).sum(1)  # a matrix product would round under autocast
        return self.gain.cpu() * score + self.bias.cpu()

    @torch.no_grad()
    def guess_texts(self, tokenizer: Tokenizer, texts: Sequence[str], domain=0,
                    batch: int = 1024) -> Tensor:
        """About `score_texts`, (N,) on the CPU, by the n-grams alone, as if the encoder agreed.

        Much the faster of the two, for texts that are not done: shaping asks after every token.
        """
        domain, parts = torch.as_tensor(domain).expand(len(texts)), []
        for i in range(0, len(texts), batch):
            few, at = texts[i : i + batch], domain[i : i + batch]
            idx, mask = text_batch(tokenizer, few, block_size=self.block_size)
            hashes, *rest = (x.to(self.gain.device)
                             for x in (*ngrams(few, idx, mask, at.tolist()), at))
            ids = self.members[0].linear.look_up(hashes)  # all members know the same n-grams
            parts.append(sum(member.linear.score(ids, *rest) for member in self.members))
        mean = torch.cat(parts) / len(self.members)
        return (self.gain * self.v.sum() * mean + self.bias).cpu()

    @torch.no_grad()
    def margins_of(self, tokenizer: Tokenizer, texts: Sequence[str], domain=0,
                   batch: int = 256) -> Tensor:
        """Margins (N, 2) on the CPU, in eval mode, batched by length, long texts cut.

        domain: of each text (N,), or of all; 0 is the first in judgements.jsonl.
        """
        training, device = self.training, self.gain.device
        self.eval()
        domain = torch.as_tensor(domain).expand(len(texts))
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        out = torch.empty(len(texts), 2)
        for i in range(0, len(texts), batch):
            rows = order[i : i + batch]
            inputs = self.inputs(tokenizer, [texts[r] for r in rows], domain[rows])
            inputs = [x.to(device) for x in inputs]
            out[rows] = self(*[inputs] * len(self.members)).mean(0).cpu()
        self.train(training)
        return out


def learn_vocabulary(tokenizer: Tokenizer, j: Judgements, trunk) -> Vocabulary:
    """The n-grams of rated texts. A word of the lexicon is read as a text of every domain."""
    words = j.domain_names.index("lexicon") if "lexicon" in j.domain_names else -1
    rating, alone = j.mean(), j.domains == words
    rows, domain = np.array([(i, d) for d in np.unique(j.domains[~alone])
                             for i in np.flatnonzero((j.domains == d) | alone)]).T
    texts = [j.texts[i] for i in rows]
    idx, mask = text_batch(tokenizer, texts, block_size=trunk.config.block_size)
    hashes, start = ngrams(texts, idx, mask, domain.tolist())
    valence = {j.texts[i]: float(rating[i]) for i in np.flatnonzero(alone)}
    return vocabulary(hashes, start, j.standard[rows], valence)


# Bradley & Terry 1952: P(a beats b) = sigmoid(score_a - score_b);
# loss = -mean over comparisons of log P(the human's answer).
def bradley_terry(score: Tensor, wins: Tensor, valid: Tensor) -> tuple[Tensor, dict]:
    """Mean negative log-likelihood, nats per comparison, of all comparisons inside groups.

    score (G, K); wins (G, K, K) is 1 where row a beat column b, valid bool. Returns (loss, info).
    """
    margin = score[:, :, None] - score[:, None, :]  # (G, K, K)
    nll = F.binary_cross_entropy_with_logits(margin, wins, reduction="none")
    return (nll * valid).sum() / valid.sum().clamp(min=1), {"n_pairs": valid.sum()}


def squared_error(score: Tensor, target: Tensor) -> Tensor:
    """Mean of (score - target)^2, both of the same shape: the objective of ratings."""
    return (score - target).square().mean()


def check_scores(scores, n: int) -> Tensor:
    """The (n,) float32 scores of a reward function; UserError where they are not that."""
    try:
        scores = torch.as_tensor(scores, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError) as e:
        raise UserError(f"the reward function returned {type(scores).__name__} ({e}): return one "
                        "number per sample") from None
    if scores.shape != (n,):
        raise UserError(f"the reward function returned shape {tuple(scores.shape)} for {n} "
                        "samples: return one number per sample")
    if not scores.isfinite().all():
        bad = int((~scores.isfinite()).sum())
        raise UserError(f"the reward function returned {bad} NaN or infinite scores of {n}: "
                        "return finite numbers")
    return scores


def load_function(spec: str) -> RewardFunction:
    """The function of FILE.py:NAME; UserError where either is missing or the file fails."""
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"no file {path!r} for {spec!r}: give FILE.py:FUNCTION")
    try:
        function = runpy.run_path(path).get(name)
    except Exception as e:  # whatever the user's own code raises
        reason = one_line(e)
        raise UserError(f"{path} cannot be run ({reason}): mend it") from e
    if not callable(function):
        raise UserError(f"{path} has no function {name!r}: give FILE.py:FUNCTION")
    return function


def load_reward(spec: str, runtime) -> tuple[RewardFunction, RewardFunction]:
    """Score and quick guess of texts, by a reward run's model or the function of FILE.py:NAME.

    The guess is `guess_texts`, for texts that are not done; a file's function has none but itself.
    """
    if ".py:" in spec or spec.endswith(".py"):
        function = load_function(spec)
        return function, function
    folder = checkpoint.resolve(spec)
    model = checkpoint.load(folder, RewardModel).to(runtime.device).eval()
    tokenizer = load_tokenizer(folder)

    def by(method: Callable[[Tokenizer, Sequence[str]], Tensor]) -> RewardFunction:
        def reward(ids: list[list[int]], texts: list[str]) -> Tensor:
            with runtime.autocast():
                return method(tokenizer, texts)

        return reward

    return by(model.score_texts), by(model.guess_texts)
