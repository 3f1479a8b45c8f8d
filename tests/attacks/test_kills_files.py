"""Kills while a model, a state and a token cache are written: the old or the new is whole, and nothing else stays."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from subquad.errors import UserError
from subquad.infer.generate import Context
from subquad.models.checkpoint import fingerprint, load, save
from subquad.models.lm import LM
from subquad.models.tokenizer import ByteTokenizer
from subquad.train.corpus import Document, read_files, tokenize

SLOW = pytest.mark.slow
TEXT = torch.arange(200, dtype=torch.int32)


def model(seed: int) -> LM:
    torch.manual_seed(seed)
    pattern = [{"mixer": {"name": "Attention", "n_heads": 4}, "ffn": "SwiGLU"}]
    return LM.from_config({"d_model": 64, "vocab_size": 256, "blocks": [{"pattern": pattern}]}).eval()


def kill_at_random(draw: random.Random, work, longest: float) -> None:
    """A child that works again and again is killed after up to `longest` seconds."""
    child = os.fork()
    if child == 0:
        try:
            while True:
                work()
        finally:
            os._exit(1)
    time.sleep(draw.uniform(0, longest))
    assert os.waitpid(child, os.WNOHANG) == (0, 0), "the child ended by itself"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize("count", [4, pytest.param(25, marks=SLOW)])
@pytest.mark.parametrize("there", [True, False])
def test_exports(tmp_path, count, there):
    old, new, draw = model(1), model(2), random.Random(count)
    allowed = {fingerprint(old), fingerprint(new)}
    for n in range(count):
        folder = tmp_path / str(n) / "model"
        if there:
            save(old, folder)
        kill_at_random(draw, lambda folder=folder: save(new, folder, overwrite=True), 0.04)
        try:
            assert fingerprint(load(folder)) in allowed
        except UserError as error:
            assert not there and "there is no model folder" in str(error)
        save(new, folder, overwrite=True)
        assert fingerprint(load(folder)) == fingerprint(new)
        assert [p.name for p in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("count", [4, pytest.param(25, marks=SLOW)])
def test_states(tmp_path, count):
    lm, draw, path = model(1), random.Random(count), tmp_path / "state"
    short, long = (Context.start(lm, [TEXT[:n]], [0], 1) for n in (20, 150))
    for context in (short, long):
        for _ in context.read():
            pass
    for _ in range(count):
        short.save(path, overwrite=True)
        kill_at_random(draw, lambda: long.save(path, overwrite=True), 0.02)
        assert Context.load(path, lm).lengths[0] in (19, 149)
        long.save(path, overwrite=True)
        assert Context.load(path, lm).lengths[0] == 149
        assert [p.name for p in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("count", [4, pytest.param(25, marks=SLOW)])
def test_token_caches(tmp_path, count):
    text = b"some words\n" * 20_000
    (tmp_path / "a.txt").write_bytes(text)
    file = read_files([tmp_path / "a.txt"])[0]
    documents, draw = [Document(file, 0, file.size)], random.Random(count)
    for n in range(count):
        cache = tmp_path / f"cache{n}"
        kill_at_random(draw, lambda cache=cache, n=n: tokenize(documents, ByteTokenizer(), fresh(cache)), 0.02)
        for made in cache.glob("*/tokens/[!.]*"):
            assert (made / "tokens.bin").read_bytes() == text
            assert (made / "meta.json").read_text()
        folder = fresh(cache)  # where the child was when it was killed
        tokenize(documents, ByteTokenizer(), folder)
        assert len(list((folder / "tokens").iterdir())) == 1


def fresh(cache: Path) -> Path:
    """The next folder that holds no whole cache."""
    n = 0
    while any((cache / str(n)).glob("tokens/[!.]*")):
        n += 1
    return cache / str(n)
