"""Mamba's selective scan: a diagonal recurrence whose transition the input sets, never materialised over all of
time."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subquad.kernels.backend import pick, register
from subquad.kernels.operators import operator
from subquad.kernels.packing import Chunks
from subquad.kernels.state import accumulator_dtype, commit
from subquad.kernels.wrapping import by_sequence, full_precision, sequence_op

BLOCK_VALUES = 1 << 18  # values of state a block of time may hold, so that a block stays in a core's cache


@sequence_op
def selective_scan(
    x: Float[Tensor, "B T D"],
    dt: Float[Tensor, "B T D"],
    A: Float[Tensor, "D N"],
    B: Float[Tensor, "B T N"],
    C: Float[Tensor, "B T N"],
    *,
    state: Float[Tensor, "M D N"] | None = None,
    cu_seqlens: Int[Tensor, "S"] | None = None,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "M D N"] | None]:
    """h_t = exp(dt_t A) * h_{t-1} + dt_t x_t B_t^T,  y_t = h_t C_t   (Gu and Dao 2023, algorithm 2).

    dt: step sizes >= 0. A: [D, N], negative. B, C: [B, T, N], shared by all channels. state: h [sequences, D, N].
    Returns (y in x's dtype, the new state or None). Accumulates in float32 or wider.
    Cost: O(T D N) with O(D N) memory a block of time (recomputed backward); D N values of state. Second derivatives
        raise.
    """
    form = pick("selective_scan", _FORMS, x)
    dtype = accumulator_dtype(x.dtype)
    with full_precision(x):
        n_seqs = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        h0 = x.new_zeros(n_seqs, *A.shape, dtype=dtype) if state is None else state.to(dtype)
        y, last = form(*(t.to(dtype) for t in (x, dt, A, B, C)), h0, cu_seqlens)
    return y.to(x.dtype), None if state is None else commit(state, last)


def _naive(x, dt, A, B, C, h, cu_seqlens):
    if cu_seqlens is not None:
        run = lambda x, dt, B, C, h: _naive(x, dt, A, B, C, h, None)  # noqa: E731
        return by_sequence(run, [x, dt, B, C], [h], cu_seqlens)
    outs = []
    for t in range(x.shape[1]):
        h = (dt[:, t, :, None] * A).exp() * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        outs.append((h @ C[:, t, :, None]).squeeze(-1))
    return torch.stack(outs, 1) if outs else torch.zeros_like(x), h


def _blocked(x, dt, A, B, C, h0, cu_seqlens):
    if x.shape[1] <= 1 and cu_seqlens is None:
        return _naive(x, dt, A, B, C, h0, None)
    size = min(64, max(8, BLOCK_VALUES // (x.shape[0] * A.numel())))
    chunks = Chunks(x, size, cu_seqlens)  # filled up with dt = 0, which leaves h as it is
    parts = [chunks.split(t) for t in (x, dt, B, C)]
    packed = cu_seqlens is not None
    first = chunks.first.flatten() if packed else None
    sequence = chunks.sequence if packed else None
    y, after = _selective_scan(parts[0], parts[1], A, parts[2], parts[3], h0, first, sequence)
    if not packed:
        return chunks.join(y), after[:, -1]
    last = torch.where(chunks.nonempty[:, None, None], after[0].index_select(0, chunks.last_of), h0)
    return chunks.join(y), last


@operator("selective_scan")
def _selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor, first: Tensor | None, sequence: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Blocks [R, n, L, .] in turn: (y [R, n, L, D], h after each block [R, n, D, N]).

    Where `first[i]`, block i starts from h0[sequence[i]] instead of from the block before it (packed rows, R = 1).
    """
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    after = x.new_empty(*x.shape[:2], *A.shape)
    for i in range(x.shape[1]):
        before = _before(i, h0, after, first, sequence)
        _, h = _block(x[:, i], dt[:, i], A, B[:, i], before)
        y[:, i] = (h @ C[:, i, :, :, None]).squeeze(-1)
        after[:, i] = h[:, -1]
    return y, after


@_selective_scan.register_fake
def _(x, dt, A, B, C, h0, first, sequence):
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(*x.shape[:2], *A.shape)


def _before(i: int, h0: Tensor, after: Tensor, first: Tensor | None, sequence: Tensor | None) -> Tensor:
    """The state that block i starts from."""
    previous = after[:, i - 1] if i else h0[: after.shape[0]]
    if first is None or sequence is None:
        return previous
    return torch.where(first[i], h0.index_select(0, sequence[i : i + 1]), previous)


def _block(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Decays a_t = exp(dt_t A) and states h_t of one block: [R, L, D, N] each."""
    a = (dt[..., None] * A).exp_()
    states = (dt * x)[..., None] * B[:, :, None]
    for a_t, h_t in zip(a.unbind(1), states.unbind(1), strict=True):
        h_t.addcmul_(a_t, h)
        h = h_t
    return a, states


@operator("selective_scan_backward")
def _selective_scan_backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h0: Tensor,
    first: Tensor | None,
    sequence: Tensor | None,
    after: Tensor,
    grad_y: Tensor,
    grad_after: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Blocks from the last to the first, their states recomputed from the one each started from."""
    dx, ddt, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, B, C))
    dA, dh0 = torch.zeros_like(A), torch.zeros_like(h0)
    carried = torch.zeros_like(after[:, 0])  # gradient of the state after the block at hand
    for i in reversed(range(x.shape[1])):
        x_i, dt_i, B_i, C_i, gy = x[:, i], dt[:, i], B[:, i], C[:, i], grad_y[:, i]
        before = _before(i, h0, after, first, sequence)
        a, h = _block(x_i, dt_i, A, B_i, before)
        dC[:, i] = (gy[:, :, None] @ h).squeeze(2)
        dh = gy[..., None] * C_i[:, :, None]
        carried = carried + grad_after[:, i]
        for a_t, dh_t in zip(reversed(a.unbind(1)), reversed(dh.unbind(1)), strict=True):
            dh_t += carried
            carried = a_t * dh_t
        # d(dt A) = dh_t h_{t-1} a_t
        a[:, 1:] *= h[:, :-1]
        a[:, 0] *= before
        a *= dh
        dA += (a * dt_i[..., None]).sum((0, 1))
        through_B = (dh @ B_i[..., None]).squeeze(-1)
        ddt[:, i] = (a * A).sum(-1) + through_B * x_i
        dx[:, i] = through_B * dt_i
        dB[:, i] = ((dt_i * x_i)[:, :, None] @ dh).squeeze(2)
        if first is not None and sequence is not None:
            dh0.index_add_(0, sequence[i : i + 1], torch.where(first[i], carried, 0))
            carried = torch.where(first[i], 0, carried)
        elif i == 0:
            dh0 += carried
    return dx, ddt, dA, dB, dC, dh0


@_selective_scan_backward.register_fake
def _(x, dt, A, B, C, h0, first, sequence, after, grad_y, grad_after):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, A, B, C, h0))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx, grad_y, grad_after):
    return (*_selective_scan_backward(*ctx.saved_tensors, grad_y, grad_after), None, None)


_selective_scan.register_autograd(_backward, setup_context=_save)
_selective_scan_backward.once_differentiable("selective_scan")
_FORMS = register("selective_scan", naive=_naive, torch=_blocked)
