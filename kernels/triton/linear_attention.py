"""The Triton form of `linear_attention`: one fused pass forward, and the same pass three times for the gradients."""

import torch
from torch import Tensor

from subquad.errors import UserError
from subquad.kernels.operators import operator
from subquad.kernels.triton.carry import Pass, States
from subquad.kernels.triton.gates import cumulate, gate_gradient, new_gates
from subquad.kernels.triton.segments import Segments, clear_padding, segments
from subquad.kernels.triton.step import few, step
from subquad.kernels.triton.tape import taped
from subquad.kernels.triton.tiles import accumulating, in_place, new_state, rows, sum_heads
from subquad.kernels.triton.vector_decay import vector_decay
from subquad.kernels.triton.wide import n_parts, of_heads, of_keys, of_values


def form(q, k, v, g, S, z, normalized, exclusive, bonus, cu_seqlens):
    """As subquad.kernels.linear_attention calls it: (out, denominators or None, S, z)."""
    if in_place(S, z) and few(q, cu_seqlens):
        out, den = linear_attention_step_(q, k, v, g, S, z, bonus, cu_seqlens, exclusive)
        return out, den if normalized else None, S, z
    if (n := n_parts(v.shape[3])) > 1:
        g, bonus, repeated = of_heads(g, n, 2), of_heads(bonus, n, 0), of_heads(z, n, 1)

        def columns(values, S):
            out, den, last, z_last = form(q, k, values, g, S, repeated, normalized, exclusive, bonus, cu_seqlens)
            return out, last, den, z_last

        out, last, den, z_last = of_values(columns, n, v, S)
        return out, None if den is None else den[..., ::n], last, None if z_last is None else z_last[:, ::n]
    if (n := n_parts(q.shape[3])) > 1:

        def part(q, k, v, g, S, z, bonus):
            return form(q, k, v, g, S, z, normalized, exclusive, bonus, cu_seqlens)

        return of_keys(part, n, q, k, v, g, S, z, bonus)
    if g is not None and g.dim() == 4:
        if normalized:
            raise UserError("linear_attention: the Triton form has no normalizer with a decay for every channel")
        out, last = vector_decay(q, k, v, g, S, exclusive, bonus, cu_seqlens)
        return out, None, last, None
    if in_place(S, z):
        out, den = linear_attention_triton_(q, k, v, g, S, z, cu_seqlens, normalized, exclusive)
        last, z_last = S, z
    else:
        S, z = accumulating(S), accumulating(z)
        out, den, last, z_last, _ = linear_attention_triton(q, k, v, g, S, z, cu_seqlens, normalized, exclusive)
    if bonus is not None:
        repeat = v.shape[2] // q.shape[2]
        own = (q.float() * k.float()).repeat_interleave(repeat, 2) if repeat > 1 else q.float() * k.float()
        out = (out + (own * bonus.float()).sum(-1, keepdim=True) * v).to(v.dtype)
    return out, den if normalized else None, last, z_last if normalized else None


@operator("linear_attention_step_", mutates_args=("S", "z"))
@taped
def linear_attention_step_(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, S: Tensor, z: Tensor | None, bonus: Tensor | None,
    cu_seqlens: Tensor | None, exclusive: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A few tokens, the new state written into S and z: (out, denominators, empty without z)."""
    out, den = step(
        q, k, v, g, S, exclusive=exclusive, bonus=bonus, normalized=z is not None, z=z, cu_seqlens=cu_seqlens,
        last=S, z_last=z,
    )  # fmt: skip
    return out, new_state(None, v) if den is None else den


@linear_attention_step_.register_fake
def _(q, k, v, g, S, z, bonus, cu_seqlens, exclusive):
    return _outputs(q, v, None, z is not None, 0)[:2]


@operator("linear_attention_triton")
@taped
def linear_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, S: Tensor | None, z: Tensor | None, cu_seqlens: Tensor | None,
    normalized: bool, exclusive: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(out [B, T, H, V], denominators [B, T, H], S, z, cumulated gates), empty where there is none."""
    out, den, last, z_last = _outputs(q, v, S, normalized, n_seqs(v, cu_seqlens))
    gates = _forward(q, k, v, g, S, z, cu_seqlens, exclusive, out, den, last, z_last)
    return out, den, last, z_last, new_state(None, v) if gates is None else gates


@operator("linear_attention_triton_", mutates_args=("S", "z"))
@taped
def linear_attention_triton_(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, S: Tensor, z: Tensor | None, cu_seqlens: Tensor | None,
    normalized: bool, exclusive: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same, with the new state written into S and z."""
    out, den, _, z_last = _outputs(q, v, None if z is None else S, normalized, n_seqs(v, cu_seqlens))
    _forward(q, k, v, g, S, z, cu_seqlens, exclusive, out, den, S, z_last)
    if z is not None:
        z.copy_(z_last)
    return out, den


def n_seqs(v: Tensor, cu_seqlens: Tensor | None) -> int:
    return v.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1


def _outputs(q, v, S, normalized, N):
    B, T, H, V = v.shape
    single = {"dtype": torch.float32, "device": v.device}
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    den = torch.empty((B, T, H) if normalized else 0, **single)
    last = torch.empty(0 if S is None else (N, H, q.shape[-1], V), **single)
    z_last = torch.empty((N, H, q.shape[-1]) if normalized and S is not None else 0, **single)
    return out, den, last, z_last


@linear_attention_triton.register_fake
def _(q, k, v, g, S, z, cu_seqlens, normalized, exclusive):
    gates = new_state(None, v) if g is None else new_gates(g)
    return *_outputs(q, v, S, normalized, n_seqs(v, cu_seqlens)), gates


@linear_attention_triton_.register_fake
def _(q, k, v, g, S, z, cu_seqlens, normalized, exclusive):
    return _outputs(q, v, S, normalized, n_seqs(v, cu_seqlens))[:2]


def _forward(q, k, v, g, S, z, cu_seqlens, exclusive, out, den, last, z_last):
    normalized = den.dim() == 3
    last, z_last = (None, None) if S is None else (last, z_last if normalized else None)
    within = _segments(q, v, cu_seqlens)
    gates = None if g is None else cumulate(g, cu_seqlens)
    forward = Pass(within, rows(q), rows(k), rows(v), gates, exclusive=exclusive, normalized=normalized)
    before = forward.states(S, z, last, z_last)
    forward.run(before, out, last=last, z_last=z_last, den=den if normalized else None)
    clear_padding(out, cu_seqlens)
    if normalized:
        clear_padding(den, cu_seqlens)
    return gates


@operator("linear_attention_triton_backward")
@taped
def linear_attention_triton_backward(
    do: Tensor, dden: Tensor | None, dS: Tensor | None, dz: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    g: Tensor | None, S: Tensor | None, z: Tensor | None, cu_seqlens: Tensor | None, exclusive: bool,
    last: Tensor, z_last: Tensor, gates: Tensor, of_gate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, g (if `of_gate`), S, z, empty where there is none.

    last, z_last, gates: as forward returned them.
    """
    dq, dk, dv, dg, dS0, dz0 = _gradients(q, k, v, g if of_gate else None, S, z)
    do, q, k, v = rows(do), rows(q), rows(k), rows(v)
    if dden is not None:
        dden = dden.contiguous()
    within = _segments(q, v, cu_seqlens)
    gates = None if g is None else gates
    reads = Pass(within, do, v, k, gates, exclusive=exclusive, transposed=True, r_more=dden)
    writes = Pass(within, v, do, q, gates, exclusive=exclusive, reverse=True, transposed=True, w_more=dden)
    values = Pass(within, k, q, do, gates, exclusive=exclusive, reverse=True)

    up, down = (reads.new_term(), writes.new_term()) if of_gate else (None, None)
    before = reads.states(S, z, ends=of_gate)
    reads.run(before, dq, partner=q if of_gate else None, term=up)
    first, z_first = None if S is None else dS0, None if z is None else dz0
    after = writes.states(dS, dz, first, z_first)
    writes.run(after, dk, partner=k if of_gate else None, term=down, last=first, z_last=z_first)
    values.run(after._replace(z=None), dv)
    if of_gate:
        ends = before._replace(S_ends=last, z_ends=z_last) if within.whole else before
        dg = gate_gradient(up, down, _edge(ends, after), within, exclusive)
    for x in (dq, dk, dv, dg):
        clear_padding(x, cu_seqlens)
    return sum_heads(dq, q.shape[2]), sum_heads(dk, q.shape[2]), dv, dg, dS0, dz0


def _segments(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Segments:
    return segments(v, cu_seqlens, v.shape[0] * v.shape[2] * -(-max(q.shape[3], v.shape[3]) // 64))


def _edge(before: States, after: States) -> Tensor | None:
    """<S, dS> at the end of each segment, [n, H]: what decays on from before a token to after the segment."""
    if after.S is None:
        return None
    edge = (before.S_ends * after.S).sum((-2, -1))
    return edge if after.z is None else edge + (before.z_ends * after.z).sum(-1)


def _gradients(q, k, v, g, S, z):
    H = v.shape[2]

    def like(x, heads=None):
        if x is None:
            return torch.empty(0, dtype=torch.float32, device=v.device)
        shape = x.shape if heads is None else (*x.shape[:2], heads, x.shape[3])
        return torch.empty(shape, dtype=x.dtype, device=v.device)

    return like(q, H), like(k, H), like(v), like(g), like(S), like(z)


@linear_attention_triton_backward.register_fake
def _(do, dden, dS, dz, q, k, v, g, S, z, cu_seqlens, exclusive, last, z_last, gates, of_gate):
    _, _, *rest = _gradients(q, k, v, g if of_gate else None, S, z)
    return *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k)), *rest


def _save(ctx, inputs, output):
    q, k, v, g, S, z, cu_seqlens, normalized, exclusive = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, g, S, z, cu_seqlens, *output[2:])
    ctx.exclusive, ctx.normalized = exclusive, normalized


def _backward(ctx, do, dden, dS, dz, _):
    q, k, v, g, S, z, cu_seqlens, *after = ctx.saved_tensors
    of_gate = g is not None and ctx.needs_input_grad[3]
    if do is None:
        do = torch.zeros_like(v)
    if ctx.normalized and dden is None:
        dden = v.new_zeros(v.shape[:3], dtype=torch.float32)
    dS, dz = (None, None) if S is None else (accumulating(dS), accumulating(dz))
    found = linear_attention_triton_backward(
        do, dden if ctx.normalized else None, dS, dz if ctx.normalized else None, q, k, v, g, S, z, cu_seqlens,
        ctx.exclusive, *after, of_gate,
    )  # fmt: skip
    given = (q, k, v, g if of_gate else None, S, z)
    return (*(x if y is not None else None for x, y in zip(found, given, strict=True)), None, None, None)


linear_attention_triton.register_autograd(_backward, setup_context=_save)
linear_attention_triton_backward.once_differentiable("linear_attention")
