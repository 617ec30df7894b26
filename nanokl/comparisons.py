"""What train_rlhf.py makes of people's judgements, apart from its loop: data, loss, last report.

`flags` are the script's RewardFlags throughout. classify.py has the same four methods for classes.
"""

import json

import torch
from torch import Tensor

from nanokl import agreement, checkpoint, judgements, ppo, reward, training, trunks
from nanokl.evaluation import draw_prompts, load_gpt, prompt_docs
from nanokl.hf_tokenizer import load_tokenizer
from nanokl.rollout import Rollout
from nanokl.runtime import Runtime, generator


class RewardTask:
    """A reward model from comparisons by single raters, or from mean ratings.

    The trunk reads texts in its own tokens, the reference policy writes them in its own.
    """

    metric = "pair_accuracy"  # of validation, the more the better

    def __init__(self, flags, runtime: Runtime):
        self.loss_name = {"rating": "loss_sd2_per_text"}.get(flags.objective, "loss_nats_per_pair")
        folder = checkpoint.resolve(flags.init)
        self.flags, self.runtime, self.tokenizer = flags, runtime, load_tokenizer(folder)
        trunk = trunks.load_trunk(folder, dropout=flags.dropout)
        torch.manual_seed(flags.seed)  # the head
        raters = {"train": flags.raters, "val": flags.raters, "test": "all"}
        self.train, self.val, self.test = (judgements.Judgements.load(flags.data, *which)
                                           for which in raters.items())
        self.written, self.writer = reference_rollout(flags, runtime)
        self.core = reward.RewardModel.on(
            trunk, n_domain=len(self.train.domain_names), dropout=flags.dropout,
            members=flags.members, ngram_dropout=flags.ngram_dropout,
            vocabulary=reward.learn_vocabulary(self.tokenizer, self.train, trunk))
        self.core.to(runtime.device)
        for member in self.core.members:
            training.freeze(member.trunk, flags.freeze)
            member.trunk.wse.requires_grad_(True)  # of the domains, and new

    def _groups(self, step: int, member: int):
        """This process's batch for a member; rows (G, K); wins, valid (G, K, K); all valid ones."""
        flags, j = self.flags, self.train
        rows, wins, valid = judgements.comparison_groups(
            j, step, n_groups=flags.n_groups, group_size=flags.group_size, seed=flags.seed,
            member=member)
        total = valid.sum()
        domain = torch.from_numpy(j.domains)[rows]  # (G, K)
        rng = generator(flags.seed, "words", step, member)
        if "lexicon" in j.domain_names:  # a word is read as if it stood in a snippet of any domain
            words = j.domain_names.index("lexicon")
            other = torch.randint(words, rows.shape, generator=rng)
            domain = torch.where(domain == words, other, domain)
        block_size = self.core.block_size
        hide = torch.rand(*rows.shape, block_size, generator=rng) < flags.word_dropout
        rows, wins, valid, domain, hide = map(self.runtime.shard, (rows, wins, valid, domain, hide))
        texts = [j.texts[r] for r in rows.flatten()]
        inputs = self.core.inputs(self.tokenizer, texts, domain.flatten(), hide.flatten(0, 1))
        device = self.runtime.device
        rows, wins, valid, total, *inputs = (x.to(device) for x in
                                             (rows, wins, valid, total, *inputs))
        return inputs, rows, wins, valid, total

    def loss(self, model, step: int) -> Tensor:
        """Of this process's groups: one forward pass a snippet, all pairs compared, or all rated.

        A mean over all processes; of both margins of each member, apart.
        """
        flags = self.flags
        parts = [self._groups(step, k) for k in range(flags.members)]
        batches, rows, wins, valid, total = zip(*parts, strict=True)
        with self.runtime.autocast():
            margins = model(*batches)  # (members, GK, 2)
        margins = margins.transpose(1, 2).reshape(-1, flags.group_size)  # (2 members G, K)
        rows, wins, valid = (torch.cat([y for x in xs for y in (x, x)])
                             for xs in (rows, wins, valid))
        if flags.objective == "rating":
            y = torch.from_numpy(self.train.standard).to(margins.device)
            return reward.squared_error(margins, y[rows])
        loss, info = reward.bradley_terry(margins, wins, valid)
        return loss * info["n_pairs"] * self.runtime.world / (2 * sum(total))

    def validate(self, model: reward.RewardModel) -> dict:
        """Agreement with raters on the validation snippets, the parts weighed by these."""
        with self.runtime.autocast():
            margins = model.margins_of(self.tokenizer, self.val.texts, self.val.domains)
        model.stack(margins, self.val.pairs)
        report = agreement.pair_report((margins.double() @ model.v.double().cpu()).numpy(),
                                       self.val)
        return {key: report[key] for key in ("nats_per_pair", "pair_accuracy")}

    def finish(self) -> dict:
        """Normalises the best model on the reference's texts, and holds it against raters."""
        model = checkpoint.load(self.flags.out / "best", reward.RewardModel)
        model = model.to(self.runtime.device)
        model.gain.fill_(1), model.bias.zero_()  # resumed here, it may have been normalised before
        with self.runtime.autocast():
            score = model.score_texts(self.tokenizer, self.test.texts, self.test.domains)
            model.normalise(ppo.score_rollouts(
                lambda _, texts: model.score_texts(self.tokenizer, texts),
                self.written, self.writer, self.runtime))
        if self.runtime.is_main:
            checkpoint.save(self.flags.out / "best", model, tokenizer=self.tokenizer)
        report = agreement.pair_report(score.double().numpy(), self.test)
        meta = self.flags.data / "meta.json"
        given = json.loads(meta.read_bytes()).get("given", {}) if meta.is_file() else {}
        weights = dict(zip(("encoder", "linear"), model.v.tolist(), strict=True))
        return {"objective": self.flags.objective, **report, "weights": weights, "given": given}


def reference_rollout(flags, runtime: Runtime) -> tuple[Rollout, object]:
    """n_samples fresh texts of the reference policy, on training prompts, and its tokenizer."""
    ref, tokenizer = load_gpt(flags, runtime)
    docs = prompt_docs(flags.data, "train", flags.domains, tokenizer)
    rng = generator(flags.seed, "normalise")
    stop = tokenizer.special("<|endoftext|>")
    prompts = draw_prompts(docs, flags.n_samples, flags, start=stop, rng=rng)
    return ppo.sample_rollouts(ref, prompts, flags, runtime, stop=stop, rng=rng), tokenizer
