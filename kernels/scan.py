"""The elementwise linear recurrence, real or complex: the core of diagonal state-space and gated recurrent layers."""

import torch
from torch import Tensor

from subquad.errors import UserError
from subquad.kernels.backend import pick, register
from subquad.kernels.operators import operator
from subquad.kernels.packing import check_packed, sequence_ids
from subquad.kernels.state import accumulator_dtype, commit
from subquad.kernels.wrapping import by_sequence, full_precision

CACHED = 1 << 21  # bytes of a piece of one input


def scan(
    a: Tensor, b: Tensor, *, state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """h_t = a_t * h_{t-1} + b_t, elementwise.

    a, b: [B, T, ...], real or complex, of one shape. state: h [N, ...]; None starts from zero.
    Returns (every h_t [B, T, ...] in b's dtype, the new state or None). Accumulates in float32 or wider.
    Cost: O(T D). Second derivatives raise.
    """
    check_packed(b, cu_seqlens)
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
        h = _scan(a, b, h0)
        return h, h[:, -1]
    # A sequence's first token forgets what came before it in the row and starts from its own state instead.
    time, cu = b.shape[1], cu_seqlens.long()
    ids, valid = sequence_ids(time, cu_seqlens)
    full = (slice(None),) + (None,) * (b.dim() - 2)
    nonempty = (cu.diff() > 0)[full]
    starts = cu[:-1].clamp(max=time - 1)
    carried = torch.where(nonempty, a[0, starts] * h0, 0)
    kept = valid & (torch.arange(time, device=cu.device) != cu[ids])
    a = torch.where(kept[full], a[0], 0)[None]
    b = torch.where(valid[full], b[0], 0).index_add(0, starts, carried)[None]
    h = _scan(a, b, torch.zeros_like(h0[:1]))
    h = torch.where(valid[full], h[0], 0)[None]
    last = torch.where(nonempty, h[0].index_select(0, (cu[1:] - 1).clamp(min=0)), h0)
    return h, last


@operator("scan")
def _scan(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """The loop as one opaque operation, so that a compiler never unrolls it."""
    return _recur(a, b, h0)


@_scan.register_fake
def _(a, b, h0):
    return torch.empty_like(b, memory_format=torch.contiguous_format)


@operator("scan_backward")
def _scan_backward(a: Tensor, h: Tensor, h0: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The adjoint recurrence dh_t = grad_t + conj(a_{t+1}) dh_{t+1}, run from the end."""
    a = a.conj().resolve_conj()
    later = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], 1).flip(1)
    dh = _recur(later, grad.flip(1), torch.zeros_like(h0)).flip(1)
    before = torch.cat([h0[:, None], h[:, :-1]], 1).conj()
    return dh * before, dh.clone(), a[:, 0] * dh[:, 0]


@_scan_backward.register_fake
def _(a, h, h0, grad):
    return torch.empty_like(h), torch.empty_like(h), torch.empty_like(h0)


def _save(ctx, inputs, output):
    a, _, h0 = inputs
    ctx.save_for_backward(a, output, h0)


_scan.register_autograd(lambda ctx, grad: _scan_backward(*ctx.saved_tensors, grad), setup_context=_save)
_scan_backward.once_differentiable("scan")


def _recur(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    out = torch.empty_like(b, memory_format=torch.contiguous_format)
    width = b[:, 0].numel()
    if width >= 4096:  # a step's work outweighs its launch
        _steps(a, b, h, out)
        return out
    # Pieces that stay in a core's cache while they are passed over twice: at 32,768 tokens 1.5 times as fast as in one.
    size = max(CACHED // max(width * b.itemsize, 1), 64)
    for pieces in zip(*(x.split(size, 1) for x in (a, b, out)), strict=True):
        h = (_rows if pieces[0].shape[1] >= 64 else _steps)(*pieces[:2], h, pieces[2])
    return out


def _rows(a: Tensor, b: Tensor, h: Tensor, out: Tensor) -> Tensor:
    """Rows of `size` tokens side by side, each from zero; then what each row receives from the one before it."""
    time = b.shape[1]
    size = round(time**0.5)
    whole = time // size * size
    shape = (time // size, size)
    rows_a, rows_b, rows = (x[:, :whole].unflatten(1, shape) for x in (a, b, out))
    gain = torch.empty_like(rows_a)
    state, product = torch.zeros_like(rows_b[:, :, 0]), torch.ones_like(rows_a[:, :, 0])
    for s in range(size):
        torch.addcmul(rows_b[:, :, s], rows_a[:, :, s], state, out=rows[:, :, s])
        torch.mul(rows_a[:, :, s], product, out=gain[:, :, s])
        state, product = rows[:, :, s], gain[:, :, s]
    for r in range(shape[0]):
        rows[:, r].addcmul_(gain[:, r], h[:, None])
        h = rows[:, r, -1]
    return _steps(a[:, whole:], b[:, whole:], h, out[:, whole:])


def _steps(a: Tensor, b: Tensor, h: Tensor, out: Tensor) -> Tensor:
    for a_t, b_t, out_t in zip(a.unbind(1), b.unbind(1), out.unbind(1), strict=True):
        torch.addcmul(b_t, a_t, h, out=out_t)
        h = out_t
    return h


_FORMS = register("scan", naive=_naive, torch=_torch)
