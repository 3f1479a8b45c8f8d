"""Small texts and a tiny run that the training tests share."""

import random

import pytest
import yaml


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """30 files of pseudo-words, each of 50 to 200 bytes."""
    folder = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    for i in range(30):
        words = ("".join(draw.choices("abcde", k=draw.randint(1, 6))) for _ in range(draw.randint(14, 44)))
        (folder / f"{i:02d}.txt").write_text(" ".join(words) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def config(tmp_path, texts):
    """A configuration file of a run that takes about a second."""
    blocks = [{"pattern": [{"mixer": {"name": "LinearAttention", "n_heads": 2}, "ffn": {"name": "SwiGLU"}}]}]
    values = {
        "model": {"lm": {"d_model": 16, "vocab_size": 256, "blocks": blocks}, "lr": 0.01, "warmup_steps": 3},
        "data": {
            "files": str(texts / "*.txt"),
            "val_fraction": 0.2,
            "context": 48,
            "batch_tokens": 192,
            "cache": str(tmp_path / "cache"),
        },
        "trainer": {"max_steps": 12, "accelerator": "cpu", "log_every_n_steps": 1, "val_check_interval": 5},
        "run": str(tmp_path / "run"),
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def word_tokenizer(tmp_path_factory):
    """The folder of a Hugging Face tokenizer of whole words, with an end-of-text token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<eos>": 1, "one": 2, "two": 3, "three": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>").save_pretrained(
        str(folder)
    )
    return folder
