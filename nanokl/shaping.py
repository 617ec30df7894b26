"""Credit for each token: how much more the text so far promises with it than without.

    reward_t = -beta k1_t + Phi(y_<=t) - Phi(y_<t),        Phi(whole text) = score
    worth(a) = mean over texts s, cut somewhere, of Phi(sa) - Phi(s)

Phi guesses a text's score while it is being written. Whatever it says, the shares of a response add
up to its score, less the same Phi(prompt) for all responses to a prompt: objective and posterior
stay what they are, and the critic has only the rest to learn, V(s) - Phi(s). Potential-based
shaping (Ng, Harada & Russell 1999). Left out: gamma below 1, where Phi of the longer text would
have to be discounted.

A baseline may know the token that was drawn, if its mean over all tokens is followed, too:

    grad J = E sum_t [ sum_a grad pi(a | s_t) (b(a, s_t) - beta x(a, s_t))
                       + (adv_t - b(y_t, s_t)) grad log pi(y_t | s_t) ],   x = log pi - log ref

where adv_t pays for the KL of later tokens alone. PPO's is b = beta x: the sum is gone, and a token
pays for itself. With b = worth most of what is to be learnt at first needs no draw: the sum is
-beta times the gradient of KL(pi || ref exp(worth / beta) / z), of one step. At the posterior adv
is beta x for every token: there PPO's leaves no noise, and the other what worth does not know of
the context. So each batch has its own b = c worth + d beta x, of least noise, and what is left of
the sum is -(1 - d) beta times the gradient of KL(pi || ref exp(c worth / ((1 - d) beta)) / z).
Expected policy gradients, arXiv:1706.05374; a baseline that knows the action, arXiv:1611.02247; the
loss is ppo.minibatch_loss.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from nanokl import ppo
from nanokl.reward import RewardFunction
from nanokl.rollout import Rollout


def score_shares(potential: RewardFunction, rollout: Rollout, score: Tensor, tokenizer,
                 runtime) -> Tensor:
    """Each response token's share of score (B,): (B, T-1), 0 outside the mask.

    Each rank asks for its share of the rows.
    """
    idx, mask, score = (runtime.shard(x) for x in (rollout.idx, rollout.mask, score))
    rows, places = mask.nonzero(as_tuple=True)  # idx[i, : t + 1] is what a response token follows
    ids = [idx[i, : t + 1].tolist() for i, t in zip(rows.tolist(), places.tolist(), strict=True)]
    before = score.new_zeros(mask.shape)
    before[rows, places] = ppo.score_ids(potential, ids, tokenizer).to(score)
    after = pad(before[:, 1:], (0, 1))
    last = (torch.arange(mask.shape[1], device=mask.device) * mask).argmax(1)
    after[torch.arange(len(after)), last] = score
    return runtime.gather((after - before) * mask)


def token_worth(potential: RewardFunction, prefixes: list[list[int]], vocab_size: int,
                tokenizer) -> Tensor:
    """What each token adds to a text on average, (V,), in units of the score."""
    texts = [[*prefix, a] for prefix in prefixes for a in range(vocab_size)]
    after = ppo.score_ids(potential, texts, tokenizer).view(len(prefixes), -1)  # (n, V)
    return (after - ppo.score_ids(potential, prefixes, tokenizer)[:, None]).mean(0)
