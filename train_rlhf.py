"""From human ratings to a policy: a reward model, then KL-penalised PPO (or others) against it.

    python train_rlhf.py sft    --data data/arithmetic --out runs/sums
    python train_rlhf.py reward --data data/hutto --policy runs/gpt --init runs/bert --out runs/rm
    python train_rlhf.py ppo    --data data/hutto --policy runs/gpt --reward runs/rm --out runs/ppo

Your own reward: `--reward my_reward.py:function`, with `def function(ids, texts): return [...]`.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from nanokl import UserError, metrics, optim, ppo, require_positive, trainers, training
from nanokl import runtime as rt
from nanokl.classify import ClassTask
from nanokl.comparisons import RewardTask
from nanokl.evaluation import Stage, WholePrompts, batch_metrics, compare, open_stage
from nanokl.gpt import GPT
from nanokl.kl import BetaController
from nanokl.posterior import Ruler, brief, check_samples, whole_account
from nanokl.rollout import SamplingConfig
from nanokl.sft import SFTConfig, SFTTask
from nanokl.supervise import supervise


@dataclass(kw_only=True)
class Flags:
    """Flags that all stages share."""

    data: Path  # a prepared folder, such as data/hutto; reward also takes a file of labelled texts
    out: Path  # the run's folder; must not hold another run
    resume: bool = False  # go on with the run in --out
    steps: int  # gradient steps (sft, reward) or batches of rollouts (ppo)
    lr: float  # AdamW's peak learning rate (embeddings, norms, biases, heads)
    muon_lr: float  # Muon's peak learning rate (the blocks' matrices); 0: AdamW has them
    weight_decay: float = 0.1  # decoupled, on matrices
    freeze: int = 0  # of the pretrained model, the embeddings and this many blocks stay
    seed: int = 0  # of everything random
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "auto"  # auto, float32 or bfloat16

    def __post_init__(self):
        require_positive(self, "lr", "steps")


@dataclass(kw_only=True)
class Supervised(Flags):
    """Flags of what learns from given answers, until validation says that it is enough."""
    warmup: int = 20  # steps of linear warm-up
    decay: float = 0.8  # last part of the run in which the rate falls linearly to 0
    eval_every: int = 50  # steps between passes over the validation texts
    patience: int = 6  # passes without a better accuracy before stopping

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "eval_every", "patience")


@dataclass(kw_only=True)
class RewardFlags(Supervised, SamplingConfig):
    """A head on a pretrained trunk, learnt from single raters' comparisons, ratings or classes."""

    init: Path  # the trunk: a run or a Hugging Face folder of BERT or GPT-2
    policy: Path | None = None  # the reference policy, whose samples get mean 0 and sd 1
    objective: Literal["bradley-terry", "rating", "classes"] = "bradley-terry"  # what is learnt
    steps: int = 600  # gradient steps
    n_groups: int = 4  # groups a step, over all processes, each of one domain
    group_size: int = 32  # snippets a group; all their pairs are compared
    lr: float = 2e-3
    muon_lr: float = 3e-3
    trunk_lr: float = 1.0  # the trunk's rates, times lr and muon_lr; .05 for one that knows much
    weight_decay: float = 0.3
    dropout: float = 0.1  # in the trunk and before the head
    word_dropout: float = 0.1  # share of tokens hidden by [MASK]
    ngram_dropout: float = 0.6  # share of n-grams hidden
    members: int = 1  # reward models in one, each with comparisons of its own
    raters: Literal["all", "first", "second"] = "all"  # or half of each text's ratings
    n_samples: int = 2048  # reference samples to normalise on

    def __post_init__(self):
        Supervised.__post_init__(self)
        SamplingConfig.__post_init__(self)
        require_positive(self, "n_samples", "members", "trunk_lr")
        if (self.policy is None) != (self.objective == "classes"):
            raise UserError(f"--policy is {self.policy} and --objective {self.objective}: scores "
                            "are normalised on a policy's samples, classes are not")
        for name in ("word_dropout", "ngram_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give 0 <= {name} < 1")


@dataclass(kw_only=True)
class SFTFlags(Supervised, SFTConfig):
    """What an assistant says in conversations: supervised fine-tuning."""
    steps: int = 600  # gradient steps
    lr: float = 1e-3
    muon_lr: float = 1e-3

    def __post_init__(self):
        Supervised.__post_init__(self)
        SFTConfig.__post_init__(self)


@dataclass(kw_only=True)
class PPOFlags(Flags, trainers.TrainerConfig):
    """From a pretrained GPT towards its posterior: KL-penalised PPO, or another --method."""

    policy: Path  # the GPT run, or GPT-2 folder, to start from; it stays the reference
    reward: str | None = None  # a reward run, or FILE.py:FUNCTION; --env may pay by itself
    gold: str | None = None  # another one that only watches: what the first was to stand for
    steps: int = 40  # batches of rollouts
    warmup: int = 2  # batches of linear warm-up
    decay: float = 0.5  # last part of the run in which the rate falls linearly to 0
    batch: int = 256  # episodes a batch, over all processes
    lr: float = 4e-4
    muon_lr: float = 4e-4
    weight_decay: float = 0.0
    momentum: float = 0.8  # of both optimisers; gradients of older policies overshoot
    n_epoch: int = 1  # passes over each batch; fresh episodes are cheap here
    lam: float = 0.8  # GAE; a critic errs, and worth and shaping leave little noise
    worth: bool = True  # what a token adds by itself is learnt of all tokens, drawn or not
    shaping: bool = True  # each token is paid by what it adds to the guess of the text's score
    critic_lr: float = 5.0  # the critic's own rates, times lr and muon_lr
    beta: float = 0.1  # price of one nat of KL, in units of the reward
    kl_target: float | None = None  # nats per sequence: adapts beta (Ziegler et al.)
    save_every: int = 20  # batches between checkpoints
    eval_every: int = 20  # batches between evaluations, at an eighth of the last one's samples
    n_eval: int = 1024  # fresh samples for the final numbers
    posterior_prompts: int = 16  # prompts on which the gap to the posterior is measured
    posterior_samples: int = 1024  # texts each of reference and policy for each of them; 0: none

    def __post_init__(self):
        Flags.__post_init__(self)
        trainers.TrainerConfig.__post_init__(self)
        require_positive(self, "batch", "kl_target", "save_every", "eval_every",
                         "posterior_prompts")
        if self.reward is None and self.env is None:
            raise UserError("neither reward nor env is given: give --reward RUN or FILE.py:FUNCTION"
                            ", or --env nanokl/dialogue.py:arithmetic")
        if not 0 <= self.beta < math.inf or self.n_eval < 2:
            raise UserError(f"beta is {self.beta}, n_eval {self.n_eval}: give at least 0 and 2")
        if self.posterior_samples:
            check_samples("posterior_samples", self.posterior_samples, ", or 0 to leave it out")
        if self.beta == 0 and self.kl_target is not None:
            raise UserError(f"beta is 0 and kl_target {self.kl_target}, which multiplies beta: "
                            "give a beta above 0 to start from, or no kl_target")
        if self.beta == 0 and self.method in ("dpo", "dpg", "sft"):
            raise UserError(f"beta is 0, and {self.method} divides by it: give a number above 0, "
                            "or --method ppo, rloo or grpo")


def policy_optimizers(policy: GPT, flags: PPOFlags, runtime) -> list[torch.optim.Optimizer]:
    """The policy's, and the critic's at rates of its own."""
    return optim.make_optimizers(policy, lr=flags.lr, muon_lr=flags.muon_lr,
                                 betas=(flags.momentum, 0.95), momentum=flags.momentum,
                                 weight_decay=flags.weight_decay, dtype=runtime.dtype,
                                 speed=dict.fromkeys(("critic.", "value."), flags.critic_lr))


def ppo_batch(stage: Stage, model, policy: GPT, optimizers, docs, step: int, beta: float) -> dict:
    """Rollouts, and the epochs of updates on them; the metrics describe the policy before."""
    # 1. Sample and score. 2. Measure under policy and reference, in the first epoch's minibatches.
    flags, rng, runtime = stage.config, rt.generator(stage.seed, "ppo", step), stage.runtime
    prompts = stage.prompts(docs, flags.batch // flags.group, rng)
    sampler = stage.ref if flags.method == "sft" else policy
    rollout = stage.rollouts(sampler, [p for p in prompts for _ in range(flags.group)], rng)
    minibatches = stage.minibatches(flags.batch, rng, flags.group)
    credit = {}
    if flags.method == "ppo" and (flags.shaping or flags.env):
        credit = {"shares": stage.shares(*rollout), "worth": stage.worth}
    x = trainers.collect(policy, stage.ref, *rollout, minibatches, flags, runtime, beta=beta,
                         **credit)
    row = {**batch_metrics(x, beta), **stage.gold_mean(rollout[0])}
    if sampler is not policy:  # x does not show what the policy says
        rollout, order = stage.rollouts(policy, prompts, rng), stage.minibatches(len(prompts), rng)
        row = {**batch_metrics(ppo.collect(policy, stage.ref, *rollout, order, flags, runtime,
                                           beta=beta), beta), **stage.gold_mean(rollout[0])}
    # 3. A few epochs of updates.
    infos = []
    for epoch in range(flags.n_epoch):
        for rows in minibatches if epoch == 0 else stage.minibatches(flags.batch, rng, flags.group):
            loss, info = trainers.minibatch_loss(model, policy, x, rows, flags, runtime, beta=beta)
            norm = training.gradient_step(loss, policy.parameters(), optimizers, step=step,
                                          max_grad_norm=flags.max_grad_norm, out=flags.out)
            infos.append({**info, "grad_norm": norm})
    # 4. The last update may have broken the policy, and what comes next may save it.
    few = rows.view(flags.group, -1)[:, : runtime.world].flatten()
    with torch.no_grad():
        loss, _ = trainers.minibatch_loss(policy, policy, x, few, flags, runtime, beta=beta)
    training.check_finite(not runtime.any(not loss.isfinite()), step, flags.out)
    means = {key: runtime.mean(torch.stack([i[key] for i in infos]).mean()).item()
             for key in infos[0]}
    return {**row, **means, "first_ratio_max_deviation": infos[0]["ratio_max_deviation"].item()}


def finish_ppo(stage: Stage, policy: GPT, docs, log: metrics.Log, first: dict, *,
               beta: float) -> None:
    """The summary: fresh samples, on held-out prompts; whether the policy has collapsed."""
    flags = stage.config
    numbers, samples = compare(stage, policy, docs, n=flags.n_eval, beta=beta)
    if stage.runtime.is_main:
        rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples)
        metrics.write_text(flags.out / "samples.jsonl", rows)
        (flags.out / "posterior.json").unlink(missing_ok=True)  # of the policy before a --resume
    if flags.posterior_samples:
        account, numbers["posterior"] = whole_account(Ruler.of(stage, docs), policy, beta)
        for line in account.lines():
            log.line(line)
    entropy, before = numbers["entropy_nats_per_token"], first.get("entropy_at_step_0", 0.0)
    if collapsed := entropy < 0.1 * before:
        log.line(f"collapsed: {entropy:.2g} nats of entropy a token are left of {before:.2g}; try "
                 "a larger --beta, or a lower --lr")
    log.close({"method": flags.method, "kl_placement": flags.kl_placement,
               "episodes": flags.steps * flags.batch, "steps": flags.steps,
               "seed": flags.seed, **numbers, **first, "collapsed": collapsed}, told=("posterior",))


def train_ppo(flags: PPOFlags) -> None:
    """The whole run: rollouts, updates, the final numbers on fresh samples."""
    # 1. Reference, policy, reward, prompts; on --resume their state.
    runtime = rt.setup(flags.device, flags.dtype)
    stage, (docs, held_out) = open_stage(flags, runtime, "train", "val")
    ref, tokenizer = stage.ref, stage.tokenizer
    for texts in (docs, held_out):  # a split that has no prompts shows at once
        stage.prompts(texts, 1, rt.generator(flags.seed))
    stage.minibatches(flags.batch, rt.generator(flags.seed), flags.group)  # so do wrong sizes
    critic = flags.method == "ppo"
    policy = ppo.make_policy(ref, critic_layers=flags.critic_layers if critic else 0)
    policy.value.requires_grad_(critic)
    training.freeze(policy, flags.freeze)
    optimizers = policy_optimizers(policy, flags, runtime)
    controller = BetaController(flags.beta, flags.kl_target)
    start, first, judge = 0, {}, None
    if training.open_run(flags, runtime):
        state = training.load_last(flags.out, policy, optimizers, tokenizer=tokenizer)
        start, controller.beta, first = state["step"], state["beta"], state["first"]
    model = runtime.wrap(policy)
    log = metrics.Log(flags.out, total=flags.steps, unit="batch", is_main=runtime.is_main,
                      resume_step=start, warning=flags.kl_warning)
    if isinstance(docs, WholePrompts) and len(fit := docs.that_fit(flags.max_prompt)) < len(docs):
        log.line(f"{len(fit):,} of {len(docs):,} training openings have at most --max_prompt "
                 f"{flags.max_prompt} tokens; the others are left out")
    if flags.beta == 0:
        log.line("beta is 0: KL costs nothing, and the best policy is any law on the texts of the "
                 "highest reward: expect a collapse")
    # 2. Batches of rollouts, a few epochs of updates on each.
    with training.nothing_half_written(flags.out, runtime), log, rt.Interrupt() as interrupt:
        stage.worth = stage.token_worth(docs) if flags.uses_worth(flags.beta) else None
        for step in range(start + 1, flags.steps + 1):
            optim.set_lr(optimizers, optim.lr_scale(step - 1, flags.steps, warmup=flags.warmup,
                                                    decay=flags.decay))
            row = ppo_batch(stage, model, policy, optimizers, docs, step, controller.beta)
            ratio = row.pop("first_ratio_max_deviation")
            if step == 1:
                first = {"first_ratio_max_deviation": ratio,
                         "kl_at_step_0": row["kl_nats_per_sequence"],
                         "entropy_at_step_0": row["entropy_nats_per_token"]}
            log.step(step, episodes=step * flags.batch, **row)
            if (flags.posterior_samples and controller.beta and step % flags.eval_every == 0
                    and step < flags.steps):
                judge = judge or Ruler.of(stage, held_out, 8)
                log.event(step, **brief(judge.account(policy, controller.beta)))
            controller.update(row["kl_nats_per_sequence"], flags.batch)
            stop = runtime.any(interrupt.set)
            if runtime.is_main and (stop or step % flags.save_every == 0 or step == flags.steps):
                training.save_last(flags.out, policy, optimizers, tokenizer=tokenizer, step=step,
                                   beta=controller.beta, first=first)
            if stop and step < flags.steps:
                runtime.barrier()  # the main process has saved
                training.leave(interrupt, log, step, flags.out)
        # 3. Fresh samples of reference and policy, on held-out prompts.
        finish_ppo(stage, policy, held_out, log, first, beta=controller.beta)


def main() -> None:
    flags = rt.parse_flags({"sft": SFTFlags, "reward": RewardFlags, "ppo": PPOFlags},
                           prog="train_rlhf.py", description=__doc__)
    match flags:
        case PPOFlags():
            train_ppo(flags)
        case SFTFlags():
            supervise(flags, SFTTask)
        case _:
            supervise(flags, ClassTask if flags.objective == "classes" else RewardTask)


if __name__ == "__main__":
    rt.run_program(main)
