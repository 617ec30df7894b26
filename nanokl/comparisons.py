"""What train_rlhf.py does with comparisons, apart from its loop: batches, loss, the last report.

`flags` are the script's RewardFlags throughout.
"""

import json

import torch
from torch import Tensor

from nanokl import agreement, checkpoint, judgements, ppo, reward
from nanokl.evaluation import draw_prompts, prompt_docs
from nanokl.generate import Rollout
from nanokl.gpt import GPT
from nanokl.runtime import Runtime, generator


def load_judgements(flags) -> tuple[judgements.Judgements, ...]:
    """The three splits; of training and validation maybe half of each text's ratings."""
    raters = {"train": flags.raters, "val": flags.raters, "test": "all"}
    return tuple(judgements.Judgements.load(flags.data, *which) for which in raters.items())


def reference_rollout(ref: GPT, flags, tokenizer, runtime: Runtime) -> Rollout:
    """n_samples fresh texts of the reference policy, on training prompts."""
    docs = prompt_docs(flags.data, "train", flags.domains, tokenizer)
    rng = generator(flags.seed, "normalise")
    stop = tokenizer.special("<|endoftext|>")
    prompts = draw_prompts(docs, flags.n_samples, flags, start=stop, rng=rng)
    return ppo.sample_rollouts(ref, prompts, flags, runtime, stop=stop, rng=rng)


def group_batch(core: reward.RewardModel, flags, tokenizer, j: judgements.Judgements, step: int,
                runtime: Runtime):
    """This process's comparisons of a step: a member's batch; wins, valid (G, K, K); all valid."""
    rows, wins, valid = judgements.comparison_groups(
        j, step, n_groups=flags.n_groups, group_size=flags.group_size, seed=flags.seed)
    total = valid.sum()
    domain = torch.from_numpy(j.domains)[rows]  # (G, K)
    rng = generator(flags.seed, "words", step)
    if "lexicon" in j.domain_names:  # a word is read as if it stood in a snippet of any domain
        words = j.domain_names.index("lexicon")
        other = torch.randint(words, rows.shape, generator=rng)
        domain = torch.where(domain == words, other, domain)
    block_size = core.config.trunk_config["block_size"]
    hide = torch.rand(*rows.shape, block_size, generator=rng) < flags.word_dropout
    rows, wins, valid, domain, hide = map(runtime.shard, (rows, wins, valid, domain, hide))
    texts = [j.texts[r] for r in rows.flatten()]
    inputs = core.inputs(tokenizer, texts, domain.flatten(), hide.flatten(0, 1))
    wins, valid, total, *inputs = (x.to(runtime.device) for x in (wins, valid, total, *inputs))
    return inputs, wins, valid, total


def group_loss(model, core: reward.RewardModel, flags, tokenizer, j: judgements.Judgements,
               step: int, runtime: Runtime) -> Tensor:
    """Bradley-Terry on this process's groups: one forward pass a snippet, all pairs compared."""
    n = flags.members
    parts = [group_batch(core, flags, tokenizer, j, n * step + k, runtime) for k in range(n)]
    batches, wins, valid, total = zip(*parts, strict=True)
    with runtime.autocast():
        margins = model(*batches)  # (members, GK, 2)
    margins = margins.transpose(1, 2).reshape(-1, flags.group_size)  # (2 members G, K)
    wins, valid = (torch.cat([y for x in xs for y in (x, x)]) for xs in (wins, valid))
    loss, info = reward.bradley_terry(margins, wins, valid)
    return loss * info["n_pairs"] * runtime.world / (2 * sum(total))  # a mean over all processes


def test_pairs(model: reward.RewardModel, tokenizer, j: judgements.Judgements, runtime) -> dict:
    """Agreement with raters on held-out snippets, on Bradley-Terry's own scale."""
    with runtime.autocast():
        score = model.score_texts(tokenizer, j.texts, j.domains)
    score = (score - model.bias.cpu()) / model.gain.cpu()
    return agreement.pair_report(score.double().numpy(), j)


def finish_reward(flags, tokenizer, val, test, yardstick: Rollout, runtime: Runtime) -> dict:
    """Weighs the best model's parts, normalises it, and holds it against raters and yardsticks."""
    model = checkpoint.load(flags.out / "best", reward.RewardModel).to(runtime.device)
    model.gain.fill_(1), model.bias.zero_()  # resumed here, it may have been normalised before
    with runtime.autocast():
        model.stack(model.margins_of(tokenizer, val.texts, val.domains), val.pairs)
        model.normalise(ppo.score_rollouts(lambda _, texts: model.score_texts(tokenizer, texts),
                                           yardstick, tokenizer, runtime))
    if runtime.is_main:
        checkpoint.save(flags.out / "best", model, tokenizer=tokenizer)
    report = test_pairs(model, tokenizer, test, runtime)
    given = json.loads((flags.data / "meta.json").read_bytes()).get("given", {})
    return {**report, "weights": dict(zip(("encoder", "linear"), model.v.tolist(), strict=True)),
            "given": given}
