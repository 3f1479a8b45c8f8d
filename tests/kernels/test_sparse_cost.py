"""The cost of sparse attention follows the edges of its pattern, and its cache what the pattern can still read."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from subquad.kernels.patterns import make_pattern
from subquad.kernels.sparse_attention import empty_cache, sparse_attention

H, K = 2, 4
PATTERNS = {
    "longformer": {"name": "longformer", "window": 32, "n_global": 4},
    "dilated": {"name": "dilated_window", "window": 8, "dilation": [1, 3]},
    "bigbird": {"name": "bigbird", "block": 16, "n_random": 2, "span": 8, "n_global": 16},
    "local_blocks": {"name": "local_blocks", "block": 32},
}


def products(pattern, time):
    q, k, v = torch.randn(3, 1, time, H, K)
    with FlopCounterMode(display=False) as counter:
        sparse_attention(q, k, v, pattern)
    return counter.get_total_flops()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", PATTERNS)
def test_work_is_linear_and_near_the_edges(name, causal):
    pattern = make_pattern(PATTERNS[name], causal)
    edges = pattern.edges(1024, H)
    assert edges < 0.35 * H * 1024**2
    assert products(pattern, 1024) <= 5 * edges * 4 * K  # two products of K multiplications and additions an edge
    assert products(pattern, 2048) <= 2.2 * products(pattern, 1024)


def test_caches_hold_what_can_be_read():
    def slots(spec, max_len):
        cache = empty_cache(make_pattern(spec, True), 1, max_len, H, K, torch.float32, torch.device("cpu"))
        return cache.k.shape[1], cache.far_k.shape[1]

    assert slots(PATTERNS["longformer"], 64_000) == (36, 0)
    assert slots(PATTERNS["dilated"], 64_000) == (22, 0)
    assert slots(PATTERNS["bigbird"], 64_000) == (16 + 9 * 16, 0)
    assert slots({"name": "sparse_transformer", "stride": 64, "width": 2}, 64_000) == (64, 2_000)
    assert slots({"name": "sparse_transformer_strided", "stride": 64}, 64_000) == (64, 64_000)
