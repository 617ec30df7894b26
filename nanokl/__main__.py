"""Use what was trained: python -m nanokl {sample,chat,interpolate,fill-mask,embed,score,...}."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

from nanokl import (
    UserError,
    bench,
    bert,
    checkpoint,
    examples,
    kl_table,
    latent,
    neighbours,
    posterior,
    repl,
    require_positive,
)
from nanokl import runtime as rt
from nanokl.classify import Classifier
from nanokl.export import export
from nanokl.generate import generate
from nanokl.gpt import GPT
from nanokl.hf_tokenizer import load_tokenizer
from nanokl.report import write_report
from nanokl.reward import RewardModel
from nanokl.stream import visible
from nanokl.vae import VAE, Given


@dataclass
class Sample:
    """Texts from a GPT, a trained policy, or a VAE: each from a z of its own, of the prior."""

    run: Annotated[Path, tyro.conf.Positional]  # a run or checkpoint folder, such as runs/demo/ppo
    prompt: str = ""  # the text to continue
    n: int = 5  # samples
    max_new_tokens: int = 40  # longest continuation
    temperature: float = 1.0  # 0 takes the likeliest token
    top_k: int | None = None  # only the k likeliest tokens
    top_p: float | None = None  # only the likeliest tokens that hold this much probability
    seed: int = 0  # same seed, same samples
    device: str = "auto"  # auto, cpu, cuda or mps

    def __call__(self) -> None:
        require_positive(self, "n")
        runtime = rt.setup(self.device, "float32")
        folder = checkpoint.resolve(self.run)
        tokenizer = load_tokenizer(folder)
        rng = rt.generator(self.seed, "sample")
        if checkpoint.read_config(folder)["model"] == "VAE":
            vae = VAE.from_pretrained(folder, dropout=0.0).to(runtime.device).eval()
            z = torch.randn(self.n, vae.config.n_latent, generator=rng).to(runtime.device)
            model = Given(vae, z)
        else:
            model = GPT.from_pretrained(folder, dropout=0.0).to(runtime.device).eval()
        stop = tokenizer.special("<|endoftext|>")
        ids = [stop, *tokenizer.encode(self.prompt)]
        rollout = generate(model, [ids] * self.n, self.max_new_tokens, stop=stop,
                           temperature=self.temperature, top_k=self.top_k, top_p=self.top_p,
                           rng=rng)
        for row in rollout.rows():
            print(visible(tokenizer.decode([i for i in row if i != stop])))


@dataclass
class Interpolate:
    """Texts on the way from one to another, through the z of a VAE."""

    run: Annotated[Path, tyro.conf.Positional]  # a VAE's run, such as runs/main/vae/latent
    first: Annotated[str, tyro.conf.Positional]
    last: Annotated[str, tyro.conf.Positional]
    steps: int = 7  # texts, both ends included
    temperature: float = 0.0  # 0 takes the likeliest token
    max_new_tokens: int = 40  # longest text
    seed: int = 0  # of the random numbers, which all texts share
    device: str = "auto"  # auto, cpu, cuda or mps

    def __call__(self) -> None:
        runtime, folder = rt.setup(self.device, "float32"), checkpoint.resolve(self.run)
        vae = VAE.from_pretrained(folder, dropout=0.0).to(runtime.device).eval()
        tokenizer = load_tokenizer(folder)
        z = latent.between(vae, tokenizer, self.first, self.last, self.steps)
        for text in latent.say(vae, tokenizer, z, temperature=self.temperature, seed=self.seed,
                               max_new_tokens=self.max_new_tokens):
            print(visible(text))


@dataclass
class FillMask:
    """The likeliest tokens for a [MASK]."""

    run: Annotated[Path, tyro.conf.Positional]  # a BERT run, such as runs/demo/bert
    text: Annotated[str, tyro.conf.Positional]  # a text with one [MASK]
    top_k: int = 5  # how many to show

    def __call__(self) -> None:
        folder = checkpoint.resolve(self.run)
        tokenizer, model = load_tokenizer(folder), bert.BERT.from_pretrained(folder, dropout=0.0)
        for _, p, filled in bert.fill_mask(model.eval(), tokenizer, self.text, self.top_k):
            print(f"{p:6.3f}  {filled}")


@dataclass
class Embed:
    """Sentence embeddings by an encoder: a line of JSON a text, or a table in a file."""

    run: Annotated[Path, tyro.conf.Positional]  # a BERT run or folder, such as all-MiniLM-L6-v2
    texts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # texts
    file: Path | None = None  # a text a line, besides those
    out: Path | None = None  # FILE.npy for the embeddings, float32 (texts, width)
    device: str = "auto"  # auto, cpu, cuda or mps

    def __call__(self) -> None:
        texts = list(self.texts)
        if self.file is not None:
            lines = self.file.read_bytes().decode("utf-8", "replace").replace("\r\n", "\n")
            texts += lines.removesuffix("\n").split("\n")
        if not texts or (self.out is not None and self.out.suffix != ".npy"):
            raise UserError(f"embed got {len(texts)} texts and --out {self.out}: give texts, or a "
                            "--file of one a line, and for --out a name that ends in .npy")
        runtime, folder = rt.setup(self.device, "float32"), checkpoint.resolve(self.run)
        model = bert.BERT.from_pretrained(folder, dropout=0.0).to(runtime.device).eval()
        embeddings = bert.embed(model, load_tokenizer(folder), texts,
                                longest=bert.longest_text(folder, model.config.block_size))
        if self.out is not None:
            np.save(self.out, embeddings.numpy())
            print(f"{self.out}: {len(texts)} texts, {embeddings.shape[1]} numbers each, of norm 1")
            return
        for text, row in zip(texts, embeddings.tolist(), strict=True):
            print(json.dumps({"text": text, "embedding": row}, ensure_ascii=False))


@dataclass
class Neighbours:
    """The tokens that a GPT or an encoder takes for most like a word, by their embeddings."""

    run: Annotated[Path, tyro.conf.Positional]  # a run or checkpoint folder, such as runs/demo/gpt
    word: Annotated[str, tyro.conf.Positional]  # a word, one token at best
    top_k: int = 8  # how many to show

    def __call__(self) -> None:
        for token, cosine in neighbours.of_run(self.run, self.word, self.top_k):
            print(f"{cosine:6.3f}  {token.strip()}")


@dataclass
class Examples:
    """The examples of the articles, repaired: what comes out beside what should."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # such as tilting; none: all
    out: Path = Path("runs/examples")  # folder for numbers and the figure

    def __call__(self) -> None:
        rt.setup("cpu", "float32")
        for line in examples.run(self.names, self.out):
            print(line, flush=True)


@dataclass
class Export:
    """A run's model as a folder that other tools open, with a model card."""

    run: Annotated[Path, tyro.conf.Positional]  # a run or checkpoint folder
    folder: Annotated[Path, tyro.conf.Positional]  # a new folder
    to: Literal["hf"] = "hf"  # Hugging Face's layout

    def __call__(self) -> None:
        print(export(self.run, self.folder))


@dataclass
class Score:
    """What a reward model makes of texts, in its reference's mean and sd; or a text's likely class.

    A classifier prints the class, its probability first.
    """

    run: Annotated[Path, tyro.conf.Positional]  # a reward run, such as runs/demo/reward
    texts: Annotated[tuple[str, ...], tyro.conf.Positional]  # one or more texts

    def __call__(self) -> None:
        folder = checkpoint.resolve(self.run)
        kind = {"Classifier": Classifier}.get(checkpoint.read_config(folder)["model"], RewardModel)
        model, tokenizer = checkpoint.load(folder, kind), load_tokenizer(folder)
        room = model.block_size - 2  # between [CLS] and [SEP]
        lengths = [len(ids) for ids in tokenizer.encode_batch(self.texts)] or [0]
        if not 0 < min(lengths) <= max(lengths) <= room:
            raise UserError(f"the texts have {min(lengths)} to {max(lengths)} tokens: give texts "
                            f"of 1 to {room}")
        if kind is Classifier:
            for p, text in zip(model.predict(tokenizer, self.texts), self.texts, strict=True):
                print(f"{p.max():.3f}  {model.config.labels[int(p.argmax())]}  {text}")
            return
        for score, text in zip(model.score_texts(tokenizer, self.texts), self.texts, strict=True):
            print(f"{score:+.3f}  {text}")


@dataclass
class Posterior:
    """How far a trained policy is from the posterior, in nats; or --table, of ways to charge KL."""

    run: Annotated[Path | None, tyro.conf.Positional] = None  # a run of train_rlhf.py ppo
    prompts: int = 16  # held-out prompts
    samples: int = 4096  # texts each of reference and policy for each prompt
    particles: int = 256  # of sequential Monte Carlo with the policy's critic; 0: none
    table: bool = False  # the gradient of each way to charge the KL, beside the exact one
    device: str = "auto"  # auto, cpu, cuda or mps

    def __call__(self) -> None:
        if (self.run is None) == (not self.table):
            raise UserError(f"posterior got run {self.run} and table {self.table}: give a run, "
                            "such as runs/demo/ppo, or --table")
        if self.table:
            print(kl_table.table())
            return
        require_positive(self, "prompts")
        posterior.check_samples("samples", self.samples)
        if self.particles < 0:
            raise UserError(f"particles is {self.particles}: give 0 or more")
        print(posterior.tell(self.run, prompts=self.prompts, samples=self.samples,
                             particles=self.particles, device=self.device, say=_progress))


@dataclass
class Report:
    """summary.json, report.html and figures of a whole run."""

    run: Annotated[Path, tyro.conf.Positional]  # a folder with gpt/ bert/ reward/ ppo/

    def __call__(self) -> None:
        path = write_report(self.run)
        summary = json.loads((self.run / "summary.json").read_bytes())
        print(f"in all {summary['wall_seconds']} s, at most {summary['peak_memory_gib']:.2f} GiB; "
              f"numbers: {self.run / 'summary.json'}  report: {path}")


@dataclass
class Bench:
    """nanokl beside its peers at the same work: a table of ratios, and OUT/SUITE.json."""

    suite: Annotated[str, tyro.conf.Positional]  # logprob, bpe, ... : a file nanokl/bench_SUITE.py
    out: Path = Path("runs/bench")  # folder to write to
    rounds: int = 5  # how often each variant runs
    seconds: float = 60.0  # per case: once it has taken these, no third or later round begins
    cases: tuple[str, ...] = ()  # only these
    variants: tuple[str, ...] = ()  # only these
    device: str = "auto"  # auto, cpu or cuda
    data: Path = Path("data/shakespeare")  # filled by its prepare.py; for bpe also a text file
    peers: Path = Path(".venv/peers/bin/python")  # a Python with transformers, trl, liger-kernel
    peers_ppo: Path = Path(".venv/peers-ppo/bin/python")  # one with trl 1.9, which has PPOTrainer

    def __call__(self) -> None:
        require_positive(self, "rounds", "seconds")
        if self.device == "mps":
            raise UserError("device is 'mps', where nothing is measured: choose auto, cpu or cuda")
        pythons = {}
        for name, default in (("peers", Bench.peers), ("peers_ppo", Bench.peers_ppo)):
            path = getattr(self, name)
            if path.exists():
                pythons[name] = str(path.absolute())
            elif path != default:
                raise UserError(f"{name} is {path}, which is not there: give a Python interpreter")
        result = bench.run_suite(
            self.suite, self.out, rounds=self.rounds, seconds=self.seconds, cases=self.cases,
            device=rt.setup(self.device).device.type, variants=self.variants, pythons=pythons,
            data=self.data, tell=_progress)
        print(bench.table(result))
        bench.finish_suite(result, self.out)


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    commands = {"sample": Sample, "chat": repl.Chat, "interpolate": Interpolate,
                "fill-mask": FillMask, "neighbours": Neighbours, "embed": Embed, "score": Score,
                "export": Export, "report": Report, "posterior": Posterior, "examples": Examples,
                "bench": Bench}
    rt.parse_flags(commands, prog="python -m nanokl", description=__doc__)()


if __name__ == "__main__":
    rt.run_program(main)
