"""Classes of texts on any trunk: the classic second half of BERT, and of GPT.

    p(class | text) = softmax(W pool(h) + b),    loss = -mean log p(label)

Devlin et al. arXiv:1810.04805 and Radford et al. 2018 fine-tune the whole model, as here; pool is
the mean over an encoder's tokens, or a causal model's last hidden state. Left out: pairs of texts,
classes of single tokens.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanokl import UserError, checkpoint, figures, require_types, training, trunks
from nanokl.data import shuffled, text_batch
from nanokl.hf_tokenizer import load_tokenizer
from nanokl.judgements import Judgements
from nanokl.labelled import read_labelled
from nanokl.runtime import Runtime, generator

MOST = 1000  # classes; more are no labels
SENTIMENT = ("negative", "neutral", "positive")  # of mean ratings below -.5, between, above .5


@dataclass
class ClassifierConfig:
    trunk: str = "BERT"  # BERT or GPT
    trunk_config: dict = field(default_factory=dict)  # the trunk's own config
    labels: list[str] = field(default_factory=list)  # the classes' names, in order
    dropout: float = 0.0  # on the pooled hidden state, in train mode only

    def __post_init__(self):
        require_types(self)


class Classifier(nn.Module):
    """Logits (B, K) of texts."""

    Config = ClassifierConfig

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        self.config = config
        cls = trunks.TRUNKS[config.trunk]
        self.trunk = cls(cls.Config(**config.trunk_config))
        trunks.without_heads(self.trunk)
        self.drop = nn.Dropout(config.dropout)
        self.score = nn.Linear(self.trunk.config.n_embd, len(config.labels))
        nn.init.normal_(self.score.weight, std=0.02)
        nn.init.zeros_(self.score.bias)

    @property
    def block_size(self) -> int:
        """Tokens that a text may have, [CLS] and [SEP] counted."""
        return self.trunk.config.block_size

    @classmethod
    def on(cls, trunk: nn.Module, labels: Sequence[str], *, dropout: float = 0.0) -> "Classifier":
        """A fresh head on a pretrained trunk, whose weights are copied."""
        config = {**asdict(trunk.config), "dropout": dropout}
        model = cls(ClassifierConfig(type(trunk).__name__, config, list(labels), dropout))
        model.trunk.load_state_dict(trunk.state_dict())
        return model

    def forward(self, idx: Tensor, mask: Tensor) -> Tensor:
        """idx, mask (B, T) of `text_batch` -> (B, K), float32."""
        x = trunks.embed(self.trunk, idx)
        return self.score(self.drop(trunks.pooled(self.trunk, x, mask))).float()

    @torch.no_grad()
    def predict(self, tokenizer, texts: Sequence[str], batch: int = 256) -> Tensor:
        """Probabilities (N, K) on the CPU, in eval mode, batched by length, long texts cut."""
        training, device = self.training, self.score.weight.device
        self.eval()
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        out = torch.empty(len(texts), len(self.config.labels))
        for i in range(0, len(texts), batch):
            rows = order[i : i + batch]
            inputs = text_batch(tokenizer, [texts[r] for r in rows],
                                block_size=self.block_size)
            out[rows] = self(*(x.to(device) for x in inputs)).softmax(-1).cpu()
        self.train(training)
        return out


# Of class k, with n_ij texts of class i that were called j:
#     precision = n_kk / sum_i n_ik,                recall = n_kk / sum_j n_kj
#     F1 = 2 / (1/precision + 1/recall) = 2 n_kk / (sum_i n_ik + sum_j n_kj)
# macro-F1 is the mean of F1 over the classes, so that rare ones count as much.
def scores(truth: np.ndarray, called: np.ndarray, labels: Sequence[str]) -> dict:
    """Accuracy, macro-F1 and what they are made of; truth and called (N,) are class numbers.

    A class that neither occurs nor is called has an F1 of 0, and counts.
    """
    K = len(labels)
    confusion = np.bincount(truth * K + called, minlength=K * K).reshape(K, K)
    right, given, said = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    f1 = 2 * right / np.maximum(given + said, 1)
    accuracy, n = float(right.sum() / len(truth)), len(truth)
    return {"accuracy": accuracy, "accuracy_se": (accuracy * (1 - accuracy) / n) ** 0.5,
            "macro_f1": float(f1.mean()), "majority_accuracy": float(given.max() / n),
            "f1": dict(zip(labels, f1.tolist(), strict=True)), "labels": list(labels),
            "confusion": confusion.tolist(), "n_texts": n}


def load_split(data, split: str) -> tuple[list[str], list[str]]:
    """Texts and labels of a file of labelled texts, or of ratings by people as sentiment."""
    if data.is_file():
        rows = [row for row in read_labelled(data) if row.split == split]
        return [row.text for row in rows], [row.label for row in rows]
    j = Judgements.load(data, split)
    return j.texts, [SENTIMENT[i] for i in np.digitize(j.mean(), (-0.5, 0.5))]


class ClassTask:
    """A classifier of labelled texts; RewardTask's methods."""

    metric, loss_name = "accuracy", "loss_nats_per_text"  # of validation, the more the better

    def __init__(self, flags, runtime: Runtime):
        folder = checkpoint.resolve(flags.init)
        self.flags, self.runtime, self.tokenizer = flags, runtime, load_tokenizer(folder)
        splits = {split: load_split(flags.data, split) for split in ("train", "val", "test")}
        labels = sorted(set(splits["train"][1]))
        if not 2 <= len(labels) <= MOST:
            raise UserError(f"{flags.data} has {len(labels)} different labels: classes need 2 to "
                            f"{MOST}")
        if unknown := sorted(set(splits["val"][1] + splits["test"][1]) - set(labels)):
            raise UserError(f"{flags.data} has the label {unknown[0]!r} in no text to train on: "
                            "give more of it, or take it out")
        self.splits = {split: (texts, torch.tensor([labels.index(x) for x in names]))
                       for split, (texts, names) in splits.items()}
        trunk = trunks.load_trunk(folder, dropout=flags.dropout)
        torch.manual_seed(flags.seed)  # the head
        self.core = Classifier.on(trunk, labels, dropout=flags.dropout).to(runtime.device)
        training.freeze(self.core.trunk, flags.freeze)

    def loss(self, model, step: int) -> Tensor:
        """Of this process's texts of a step: a pass over all of them, then another, shuffled."""
        flags, (texts, labels) = self.flags, self.splits["train"]
        size, n = flags.n_groups * flags.group_size, len(texts)
        rows = shuffled(n, step * size, size, seed=flags.seed, stream="texts")
        rng = generator(flags.seed, "words", step)
        block_size = self.core.block_size
        hide = torch.rand(size, block_size, generator=rng) < flags.word_dropout
        rows, hide = self.runtime.shard(rows), self.runtime.shard(hide)
        idx, mask = text_batch(self.tokenizer, [texts[r] for r in rows], block_size=block_size)
        trunks.hide_tokens(self.tokenizer, idx, hide)
        idx, mask, y = (x.to(self.runtime.device) for x in (idx, mask, labels[rows]))
        with self.runtime.autocast():
            logits = model(idx, mask)
        return F.cross_entropy(logits, y)

    def _report(self, model: Classifier, split: str) -> dict:
        texts, labels = self.splits[split]
        with self.runtime.autocast():
            p = model.predict(self.tokenizer, texts)
        nats = -p[torch.arange(len(labels)), labels].clamp(min=1e-30).log().mean().item()
        return {"nats_per_text": nats, **scores(labels.numpy(), p.argmax(1).numpy(),
                                                self.core.config.labels)}

    def validate(self, model: Classifier) -> dict:
        report = self._report(model, "val")
        return {key: report[key] for key in ("nats_per_text", "accuracy", "macro_f1")}

    def finish(self) -> dict:
        """The best model on the test texts; figures/confusion.png, where there is matplotlib."""
        model = checkpoint.load(self.flags.out / "best", Classifier).to(self.runtime.device)
        report = {"objective": "classes", **self._report(model, "test")}
        if self.runtime.is_main and importlib.util.find_spec("matplotlib"):
            figures.draw(self.flags.out / "figures", report, [], "confusion", "Confusion",
                         "class", "Of a class's texts (a row) those that were called each class.",
                         figures.confusion)
        return report
