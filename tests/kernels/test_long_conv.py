"""The long convolution against numpy's, and over a buffer that was rewound."""

import numpy as np
import pytest
import torch

from subquad.errors import UserError
from subquad.kernels.backend import backend
from subquad.kernels.long_conv import LongConvCache, _transform_length, long_conv


def empty(n, slots, width):
    return LongConvCache(torch.zeros(n, slots, width, dtype=torch.float64), torch.zeros(n, dtype=torch.int64))


@pytest.mark.parametrize("form", ["naive", "torch"])
def test_it_is_a_convolution(form):
    x, filter = torch.randn(1, 90, 3, dtype=torch.float64), torch.randn(3, 40, dtype=torch.float64)
    with backend(form):
        y, _ = long_conv(x, filter)
    expected = [np.convolve(x[0, :, d].numpy(), filter[d].numpy())[:90] for d in range(3)]
    np.testing.assert_allclose(y[0].T.numpy(), np.stack(expected), atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("new", [1, 9])
def test_what_a_rewound_sequence_left_in_the_buffer_is_not_read(new):
    x, filter = torch.randn(2, 20, 3, dtype=torch.float64), torch.randn(3, 20, dtype=torch.float64)
    _, state = long_conv(x[:, :11], filter, state=empty(2, 20, 3))
    _, state = long_conv(x[:, :9] * float("nan"), filter, state=state)
    state = LongConvCache(state.x, state.count - 9)
    y, _ = long_conv(x[:, 11 : 11 + new], filter, state=state)
    torch.testing.assert_close(y, long_conv(x, filter)[0][:, 11 : 11 + new])


def test_a_full_buffer_is_refused():
    x = torch.randn(1, 6, 3, dtype=torch.float64)
    with pytest.raises(UserError, match=r"5 slots; 6 tokens do not fit \(raise max_len\)"):
        long_conv(x, torch.randn(3, 6, dtype=torch.float64), state=empty(1, 5, 3))


def test_transform_lengths():
    found = {n: _transform_length(n) for n in (3, 4, 5, 7, 9, 13, 4095)}
    assert found == {3: 3, 4: 4, 5: 6, 7: 8, 9: 12, 13: 16, 4095: 4096}
