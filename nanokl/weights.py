"""The tensors of a model's folder: model.safetensors, or its shards, ours or Hugging Face's.

What others have written is looked at before anything is built: the library checks the header
against the file, and names, shapes and kinds of numbers are held against the model's. nanokl's own
files have the hashes of the small files beside them in their header, so that a changed config or
vocabulary is noticed. Left out: pickles, which could run anything, and integer weights.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from nanokl import UserError, hf

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"  # which file of several has which tensor
FLOATS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
CODES = {**FLOATS, torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL"}


class Entry(NamedTuple):
    """What a header says of a tensor."""

    shape: tuple[int, ...]
    dtype: str  # F32, BF16, ...


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, a tied weight once, under its first name."""
    names: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    return {name: x for name, x in state.items() if names.setdefault(id(x), name) == name}


def write(folder: Path, values: Mapping[str, Tensor]) -> None:
    """model.safetensors, with the hashes of config and vocabulary that lie in `folder` already."""
    hashes = {path.name: _hash(path) for path in sorted(folder.iterdir())
              if path.suffix in (".json", ".txt")}
    # Through bytes: the library's own writer turns a full disk into errors of its own, and orders
    # metadata by chance, so that the same weights would not be the same file.
    data = memoryview(safetensors.torch.save(dict(values), {"format": "pt"}))
    end = 8 + int.from_bytes(data[:8], "little")
    head = json.loads(bytes(data[8:end]))
    head["__metadata__"]["sha256"] = json.dumps(hashes)
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    (folder / WEIGHTS).write_bytes(b"".join((len(text).to_bytes(8, "little"), text, data[end:])))


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files(folder: Path) -> list[Path]:
    """model.safetensors, or the files that its index names; UserError without either."""
    whole, index = folder / WEIGHTS, folder / INDEX
    if whole.is_file() or not index.is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        if pickles and not whole.is_file():
            raise UserError(f"{folder} has {pickles[0]}, a pickle, which can run any code, and no "
                            f"{WEIGHTS}: convert it with the library that wrote it")
        return [whole]
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
        "".join(names).encode()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{index} is damaged: use another") from None
    if outside or not names:
        raise UserError(f"{index} names {outside[:1] or 'no files'}: it may name files beside it")
    return [folder / name for name in names]


def _open(folder: Path) -> Iterator:
    """The weights' files, one after the other; UserError for what the library refuses."""
    for path in files(folder):
        try:
            with safetensors.safe_open(path, "pt") as file:
                yield path, file
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{path} is missing, truncated or damaged ({error}): use another"
                            ) from None


def header(folder: Path) -> dict[str, Entry]:
    """What the files hold, by name; UserError for damage, and for a neighbour of another hash."""
    found: dict[str, Entry] = {}
    for path, file in _open(folder):
        try:
            hashes = json.loads((file.metadata() or {}).get("sha256", "{}"))
            changed = [name for name, value in hashes.items() if Path(name).name == name
                       and (folder / name).is_file() and _hash(folder / name) != value]
        except (OSError, ValueError, AttributeError, TypeError, RecursionError):
            raise UserError(f"{path} has a damaged header: use another") from None
        if changed:
            raise UserError(f"{folder / changed[0]} is not as it was written with {path.name}: use "
                            "another folder")
        for name in file.keys():  # noqa: SIM118
            if name in found:
                raise UserError(f"{path} holds {name}, which another file holds as well: use "
                                "another folder")
            part = file.get_slice(name)
            found[name] = Entry(tuple(part.get_shape()), part.get_dtype())
    return found


def check(folder: Path, model: nn.Module, kind: str | None) -> None:
    """UserError where the files of `folder`, in layout `kind` (None: ours), do not fit the model.

    The model may be on the device meta, which has sizes and no memory.
    """
    found = header(folder)
    wanted = {name: Entry(tuple(x.shape), CODES[x.dtype]) for name, x in tensors(model).items()}
    if kind:
        layout = hf.parts(kind, {name: entry.shape for name, entry in wanted.items()})
        wanted = {name: Entry(part.shape, "F32") for name, part in layout.items()}
        with _told(folder):
            found = {name: found[raw] for raw, name in hf.canonical(kind, found, layout).items()}
    for name, entry in found.items():  # any floating point will do for another
        if entry.dtype in FLOATS.values() and wanted.get(name, entry).dtype in FLOATS.values():
            found[name] = entry._replace(dtype="F32")
    if wrong := sorted({name for name, _ in wanted.items() ^ found.items()}):
        shape, needed = ("absent" if entry is None else f"{entry.shape} {entry.dtype}"
                         for entry in (found.get(wrong[0]), wanted.get(wrong[0])))
        raise UserError(f"{files(folder)[0]} does not fit this {type(model).__name__} "
                        f"({len(wrong)} tensors differ): {wrong[0]} is {shape}, not {needed}; use "
                        "its own checkpoint")


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Has a UserError name the file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{files(folder)[0]} cannot be used: {error}") from None


def load(folder: Path, model: nn.Module, kind: str | None) -> None:
    """Copies the tensors of `folder` into the model, all or none; UserError if they do not fit."""
    check(folder, model, kind)
    values = {}
    for path, file in _open(folder):
        for name in file.keys():  # noqa: SIM118
            if not kind or not hf.idle(kind, name):
                try:
                    values[name] = file.get_tensor(name)
                except safetensors.SafetensorError as error:  # a kind of number torch has not
                    raise UserError(f"{path} cannot be used: {name}: {error}") from None
    if kind:
        with _told(folder):
            shapes = {name: tuple(x.shape) for name, x in tensors(model).items()}
            values = hf.tensors_in(kind, values, shapes)
    model.load_state_dict(values, strict=False)  # a tied weight is saved under one of its names
