"""Which experts serve which token, and what keeps their loads even."""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.errors import UserError
from subquad.kernels.packing import sequence_ids
from subquad.kernels.state import accumulator_dtype
from subquad.kernels.wrapping import full_precision
from subquad.layers.base import Facts


class Choice(NamedTuple):
    """Rows of x, the experts that serve them and with which weights."""

    token: Int[Tensor, "M"] | None  # None: every row once, in order
    expert: Int[Tensor, "M k"]
    weight: Float[Tensor, "M k"]


class Router(nn.Linear):
    """Logits of E experts for every token, in at least float32; their scores, and each token's top k of them.

    s = softmax(W x) or sigmoid(W x); the k experts of largest s + balance_bias serve the token with weights s, divided
    by their sum where `renormalize` says so, times `scale`.

    n_groups: the experts lie in groups of equal size and only the `top_groups` best groups take part; a group's score
    is its best expert's ("max", DeepSeek-V2, arXiv:2405.04434) or the sum of its best two ("top2", DeepSeek-V3,
    arXiv:2412.19437). balance_rate: step of `balance_bias` in `update_balance_biases`; 0 for none.
    """

    balance_bias: Tensor | None
    facts = Facts(float32=("balance_bias",))

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: int,
        *,
        score: Literal["softmax", "sigmoid"] = "softmax",
        renormalize: bool = True,
        scale: float = 1.0,
        n_groups: int = 1,
        top_groups: int = 1,
        group_score: Literal["max", "top2"] = "top2",
        balance_rate: float = 0.0,
        layer_idx: int = 0,
        bias: bool = False,
    ):
        super().__init__(d_model, n_experts, bias=bias)
        if not 1 <= top_k <= n_experts:
            raise UserError(f"MoE: top_k is {top_k}; it must lie between 1 and n_experts {n_experts}")
        if n_groups < 1 or n_experts % n_groups:
            raise UserError(f"MoE: n_groups {n_groups} does not divide n_experts {n_experts}")
        size = n_experts // n_groups
        if not 1 <= top_groups <= n_groups or top_groups * size < top_k:
            raise UserError(
                f"MoE: top_groups is {top_groups}; of {n_groups} groups of {size} experts it must leave top_k {top_k}"
            )
        if top_groups < n_groups and group_score == "top2" and size < 2:
            raise UserError(f'MoE: group_score "top2" sums two experts a group; {n_groups} groups have {size}')
        self.top_k, self.score, self.renormalize, self.scale = top_k, score, renormalize, scale
        self.n_groups, self.top_groups, self.group_score = n_groups, top_groups, group_score
        self.balance_rate, self.layer_idx = balance_rate, layer_idx
        self.register_buffer("balance_bias", torch.zeros(n_experts) if balance_rate else None)
        self.load: Tensor | None = None  # assignments an expert since the last update; no buffer, DDP overwrites those

    def forward(self, x: Float[Tensor, "M D"]) -> Float[Tensor, "M E"]:
        """Logits alone, as a Linear's output, to which an adapter may add."""
        with full_precision(x):
            wide = accumulator_dtype(x.dtype)
            bias = None if self.bias is None else self.bias.to(wide)
            return F.linear(x.to(wide), self.weight.to(wide), bias)

    def scores(self, logits: Float[Tensor, "M E"]) -> Float[Tensor, "M E"]:
        return logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()

    def choose(self, scores: Float[Tensor, "M E"]) -> Choice:
        """Every token's top k experts."""
        if self.top_groups == self.n_groups and self.balance_bias is None:
            weight, expert = scores.topk(self.top_k, -1)
        else:
            expert = self._preferred(scores.detach()).topk(self.top_k, -1).indices
            weight = scores.gather(-1, expert)
        if self.renormalize:
            weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-20)
        return Choice(None, expert, weight if self.scale == 1.0 else weight * self.scale)

    def _preferred(self, scores: Tensor) -> Tensor:
        """What the top k are taken of: scores plus biases, -inf in groups that take no part."""
        if self.balance_bias is not None:
            scores = scores + self.balance_bias.to(scores.dtype)
        if self.top_groups == self.n_groups:
            return scores
        grouped = scores.unflatten(-1, (self.n_groups, -1))
        of_group = grouped.amax(-1) if self.group_score == "max" else grouped.topk(2, -1).values.sum(-1)
        best = of_group.topk(self.top_groups, -1).indices
        out = torch.ones_like(of_group, dtype=torch.bool).scatter(-1, best, False)
        return grouped.masked_fill(out[..., None], -torch.inf).flatten(-2)


def choose_tokens(
    scores: Float[Tensor, "M E"], capacity_factor: float, time: int, cu_seqlens: Int[Tensor, "N1"] | None
) -> Choice:
    """Each expert's ceil(T capacity_factor / E) tokens of largest score in every sequence of length T.

    Slots that no token fills have weight 0, so that shapes follow from the number of tokens and of sequences alone.
    """
    M, E = scores.shape
    if not M or (cu_seqlens is not None and cu_seqlens.numel() == 1):
        nothing = scores.new_zeros(0, 1)
        return Choice(nothing[:, 0].long(), nothing.long(), nothing)
    if cu_seqlens is None:
        cu_seqlens = torch.arange(0, M + 1, time, device=scores.device)
    cu = cu_seqlens.long()
    ids, real = sequence_ids(M, cu)
    ids = torch.where(real, ids, cu.numel() - 1)
    order = scores.detach().T.argsort(dim=-1, descending=True, stable=True)  # [E, M]
    order = order.gather(-1, ids[order].argsort(dim=-1, stable=True))  # sequences in order, best first within each
    lengths = cu.diff()
    share = lengths.double() * capacity_factor / E
    capacity = torch.minimum((share * (1 - 1e-12)).ceil().long(), lengths)  # not one more for a rounding error
    ends = capacity.cumsum(0)
    slot = torch.arange(min(M, int(M * capacity_factor / E) + cu.numel()), device=scores.device)
    sequence = torch.searchsorted(ends, slot, right=True).clamp(max=cu.numel() - 2)
    rank = slot - (ends - capacity)[sequence]
    token = order[:, (cu[sequence] + rank).clamp(max=max(M - 1, 0))]  # [E, slots]
    weight = torch.where(slot < ends[-1], scores.T.gather(-1, token), 0)
    expert = torch.arange(E, device=scores.device)[:, None].expand_as(token)
    return Choice(token.flatten(), expert.reshape(-1, 1), weight.reshape(-1, 1))


def router_report(
    router: Router, logits: Tensor, scores: Tensor, choice: Choice, real: Tensor, balance_loss: float, z_loss: float
) -> dict[str, Any]:
    """What a router shares with the model: weighted losses, its health, its loads. real [M, 1]: 0 for padding."""
    layer, E = router.layer_idx, scores.shape[-1]
    total = real.sum().clamp(min=1)
    if choice.token is None:
        chosen = torch.zeros_like(scores).scatter_add(1, choice.expert, torch.ones_like(choice.weight))
        load = (chosen * real).sum(0)
    else:
        load = (choice.weight.detach() > 0).to(scores.dtype).view(E, -1).sum(-1)
    p = scores if router.score == "softmax" else scores / scores.sum(-1, keepdim=True).clamp(min=1e-20)
    share = load / load.sum().clamp(min=1)
    entropy = -(p * p.clamp(min=1e-30).log() * real).sum() / total
    report = {
        f"log/router_entropy.{layer}": entropy.detach(),
        f"log/router_load_max.{layer}": E * share.max().detach(),
        f"log/router_load_min.{layer}": E * share.min().detach(),
    }
    if balance_loss:
        report[f"loss/balance.{layer}"] = balance_loss * E * (share * (p * real).sum(0) / total).sum()
    if z_loss:
        report[f"loss/router_z.{layer}"] = (
            z_loss * (torch.logsumexp(logits, -1, keepdim=True).square() * real).sum() / total
        )
    if router.balance_bias is not None:
        report[f"router_load.{layer}"] = load.detach()
    return report


def count_loads(model: nn.Module, shared: dict[str, Any]) -> None:
    """Add what one training forward pass shared to the loads of the model's routers.

    Called by the training loop and not by forward, which activation checkpointing runs twice.
    """
    for router in _balanced(model):
        load = shared[f"router_load.{router.layer_idx}"]
        router.load = load if router.load is None else router.load + load


@torch.no_grad()
def update_balance_biases(model: nn.Module) -> None:
    """One step of balance without a loss (Wang et al. 2024, arXiv:2408.15664), after each step of the optimiser:
    b_e += balance_rate * sign(mean load - load_e), over the loads counted since the last step in all processes."""
    for router in _balanced(model):
        if router.load is None:
            continue
        load, router.load = router.load, None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            load = load.clone()
            torch.distributed.all_reduce(load)
        router.balance_bias.add_(router.balance_rate * (load.mean() - load).sign())


def _balanced(model: nn.Module) -> list[Router]:
    return [m for m in model.modules() if isinstance(m, Router) and m.balance_bias is not None]
