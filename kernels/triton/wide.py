"""Heads wider than a kernel's tiles, as several heads of fewer columns.

The columns of values never meet in a matrix state: [.., H, V] are n H heads of V / n columns that share keys, queries
and gates, which costs what is done for every head once more. Columns of keys meet in o = S^T q = sum_j S_j^T q_j alone
where the state's transition is diagonal, as in linear attention; the delta rules mix them.

A few tokens need none of this: `step` takes any width, and splitting would copy the state at every token.
"""

from collections.abc import Callable

import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor

from subquad.kernels.triton.launch import cdiv
from subquad.kernels.triton.tiles import padded
from subquad.kernels.wrapping import WIDEST


def n_parts(width: int) -> int:
    """The least number of parts of at most WIDEST columns whose tiles together are smallest."""
    least = cdiv(width, WIDEST)
    return min(range(least, 2 * least + 1), key=lambda n: n * padded(cdiv(width, n))) if least > 1 else 1


def of_values(form: Callable[..., tuple], n: int, v: Tensor, S: Tensor | None) -> tuple:
    """(out, new state, whatever else), from `form(values, state)` on n heads for each of v [..., H, V].

    S [N, H, K, V]; None for none, and the state is then what `form` gives.
    """
    width = v.shape[-1]
    state = None if S is None else rearrange(_even(S, n), "N H K (n V) -> N (H n) K V", n=n).contiguous()
    out, last, *rest = form(rearrange(_even(v, n), "... H (n V) -> ... (H n) V", n=n), state)
    out = rearrange(out, "... (H n) V -> ... H (n V)", n=n)[..., :width]
    if S is not None:
        last = rearrange(last, "N (H n) K V -> N H K (n V)", n=n)[..., :width]
    return out, last, *rest


def of_heads(x: Tensor | None, n: int, dim: int) -> Tensor | None:
    """x with each of its heads, along `dim`, n times."""
    return None if x is None else x.repeat_interleave(n, dim)


def of_keys(form: Callable[..., tuple], n: int, q, k, v, g, S, z, bonus) -> tuple:
    """(out, denominators or None, S, z) of linear attention, from `form(q, k, v, g, S, z, bonus)` on n parts of K.

    Heads [G, H / G] become [G, n, H / G], so that those that share keys stay together.
    """
    G, width, dtype = q.shape[2], q.shape[3], v.dtype

    def cut(x: Tensor | None, pattern: str) -> Tensor | None:
        return None if x is None else rearrange(_even(x, n), pattern, G=G, n=n)

    q, k = (rearrange(_even(x, n), "B T G (n K) -> B T (G n) K", n=n) for x in (q, k))
    v = repeat(v, "B T (G r) V -> B T (G n r) V", G=G, n=n)
    if g is not None and g.dim() == 3:
        g = repeat(g, "B T (G r) -> B T (G n r)", G=G, n=n)
    else:
        g = cut(g, "B T (G r) (n K) -> B T (G n r) K")
    bonus, z_in = cut(bonus, "(G r) (n K) -> (G n r) K"), cut(z, "N (G r) (n K) -> N (G n r) K")
    S_in = None if S is None else cut(S.transpose(2, 3), "N (G r) V (n K) -> N (G n r) K V").contiguous()
    out, den, last, z_last = form(q, k, v, g, S_in, z_in, bonus)
    out = reduce(out.float(), "B T (G n r) V -> B T (G r) V", "sum", G=G, n=n).to(dtype)
    if den is not None:
        den = reduce(den, "B T (G n r) -> B T (G r)", "sum", G=G, n=n)
    if S is not None:
        last = rearrange(last, "N (G n r) K V -> N (G r) (n K) V", G=G, n=n)[:, :, :width]
    if z is not None:
        z_last = rearrange(z_last, "N (G n r) K -> N (G r) (n K)", G=G, n=n)[..., :width]
    return out, den, last, z_last


def _even(x: Tensor, n: int) -> Tensor:
    """x with zeros behind its last columns, as many as make them n parts of equally many times 16.

    Rows of other widths begin at odd addresses, where 16 bytes do not load at a time.
    """
    missing = n * 16 * cdiv(x.shape[-1], n * 16) - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x
