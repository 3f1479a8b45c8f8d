"""Processes that start in the checkout, whose folders `kernels/` and `models/` must not become top-level modules.

transformers looks for Hugging Face's package `kernels`, and would take ours for it.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from subquad.models.checkpoint import save
from subquad.models.lm import LM

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def run(*command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["kernels", "layers", "models", "train", "infer", "compare", "configs"])
def test_the_tests_see_no_folder_of_ours_as_a_module(name):
    assert str(ROOT) not in sys.path
    assert "" not in sys.path
    found = importlib.util.find_spec(name)
    assert found is None or not str(found.origin).startswith(str(ROOT))


def test_sampling_with_transformers_processors(tmp_path):
    """The console script, started here, reaches transformers and samples with its logits processors."""
    model = LM.from_config({"d_model": 16, "blocks": [{"pattern": [{"mixer": "Mamba2"}]}]})
    folder = save(model, tmp_path / "model")
    sampling = ["--temperature", "0.9", "--top-k", "20", "--top-p", "0.9", "--repetition-penalty", "1.2", "--seed", "1"]
    command = [
        BIN / "infer",
        "--model",
        folder,
        "--prompt",
        "def ",
        "--max-new-tokens",
        "8",
        "--device",
        "cpu",
        *sampling,
    ]
    first = run(*command)
    assert first
    assert run(*command) == first


def test_a_model_of_transformers_runs():
    code = """
import sys, torch, transformers, subquad.kernels.scan
config = transformers.MambaConfig(vocab_size=7, hidden_size=8, state_size=4, num_hidden_layers=1)
logits = transformers.MambaForCausalLM(config)(torch.tensor([[1, 2, 3]])).logits
assert logits.shape == (1, 3, 7)
assert "kernels" not in sys.modules or not (sys.modules["kernels"].__file__ or "").startswith(sys.argv[1])
print("ran")
"""
    assert run(sys.executable, "-P", "-c", code, ROOT).endswith("ran\n")
