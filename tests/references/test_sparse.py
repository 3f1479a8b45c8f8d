"""Sparse attention gives transformers' numbers (Longformer, BigBird with its block table, Reformer's local layer),
native sparse attention gives fla's."""

from dataclasses import dataclass, field

import pytest
import torch
import transformers
from fla.ops.nsa.naive import naive_nsa_compression, naive_nsa_selection, naive_nsa_topk
from torch import nn
from transformers.models.big_bird import modeling_big_bird
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention
from transformers.models.reformer.modeling_reformer import LocalSelfAttention

from subquad.kernels.examples import relative_error
from subquad.kernels.native_sparse_attention import native_sparse_attention
from subquad.kernels.patterns import GlobalTokens, LocalBlocks, RandomBlocks, SparsePattern
from subquad.layers import SparseAttention

TOLERANCE = 1e-5  # float32
D, H = 48, 4


def ours_like(theirs: nn.Module, **arguments) -> SparseAttention:
    """A layer with their query, key and value projections and nothing after."""
    ours = SparseAttention(D, n_heads=H, rope_theta=None, bias=theirs.query.bias is not None, **arguments)
    for name in ("query", "key", "value"):
        getattr(ours, f"{name[0]}_proj").load_state_dict(getattr(theirs, name).state_dict())
    ours.o_proj.weight = nn.Parameter(torch.eye(D))
    return ours


@torch.no_grad()
def test_longformer():
    window, n_global, time = 8, 3, 40
    config = transformers.LongformerConfig(hidden_size=D, num_attention_heads=H, attention_window=[2 * window])
    theirs = LongformerSelfAttention(config, 0).eval()
    for name in ("query", "key", "value"):  # it projects global queries apart; ours are the same
        getattr(theirs, f"{name}_global").load_state_dict(getattr(theirs, name).state_dict())
    x = torch.randn(2, time * 2, D)
    first = (torch.arange(2 * time) < n_global).expand(2, -1)
    expected = theirs(
        x,
        attention_mask=torch.where(first, 10000.0, 0.0),
        is_index_masked=torch.zeros_like(first),
        is_index_global_attn=first,
        is_global_attn=True,
    )[0]
    pattern = {"name": "longformer", "window": window + 1, "n_global": n_global}
    assert relative_error(ours_like(theirs, pattern=pattern, causal=False)(x)[0], expected) < TOLERANCE


@dataclass(frozen=True)
class Table(RandomBlocks):
    """Random blocks by a given table [H, blocks, n_blocks]."""

    table: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        """The table is no number to check."""

    def draw(self, head, query_block, causal):
        head, query_block = torch.broadcast_tensors(head, query_block)
        return self.table[head, query_block.clamp(max=self.table.shape[1] - 1)]


@torch.no_grad()
def test_bigbird(monkeypatch):
    """Its last block, which is global as well, is masked, so that the sequence ends before it."""
    block, blocks, n_random = 4, 12, 2
    config = transformers.BigBirdConfig(
        hidden_size=D, num_attention_heads=H, block_size=block, num_random_blocks=n_random, max_position_embeddings=64
    )
    theirs = modeling_big_bird.BigBirdBlockSparseAttention(config, seed=0).eval()
    table = torch.full((H, blocks, n_random), -1)
    for h in range(H):
        for i in range(1, blocks - 1):  # theirs counts a block twice that is drawn from the window or the first
            far = torch.tensor([j for j in range(1, blocks - 1) if abs(i - j) > 1])
            table[h, i] = far[torch.randperm(len(far))[:n_random]]
    drawn = [t[1:-1].numpy() for t in table]
    monkeypatch.setattr(theirs, "_bigbird_block_rand_mask_with_head", lambda **kwargs: drawn)
    time = block * blocks
    x = torch.randn(2, time, D)
    mask = (torch.arange(time) < time - block).float().expand(2, -1)
    blocked, band, rows, columns = modeling_big_bird.BigBirdModel.create_masks_for_block_sparse_attn(mask, block)
    expected = theirs(x, band, rows, columns, blocked, blocked)[0][:, :-block]
    parts = (LocalBlocks(block, 1), GlobalTokens(block), Table(block, n_random, blocks, table=table[:, :-1]))
    ours = ours_like(theirs, causal=False)
    ours.pattern = SparsePattern(parts, causal=False)
    assert relative_error(ours(x[:, :-block])[0], expected) < TOLERANCE


@torch.no_grad()
def test_reformers_local_layer():
    config = transformers.ReformerConfig(
        hidden_size=D,
        num_attention_heads=H,
        attention_head_size=D // H,
        local_attn_chunk_length=8,
        local_num_chunks_before=2,
        local_num_chunks_after=0,
        is_decoder=True,
    )
    theirs = LocalSelfAttention(config).eval()
    x = torch.randn(2, 48, D)
    ours = ours_like(theirs, pattern={"name": "local_blocks", "block": 8, "n_before": 2})
    assert relative_error(ours(x)[0], theirs(x).hidden_states) < TOLERANCE


@pytest.mark.parametrize("branch", [0, 1])
@torch.no_grad()
def test_native_sparse_attention(branch):
    """Its compressed and its selected branch, each under a gate of its own."""
    B, T, heads, G, K, block, top_k = 2, 96, 8, 2, 12, 8, 5
    q, k, v = (torch.randn(B, T, n, K) for n in (heads, G, G))
    mean_k, mean_v = (x.unflatten(1, (-1, block)).mean(2) for x in (k, v))
    if branch == 0:
        expected, _ = naive_nsa_compression(q, mean_k, mean_v, block, 1.0)
    else:
        chosen = naive_nsa_topk(q, mean_k, top_k, block, 1.0)
        expected = naive_nsa_selection(q, k, v, torch.where(chosen < 0, T, chosen), block, 1.0)  # beyond: unread
    gates = torch.zeros(B, T, heads, 3)
    gates[..., branch] = 1
    out, _ = native_sparse_attention(q, k, v, gates, block=block, top_k=top_k, window=4)
    assert relative_error(out, expected) < TOLERANCE
