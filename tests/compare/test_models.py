"""`subquad compare models`: figures worked out by hand, files and refusals."""

import csv
import json

import pytest
import torch
import yaml

from subquad import cli, configs
from subquad.compare.models import count, find_config
from subquad.compare.output import short
from subquad.models.checkpoint import save
from subquad.models.config import LMConfig
from subquad.models.lm import LM

CONTEXTS = [10, 1000]
ATTENTION = {"mixer": {"name": "Attention", "n_heads": 2}, "ffn": {"name": "SwiGLU", "d_ff": 24}}
MOE = {"name": "MoE", "n_experts": 4, "d_ff": 8, "n_shared": 1}


def counted(block, tokens=8, dtype=torch.bfloat16, **values):
    """The figures of one block of width 16 over 32 tokens of vocabulary, and what could not be counted."""
    config = LMConfig.from_dict({"d_model": 16, "vocab_size": 32, "blocks": [{"pattern": [block]}], **values})
    return count(config, CONTEXTS, tokens, dtype)


def test_attention_and_swiglu():
    row, missing = counted(ATTENTION, tie_embeddings=False)
    table, attention, ffn, norms = 32 * 16, 4 * 16 * 16, 3 * 16 * 24, 3 * 16
    assert missing == []
    assert row["parameters"] == row["active parameters"] == 2 * table + attention + ffn + norms
    square = 2 * 8 * 8 * 16  # of the scores, and of what they weigh
    assert row["FLOPs a token"] == 2 * (table + attention + ffn) + 2 * square / 8
    assert row["training FLOPs a token"] == 3 * row["FLOPs a token"]
    caches = 2 * 16 * 2  # bytes of keys and values a token, beside a count of 8 bytes
    assert [row[f"state bytes at {n}"] for n in CONTEXTS] == [caches * n + 8 for n in CONTEXTS]
    assert row["weight bytes a token"] == 2 * (16 + table + attention + ffn + norms)


def test_a_head_that_is_the_embedding_is_read_whole():
    tied, _ = counted(ATTENTION, dtype=torch.float32)
    untied, _ = counted(ATTENTION, dtype=torch.float32, tie_embeddings=False)
    assert untied["parameters"] - tied["parameters"] == 32 * 16
    assert tied["weight bytes a token"] == 4 * tied["parameters"]
    assert untied["weight bytes a token"] == tied["weight bytes a token"] + 4 * 16
    assert tied["FLOPs a token"] == untied["FLOPs a token"]


def test_experts_that_are_not_chosen_are_not_active():
    row, missing = counted({"ffn": {**MOE, "top_k": 2}})
    table, router, expert, norms = 32 * 16, 16 * 4, 3 * 16 * 8, 2 * 16
    assert missing == []
    assert row["parameters"] == table + router + 5 * expert + norms
    assert row["active parameters"] == table + router + 3 * expert + norms
    assert row["FLOPs a token"] == 2 * (table + router + 3 * expert)
    assert row["weight bytes a token"] == 2 * row["active parameters"]
    assert row["state bytes at 1000"] == 0


def test_experts_that_choose_have_a_mean_and_no_decoding():
    row, missing = counted({"ffn": {**MOE, "routing": "expert_choice", "capacity_factor": 1.5}})
    assert row["active parameters"] == 32 * 16 + 16 * 4 + 3 * 16 * 8 * 5 // 2 + 2 * 16
    slots = 8 * 1.5 / 4 + 2  # of an expert, two of them spare
    assert row["FLOPs a token"] == 2 * (32 * 16 + 16 * 4 + 3 * 16 * 8 * (1 + 4 * slots / 8))
    assert row["weight bytes a token"] is row["state bytes at 10"] is None
    assert missing == [
        f"no state at {n:,}: block 0's MoE cannot decode: it reads the whole sequence at once" for n in CONTEXTS
    ]


def test_mamba2():
    row, missing = counted({"mixer": {"name": "Mamba2", "d_state": 8, "expand": 2, "head_dim": 16}})
    inner, heads, mixed = 32, 2, 32 + 2 * 8
    table, in_proj, out_proj = 32 * 16, 16 * (inner + mixed + heads), inner * 16
    rest = 5 * mixed + 3 * heads + inner + 2 * 16  # convolution; A, dt, skip; norms
    assert missing == []
    assert row["parameters"] == table + in_proj + out_proj + rest
    # One chunk: C B^T, which all heads share; that times x; the state read by C; the state written by B.
    chunk = 2 * 8 * 8 * 8 + 2 * 8 * 8 * inner + 2 * (2 * 8 * 8 * inner)
    assert row["FLOPs a token"] == 2 * (table + in_proj + 4 * mixed + out_proj) + chunk / 8
    assert row["state bytes at 10"] == row["state bytes at 1000"] == 3 * mixed * 2 + 8 * inner * 4
    assert row["weight bytes a token"] == 2 * row["parameters"]


def test_active_parameters_of_mixtral_are_those_it_is_known_for():
    row, _ = count(find_config("mixtral-8x7b"), [32768], 8, torch.bfloat16)
    assert row["active parameters"] == pytest.approx(12.9e9, rel=5e-3)
    assert row["state bytes at 32768"] == pytest.approx(2 * 32 * 8 * 128 * 2 * 32768, rel=1e-6)


def test_every_architecture_is_counted():
    missing = {}
    for name in (name for name in configs.names() if "/" not in name):
        row, notes = count(find_config(name), [1024, 131072], 64, torch.bfloat16)
        assert row["FLOPs a token"] > 1.2 * row["active parameters"], name
        missing |= {name: len(notes)} if notes else {}
    assert missing == {"cosformer": 1, "hyena": 1, "nystromformer": 2}


def test_table_and_files(tmp_path, capsys):
    rows, text = tmp_path / "models.csv", tmp_path / "models.json"
    words = ["hyena", "mamba-130m", "--contexts", "131072", "1024", "--tokens", "64"]
    assert cli.main(["compare", "models", *words, "--csv", str(rows), "--json", str(text)]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "131,072" in shown
    assert "2.58 MB" in shown
    assert "hyena: no state at 131,072: Hyena serves sequences of up to 2048 tokens" in " ".join(shown.split())
    hyena, mamba = csv.DictReader(rows.open())
    assert (hyena["model"], mamba["model"]) == ("hyena", "mamba-130m")
    assert mamba["parameters"] == mamba["active parameters"] == "129135360"
    assert hyena["state bytes at 131072"] == ""
    found = json.loads(text.read_text())
    assert (found["tokens"], found["dtype"], len(found["not counted"])) == (64, "bfloat16", 1)
    assert found["models"][1]["state bytes at 1024"] == found["models"][1]["state bytes at 131072"] == 2_580_480
    assert found["models"][0]["state bytes at 131072"] is None


def test_files_and_folders_are_read_as_well(tmp_path):
    small = {"d_model": 16, "vocab_size": 32, "blocks": [{"pattern": [ATTENTION]}]}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": {"lm": small}}))
    save(LM.from_config(small), tmp_path / "model")
    for name in ("small.yaml", "run.yaml", "model"):
        assert find_config(str(tmp_path / name)) == LMConfig.from_dict(small), name


def test_a_layer_that_looks_at_values_has_no_flops(tmp_path, monkeypatch):
    (tmp_path / "looking.py").write_text(
        "from subquad.layers import SwiGLU\n"
        "class Looks(SwiGLU):\n"
        "    def forward(self, x, state=None, cu_seqlens=None):\n"
        "        return x * x.sum().item(), state\n"
    )
    monkeypatch.chdir(tmp_path)
    row, missing = counted({"ffn": "looking.Looks"})
    assert row["FLOPs a token"] is row["training FLOPs a token"] is None
    assert row["weight bytes a token"] == 2 * row["parameters"]
    assert len(missing) == 1
    assert missing[0].startswith("no FLOPs over 8 tokens: ")


def test_figures_have_three_digits():
    texts = [short(None), short(0.0), short(999), short(1000), short(999_600, "B"), short(2.6e10)]
    assert texts == ["-", "0", "999", "1.00 k", "1.00 MB", "26.0 G"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mambo2"], "'mambo2' is no shipped configuration, file or folder; did you mean 'mamba2'?"),
        (["typo.yaml"], "typo.yaml: unknown key 'd_modl'; did you mean 'd_model'?"),
        (["shape.yaml"], "shape.yaml: blocks[0].pattern[0].mixer: Attention"),
        (["list.yaml"], "list.yaml holds a list; a configuration is a mapping"),
        (["other"], "other is no model of subquad: its config.json has no 'format': 'subquad'"),
        (["empty"], "cannot read the configuration empty/config.json: No such file or directory"),
        (["mamba2", "--contexts", "0"], "--contexts has 0; a context is at least 1"),
        (["mamba2", "--tokens", "0"], "--tokens is 0; it must be at least 1"),
        (["mamba2", "--dtype", "float12"], "there is no dtype 'float12' here"),
        (["mamba2", "--csv", "list.yaml"], "list.yaml exists; pass overwrite (--overwrite) to replace it"),
        (["mamba2", "--json", "list.yaml"], "list.yaml exists; pass overwrite (--overwrite) to replace it"),
        ([], "the following arguments are required: CONFIG"),
    ],
)
def test_bad_input(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "typo.yaml").write_text("d_modl: 16\n")
    (tmp_path / "shape.yaml").write_text("d_model: 16\nblocks: [{pattern: [{mixer: {name: Attention, n_heads: 3}}]}]\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "empty").mkdir()
    assert cli.main(["compare", "models", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_overwrite(tmp_path):
    existing = tmp_path / "models.json"
    existing.write_text("old")
    words = ["compare", "models", "mamba2", "--tokens", "8", "--json", str(existing), "--overwrite"]
    assert cli.main(words) == 0
    assert json.loads(existing.read_text())["models"][0]["model"] == "mamba2"
