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
    layers, transformer, gpt, generate                 a language model; train_pretrain.py
    tokenizer, data, bert                              its text, and an encoder
    hf, weights, wordpiece, hf_tokenizer, export       GPT-2 and BERT, in and out
    logprob, ngrams, reward, kl, ppo, train_rlhf.py    from human ratings to a policy
    trunks, judgements, agreement, comparisons         what raters said, and how far a model agrees
    labelled, classify                                 classes of texts
    exact, bayes, posterior, frontier, soft_q          the posterior, and the gap to it
    samplers, smc, trainers                            other ways to the same posterior
    vae, latent                                        texts drawn as numbers first: the same bound
    chat, sft, dialogue, agent                         conversations, and users to talk to
    stream, answers, repl                              prior and posterior in the terminal
    neighbours, examples_trained, examples             what the first articles show, repaired
    optim, runtime, checkpoint, metrics, report        what every run needs
    throughput                                         how fast it goes
"""

import dataclasses
import sys

__version__ = "0.1.0"
NOUNS = {bool: "true or false", int: "a whole number", float: "a number", str: "a name",
         dict: "named values"}


class UserError(ValueError):
    """A mistake in a flag, a file or a value: programs print its one line and exit with 2."""


def one_line(error: Exception) -> str:
    """What another's code has raised, as a part of a UserError's line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def require_positive(config, *names: str) -> None:
    """Raises UserError for the first of a config's fields that is not above 0."""
    for name in names:
        if getattr(config, name) is not None and not getattr(config, name) > 0:
            raise UserError(f"{name} is {getattr(config, name)}: give a number above 0")


def require_types(config) -> None:
    """Raises UserError for the first field of a dataclass that is not of its own, plain type.

    JSON has any type under any name. A whole number will do for a float, which must be finite.
    """
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), field.type
        if kind in (bool, int, float, str, dict):
            fits = type(value) is kind or (kind is float and type(value) is int)
            if not fits or (kind is float and not abs(value) <= sys.float_info.max):
                raise UserError(f"{field.name} is {value!r}: give {NOUNS[kind]}")
