"""Checkpoints: a folder with config.json, model.safetensors, the tokenizer, and state.pt to go on.

    runs/x/ flags.json metrics.jsonl summary.json    what was asked, the curves, the results
            best/ last/                              checkpoints; last/ has state.pt

A folder is written beside its place and renamed, so a crash at any moment, or a full disk, leaves
the old checkpoint or the new one. GPT-2 and BERT in Hugging Face's layout are read as well (hf.py);
export.py writes it. Left out: pickles, but for state.pt, whose reader takes plain data only.
"""

import contextlib
import dataclasses
import io
import json
import os
import pickle
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from nanokl import UserError, __version__, hf, weights

CONFIG, STATE, FLAGS = "config.json", "state.pt", "flags.json"
TAKEN = (FLAGS, "metrics.jsonl", "summary.json", "meta.json", CONFIG)  # of a run, or of data
PLAIN = (bool, int, float, str, bytes, type(None))  # exact types: np.float64 is a float, not plain


@contextlib.contextmanager
def replacing(folder: Path | str) -> Iterator[Path]:
    """A fresh folder to fill, which takes the place of `folder` if the block ends well.

    After an exception only the old one is left; after a crash leftovers go with the next save:

        folder                  folder.tmp is half written
        folder.old, folder.tmp  between the two renames: readers take folder.old
        folder, folder.old      the new one is in place
    """
    folder = Path(folder)
    # siblings, since a rename is atomic only within one file system
    tmp, old = (folder.with_name(folder.name + suffix) for suffix in (".tmp", ".old"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not folder.exists() and old.exists():  # a crash between the renames: finish going back
        old.rename(folder)
    _remove(tmp, old)
    tmp.mkdir()
    try:
        yield tmp
        _flush(*tmp.iterdir(), tmp)
        if folder.exists():
            folder.rename(old)
        tmp.rename(folder)
        _flush(folder.parent)
    except BaseException as error:
        if not folder.exists() and old.exists():
            old.rename(folder)
        _remove(tmp)
        if isinstance(error, OSError) and error.filename is None:  # a full disk names no file
            error.filename = str(folder)
        raise
    _remove(old)


def _remove(*folders: Path) -> None:
    for folder in folders:
        if folder.exists():
            shutil.rmtree(folder)


def _flush(*paths: Path) -> None:
    """Has the disk take files, or the names in a folder, before anything is renamed over them."""
    for path in paths if os.name == "posix" else ():  # elsewhere a folder cannot be opened
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _present(folder: Path | str) -> Path:
    """`folder`, or `folder.old` after a crash between the two renames of `replacing`."""
    folder = Path(folder)
    old = folder.with_name(folder.name + ".old")
    return old if not folder.exists() and old.exists() else folder


def save(folder, model: nn.Module, *, tokenizer=None, state: dict | None = None) -> None:
    """Writes a checkpoint atomically: weights, config, tokenizer; `state`, plain data, to resume.

    UserError if `folder` holds anything but a checkpoint; OSError for a full disk, when what was
    there before is still there.
    """
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        try:
            read_config(folder, own=True)  # it is deleted as a whole: it had better be ours
        except UserError as error:
            raise UserError(f"{error}; a checkpoint would replace it: choose a new name") from None
    _assert_plain(state)
    with replacing(folder) as tmp:
        (tmp / CONFIG).write_bytes(_json({"nanokl": __version__, "model": type(model).__name__,
                                          "config": dataclasses.asdict(model.config)}))
        if tokenizer is not None:
            tokenizer.save(tmp)
        weights.write(tmp, {name: x.detach().cpu().contiguous()
                            for name, x in weights.tensors(model).items()})
        if state is not None:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            (tmp / STATE).write_bytes(buffer.getbuffer())


def _json(x) -> bytes:
    return (json.dumps(x, indent=1, default=str) + "\n").encode()  # paths as text


def _assert_plain(x, where: str = "state") -> None:
    """Only what torch.load(weights_only=True) takes back: better to know now than on resume."""
    if isinstance(x, (dict, list, tuple)):
        for key, value in x.items() if isinstance(x, dict) else enumerate(x):
            assert type(key) in PLAIN, f"{where} has a key {key!r} of {type(key)}"
            _assert_plain(value, f"{where}[{key!r}]")
    else:
        assert isinstance(x, Tensor) or type(x) in PLAIN, f"{where} is {type(x)}: not plain data"


def read_config(folder: Path | str, *, own: bool = False) -> dict:
    """{"nanokl": version, "model": class name, "config": fields}; UserError if it is not there.

    Of a folder in Hugging Face's layout, unless it must be nanokl's `own`, the fields that the
    class's preset leaves open, and that preset's name as "hf".
    """
    path = _present(folder) / CONFIG
    try:
        config = json.loads(path.read_bytes())
        if not own and "nanokl" not in config and (kind := hf.kind_of(config)):
            model, fields = hf.config_in(config, weights.header(path.parent))
            return {"hf": kind, "model": model, "config": fields}
        if not isinstance(config["model"], str):
            raise TypeError(config["model"])
        return {key: config[key] for key in ("nanokl", "model", "config")}
    except OSError as error:
        raise UserError(f"{folder} is no checkpoint ({CONFIG}: {error.strerror})") from None
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} is damaged or not written by nanokl: use another") from None


def load(folder: Path | str, cls: type[nn.Module], **config_overrides) -> nn.Module:
    """A new `cls` with a checkpoint's weights, float32, on the CPU.

    `config_overrides` replace fields such as dropout. UserError for a folder that is missing,
    damaged or of another class, and for tensors that do not fit.
    """
    saved = read_config(folder)
    if saved["model"] != cls.__name__:
        raise UserError(f"{folder} holds a {saved['model']} but a {cls.__name__} is needed: "
                        f"give the folder of a {cls.__name__}")
    folder, kind = _present(folder), saved.get("hf")
    n_tensors = len(weights.header(folder))
    try:  # somebody else's values may be of any type and size, and fail anywhere
        preset = cls.presets[kind] if kind else {}
        config = cls.Config(**{**preset, **saved["config"], **config_overrides})
        if (n := _modules(dataclasses.asdict(config))) > n_tensors:
            raise UserError(f"it asks for {n} blocks, but there are {n_tensors} tensors")
        with torch.device("meta"):  # sizes without memory: absurd ones are never built
            sketch = cls(config)
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError,
            RuntimeError) as error:
        reason = str(error).split("\n")[0]
        writer = f"nanokl {saved['nanokl']}" if kind is None else "others"
        raise UserError(f"{folder}, written by {writer}, has a config that nanokl {__version__} "
                        f"cannot use ({reason}): use another") from None
    weights.check(folder, sketch, kind)
    model = cls(config)
    weights.load(folder, model, kind)
    return model


def _modules(fields: dict) -> int:
    """How many blocks a config asks for, at least."""
    trunk = fields.get("trunk_config", fields)
    return fields.get("members", 1) * (trunk.get("n_layer", 0) + trunk.get("critic_layers", 0))


def load_weights(folder: Path | str, model: nn.Module) -> None:
    """Copies a checkpoint's tensors into `model`, all or none; UserError if they do not fit."""
    weights.load(_present(folder), model, read_config(folder).get("hf"))


class Pretrained:
    """Checkpoints as methods, for a module that has a `Config` and `presets` of its switches."""

    @classmethod
    def from_pretrained(cls, folder, **overrides):
        """The model in a checkpoint folder; `overrides` replace config fields such as dropout."""
        return load(folder, cls, **overrides)

    def save_pretrained(self, folder) -> None:
        save(folder, self)


def load_state(folder: Path | str) -> dict:
    """What `save` was given as `state`, tensors on the CPU; UserError if missing or damaged."""
    path = _present(folder) / STATE
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError):
        raise UserError(f"{path} is missing, truncated or damaged: there is no resuming") from None


def resolve(path: Path | str, prefer: str = "best") -> Path:
    """The checkpoint that `path` means: itself, or best/ or last/ of a run; UserError if none."""
    path = Path(path)
    tried = [path, path / prefer, path / ("last" if prefer == "best" else "best")]
    for folder in map(_present, tried):
        if (folder / CONFIG).is_file():
            return folder
    problem = "holds no checkpoint" if path.exists() else "does not exist"
    raise UserError(f"{path} {problem}; looked for {CONFIG} in {', '.join(map(str, tried))}")


def open_run(out: Path | str, flags: dict, *, resume: bool, frozen: Iterable[str],
             is_main: bool = True) -> bool:
    """Claims folder `out` for a run with these flags, and says whether it goes on with an old one.

    UserError if `out` holds another run, or none to resume, or if a flag in `frozen` has changed.
    """
    if not is_main:  # of many processes one looks and writes
        return resume
    out, path = Path(out), Path(out) / FLAGS
    if out.is_file():
        raise UserError(f"--out {out} is a file: choose a folder")
    flags = json.loads(_json(flags))  # as they will be read back
    # Every check comes before the first write: a refused run leaves no trace.
    if resume:
        if not (_present(out / "last") / STATE).is_file():
            raise UserError(f"nothing to resume in {out}: there is no {out / 'last' / STATE}; "
                            "start it without --resume, in a new --out")
        try:
            before = json.loads(path.read_bytes())
            kept = before.keys() & frozen  # a flag newer than the run has no old value
        except (OSError, ValueError, AttributeError):
            raise UserError(f"{path} is missing or damaged: the run cannot be resumed") from None
        for name in sorted(kept):
            if before[name] != flags.get(name):
                raise UserError(f"--{name} was {before[name]!r} and is now {flags.get(name)!r}: a "
                                "resumed run keeps it; give the old value or a new --out")
    elif out.resolve() == Path.cwd():
        raise UserError(f"--out {out} is the folder you are in: name a new one, such as runs/mine")
    elif taken := [name for name in TAKEN if (out / name).exists()]:
        raise UserError(f"{out} holds another run or data ({taken[0]}): go on with --resume if it "
                        "has a checkpoint in last/, choose another --out, or delete it")
    out.mkdir(parents=True, exist_ok=True)
    tmp = out / f"{FLAGS}.tmp"
    tmp.write_bytes(_json(flags))
    tmp.replace(path)
    return resume
