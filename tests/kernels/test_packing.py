"""Packing helpers against plain loops, over random layouts with empty sequences and padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subquad import pack, unpack
from subquad.errors import UserError
from subquad.kernels.attention import attention
from subquad.kernels.packing import Chunks, Prefixed, cu_seqlens_of, positions
from subquad.kernels.short_conv import shift

layouts = st.lists(st.integers(0, 9), min_size=1, max_size=6)


@settings(deadline=None, max_examples=30)
@given(layouts, st.integers(0, 4))
def test_pack_and_unpack_are_inverse(lengths, tail):
    mask = torch.arange(max(lengths) + tail) < torch.tensor(lengths)[:, None]
    x = torch.randn(len(lengths), mask.shape[1], 3) * mask[..., None]
    row, cu = pack(x, mask)
    assert cu.tolist() == [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    assert torch.equal(unpack(row, mask), x)


def test_pack_keeps_left_padded_prompts_in_order():
    x = torch.arange(8.0).view(2, 4, 1)
    mask = torch.tensor([[False, True, True, True], [False, False, False, True]])
    row, cu = pack(x, mask)
    assert row.flatten().tolist() == [1, 2, 3, 7] and cu.tolist() == [0, 3, 4]


@pytest.mark.unchecked
def test_pack_refuses_a_mask_of_another_shape():
    with pytest.raises(UserError, match="must agree"):
        pack(torch.zeros(2, 3, 1), torch.ones(2, 4, dtype=torch.bool))


@settings(deadline=None, max_examples=30)
@given(layouts, st.integers(0, 4))
def test_positions_count_from_the_carried_count(lengths, tail):
    cu, total = cu_seqlens_of(torch.tensor(lengths)), sum(lengths)
    count = torch.arange(10, 10 + len(lengths))
    got = positions(total + tail, count, cu)[0, :total].tolist()
    assert got == [10 + n + i for n, length in enumerate(lengths) for i in range(length)]


@settings(deadline=None, max_examples=30)
@given(layouts, st.integers(0, 4), st.integers(1, 5))
def test_chunks_hold_one_sequence_each_and_join_back(lengths, tail, size):
    cu, total = cu_seqlens_of(torch.tensor(lengths)), sum(lengths)
    x = torch.randn(1, total + tail, 2)
    chunks = Chunks(x, size, cu)
    cut = chunks.split(x)
    owner = torch.repeat_interleave(torch.arange(1.0, len(lengths) + 1), torch.tensor(lengths))
    owners = chunks.split(torch.cat([owner, torch.zeros(tail)])[None, :, None])
    for chunk in owners[0, :, :, 0]:
        assert len(set(chunk[chunk > 0].tolist())) <= 1
    back = chunks.join(cut)
    assert torch.equal(back[:, :total], x[:, :total]) and (back[:, total:] == 0).all()


@settings(deadline=None, max_examples=30)
@given(layouts, st.integers(0, 3))
def test_shift_moves_each_sequence_by_one(lengths, tail):
    cu, total = cu_seqlens_of(torch.tensor(lengths)), sum(lengths)
    x, state = torch.randn(1, total + tail, 2), torch.randn(len(lengths), 1, 2)
    want, last, start = [], [], 0
    for n, length in enumerate(lengths):
        joined = torch.cat([state[n], x[0, start : start + length]])
        want.append(joined[:-1])
        last.append(joined[-1:])
        start += length
    with torch.no_grad():
        got, carried = shift(x, state=state.clone(), cu_seqlens=cu)
    assert torch.equal(got[0], torch.cat([*want, torch.zeros(tail, 2)]))
    assert torch.equal(carried, torch.stack(last))


def test_a_prefix_of_nothing_is_the_row_itself():
    x = torch.randn(1, 7, 2)
    rows = Prefixed(7, 0, torch.tensor([0, 3, 7], dtype=torch.int32))
    assert torch.equal(rows.new(rows.join(torch.zeros(2, 0, 2), x)), x)


@pytest.mark.unchecked
@pytest.mark.parametrize("cu", [torch.tensor([0.0, 3.0]), torch.tensor([3]), torch.tensor([[0, 3]])])
def test_boundaries_that_cannot_be_meant_are_refused(cu):
    with pytest.raises(UserError, match=r"cu_seqlens (is an integer vector|starts at 0)"):
        shift(torch.zeros(1, 3, 2), cu_seqlens=cu)


@pytest.mark.parametrize("pattern", [{}, {"n_sinks": 2, "window": 5}, {"causal": False}], ids=str)
def test_no_host_reads_and_nan_in_one_sequence(pattern, monkeypatch):
    """Where boundaries are not read on the host, one product holds all sequences; NaN stays in its own all the same."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    cu, generator = torch.tensor([0, 9, 20, 31], dtype=torch.int32), torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 34, 2, 8, generator=generator, dtype=torch.float64).unbind(0)
    others = [*range(9), *range(20, 31)]

    def run(*inputs):
        inputs = [x.clone().requires_grad_() for x in inputs]
        y = attention(*inputs, **pattern, cu_seqlens=cu)[0]
        gradients = torch.autograd.grad(y[:, others].square().sum(), inputs)
        return y, [y[:, others], y[:, 31:], *(g[:, others] for g in gradients)]

    want = run(q, k, v)[1]
    for i in range(3):
        bad = [x.clone() for x in (q, k, v)]
        bad[i][:, 14:20] = torch.nan
        y, got = run(*bad)
        assert y[:, 14:20].isnan().all(), "what reads NaN must be NaN"
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
