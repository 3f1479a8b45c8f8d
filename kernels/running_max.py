"""The running maximum of a decaying quantity: what keeps the exponential gates of mLSTM and RWKV-4 finite."""

import torch
from torch import Tensor

from subquad.errors import UserError
from subquad.kernels.backend import pick, register
from subquad.kernels.packing import Chunks
from subquad.kernels.state import accumulator_dtype, commit
from subquad.kernels.wrapping import by_sequence, full_precision, sequence_op


@sequence_op
def running_max(
    f: Tensor, i: Tensor, *, initial: float = 0.0, state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """m_t = max(m_{t-1} + f_t, i_t), elementwise.

    f: log forget gates, i: log input gates, [B, T, ...] of one shape, finite. state: m [N, ...]; None starts from
    `initial`, which must be finite: exponentials of differences against -inf are NaN.
    Returns (every m_t [B, T, ...] in at least float32, the new state or None). Differentiable in f, i and the state.
    Cost: O(T D).
    """
    if f.shape != i.shape:
        raise UserError(f"running_max: f {tuple(f.shape)} and i {tuple(i.shape)} must have one shape")
    form = pick("running_max", _FORMS, f if f.dtype == torch.float64 else i)
    with full_precision(i):
        n_seqs = i.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        dtype = accumulator_dtype(torch.promote_types(f.dtype, i.dtype))
        m0 = i.new_full((n_seqs, *i.shape[2:]), initial, dtype=dtype) if state is None else state
        m, last = form(f, i, m0, cu_seqlens)
    return m, None if state is None else commit(state, last)


def _in_full(form):
    """A form in plain torch, in the accumulator's dtype."""

    def run(f, i, m0, cu_seqlens):
        dtype = accumulator_dtype(torch.promote_types(f.dtype, i.dtype))
        return form(f.to(dtype), i.to(dtype), m0.to(dtype), cu_seqlens)

    return run


def _naive(f, i, m, cu_seqlens):
    if cu_seqlens is not None:
        return by_sequence(lambda f, i, m: _naive(f, i, m, None), [f, i], [m], cu_seqlens)
    outs = []
    for t in range(i.shape[1]):
        m = torch.maximum(m + f[:, t], i[:, t])
        outs.append(m)
    return torch.stack(outs, 1) if outs else i, m


def _torch(f, i, m0, cu_seqlens):
    """Rows of about sqrt(T) tokens side by side, each from its own first input; then what each receives from before.

    No sum is longer than a row, so nothing is lost however long the sequence is.
    """
    if i.shape[1] <= 1 and cu_seqlens is None:
        return _naive(f, i, m0, None)
    chunks = Chunks(i, max(8, round(i.shape[1] ** 0.5)), cu_seqlens)
    f, i = chunks.split(f), chunks.split(i)
    rows = [i[:, :, 0]]
    for f_t, i_t in zip(f.unbind(2)[1:], i.unbind(2)[1:], strict=True):
        rows.append(torch.maximum(rows[-1] + f_t, i_t))
    within, decay = torch.stack(rows, 2), f.cumsum(2)
    total, peak = decay[:, :, -1].unbind(1), rows[-1].unbind(1)
    before, _ = chunks.carry(m0, lambda c, m: torch.maximum(m + total[c], peak[c]))
    m = chunks.join(torch.maximum(before[:, :, None] + decay, within))
    # Read at the last token: what a filled-up chunk carries counts its filling as tokens.
    if cu_seqlens is None:
        return m, m[:, -1]
    lengths = cu_seqlens.diff()
    ends = m[0].index_select(0, (cu_seqlens[1:].long() - 1).clamp(min=0)) if m.shape[1] else m0
    return m, torch.where((lengths > 0).view(-1, *[1] * (m0.dim() - 1)), ends, m0)


def _triton(*args):
    from subquad.kernels.triton.running_max import form

    return form(*args)


_FORMS = register("running_max", naive=_in_full(_naive), torch=_in_full(_torch), triton=_triton)
