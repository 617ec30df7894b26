"""Makes tests/fixtures with transformers and tokenizers: small models and what they compute.

    make parity

Each folder is as the library saves it, but for what test_hf.py needs older: gpt2 (tied, one file),
gpt2-untied (shards), bert (masked-token head, pooler), bert-2018 (gamma and beta, position_ids, no
head). expected.safetensors has inputs and outputs, tokens.json texts and their ids. Weights are
random and large, so that a wrong transpose or norm shows. Seeds and versions fix every byte.
"""

import json
import shutil
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import BertConfig, BertForMaskedLM, BertModel, GPT2Config, GPT2LMHeadModel

HERE = Path(__file__).parent / "fixtures"
# what breaks tokenizers: case, accents in both forms, CJK, controls, odd spaces, emoji, long words
HOSTILE = [
    "The capital of France is [MASK].", "it's, they'll, we'd, I'M, YOU'RE 'tis",
    "", " ", "  a  b ",
    "naïve café na\u0131ve cafe\u0301 ÅNGSTRÖM \u0130stanbul ΑΣ ΟΔΟΣ. σς ẞ ǅ",
    "tabs\tand\nnew\r\nlines \x0b\x0c",
    "中文,日本語のテキスト、한국어 𠀀㐀豈 ｆｕｌｌｗｉｄｔｈ",
    "\u200bzero\u200dwidth\ufeff \u00adsoft\u2028line\u2029par\u3000wide\u00a0nbsp",
    "\x00\x01\x7f\x80\x9f\ufffd\ufffe",
    "🙂👩‍👩‍👧‍👦🇩🇪 e\u0301\u0327\u0323 ก็ हिन्दी עִבְרִית العَرَبِيَّة",
    "3.14159 1,000,000 ½ ² ⅷ ٣ 10⁻³ $5 €7",
    "a" * 99 + " " + "b" * 100 + " " + "c" * 101, "!!!???...,,,;;;---___***",
    "x=f(y)[0]{1}<2>&|^~`\\/@#%+",
    "<|endoftext|> [CLS] [SEP] [PAD] [UNK] <s>", "“quotes” ‘single’ «g» – — …",
    "unaffable ##able un##able",
    "\ud7ff\ue000\uf8ff\U000e0001\U0010fffd", "    indented\n\n\n   code  \t x", "ﬁ ﬂ Ⅷ ㎏ ℌ ½",
]
TEXTS = [
    "The movie was not as good as the book, but it wasn't bad either. 100% fun!",
    "A man is eating food. The girl is carrying a baby; naïve café owners smile in 2024.",
    "the the the a a of of to and in is it that was for on are with they be at one have this",
    "中文 日本語 한국어 привет мир γειά σου κόσμε 🙂 unaffable reaffirmed walking walked walks",
] * 3


def randomise(model, seed: int):
    """Weights far from their initial ones."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * (0.25 if p.ndim > 1 else 0.5))
    return model.eval()


def byte_level(vocab_size: int, *, special_first: bool) -> tokenizers.Tokenizer:
    """GPT-2's kind; trainers put special tokens first, GPT-2 itself has its one last."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>"] if special_first else []
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=vocab_size - (not special_first), special_tokens=special, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    if not special_first:
        tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def wordpiece() -> tokenizers.Tokenizer:
    """Words, first and last letters of TEXTS: the library's trainer is not deterministic."""
    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words = sorted({word for text in TEXTS for word, _ in
                    splitter.pre_tokenize_str(normalizer.normalize_str(text))})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces += sorted({w[:n] for w in words for n in (1, 2, 3)} | {*words[::2]})
    pieces += sorted({"##" + w[-n:] for w in words for n in (1, 2, 3) if n < len(w)})
    tokenizer = tokenizers.Tokenizer(models.WordPiece(
        {piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def ids(tokenizer, texts) -> list[list[int]]:
    """Special tokens that a text spells are plain text here, as in nanokl."""
    tokenizer.encode_special_tokens = True
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def write_tokens(folder: Path, tokenizer) -> None:
    texts = [t for t in HOSTILE if "[MASK]" not in t] + TEXTS[:4]
    rows = [{"text": t, "ids": i} for t, i in zip(texts, ids(tokenizer, texts), strict=True)]
    (folder / "tokens.json").write_text(json.dumps(rows, indent=0) + "\n")


def make_gpt2(name: str, *, tied: bool) -> None:
    tokenizer = byte_level(320, special_first=not tied)
    config = GPT2Config(vocab_size=320, n_positions=24, n_embd=16, n_layer=2, n_head=4,
                        tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    model, folder = randomise(GPT2LMHeadModel(config), 1), HERE / name
    model.save_pretrained(folder, max_shard_size="40MB" if tied else "20KB")
    if tied:
        tokenizer.model.save(str(folder))  # vocab.json, merges.txt
        vocab = json.loads((folder / "vocab.json").read_text())
        vocab["<|endoftext|>"] = 319
        (folder / "vocab.json").write_text(json.dumps(vocab))
    else:
        tokenizer.save(str(folder / "tokenizer.json"))
    idx = torch.randint(320, (3, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        out = model(idx, output_hidden_states=True)
    save_file({"idx": idx, "h": out.hidden_states[-1].contiguous(), "logits": out.logits},
              folder / "expected.safetensors")
    write_tokens(folder, tokenizer)


def make_bert(name: str, *, old: bool) -> None:
    tokenizer = wordpiece()
    config = BertConfig(vocab_size=tokenizer.get_vocab_size(), hidden_size=16, num_hidden_layers=2,
                        num_attention_heads=4, intermediate_size=64, max_position_embeddings=24)
    torch.manual_seed(0)
    model = randomise((BertModel if old else BertForMaskedLM)(config), 3)
    folder = HERE / name
    model.save_pretrained(folder)
    rng = torch.Generator().manual_seed(4)
    idx = torch.randint(config.vocab_size, (3, 24), generator=rng)
    segment = torch.randint(2, (3, 24), generator=rng)
    mask = torch.arange(24) < torch.tensor([24, 11, 3])[:, None]
    with torch.no_grad():
        out = model(idx, attention_mask=mask.long(), token_type_ids=segment,
                    output_hidden_states=True)
    expected = {"idx": idx, "segment": segment, "mask": mask,
                "h": out.hidden_states[-1].contiguous()}
    if not old:
        expected["logits"] = out.logits
        tokenizer.save(str(folder / "tokenizer.json"))
    save_file(expected, folder / "expected.safetensors")
    if old:  # as the checkpoints of 2018 spell it
        tensors = load_file(folder / "model.safetensors")
        tensors = {"bert." + key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"): x for key, x in tensors.items()}
        tensors["bert.embeddings.position_ids"] = torch.arange(24)[None]
        tensors["cls.seq_relationship.weight"] = torch.zeros(2, 16)
        tensors["cls.seq_relationship.bias"] = torch.zeros(2)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece, _ in vocab))
    write_tokens(folder, tokenizer)


def main() -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    make_gpt2("gpt2", tied=True)
    make_gpt2("gpt2-untied", tied=False)
    make_bert("bert", old=False)
    make_bert("bert-2018", old=True)


if __name__ == "__main__":
    main()
