"""Ratios become the nearest whole widths; numbers that JSON cannot hold are never written."""

import inspect
import json

import pytest
import torch

from subquad.errors import UserError
from subquad.layers import Mamba2, available
from subquad.layers.base import width_of
from subquad.layers.routers import choose_tokens
from subquad.models import checkpoint
from subquad.models.config import LMConfig
from subquad.models.lm import LM

RATIOS = ("expand", "expand_k", "expand_v", "expand_qk")
OF_A_HEAD = ("DeltaNet", "GatedDeltaNet", "GatedDeltaProduct", "KimiDeltaAttention")


def cases():
    for name, layer in available().items():
        for ratio in RATIOS:
            if ratio in inspect.signature(layer.__init__).parameters:
                yield name, ratio


@pytest.mark.parametrize(("whole", "wanted"), [(704, 960), (768, 1024), (768, 2048), (48, 70), (1000, 1290), (20, 58)])
def test_a_width_over_the_whole_gives_the_width_back(whole, wanted):
    for ratio in (wanted / whole, round(wanted / whole, 4)):
        assert width_of(None, "expand", ratio, whole) == wanted
    assert int(0.29 * 100) == 28 and width_of(None, "rope_fraction", 0.29, 100) == 29


@pytest.mark.parametrize(("name", "ratio"), list(cases()))
def test_every_ratio_is_rounded(name, ratio):
    """960 / 704 and its four digits give the same widths in every layer, as an exact ratio of 1.5 gives its own."""
    whole, wanted = (22, 30) if name in OF_A_HEAD else (704, 960)
    accepted = inspect.signature(available()[name].__init__).parameters
    heads = {key: n for key, n in (("head_dim", 22), ("n_heads", 32)) if key in accepted and name != "Mamba2"}
    with torch.device("meta"):
        exact, digits = (
            {n: p.shape for n, p in available()[name](704, **heads, **{ratio: r}).named_parameters()}
            for r in (wanted / whole, round(wanted / whole, 4))
        )
    assert exact == digits
    sizes = {size for shape in exact.values() for size in shape}
    assert {wanted * (704 // whole), wanted * (704 // whole) * 2} & sizes and not {959, 959 * 2} & sizes
    with pytest.raises(UserError, match=ratio):
        available()[name](64, **{ratio: 1e-9})


@pytest.mark.parametrize(
    ("experts", "capacity", "length", "wanted"), [(2, 1.1, 100, 55), (2, 2.2, 90, 99), (3, 1.2, 5, 2)]
)
def test_a_capacity_is_no_more_than_its_share(experts, capacity, length, wanted):
    """1.1 / 2 of 100 tokens are 55 and not the 56 that 55.00000000000001 rounds up to."""
    scores = torch.rand(length, experts)
    taken = (choose_tokens(scores, capacity, length, None).weight > 0).sum().item()
    assert taken == min(wanted, length) * experts


@pytest.mark.parametrize("upper", [None, float("inf"), 0.25])
def test_no_limit_is_written_and_read_back(tmp_path, upper):
    mixer = {"name": "Mamba2", "d_state": 8, "dt_limit": [0.001, upper]}
    parallel = {"name": "Parallel", "mixers": [mixer, {"name": "Attention", "n_heads": 2}]}
    config = LMConfig(16, [{"pattern": [{"mixer": mixer}, {"mixer": parallel}]}])
    json.dumps(config.to_dict(), allow_nan=False)
    model = LM(config).eval()
    read = checkpoint.load(checkpoint.save(model, tmp_path / "model"))
    json.loads((tmp_path / "model" / "config.json").read_text(), parse_constant=pytest.fail)
    tokens = torch.randint(256, (1, 9))
    assert torch.equal(read(tokens)[0], model(tokens)[0])
    assert LM.from_config(read.config.to_dict()).blocks[0].mixer.dt_limit[1] in (None, upper)


def test_an_infinite_limit_clamps_nothing():
    torch.manual_seed(0)
    none, infinite = (Mamba2(16, d_state=8, dt_limit=(0.0, high)) for high in (None, float("inf")))
    infinite.load_state_dict(none.state_dict())
    x = 10 * torch.randn(1, 9, 16)
    assert torch.equal(none(x)[0], infinite(x)[0])


@pytest.mark.parametrize(
    "arguments",
    [{"A_range": [1.0, float("inf")]}, {"dt_limit": [float("nan"), 1.0]}, {"dt_max": float("inf")}, {"expand": 1e400}],
)
def test_other_numbers_must_be_finite(arguments):
    key = next(iter(arguments))
    with pytest.raises(UserError, match=key):
        LM(LMConfig(16, [{"pattern": [{"mixer": {"name": "Mamba2", **arguments}}]}]))
