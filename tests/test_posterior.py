"""The gap of a policy, from models and a reward to its account, against a world that is listed.

Four letters and a stop token, prompts of one or two of them, up to three new tokens. Everything is
sampled by the code that measures a real run; exact.py has log Z, J and the posterior in float64.
"""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from nanokl import UserError, exact, frontier, metrics, posterior, ppo
from nanokl.evaluation import Stage
from nanokl.gpt import GPT
from nanokl.runtime import Runtime, generator

V, STOP, NEW, BETA = 5, 4, 3, 0.5
BRIEF = ("gap_nats_lower", "gap_nats_upper", "bayes_fraction_lower", "bayes_fraction_upper",
         "ess_median", "trusted")  # what an evaluation logs
DOCS = [[0, 1, 2], [2, 3, 1], [1, 1, 0]]


def score(ids, _texts):
    """Of the first letters alike and of each token's place."""
    return [sum(math.sin(3 * i + 2 * t) for i, t in enumerate(row)) for row in ids]


def model(seed: int, sd: float, ref: GPT | None = None) -> GPT:
    g = generator(seed, "model")
    config = GPT.Config(vocab_size=V, block_size=8, n_layer=1, n_head=2, n_embd=16)
    out = GPT(config, g) if ref is None else ppo.make_policy(ref, critic_layers=1)
    with torch.no_grad():
        for p in out.parameters():
            p.add_(sd * torch.randn(p.shape, generator=g))
    return out.eval().requires_grad_(False)


def make() -> tuple[Stage, GPT]:
    tokenizer = SimpleNamespace(special={"<|endoftext|>": STOP}.get, decode=str)
    config = ppo.PPOConfig(min_prompt=1, max_prompt=2, max_new_tokens=NEW, temperature=0.8)
    ref = model(0, 0.3)
    runtime = Runtime(torch.device("cpu"), torch.float32)
    return Stage(config, runtime, tokenizer, ref, score, 0), model(1, 0.1, ref)


def truth(stage: Stage, policy: GPT, prompts) -> dict:
    """Means over prompts of log Z, J of both, the gap, and E*[r], KL(pi* || ref)."""
    out = []
    for prompt in prompts:
        laws = [exact.joint(exact.levels_of(m, prompt, NEW, stop=STOP, temperature=0.8))
                for m in (stage.ref, policy)]
        texts = exact.texts(V, NEW).tolist()
        ended = [y[: y.index(STOP) + 1] if STOP in y else y for y in texts]
        r = torch.tensor(score([prompt + y for y in ended], None), dtype=torch.float64)
        star, log_z = exact.posterior(laws[0], r, BETA)
        J = exact.objective(laws[1], laws[0], r, BETA)
        out.append([log_z, exact.expectation(laws[0], r), J, exact.kl(laws[1], star),
                    exact.expectation(star, r), exact.kl(star, laws[0])])
    names = ("log_z", "J_ref", "J", "gap", "reward", "kl")
    return dict(zip(names, torch.tensor(out).mean(0).tolist(), strict=True))


def test_the_account_of_a_policy_is_the_exact_one():
    """16,000 texts a prompt: standard errors near .01, held to .05."""
    stage, policy = make()
    ruler = posterior.Ruler(stage, DOCS, prompts=4, samples=8_000)
    account, numbers = posterior.whole_account(ruler, policy, BETA)
    true = truth(stage, policy, ruler.prompts)
    for name, value in (("log_z_nats_lower", "log_z"), ("log_z_nats_upper", "log_z"),
                        ("reward_ref_mean", "J_ref"), ("objective", "J"), ("gap_nats", "gap")):
        assert numbers[name] == pytest.approx(true[value], abs=0.05), name
    fraction = (true["J"] - true["J_ref"]) / (BETA * true["log_z"] - true["J_ref"])
    assert numbers["bayes_fraction"] == pytest.approx(fraction, abs=0.08)
    assert numbers["trusted"] and true["gap"] > 0.1
    assert numbers["most_reward_at_this_kl"] > numbers["reward_mean"] + 0.01
    assert numbers["best_of_n_at_this_kl"]["reward_mean"] < numbers["most_reward_at_this_kl"]
    assert numbers["most_reward_trusted"] and numbers["best_of_n_at_this_kl"]["trusted"]
    assert posterior.brief(account) == {name: numbers[name] for name in BRIEF}


def test_the_frontier_passes_through_the_posterior():
    stage, policy = make()
    ruler = posterior.Ruler(stage, DOCS, prompts=4, samples=8_000)
    true = truth(stage, policy, ruler.prompts)
    weighed = posterior.both(*ruler.halves(policy))
    points = frontier.frontier(*weighed, [BETA])
    most, trusted = frontier.most_reward(*weighed, true["kl"], frontier.prices())
    assert trusted and most == pytest.approx(true["reward"], abs=0.05)
    assert points[0]["kl_nats"] == pytest.approx(true["kl"], abs=0.05)
    assert points[0]["reward_mean"] == pytest.approx(true["reward"], abs=0.05)
    assert points[0]["trusted"]


def test_what_needs_no_training_is_worth_less_than_the_posterior():
    stage, policy = make()
    ruler = posterior.Ruler(stage, DOCS, prompts=4, samples=4_096)
    rows = posterior.whole_account(ruler, policy, BETA)[1]["untrained"]
    true = truth(stage, policy, ruler.prompts)
    assert [row["n"] for row in rows[::3]] == [4, 16, 64, 256]
    by_name = {name: [row["objective"] for row in rows if row["sampler"] == name]
               for name in ("best-of-n", "SIR", "Metropolis")}
    for values in by_name.values():
        assert all(BETA * true["log_z"] + 0.02 > J for J in values)
    for name in ("SIR", "Metropolis"):  # they go to the posterior, best-of-n past it
        assert by_name[name] == sorted(by_name[name])
        assert by_name[name][-1] == pytest.approx(BETA * true["log_z"], abs=0.03)
    assert by_name["best-of-n"][-1] < by_name["best-of-n"][1]


def test_what_the_critic_reaches_is_within_its_bound():
    """E log Zhat <= log Z; with 512 particles a prompt it is within .1 nats of it."""
    stage, policy = make()
    ruler = posterior.Ruler(stage, DOCS, prompts=4, samples=32)
    row, true = posterior.by_critic(ruler, policy, BETA, 512), truth(stage, policy, ruler.prompts)
    assert BETA * (true["log_z"] - 0.1) < row["objective"] < BETA * (true["log_z"] + 0.05)
    assert row["reward_mean"] - BETA * row["kl_nats"] == pytest.approx(row["objective"])


def test_rulers_repeat_themselves_and_differ_by_seed():
    stage, policy = make()
    one, two = (posterior.Ruler(stage, DOCS, prompts=3, samples=32) for _ in range(2))
    assert one.account(policy, BETA).summary() == two.account(policy, BETA).summary()
    stage.seed = 1
    other = posterior.Ruler(stage, DOCS, prompts=3, samples=32)
    assert other.account(policy, BETA).summary() != one.account(policy, BETA).summary()


def test_beta_0_has_no_gap():
    stage, policy = make()
    account, numbers = posterior.whole_account(
        posterior.Ruler(stage, DOCS, prompts=2, samples=32), policy, 0.0)
    assert "gap_nats_lower" not in numbers
    assert {row["sampler"] for row in numbers["untrained"]} == {"best-of-n"}
    assert "infinite" in "\n".join(account.lines())


@pytest.mark.parametrize("content", ["", "{}", "[1]", json.dumps({"beta": "x", "data": "d"})])
def test_a_folder_that_is_no_run(tmp_path, content):
    with pytest.raises(UserError, match="give the folder of a run"):
        posterior.open_run(tmp_path)
    (tmp_path / "flags.json").write_text(content)
    with pytest.raises(UserError, match="give the folder of a run"):
        posterior.open_run(tmp_path)


def test_an_evaluation_that_is_not_trusted_logs_its_ends_and_says_so(tmp_path, capsys):
    """32 texts: both ends of gap and fraction, in the row and on the line, and no plain number."""
    stage, policy = make()
    account = posterior.Ruler(stage, DOCS, prompts=2, samples=32).account(policy, 0.1)
    row = posterior.brief(account)
    assert tuple(row) == BRIEF and row["trusted"] is False and None not in row.values()
    with metrics.Log(tmp_path, total=9, unit="batch") as log:
        log.event(3, **row)
    (written,) = metrics.read_rows(tmp_path / "metrics.jsonl")
    assert written["trusted"] is False and written["gap_nats_lower"] == row["gap_nats_lower"]
    assert "trusted False" in capsys.readouterr().out


def told(monkeypatch, folder, *, texts: int, prompts: int = 2, **change) -> tuple[str, list[str]]:
    """What `tell` says of the policy above, as if a run had trained it, and on the way."""
    stage, policy = make()
    stage.config.method = "ppo"
    monkeypatch.setattr(posterior, "open_run", lambda *_: (stage, policy, DOCS, BETA))
    for name, value in change.items():
        monkeypatch.setattr(posterior, name, value)
    said = []
    text = posterior.tell(folder, prompts=prompts, samples=texts, particles=16, say=said.append)
    return text, said


def test_what_has_been_measured_is_written_before_what_comes_next(tmp_path, monkeypatch):
    """posterior.json is there while SMC draws, and has its row afterwards."""
    def fails(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        told(monkeypatch, tmp_path, texts=32, by_critic=fails)
    before = json.loads((tmp_path / "posterior.json").read_bytes())
    assert before["prompts"] == 2 and before["untrained"][-1]["sampler"] != "SMC, at most"
    monkeypatch.undo()
    text, said = told(monkeypatch, tmp_path, texts=32)
    after = json.loads((tmp_path / "posterior.json").read_bytes())
    assert after.pop("untrained")[:-1] == before.pop("untrained") and after == before
    assert "SMC, at most" in text
    assert ["32 texts each" in said[0], "SMC of 16 particles" in said[1]] == [True, True]


@pytest.mark.parametrize(("texts", "trusted"), [(32, False), (4096, True)])
def test_the_most_reward_is_plain_where_it_is_trusted(tmp_path, monkeypatch, texts, trusted):
    text, _ = told(monkeypatch, tmp_path, texts=texts, prompts=4)
    numbers = json.loads((tmp_path / "posterior.json").read_bytes())
    most, best = numbers["most_reward_at_this_kl"], numbers["best_of_n_at_this_kl"]
    (line,) = (x for x in text.splitlines() if x.startswith("most reward  "))
    assert numbers["most_reward_trusted"] == best["trusted"] == trusted
    for x in (most, best["reward_mean"]):
        assert (f">= {x:.2f} (unreliable)" in line) != trusted and f"{x:.2f}" in line


@pytest.mark.usefixtures("untuned")
@pytest.mark.parametrize(("summary", "beta"), [(None, 0.1), ({"beta": 0.37}, 0.37), ({}, 0.1)])
def test_beta_is_what_the_run_ended_at(tmp_path, monkeypatch, summary, beta):
    """With --kl_target that of summary.json; without a summary that of the flags."""
    flags = {"data": "d", "policy": "p", "reward": "r", "beta": 0.1, "seed": 0}
    (tmp_path / "flags.json").write_text(json.dumps(flags))
    if summary is not None:
        (tmp_path / "summary.json").write_text(json.dumps(summary))
    stage, policy = make()
    monkeypatch.setattr(posterior, "open_stage", lambda *_: (stage, [DOCS]))
    monkeypatch.setattr(posterior.checkpoint, "resolve", lambda folder: folder)
    monkeypatch.setattr(posterior.GPT, "from_pretrained", lambda *_, **__: policy)
    assert posterior.open_run(tmp_path, "cpu")[-1] == beta
    (tmp_path / "summary.json").write_text("[1]")
    with pytest.raises(UserError, match="give the folder of a run"):
        posterior.open_run(tmp_path, "cpu")
