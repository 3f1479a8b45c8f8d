"""Feature maps phi of kernel attention: exp(q . k) stands behind all of them, phi(q) . phi(k) in its place."""

import inspect
from math import log, pi, sqrt
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.errors import UserError
from subquad.kernels.state import accumulator_dtype
from subquad.kernels.wrapping import full_precision
from subquad.layers.base import Facts

FeatureMapName = Literal["cosformer", "elu", "hedgehog", "performer", "relu", "softmax", "taylor"]


class FeatureMap(nn.Module):
    """Maps queries and keys of H heads of width d to features: [B, T, H, d] -> [B, T, H, width].

    A map that treats queries and keys alike gives `features`; another overrides `forward`. Keyword arguments of its
    constructor are arguments of LinearAttention too. It declares what else it needs:

    needs_positions: `at` holds the tokens' positions, and LinearAttention's state counts tokens.
    max_len: no position may reach it.
    widest: the head width LinearAttention does not exceed by default.
    """

    needs_positions: ClassVar[bool] = False
    widest: ClassVar[int | None] = None
    max_len: int | None = None

    def __init__(self, d: int, n_heads: int):
        super().__init__()
        self.width = d

    def forward(
        self, q: Float[Tensor, "B T H d"], k: Float[Tensor, "B T H d"], at: Int[Tensor, "_ T"] | None = None
    ) -> tuple[Float[Tensor, "B T H K"], Float[Tensor, "B T H K"]]:
        return self.features(q), self.features(k)

    def features(self, x: Float[Tensor, "*B d"]) -> Float[Tensor, "*B K"]:
        raise NotImplementedError


def positive_elu(x: Tensor) -> Tensor:
    """1 + elu(x)."""
    # Not 1 + F.elu(x): it rounds exp(x) to an absolute 1e-7, and torch 2.13 traces its backward with wrong strides.
    return F.relu(x) + x.clamp(max=0).exp()


class EluFeatures(FeatureMap):
    """1 + elu(x), positive (Katharopoulos et al. 2020)."""

    def features(self, x: Float[Tensor, "*B d"]) -> Float[Tensor, "*B K"]:
        return positive_elu(x)


class ReluFeatures(FeatureMap):
    """relu(x) (Kasai et al. 2021)."""

    def features(self, x: Float[Tensor, "*B d"]) -> Float[Tensor, "*B K"]:
        return F.relu(x)


class SoftmaxFeatures(FeatureMap):
    """softmax over a token's own features, which sum to one (Shen et al. 2021)."""

    def features(self, x: Float[Tensor, "*B d"]) -> Float[Tensor, "*B K"]:
        return x.softmax(-1)


class TaylorFeatures(FeatureMap):
    """phi(q) . phi(k) = 1 + s + s^2 / 2 with s = q . k / sqrt(d), the second-order series of exp (Arora et al.
    2024)."""

    widest = 16

    def __init__(self, d: int, n_heads: int):
        super().__init__(d, n_heads)
        self.width = 1 + d + d * d

    def features(self, x: Float[Tensor, "*B d"]) -> Float[Tensor, "*B K"]:
        x = x * x.shape[-1] ** -0.25
        square = (x[..., :, None] * x[..., None, :]).flatten(-2) / sqrt(2)
        return torch.cat([torch.ones_like(x[..., :1]), x, square], -1)


class PerformerFeatures(FeatureMap):
    """Positive random features of the softmax kernel, FAVOR+ (Choromanski et al. 2020, arXiv:2009.14794).

    phi(x)_i = exp(w_i . x' - |x'|^2 / 2) / sqrt(M) with x' = x / d^(1/4); the mean of phi(q) . phi(k) over normal w_i
    is exp(q . k / sqrt(d)). The w_i are orthogonal in groups of d, which lowers the variance.

    n_features: M, 2 d by default.
    """

    projection: Tensor
    facts = Facts(float32=("projection",))

    def __init__(self, d: int, n_heads: int, *, n_features: int | None = None):
        super().__init__(d, n_heads)
        self.width = n_features or 2 * d
        self.register_buffer("projection", torch.empty(self.width, d))
        self.redraw()

    @torch.no_grad()
    def redraw(self) -> None:
        """Draw new w_i. A state holds sums of the old ones' features: redraw between sequences, never within one."""
        M, d = self.projection.shape
        normal = torch.randn(-(-M // d), d, d, dtype=torch.float64)
        q, r = torch.linalg.qr(normal)
        # QR fixes the signs of its columns; without r's signs the directions would fill half of the sphere only.
        directions = (q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]).transpose(-1, -2).flatten(0, 1)[:M]
        self.projection.copy_(directions * torch.randn(M, d, dtype=torch.float64).norm(dim=-1, keepdim=True))

    def features(self, x: Float[Tensor, "*B d"]) -> Float[Tensor, "*B K"]:
        return self.log_features(x).exp()

    def forward(
        self, q: Float[Tensor, "B T H d"], k: Float[Tensor, "B T H d"], at: Int[Tensor, "_ T"] | None = None
    ) -> tuple[Float[Tensor, "B T H K"], Float[Tensor, "B T H K"]]:
        """Each query's features are divided by the largest of them, which the normaliser cancels.

        Keys are not: a maximum over keys would tell a token of those to come.
        """
        log_q = self.log_features(q)
        return (log_q - log_q.amax(-1, keepdim=True)).exp(), self.log_features(k).exp()

    def log_features(self, x: Tensor) -> Tensor:
        wide = accumulator_dtype(x.dtype)  # exponents of about d / 2: bf16 would be off by a fifth
        with full_precision(x):
            x = x.to(wide) * x.shape[-1] ** -0.25
            return x @ self.projection.to(wide).T - (x.square().sum(-1, keepdim=True) + log(self.width)) / 2


class CosformerFeatures(FeatureMap):
    """relu(x) times cos and sin of the position, so that near tokens weigh more (Qin et al. 2022, arXiv:2202.08791).

    phi(q_i) . phi(k_j) = relu(q_i) . relu(k_j) cos(pi / 2 (i - j) / M)

    horizon: M, the longest sequence, beyond which weights would turn negative; 4096 by default.
    """

    needs_positions = True

    def __init__(self, d: int, n_heads: int, *, horizon: int = 4096):
        super().__init__(d, n_heads)
        self.width, self.max_len = 2 * d, horizon

    def forward(
        self, q: Float[Tensor, "B T H d"], k: Float[Tensor, "B T H d"], at: Int[Tensor, "_ T"] | None = None
    ) -> tuple[Float[Tensor, "B T H K"], Float[Tensor, "B T H K"]]:
        assert at is not None and self.max_len is not None
        angle = at.double() * (pi / 2 / self.max_len)
        turn = torch.stack([angle.cos(), angle.sin()], -1).to(accumulator_dtype(q.dtype))[:, :, None, :, None]
        q, k = ((F.relu(x)[..., None, :] * turn).flatten(-2) for x in (q, k))
        return q, k


class HedgehogFeatures(FeatureMap):
    """softmax of (W x, -W x) with a learned W a head, one for queries and one for keys (Zhang et al. 2024,
    arXiv:2402.04347). W is the identity at first."""

    def __init__(self, d: int, n_heads: int):
        super().__init__(d, n_heads)
        self.width = 2 * d
        self.q_weight = nn.Parameter(torch.eye(d).repeat(n_heads, 1, 1))
        self.k_weight = nn.Parameter(torch.eye(d).repeat(n_heads, 1, 1))

    def forward(
        self, q: Float[Tensor, "B T H d"], k: Float[Tensor, "B T H d"], at: Int[Tensor, "_ T"] | None = None
    ) -> tuple[Float[Tensor, "B T H K"], Float[Tensor, "B T H K"]]:
        q, k = (torch.einsum("bthd,hed->bthe", x, w) for x, w in ((q, self.q_weight), (k, self.k_weight)))
        return torch.cat([q, -q], -1).softmax(-1), torch.cat([k, -k], -1).softmax(-1)


FEATURE_MAPS: dict[str, type[FeatureMap]] = {
    "cosformer": CosformerFeatures,
    "elu": EluFeatures,
    "hedgehog": HedgehogFeatures,
    "performer": PerformerFeatures,
    "relu": ReluFeatures,
    "softmax": SoftmaxFeatures,
    "taylor": TaylorFeatures,
}
assert set(FEATURE_MAPS) == set(get_args(FeatureMapName))


def make_feature_map(name: FeatureMapName, d: int, n_heads: int, **arguments: Any) -> FeatureMap:
    """The map with those of the arguments that are not None, each of which it must take."""
    given = {key: value for key, value in arguments.items() if value is not None}
    for key, value in given.items():
        if key not in inspect.signature(FEATURE_MAPS[name].__init__).parameters:
            takers = [n for n, m in FEATURE_MAPS.items() if key in inspect.signature(m.__init__).parameters]
            raise UserError(f"the feature map {name!r} takes no {key}; it belongs to: {', '.join(takers)}")
        if value < 1:
            raise UserError(f"{key} is {value}; it must be at least 1")
    return FEATURE_MAPS[name](d, n_heads, **given)
