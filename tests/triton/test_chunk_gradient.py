"""The chunk-parallel gradients against float64 autograd through the recurrences, chunk by chunk, from given states."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from subquad.kernels.triton.chunk_gradient import delta_gradient, dplr_gradient, linear_gradient
from subquad.kernels.triton.configs import forced
from subquad.kernels.triton.decayed_rows import decayed_rows
from subquad.kernels.triton.segments import CHUNK, cut

pytestmark = pytest.mark.unchecked

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32] if DEVICE == "cpu" else [torch.float32, torch.bfloat16, torch.float16]
BAR = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
GATES = [None, "scalar", "vector"]


@pytest.fixture(autouse=True)
def several_places_a_program(monkeypatch):
    """Of those that look for chunks which one product does not serve."""
    monkeypatch.setattr("subquad.kernels.triton.chunk_gradient.LOOKING", 1)


def spread(x, bounds):
    """[B, T, ...] as [n, CHUNK, ...] in float64, zeros past each chunk's end."""
    out = x.new_zeros(len(bounds), CHUNK, *x.shape[2:], dtype=torch.float64)
    for i, (b, start, end) in enumerate(bounds):
        out[i, : end - start] = x[b, start:end]
    return out


def joined(x, bounds, like):
    out = torch.zeros(*like.shape[:2], *x.shape[2:], dtype=x.dtype, device=x.device)
    for i, (b, start, end) in enumerate(bounds):
        out[b, start:end] = x[i, : end - start]
    return out


def chunk_bounds(B, T, cu):
    if cu is None:
        return [(b, s, min(s + CHUNK, T)) for b in range(B) for s in range(0, T, CHUNK)]
    return [(0, s, min(s + CHUNK, end)) for begin, end in pairwise(cu) for s in range(begin, end, CHUNK)]


def outer(k, v):
    return k[..., :, None] * v[..., None, :]


def read(q, S):
    return (q[..., None, :] @ S).squeeze(-2)


def decayed(S, g):
    return S if g is None else S * (g[..., None, None] if g.dim() == 2 else g[..., None]).exp()


def linear_step(S, x, exclusive=False):
    before, after = S, decayed(S, x.get("g")) + outer(x["k"], x["v"])
    out = read(x["q"], before if exclusive else after)
    if "bonus" in x:
        out = out + (x["q"] * x["bonus"] * x["k"]).sum(-1, keepdim=True) * x["v"]
    return after, out, None


def delta_step(S, x):
    S = decayed(S, x.get("g"))
    u = x["beta"][..., None] * (x["v"] - read(x["k"], S))
    S = S + outer(x["k"], u)
    return S, read(x["q"], S), u


def dplr_step(S, x):
    u = read(x["a"], S)
    S = decayed(S, x.get("g")) + outer(x["k"], x["v"]) + outer(x["b"], u)
    return S, read(x["q"], S), u


class Problem:
    """Random inputs in `dtype`, and float64 gradients of <o, do> + <S after each chunk, dS> by autograd."""

    def __init__(self, step, rows, *, B=2, T=100, H=2, K=20, V=24, cu=None, gates=None, make_gates=None, bonus=False,
                 groups=None, dtype=torch.float32, arrange=lambda x: x, upstream=lambda x: x):  # fmt: skip
        def random(*shape):
            return torch.randn(shape, dtype=torch.float64, device=DEVICE).to(dtype)

        unit = torch.nn.functional.normalize
        x = {name: random(B, T, groups or H, K) for name in rows}
        x["v"] = random(B, T, H, V)
        for name in rows:
            if name in "kab":
                x[name] = unit(x[name].double(), dim=-1).to(dtype)
        if "b" in x:
            x["b"] = -(x["a"].double() * torch.rand(B, T, H, K, device=DEVICE)).to(dtype)
        if step is delta_step:
            x["beta"] = (1.99 * torch.rand(B, T, H, device=DEVICE)).to(dtype)
        if gates:
            shape = (B, T, H) if gates == "scalar" else (B, T, H, K)
            x["g"] = (make_gates or (lambda *s: -torch.rand(s)))(*shape).to(DEVICE, torch.float32)
        x = {name: arrange(t) for name, t in x.items()}
        if bonus:
            x["bonus"] = random(H, K)
        self.cu = None if cu is None else torch.tensor(cu, dtype=torch.int32, device=DEVICE)
        self.chunks = cut(x["v"], self.cu, CHUNK)
        self.bounds = chunk_bounds(B, T, cu)
        self.x, n = x, len(self.bounds)
        state = (self.chunks.count, H, K, V)
        self.S, self.dS, self.do = random(*state), random(*state), upstream(random(B, T, H, V))
        leaves = {name: spread(t, self.bounds).requires_grad_() for name, t in x.items() if name != "bonus"}
        if bonus:
            leaves["bonus"] = x["bonus"].double().requires_grad_()
        tokens = {
            name: t.repeat_interleave(H // groups, 2) if groups and name in rows else t for name, t in leaves.items()
        }
        heads = {}
        for name in rows:
            heads[name] = tokens[name]
            heads[name].retain_grad()
        S, outs, us = self.S[:n].double(), [], []
        for t in range(CHUNK):
            S, out, u = step(S, {name: y if name == "bonus" else y[:, t] for name, y in tokens.items()})
            outs.append(out)
            us.append(u)
            if u is not None:
                u.retain_grad()
        loss = (torch.stack(outs, 1) * spread(self.do, self.bounds)).sum() + (S * self.dS[:n].double()).sum()
        loss.backward()
        self.expected = {}
        for name, leaf in leaves.items():
            grad = (heads.get(name, leaf)).grad
            self.expected["d" + name] = grad if name == "bonus" else joined(grad, self.bounds, x["v"])
        if us[0] is not None:
            self.u = joined(torch.stack([u.detach() for u in us], 1), self.bounds, x["v"]).to(dtype)
            self.e = joined(torch.stack([u.grad for u in us], 1), self.bounds, x["v"]).to(dtype)

    def differences(self, found):
        """Of each gradient, over the rows in sequences, relative to its norm; NaN where a row was not written."""
        errors = {}
        for name, got in found._asdict().items():
            if got is None:
                assert name not in self.expected
                continue
            want, got = self.expected[name], got.double()
            if name != "dbonus":
                assert got.shape == want.shape
                want, got = spread(want, self.bounds), spread(got, self.bounds)
            errors[name] = float((got - want).norm() / want.norm().clamp(min=1e-30))
        assert errors
        return errors

    def check(self, found, bar=None):
        bar = bar or BAR[self.x["v"].dtype]
        errors = self.differences(found)
        assert all(error < bar for error in errors.values()), errors


def gates_of(p):
    """What the gradients take of a decay for every channel."""
    g = p.x.get("g")
    if g is None or g.dim() == 3:
        return None, None
    found = decayed_rows(p.x["q"], None, p.x["k"], None, g, p.chunks)
    return found.sums, found.whole


def linear(exclusive=False, **options):
    p = Problem(lambda S, x: linear_step(S, x, exclusive), ["q", "k"], **options)
    x = p.x
    return p, linear_gradient(
        x["q"], x["k"], x["v"], x["g"], *gates_of(p), p.do, p.S, p.dS, p.chunks, exclusive=exclusive,
        bonus=x.get("bonus"),
    )  # fmt: skip


def delta(**options):
    p = Problem(delta_step, ["q", "k"], **options)
    x = p.x
    return p, delta_gradient(
        x["q"], x["k"], x["v"], x["beta"], x.get("g"), *gates_of(p), p.do, p.u, p.e, p.S, p.dS, p.chunks
    )  # fmt: skip


def dplr(**options):
    p = Problem(dplr_step, ["q", "k", "a", "b"], **options)
    x = p.x
    return p, dplr_gradient(
        *(x[name] for name in "qkvab"), x["g"], *gates_of(p), p.do, p.u, p.e, p.S, p.dS, p.chunks
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("exclusive", [False, True])
def test_linear(exclusive, dtype):
    p, found = linear(gates="vector", exclusive=exclusive, bonus=exclusive, dtype=dtype)
    assert found.dq.dtype == found.dk.dtype == dtype
    p.check(found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gates", GATES)
def test_delta(gates, dtype):
    p, found = delta(gates=gates, dtype=dtype)
    assert {x.dtype for x in (found.dq, found.dk, found.dv, found.dbeta)} == {dtype}
    p.check(found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dplr(dtype):
    p, found = dplr(gates="vector", dtype=dtype)
    assert {x.dtype for x in (found.dq, found.dk, found.da, found.db)} == {dtype}
    p.check(found)


RULES = [linear, lambda **options: linear(exclusive=True, bonus=True, **options), delta, dplr]
NAMES = ["linear", "exclusive", "delta", "dplr"]


def mixed(*shape):
    choices = torch.tensor([0.0, -1e-6, -0.01, -1.0, -20.0, -1e4])
    return choices[torch.randint(len(choices), shape)]


def all_forgotten(*shape):
    return torch.full(shape, -1e4)


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
@pytest.mark.parametrize("make_gates", [mixed, torch.zeros, all_forgotten])
def test_extreme_gates(rule, make_gates):
    for gates in ["scalar", "vector"] if rule is delta else ["vector"]:
        p, found = rule(B=1, T=70, H=1, gates=gates, make_gates=make_gates)
        if make_gates is all_forgotten:
            assert float(found.dg.abs().max()) < 1e-5, "it is zero, and has no relative error"
            del p.expected["dg"]
            found = found._replace(dg=None)
        p.check(found)


@pytest.mark.parametrize("T", [1, 2, 7, 63, 64, 65])
@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_lengths(rule, T):
    p, found = rule(B=1, T=T, H=1, K=16, V=16, gates="vector")
    p.check(found)


def test_more_chunks_than_the_program_looks_at_at_once():
    p, found = linear(B=9, T=12, H=2, K=16, V=16, gates="vector", make_gates=mixed)
    p.check(found)


@pytest.mark.parametrize("gates", GATES)
def test_what_waits_is_launched_before_its_parts_are_summed(gates, monkeypatch):
    p = Problem(delta_step, ["q", "k"], B=1, T=3, H=1, K=16, V=16, gates=gates)
    (q, k, v, beta), found, order, total = (p.x[name] for name in ("q", "k", "v", "beta")), gates_of(p), [], Tensor.sum
    monkeypatch.setattr("subquad.kernels.triton.chunk_gradient.settle", lambda: order.append("launched"))
    monkeypatch.setattr(Tensor, "sum", lambda *given: order.append("summed") or total(*given))
    delta_gradient(q, k, v, beta, p.x.get("g"), *found, p.do, p.u, p.e, p.S, p.dS, p.chunks)
    assert order[:2] == ["launched", "summed"]


def test_no_tokens():
    def none(*shape):
        return torch.empty(2, 0, 3, *shape, device=DEVICE)

    q, v, S = none(16), none(8), torch.randn(2, 3, 16, 8, device=DEVICE)
    chunks = cut(v, None, CHUNK)
    sums, whole = torch.zeros(2, 3, CHUNK, 16, dtype=torch.int32, device=DEVICE), torch.ones(2, 3, 16, device=DEVICE)
    found = delta_gradient(q, q, v, none(), none(16), sums, whole, v, v, v, S, S, chunks)
    assert found.dq.shape == found.dg.shape == q.shape
    assert (found.dv.shape, found.dbeta.shape) == (v.shape, none().shape)
    bonus = torch.ones(3, 16, device=DEVICE)
    found = linear_gradient(q, q, v, none(16), sums, whole, v, S, S, chunks, exclusive=True, bonus=bonus)
    assert torch.equal(found.dbonus, torch.zeros_like(bonus))


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_strides(rule):
    """Inputs and upstream gradients need not be contiguous."""

    def strided(x):
        return torch.stack([x, torch.full_like(x, torch.nan)], 2)[:, :, 0]  # another tensor in between

    def expanded(x):
        return x[:, :1, :1, :1].expand_as(x)

    p, found = rule(B=1, T=40, H=2, K=16, V=16, gates="vector", arrange=strided, upstream=expanded)
    p.check(found)


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_packed(rule):
    """Sequences without tokens too, and padding past the last."""
    p, found = rule(B=1, T=150, H=1, cu=[0, 0, 70, 70, 71, 140, 140], gates="vector")
    p.check(found)


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_blocks_of_both_widths(rule):
    """Odd widths over several blocks of either."""
    kernels = {"vector": {delta: "delta_gradient", dplr: "dplr_gradient"}.get(rule, "linear_gradient")}
    if rule is delta:
        kernels["scalar"] = "chunk_gradient"
    for gates, kernel in kernels.items():
        with forced(kernel, {"BLOCK_K": 16, "BLOCK_V": 16, "num_warps": 4, "num_stages": 1}):
            p, found = rule(B=1, T=70, H=1, K=37, V=19, gates=gates)
        p.check(found)


@pytest.mark.parametrize("rule", RULES[:3], ids=NAMES[:3])
def test_heads_that_share_keys(rule):
    p, found = rule(B=1, T=20, H=4, groups=2, K=16, V=16, gates="vector")
    assert found.dq.shape[2] == 4
    p.check(found)
