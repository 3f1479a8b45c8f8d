"""Mixture of experts: each token is served by a few of many feed-forward networks."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.errors import UserError
from subquad.kernels.grouped_mlp import grouped_mlp
from subquad.kernels.packing import mask_padding
from subquad.kernels.state import accumulator_dtype
from subquad.kernels.wrapping import full_precision
from subquad.layers.base import Card
from subquad.layers.mlp import FeedForward, SwiGLU, hidden_width


class MoE(FeedForward):
    """A mixture of SwiGLU experts, dropless (Shazeer et al. 2017, arXiv:1701.06538; Jiang et al. 2024,
    arXiv:2401.04088).

    p = softmax(router(x)) in float32;  y = sum over the top_k of p_e expert_e(x)  + shared experts(x)

    Cost: train and decode O(D F top_k) a token, no state.

    Arguments
        n_experts, top_k. expand or d_ff: width F of one expert. renormalize: the top_k weights sum to one (Mixtral).
        n_shared: experts that serve every token, as one SwiGLU of n_shared * F (DeepSeekMoE, arXiv:2401.06066).
        balance_loss: weight of the load-balance loss n_experts * sum_e f_e P_e (Fedus et al. 2021, arXiv:2101.03961; 1
            at perfect balance), where f_e is the share of the assignments and P_e the mean router probability.

    In training mode, with a `shared` dict, the layer adds "loss/balance.<layer>" (weighted, a scalar),
    "log/router_entropy.<layer>" (nats) and "log/router_load_max.<layer>" (the busiest expert's share times n_experts).
    Rows of padding count in none of them.
    """

    card = Card("Shazeer et al. 2017, arXiv:1701.06538", "grouped_mlp", "O(T D F k)", "O(D F k)", "0")
    causality = "regrouped"
    discrete = True

    def __init__(
        self,
        d_model: int,
        *,
        n_experts: int = 8,
        top_k: int = 2,
        expand: float = 8 / 3,
        d_ff: int | None = None,
        n_shared: int = 0,
        renormalize: bool = True,
        balance_loss: float = 0.01,
        layer_idx: int = 0,
    ):
        super().__init__()
        if not 1 <= top_k <= n_experts:
            raise UserError(f"MoE: top_k is {top_k}; it must lie between 1 and n_experts {n_experts}")
        d_ff = hidden_width(d_model, expand, d_ff)
        self.n_experts, self.top_k, self.renormalize = n_experts, top_k, renormalize
        self.balance_loss, self.layer_idx = balance_loss, layer_idx
        self.router = nn.Linear(d_model, n_experts, bias=False)
        self.experts = Experts(n_experts, d_model, d_ff)
        self.shared_experts = SwiGLU(d_model, d_ff=n_shared * d_ff) if n_shared else None

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: Any = None,
        cu_seqlens: Int[Tensor, "M"] | None = None,
        shared: dict[str, Any] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Any]:
        tokens = x.flatten(0, 1)
        with full_precision(x):
            wide = accumulator_dtype(x.dtype)
            p = (tokens.to(wide) @ self.router.weight.to(wide).T).softmax(-1)
        weight, expert = p.topk(self.top_k, -1)
        if self.renormalize:
            weight = weight / weight.sum(-1, keepdim=True)
        if shared is not None and self.training:
            self._share(shared, p, expert, cu_seqlens)
        y = grouped_mlp(tokens, expert, weight, self.experts.gate_up, self.experts.down).view_as(x)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)[0]
        return mask_padding(y, cu_seqlens), state

    def _share(self, shared: dict[str, Any], p: Tensor, expert: Tensor, cu_seqlens: Tensor | None) -> None:
        """Add the balance loss and what shows the router's health."""
        real = torch.ones_like(p[:, :1])
        if cu_seqlens is not None:
            real = mask_padding(real[None], cu_seqlens)[0]
        total = real.sum().clamp(min=1)
        chosen = torch.zeros_like(p).scatter_add(1, expert, torch.ones_like(p[:, : self.top_k]))
        share = (chosen * real).sum(0) / (total * self.top_k)
        mean_p = (p * real).sum(0) / total
        shared[f"loss/balance.{self.layer_idx}"] = self.balance_loss * self.n_experts * (share * mean_p).sum()
        entropy = -(p * p.clamp(min=1e-30).log() * real).sum() / total
        shared[f"log/router_entropy.{self.layer_idx}"] = entropy.detach()
        shared[f"log/router_load_max.{self.layer_idx}"] = self.n_experts * share.max().detach()


class Experts(nn.Module):
    """The experts' weights, stacked: gate_up [E, 2 F, D] (gate first) and down [E, D, F]."""

    def __init__(self, n_experts: int, d_model: int, d_ff: int):
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(n_experts, 2 * d_ff, d_model))
        self.down = nn.Parameter(torch.empty(n_experts, d_model, d_ff))
        self.init_weights((2 / (5 * d_model)) ** 0.5, 1.0)

    def init_weights(self, std: float, depth_scale: float) -> None:
        """Normal weights; those into the residual stream are scaled with the model's depth."""
        nn.init.normal_(self.gate_up, std=std)
        nn.init.normal_(self.down, std=std * depth_scale)
