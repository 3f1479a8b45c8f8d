"""The prepared chunks against their formulas, written plainly in float64, loop by loop."""

import math
from itertools import pairwise

import pytest
import torch

from subquad.kernels.triton.prepare_delta import delta_scores, prepare_delta
from subquad.kernels.triton.prepare_dplr import dplr_scores, prepare_dplr
from subquad.kernels.triton.prepare_linear import prepare_linear
from subquad.kernels.triton.segments import CHUNK, cut

pytestmark = pytest.mark.unchecked
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16] if DEVICE == "cuda" else [torch.float32]
# name: (B, T, boundaries of packed sequences or None)
LAYOUTS = {
    "ragged": (2, 71, None),
    "short": (2, 7, None),
    "packed": (1, 80, [0, 0, 70, 70, 75]),
    "many": (9, 12, None),
}
GATES = ["mild", "extreme"]
KINDS = [(None, "mild"), *[(gate, kind) for gate in ("scalar", "vector") for kind in GATES]]


@pytest.fixture(autouse=True)
def several_places_a_program(monkeypatch):
    """Of those that look for chunks which one product does not serve."""
    monkeypatch.setattr("subquad.kernels.triton.pair_scores.LOOKING", 2)


def spans(B, T, bounds):
    """(row of the batch, first token, end) of each chunk by its number; None where a number has no chunk."""
    if bounds is None:
        return [(b, t, min(t + CHUNK, T)) for b in range(B) for t in range(0, T, CHUNK)]
    found = [(0, t, min(t + CHUNK, end)) for at, end in pairwise(bounds) for t in range(at, end, CHUNK)]
    return found + [None] * (T // CHUNK + len(bounds) - 1 - len(found))


def inputs(layout, K, names, heads, *, H=2, gate=None, kind="mild", dtype=torch.float32):
    B, T, bounds = LAYOUTS[layout]
    torch.manual_seed(0)
    x = {name: torch.randn(B, T, heads.get(name, H), K) / K**0.5 for name in names}
    x = {name: value.to(DEVICE, dtype) for name, value in x.items()}
    if gate is not None:
        shape = (B, T, H, K) if gate == "vector" else (B, T, H)
        g = -torch.rand(shape) * 0.3
        if kind == "extreme":
            pick = torch.tensor([0.0, -1e-6, -0.01, -20.0, -1e4])
            g = pick[torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(1)) * (torch.rand(shape) < 0.5)]
        x["g"] = g.to(DEVICE)
    cu = None if bounds is None else torch.tensor(bounds, device=DEVICE, dtype=torch.int32)
    like = x[names[0]]
    return x, cut(like, cu, CHUNK), spans(B, T, bounds)


def chunk_of(x, at, h):
    """The rows of one chunk of one head in float64, [c, ...]; of the head that h reads where heads are shared."""
    b, first, end = at
    return x[b, first:end, :].double().cpu()


def head(x, h, H):
    return x[:, h // (H // x.shape[1])]


def decays(g, c, K, exclusive):
    """D [c, c, K] (zero where j is not before i, or its own token for inclusive), since, until [c, K], whole [K]."""
    g = torch.zeros(c, K, dtype=torch.float64) if g is None else g.reshape(c, -1).expand(c, K)
    D = torch.zeros(c, c, K, dtype=torch.float64)
    since, until = torch.zeros(c, K, dtype=torch.float64), torch.zeros(c, K, dtype=torch.float64)
    for i in range(c):
        stop = i if exclusive else i + 1
        since[i] = g[:stop].sum(0).exp()
        until[i] = g[i + 1 :].sum(0).exp()
        between = g[1:stop].flip(0).cumsum(0).flip(0)  # from token j + 1 to the last that i reads through
        D[i, : max(stop - 1, 0)] = between.exp()
        D[i, max(stop - 1, 0) : stop] = 1.0
    return D, since, until, g.sum(0).exp()


def scores(r, w, D):
    return torch.einsum("ik,jk,ijk->ij", r, w, D)


def check(found, expected, dtype):
    found = found.double().cpu()
    assert found.isfinite().all()
    bar = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}[dtype]
    error = (found - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error <= bar, f"off by {error:.1e}"


def compare(found, oracle, spots, H, dtype):
    """Every field of `found` with what oracle(span, head) says of it, by field: {name: tensor}."""
    fields = {name: ([], []) for name, value in found._asdict().items() if value is not None and name != "sums"}
    for n, at in enumerate(spots):
        for h in range(H):
            expected = {} if at is None else oracle(at, h)
            for name, (got, want) in fields.items():
                x = getattr(found, name)
                if x.shape[0] == len(spots) and x.shape[1] == H and (x.shape[2:] == (CHUNK, CHUNK)):
                    matrix = torch.zeros(CHUNK, CHUNK, dtype=torch.float64)
                    if name == "T":  # what is no token removes nothing
                        matrix.fill_diagonal_(1.0)
                    if at is not None:
                        c = at[2] - at[1]
                        matrix[:c, :c] = expected[name]
                    got.append(x[n, h].flatten())
                    want.append(matrix.flatten())
                elif at is not None:
                    if name == "whole":
                        value = x[n, h]
                    elif name in ("strength", "removal", "since", "until"):
                        value = x[n, h, : at[2] - at[1]]
                    else:
                        value = head(x[at[0], at[1] : at[2]], h, H)
                    assert value.shape == expected[name].shape, name
                    got.append(value.flatten())
                    want.append(expected[name].flatten())
    for got, want in fields.values():
        check(torch.cat(got), torch.cat(want), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("exclusive", [False, True, "bonus"])
@pytest.mark.parametrize(("layout", "K", "G"), [("ragged", 16, 1), ("packed", 24, 2), ("short", 80, 2)])
def test_linear(layout, K, G, exclusive, kind, dtype):
    H = 2
    x, chunks, spots = inputs(layout, K, ["q", "k"], {"q": G, "k": G}, gate="vector", kind=kind, dtype=dtype)
    bonus = torch.randn(H, K, device=DEVICE) if exclusive == "bonus" else None
    found = prepare_linear(x["q"], x["k"], x["g"], chunks, exclusive=bool(exclusive), bonus=bonus)

    def oracle(at, h):
        q, k, g = (head(chunk_of(x[name], at, h), h, H) for name in "qkg")
        D, since, until, whole = decays(g, len(q), K, bool(exclusive))
        P = scores(q, k, D)
        if bonus is not None:
            P += torch.diag((q * k * bonus[h].double().cpu()).sum(-1))
        return {"P": P, "q_s": q * since, "k_e": k * until, "whole": whole}

    compare(found, oracle, spots, H, dtype)


def test_more_chunks_than_a_program_looks_at_at_once(monkeypatch):
    monkeypatch.setattr("subquad.kernels.triton.pair_scores.LOOKING", 1)
    test_linear("many", 16, 1, False, "extreme", torch.float32)


def test_sums_lose_nothing_on_the_way():
    """To half a unit, and to what a float32 gate loses as a power of two."""
    x, chunks, spots = inputs("ragged", 16, ["q", "k"], {}, gate="vector")
    found = delta_scores(x["q"], x["k"], x["g"], chunks).rows.sums.cpu()
    for n, (b, first, end) in enumerate(spots):
        bits = x["g"][b, first:end].double().cpu().cumsum(0).transpose(0, 1) / math.log(2)
        off = (found[n, :, : end - first] * 2.0**-20 - bits).abs()
        assert (off <= 0.5 * 2.0**-20 + 2.0**-23 * bits.abs()).all()


def test_a_nan_among_the_gates_is_passed_on():
    x, chunks, _ = inputs("ragged", 16, ["q", "k"], {}, gate="vector")
    x["g"][1, 3, 0, 5] = torch.nan
    found = prepare_linear(x["q"], x["k"], x["g"], chunks)
    of_chunk = torch.zeros(2, 71, 2, 16, dtype=torch.bool)
    of_chunk[1, :CHUNK, 0, 5] = True
    assert (found.q_s.isnan().cpu() == of_chunk).all()
    assert found.whole.isnan().nonzero().tolist() == [[2, 0, 5]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize(
    ("gate", "kind"), [(None, "mild"), *[(g, kind) for g in ("scalar", "vector") for kind in GATES]]
)
@pytest.mark.parametrize(("layout", "K", "G"), [("packed", 24, 1), ("short", 16, 2), ("short", 80, 2)])
def test_delta(layout, K, G, gate, kind, back, dtype):
    H = 2
    x, chunks, spots = inputs(layout, K, ["q", "k"], {"q": G, "k": G}, gate=gate, kind=kind, dtype=dtype)
    k = x["k"] = torch.nn.functional.normalize(x["k"].float(), dim=-1).to(dtype)
    beta = (1.99 * torch.rand(*k.shape[:2], H)).to(DEVICE, dtype)
    g = delta_scores(x["q"], k, x["g"], chunks) if gate == "vector" else x.get("g")
    found = prepare_delta(x["q"], k, beta, g, chunks, back=back)

    def oracle(at, h):
        q, k = (head(chunk_of(x[name], at, h), h, H) for name in "qk")
        b, c = chunk_of(beta, at, h)[:, h], len(q)
        D, since, until, whole = decays(None if gate is None else chunk_of(x["g"], at, h)[:, h], c, K, False)
        T = torch.linalg.inv(torch.eye(c, dtype=torch.float64) + scores(b[:, None] * k, k, D).tril(-1))
        rows, removal = {"Q": q, "R": k, "F": k}, -b  # as they are, and their decays are factors
        if gate == "vector":
            rows = {"Q": q * since, "R": k * since, "F": k * until}
        elif gate == "scalar":
            whole, removal = whole[0], -b * since[:, 0]
        factors = {"strength": b, "removal": removal, "since": since[:, 0], "until": until[:, 0]}
        return {"T": T, "P": scores(q, k, D), "E": q * since, "whole": whole, **rows, **factors}

    compare(found, oracle, spots, H, dtype)
    assert (found.E is not None) == (back or gate != "scalar")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize(("layout", "K"), [("packed", 24), ("short", 16)])
def test_dplr(layout, K, kind, dtype):
    H = 2
    x, chunks, spots = inputs(layout, K, ["q", "k", "a", "b"], {}, gate="vector", kind=kind, dtype=dtype)
    x["a"] = torch.nn.functional.normalize(x["a"].float(), dim=-1).to(dtype)
    x["b"] = (-x["a"].float() * torch.rand(x["a"].shape).to(DEVICE)).to(dtype)
    found = prepare_dplr(dplr_scores(x["q"], x["k"], x["a"], x["b"], x["g"], chunks), chunks)

    def oracle(at, h):
        q, k, a, b = (chunk_of(x[name], at, h)[:, h] for name in "qkab")
        g, c = chunk_of(x["g"], at, h)[:, h], len(q)
        D, since, until, whole = decays(g, c, K, False)
        earlier, before, _, _ = decays(g, c, K, True)
        T = torch.linalg.inv(torch.eye(c, dtype=torch.float64) - scores(a, b, earlier))
        pairs = {"qk": scores(q, k, D), "qb": scores(q, b, D), "ak": scores(a, k, earlier), "T": T}
        return {"q": q * since, "a": a * before, "k": k * until, "b": b * until, "whole": whole, **pairs}

    compare(found, oracle, spots, H, dtype)


def test_strides_make_no_difference():
    """A constant gate expanded over time, rows that are part of wider ones."""
    x, chunks, _ = inputs("short", 16, ["q", "k", "a", "b"], {})
    wide = {name: torch.cat([value, value], 3)[..., 16:] for name, value in x.items()}
    g = -torch.rand(2, 1, device=DEVICE).expand(2, 7, 2, 16)
    beta = torch.rand(2, 2, device=DEVICE)[:, None].expand(2, 7, 2)
    for prepare, names, more in (
        (prepare_linear, "qk", [g]),
        (lambda *inputs: delta_scores(*inputs).rows, "qk", [g]),
        (prepare_delta, "qk", [beta, g[..., 0]]),
        (lambda *inputs: dplr_scores(*inputs).rows, "qkab", [g]),
    ):
        found = prepare(*(wide[name] for name in names), *more, chunks)
        expected = prepare(*(x[name] for name in names), *(m.contiguous() for m in more), chunks)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
