"""The elementwise linear recurrence, real or complex: the core of diagonal state-space and gated recurrent layers."""

import torch
from torch import Tensor

from subquad.errors import UserError
from subquad.kernels.backend import pick, register
from subquad.kernels.operators import operator
from subquad.kernels.packing import sequence_ids
from subquad.kernels.state import accumulator_dtype, commit
from subquad.kernels.wrapping import by_sequence, full_precision, sequence_op

CACHED = 1 << 21  # bytes of a piece of one input


@sequence_op
def scan(
    a: Tensor, b: Tensor, *, state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """h_t = a_t * h_{t-1} + b_t, elementwise.

    a, b: [B, T, ...], real or complex, of one shape. state: h [N, ...]; None starts from zero.
    Returns (every h_t [B, T, ...] in b's dtype, the new state or None). Accumulates in float32 or wider.
    Cost: O(T D). Second derivatives raise.
    """
    if a.shape != b.shape:
        raise UserError(f"scan: a {tuple(a.shape)} and b {tuple(b.shape)} must have one shape")
    form = pick("scan", _FORMS, b)
    dtype = accumulator_dtype(torch.promote_types(a.dtype, b.dtype))
    with full_precision(b):
        n_seqs = b.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        h0 = b.new_zeros(n_seqs, *b.shape[2:], dtype=dtype) if state is None else state.to(dtype)
        h, last = form(a.to(dtype), b.to(dtype), h0, cu_seqlens)
    out_dtype = torch.promote_types(a.dtype, b.dtype)
    return h.to(out_dtype), None if state is None else commit(state, last)


def _naive(a, b, h, cu_seqlens):
    if cu_seqlens is not None:
        return by_sequence(lambda a, b, h: _naive(a, b, h, None), [a, b], [h], cu_seqlens)
    outs = []
    for t in range(b.shape[1]):
        h = a[:, t] * h + b[:, t]
        outs.append(h)
    return torch.stack(outs, 1) if outs else b, h


def _torch(a, b, h0, cu_seqlens):
    if b.shape[1] == 0:
        return b, h0
    if cu_seqlens is None:
        if b.shape[1] == 1:
            h = torch.addcmul(b[:, 0], a[:, 0], h0)
            return h[:, None], h
        h = _scan(a, b, h0, None)
        return h, h[:, -1]
    # A sequence's first token takes in its own state instead of what came before it in the row. That, and the state of
    # an empty sequence, is selected away: zero times another sequence's overflow would be NaN.
    time, cu = b.shape[1], cu_seqlens.long()
    ids, valid = sequence_ids(time, cu_seqlens)
    full = (slice(None),) + (None,) * (b.dim() - 2)
    nonempty = (cu.diff() > 0)[full]
    starts = cu[:-1].clamp(max=time - 1)
    carried = torch.where(nonempty, a[0, starts], 0) * torch.where(nonempty, h0, 0)
    fresh = ~valid | (torch.arange(time, device=cu.device) == cu[ids])
    b = torch.where(valid[full], b[0], 0).index_add(0, starts, carried)[None]
    h = _scan(a, b, torch.zeros_like(h0[:1]), fresh)
    h = torch.where(valid[full], h[0], 0)[None]
    last = torch.where(nonempty, h[0].index_select(0, (cu[1:] - 1).clamp(min=0)), h0)
    return h, last


@operator("scan")
def _scan(a: Tensor, b: Tensor, h0: Tensor, fresh: Tensor | None) -> Tensor:
    """The loop as one opaque operation, so that a compiler never unrolls it. `fresh` [T]: tokens that nothing precedes,
    whatever stands before them in the row."""
    return _recur(a, b, h0, fresh)


@_scan.register_fake
def _(a, b, h0, fresh):
    return torch.empty_like(b, memory_format=torch.contiguous_format)


@operator("scan_backward")
def _scan_backward(
    a: Tensor, h: Tensor, h0: Tensor, fresh: Tensor | None, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The adjoint recurrence dh_t = grad_t + conj(a_{t+1}) dh_{t+1}, run from the end."""
    a = a.conj().resolve_conj()
    later, last = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], 1).flip(1), None
    before = torch.cat([h0[:, None], h[:, :-1]], 1).conj().resolve_conj()
    if fresh is not None:  # both stand in another sequence
        last = torch.cat([fresh[1:], fresh.new_ones(1)]).flip(0)
        wide = (slice(None),) + (None,) * (h.dim() - 2)
        later.masked_fill_(last[wide], 0)
        before.masked_fill_(fresh[wide], 0)
    dh = _recur(later, grad.flip(1), torch.zeros_like(h0), last).flip(1)
    da = dh * before
    return da, dh.clone(), a[:, 0] * dh[:, 0]


@_scan_backward.register_fake
def _(a, h, h0, fresh, grad):
    return torch.empty_like(h), torch.empty_like(h), torch.empty_like(h0)


def _save(ctx, inputs, output):
    a, _, h0, fresh = inputs
    ctx.save_for_backward(a, output, h0, fresh)


_scan.register_autograd(lambda ctx, grad: (*_scan_backward(*ctx.saved_tensors, grad), None), setup_context=_save)
_scan_backward.once_differentiable("scan")


def _recur(a: Tensor, b: Tensor, h: Tensor, fresh: Tensor | None) -> Tensor:
    out = torch.empty_like(b, memory_format=torch.contiguous_format)
    width = b[:, 0].numel()
    if width >= 4096:  # a step's work outweighs its launch
        _steps(a, b, h, out, fresh)
        return out
    # Pieces that stay in a core's cache while they are passed over twice: at 32,768 tokens 1.5 times as fast as in one.
    size = max(CACHED // max(width * b.itemsize, 1), 64)
    for start in range(0, b.shape[1], size):
        a_p, b_p, out_p = (x[:, start : start + size] for x in (a, b, out))
        run = _rows if b_p.shape[1] >= 64 else _steps
        h = run(a_p, b_p, h, out_p, None if fresh is None else fresh[start : start + size])
    return out


def _rows(a: Tensor, b: Tensor, h: Tensor, out: Tensor, fresh: Tensor | None) -> Tensor:
    """Rows of `size` tokens side by side, each from zero; then what each row receives from the one before it."""
    time = b.shape[1]
    size = round(time**0.5)
    whole = time // size * size
    shape = (time // size, size)
    rows_a, rows_b, rows = (x[:, :whole].unflatten(1, shape) for x in (a, b, out))
    gain = torch.empty_like(rows_a)
    state, product = torch.zeros_like(rows_b[:, :, 0]), torch.ones_like(rows_a[:, :, 0])
    wide = [1] * (b.dim() - 2)
    starts = None if fresh is None else fresh[:whole].view(*shape, *wide)
    in_column = _some(starts, 0, size)
    for s in range(size):
        if in_column[s]:
            state = torch.where(starts[:, s], 0, state)
        torch.addcmul(rows_b[:, :, s], rows_a[:, :, s], state, out=rows[:, :, s])
        torch.mul(rows_a[:, :, s], product, out=gain[:, :, s])
        state, product = rows[:, :, s], gain[:, :, s]
    in_row = _some(starts, 1, shape[0])
    for r in range(shape[0]):
        row = rows[:, r]
        if in_row[r]:  # up to the first of them
            reached = starts[r].cumsum(0) == 0
            row.copy_(torch.where(reached, torch.addcmul(row, gain[:, r], h[:, None]), row))
        else:
            row.addcmul_(gain[:, r], h[:, None])
        h = row[:, -1]
    return _steps(a[:, whole:], b[:, whole:], h, out[:, whole:], None if fresh is None else fresh[whole:])


def _steps(a: Tensor, b: Tensor, h: Tensor, out: Tensor, fresh: Tensor | None) -> Tensor:
    here = _some(fresh, None, a.shape[1])
    for t, (a_t, b_t, out_t) in enumerate(zip(a.unbind(1), b.unbind(1), out.unbind(1), strict=True)):
        if here[t]:
            h = torch.where(fresh[t], 0, h)
        torch.addcmul(b_t, a_t, h, out=out_t)
        h = out_t
    return h


def _some(fresh: Tensor | None, dim: int | None, count: int) -> list[bool]:
    """Where along time there may be a fresh token, over `dim`: on a CPU there is one, elsewhere nothing is read."""
    if fresh is None:
        return [False] * count
    if fresh.device.type != "cpu":
        return [True] * count
    return (fresh if dim is None else fresh.any(dim)).flatten().tolist()


_FORMS = register("scan", naive=_naive, torch=_torch)
