"""Hyena whose long filters are sums of decaying oscillations, and the fit of one to a trained Hyena."""

from math import pi
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from subquad.errors import UserError
from subquad.kernels.lti import lti
from subquad.kernels.state import Recurrent, accumulator_dtype
from subquad.layers.base import Card, Facts
from subquad.layers.hyena import Hyena, HyenaOperator, HyenaState
from subquad.layers.state_space import as_complex, log_step, real_pair

MAX_COLUMNS = 512  # of the Hankel matrix that a fit decomposes


class Modes(NamedTuple):
    h: Recurrent  # complex: [N, D, d_state]


class ModalHyena(HyenaOperator):
    """Hyena with modal filters (Massaroli et al. 2023, Laughing Hyena, arXiv:2310.18780).

    h^n_t = Re(sum_k C_k A_k^t) in each channel, plus a weight at t = 0, in place of Hyena's network; else as there.

    Cost: train O(T D K), decode O(D K) a token for each of the order - 1 long filters whatever the length; state
    (order - 1) D K complex values and (order + 1) D (W - 1); K = d_state.

    Arguments
        order: gates; one less long filter a channel. d_state: complex modes a filter, each of which may stand for two
        conjugate poles. d_conv: W, width of the short convolution. dt_min, dt_max: range of initial rates.
    """

    card = Card("Massaroli et al. 2023, arXiv:2310.18780", "lti", "O(T D K)", "O(D K)", "(order - 1) D K")
    facts = Facts(no_decay=("decay_log", "frequency", "C"), float32=("decay_log", "frequency"))

    def __init__(
        self,
        d_model: int,
        *,
        order: int = 2,
        d_state: int = 16,
        d_conv: int = 3,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
    ):
        super().__init__(d_model, order, d_conv)
        shape = (order - 1, d_model, d_state)
        dt = log_step((order - 1) * d_model, dt_min, dt_max).detach().exp().view(order - 1, d_model, 1)
        self.decay_log = nn.Parameter((0.5 * dt).log().repeat(1, 1, d_state))
        self.frequency = nn.Parameter(pi * dt * torch.arange(d_state))
        self.C = real_pair(torch.randn(shape, dtype=torch.complex64) * (dt / d_state) ** 0.5)

    def poles(self) -> Tensor:
        """A [order - 1, D, d_state], complex128."""
        return torch.complex(-self.decay_log.double().exp(), self.frequency.double()).exp()

    def long_filters(self, time: int, state: HyenaState | None) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.poles(), as_complex(self.C), strict=True))

    def convolve(
        self, v: Tensor, filter: tuple[Tensor, Tensor], state: Modes | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Modes | None]:
        A, C = filter
        o, h = lti(v, A, torch.ones_like(A), C, state=None if state is None else state.h, cu_seqlens=cu_seqlens)
        return o, None if h is None else Modes(h)

    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> HyenaState:
        """The state before any token; its size does not depend on max_len."""
        conv = self.empty_conv(batch_size, dtype)
        wide = accumulator_dtype(conv.dtype).to_complex()
        shape = (batch_size, *self.decay_log.shape[1:])
        return HyenaState(conv, tuple(Modes(conv.new_zeros(shape, dtype=wide)) for _ in self.decay_log))


@torch.no_grad()
def distill_filter(
    layer: Hyena, d_state: int = 16, length: int | None = None
) -> tuple[ModalHyena, Float[Tensor, "orders D"]]:
    """A layer that computes what `layer` does with d_state modes for each long filter, and decodes in O(1) a token.

    Poles are those of the Hankel matrix of the first `length` taps (max_len by default), found from its leading
    singular vectors (the matrix pencil: Hua and Sarkar 1990); weights then by least squares, all in float64.
    Returns (the new layer, ||fit - filter|| / ||filter|| over these taps for each filter and channel). The error is
    that of the parameters as stored, and large for a filter that is no sum of few decaying oscillations: over 2,048
    taps of untrained filters 16 modes leave 0.01 (median, 0.1 at most) with sine = 1, and 0.8 with sine = 10, which are
    close to noise.
    Past `length` the fitted filters go on as they decay.
    """
    length = layer.max_len if length is None else length
    if not 4 <= length <= layer.max_len or d_state < 1:
        raise UserError(
            f"distill_filter: length {length} is not between 4 and max_len {layer.max_len}, or d_state {d_state} < 1"
        )
    d_model, weight = layer.skip.shape[1], layer.skip
    modal = ModalHyena(d_model, order=layer.order, d_state=d_state, d_conv=layer.conv_weight.shape[1]).to(weight)
    modal.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("filter.")}, strict=False)
    taps = layer.filter(length).double().cpu()

    poles = torch.stack([_poles(h, d_state) for h in taps]).view(modal.decay_log.shape)
    modal.decay_log.copy_((-poles.abs().log()).log())
    modal.frequency.copy_(poles.angle())
    stored = modal.poles().cpu().flatten(0, 1)
    weights = torch.stack([_weights(h, A) for h, A in zip(taps, stored, strict=True)])
    modal.C.copy_(torch.view_as_real(weights).view(modal.C.shape))

    stored_weights = as_complex(modal.C).cpu().flatten(0, 1)
    fit = torch.stack([(_powers(A, length) @ C).real for A, C in zip(stored, stored_weights, strict=True)])
    error = (fit - taps).norm(dim=1) / taps.norm(dim=1)
    return modal, error.view(-1, d_model)


def _poles(h: Tensor, n: int) -> Tensor:
    """The n poles of h [L] that carry most of it, of each conjugate pair the upper one, [n] of absolute value < 1."""
    columns = min(len(h) // 2, MAX_COLUMNS)
    vectors = torch.linalg.svd(h.unfold(0, columns + 1, 1), full_matrices=False).Vh[: 2 * n].mT
    found = torch.linalg.eigvals(torch.linalg.lstsq(vectors[:-1], vectors[1:], driver="gelsd").solution)
    found = found[found.imag >= 0]
    # In absolute value between exp(-50) and exp(-1e-8), so that the logarithm of the decay is a number.
    found = torch.polar(found.abs().clamp(2e-22, 1 - 1e-8), found.angle())
    if len(found) > n:  # real poles stand for one each
        energy = (_powers(found, len(h)) * _weights(h, found)).abs().square().sum(0)
        found = found[energy.topk(n).indices]
    return torch.cat([found, found.new_full((n - len(found),), 2e-22)])


def _weights(h: Tensor, poles: Tensor) -> Tensor:
    """C [K] that minimises ||Re(sum_k C_k A_k^t) - h_t||, the smallest of them if there are many."""
    powers = _powers(poles, len(h))
    design = torch.cat([powers.real, -powers.imag], 1)
    real, imag = torch.linalg.lstsq(design, h[:, None], driver="gelsd").solution[:, 0].chunk(2)
    return torch.complex(real, imag)


def _powers(poles: Tensor, length: int) -> Tensor:
    """A_k^t, [L, K]."""
    return (torch.arange(length, dtype=torch.float64)[:, None] * poles.log()).exp()
