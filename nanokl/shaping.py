"""Credit for each token: what the text so far scores more with it than without.

    reward_t = -beta k1_t + score(y_<=t) - score(y_<t)

The shares of a response add up to score(text) - score(prompt), the same number less for all
responses to a prompt: objective and posterior stay what they are, whatever the reward makes of
half a text, and the critic has only the rest to learn. Potential-based shaping, with the score
itself as the potential (Ng, Harada & Russell 1999). Left out: gamma below 1, where the score of
the longer text would have to be discounted.
"""

import torch
from torch import Tensor

from nanokl import ppo
from nanokl.generate import Rollout
from nanokl.reward import RewardFunction


def score_shares(reward: RewardFunction, rollout: Rollout, score: Tensor, tokenizer, runtime, *,
                 every: int) -> Tensor:
    """Each response token's share of score (B,): (B, T-1), 0 outside the mask.

    The text is scored after every so many tokens of its response; the last of them has the share
    of all. Each rank scores its share of the rows.
    """
    idx, mask, score = (runtime.shard(x) for x in (rollout.idx, rollout.mask, score))
    before = mask.cumsum(1) - mask.long()  # response tokens before this one
    rows, places = (mask & (before % every == 0)).nonzero(as_tuple=True)  # by rows, then places
    ids = [idx[i, : t + 1].tolist() for i, t in zip(rows.tolist(), places.tolist(), strict=True)]
    so_far = ppo.score_ids(reward, ids, tokenizer).to(score)
    # the next score of the row is that of a longer text so far, or in the end of the whole text
    ends = torch.cat([rows[1:] != rows[:-1], rows.new_ones(1, dtype=torch.bool)])
    last = (torch.arange(mask.shape[1], device=mask.device) * mask).argmax(1)
    change = torch.where(ends, score[rows], so_far.roll(-1)) - so_far
    shares = score.new_zeros(mask.shape)
    shares[rows, torch.where(ends, last[rows], places.roll(-1) - 1)] = change
    return runtime.gather(shares)
