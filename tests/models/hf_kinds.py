"""Small Hugging Face tokenizers of every kind, made here."""

import keyword
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from subquad.models.tokenizer import HFTokenizer

TEXTS = [
    *(f"def {word}(self): return '{word}'  # {word}s of it, isn't it." for word in keyword.kwlist),
    "I like 😀 and 👩‍👩‍👧. Größe, naïve café; 北京 東京 Привет мир, שלום, नमस्ते ▁ \ufffd\n",
]
SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level() -> Tokenizer:
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False))
    t.add_special_tokens(["<|endoftext|>"])
    t.add_tokens(["北京!", "<think>"])
    return t


def byte_fallback() -> Tokenizer:
    """As Llama 2's: words with ▁ and a token a byte for what is in no word."""
    letters = sorted({c for c in "".join(TEXTS) if c.isascii() and c.isprintable() and c != " "} | {"▁"})
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    words = ["▁r", "▁re", "▁ret", "▁l", "el", "sel"]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *bytes_, *letters, *words])}
    merges = [("▁", "r"), ("▁r", "e"), ("▁re", "t"), ("▁", "l"), ("e", "l"), ("s", "el")]
    t = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    t.decoder = decoders.Sequence(steps)
    t.add_special_tokens(SPECIAL)
    return t


def metaspace() -> Tokenizer:
    t = Tokenizer(models.Unigram())
    t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    kind = trainers.UnigramTrainer(vocab_size=250, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    t.train_from_iterator(TEXTS, kind)
    return t


def unigram() -> Tokenizer:
    t = metaspace()
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return t


def word_piece() -> Tokenizer:
    t = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    t.pre_tokenizer, t.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(prefix="##", cleanup=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    kind = trainers.WordPieceTrainer(vocab_size=250, special_tokens=special, show_progress=False)
    t.train_from_iterator(TEXTS, kind)
    return t


def end_of_word() -> Tokenizer:
    t = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    t.pre_tokenizer, t.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder(suffix="</w>")
    kind = trainers.BpeTrainer(vocab_size=250, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False)
    t.train_from_iterator(TEXTS, kind)
    return t


def characters() -> Tokenizer:
    letters = sorted(set("".join(TEXTS)))
    t = Tokenizer(models.BPE({c: i for i, c in enumerate(["<unk>", *letters])}, [], unk_token="<unk>"))
    t.decoder = decoders.Fuse()
    return t


def gaps() -> Tokenizer:
    """Ids with gaps: 4 tokens, the last of them 90."""
    t = Tokenizer(models.WordLevel({"<unk>": 0, "one": 7, "two": 50}, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    t.model = models.WordLevel({"<unk>": 0, "one": 7, "two": 50, "three": 90}, unk_token="<unk>")
    t.add_special_tokens([AddedToken("</s>", special=True)])
    return t


KINDS: dict[str, Callable[[], Tokenizer]] = {
    f.__name__: f for f in (byte_level, byte_fallback, metaspace, unigram, word_piece, end_of_word, characters, gaps)
}


@cache
def tokenizer(kind: str, special_tokens: bool = False) -> HFTokenizer:
    with TemporaryDirectory() as folder:
        path = Path(folder, "tokenizer.json")
        KINDS[kind]().save(str(path))
        return HFTokenizer(path, special_tokens=special_tokens)
