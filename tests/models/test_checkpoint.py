"""A model on disk: what is saved comes back, what does not fit is refused by name, and nothing is ever half there."""

import copy
import gc
import json
import os
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file

import subquad
from subquad import files
from subquad.errors import UserError
from subquad.layers.base import convert, parameters_with
from subquad.models import checkpoint
from subquad.models.checkpoint import fingerprint, load, save
from subquad.models.lm import LM
from subquad.models.tokenizer import ByteTokenizer

BLOCKS = [
    {"pattern": [{"mixer": "Mamba2", "ffn": "SwiGLU"}, {"mixer": {"name": "Attention", "window": 4}, "ffn": "MoE"}]}
]


def model(**changes):
    return LM.from_config({"d_model": 32, "vocab_size": 17, "blocks": BLOCKS} | changes)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("tie", [True, False])
def test_round_trip(tmp_path, tie):
    saved = model(tie_embeddings=tie).eval()
    folder = save(saved, tmp_path / "deep" / "model")
    assert set(contents(folder)) == {"config.json", "model.safetensors"}
    loaded = load(folder)
    assert not loaded.training
    tokens = torch.randint(17, (2, 9))
    assert torch.equal(loaded(tokens)[0], saved(tokens)[0])
    assert (loaded.head.weight is loaded.embedding.weight) == tie
    assert loaded.n_parameters() == saved.n_parameters()
    assert fingerprint(loaded) == fingerprint(saved)


def test_tied_weights_are_written_once(tmp_path):
    tied, untied = (save(model(tie_embeddings=tie), tmp_path / str(tie)) for tie in (True, False))
    names = [set(load_file(folder / "model.safetensors")) for folder in (tied, untied)]
    assert names[1] - names[0] == {"head.weight"}
    assert names[0] < names[1]


def test_non_contiguous_weights_come_back(tmp_path):
    saved = model()
    weight = saved.blocks[0].mixer.in_proj.weight
    weight.data = weight.data.t().contiguous().t()
    loaded = load(save(saved, tmp_path / "model"))
    assert torch.equal(loaded.blocks[0].mixer.in_proj.weight, weight)


def test_load_converts(tmp_path):
    loaded = load(save(model(), tmp_path / "model"), dtype=torch.bfloat16)
    wide = parameters_with(loaded, "float32")
    assert wide and {n for n, p in loaded.named_parameters() if p.dtype == torch.float32} == wide
    assert {p.dtype for n, p in loaded.named_parameters() if n not in wide} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_comes_back_in_its_dtype_with_its_rates(tmp_path, dtype):
    saved = convert(model(), dtype).eval()
    loaded = load(save(saved, tmp_path / "model"))
    before, after = saved.state_dict(), loaded.state_dict()
    assert all(after[n].dtype == t.dtype and torch.equal(after[n], t) for n, t in before.items())
    assert fingerprint(loaded) == fingerprint(saved)


def test_rates_rounded_by_others_are_read_into_float32(tmp_path):
    saved = model().bfloat16()
    loaded = load(save(saved, tmp_path / "model"))
    for name in parameters_with(saved, "float32"):
        assert torch.equal(loaded.get_parameter(name), saved.get_parameter(name).float())


def test_fingerprints_tell_weights_and_configurations_apart():
    first = model()
    before = fingerprint(first)
    assert fingerprint(first) == before
    with torch.no_grad():
        first.norm.weight[3] += 1e-3
    assert fingerprint(first) != before
    torch.manual_seed(0)
    one = model(norm_eps=1e-5)
    torch.manual_seed(0)
    assert fingerprint(model(norm_eps=1e-6)) != fingerprint(one)


def test_the_public_names(tmp_path):
    folder = save(model(), tmp_path / "model", tokenizer=ByteTokenizer())
    assert json.loads((folder / "config.json").read_text())["version"] == subquad.__version__
    assert isinstance(subquad.load(folder), subquad.LM)


# What does not fit.


@pytest.fixture
def saved(tmp_path):
    return save(model(), tmp_path / "model")


def refused(folder, *said):
    with pytest.raises(UserError) as caught:
        load(folder)
    assert all(part in str(caught.value) for part in said), str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_folder(tmp_path):
    refused(tmp_path / "none", "there is no model folder", "none")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_is_missing(saved, name):
    (saved / name).unlink()
    refused(saved, str(saved), f"it has no {name}")


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
def test_truncated_weights(saved, kept):
    path = saved / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    refused(saved, str(path), "is damaged or no safetensors file")


def test_truncated_configuration(saved):
    path = saved / "config.json"
    path.write_text(path.read_text()[:50])
    refused(saved, str(path), "no valid JSON")


def test_a_foreign_configuration(saved):
    (saved / "config.json").write_text(json.dumps({"model_type": "mamba2", "hidden_size": 32}))
    refused(saved, "config.json was not written by subquad")


def test_a_foreign_file_of_weights(saved):
    (saved / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    refused(saved, "is damaged or no safetensors file")


def changed(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_a_missing_tensor_is_named(saved):
    changed(saved, lambda tensors: [tensors.pop(name) for name in ("norm.weight", "embedding.weight")])
    refused(saved, "tensor 'embedding.weight' is missing")


def test_an_extra_tensor_is_named(saved):
    changed(saved, lambda tensors: tensors.update(extra=torch.zeros(1)))
    refused(saved, "tensor 'extra' is not part of the model")


def test_a_wrong_shape_is_named(saved):
    changed(saved, lambda tensors: tensors.update({"norm.weight": torch.zeros(31)}))
    refused(saved, "'norm.weight' is (31,), the model needs (32,)")


def test_an_unknown_layer_in_the_configuration(saved):
    path = saved / "config.json"
    path.write_text(path.read_text().replace('"Mamba2"', '"Mamba7"'))
    refused(saved, "there is no layer 'Mamba7'")


# Overwriting, and failing while writing.


def test_an_existing_folder_is_refused(saved):
    before = contents(saved)
    with pytest.raises(UserError, match=r"model exists; pass overwrite \(--overwrite\)"):
        save(model(), saved)
    assert contents(saved) == before


def test_overwrite_replaces_a_model(saved):
    new = model(tie_embeddings=False)
    save(new, saved, overwrite=True)
    assert fingerprint(load(saved)) == fingerprint(new)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_overwrite_takes_an_empty_folder(tmp_path):
    (tmp_path / "model").mkdir()
    save(model(), tmp_path / "model", overwrite=True)
    load(tmp_path / "model")


@pytest.mark.parametrize("file", ["thesis.tex", "config.json"])
def test_overwrite_spares_what_is_no_model_of_ours(tmp_path, file):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / file).write_text('{"model_type": "mamba2"}')
    with pytest.raises(UserError, match="holds no model of subquad, so it will not be replaced"):
        save(model(), folder, overwrite=True)
    assert set(contents(folder)) == {file}


def test_overwrite_spares_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="will not be replaced"):
        save(model(), tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"


def no_space(*arguments, **kwargs):
    raise OSError(28, "No space left on device")


def test_a_failing_write_leaves_the_old_model(saved, monkeypatch):
    before = contents(saved)
    monkeypatch.setattr(checkpoint, "write_tensors", no_space)
    with pytest.raises(UserError, match=r"cannot write .*: No space left on device"):
        save(model(), saved, overwrite=True)
    assert contents(saved) == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_failing_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "write_tensors", no_space)
    with pytest.raises(UserError, match="No space left"):
        save(model(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_model_takes_the_place_of_another(saved, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(files, "_swap", lambda *_: False)
    other = model()
    with torch.no_grad():
        other.norm.weight.fill_(2.0)
    save(other, saved, overwrite=True)
    assert load(saved).norm.weight.eq(2).all()
    assert list(saved.parent.iterdir()) == [saved]


def test_a_failing_exchange_puts_the_old_model_back(saved, monkeypatch):
    before, rename, calls = contents(saved), os.rename, []

    def second_fails(source, target):
        calls.append(source)
        return no_space() if len(calls) == 2 else rename(source, target)

    monkeypatch.setattr(files, "_swap", lambda *_: False)
    monkeypatch.setattr(files.os, "rename", second_fails)
    with pytest.raises(UserError, match="No space left"):
        save(model(), saved, overwrite=True)
    assert contents(saved) == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_tokenizer_that_fails_to_save(tmp_path):
    class Failing(ByteTokenizer):
        def save(self, folder):
            no_space()

    with pytest.raises(UserError, match="No space left"):
        save(model(), tmp_path / "model", tokenizer=Failing())
    assert list(tmp_path.iterdir()) == []


def test_a_path_below_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot write"):
        save(model(), tmp_path / "file" / "model")


def test_a_flipped_bit_is_told(saved):
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    random = Random(0)
    places = [random.randrange(len(whole)) for _ in range(60)] + [random.randrange(header) for _ in range(60)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << random.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(UserError):
            load(saved)


def test_the_damaged_tensor_is_named(saved):
    path = saved / "model.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"is damaged: tensor '[\w.]+' is not the one that was written"):
        load(saved)


def test_a_fingerprint_follows_the_weights(saved):
    first, second = load(saved), load(saved)
    assert fingerprint(first) == fingerprint(second) == fingerprint(copy.deepcopy(first))
    with torch.no_grad():
        first.norm.weight[0] += 1
    assert fingerprint(first) != fingerprint(second)
    second.norm.weight = torch.nn.Parameter(first.norm.weight.detach().clone())
    assert fingerprint(first) == fingerprint(second)
    assert fingerprint(load(saved, dtype=torch.bfloat16)) != fingerprint(load(saved))


def test_files_are_as_open_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        save(model(), tmp_path / "model")
    finally:
        os.umask(before)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()} == {0o640}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak since a moment")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_loading_takes_little_more_than_the_model(tmp_path, dtype):
    """The file's pages and the model in another dtype once made it 3.0 times the model, and 2.0 in its own."""
    pattern = [{"mixer": {"name": "LinearAttention"}, "ffn": {"name": "SwiGLU", "d_ff": 4096}}] * 4
    save(LM.from_config({"d_model": 1024, "vocab_size": 16, "blocks": [{"pattern": pattern}]}), tmp_path / "m")
    load(tmp_path / "m", dtype=dtype)
    gc.collect()

    def kilobytes(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1])

    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    model = load(tmp_path / "m", dtype=dtype)
    size = sum(p.nbytes for p in model.parameters()) / 1024
    assert kilobytes("VmHWM") - before < 1.7 * size
