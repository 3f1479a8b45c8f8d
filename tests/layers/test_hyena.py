"""Hyena's lengths, and the modal layer that is fitted to it."""

import copy
import pickle

import pytest
import torch
from torch import nn

from subquad.errors import UserError
from subquad.kernels.examples import relative_error
from subquad.layers import Hyena
from subquad.layers.modal_hyena import distill_filter


class Exponentials(nn.Module):
    """Filters that are sums of two decaying oscillations and one plain decay."""

    def __init__(self, n: int):
        super().__init__()
        decay = 0.02 + 0.2 * torch.rand(n, 3, dtype=torch.float64)
        turn = torch.tensor([1.0, 1.0, 0.0]) * torch.rand(n, 3, dtype=torch.float64) * 2
        self.log_poles, self.weights = torch.complex(-decay, turn), 0.5 + torch.rand(n, 3, dtype=torch.float64)

    def forward(self, length):
        powers = (self.log_poles[..., None] * torch.arange(length)).exp()
        return (self.weights[..., None] * powers).sum(1).real


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_a_sum_of_exponentials_is_found(dtype, bound):
    layer = Hyena(6, order=3, max_len=200).to(dtype)
    layer.filter = Exponentials(12)
    modal, errors = distill_filter(layer, d_state=4)
    assert errors.shape == (2, 6)
    assert errors.max() < bound
    x = torch.randn(2, 200, 6, dtype=dtype)
    assert relative_error(modal(x)[0].detach(), layer(x)[0].detach()) < bound


@torch.no_grad()
def test_the_reported_error_is_the_filters():
    layer = Hyena(6, max_len=128).double()
    coarse, fine = (distill_filter(layer, d_state=n) for n in (2, 12))
    assert (fine[1] < coarse[1]).all()
    assert coarse[1].max() > 0.05  # two modes are not enough, and it says so
    for modal, errors in (coarse, fine):
        A, C = modal.long_filters(0, None)[0]
        fit = (C[..., None] * A[..., None] ** torch.arange(128)).sum(1).real
        taps = layer.filter(128)
        torch.testing.assert_close((fit - taps).norm(dim=1) / taps.norm(dim=1), errors[0], rtol=1e-6, atol=1e-12)


@torch.no_grad()
def test_outputs_agree_to_the_reported_error():
    layer = Hyena(8, max_len=256, sine=1.0).double()
    modal, errors = distill_filter(layer, d_state=16)
    x = torch.randn(1, 256, 8, dtype=torch.float64)
    assert 1e-6 < errors.max() < 0.1
    assert relative_error(modal(x)[0], layer(x)[0]) < 2 * errors.max() + 1e-9


def test_lengths_past_the_filters_are_refused():
    layer = Hyena(8, max_len=20)
    with pytest.raises(UserError, match="up to 20 tokens; 21 do not fit"):
        layer(torch.randn(1, 21, 8))
    with pytest.raises(UserError, match="up to 20 tokens; 30 do not fit"):
        layer.init_state(1, 30)
    state = layer(torch.randn(1, 12, 8), layer.init_state(1, 20))[1]
    with pytest.raises(UserError, match="up to 20 tokens; 21 do not fit"):
        layer(torch.randn(1, 9, 8), state)
    with pytest.raises(UserError, match="length 21 is not between 4 and max_len 20"):
        distill_filter(layer, length=21)


def test_arguments_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="order is at least 2"):
        Hyena(8, order=1)
    with pytest.raises(UserError, match="n_features is odd"):
        Hyena(8, n_features=4)


def test_filters_that_are_kept_follow_their_parameters():
    """Without gradients the taps are kept between calls; a changed, moved or replaced parameter renews them."""
    layer, x = Hyena(8, max_len=32), torch.randn(1, 9, 8)
    with torch.no_grad():
        before = layer(x)[0]
        assert torch.equal(layer(x)[0], before)
        layer.filter.out.weight.mul_(2)
        changed = layer(x)[0]
        assert not torch.allclose(changed, before)
        assert torch.allclose(changed, layer.double()(x.double())[0].float(), atol=1e-5)
    assert torch.allclose(layer(x.double())[0].float(), changed, atol=1e-5)  # with gradients nothing is kept


def through_data(layer):
    layer.filter.out.weight.data.mul_(2)


def by_assignment(layer):
    new = {name: 2 * t for name, t in layer.state_dict().items()}
    layer.load_state_dict(new, assign=True)


def in_inference_mode(layer):
    with torch.inference_mode():
        layer.filter.rate.mul_(2)


def by_another_dtype(layer):
    layer.double()


def by_a_hook(layer):
    layer.filter.out.register_forward_hook(lambda module, inputs, output: 2 * output)


@pytest.mark.parametrize("change", [through_data, by_assignment, in_inference_mode, by_another_dtype, by_a_hook])
@torch.no_grad()
def test_known_taps_are_never_stale(change):
    layer = Hyena(8, max_len=16)
    before = layer.filter(16).clone()
    assert torch.equal(layer.filter(16), before) and layer.filter.known is not None
    assert pickle.loads(pickle.dumps(layer)).filter.known is None  # computed again, not written
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer):
        change(copied)
        assert torch.equal(copied.filter(9), copied.filter.taps(16)[:, :9])
        assert copied.filter(9).dtype != before.dtype or not torch.equal(copied.filter(9), before[:, :9])
