"""What would not fit the memory is refused before it is allocated."""

import resource
import time
from pathlib import Path

import pytest
import torch

from subquad.errors import UserError
from subquad.memory import free_bytes, room_for
from subquad.models.lm import LM

CPU = torch.device("cpu")
CONFIG = {"d_model": 16, "blocks": [{"pattern": [{"mixer": {"name": "Attention", "n_heads": 2}}]}]}
HUGE = {
    "vocabulary": {"vocab_size": 2**31 - 1},
    "width": {"d_model": 2**20, "vocab_size": 128},
    "feed-forward": {"blocks": [{"pattern": [{"ffn": {"name": "SwiGLU", "d_ff": 2**31 - 1}}]}]},
    "experts": {"blocks": [{"pattern": [{"ffn": {"name": "MoE", "n_experts": 2**31 - 1}}]}]},
    "repeats": {"d_model": 2**14, "blocks": [{"repeat": 500, "pattern": [{"mixer": "Mamba2"}]}]},
}


def grown():
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line).split()[1])


@pytest.mark.parametrize("name", HUGE)
def test_models_that_do_not_fit(name):
    before, begin = grown(), time.process_time()
    with limited(2**30), pytest.raises(UserError) as caught:
        LM.from_config(CONFIG | HUGE[name])
    assert "takes more than" in str(caught.value) and "of memory are free here" in str(caught.value)
    assert time.process_time() - begin < 5 and grown() - before < 2**20


def test_a_state_that_does_not_fit():
    model = LM.from_config(CONFIG)
    with pytest.raises(UserError, match="the state of 1 x 1,000,000,000,000 tokens takes more than"):
        model.init_state(1, 10**12)
    with torch.device("meta"):
        LM.from_config(CONFIG).init_state(1, 10**12)


class limited:
    """As under `ulimit -v`, with so many more bytes than there are now."""

    def __init__(self, more):
        self.more = more

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_AS)
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + self.more, self.before[1]))

    def __exit__(self, *error):
        resource.setrlimit(resource.RLIMIT_AS, self.before)


MAKE = {
    "empty": lambda n: torch.empty(n, n),
    "zeros": lambda n: torch.zeros((n, n)),
    "full": lambda n: torch.full((n, n), 1.0),
    "rand": lambda n: torch.rand(n, n, dtype=torch.float64),
    "randint": lambda n: torch.randint(3, (n, n)),
    "eye": lambda n: torch.eye(n),
    "arange": lambda n: torch.arange(0, n * n, dtype=torch.float32),
    "linspace": lambda n: torch.linspace(0, 1, n * n),
    "new_zeros": lambda n: torch.zeros(1).new_zeros(n, n),
    "repeat": lambda n: torch.zeros(n).repeat(n, 1),
    "broadcast": lambda n: torch.zeros(n)[:, None] * torch.zeros(n),
    "expanded": lambda n: torch.zeros(n).expand(n, n).exp(),
}


@pytest.mark.parametrize("name", MAKE)
def test_every_way_to_make_a_tensor(name):
    with limited(2**29):
        assert 2**28 < free_bytes(CPU) <= 2**29
        with pytest.raises(UserError, match="a thing takes more than"), room_for("a thing"):
            MAKE[name](20_000)
    with room_for("a thing"):
        assert MAKE[name](10).numel() == 100


def test_what_is_made_adds_up():
    with limited(2**29), pytest.raises(UserError, match="a thing"), room_for("a thing"):
        kept = [torch.empty(2**24) for _ in range(100)]
        del kept
