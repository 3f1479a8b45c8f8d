"""Every shipped configuration builds, learns and generates, or is an encoder and says so; every layer has one."""

import argparse
from math import isfinite
from pathlib import Path

import pytest
import torch

import subquad
from subquad import configs
from subquad.errors import UserError
from subquad.layers import available
from subquad.models.config import LMConfig
from subquad.models.lm import LM, cross_entropy

SMALL = [name for name in configs.names() if "/" not in name]


@pytest.mark.parametrize("name", SMALL)
def test_config_learns_and_generates(name):
    torch.manual_seed(0)
    model = LM.from_config(configs.folder() / f"{name}.yaml")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = torch.tensor([list(b"the quick brown fox jumps over the lazy dog. " * 2)])
    losses = []
    for _ in range(6):
        loss = cross_entropy(model(text[:, :-1])[0], text[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []  # data parallelism waits for each
        optimizer.step()
        losses.append(loss.item())
    if not decodes(model):
        assert all(map(isfinite, losses))  # next tokens are in sight: their loss says nothing
        with pytest.raises(UserError, match="cannot decode: it reads the whole sequence at once"):
            subquad.generate(model.eval(), "the ", max_new_tokens=3)
        return
    assert min(losses) < 0.9 * losses[0], losses  # at this rate a single step may overshoot
    assert isinstance(subquad.generate(model.eval(), "the ", max_new_tokens=3), str)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_config_learns_real_text(name):
    """Thirty steps on the source of the standard library: the loss of the last five is well below that of the first."""
    torch.manual_seed(0)
    model = LM.from_config(configs.folder() / f"{name}.yaml")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    text = torch.tensor(list(Path(argparse.__file__).read_bytes()[: 30 * 257]))
    losses = []
    for row in text.view(30, 1, 257):
        loss = cross_entropy(model(row[:, :-1])[0], row[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.8 * losses[0], losses


def decodes(model: LM) -> bool:
    parts = [part for block in model.blocks for part in (block.mixer, block.ffn) if part is not None]
    return all(hasattr(part, "init_state") for part in parts)


def test_only_encoders_cannot_decode():
    """A layer that lost its init_state would not go unseen."""
    models = {name: LM.from_config(configs.folder() / f"{name}.yaml") for name in SMALL}
    assert [name for name, model in models.items() if not decodes(model)] == ["nystromformer"]


def test_every_layer_has_a_config():
    named = set()
    for name in SMALL:
        for _, block in LMConfig.from_file(configs.folder() / f"{name}.yaml").flat_blocks():
            layers = [block[part] for part in ("mixer", "ffn") if block.get(part)]
            named |= {spec if isinstance(spec, str) else spec["name"] for spec in layers}
    assert set(available()) <= named


@pytest.mark.parametrize("boundaries", [None, [0], [0, 0, 0]])
def test_the_last_of_no_tokens_is_zero(boundaries):
    model = LM.from_config({"d_model": 16, "blocks": [{"pattern": [{"mixer": "Mamba2"}, {"mixer": "Attention"}]}]})
    cu_seqlens = None if boundaries is None else torch.tensor(boundaries, dtype=torch.int32)
    n = 2 if boundaries is None else len(boundaries) - 1
    state = model.init_state(n, 4)
    tokens = torch.zeros(2 if boundaries is None else 1, 0, dtype=torch.long)
    with torch.no_grad():
        logits, _ = model(tokens, state, cu_seqlens, logits="last")
    assert logits.shape == (n, 256)
    assert not logits.any()
