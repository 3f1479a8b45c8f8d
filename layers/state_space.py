"""What S4, S4D and S5 share: HiPPO matrices, discretisation, and the layer around one system a channel."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.errors import UserError
from subquad.kernels.lti import lti
from subquad.kernels.packing import mask_padding
from subquad.kernels.state import Recurrent, accumulator_dtype
from subquad.layers.base import Facts, Layer, placement

Discretization = Literal["zoh", "bilinear"]


class StateSpaceState(NamedTuple):
    h: Recurrent  # complex: [N, D, d_state / 2]; S5 [N, d_state / 2]


def hippo_legs(n: int) -> tuple[Tensor, Tensor]:
    """The HiPPO-LegS matrix A [n, n] and input vector B [n] (Gu et al. 2020, arXiv:2008.07669), float64."""
    scale = (2 * torch.arange(n, dtype=torch.float64) + 1).sqrt()
    A = -torch.tril(scale[:, None] * scale, -1) - torch.diag(torch.arange(1, n + 1, dtype=torch.float64))
    return A, scale


def hippo_normal(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """HiPPO-LegS as normal plus low rank, A = V diag(w) V^H - P P^T: (w, V, P), float64.

    Of each conjugate pair the mode with the positive frequency: w [n / 2], V [n, n / 2]. The real part is -1/2.
    """
    A, scale = hippo_legs(n)
    P = scale / 2**0.5
    normal = A + P[:, None] * P + 0.5 * torch.eye(n, dtype=torch.float64)  # skew-symmetric
    frequency, V = torch.linalg.eigh(-1j * normal)
    return torch.complex(torch.full((n // 2,), -0.5, dtype=torch.float64), frequency[n // 2 :]), V[:, n // 2 :], P


def even(owner: object, d_state: int) -> int:
    """d_state, of which a complex mode and its conjugate make two."""
    if d_state < 2 or d_state % 2:
        raise UserError(f"{type(owner).__name__}: d_state is even, for conjugate pairs of modes; got {d_state}")
    return d_state


def log_step(n: int, dt_min: float, dt_max: float) -> nn.Parameter:
    """Logarithms of step sizes, uniform between those of dt_min and dt_max."""
    low, high = torch.tensor([dt_min, dt_max]).log()
    return nn.Parameter(low + (high - low) * torch.rand(n))


def real_pair(z: Tensor) -> nn.Parameter:
    """A complex parameter as real numbers [.., 2], so that it takes part in every cast of the layer."""
    return nn.Parameter(torch.view_as_real(z.resolve_conj()).float())


def as_complex(pair: Tensor) -> Tensor:
    """complex128 whatever the layer's dtype: the kernels are powers of what is made of it."""
    return torch.view_as_complex(pair.double())


def discretize(w: Tensor, dt: Tensor, how: Discretization) -> tuple[Tensor, Tensor]:
    """x' = w x + u over a step dt: (a, b) of x_t = a x_{t-1} + b u_t, by zero-order hold or the bilinear rule."""
    if how == "zoh":
        a = (w * dt).exp()
        return a, (a - 1) / w
    half = 0.5 * w * dt
    return (1 + half) / (1 - half), dt / (1 - half)


class StateSpace(Layer):
    """y_t = out_proj(gelu(o_t + skip * x_t)), out_proj gated (GLU), o the outputs of one system a channel.

    A layer built on it gives `system()`, the arguments of `lti` after u in complex128.
    """

    facts = Facts(no_decay=("C", "skip"), residual=("out_proj",))

    def __init__(self, d_model: int, d_state: int):
        super().__init__()
        self.n_modes = even(self, d_state) // 2
        self.C = real_pair(torch.randn(d_model, self.n_modes, dtype=torch.complex64))
        self.skip = nn.Parameter(torch.randn(d_model))
        self.out_proj = nn.Linear(d_model, 2 * d_model, bias=True)

    def system(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: StateSpaceState | None = None,
        cu_seqlens: Int[Tensor, "M"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], StateSpaceState | None]:
        o, h = lti(x, **self.system(), state=None if state is None else state.h, cu_seqlens=cu_seqlens)
        y = F.glu(self.out_proj(F.gelu(o + self.skip.to(x.dtype) * x)), -1)
        return mask_padding(y, cu_seqlens), None if state is None else StateSpaceState(h)

    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> StateSpaceState:
        """The state before any token; its size does not depend on max_len."""
        dtype, device = placement(self, dtype)
        shape, wide = (batch_size, *self.C.shape[:-1]), accumulator_dtype(dtype).to_complex()
        return StateSpaceState(torch.zeros(shape, dtype=wide, device=device))
