"""What a model takes for alike: the tokens whose embeddings have the highest cosine to a word's.

In these models the head's weight is the embedding, p(token) = softmax(W h), the inner products of
word2vec (Mikolov et al. arXiv:1310.4546), so that tokens which stand in the same places get vectors
of one direction. Neither centred nor scaled: on the models of `make demo` the plain cosine lists
fewer words that are merely frequent. A word of several tokens has the mean of their directions,
which says little. Left out: analogies, a trainer of word2vec's own.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nanokl import UserError, checkpoint
from nanokl.bert import BERT
from nanokl.gpt import GPT
from nanokl.hf_tokenizer import load_tokenizer

KINDS = {"GPT": GPT, "BERT": BERT}


# cos(u, v) = u . v / (|u| |v|),  u = mean of the word's tokens, each at length 1
def nearest(embedding: Tensor, ids: list[int], top_k: int) -> tuple[Tensor, Tensor]:
    """The top_k tokens nearest to a word of these ids, itself left out: cosines and ids (top_k,).

    embedding (V, C), as large as you like.
    """
    unit = F.normalize(embedding.float(), dim=1)
    cosine = unit @ F.normalize(unit[ids].mean(0), dim=0)  # (V,)
    cosine[ids] = -torch.inf
    return cosine.topk(top_k)


def neighbours(model, tokenizer, word: str, top_k: int = 8) -> list[tuple[str, float]]:
    """(token, cosine) of the tokens nearest to a word as in mid-sentence, the nearest first.

    UserError for an empty word and a top_k that the vocabulary does not have.
    """
    if not word.strip():
        raise UserError(f"the word is {word!r}: give one that is not blank")
    ids = tokenizer.encode(" " + word.strip())
    most = model.config.vocab_size - len(set(ids))
    if not 1 <= top_k <= most:
        raise UserError(f"top_k is {top_k}: give 1 to {most}")
    found = nearest(model.wte.weight.detach(), ids, top_k)
    return [(tokenizer.decode([i]), cosine)
            for cosine, i in zip(*(x.tolist() for x in found), strict=True)]


def of_run(run: Path, word: str, top_k: int) -> list[tuple[str, float]]:
    """The same in a run or checkpoint folder; UserError where it holds no GPT and no BERT."""
    folder = checkpoint.resolve(run)
    kind = checkpoint.read_config(folder)["model"]
    if kind not in KINDS:
        raise UserError(f"{folder} holds a {kind}: give the run of a {' or a '.join(KINDS)}")
    return neighbours(checkpoint.load(folder, KINDS[kind]), load_tokenizer(folder), word, top_k)
