"""checkpoint.py: exact round trips, a crash at every file operation, full disks, damaged files."""

import builtins
import dataclasses
import errno
import hashlib
import io
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from nanokl import UserError, checkpoint
from nanokl.optim import make_optimizers


@dataclass
class NetConfig:
    width: int = 6
    vocab: int = 9
    dropout: float = 0.0


class Net(nn.Module):
    """A tied weight, a buffer that is saved, one that is not, dropout."""

    Config = NetConfig

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList([nn.Linear(config.width, config.width)])
        self.drop = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        self.head.weight = self.wte.weight
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("table", torch.zeros(3), persistent=False)

    def forward(self, idx):
        return self.head(self.drop(self.blocks[0](self.wte(idx)).tanh())) * self.gain


class Other(Net):
    pass


class Words:
    """Stands for a tokenizer: anything that saves a file in a folder."""

    def save(self, folder):
        (Path(folder) / "tokenizer.nanokl.json").write_text("words")


def net(fill=None, **config):
    torch.manual_seed(0)
    model = Net(NetConfig(**config))
    if fill is not None:
        with torch.no_grad():
            model.gain.fill_(fill)
    return model


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------- round trips


def test_round_trip_is_bit_for_bit(tmp_path):
    model = net(0.25, dropout=0.5)
    checkpoint.save(tmp_path / "a" / "b", model, tokenizer=Words(), state={"step": 3})
    assert same(checkpoint.load(tmp_path / "a" / "b", Net), model)
    loaded = checkpoint.load(str(tmp_path / "a" / "b"), Net, dropout=0.125)
    assert same(loaded, model) and loaded.config == NetConfig(dropout=0.125)
    assert loaded.head.weight is loaded.wte.weight
    assert checkpoint.load_state(tmp_path / "a" / "b") == {"step": 3}
    assert {p.name for p in (tmp_path / "a" / "b").iterdir()} == {
        "config.json", "model.safetensors", "state.pt", "tokenizer.nanokl.json"}
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]


def test_files_are_what_other_tools_read(tmp_path):
    model = net(2.0)
    checkpoint.save(tmp_path / "m", model)
    with safetensors.safe_open(tmp_path / "m" / "model.safetensors", "np") as file:
        assert file.metadata()["format"] == "pt"
        hashes = json.loads(file.metadata()["sha256"])
    config = (tmp_path / "m" / "config.json").read_bytes()
    assert hashes == {"config.json": hashlib.sha256(config).hexdigest()}
    with safetensors.safe_open(tmp_path / "m" / "model.safetensors", "np") as file:
        assert set(file.keys()) == {"wte.weight", "blocks.0.weight", "blocks.0.bias", "gain"}
        assert np.array_equal(file.get_tensor("wte.weight"), model.wte.weight.detach().numpy())
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["model"] == "Net" and config["config"] == dataclasses.asdict(model.config)
    assert checkpoint.read_config(tmp_path / "m") == config


def test_a_save_replaces_the_whole_folder(tmp_path):
    checkpoint.save(tmp_path / "m", net(1.0), tokenizer=Words(), state={"step": 1})
    checkpoint.save(tmp_path / "m", net(2.0))
    assert checkpoint.load(tmp_path / "m", Net).gain == 2
    assert {p.name for p in (tmp_path / "m").iterdir()} == {"config.json", "model.safetensors"}


def train(model, optimizers, steps):
    for step in steps:
        idx = torch.randint(9, (8,), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(idx), (idx + 1) % 9).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def optimizers_of(model):
    return make_optimizers(model, lr=0.01, muon_lr=0.01, weight_decay=0.1, betas=(0.9, 0.99))


def test_resume_equals_the_uninterrupted_run_bit_for_bit(tmp_path):
    model = net(dropout=0.3)
    optimizers = optimizers_of(model)
    train(model, optimizers, range(4))
    states = [o.state_dict() for o in optimizers]
    state = {"step": 4, "rng": torch.get_rng_state(), "optimizers": states}
    checkpoint.save(tmp_path / "last", model, state=state)
    train(model, optimizers, range(4, 8))

    resumed = net(dropout=0.3)
    checkpoint.load_weights(tmp_path / "last", resumed)
    state = checkpoint.load_state(tmp_path / "last")
    again = optimizers_of(resumed)
    for optimizer, saved in zip(again, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    torch.set_rng_state(state["rng"])
    train(resumed, again, range(state["step"], 8))
    assert same(resumed, model)
    for a, b in zip(again, optimizers, strict=True):
        assert repr(a.state_dict()) == repr(b.state_dict())


def test_state_holds_nested_plain_data(tmp_path):
    state = {"a": [1, 2.5, None, True, "x", b"y", (1, (2,))], 3: {"t": torch.arange(4.0)},
             "rng": torch.Generator().manual_seed(1).get_state(), "inf": float("inf")}
    checkpoint.save(tmp_path / "m", net(), state=state)
    loaded = checkpoint.load_state(tmp_path / "m")
    assert repr(loaded) == repr(state)
    assert torch.equal(loaded["rng"], state["rng"])


@pytest.mark.parametrize("bad", [np.float64(1), np.arange(2), Path("x"), {1, 2}, NetConfig()])
def test_state_that_could_not_be_read_back_is_refused(tmp_path, bad):
    with pytest.raises(AssertionError, match=r"state\['a'\]\[1\]"):
        checkpoint.save(tmp_path / "m", net(), state={"a": [0, bad]})
    assert not any(tmp_path.iterdir())


# ----------------------------------------------------------------------- crashes, full disks


def test_an_exception_leaves_the_old_folder_and_nothing_else(tmp_path):
    checkpoint.save(tmp_path / "m", net(1.0))
    with pytest.raises(KeyboardInterrupt), checkpoint.replacing(tmp_path / "m") as tmp:
        (tmp / "half").write_text("x")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert checkpoint.load(tmp_path / "m", Net).gain == 1


@pytest.mark.parametrize("failing", ["last", "last.tmp"])
def test_a_rename_that_fails_brings_the_old_folder_back(tmp_path, monkeypatch, failing):
    checkpoint.save(tmp_path / "last", net(1.0))
    rename = Path.rename

    def fail(self, target):
        if self.name == failing:
            raise PermissionError(errno.EACCES, "in use", str(self))
        return rename(self, target)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(PermissionError):
        checkpoint.save(tmp_path / "last", net(2.0))
    assert [p.name for p in tmp_path.iterdir()] == ["last"]
    assert checkpoint.load(tmp_path / "last", Net).gain == 1


def die_at(n, work):
    """Runs `work` in a child that dies, without any cleaning up, before its n-th change of the file
    system; True if it died."""
    changes = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
    child = os.fork()
    if child == 0:
        seen = 0

        def hook(event, args):
            nonlocal seen
            if event in changes and not (event == "open" and args[1] in ("r", "rb", None)):
                seen += 1
                if seen == n:
                    os._exit(9)
        sys.addaudithook(hook)
        try:
            work()
        finally:
            os._exit(0 if seen < n else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_crash_at_any_moment_leaves_the_old_or_the_new(tmp_path):
    folder, seen = tmp_path / "run" / "last", []
    for n in range(1, 100):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        checkpoint.save(folder, net(1.0), state={"step": 1})
        died = die_at(n, lambda: checkpoint.save(folder, net(2.0), state={"step": 2}))
        found = checkpoint.resolve(tmp_path / "run", prefer="last")
        gain = checkpoint.load(found, Net).gain.item()
        assert checkpoint.load(folder, Net).gain == gain
        assert checkpoint.load_state(folder) == {"step": gain}
        between = not folder.exists()
        seen.append((gain, between))
        # The next save, and a crash in that one too, are none the worse.
        die_at(n, lambda: checkpoint.save(folder, net(3.0), state={"step": 3}))
        assert checkpoint.load(folder, Net).gain.item() in (gain, 3)
        checkpoint.save(folder, net(4.0), state={"step": 4})
        assert checkpoint.load(folder, Net).gain == 4
        assert [p.name for p in (tmp_path / "run").iterdir()] == ["last"]
        if not died:
            break
    assert not died and n > 8  # it did die at each of the steps before
    assert seen[0] == (1, False) and seen[-1] == (2, False) and (1, True) in seen
    assert seen == sorted(seen, key=lambda x: x[0])


class FullDisk(io.FileIO):
    """A file on a disk with `room` bytes left for all of its kind."""

    room = 0

    def write(self, data):
        data = memoryview(data).cast("B")
        if len(data) > FullDisk.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        FullDisk.room -= len(data)
        return super().write(data)


def full_disk(monkeypatch, room):
    def open_(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, **kw):
        if "w" not in mode:
            return real(file, mode, buffering, encoding, errors, newline, **kw)
        raw = FullDisk(file, "w")
        return raw if "b" in mode else io.TextIOWrapper(raw, encoding, write_through=True)
    real = builtins.open
    monkeypatch.setattr(FullDisk, "room", room)
    monkeypatch.setattr(builtins, "open", open_)
    monkeypatch.setattr(io, "open", open_)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, share):
    folder, state = tmp_path / "last", {"step": 1, "moments": torch.zeros(1000)}
    checkpoint.save(folder, net(1.0), tokenizer=Words(), state=state)
    size = sum(p.stat().st_size for p in folder.iterdir())
    with monkeypatch.context() as m:
        full_disk(m, int(share * size))
        with pytest.raises(OSError) as error:
            checkpoint.save(folder, net(2.0), tokenizer=Words(), state=state)
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["last"]
    assert checkpoint.load(folder, Net).gain == 1 and checkpoint.load_state(folder)["step"] == 1
    with monkeypatch.context() as m:  # and with room enough it works
        full_disk(m, size + 100)
        checkpoint.save(folder, net(3.0), tokenizer=Words(), state=state)
    assert checkpoint.load(folder, Net).gain == 3


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    with pytest.raises(UserError, match="photos is no checkpoint.*choose a new name"):
        checkpoint.save(tmp_path / "photos", net())
    with pytest.raises(UserError, match=r"cat.jpg is no checkpoint.*Not a directory.*new name"):
        checkpoint.save(tmp_path / "photos" / "cat.jpg", net())
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "meow"
    (tmp_path / "empty").mkdir()
    checkpoint.save(tmp_path / "empty", net())


# ----------------------------------------------------------------------------- damaged files


def edit_config(*, hashed=False, **change):
    """Another config, and weights that have no hash of the old one unless `hashed`."""
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        if not hashed:
            edit_tensors(lambda t: None)(folder)
    return damage


def edit_tensors(change):
    def damage(folder):
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        change(tensors)
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
    return damage


def overwrite(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def truncate(name, share):
    def damage(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(share * len(data))])
    return damage


CONFIG = {"width": 6, "vocab": 9, "dropout": 0.0}
DAMAGE = {
    "no folder": (shutil.rmtree, "is no checkpoint .config.json: No such"),
    "no config": (lambda f: (f / "config.json").unlink(), "is no checkpoint .config.json: No such"),
    "empty config": (overwrite("config.json", b""), "damaged or not"),
    "binary config": (overwrite("config.json", b"\xff\xfe\x00"), "damaged or not"),
    "config is a list": (overwrite("config.json", b"[]"), "not written by nanokl"),
    "config of others": (overwrite("config.json", b'{"n_layer": 2}'), "not written by nanokl"),
    "edited": (edit_config(hashed=True, config={**CONFIG, "dropout": 0.1}),
               "config.json is not as it was written with model.safetensors"),
    "other class": (edit_config(model="Other"), "holds a Other but a Net is needed"),
    "unknown field": (edit_config(config={**CONFIG, "depth": 3}), "cannot use.*'depth'"),
    "wrong type": (edit_config(config={**CONFIG, "width": "six"}), "config.* cannot use"),
    "other width": (edit_config(config={**CONFIG, "width": 7}), r"3 tensors .* \(6,\) .*not \(7"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "empty weights": (overwrite("model.safetensors", b""), "truncated or damaged"),
    "garbage weights": (overwrite("model.safetensors", b"\x80" * 999), "truncated or damaged"),
    "cut header": (truncate("model.safetensors", 0.1), "truncated or damaged"),
    "cut tensors": (truncate("model.safetensors", 0.9), "truncated or damaged"),
    "one byte less": (truncate("model.safetensors", 0.9999), "truncated or damaged"),
    "missing tensor": (edit_tensors(lambda t: t.pop("gain")), "1 tensors .*: gain is absent"),
    "extra tensor": (edit_tensors(lambda t: t.update(x=torch.ones(1))), "1 tensors .*not absent"),
    "other shape": (edit_tensors(lambda t: t.update({"blocks.0.bias": torch.ones(5)})),
                    r"not fit this Net .* blocks.0.bias is \(5,\) F32, not \(6,\) F32"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_one_line(tmp_path, case):
    damage, says = DAMAGE[case]
    checkpoint.save(tmp_path / "m", net())
    damage(tmp_path / "m")
    with pytest.raises(UserError, match=says) as error:
        checkpoint.load(tmp_path / "m", Net)
    assert "\n" not in str(error.value) and str(tmp_path / "m") in str(error.value)


def test_weights_that_do_not_fit_change_nothing(tmp_path):
    checkpoint.save(tmp_path / "m", net(5.0))
    edit_tensors(lambda t: t.update({"blocks.0.bias": torch.ones(5)}))(tmp_path / "m")
    model = net(1.0)
    with pytest.raises(UserError):
        checkpoint.load_weights(tmp_path / "m", model)
    assert same(model, net(1.0))


@pytest.mark.parametrize("damage, says", [
    (lambda f: (f / "state.pt").unlink(), "state.pt is missing"),
    (overwrite("state.pt", b""), "truncated or damaged"),
    (overwrite("state.pt", b"garbage" * 99), "truncated or damaged"),
    (truncate("state.pt", 0.5), "truncated or damaged"),
    (lambda f: torch.save(Path("x"), f / "state.pt"), "truncated or damaged"),  # a real pickle
])
def test_a_damaged_state_is_one_line(tmp_path, damage, says):
    checkpoint.save(tmp_path / "m", net(), state={"x": torch.zeros(100)})
    damage(tmp_path / "m")
    with pytest.raises(UserError, match=says) as error:
        checkpoint.load_state(tmp_path / "m")
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------- run folders


def test_resolve(tmp_path):
    run = tmp_path / "run"
    checkpoint.save(run / "last", net())
    assert checkpoint.resolve(run) == checkpoint.resolve(run, "last") == run / "last"
    checkpoint.save(run / "best", net())
    assert checkpoint.resolve(str(run)) == run / "best"
    assert checkpoint.resolve(run, prefer="last") == run / "last"
    assert checkpoint.resolve(run / "last") == run / "last"
    (run / "last").rename(run / "last.old")  # as a crash between the two renames leaves it
    assert checkpoint.resolve(run, prefer="last") == run / "last.old"


def test_resolve_says_what_it_looked_for(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist; looked for config.json in .*best"):
        checkpoint.resolve(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no checkpoint.*best.*last"):
        checkpoint.resolve(tmp_path)


def claim(out, resume=False, **flags):
    flags = {"lr": 0.1, "data": Path("data/x"), "n_layer": 2, **flags}
    return checkpoint.open_run(out, flags, resume=resume, frozen=("n_layer", "data"))


def test_open_run_claims_a_new_folder(tmp_path):
    assert claim(tmp_path / "a" / "run") is False
    assert json.loads((tmp_path / "a" / "run" / "flags.json").read_text()) == {
        "lr": 0.1, "data": str(Path("data/x")), "n_layer": 2}
    assert [p.name for p in (tmp_path / "a" / "run").iterdir()] == ["flags.json"]


@pytest.mark.parametrize("name", ["flags.json", "metrics.jsonl", "summary.json", "meta.json",
                                  "config.json"])
def test_open_run_refuses_a_folder_of_another_run(tmp_path, name):
    (tmp_path / name).write_text("old")
    with pytest.raises(UserError, match="holds another run.*--resume.*another --out"):
        claim(tmp_path)
    assert (tmp_path / name).read_text() == "old"


def test_open_run_refuses_the_folder_that_one_is_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out in ("", ".", tmp_path):
        with pytest.raises(UserError, match="the folder you are in: name a new one"):
            claim(out)
    assert not list(tmp_path.iterdir())


def test_open_run_refuses_a_file(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(UserError, match="f is a file: choose a folder"):
        claim(tmp_path / "f")


def test_open_run_resumes_with_the_same_frozen_flags(tmp_path):
    claim(tmp_path)
    checkpoint.save(tmp_path / "last", net(), state={"step": 1})
    assert claim(tmp_path, resume=True, lr=0.2) is True
    assert json.loads((tmp_path / "flags.json").read_text())["lr"] == 0.2
    with pytest.raises(UserError, match="--n_layer was 2 and is now 3: a resumed run keeps it"):
        claim(tmp_path, resume=True, n_layer=3)
    with pytest.raises(UserError, match="--data was 'data.x' and is now 'y'"):
        claim(tmp_path, resume=True, data=Path("y"))
    assert json.loads((tmp_path / "flags.json").read_text())["n_layer"] == 2
    (tmp_path / "last").rename(tmp_path / "last.old")
    assert claim(tmp_path, resume=True) is True
    for text in ("{", "3", "[]"):
        (tmp_path / "flags.json").write_text(text)
        with pytest.raises(UserError, match="damaged"):
            claim(tmp_path, resume=True)


def test_open_run_has_nothing_to_resume(tmp_path):
    with pytest.raises(UserError, match="nothing to resume in .*new"):
        claim(tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()
    checkpoint.save(tmp_path / "last", net())  # weights alone are not enough
    with pytest.raises(UserError, match="nothing to resume"):
        claim(tmp_path, resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_open_run_on_other_ranks_neither_looks_nor_writes(tmp_path, resume):
    out = tmp_path / "new"
    options = {"resume": resume, "frozen": (), "is_main": False}
    assert checkpoint.open_run(out, {}, **options) is resume
    assert not out.exists()
