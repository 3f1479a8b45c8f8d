"""Mixture of experts: each token is served by a few of many feed-forward networks."""

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.errors import UserError
from subquad.kernels.grouped_mlp import GateName, grouped_mlp
from subquad.kernels.packing import mask_padding
from subquad.layers.base import Card, autocast_dtype, available_if
from subquad.layers.mlp import FeedForward, SwiGLU, hidden_width
from subquad.layers.routers import Router, choose_tokens, router_report


class MoE(FeedForward):
    """A mixture of SwiGLU experts, dropless (Shazeer et al. 2017, arXiv:1701.06538; Jiang et al. 2024,
    arXiv:2401.04088).

    s = softmax(router(x)) in float32;  y = sum over the top_k of s_e expert_e(x)  + shared experts(x)

    Cost: train and decode O(D F top_k) a token, no state.

    Arguments
        n_experts, top_k. expand or d_ff: width F of one expert.
        gate: "silu", or gpt-oss's "clamped" (grouped_mlp says how). bias: on the router and the experts.
        score: "softmax" or "sigmoid" of the router's logits. renormalize: the top_k weights sum to one (Mixtral); with
            "softmax" that is gpt-oss's softmax over the top_k logits too. scale: factor on the weights after that.
        n_groups, top_groups, group_score: each token takes its experts from the top_groups best of n_groups groups; a
            group's score is its best expert's ("max", DeepSeek-V2) or the sum of its best two ("top2", DeepSeek-V3).
        n_shared: experts that serve every token, as one SwiGLU of n_shared * F (DeepSeekMoE, arXiv:2401.06066);
            shared_gate: times sigmoid of a learned projection of x (Qwen2-MoE).
        balance_loss: weight of the load-balance loss n_experts * sum_e f_e P_e (Fedus et al. 2021, arXiv:2101.03961; 1
            at perfect balance), where f_e is the share of the assignments and P_e the mean score, normalised.
        balance_rate: balance without a loss (Wang et al. 2024, arXiv:2408.15664): a bias an expert, added to the scores
            for the choice only, that moves by this much after each optimiser step (`routers.update_balance_biases`).
        z_loss: weight of mean(logsumexp(logits)^2) (Zoph et al. 2022, arXiv:2202.08906).
        routing: "expert_choice": every expert takes the ceil(T capacity_factor / n_experts) tokens of each sequence
            that score highest, with their scores as weights (Zhou et al. 2022, arXiv:2202.09368). It reads the whole
            sequence, so it is for encoders: causal is False and there is no decoding. It is balanced as it is:
            renormalize, groups and balance do not apply. capacity_factor: experts a token has on average; top_k by
            default.

    In training mode, with a `shared` dict, the layer adds "loss/balance.<layer>" and "loss/router_z.<layer>" (weighted
    scalars), "log/router_entropy.<layer>" (nats), "log/router_load_max.<layer>" and "log/router_load_min.<layer>" (the
    busiest and the idlest expert's share times n_experts), and with balance_rate "router_load.<layer>" [E], which
    `routers.count_loads` takes. Rows of padding count in none of them.
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
        gate: GateName = "silu",
        bias: bool = False,
        score: Literal["softmax", "sigmoid"] = "softmax",
        renormalize: bool | None = None,
        scale: float = 1.0,
        n_groups: int = 1,
        top_groups: int = 1,
        group_score: Literal["max", "top2"] = "top2",
        n_shared: int = 0,
        shared_gate: bool = False,
        balance_loss: float | None = None,
        balance_rate: float = 0.0,
        z_loss: float = 0.0,
        routing: Literal["token_choice", "expert_choice"] = "token_choice",
        capacity_factor: float | None = None,
        layer_idx: int = 0,
    ):
        super().__init__()
        d_ff = hidden_width(self, d_model, expand, d_ff)
        self.causal = routing == "token_choice"
        if not self.causal and (renormalize or balance_loss or balance_rate or n_groups > 1):
            raise UserError("MoE: expert_choice takes no renormalize, n_groups, balance_loss or balance_rate")
        if self.causal and capacity_factor is not None:
            raise UserError(f"MoE: capacity_factor {capacity_factor} is for routing expert_choice; top_k counts here")
        if capacity_factor is not None and not 0 < capacity_factor <= n_experts:
            raise UserError(f"MoE: capacity_factor is {capacity_factor}; it must lie in (0, n_experts {n_experts}]")
        if gate != "silu" and n_shared:
            raise UserError(f'MoE: shared experts have the gate "silu"; n_shared is {n_shared} and gate "{gate}"')
        if shared_gate and not n_shared:
            raise UserError("MoE: shared_gate needs shared experts; n_shared is 0")
        self.capacity_factor = capacity_factor or float(top_k)
        self.balance_loss = (0.01 if balance_loss is None else balance_loss) if self.causal else 0.0
        self.z_loss, self.scale = z_loss, scale
        self.router = Router(
            d_model,
            n_experts,
            top_k,
            score=score,
            renormalize=renormalize is not False and self.causal,
            scale=scale,
            n_groups=n_groups,
            top_groups=top_groups,
            group_score=group_score,
            balance_rate=balance_rate,
            layer_idx=layer_idx,
            bias=bias,
        )
        self.experts = Experts(n_experts, d_model, d_ff, gate, bias)
        self.shared_experts = SwiGLU(d_model, d_ff=n_shared * d_ff, bias=bias) if n_shared else None
        self.shared_gate = nn.Linear(d_model, 1, bias=False) if shared_gate else None

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: Any = None,
        cu_seqlens: Int[Tensor, "M"] | None = None,
        shared: dict[str, Any] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Any]:
        tokens = x.flatten(0, 1)
        router = next(part for part in self.router.modules() if isinstance(part, Router))  # an adapter may wrap it
        logits = self.router(tokens)
        scores = router.scores(logits)
        tokens = tokens.to(autocast_dtype(x.device) or x.dtype)  # the experts' products are a projection's
        if self.causal:
            choice = router.choose(scores)
            y = self.experts(tokens, choice.expert, choice.weight)
        else:
            if state is not None:
                raise UserError("MoE: expert_choice reads the whole sequence at once and cannot go on from a state")
            choice = choose_tokens(scores, self.capacity_factor, x.shape[1], cu_seqlens)
            served = self.experts(tokens[choice.token], choice.expert, self.scale * choice.weight)
            y = torch.zeros_like(tokens).index_add(0, choice.token, served.to(tokens.dtype))
        y = y.view_as(x)
        if shared is not None and self.training:
            real = mask_padding(torch.ones_like(scores[None, :, :1]), cu_seqlens)[0]
            shared |= router_report(router, logits, scores, choice, real, self.balance_loss, self.z_loss)
        if self.shared_experts is not None:
            extra = self.shared_experts(x)[0]
            y = y + (extra if self.shared_gate is None else self.shared_gate(x).sigmoid() * extra)
        return mask_padding(y, cu_seqlens), state

    @available_if(lambda self: self.causal, "expert_choice reads the whole sequence at once")
    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> tuple[()]:
        """Nothing is carried."""
        return ()


class Experts(nn.Module):
    """The experts' weights, stacked: gate_up [E, 2 F, D] (gate first) and down [E, D, F], with biases or without."""

    def __init__(self, n_experts: int, d_model: int, d_ff: int, gate: GateName, bias: bool):
        super().__init__()
        self.gate: GateName = gate
        self.gate_up = nn.Parameter(torch.empty(n_experts, 2 * d_ff, d_model))
        self.down = nn.Parameter(torch.empty(n_experts, d_model, d_ff))
        self.gate_up_bias = nn.Parameter(torch.zeros(n_experts, 2 * d_ff)) if bias else None
        self.down_bias = nn.Parameter(torch.zeros(n_experts, d_model)) if bias else None
        self.init_weights((2 / (5 * d_model)) ** 0.5, 1.0)

    def forward(self, x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        biases = {"gate_up_bias": self.gate_up_bias, "down_bias": self.down_bias}
        return grouped_mlp(x, expert, weight, self.gate_up, self.down, **biases, gate=self.gate)

    def init_weights(self, std: float, depth_scale: float) -> None:
        """Normal weights; those into the residual stream are scaled with the model's depth."""
        nn.init.normal_(self.gate_up, std=std)
        nn.init.normal_(self.down, std=std * depth_scale)
