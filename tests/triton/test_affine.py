"""The affine pass against its three formulas, chunk after chunk in float64."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from subquad.kernels.examples import relative_error
from subquad.kernels.triton import segments
from subquad.kernels.triton.affine import Affine
from subquad.kernels.triton.segments import chunk_states

pytestmark = pytest.mark.unchecked
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
DTYPES = [torch.float32] if DEVICE == "cpu" else list(BOUND)
# Small letters: a factor for each row; "=": F is R; "1": one head of these rows for all.
GROUPS = {
    "linear": "QPE", "delta": "TUxrR=fqQ1", "KDA": "TUxrRFQ", "dplr": "TXPURQEF", "delta's gradient": "TXrR=fE1",
}  # fmt: skip
C = segments.CHUNK


class Layout(NamedTuple):
    """Each sequence: its row of the batch, first token, end, its first chunk."""

    T: int
    sequences: list[tuple[int, int, int, int]]
    cu_seqlens: Tensor | None

    @property
    def B(self) -> int:
        return 1 if self.cu_seqlens is not None else len(self.sequences)

    @property
    def n_chunks(self) -> int:
        N = len(self.sequences)
        return self.T // C + N if self.cu_seqlens is not None else N * max(-(-self.T // C), 1)


def batch(B: int, T: int) -> Layout:
    return Layout(T, [(b, 0, T, b * -(-T // C)) for b in range(B)], None)


def packed(*lengths: int, padding: int = 0) -> Layout:
    sequences, start, chunk = [], 0, 0
    for length in lengths:
        sequences.append((0, start, start + length, chunk))
        start, chunk = start + length, chunk + -(-length // C)
    bounds = [0, *(end for _, _, end, _ in sequences)]
    return Layout(start + padding, sequences, torch.tensor(bounds, dtype=torch.int32, device=DEVICE))


def tensors(
    layout: Layout, groups: str, whole: str | None, H=2, K=5, V=7, dtype=torch.float32, alike=True
) -> dict[str, Tensor]:
    """Random ones, of a size that keeps S moderate; NaN in rows, and 9 in matrices, wherever no token is."""
    generator = torch.Generator().manual_seed(0)

    def rows(width: int, scale: float, spare: int = 3, heads: int = H) -> Tensor:
        wide = scale * torch.randn(layout.B, layout.T, heads, width + spare, generator=generator)
        for b in range(layout.B):
            used = max(end for row, _, end, _ in layout.sequences if row == b)
            wide[b, used:] = float("nan")
        return wide.to(DEVICE, dtype)[..., :width]  # strided

    given = {"x": rows(V, 1.0)}
    for name in "QREF":
        if name in groups:
            spare = 3 if alike else "QREF".index(name)
            given[name] = rows(K, {"Q": 1.0, "R": 0.5 / K}.get(name, C**-0.5), spare, 1 if "1" in groups else H)
    if "=" in groups:
        given["F"] = given["R"]
    for name in "XRQF":
        if name.lower() in groups:
            given[f"{name}_gain"] = 2 * torch.rand(layout.n_chunks, H, C, generator=generator).to(DEVICE) - 1
    for name in "XTPU":
        if name in groups:
            matrix = torch.full((layout.n_chunks, H, C, C), 9.0)
            for _, start, end, chunk in layout.sequences:
                for i, at in enumerate(range(start, end, C)):
                    m = min(C, end - at)
                    if name in "XT":
                        matrix[chunk + i, :, m:, :m] = matrix[chunk + i, :, :m, m:] = 0.0
                    matrix[chunk + i, :, :m, :m] = C**-0.5 * torch.randn(H, m, m, generator=generator)
            given[name] = matrix.to(DEVICE, dtype)
    if whole is not None:
        shape = (layout.n_chunks, H, K)[: 3 if whole == "vector" else 2]
        given["whole"] = torch.rand(shape, generator=generator).to(DEVICE)
    return given


def expected(layout: Layout, given: dict[str, Tensor], S: Tensor, reverse: bool):
    """(o, u, the states before each chunk, the final states); zero where nothing is."""
    t = {name: value.double() for name, value in given.items()}
    x = t["x"]
    H, K, V = S.shape[1:]
    o, u = torch.zeros_like(x), torch.zeros_like(x)
    states, last = torch.zeros(layout.n_chunks, H, K, V, dtype=x.dtype, device=x.device), torch.empty_like(S.double())
    for n, (b, start, end, chunk) in enumerate(layout.sequences):
        for h in range(H):
            s = S[n, h].double()
            places = list(enumerate(range(start, end, C)))
            for i, at in reversed(places) if reverse else places:
                span, c = slice(at, min(at + C, end)), chunk + i
                m = span.stop - span.start
                x_c, states[c, h] = x[b, span, h], s

                def row(name, span=span, b=b, h=h):
                    return t[name][b, span, h // (H // t[name].shape[2])]

                def gain(name, y, c=c, h=h, m=m):
                    return y * t[f"{name}_gain"][c, h, :m, None] if f"{name}_gain" in t else y

                def matrix(name, c=c, h=h, m=m):
                    return (t[name].mT if reverse else t[name])[c, h, :m, :m]

                after = s
                if "whole" in t:
                    decay = t["whole"][c, h]
                    after = s * (decay[:, None] if decay.dim() else decay)
                if "T" in t:
                    met = matrix("X") @ x_c if "X" in t else gain("X", x_c)
                    u[b, span, h] = matrix("T") @ (met + gain("R", row("R") @ s))
                    after = after + gain("F", row("F")).mT @ u[b, span, h]
                if "Q" in t:
                    o[b, span, h] = gain("Q", row("Q") @ s)
                    for name, y in (("P", x_c), ("U", u[b, span, h])):
                        if name in t:
                            o[b, span, h] += matrix(name) @ y
                s = after + row("E").mT @ x_c if "E" in t else after
            last[n, h] = s
    return o, u, states, last


def check(
    layout, groups, whole, *, reverse=False, carried=True, widths=(2, 5, 7), dtype=torch.float32,
    alike=True,
):  # fmt: skip
    H, K, V = widths
    given = tensors(layout, groups, whole, H, K, V, dtype, alike)
    N = len(layout.sequences)
    S = torch.randn(N, H, K, V, generator=torch.Generator().manual_seed(1)).to(DEVICE) if carried else None
    zero = torch.zeros(N, H, K, V, device=DEVICE)
    affine = Affine(**given, cu_seqlens=layout.cu_seqlens, reverse=reverse)
    last = torch.full_like(zero, float("nan"))
    out, u = (torch.zeros(layout.B, layout.T, H, V, device=DEVICE, dtype=dtype) for _ in range(2))
    states = chunk_states(given["x"], K, layout.cu_seqlens).zero_()
    before = affine.states(S, last)
    affine.run(before, out if "Q" in given else None, u=u if "T" in given else None, states=states, last=last)
    wanted = expected(layout, given, zero if S is None else S, reverse)
    for name, ours, reference in zip(("o", "u", "states", "last"), (out, u, states, last), wanted, strict=True):
        assert relative_error(ours, reference) < BOUND[dtype], name
    return affine


@pytest.fixture
def short(monkeypatch):
    """Segments of as few chunks as possible."""
    monkeypatch.setattr(segments, "SHORTEST", 40)
    monkeypatch.setattr(segments, "PROGRAMS", 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("whole", [None, "scalar", "vector"])
@pytest.mark.parametrize("groups", GROUPS)
def test_in_segments(groups, whole, reverse, dtype, short):
    layout, widths = batch(2, 150), (1, 5, 7)
    affine = check(layout, GROUPS[groups], whole, reverse=reverse, widths=widths, dtype=dtype)
    assert affine.cut.per_sequence == 3


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("groups", GROUPS)
def test_one_segment_a_sequence(groups, reverse):
    affine = check(batch(2, 150), GROUPS[groups], "vector", reverse=reverse)
    assert affine.cut.whole


@pytest.mark.parametrize("groups", GROUPS)
def test_rows_of_different_strides(groups):
    check(batch(2, 100), GROUPS[groups], "vector", alike=False)


@pytest.mark.parametrize("groups", ["linear", "dplr"])
@pytest.mark.parametrize("T", [0, 1, 2, 7, 63, 64, 65])
def test_lengths(groups, T):
    check(batch(2, T), GROUPS[groups], "scalar")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("lengths", [(0, 70, 0, 3, 129), (0, 0)])
def test_packed(groups, lengths, reverse, short):
    layout = packed(*lengths, padding=5)
    check(layout, GROUPS[groups], "vector", reverse=reverse, carried=not reverse)


@pytest.mark.parametrize("K, V", [(16, 40), (40, 16), (72, 33)])
def test_widths_of_several_blocks(K, V, short):
    check(batch(1, 130), GROUPS["dplr"], "vector", widths=(1, K, V))


@pytest.mark.skipif(DEVICE == "cpu", reason="large")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 128, 256])
def test_wide(width, dtype):
    check(batch(1, 2000), GROUPS["dplr"], "vector", widths=(2, width, width), dtype=dtype)
