"""Softmax attention to the query's own block and to the earlier blocks whose mean key fits it best."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subquad.errors import UserError
from subquad.kernels.backend import pick, register
from subquad.kernels.packing import advance, mask_padding
from subquad.kernels.patterns import LocalBlocks, SparsePattern
from subquad.kernels.selected_blocks import Blocks, chosen_pieces, each_sequence, held_tokens, masked_softmax
from subquad.kernels.sparse_attention import part_piece
from subquad.kernels.state import Append, Count, accumulator_dtype
from subquad.kernels.tiles import Rows, joined
from subquad.kernels.wrapping import full_precision, sequence_op


class TopKCache(NamedTuple):
    """Keys and values of every token, and the mean key of every complete block."""

    k: Append  # [N, S, G, K]
    v: Append  # [N, S, G, V]
    mean: Append  # [N, ceil(S / block), G, K]
    count: Count  # [N]


@sequence_op
def topk_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    *,
    block: int,
    top_k: int,
    state: TopKCache | None = None,
    cu_seqlens: Int[Tensor, "M"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], TopKCache | None]:
    """o_t = sum_s softmax_s(q_t . k_s) v_s over s <= t in t's block and in top_k - 1 earlier ones (Lu et al. 2025,
    arXiv:2502.13189), those of the largest q_t . mean(k) for each head   (q is not scaled).

    The choice itself has no gradient. q: H heads; k, v: G heads, where G divides H.

    Returns (o [B, T, H, V], the new state or None).
    Cost: O(T top_k block H K) and T / block inner products a token to choose; a decoded token O((S / block + top_k
    block) H K); state 2 S G K (1 + 1 / (2 block)).
    """
    if block < 1 or top_k < 1:
        raise UserError(f"topk_attention: block and top_k must be at least 1; got {block} and {top_k}")
    if q.shape[2] % k.shape[2]:
        raise UserError(f"topk_attention: {k.shape[2]} key heads do not divide {q.shape[2]} query heads")
    if cu_seqlens is not None:
        q, k, v = (mask_padding(x, cu_seqlens) for x in (q, k, v))
    form = pick("topk_attention", _FORMS, q)
    with full_precision(q):
        out, caches = form(q, k, v, block, top_k, state, cu_seqlens)
    if state is None:
        return out, None
    return out, TopKCache(*caches, advance(state.count, q.shape[1], cu_seqlens))


def _naive(q, k, v, block, top_k, state, cu_seqlens):
    def attend(q, _k, _v, keys, values, means, begin):
        repeat = q.shape[1] // keys.shape[1]
        keys, values, mean = (x.repeat_interleave(repeat, 1) for x in (keys, values, means[0].detach()))
        rows, block_of = [], torch.arange(len(keys), device=q.device) // block
        for i, t in enumerate(range(begin, begin + len(q))):
            earlier = torch.einsum("hk,bhk->hb", q[i].detach().to(mean.dtype), mean[: t // block])
            best = earlier.topk(min(top_k - 1, t // block)).indices
            seen = (block_of == t // block) | (best[..., None] == block_of).any(1)
            mask = seen & (torch.arange(len(keys), device=q.device) <= t)
            rows.append(
                torch.einsum("hs,shv->hv", masked_softmax(torch.einsum("hk,shk->hs", q[i], keys), mask), values)
            )
        return torch.stack(rows) if rows else values.new_zeros(0, q.shape[1], values.shape[2])

    return each_sequence([q, k, v], state, 1, block, cu_seqlens, attend)


def _gathered(q, k, v, block, top_k, state, cu_seqlens):
    (B, T, H, _), G = q.shape, k.shape[2]
    wide = accumulator_dtype(q.dtype)
    rows = Rows(B, T, None if state is None else state.count, cu_seqlens, q.device)
    source, caches = held_tokens(rows, k, v, None if state is None else state[:2])
    blocks = Blocks(rows, block, source, None if state is None else state.mean.shape[1])
    mean, written = blocks.means(source.k, None if state is None else state.mean)
    caches = [*caches, written]
    queries = q.flatten(0, 1).to(wide)
    own = SparsePattern((LocalBlocks(block),))
    pieces = [part_piece(rows, queries, source, own, own.parts[0], (), list(range(H)), G, 0)]
    kv_heads = torch.arange(H, device=q.device) // (H // G)
    means = blocks.by_row(mean.detach().to(wide), B)[:, :, kv_heads]
    scores = torch.einsum("bthk,bnhk->bhtn", queries.detach().unflatten(0, (B, T)), means)
    of_sequence, before = blocks.visible(B)
    scores = scores.masked_fill(~(of_sequence & (before > 0))[:, None], -torch.inf)
    best, chosen = scores.topk(min(top_k - 1, scores.shape[-1]))
    chosen = torch.where(best > -torch.inf, blocks.flat(chosen), -1).transpose(1, 2).flatten(0, 1)  # [R, H, n]
    pieces += chosen_pieces(queries[:, :, None], chosen, blocks, kv_heads)
    return mask_padding(joined(pieces).to(q.dtype).unflatten(0, (B, T)), cu_seqlens), caches


_FORMS = register("topk_attention", naive=_naive, torch=_gathered)
