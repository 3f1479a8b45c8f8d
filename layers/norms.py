"""Norms that layers need besides torch's."""

import torch.nn.functional as F
from torch import Tensor, nn


class GroupedRMSNorm(nn.RMSNorm):
    """RMSNorm over each of `n_groups` equal parts of the width, with one weight a feature."""

    def __init__(self, width: int, n_groups: int = 1, *, eps: float = 1e-5):
        super().__init__(width, eps=eps)
        self.n_groups = n_groups

    def forward(self, x: Tensor) -> Tensor:
        if self.n_groups == 1:
            return super().forward(x)
        parts = x.unflatten(-1, (self.n_groups, -1))
        return F.rms_norm(parts, parts.shape[-1:], eps=self.eps).flatten(-2) * self.weight.to(x.dtype)


def l2_normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum x^2 + eps) over the last dimension: keys of (almost) unit length, zero for zero."""
    return x * (x.square().sum(-1, keepdim=True) + eps).rsqrt()
