"""One iteration of PPO: episodes per second of nanokl and of TRL's PPOTrainer and RLOOTrainer.

An iteration samples a batch of responses, scores them by one rule on token ids, and makes as many
updates as there are epochs, each on the whole batch. All start from the same GPT-2-shaped random
weights, sample at temperature 1 from the whole distribution, have no stop token (so that each
response has its full length), no dropout, and the same beta.

nanokl runs `ppo_batch` of train_rlhf.py, which also measures the exact KL and the entropy; its
critic has two layers of its own, or ("shared critic") is a head on the policy. TRL's
trainers run their own train(), in a thread that a callback stops after each iteration; the first
one, with what it sets up, is not timed. Saving, evaluation, reports and gradient checkpointing are
off; what they compute for their log cannot be turned off, and is written once an iteration.
PPOTrainer (TRL 1.9; later ones have none) has a critic of its own, of the policy's size, as in its
examples, and a reward model, here the rule. RLOOTrainer has neither: two responses a prompt, its
default. In bfloat16 all have float32 weights and autocast, as their own switch does it; PPOTrainer
still samples in float32 then.

check: nats a token of the first iteration as the trainer logs them, against a float64 forward pass
(`plain_logits`) over the tokens that the reward saw; episodes, tokens and updates that are missing.
"""

import itertools
import os
import queue
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from nanokl import optim, ppo
from nanokl import runtime as rt
from nanokl.bench import Ready
from nanokl.bench_generate import gpt2_shaped, gpt2_weights, peer_model, plain_logits
from nanokl.evaluation import Stage
from nanokl.gpt import GPT

SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 256, "vocab_size": 4096, "block_size": 64}
CASES = (
    {"name": "4 x 256", "model": SHAPE, "prompt": 8, "new": 32, "batch": 64, "epochs": 4,
     "beta": 0.1},
)  # fmt: skip


def good(new: Tensor, before: Tensor, case: dict) -> Tensor:
    """What the rule gives tokens for themselves and for the ones before them: 0, 1 or 2 each."""
    return (new < case["model"]["vocab_size"] // 4).float() + (new + before) % 2


# r = 2.4 share(token < V/4) + 2.4 share(token + the one before it is odd)
def rule(idx: Tensor, case: dict) -> Tensor:
    """Rewards (B,) of whole rows (B, T): which tokens the response has, and what follows what."""
    return 2.4 * good(idx[:, case["prompt"] :], idx[:, case["prompt"] - 1 : -1], case).mean(1)


class Seen:
    """The rule as a reward function that remembers its last batch, and counts optimiser steps."""

    def __init__(self, case: dict):
        self.case, self.idx, self.updates = case, torch.empty(0, 0, dtype=torch.long), {}
        register_optimizer_step_post_hook(self._count)

    def _count(self, optimizer, *_) -> None:
        self.updates[id(optimizer)] = self.updates.get(id(optimizer), 0) + 1

    def __call__(self, idx: Tensor) -> Tensor:
        self.idx = idx
        return rule(idx, self.case)

    def check(self, model: GPT, logged: float, sampled: bool) -> dict[str, float]:
        """`logged` nats a token: of the `sampled` ones, or the distributions' mean entropy."""
        case, idx = self.case, self.idx.cpu()
        weights = {k: x.cpu() for k, x in gpt2_weights(model).items()}
        logp = plain_logits(weights, idx[:, :-1], case["model"]["n_head"]).log_softmax(-1)
        nats = logp.gather(-1, idx[:, 1:, None])[..., 0] if sampled else (logp.exp() * logp).sum(-1)
        want = -nats[:, case["prompt"] - 1 :].mean().item()
        return {"nats/token": abs(logged - want), "missing": self.missing()}

    def missing(self) -> int:
        """Episodes, tokens and updates of one iteration that were asked for and not made."""
        case, (batch, length) = self.case, self.idx.shape
        return (abs(case["batch"] - batch) + abs(case["prompt"] + case["new"] - length)
                + abs(case["epochs"] - max(self.updates.values())))


class Ids:
    """Stands in for a tokenizer: ids are their own text, and no id ends a text."""

    def special(self, _name: str) -> int:
        return -1

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


class FixedPrompts(Stage):
    """Prompts of one length instead of the first tokens of texts."""

    def prompts(self, docs: Tensor, n: int, rng) -> list[list[int]]:
        return docs[torch.randint(len(docs), (n,), generator=rng)].tolist()


def prompts(case: dict) -> Tensor:
    """What prompts are drawn from (N, prompt), the same for all."""
    shape = (4096, case["prompt"])
    return torch.randint(case["model"]["vocab_size"], shape, generator=rt.generator(0, "prompts"))


def nanokl_ppo(case: dict, ref: GPT, reward: Callable[[Tensor], Tensor], *, dtype: str, lr: float,
               muon_lr: float | None = None, seed: int = 0, steps: int = 10**6,
               critic_layers: int = 2) -> tuple[GPT, Callable[[], dict]]:
    """The policy, and one iteration after the other, as `train_rlhf.py ppo` goes on."""
    import train_rlhf

    runtime = rt.setup(case["device"], dtype)
    flags = train_rlhf.PPOFlags(
        data=Path(), out=Path(), policy=Path(), reward="", steps=steps, batch=case["batch"],
        minibatch=case["batch"], n_epoch=case["epochs"], beta=case["beta"], lr=lr,
        muon_lr=muon_lr or lr, momentum=0.9, lam=0.95, shaping=False, critic_lr=1.0,  # as the peers
        max_prompt=case["prompt"] - 1, max_new_tokens=case["new"], seed=seed)
    score = lambda ids, _texts: reward(torch.tensor(ids, device=ref.head.weight.device))  # noqa: E731
    stage = FixedPrompts(flags, runtime, Ids(), ref.requires_grad_(False), score, seed)
    policy = ppo.make_policy(ref, critic_layers=critic_layers)
    optimizers = train_rlhf.policy_optimizers(policy, flags, runtime)
    docs, step = prompts(case), itertools.count(1)

    def run() -> dict:
        n = next(step)
        optim.set_lr(optimizers, optim.lr_scale(n - 1, steps, warmup=2, decay=0.5))
        return train_rlhf.ppo_batch(stage, policy, policy, optimizers, docs, n, case["beta"])

    return policy, run


def paced(trainer) -> Callable[[], dict]:
    """trainer.train() in a thread; each call lets it go on until it logs next, and returns that."""
    from transformers import TrainerCallback

    ask, answer = queue.Queue(), queue.Queue()

    class Pause(TrainerCallback):
        def on_log(self, *_, logs, **__):
            answer.put(logs)
            ask.get()

    def work() -> None:
        ask.get()
        try:
            trainer.train()
            answer.put({})
        except Exception as error:
            answer.put(error)

    def run() -> dict:
        ask.put(None)
        result = answer.get()
        if isinstance(result, Exception):
            raise result
        return result

    trainer.add_callback(Pause())
    threading.Thread(target=work, daemon=True).start()
    return run


def trl_flags(case: dict, folder: str, *, bf16: bool, lr: float, seed: int, steps: int) -> dict:
    """What both trainers are told; the rest is as they come."""
    return {"output_dir": folder, "per_device_train_batch_size": case["batch"],
            "gradient_accumulation_steps": 1, "gradient_checkpointing": False, "bf16": bf16,
            "learning_rate": lr, "temperature": 1.0, "seed": seed,
            "use_cpu": case["device"] == "cpu", "save_strategy": "no", "eval_strategy": "no",
            "report_to": "none", "disable_tqdm": True}


def id_tokenizer(vocab_size: int):
    """Ids are their own text; padding and end have ids of their own, which no model can sample."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*map(str, range(vocab_size)), "<pad>", "<end>"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>",
                                   padding_side="left")


class RewardModule(nn.Module):
    """The rule in the form that PPOTrainer wants: a trunk that hands the ids on, and a score."""

    base_model_prefix = "trunk"

    def __init__(self, reward: Callable[[Tensor], Tensor]):
        super().__init__()
        self.reward, self.trunk = reward, self.hand_on

    def hand_on(self, input_ids: Tensor, **_):
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(hidden_states=(input_ids,))

    def score(self, idx: Tensor) -> Tensor:
        """(B, T, 1): the reward of the whole row, at each place."""
        return self.reward(idx)[:, None, None].expand(*idx.shape, 1).float()


def trl_ppo(case: dict, ref: GPT, reward: Callable, *, bf16: bool, lr: float, seed: int = 0,
            steps: int = 10**6) -> tuple[nn.Module, Callable[[], dict]]:
    """The policy, and one iteration after the other of PPOTrainer.train()."""
    from datasets import Dataset
    from transformers import GPT2ForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    # its flag bf16 changes nothing: it is `accelerate launch --mixed_precision` that it hears
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if bf16 else "no"
    policy, base = peer_model(ref), peer_model(ref)
    torch.manual_seed(seed)
    critic = GPT2ForSequenceClassification(
        type(policy.config)(**{**policy.config.to_dict(), "num_labels": 1}))
    critic.transformer.load_state_dict(policy.transformer.state_dict())
    flags = trl_flags(case, tempfile.mkdtemp(), bf16=bf16, lr=lr, seed=seed, steps=steps)
    args = PPOConfig(**flags, num_ppo_epochs=case["epochs"], num_mini_batches=1,
                     response_length=case["new"], kl_coef=case["beta"],
                     total_episodes=steps * case["batch"], num_sample_generations=0)
    data = Dataset.from_dict({"input_ids": prompts(case).tolist()})
    trainer = PPOTrainer(
        args=args, processing_class=id_tokenizer(ref.config.vocab_size), model=policy,
        ref_model=base, reward_model=RewardModule(reward), value_model=critic, train_dataset=data,
        eval_dataset=data)
    return policy, paced(trainer)


def trl_rloo(case: dict, ref: GPT, reward: Callable, *, bf16: bool, lr: float, seed: int = 0,
             steps: int = 10**6) -> tuple[nn.Module, Callable[[], dict]]:
    """The policy, and one iteration after the other of RLOOTrainer.train()."""
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer

    folder = tempfile.mkdtemp()  # in the worker's own
    peer_model(ref).save_pretrained(folder)  # the reference is read from where the policy was
    device = ref.head.weight.device

    def score(prompts, completion_ids, **_) -> list[float]:
        pairs = zip(prompts, completion_ids, strict=True)
        rows = [[*map(int, prompt.split()), *ids] for prompt, ids in pairs]
        return reward(torch.tensor(rows, device=device)).tolist()

    flags = trl_flags(case, folder, bf16=bf16, lr=lr, seed=seed, steps=steps)
    args = RLOOConfig(**flags, num_iterations=case["epochs"], max_completion_length=case["new"],
                      beta=case["beta"], max_steps=steps * case["epochs"],
                      logging_steps=case["epochs"])
    data = Dataset.from_dict({"prompt": [" ".join(map(str, p)) for p in prompts(case).tolist()]})
    trainer = RLOOTrainer(model=folder, reward_funcs=score, args=args, train_dataset=data,
                          processing_class=id_tokenizer(ref.config.vocab_size))
    return trainer.model, paced(trainer)


def variant(make: Callable, entropy: str, sampled: bool = False,
            **flags) -> Callable[[dict], Ready]:
    """`make` with a small rate, the first iteration as its check: what it logs as `entropy`.

    That is a mean over tokens, or (sampled) the sum of -log p over a response's own tokens.
    """
    def set_up(case: dict) -> Ready:
        seen, model = Seen(case), gpt2_shaped(case["model"]).to(case["device"])
        _, run = make(case, model, seen, lr=1e-6, **flags)
        nats = run()[entropy] / (case["new"] if sampled else 1)
        return Ready(run, case["batch"], "episode", seen.check(model, nats, sampled))

    return set_up


OURS = "entropy_nats_per_token"
VARIANTS = {
    "nanokl": variant(nanokl_ppo, OURS, dtype="auto"),
    "nanokl, shared critic": variant(nanokl_ppo, OURS, dtype="auto", critic_layers=0),
    "nanokl float32": variant(nanokl_ppo, OURS, dtype="float32"),
    "PPOTrainer bfloat16": variant(trl_ppo, "objective/entropy", True, bf16=True),
    "PPOTrainer float32": variant(trl_ppo, "objective/entropy", True, bf16=False),
    "RLOOTrainer bfloat16": variant(trl_rloo, "entropy", bf16=True),
    "RLOOTrainer float32": variant(trl_rloo, "entropy", bf16=False),
}
ENVIRONMENT = {name: "peers_ppo" if name.startswith("PPO") else "peers"
               for name in VARIANTS if "Trainer" in name}
