"""The nets that conftest.py spreads under every test do catch something."""

import os
import zlib

import jaxtyping
import pytest
import torch

from subquad.kernels.packing import pack
from subquad.kernels.short_conv import short_conv
from subquad.layers import LinearAttention


def test_wrong_shapes_are_caught_at_run_time():
    with pytest.raises(jaxtyping.TypeCheckError):
        short_conv(torch.zeros(1, 4, 3), torch.zeros(2, 4))  # 3 channels against 2


def test_shapes_are_checked_within_layers():
    with pytest.raises(jaxtyping.TypeCheckError):
        LinearAttention(8).forward(torch.zeros(4, 8))


@pytest.mark.unchecked
def test_unchecked_tests_run_without_the_checks():
    with pytest.raises(Exception) as caught:
        short_conv(torch.zeros(1, 4, 3), torch.zeros(2, 4))
    assert not isinstance(caught.value, jaxtyping.TypeCheckError)


def test_a_well_shaped_call_passes():
    row, cu_seqlens = pack(torch.ones(2, 3, 5), torch.tensor([[True, True, False], [True, False, False]]))
    assert row.shape == (1, 3, 5)
    assert cu_seqlens.tolist() == [0, 2, 3]


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(3),
        lambda: torch.empty_like(torch.zeros(3)),
        lambda: torch.zeros(3).new_empty(3),
        lambda: torch.empty(3, dtype=torch.complex64),
    ],
)
def test_uninitialised_memory_is_poisoned(make):
    assert make().isnan().all()


def test_uninitialised_integers_are_left_alone():
    assert torch.empty(3, dtype=torch.int64).shape == (3,)


def test_the_seed_follows_from_the_name(request):
    shift = int(os.environ.get("SUBQUAD_TEST_SEED", "0"))
    assert torch.initial_seed() == (zlib.crc32(request.node.nodeid.encode()) + shift) % 2**32


def test_one_thread():
    assert torch.get_num_threads() == 1
