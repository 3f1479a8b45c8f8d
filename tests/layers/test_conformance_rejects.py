"""The conformance suite must catch what it is for: each faulty layer fails the property that names its fault."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from subquad.kernels.packing import mask_padding
from subquad.kernels.scan import scan
from subquad.kernels.state import Recurrent, accumulator_dtype, commit
from subquad.layers import conformance


class State(NamedTuple):
    h: Recurrent


class Sound(nn.Module):
    """A minimal gated recurrence that keeps the contract; the faulty layers below change one thing each."""

    def __init__(self, d_model: int):
        super().__init__()
        self.f_proj, self.i_proj = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)

    def forward(self, x, state=None, cu_seqlens=None):
        f = self.f_proj(x).sigmoid()
        h, carried = scan(f, (1 - f) * self.i_proj(x), state=None if state is None else state.h, cu_seqlens=cu_seqlens)
        return mask_padding(h, cu_seqlens), None if state is None else State(carried)

    def init_state(self, batch_size, max_len, dtype=None):
        dtype = accumulator_dtype(dtype or self.f_proj.weight.dtype)
        return State(torch.zeros(batch_size, self.f_proj.in_features, dtype=dtype))


class LeaksTheFuture(Sound):
    def forward(self, x, state=None, cu_seqlens=None):
        y, state = super().forward(x, state, cu_seqlens)
        return y + 1e-4 * x.mean(1, keepdim=True), state


class ForgetsTheState(Sound):
    def forward(self, x, state=None, cu_seqlens=None):
        y, _ = super().forward(x, None, cu_seqlens)
        return y, state


class MovesTheState(Sound):
    def forward(self, x, state=None, cu_seqlens=None):
        y, state = super().forward(x, state, cu_seqlens)
        return y, None if state is None else State(state.h.clone())


class MutatesUnderGrad(Sound):
    def forward(self, x, state=None, cu_seqlens=None):
        y, after = super().forward(x, state, cu_seqlens)
        if state is not None:
            with torch.no_grad():
                commit(state.h, after.h.detach())
        return y, after


class IgnoresBoundaries(Sound):
    def forward(self, x, state=None, cu_seqlens=None):
        if cu_seqlens is None or state is not None:
            return super().forward(x, state, cu_seqlens)
        whole = torch.stack([cu_seqlens[0], cu_seqlens[-1]])
        return super().forward(x, None, whole)


class DetachesTheState(Sound):
    def forward(self, x, state=None, cu_seqlens=None):
        return super().forward(x, None if state is None else State(state.h.detach()), cu_seqlens)


class WrongGradient(Sound):
    def forward(self, x, state=None, cu_seqlens=None):
        y, state = super().forward(x, state, cu_seqlens)
        from subquad.kernels.backend import current_backend

        return (y if current_backend("cpu") == "naive" else y.detach() + 0.999 * (y - y.detach())), state


class OverflowsOnTheWay(Sound):
    def forward(self, x, state=None, cu_seqlens=None):
        from subquad.kernels.backend import current_backend

        y, state = super().forward(x, state, cu_seqlens)
        return (y if current_backend("cpu") == "naive" else y + torch.where(x < 80, 0, x.exp() * 0)), state


class GrowsWithLength(Sound):
    def init_state(self, batch_size, max_len, dtype=None):
        h = super().init_state(batch_size, max_len, dtype).h
        return State(h.repeat(1, max_len)[:, : h.shape[1]].contiguous() if max_len < 0 else torch.cat([h] * max_len, 1))


class PaddingIsNotZero(Sound):
    def forward(self, x, state=None, cu_seqlens=None):
        y, state = super().forward(x, state, cu_seqlens)
        return y + self.i_proj.bias, state


class SwallowsArguments(Sound):
    def __init__(self, d_model: int, **kwargs):
        super().__init__(d_model)


class MixesTheBatch(Sound):
    def forward(self, x, state=None, cu_seqlens=None):
        y, state = super().forward(x, state, cu_seqlens)
        return y + 1e-3 * torch.arange(x.shape[0], dtype=x.dtype)[:, None, None], state


class MultipliesWhatItMasks(Sound):
    """Right for finite numbers; zero times another sequence's NaN is NaN."""

    def forward(self, x, state=None, cu_seqlens=None):
        y, state = super().forward(x, state, cu_seqlens)
        return y + 0.0 * x.sum((0, 1)), state


class MasksTheForwardOnly(Sound):
    """Outputs are selected, but the gradient of what was not selected is zero times NaN."""

    def forward(self, x, state=None, cu_seqlens=None):
        y, state = super().forward(x, state, cu_seqlens)
        scale = (x.detach().abs().sum() + 1).expand_as(x)  # of all sequences
        return y + mask_padding((x * scale - x * scale).nan_to_num(), cu_seqlens), state


class ReadsAFirstToken(Sound):
    def forward(self, x, state=None, cu_seqlens=None):
        y, state = super().forward(x, state, cu_seqlens)
        return y + 0 * x[:, 0].mean().detach().nan_to_num(), state


class ForgetsWithoutTokens(Sound):
    def forward(self, x, state=None, cu_seqlens=None):
        y, after = super().forward(x, state, cu_seqlens)
        return y, after if after is None or x.shape[1] else State(after.h * 0)


class RepairsBoundaries(Sound):
    def forward(self, x, state=None, cu_seqlens=None):
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens.flatten().long().clamp(0, x.shape[1]).sort().values
            cu_seqlens = torch.cat([0 * cu_seqlens[:1], cu_seqlens[1:]])
        return super().forward(x, state, cu_seqlens)


FAULTS: dict[type[nn.Module], str] = {
    LeaksTheFuture: "is_causal",
    ForgetsTheState: "splits_anywhere",
    MovesTheState: "writes_in_place",
    MutatesUnderGrad: "writes_in_place",
    IgnoresBoundaries: "packs",
    DetachesTheState: "gradients_cross_states",
    WrongGradient: "matches_the_oracle",
    OverflowsOnTheWay: "takes_inputs_of_any_size",
    GrowsWithLength: "state_size_is_as_declared",
    PaddingIsNotZero: "packs",
    SwallowsArguments: "constructs_from_width",
    MixesTheBatch: "batch_order_is_free",
    MultipliesWhatItMasks: "isolates_sequences",
    MasksTheForwardOnly: "isolates_sequences",
    ReadsAFirstToken: "takes_nothing",
    ForgetsWithoutTokens: "takes_nothing",
    RepairsBoundaries: "rejects_bad_boundaries",
}


def test_a_sound_layer_passes():
    failed = [r for r in conformance.check(Sound) if not r.passed]
    assert not failed, failed


@pytest.mark.parametrize("layer", FAULTS, ids=lambda layer: layer.__name__)
def test_a_faulty_layer_fails_by_name(layer):
    assert not conformance.attempt(FAULTS[layer], conformance.Subject(layer)).passed


def test_nan_is_never_close():
    assert conformance.error(torch.tensor([float("nan")]), Tensor([1.0])) == float("inf")
