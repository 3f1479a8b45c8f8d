"""Native sparse attention: block means, chosen blocks and a window, weighed by gates."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subquad.errors import UserError
from subquad.kernels.backend import pick, register
from subquad.kernels.packing import advance, mask_padding
from subquad.kernels.patterns import SparsePattern, Window
from subquad.kernels.selected_blocks import Blocks, chosen_pieces, each_sequence, held_tokens, masked_softmax
from subquad.kernels.sparse_attention import part_piece
from subquad.kernels.state import Append, Count, accumulator_dtype
from subquad.kernels.tiles import Rows, Tiles, joined, piece
from subquad.kernels.wrapping import full_precision, sequence_op

TILE = 64  # queries of a packed row that share the means they fetch
FORCED = 3  # the first block, the one before the query's and the query's own are always read


class NSACache(NamedTuple):
    """Keys and values of every token, which chosen blocks and window read, and the means of every complete block."""

    k: Append  # [N, S, G, K]
    v: Append  # [N, S, G, V]
    mean_k: Append  # [N, ceil(S / block), G, K]
    mean_v: Append  # [N, ceil(S / block), G, V]
    count: Count  # [N]


@sequence_op
def native_sparse_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    gates: Float[Tensor, "B T H 3"],
    *,
    block: int,
    top_k: int,
    window: int,
    state: NSACache | None = None,
    cu_seqlens: Int[Tensor, "M"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], NSACache | None]:
    """o_t = g1 compressed_t + g2 selected_t + g3 window_t (Yuan et al. 2025, arXiv:2502.11089)   (q is not scaled).

    compressed: softmax over the mean keys and values of the complete blocks up to t. selected: softmax over s <= t in
    top_k blocks: the first, the previous and the own one, and those of the largest compressed probability, averaged
    over the query heads that share a key head. window: softmax over the last `window` tokens. Where a branch has
    nothing to read it gives zero. The choice of blocks has no gradient.

    Returns (o [B, T, H, V], the new state or None).
    Cost: O(T (T / block + top_k block + window) H K); a decoded token O((S / block + top_k block + window) H K);
    state 2 S G K (1 + 1 / block).
    """
    if block < 1 or window < 1 or top_k < FORCED:
        raise UserError(
            f"native_sparse_attention: block and window must be at least 1 and top_k at least {FORCED}; got {block}, "
            f"{window} and {top_k}"
        )
    if q.shape[2] % k.shape[2]:
        raise UserError(f"native_sparse_attention: {k.shape[2]} key heads do not divide {q.shape[2]} query heads")
    if cu_seqlens is not None:
        q, k, v, gates = (mask_padding(x, cu_seqlens) for x in (q, k, v, gates))
    form = pick("native_sparse_attention", _FORMS, q)
    with full_precision(q):
        out, caches = form(q, k, v, gates, block, top_k, window, state, cu_seqlens)
    if state is None:
        return out, None
    return out, NSACache(*caches, advance(state.count, q.shape[1], cu_seqlens))


def _naive(q, k, v, gates, block, top_k, window, state, cu_seqlens):
    def attend(q, _k, _v, gates, keys, values, means, begin):
        (T, H), G = q.shape[:2], keys.shape[1]
        keys, values = (x.repeat_interleave(H // G, 1) for x in (keys, values))
        mean_k, mean_v = (x.to(q.dtype).repeat_interleave(H // G, 1) for x in means)
        at, rows = torch.arange(len(keys), device=q.device), []
        for i, t in enumerate(range(begin, begin + T)):
            done, own = (t + 1) // block, t // block
            probability = torch.einsum("hk,bhk->hb", q[i], mean_k[:done]).softmax(-1)
            compressed = torch.einsum("hb,bhv->hv", probability, mean_v[:done])
            weight = q.new_zeros(G, own + 1)
            weight[:, :done] = probability.detach().unflatten(0, (G, H // G)).mean(1)
            weight[:, [0, max(own - 1, 0), own]] = 2.0  # more than any probability
            best = weight.topk(min(top_k, own + 1)).indices.repeat_interleave(H // G, 0)
            scores = torch.einsum("hk,shk->hs", q[i], keys)
            chosen = (best[..., None] == at // block).any(1) & (at <= t)
            near = ((at <= t) & (at > t - window)).expand_as(chosen)
            selected, windowed = (torch.einsum("hs,shv->hv", masked_softmax(scores, m), values) for m in (chosen, near))
            rows.append((gates[i, :, None] * torch.stack([compressed, selected, windowed], -1)).sum(-1))
        return torch.stack(rows) if rows else values.new_zeros(0, H, values.shape[2])

    return each_sequence([q, k, v, gates], state, 2, block, cu_seqlens, attend)


def _gathered(q, k, v, gates, block, top_k, window, state, cu_seqlens):
    (B, T, H, _), G = q.shape, k.shape[2]
    wide = accumulator_dtype(q.dtype)
    rows = Rows(B, T, None if state is None else state.count, cu_seqlens, q.device)
    source, caches = held_tokens(rows, k, v, None if state is None else state[:2])
    blocks = Blocks(rows, block, source, None if state is None else state.mean_k.shape[1])
    mean_k, written_k = blocks.means(source.k, None if state is None else state.mean_k)
    mean_v, written_v = blocks.means(source.v, None if state is None else state.mean_v)
    caches = [*caches, written_k, written_v]
    queries = q.flatten(0, 1).to(wide)
    compressed, probability = _compressed(queries, blocks, mean_k.to(wide), mean_v.to(wide), B, G)

    index, own = torch.arange(blocks.most, device=q.device), (rows.position // block)[:, None]
    forced = (index == 0) | (index == own - 1) | (index == own)
    weight = torch.where(forced[:, None], 2.0, probability)  # more than any probability
    weight = weight.masked_fill((index > own)[:, None], -1.0)
    best, chosen = weight.topk(min(top_k, blocks.most))
    chosen = torch.where(best >= 0, blocks.begins[rows.sequence][:, None, None] + chosen, -1)  # [R, G, n]
    grouped = queries.unflatten(1, (G, -1))
    selected = joined(chosen_pieces(grouped, chosen, blocks, torch.arange(G, device=q.device)))

    near = SparsePattern((Window(window),))
    windowed = joined([part_piece(rows, queries, source, near, near.parts[0], (), list(range(H)), G, 0)])
    weights = gates.flatten(0, 1).to(wide)[:, :, None]
    out = (weights * torch.stack([compressed, selected, windowed], -1)).sum(-1)
    return mask_padding(out.to(q.dtype).unflatten(0, (B, T)), cu_seqlens), caches


def _compressed(queries, blocks, mean_k, mean_v, batch, groups):
    """(softmax over the means of complete blocks [R, H, V], its probabilities averaged over groups [R, G, n])."""
    rows, index = blocks.rows, torch.arange(blocks.most, device=queries.device)
    if rows.packed:  # tiles of one sequence each, so that no product holds two
        tiles = Tiles(rows, TILE)
        lanes, position = tiles.take(queries), tiles.position
        at = (blocks.begins[tiles.sequence][:, None] + index).clamp(max=len(mean_k) - 1)
        # Past a sequence's blocks comes the next one's, whose means must not be multiplied by zero.
        held = ((index + 1) * blocks.size <= rows.end[tiles.sequence][:, None])[..., None, None]
        means = [torch.where(held, x.index_select(0, at.flatten()).unflatten(0, at.shape), 0) for x in (mean_k, mean_v)]
    else:
        lanes, position, *means = (x.unflatten(0, (batch, -1)) for x in (queries, rows.position, mean_k, mean_v))
    q = lanes.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)  # [M, G, H/G, C, K]
    means = [x.transpose(1, 2)[:, :, None] for x in means]
    mask = ((index + 1) * blocks.size <= position[..., None] + 1)[:, None, None]
    found = piece(q, *means, mask)
    with torch.no_grad():
        scores = (q @ means[0].mT).masked_fill(~mask, -torch.inf)
        share = ((scores - found.top).exp() / found.total.clamp(min=1e-30)).mean(2)
    parts = joined([found]).permute(0, 3, 1, 2, 4).flatten(2, 3), share.transpose(1, 2)
    return tuple(tiles.back(x, 0.0) if rows.packed else x.flatten(0, 1) for x in parts)


_FORMS = register("native_sparse_attention", naive=_naive, torch=_gathered)
