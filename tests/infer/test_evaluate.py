"""Bits per byte against the definition, however the text is cut."""

import json
from math import log

import pytest
import torch
import torch.nn.functional as F

from subquad import cli
from subquad.errors import UserError
from subquad.infer.loss import measure
from subquad.models.checkpoint import save
from subquad.models.tokenizer import ByteTokenizer, HFTokenizer

TEXTS = [bytes(range(40, 110)), b"", b"x", b"another text, with other letters" * 3]


@torch.no_grad()
def by_definition(model, context):
    """Sums of bits and counts by log2 of the context length, one window at a time."""
    bits, counts = [0.0] * context.bit_length(), [0] * context.bit_length()
    for text in TEXTS:
        for start in range(0, len(text) - 1, context):
            window = torch.tensor(list(text[start : start + context + 1]))
            nats = F.cross_entropy(model(window[None, :-1])[0][0], window[1:], reduction="none")
            for i, value in enumerate(nats.tolist()):
                bits[(i + 1).bit_length() - 1] += value / log(2)
                counts[(i + 1).bit_length() - 1] += 1
    return bits, counts


def test_losses_by_position(model):
    check(model, 16, 50)


@pytest.mark.parametrize("context, chunk", [(200, 200), (200, 13), (16, 16), (10, 1), (1, 7)])
def test_losses_however_the_text_is_cut(models, context, chunk):
    check(models["hybrid"], context, chunk)


def check(model, context, chunk):
    found = measure(model, ByteTokenizer(), TEXTS, context=context, chunk=chunk)
    bits, counts = by_definition(model, context)
    assert found.tokens == counts
    assert found.bits == pytest.approx(bits, rel=1e-9)
    assert found.total_tokens == 69 + 95
    assert found.bits_per_byte == pytest.approx(sum(bits) / sum(counts))


def test_a_model_that_knows_nothing_needs_eight_bits(small, capsys, tmp_path):
    model = small("linear")
    torch.nn.init.zeros_(model.head.weight)
    save(model, tmp_path / "model")
    (tmp_path / "a.txt").write_bytes(TEXTS[0])
    arguments = ["eval", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "*.txt"), "--context", "10"]
    outputs = ["--json", str(tmp_path / "e.json"), "--png", str(tmp_path / "e.png")]
    assert cli.main(arguments + outputs) == 0
    table = capsys.readouterr().out
    assert "8 - 10" in table and "8.0000" in table
    values = json.loads((tmp_path / "e.json").read_text())
    assert values["bits_per_byte"] == pytest.approx(8) and values["tokens"] == 69 and values["bytes"] == 70
    assert [row["from"] for row in values["by_position"]] == [1, 2, 4, 8]
    assert sum(row["tokens"] for row in values["by_position"]) == 69
    assert (tmp_path / "e.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(arguments + outputs) == 2
    assert "e.json exists; pass overwrite (--overwrite)" in capsys.readouterr().err


def test_bytes_are_counted_for_tokens_of_several(models):
    class EverySecond(HFTokenizer):
        """Two bytes a token, of which the first decides."""

        vocab_size, eos_id, special_tokens = 256, None, False

        def __init__(self):
            pass

        def encode(self, text):
            return list(text[::2])

    plain = measure(models["linear"], ByteTokenizer(), [TEXTS[0][::2]], context=64, chunk=64)
    pairs = measure(models["linear"], EverySecond(), [TEXTS[0]], context=64, chunk=64)
    assert plain.bits_per_token == plain.bits_per_byte == pairs.bits_per_token
    assert pairs.bits_per_byte == plain.bits_per_byte / 2


def test_a_model_that_sees_what_it_should_predict_is_refused(small):
    pattern = [{"mixer": {"name": "LinearAttention", "n_heads": 2, "causal": False}}]
    with pytest.raises(UserError, match="cannot decode: it reads the whole sequence"):
        measure(small("linear", blocks=[{"pattern": pattern}]), ByteTokenizer(), TEXTS, context=8, chunk=8)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--data", "none*.txt"], "--data: no file matches 'none*.txt'"),
        (["--data", "."], "--data: . is a folder; give its files, such as './**/*.txt'"),
        (["--data", "empty"], "the data has nothing to predict"),
        (["--data", "f", "--context", "0"], "--context 0 and --chunk 4096 must be at least 1"),
        (["--data", "f", "--contxt", "9"], "eval has no option --contxt; did you mean '--context'?"),
        (["--data", "f", "--dtype", "float23"], "there is no dtype 'float23' here; did you mean 'float32'?"),
        (["--data", "f", "--device", "gpu"], "there is no device 'gpu'; this machine has: cpu"),
        (["--data", "f", "--png", "no/e.png"], "cannot write no/e.png: there is no folder no"),
        (["--data", "f", "--model", "nowhere"], "there is no model folder nowhere"),
    ],
)
def test_bad_input(models, arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save(models["linear"], "model")
    (tmp_path / "empty").touch()
    (tmp_path / "f").write_text("some text")
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["eval", "--model", "model", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {sentence}") and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
