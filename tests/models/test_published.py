"""Configurations of published models: their parameter counts, without allocating a weight."""

import pytest
import torch

from subquad import configs
from subquad.models.config import LMConfig
from subquad.models.lm import LM

# Exact counts are those of the released checkpoints (transformers builds the same number from their configurations).
COUNTS = {
    "jamba-52b": 51_570_323_328,
    "lfm2-1.2b": 1_170_340_608,
    "llama-1.1b": 1_100_048_384,
    "mamba-130m": 129_135_360,
    "mamba2-1.3b": 1_343_757_312,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "rwkv7-0.4b": 450_767_872,
}
# Known to two digits only, from the paper.
ROUNDED = {"gated-deltanet-1.3b": 1.3e9}


def count(name):
    with torch.device("meta"):
        return LM(LMConfig.from_file(configs.folder() / "published" / f"{name}.yaml")).n_parameters()


@pytest.mark.parametrize("name", COUNTS)
def test_exact_counts(name):
    assert count(name) == COUNTS[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_counts(name):
    assert count(name) == pytest.approx(ROUNDED[name], rel=0.04)  # 1.25 to 1.35 rounds to 1.3


def test_every_published_config_is_counted():
    names = {name.removeprefix("published/") for name in configs.names() if name.startswith("published/")}
    assert names == set(COUNTS) | set(ROUNDED)
