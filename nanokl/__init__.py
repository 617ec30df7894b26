"""nanokl: RLHF as Bayesian inference, from scratch in plain PyTorch.

The pretrained model is the prior, `exp(score / beta)` is the evidence, and the policy that
KL-penalised PPO looks for is the posterior.

Glossary
    B batch   T tokens   C channels (n_embd)   H heads   D = C // H   V vocabulary   N rows
    idx     (B, T) int64    token ids            mask   (B, T) bool, True counts
    h       (B, T, C)       hidden states        logp   (B, T-1), logp[:, t] scores idx[:, t+1]
    score   (B,)            reward of a text     reward, value, adv, ret (B, T-1), like logp
    policy, ref             pi_theta, pi_ref     beta   the price of one nat of KL(policy || ref)
    posterior               pi* = pi_ref exp(score / beta) / Z
    gap                     log Z - J / beta = KL(policy || pi*)

Reading order
    transformer, gpt, generate, train_pretrain.py      a language model
    tokenizer, data, bert                              its text, and an encoder
    logprob, ngrams, reward, kl, ppo, train_rlhf.py    from human ratings to a policy
    judgements, agreement, comparisons                 what raters said, and how far a model agrees
    exact, bayes, posterior, frontier                  the posterior, and the gap to it
    samplers, smc, trainers                            other ways to the same posterior
    optim, runtime, checkpoint, metrics, report        what every run needs
    throughput                                         how fast it goes
"""

__version__ = "0.1.0"


class UserError(ValueError):
    """A mistake in a flag, a file or a value: programs print its one line and exit with 2."""


def require_positive(config, *names: str) -> None:
    """Raises UserError for the first of a config's fields that is not above 0."""
    for name in names:
        if getattr(config, name) is not None and not getattr(config, name) > 0:
            raise UserError(f"{name} is {getattr(config, name)}: give a number above 0")
