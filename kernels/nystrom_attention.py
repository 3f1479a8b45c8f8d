"""Bidirectional softmax attention through landmarks: the Nystrom approximation of its matrix."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from subquad.errors import UserError
from subquad.kernels.attention import sdpa
from subquad.kernels.backend import pick, register
from subquad.kernels.packing import Padded, mask_padding
from subquad.kernels.state import accumulator_dtype
from subquad.kernels.wrapping import full_precision, sequence_op


@sequence_op
def nystrom_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    *,
    n_landmarks: int = 64,
    n_iterations: int = 6,
    conv: Float[Tensor, "H W"] | None = None,
    cu_seqlens: Int[Tensor, "M"] | None = None,
) -> Float[Tensor, "B T H V"]:
    """o = softmax(q k~^T) pinv(softmax(q~ k~^T)) softmax(q~ k^T) v + conv * v   (q is not scaled).

    Landmarks q~, k~ are the means of q and k over n_landmarks segments of each sequence, of equal length up to one; a
    sequence of n_landmarks tokens or fewer gets exact softmax attention. The pseudo-inverse takes n_iterations steps
    Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4 from Z = A^T / ||A||_1. conv: a filter of odd width W a head, of
    the values along time.

    It reads the whole sequence, so it has no state. Cost O(T m H (K + V) + m^3 H) for m landmarks.
    """
    if n_landmarks < 1 or n_iterations < 1:
        raise UserError(
            f"nystrom_attention: n_landmarks and n_iterations are at least 1; got {n_landmarks} and {n_iterations}"
        )
    if conv is not None:
        if conv.shape[1] % 2 == 0:
            raise UserError(f"nystrom_attention: a filter centred on its token has odd width; got {conv.shape[1]}")
        conv = conv.to(v.dtype)
    if cu_seqlens is not None:
        q, k, v = (mask_padding(x, cu_seqlens) for x in (q, k, v))
    form = pick("nystrom_attention", _FORMS, q)
    with full_precision(q):
        return form(q, k, v, n_landmarks, n_iterations, conv, cu_seqlens)


def _pseudo_inverse(a: Tensor, n_iterations: int) -> Tensor:
    """Of row-stochastic matrices [..., m, m] (Razavi et al. 2014, as in arXiv:2102.03902, equation 11)."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    z = a.mT / a.sum(-2).amax(-1)[..., None, None]
    for _ in range(n_iterations):
        az = a @ z
        z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
    return z


# The specification: one sequence and one head at a time, every matrix written out.


def _naive(q, k, v, m, n_iterations, conv, cu_seqlens):
    bounds = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    spans = [(0, q.shape[1])] * q.shape[0] if cu_seqlens is None else list(pairwise(bounds))
    outs = []
    for n, (start, end) in enumerate(spans):
        row = n if cu_seqlens is None else 0
        if start == end:
            continue
        heads = []
        for h in range(q.shape[2]):
            q_h, k_h, v_h = (x[row, start:end, h] for x in (q, k, v))
            filter_h = None if conv is None else conv[h]
            heads.append(_one_head(q_h, k_h, v_h, m, n_iterations, filter_h))
        outs.append(torch.stack(heads, 1))
    if cu_seqlens is None:
        return torch.stack(outs)
    return torch.cat([*outs, v.new_zeros(v.shape[1] - bounds[-1], *v.shape[2:])])[None]


def _one_head(q, k, v, m, n_iterations, conv):
    time = q.shape[0]
    if time <= m:
        out = (q @ k.T).softmax(-1) @ v
    else:
        segments = [[t for t in range(time) if t * m // time == i] for i in range(m)]
        q_m, k_m = (torch.stack([x[segment].mean(0) for segment in segments]) for x in (q, k))
        middle = (q_m @ k_m.T).to(accumulator_dtype(q.dtype)).softmax(-1)
        inverse = _pseudo_inverse(middle, n_iterations).to(q.dtype)
        out = (q @ k_m.T).softmax(-1) @ (inverse @ ((q_m @ k.T).softmax(-1) @ v))
    if conv is not None:
        half = conv.shape[0] // 2
        padded = F.pad(v, (0, 0, half, half))
        out = out + sum(w * padded[i : i + time] for i, w in enumerate(conv))
    return out


# The fast form: all sequences at once, the two long products as torch's fused attention.


def _batched(q, k, v, m, n_iterations, conv, cu_seqlens):
    rows = Padded(q.shape[1], cu_seqlens)
    q, k, v = map(rows.split, (q, k, v))
    out = sdpa(q, k, v, None) if rows.filled is None and q.shape[1] <= m else _landmarks(q, k, v, m, n_iterations, rows)
    if conv is not None:
        # One filter for all features of a head, in one dimension: the gradient of torch 2.13's conv2d with a filter
        # longer than its input writes past its memory in float32 on a CPU.
        lines = v.permute(0, 3, 2, 1).flatten(0, 1)
        mixed = F.conv1d(lines, conv[:, None], padding=conv.shape[1] // 2, groups=conv.shape[0])
        out = out + mixed.unflatten(0, (v.shape[0], -1)).permute(0, 3, 2, 1)
    return rows.join(out)


def _landmarks(q, k, v, m, n_iterations, rows):
    t, wide = torch.arange(q.shape[1], device=q.device), accumulator_dtype(q.dtype)
    filled = torch.ones_like(t, dtype=torch.bool)[None] if rows.filled is None else rows.filled
    lengths = filled.sum(1, keepdim=True)
    segment = torch.where(filled, t * m // lengths.clamp(min=1), m)
    member = (segment[:, None] == torch.arange(m, device=q.device)[:, None]).to(wide)  # [N | 1, m, L]
    mean = (member / member.sum(-1, keepdim=True).clamp(min=1)).expand(q.shape[0], -1, -1)
    q_m, k_m = ((mean @ x.flatten(2).to(wide)).to(x.dtype).unflatten(-1, x.shape[2:]) for x in (q, k))
    middle = torch.einsum("nihk,njhk->nhij", q_m, k_m).to(wide).softmax(-1)
    inverse = _pseudo_inverse(middle, n_iterations).to(q.dtype)
    # An empty sequence reads its first row, which is zero, so that no softmax is over nothing.
    seen = None if rows.filled is None else (rows.filled | (t == 0))[:, None, None]
    collected = sdpa(q_m, k, v, seen)
    out = sdpa(q, k_m, torch.einsum("nhij,njhv->nihv", inverse, collected), None)
    if rows.filled is None:
        return out
    first = min(m, q.shape[1])
    exact = sdpa(q[:, :first], k[:, :first], v[:, :first], seen[..., :first])
    exact = F.pad(exact, (0, 0, 0, 0, 0, q.shape[1] - first))
    return torch.where((lengths <= m)[..., None, None], exact, out)


_FORMS = register("nystrom_attention", naive=_naive, torch=_batched)
