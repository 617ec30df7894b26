"""What a policy is worth: fresh samples, exact KL, and what its reference reaches untrained."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nanokl import UserError, agent, chat, checkpoint, one_line, ppo
from nanokl.data import Shard
from nanokl.gpt import GPT
from nanokl.hf_tokenizer import load_tokenizer
from nanokl.judgements import Judgements
from nanokl.metrics import distinct_n, mean_se
from nanokl.reward import RewardFunction, load_function, load_reward
from nanokl.rollout import Rollout, SamplingConfig
from nanokl.runtime import Runtime, generator
from nanokl.shaping import score_shares, token_worth
from nanokl.tokenizer import Tokenizer

OPENINGS = 4096  # seeds of an environment that training, or what is held out, draws from


class WholePrompts(list):
    """Token lists that are prompts as they are; of other texts the first few tokens are."""

    def that_fit(self, max_prompt: int) -> list[list[int]]:
        """Those of at most max_prompt tokens behind the one that starts each."""
        return [doc for doc in self if len(doc) <= 1 + max_prompt]


def dialogues(flags: ppo.PPOConfig, split: str, tokenizer: Tokenizer,
              reward: RewardFunction | None) -> WholePrompts:
    """A split's dialogues of the environment that `--env` names, a seed each."""
    score = reward and (lambda texts: reward(tokenizer.encode_batch(texts), texts))
    try:
        env = load_function(flags.env)(split=split, turns=flags.turns, data=flags.data, score=score)
        return WholePrompts(agent.openings(env, tokenizer, OPENINGS))
    except UserError:
        raise
    except Exception as e:  # whatever the user's own code raises
        reason = one_line(e)
        raise UserError(f"{flags.env} makes no environment ({reason}): give FILE.py:FUNCTION as "
                        "nanokl/dialogue.py has them") from e


def prompt_docs(folder: Path, split: str, domains: str, tokenizer: Tokenizer) -> list[list[int]]:
    """Token lists of the snippets of some domains, or of any prepared corpus.

    A corpus in another model's tokens comes over as text. Of conversations, what the user says
    first, where the assistant is to reply.
    """
    if (folder / chat.FILE).is_file():
        talks = chat.load_conversations(folder, split)
        return WholePrompts(chat.prompt(tokenizer, talk.messages[:1], 1 << 20)[0]
                            for talk in talks if talk.messages[0]["role"] == "user")
    if folder.is_dir() and not (folder / "judgements.jsonl").exists():
        theirs = load_tokenizer(folder)
        shard = Shard.open(folder / f"{split}.bin", theirs)
        spans = zip(shard.starts[:-1], shard.starts[1:], strict=True)
        docs = [shard.tokens[a + 1 : b].tolist() for a, b in spans]
        if theirs.hash == tokenizer.hash:
            return docs
        return tokenizer.encode_batch(map(theirs.decode, docs))
    j = Judgements.load(folder, split)
    all_of_them = not domains or folder.is_file()  # a file of labelled texts has one domain
    wanted = set(j.domain_names) - {"lexicon"} if all_of_them else set(domains.split(","))
    if unknown := wanted - set(j.domain_names):
        raise UserError(f"--domains has {', '.join(unknown)}: give some of {j.domain_names}")
    texts = [t for t, d in zip(j.texts, j.domains, strict=True) if j.domain_names[d] in wanted]
    return tokenizer.encode_batch(texts)


def load_gpt(flags: SamplingConfig, runtime: Runtime) -> tuple[GPT, Tokenizer]:
    """The reference policy, whose context must hold the longest prompt and response, its words."""
    folder = checkpoint.resolve(flags.policy)
    ref = GPT.from_pretrained(folder, dropout=0.0)
    if flags.width > ref.config.block_size:
        raise UserError(f"--max_prompt {flags.max_prompt} and --max_new_tokens "
                        f"{flags.max_new_tokens} for each reply, and 1 to start, {flags.width} in "
                        f"all, do not fit the policy's context of {ref.config.block_size}: lower "
                        "one of them")
    return ref.to(runtime.device).eval(), load_tokenizer(folder)


def draw_prompts(docs: list[list[int]], n: int, config: SamplingConfig, *, start: int,
                 rng: torch.Generator) -> list[list[int]]:
    """n prompts: `start` and the first few tokens of a random text, of ragged length.

    Lengths are uniform on min_prompt..max_prompt; a text always has more tokens than its prompt.
    Of `WholePrompts` those that are not longer than max_prompt, as they are.
    """
    if whole := isinstance(docs, WholePrompts):
        shortest = min(map(len, docs), default=1) - 1
        docs = docs.that_fit(config.max_prompt)
        if not docs:
            raise UserError(f"max_prompt is {config.max_prompt}, and what users say first has at "
                            f"least {shortest} tokens: raise --max_prompt")
    else:
        docs = [doc for doc in docs if len(doc) > config.max_prompt]
    if not docs or not 0 < config.min_prompt <= config.max_prompt:
        raise UserError(f"no prompts of {config.min_prompt} to {config.max_prompt} tokens can be "
                        f"cut from the {len(docs)} texts of one split that are longer: lower "
                        "--max_prompt or widen --domains")
    which = torch.randint(len(docs), (n,), generator=rng).tolist()
    if whole:
        return [docs[i] for i in which]
    span = (config.min_prompt, config.max_prompt + 1)
    length = torch.randint(*span, (n,), generator=rng).tolist()
    return [[start, *docs[i][:k]] for i, k in zip(which, length, strict=True)]


def open_stage(flags, runtime: Runtime, *splits: str) -> "tuple[Stage, list[list]]":
    """A run's reference, tokenizer and rewards, and the texts or dialogues of some splits."""
    ref, tokenizer = load_gpt(flags, runtime)
    ref.requires_grad_(False)
    score, guess = load_reward(flags.reward, runtime) if flags.reward else (None, None)
    gold = load_reward(flags.gold, runtime)[0] if flags.gold else None
    docs = [dialogues(flags, split, tokenizer, score) if flags.env else
            prompt_docs(flags.data, split, flags.domains, tokenizer) for split in splits]
    return Stage(flags, runtime, tokenizer, ref, score, flags.seed, gold, guess), docs


@dataclass
class Stage:
    """What the rollouts of one run need besides the policy."""

    config: ppo.PPOConfig
    runtime: Runtime
    tokenizer: Tokenizer
    ref: GPT
    reward: RewardFunction | None  # None: the environment pays
    seed: int
    gold: RewardFunction | None = None  # what no policy is trained on
    guess: RewardFunction | None = None  # the score of a text that is not done, for shaping
    worth: Tensor | None = None  # (V,) what each token adds to that guess on average

    def prompts(self, docs, n: int, rng) -> list[list[int]]:
        stop = self.tokenizer.special("<|endoftext|>")
        return draw_prompts(docs, n, self.config, start=stop, rng=rng)

    def uniform(self, n: int, rng: torch.Generator) -> Tensor:
        """The numbers that n texts are drawn at, a row each."""
        return torch.rand(n, self.config.turns * self.config.max_new_tokens, generator=rng)

    def rollouts(self, policy: GPT, prompts, rng=None, u: Tensor | None = None):
        """Responses, or whole dialogues, and their scores (B,); drawn at u, of `uniform`."""
        u = self.uniform(len(prompts), rng) if u is None else u
        if isinstance(prompts[0], agent.Opening):
            rollout = agent.play(policy, prompts, self.config, self.runtime, self.tokenizer, u=u)
            return rollout, rollout.paid.sum(1)
        stop = self.tokenizer.special("<|endoftext|>")
        rollout = ppo.sample_rollouts(policy, prompts, self.config, self.runtime, stop=stop, u=u)
        return rollout, ppo.score_rollouts(self.reward, rollout, self.tokenizer, self.runtime)

    def gold_mean(self, rollout: Rollout) -> dict:
        """The gold reward's mean score and its standard error, where there is one."""
        if self.gold is None:
            return {}
        score = ppo.score_rollouts(self.gold, rollout, self.tokenizer, self.runtime)
        return dict(zip(("gold_mean", "gold_mean_se"), mean_se(score), strict=True))

    def shares(self, rollout, score: Tensor) -> Tensor:
        """Each token's share of the score, (B, T-1): a reply's is on its last token."""
        if rollout.paid is not None:
            return rollout.paid
        return score_shares(self.guess, rollout, score, self.tokenizer, self.runtime)

    def token_worth(self, docs, most: int = 1 << 16) -> Tensor:
        """What each token adds to a guess: mean over up to 8 of the reference's texts, cut."""
        V, rng = self.ref.config.vocab_size, generator(self.seed, "worth")
        n = max(1, min(8, most // V))
        prompts = self.prompts(docs, n + -n % self.runtime.world, rng)  # ranks have equal shares
        rollout = self.rollouts(self.ref, prompts, rng)[0]
        prefixes = [row[: int(torch.randint(len(prompt), len(row), (1,), generator=rng))]
                    for row, prompt in zip(rollout.rows(), prompts, strict=True)]
        return token_worth(self.guess, prefixes, V, self.tokenizer).to(self.runtime.device)

    def minibatches(self, n: int, rng, group: int = 1) -> list[Tensor]:
        """A shuffled epoch of row numbers, groups of rows side by side kept whole.

        A minibatch seen as (group, groups) has a group in each column, so that a process's shard of
        it, every world-th row, has whole ones.
        """
        size, world = self.config.minibatch, self.runtime.world
        if math.gcd(n, size) % (group * world):
            raise UserError(f"--batch {n} and --minibatch {size} must be multiples of --group "
                            f"{group} times the {world} processes")
        first = torch.randperm(n // group, generator=rng).to(self.runtime.device) * group
        member = torch.arange(group, device=first.device)[:, None]
        return [(rows + member).flatten() for rows in first.split(size // group)]


def batch_metrics(x: ppo.Experience, beta: float) -> dict:
    """What a batch says about the policy that sampled it."""
    kl, mask = x.kl.sum(1).mean().item(), x.rollout.mask
    replies = {}
    if x.rollout.paid is not None:
        begun = mask & ~torch.nn.functional.pad(mask[:, :-1], (1, 0))
        replies = {"replies_mean": begun.sum(1).float().mean().item()}
    return replies | {
        "reward_mean": x.score.mean().item(), "kl_nats_per_sequence": kl,
        "kl_k1_nats_per_sequence": (x.logp - x.logp_ref).sum(1).mean().item(),
        "objective": x.score.mean().item() - beta * kl, "beta": beta,
        "entropy_nats_per_token": (x.entropy.sum() / mask.sum()).item(),
        "response_tokens_mean": mask.sum(1).float().mean().item(),
        "distinct_2": distinct_n(x.rollout.responses()),
    }


# Of n reference samples a prompt the best is kept: KL(best-of-n || ref) <= log n - (n - 1)/n.
def best_of_n(stage: Stage, prompts, n_max: int = 16) -> list[dict]:
    """What the reference reaches without training, for n = 1, 2, 4, ... n_max."""
    repeated = [p for p in prompts for _ in range(n_max)]
    rng = generator(stage.seed, "best-of-n")
    score = stage.rollouts(stage.ref, repeated, rng)[1].view(-1, n_max)
    out = []
    for n in (2**k for k in range(n_max.bit_length())):
        mean, se = mean_se(score.view(len(score), -1, n).amax(2).mean(1))  # by prompt
        out.append({"n": n, "reward_mean": mean, "reward_mean_se": se,
                    "kl_nats_bound": math.log(n) - (n - 1) / n})
    return out


def compare(stage: Stage, policy: GPT, docs, *, n: int, beta: float) -> tuple[dict, list[dict]]:
    """Policy and reference on n fresh prompts, the same for both: numbers, and 16 samples."""
    decode = stage.tokenizer.decode
    prompts = stage.prompts(docs, n, generator(stage.seed, "held-out prompts"))
    ref_rollout, ref_score = stage.rollouts(stage.ref, prompts, generator(stage.seed, "samples"))
    rollout, score = stage.rollouts(policy, prompts, generator(stage.seed, "samples"))
    order = list(torch.arange(n, device=score.device).split(256))
    measured = ppo.measure(policy, stage.ref, rollout, order, stage.config, stage.runtime)
    kl, entropy = measured[2].sum(1), measured[3].sum() / rollout.mask.sum()
    out = {"beta": beta, "samples": len(prompts), "entropy_nats_per_token": entropy.item(),
           "reward_ref_sd": ref_score.std().item(),
           "distinct_2": distinct_n(rollout.responses()),
           "distinct_2_ref": distinct_n(ref_rollout.responses())}
    values = {"reward_ref_mean": ref_score, "reward_mean": score, "kl_nats_per_sequence": kl,
              "objective_ref": ref_score, "objective": score - beta * kl}
    for key, x in values.items():
        out[key], out[f"{key}_se"] = mean_se(x)
    out |= stage.gold_mean(rollout)
    out["best_of_n"] = best_of_n(stage, prompts[:128])
    before, after = ref_rollout.responses(), rollout.responses()
    samples = [{"prompt": decode(prompts[i][1:]), "before": decode(before[i]),
                "after": decode(after[i]), "score_before": ref_score[i].item(),
                "score_after": score[i].item(), "kl_nats": kl[i].item()} for i in range(min(16, n))]
    return out, samples
