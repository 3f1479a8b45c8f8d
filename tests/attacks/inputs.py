"""The kinds of input that are attacked, and the valid files that attacks begin from."""

import inspect
import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from attacks import Kind, command
from mutations import mutated_bytes, mutated_value, mutated_words, odd, written

from subquad.layers import available
from subquad.models import checkpoint
from subquad.models.lm import LM
from subquad.models.tokenizer import load_tokenizer
from subquad.train import corpus

SMALL = {
    "d_model": 8,
    "blocks": [
        {
            "pattern": [
                {"mixer": {"name": "Attention", "n_heads": 2}, "ffn": {"name": "SwiGLU", "expand": 1.0}},
                {"mixer": {"name": "LinearAttention", "n_heads": 2}},
            ]
        }
    ],
}
Use = Callable[[], Any]


TRAINING = ("training checkpoint", "config.yaml of a run", "command line of train")


def kinds(folder: Path, names: list[str] | None) -> dict[str, Kind]:
    """The kinds of these names, by default all; makes the valid files and uses each once."""
    folder.mkdir()
    torch.manual_seed(0)
    model, text = folder / "model", folder / "text"
    checkpoint.save(LM.from_config(SMALL), model)
    text.write_text("one two three\n" * 20)
    make_tokenizers(folder)
    here = os.getcwd()
    os.chdir(folder)
    infer = ["infer", "--model", str(model), "--prompt", "one two", "--max-new-tokens", "3"]
    assert command([*infer, "--save-state", "state"]) is None
    found = {
        "configuration as a dict": Kind(config_dict, 5),
        "configuration in YAML": Kind(config_file("yaml"), 4),
        "configuration in JSON": Kind(config_file("json"), 2),
        "config.json of a model": Kind(model_config(model), 1.5),
        "weights": Kind(weights(model), 3),
        "weights with a flipped bit": Kind(flipped_bit(model), 0.5),
        "state": Kind(state(model, folder / "state"), 2.5),
        "token cache": Kind(token_cache(folder), 1.5),
        "tokenizer": Kind(tokenizer(folder), 1),
        "command line": Kind(command_line(folder), 1.5),
    }
    if names is None or set(names) & set(TRAINING):  # Lightning and a run take seconds
        fit = training(folder)
        assert command(fit) is None
        assert command(["train", "validate", "--run", "run"]) is None
        found["training checkpoint"] = Kind(training_checkpoint(folder), 0.5)
        found["config.yaml of a run"] = Kind(run_config(folder), 0.15)
        found["command line of train"] = Kind(train_command_line(fit), 0.15)
    os.chdir(here)
    return found if names is None else {name: found[name] for name in names}


# Configurations


def layer_configs() -> list[dict[str, Any]]:
    """One small model of each layer, its arguments with their defaults written out."""
    made = [SMALL]
    for name, layer in available().items():
        arguments = {
            parameter.name: list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
            for parameter in inspect.signature(layer.__init__).parameters.values()
            if isinstance(parameter.default, int | float | str | tuple | bool)
            and parameter.name != "layer_idx"
            and parameter.name != "n_layers"
        }
        part = "mixer" if layer.kind == "mixer" else "ffn"
        block = {part: {"name": name, **arguments}}
        made.append({"d_model": 32, "vocab_size": 64, "blocks": [{"repeat": 1, "pattern": [block]}]})
    whole = {"tie_embeddings": False, "norm": "layer", "norm_eps": 1e-5, "logit_softcap": 30.0, "init_std": 0.02}
    return [*made, SMALL | whole, SMALL | {"embedding_norm": True, "vocab_size": 128}]


def used(model: LM) -> None:
    """A forward pass, and one more token with a state where the model has one."""
    tokens = torch.arange(5)[None] % model.config.vocab_size
    with torch.no_grad():
        model(tokens)
        if all(hasattr(p, "init_state") for b in model.blocks for p in (b.mixer, b.ffn) if p is not None):
            _, state = model(tokens, model.init_state(1, 8))
            model(tokens[:, :1], state)


def config_dict(draw: random.Random) -> Use:
    value = mutated_value(draw.choice(layer_configs()), draw)
    return lambda: used(LM.from_config(value))


def config_file(suffix: str) -> Callable[[random.Random], Use]:
    def make(draw: random.Random) -> Use:
        configs = layer_configs()
        value = draw.choice(configs)
        if draw.random() < 0.3:
            value = {"model": {"lm": value}, "trainer": {"max_steps": 3}}
        if draw.random() < 0.7:
            data = written(mutated_value(value, draw), draw, suffix)
        else:
            data, other = (written(v, draw, suffix) for v in (value, draw.choice(configs)))
            data = mutated_bytes(data, other, draw)
        path = Path(f"config.{suffix}")
        path.write_bytes(data)
        return lambda: used(LM.from_config(path))

    return make


def copied(folder: Path) -> Path:
    """A copy of a valid folder in the current one."""
    return Path(shutil.copytree(folder, folder.name))


def model_config(model: Path) -> Callable[[random.Random], Use]:
    valid = (model / "config.json").read_bytes()

    def make(draw: random.Random) -> Use:
        here = copied(model)
        if draw.random() < 0.6:
            data = written(mutated_value(json.loads(valid), draw), draw, "json")
        else:
            data = mutated_bytes(valid, valid, draw)
        (here / "config.json").write_bytes(data)
        return lambda: used(checkpoint.load(here))

    return make


# What commands write


def header_changed(data: bytes, draw: random.Random) -> bytes:
    """A safetensors file whose header is another, its lengths right or not."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    text = written(mutated_value(header, draw), draw, "json")
    claimed = len(text) if draw.random() < 0.9 else draw.choice([0, 2**63, length, len(text) + 100, 10**8])
    return struct.pack("<Q", claimed) + text + data[8 + length :]


def damaged(valid: bytes, draw: random.Random) -> bytes:
    return header_changed(valid, draw) if draw.random() < 0.4 else mutated_bytes(valid, valid[::-1], draw)


def weights(model: Path) -> Callable[[random.Random], Use]:
    valid = (model / checkpoint.WEIGHTS).read_bytes()

    def make(draw: random.Random) -> Use:
        here = copied(model)
        (here / checkpoint.WEIGHTS).write_bytes(damaged(valid, draw))
        return lambda: used(checkpoint.load(here))

    return make


def flipped_bit(model: Path) -> Callable[[random.Random], Use]:
    """One bit of one weight, which nothing but a checksum notices."""
    valid = (model / checkpoint.WEIGHTS).read_bytes()
    begin = 8 + struct.unpack("<Q", valid[:8])[0]

    def make(draw: random.Random) -> Use:
        here, data = copied(model), bytearray(valid)
        data[draw.randrange(begin, len(data))] ^= 1 << draw.randrange(8)
        (here / checkpoint.WEIGHTS).write_bytes(data)

        def use() -> None:
            checkpoint.load(here)
            raise AssertionError("a flipped bit was not noticed")

        return use

    return make


def state(model: Path, path: Path) -> Callable[[random.Random], Use]:
    valid = path.read_bytes()

    def make(draw: random.Random) -> Use:
        Path("state").write_bytes(damaged(valid, draw))
        return lambda: command(["infer", "--model", str(model), "--load-state", "state", "--max-new-tokens", "2"])

    return make


def token_cache(folder: Path) -> Callable[[random.Random], Use]:
    documents = [corpus.Document(f, 0, f.size) for f in corpus.read_files([folder / "text"])]
    tokenizers = [load_tokenizer(), load_tokenizer(folder / "words")]
    for tokenizer in tokenizers:
        corpus.tokenize(documents, tokenizer, folder / "cache")

    def make(draw: random.Random) -> Use:
        cache, tokenizer = copied(folder / "cache"), draw.choice(tokenizers)
        path = draw.choice(sorted(p for p in cache.rglob("*") if p.is_file()))
        valid = path.read_bytes()
        if path.suffix == ".json" and draw.random() < 0.6:
            path.write_bytes(written(mutated_value(json.loads(valid), draw), draw, "json"))
        elif draw.random() < 0.05:
            path.unlink()
        else:
            path.write_bytes(mutated_bytes(valid, valid[::-1], draw))

        def use() -> None:
            found = corpus.tokenize(documents, tokenizer, cache)
            for i in range(len(found.starts) - 1):
                assert len(found.tokens[found.starts[i] : found.starts[i + 1]])
            assert 0 <= int(found.tokens.max()) < tokenizer.vocab_size
            assert found.bytes_per_token > 0

        return use

    return make


def training(folder: Path) -> list[str]:
    """The command line of a short run, and its configuration in `folder`."""
    values = {
        "model": {"lm": {**SMALL, "vocab_size": 256}, "warmup_steps": 1},
        "data": {"files": str(folder / "text"), "val_fraction": 0.3, "context": 16, "batch_tokens": 32},
        "trainer": {"max_steps": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False},
    }
    values["data"]["cache"] = str(folder / "cache")
    (folder / "train.yaml").write_text(yaml.safe_dump(values))
    return ["train", "fit", "--config", str(folder / "train.yaml"), "--run", "run"]


def training_checkpoint(folder: Path) -> Callable[[random.Random], Use]:
    def make(draw: random.Random) -> Use:
        run = copied(folder / "run")
        for path in (run / "checkpoints").glob("*.ckpt"):
            valid = path.read_bytes()
            path.write_bytes(mutated_bytes(valid, valid[::-1], draw))
        return lambda: command(["train", "validate", "--run", str(run)])

    return make


def run_config(folder: Path) -> Callable[[random.Random], Use]:
    valid = (folder / "run" / "config.yaml").read_bytes()

    def make(draw: random.Random) -> Use:
        run = copied(folder / "run")
        if draw.random() < 0.6:
            data = written(mutated_value(yaml.safe_load(valid), draw), draw, "yaml")
        else:
            data = mutated_bytes(valid, valid, draw)
        (run / "config.yaml").write_bytes(data)
        return lambda: command(["train", "validate", "--run", str(run)])

    return make


# Tokenizers


def make_tokenizers(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<eos>": 1, "one": 2, "two": 3, "three": 4}
    word = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    word.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    byte = Tokenizer(models.BPE({**alphabet, "on": 256, "one": 257}, [("o", "n"), ("on", "e")]))
    byte.pre_tokenizer, byte.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    for name, made in (("words", word), ("bytes", byte)):
        PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>").save_pretrained(str(folder / name))


def tokenizer(folder: Path) -> Callable[[random.Random], Use]:
    def make(draw: random.Random) -> Use:
        here = copied(folder / draw.choice(["words", "bytes"]))
        path = draw.choice(sorted(p for p in here.rglob("*.json")))
        valid = path.read_bytes()
        if draw.random() < 0.6:
            path.write_bytes(written(mutated_value(json.loads(valid), draw), draw, "json"))
        else:
            path.write_bytes(mutated_bytes(valid, valid, draw))
        which = here if draw.random() < 0.7 else here / "tokenizer.json"

        def use() -> None:
            found = load_tokenizer(which)
            tokens = found.encode("one two three, and é")
            found.decode_bytes(tokens[:10])
            push = found.decoder([])
            "".join([push(token) for token in tokens[:10]]) + push(None)

        return use

    return make


# Command lines


def command_line(folder: Path) -> Callable[[random.Random], Use]:
    model, text, words = str(folder / "model"), str(folder / "text"), str(folder / "words")
    infer = ["infer", "--model", model, "--prompt", "one two", "--max-new-tokens", "2"]
    lines = [
        [*infer, "--temperature", "0.5", "--top-k", "5", "--top-p", "0.9", "--min-p", "0.1", "--seed", "1"],
        [*infer, "--repetition-penalty", "1.1", "--stop", "x", "--prefill-chunk", "4", "--dtype", "float32"],
        [*infer, "--save-state", "saved", "--stats", "stats.json", "--device", "cpu", "--overwrite"],
        [
            "infer",
            "--model",
            model,
            "--prompt-file",
            text,
            "--load-state",
            str(folder / "state"),
            "--max-new-tokens",
            "1",
        ],
        ["eval", "--model", model, "--data", text, "--context", "16", "--chunk", "8", "--json", "e.json"],
        ["compare", "models", "mamba2", model, "--contexts", "1024", "--tokens", "64", "--csv", "m.csv", "--json", "m"],
        ["compare", "pick", "--length", "1024", "--batch", "1", "--memory", "8GB", "--for", "decode", "--blocks", "2"],
        ["compare", "recall", "--out", "out", "--layers", "Nope", "--tasks", "mqar", "--lr", "1e-3", "--steps", "1"],
        ["compare", "complexity", "--layers", "{name: Nope, n_heads: 2}", "--lengths", "8", "--budget", "1"],
        ["compare", "decode", model, "--contexts", "16", "--new-tokens", "2", "--read", "16", "--batch", "1"],
        ["compare", "forms", "--layers", "Nope", "--lengths", "8", "--d-model", "16"],
        ["compare", "kernels", "--shapes", "1x8x1x8", "--dtype", "float32", "--ops", "nope"],
        ["compare", "cpu", "--models", "nope", "--tokens", "8"],
        ["layers", "Mamba2"],
        ["conformance", "Nope", "--d-model", "16", "--arg", "n_heads=2"],
        ["doctor", "--nope", "--nope", "--nope"],
        ["--version"],
        ["infer", "--model", words, "--prompt", "one"],
    ]

    def make(draw: random.Random) -> Use:
        # A count between is no attack but work that was asked for.
        words = [
            "64" if w.isdecimal() and 64 < int(w[:30]) < 2**31 else w for w in mutated_words(draw.choice(lines), draw)
        ]
        return lambda: command(words)

    return make


def train_command_line(fit: list[str]) -> Callable[[random.Random], Use]:
    options = {
        "--model.lr": "0.1",
        "--model.lm.d_model": "8",
        "--model.lm.norm_eps": "1e-5",
        "--model.lm.blocks": "[{pattern: [{mixer: Mamba2}]}]",
        "--model.betas": "[0.9, 0.95]",
        "--data.context": "16",
        "--data.batch_tokens": "32",
        "--data.files": "x",
        "--data.tokenizer": "bytes",
        "--trainer.callbacks": "null",
        "--trainer.precision": "32-true",
        "--trainer": "null",
        "--seed_everything": "1",
        "--checkpoint_every": "1",
        "--config": "x.yaml",
    }

    def make(draw: random.Random) -> Use:
        words = list(fit)
        for _ in range(draw.choice([1, 1, 2])):
            name = draw.choice(sorted(options))
            value = odd(draw)
            text = value if isinstance(value, str) else written(value, draw, "json").decode("utf-8", "replace")
            words += draw.choice([[name, text], [f"{name}={text}"], [name], [f"{name}x", options[name]]])
        return lambda: command(words)

    return make
