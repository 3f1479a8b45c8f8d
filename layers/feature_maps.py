"""Feature maps phi of kernel attention: exp(q . k) stands behind all of them, phi(q) . phi(k) in its place."""

from math import sqrt
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FeatureMapName = Literal["elu", "relu", "softmax", "taylor"]


class FeatureMap(nn.Module):
    """A map of the last dimension: [..., d] -> [..., width]."""

    width: int

    def __init__(self, d: int):
        super().__init__()
        self.width = d


class EluFeatures(FeatureMap):
    """1 + elu(x), positive (Katharopoulos et al. 2020)."""

    def forward(self, x: Tensor) -> Tensor:
        # Not 1 + F.elu(x): it rounds exp(x) to an absolute 1e-7, and torch 2.13 traces its backward with wrong strides.
        return F.relu(x) + x.clamp(max=0).exp()


class ReluFeatures(FeatureMap):
    """relu(x) (Kasai et al. 2021)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


class SoftmaxFeatures(FeatureMap):
    """softmax over a token's own features, which sum to one (Shen et al. 2021)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(-1)


class TaylorFeatures(FeatureMap):
    """phi(q) . phi(k) = 1 + s + s^2 / 2 with s = q . k / sqrt(d), the second-order series of exp (Arora et al.
    2024)."""

    def __init__(self, d: int):
        super().__init__(d)
        self.width = 1 + d + d * d

    def forward(self, x: Tensor) -> Tensor:
        x = x * x.shape[-1] ** -0.25
        square = (x[..., :, None] * x[..., None, :]).flatten(-2) / sqrt(2)
        return torch.cat([torch.ones_like(x[..., :1]), x, square], -1)


FEATURE_MAPS: dict[str, type[FeatureMap]] = {
    "elu": EluFeatures,
    "relu": ReluFeatures,
    "softmax": SoftmaxFeatures,
    "taylor": TaylorFeatures,
}
assert set(FEATURE_MAPS) == set(get_args(FeatureMapName))
