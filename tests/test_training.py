"""training.py: one update against plain arithmetic, what a NaN leaves alone, resuming."""

import copy
import signal
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_transformer import one_thread  # noqa: F401
from torch import nn

from nanokl import UserError
from nanokl.gpt import GPT, GPTConfig
from nanokl.metrics import Log
from nanokl.runtime import Interrupt, NonFiniteLoss, Runtime
from nanokl.tokenizer import Tokenizer
from nanokl.training import (
    gradient_step,
    leave,
    load_last,
    nothing_half_written,
    open_run,
    save_last,
    seed_step,
)

CPU = Runtime(torch.device("cpu"), torch.float32)


BYTES = Tokenizer([bytes([b]) for b in range(256)])


def make(seed=0, dropout=0.0):
    sizes = {"vocab_size": BYTES.vocab_size, "block_size": 8, "n_layer": 1, "n_head": 2,
             "n_embd": 8}
    return GPT(GPTConfig(**sizes, dropout=dropout), rng=torch.Generator().manual_seed(seed))


def loss_of(model, seed=0):
    idx = torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(seed))
    logits = model.logits(model(idx[:, :-1]))
    return F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten())


def snapshot(model, optimizers):
    """Every number of weights and optimisers, to compare bit for bit."""
    state = [optimizer.state_dict()["state"] for optimizer in optimizers]
    numbers = [x for entry in state for each in entry.values() for x in each.values()]
    return [torch.as_tensor(x).clone() for x in (*model.state_dict().values(), *numbers)]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------ gradient_step
@pytest.mark.parametrize("max_grad_norm", [0.05, 1e9])
def test_gradient_step_is_clipped_gradient_descent(tmp_path, max_grad_norm):
    model = make()
    weights = list(model.parameters())
    gradient = torch.autograd.grad(loss_of(model), weights)
    norm = sum(g.double().square().sum() for g in gradient).sqrt().item()
    scale = min(1.0, max_grad_norm / norm)
    assert (scale < 1) == (max_grad_norm < 1)  # both cases are met
    lr = 0.5, 0.25  # two optimisers, as for Muon and AdamW
    expected = [w.detach().double() - lr[i >= 2] * scale * g.double()
                for i, (w, g) in enumerate(zip(weights, gradient, strict=True))]  # fmt: skip
    for w in weights:
        w.grad = torch.full_like(w, 1e3)  # left from another step: must not count
    optimizers = [torch.optim.SGD(weights[:2], lr=lr[0]), torch.optim.SGD(weights[2:], lr=lr[1])]
    got = gradient_step(loss_of(model), model.parameters(), optimizers,
                        max_grad_norm=max_grad_norm, step=0, out=tmp_path)  # fmt: skip
    assert abs(got.item() / norm - 1) < 1e-5  # the norm before clipping
    for w, e in zip(weights, expected, strict=True):
        torch.testing.assert_close(w.detach().double(), e, rtol=0, atol=1e-6)


def test_gradient_steps_equal_plain_torch(tmp_path):
    ours = make()
    plain = copy.deepcopy(ours)
    a, b = (torch.optim.AdamW(m.parameters(), lr=0.01) for m in (ours, plain))
    for step in range(4):
        gradient_step(loss_of(ours, step), ours.parameters(), [a], max_grad_norm=0.1, step=step,
                      out=tmp_path)  # fmt: skip
        b.zero_grad()
        loss_of(plain, step).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        b.step()
    assert same(snapshot(ours, [a]), snapshot(plain, [b]))
    assert not same(snapshot(ours, []), snapshot(make(), []))


def still(model):
    """Zeros that have a gradient."""
    return model.wte.weight - model.wte.weight.detach()


BAD = {
    "nan loss": lambda model: loss_of(model) * float("nan"),
    "infinite loss": lambda model: loss_of(model) + float("inf"),
    "nan gradient": lambda model: loss_of(model) + (0 * model.wte.weight[0, 0]).sqrt(),
    "infinite gradient of 0": lambda model: loss_of(model) + 1e30 * (1e10 * still(model)).sum(),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("saved", [False, True])
def test_non_finite_loss_leaves_every_weight(tmp_path, bad, saved):
    model = make()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01)]
    update = {"max_grad_norm": 1.0, "out": tmp_path}
    gradient_step(loss_of(model), model.parameters(), optimizers, step=0, **update)
    if saved:
        save_last(tmp_path, model, optimizers, tokenizer=None, step=1)
    before = snapshot(model, optimizers)
    with pytest.raises(NonFiniteLoss) as error:
        gradient_step(bad(model), model.parameters(), optimizers, step=41, **update)
    assert same(snapshot(model, optimizers), before)
    assert error.value.step == 41 and "step 41" in str(error.value)
    assert error.value.checkpoint == (tmp_path / "last" if saved else None)
    assert (str(tmp_path / "last") in str(error.value)) == saved
    gradient_step(loss_of(model), model.parameters(), optimizers, step=42, **update)  # no remains
    assert all(x.isfinite().all() for x in snapshot(model, optimizers))


# ---------------------------------------------------------------------------------- seed_step
def dropped(seed, step, rank=0):
    seed_step(seed, step, Runtime(torch.device("cpu"), torch.float32, rank=rank, world=4))
    return F.dropout(torch.ones(200), 0.5)


def test_dropout_depends_on_seed_step_and_rank_only():
    first = dropped(1, 5)
    torch.rand(1000)  # any history
    dropped(1, 4)
    assert torch.equal(dropped(1, 5), first)
    # equal by chance: 2^-200 each
    others = [dropped(1, 6), dropped(2, 5), dropped(1, 5, rank=1), dropped(5, 1)]
    assert not any(torch.equal(first, other) for other in others)


def train(model, optimizers, first, last, out):
    for step in range(first, last):
        seed_step(0, step, CPU)
        gradient_step(loss_of(model, step), model.parameters(), optimizers, max_grad_norm=1.0,
                      step=step, out=out)  # fmt: skip


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path):
    def start():
        model = make(dropout=0.3).train()
        blocks = [p for p in model.blocks.parameters() if p.dim() == 2]
        rest = [p for p in model.parameters() if not any(p is q for q in blocks)]
        return model, [torch.optim.SGD(blocks, lr=0.1, momentum=0.9),
                       torch.optim.AdamW(rest, lr=0.01)]  # fmt: skip

    whole, optimizers = start()
    train(whole, optimizers, 0, 6, tmp_path)
    expected = snapshot(whole, optimizers)

    model, optimizers = start()
    train(model, optimizers, 0, 3, tmp_path)
    save_last(tmp_path, model, optimizers, tokenizer=BYTES, step=3, best=1.25, names=["a"])
    train(model, optimizers, 3, 5, tmp_path)  # lost with the crash

    model, optimizers = start()
    torch.rand(7)
    other = Tokenizer(BYTES.tokens, lowercase=True)
    with pytest.raises(UserError, match="another tokenizer than --data's"):
        load_last(tmp_path, model, optimizers, tokenizer=other)
    model, optimizers = start()
    state = load_last(tmp_path, model, optimizers, tokenizer=BYTES)
    assert state == {"step": 3, "best": 1.25, "names": ["a"]}
    train(model, optimizers, state["step"], 6, tmp_path)
    assert same(snapshot(model, optimizers), expected)


def test_load_last_needs_something_saved(tmp_path):
    model = make()
    with pytest.raises(UserError, match="last is no checkpoint"):
        load_last(tmp_path, model, [torch.optim.SGD(model.parameters())], tokenizer=BYTES)


def test_load_last_refuses_the_state_of_another_model(tmp_path):
    model = make()
    save_last(tmp_path, model, [torch.optim.SGD(model.parameters())], tokenizer=BYTES)
    parts = [torch.optim.SGD([p]) for p in model.parameters()]
    for optimizers in (parts, [torch.optim.SGD(list(model.parameters())[:1])]):
        with pytest.raises(UserError, match="state.pt is of another model") as error:
            load_last(tmp_path, model, optimizers, tokenizer=BYTES)
        assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------- whole runs
def flags(out, **changed):
    given = {"out": out, "resume": False, "device": "cpu", "log_every": 10, "save_every": 10,
             "lr": 0.01, "n_layer": 2}  # fmt: skip
    return SimpleNamespace(**given | changed)


def test_open_run_wants_equal_shares_for_all_processes(tmp_path):
    three = Runtime(torch.device("cpu"), torch.float32, rank=0, world=3)
    with pytest.raises(UserError, match="--batch must be a multiple of the 3 processes"):
        open_run(flags(tmp_path / "run", batch=16), three)
    assert not (tmp_path / "run").exists()


def test_open_run_holds_the_flags_that_make_the_result(tmp_path):
    out, model = tmp_path / "run", make()
    with pytest.raises(UserError, match="nothing to resume"):
        open_run(flags(out, resume=True), CPU)
    assert not out.exists()
    assert open_run(flags(out), CPU) is False
    with pytest.raises(UserError, match="holds another run"):
        open_run(flags(out), CPU)
    save_last(out, model, [], tokenizer=None, step=1)
    free = {"device": "auto", "log_every": 1, "save_every": 2}
    assert open_run(flags(out, resume=True, **free), CPU) is True
    for change in ({"lr": 0.02}, {"n_layer": 3}):
        with pytest.raises(UserError, match="a resumed run keeps it"):
            open_run(flags(out, resume=True, **change), CPU)


@pytest.mark.parametrize("error", [UserError("x"), ZeroDivisionError("in a reward")])
def test_an_error_before_the_first_checkpoint_leaves_nothing(tmp_path, error):
    for saved in (False, True):
        open_run(flags(tmp_path / "run"), CPU)
        with pytest.raises(type(error)), nothing_half_written(tmp_path / "run", CPU):
            if saved:
                save_last(tmp_path / "run", make(), [], tokenizer=None, step=1)
            raise error
        assert (tmp_path / "run").exists() == saved


def test_a_loss_that_is_not_finite_keeps_its_curve(tmp_path):
    open_run(flags(tmp_path / "run"), CPU)
    with pytest.raises(NonFiniteLoss), nothing_half_written(tmp_path / "run", CPU):
        raise NonFiniteLoss(1)
    assert (tmp_path / "run" / "flags.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_leave_says_how_to_go_on(tmp_path, capsys, number):
    with Log(tmp_path, total=10, unit="steps") as log, Interrupt() as interrupt:
        assert not interrupt.set
        signal.raise_signal(number)
        assert interrupt.set
        with pytest.raises(SystemExit) as status:
            leave(interrupt, log, 7, tmp_path)
    assert status.value.code == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    said = capsys.readouterr().out
    assert signal.Signals(number).name in said and "step 7" in said
    assert f"{tmp_path}/last" in said and "--resume" in said
