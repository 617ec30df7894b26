"""Benchmarks of sampling and of PPO: the oracle, the conversion of weights, nanokl's own rows."""

import math

import pytest
import torch

from nanokl import bench_generate, bench_objective, bench_ppo, exact
from nanokl.bench_generate import gpt2_shaped, gpt2_weights, plain_logits, plain_logp

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 32, "block_size": 12}
GENERATE = {"name": "tiny", "model": TINY, "batch": 4, "prompt": 3, "new": 5, "device": "cpu"}
PPO = {"name": "tiny", "model": TINY, "prompt": 3, "new": 5, "batch": 8, "epochs": 2, "beta": 0.1,
       "device": "cpu"}  # fmt: skip
OBJECTIVE = {**PPO, "iterations": 3, "seed": 1, "samples": 64, "lr": 1e-3}
pytestmark = pytest.mark.usefixtures("untuned")


@pytest.fixture
def model():
    model = gpt2_shaped(TINY)
    with torch.no_grad():  # biases too must be in their places
        for i, p in enumerate(model.parameters()):
            p += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    return model


@pytest.fixture
def idx():
    return torch.randint(32, (3, 9), generator=torch.Generator().manual_seed(0))


def test_oracle_is_the_gpt(model, idx):
    want = plain_logits(gpt2_weights(model), idx, TINY["n_head"])
    model.double()
    torch.testing.assert_close(model.head(model(idx)), want, rtol=0, atol=1e-12)
    logp = plain_logp(gpt2_weights(model), idx, TINY["n_head"])
    torch.testing.assert_close(logp[1, 4], want[1, 4].log_softmax(-1)[idx[1, 5]])


def test_weights_go_to_transformers(model, idx):
    pytest.importorskip("transformers")
    peer = bench_generate.peer_model(model)
    with torch.no_grad():
        ours, theirs = model.logits(model(idx)), peer(idx).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    back = bench_objective.weights_of(peer)
    want = gpt2_weights(model)
    assert back.keys() == want.keys()
    assert all(torch.equal(back[name], want[name]) for name in want)


def test_every_weight_is_written_once(model):
    n = sum(p.numel() for p in model.parameters())  # a tied one counts once
    assert sum(x.numel() for x in gpt2_weights(model).values()) == n


@pytest.mark.parametrize("name", ["nanokl", "nanokl float32"])
def test_generate_row(name):
    ready = bench_generate.VARIANTS[name](GENERATE)
    assert (ready.units, ready.unit, ready.check["tokens short"]) == (20, "token", 0)
    assert ready.check["logp"] < (1e-5 if name == "nanokl float32" else 0.05)
    assert ready.run().idx.shape == (4, 8)


def test_generate_check_sees_a_wrong_logp(model):
    weights = gpt2_weights(model)
    idx = torch.randint(32, (4, 8))
    logp = plain_logp(weights, idx, 2)[:2, -5:]
    assert bench_generate.check(GENERATE, model, idx, logp)["logp"] < 1e-12
    assert bench_generate.check(GENERATE, model, idx, logp + 0.1)["logp"] == pytest.approx(0.1)
    assert bench_generate.check(GENERATE, model, idx[:, :-1], logp)["tokens short"] == 1


def test_rule():
    idx = torch.tensor([[0, 1, 1, 2, 3, 9, 10, 30], [0, 1, 1, 1, 1, 31, 31, 31]])
    # of the last 5, the response, 2 are low; 3 and 0 steps change parity
    assert bench_ppo.rule(idx, PPO).tolist() == pytest.approx([2.4 * 5 / 5, 2.4 * 2 / 5])


@pytest.mark.parametrize("name", ["nanokl", "nanokl float32"])
def test_ppo_row(name):
    ready = bench_ppo.VARIANTS[name](PPO)
    assert (ready.units, ready.unit, ready.check["missing"]) == (8, "episode", 0)
    assert ready.check["nats/token"] < (1e-5 if name == "nanokl float32" else 0.01)
    log = ready.run()
    assert log["response_tokens_mean"] == 5 and math.isfinite(log["grad_norm"])


def test_missing_work_is_seen():
    seen = bench_ppo.Seen(PPO)
    seen(torch.zeros(8, 8, dtype=torch.long))
    seen.updates = {1: 2}
    assert seen.missing() == 0
    seen(torch.zeros(7, 6, dtype=torch.long))
    seen.updates = {1: 4}
    assert seen.missing() == 1 + 2 + 2


def test_judge_of_the_reference_finds_no_divergence():
    weights = gpt2_weights(bench_objective.reference(OBJECTIVE))
    score, kl = bench_objective.judge(weights, weights, OBJECTIVE)
    assert score.shape == (64,) and kl.abs().max() == 0


def test_judge_has_the_exact_kl():
    """A policy that is uniform: KL = sum over states of log(1/V) - mean log p_ref."""
    ref = gpt2_weights(bench_objective.reference(OBJECTIVE))
    flat = {name: torch.zeros_like(x) for name, x in ref.items()}
    score, kl = bench_objective.judge(flat, ref, OBJECTIVE)
    assert kl.min() > 0
    # a token's mean reward is 2.4 (1/4 + 1/2) where all are equally likely
    assert score.mean().item() == pytest.approx(1.8, abs=0.3)


def test_evidence_is_that_of_all_texts():
    """log Z of 6^3 texts for each of 4 prompts; with 4,096 particles its noise is below .01."""
    case = {**OBJECTIVE, "model": {**TINY, "vocab_size": 6}, "new": 3, "samples": 4, "beta": 0.5}
    ref = gpt2_weights(bench_objective.reference(case))
    found = bench_objective.log_evidence(ref, case, particles=4096)
    for log_z, prompt in zip(found, bench_objective.held_out(case), strict=True):
        idx = torch.cat([prompt.expand(216, -1), exact.texts(6, 3)], dim=1)
        logp = plain_logp(ref, idx, TINY["n_head"])[:, 2:].sum(1)
        log_w = logp + bench_ppo.rule(idx, case) / case["beta"]
        assert log_z.item() == pytest.approx(log_w.logsumexp(0).item(), abs=0.05)


def test_objective_row():
    case = OBJECTIVE
    ready = bench_objective.VARIANTS["nanokl"](case)
    check = ready.check
    assert check["J"] == pytest.approx(check["reward"] - case["beta"] * check["KL"], abs=1e-9)
    assert check["KL"] > 0 and check["se"] > 0
    assert check["gap"] > 0 and check["gap se"] > 0
    assert ready.run()["response_tokens_mean"] == 5


def test_rows_of_peers_say_where_they_run():
    first = {bench_generate: "nanokl compiled", bench_ppo: "nanokl", bench_objective: "nanokl"}
    for suite, base in first.items():
        assert next(iter(suite.VARIANTS)) == base  # of all ratios
        assert suite.ENVIRONMENT.keys() == {n for n in suite.VARIANTS if "nanokl" not in n}
        assert set(suite.ENVIRONMENT.values()) <= {"peers", "peers_ppo"}
