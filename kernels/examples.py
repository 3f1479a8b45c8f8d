"""Small random inputs for every op: what `subquad doctor` and the tests of the ops compare the forms on.

A new op is added here, in `_CASES`, and nowhere else: one function that draws its variants.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

import subquad.kernels
from subquad.errors import UserError
from subquad.kernels.backend import OPS, backend
from subquad.kernels.bucket_attention import BucketCache
from subquad.kernels.latent_attention import LatentCache
from subquad.kernels.linformer_attention import SummaryCache
from subquad.kernels.long_conv import LongConvCache
from subquad.kernels.native_sparse_attention import NSACache
from subquad.kernels.patterns import make_pattern
from subquad.kernels.sparse_attention import SparseCache, empty_cache
from subquad.kernels.state import KVCache, RingCache, accumulator_dtype
from subquad.kernels.topk_attention import TopKCache


class Example(NamedTuple):
    """One call: op(**inputs, **options, state=state, cu_seqlens=cu_seqlens), without what the op does not take."""

    name: str
    op: Callable[..., Any]
    inputs: dict[str, Tensor]
    options: dict[str, Any]
    state: Any
    cu_seqlens: Tensor | None

    def call(self) -> tuple[Tensor, Any]:
        """(output, new state or None); of `norm` the sum that it also returns."""
        rows = {"cu_seqlens": self.cu_seqlens} if packs(self.op) else {}
        if not carries(self.op):
            found = self.op(**self.inputs, **self.options, **rows)
            return found if isinstance(found, tuple) else (found, None)
        return self.op(**self.inputs, **self.options, state=self.state, **rows)

    def to(self, to: torch.dtype | str) -> "Example":
        """With its floating-point tensors in another precision (of the same kind), or with all on another device."""
        return Example(*pytree.tree_map(lambda x: _converted(x, to), tuple(self)))


@cache  # asking a signature takes longer than a small kernel
def carries(op: Callable[..., Any]) -> bool:
    return "state" in inspect.signature(op).parameters


@cache
def packs(op: Callable[..., Any]) -> bool:
    return "cu_seqlens" in inspect.signature(op).parameters


def _converted(x: Any, to: torch.dtype | str) -> Any:
    if not isinstance(x, Tensor) or (isinstance(to, torch.dtype) and not x.is_floating_point() and not x.is_complex()):
        return x
    return x.to(to.to_complex() if isinstance(to, torch.dtype) and x.is_complex() else to)


class Draw:
    """Random tensors for B rows of T tokens that hold N sequences."""

    def __init__(self, B: int, T: int, N: int, carried: bool, dtype: torch.dtype, generator: torch.Generator):
        self.B, self.T, self.N, self.carried, self.dtype, self.generator = B, T, N, carried, dtype, generator

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, dtype=dtype or self.dtype, generator=self.generator)

    def tokens(self, *shape: int) -> Tensor:
        """[B, T, ...]"""
        return self.normal(self.B, self.T, *shape)

    def unit(self, *shape: int) -> Tensor:
        """[B, T, ...] of unit length in the last dimension."""
        return F.normalize(self.tokens(*shape), dim=-1)

    def uniform(self, *shape: int, high: float = 1.0) -> Tensor:
        return high * torch.rand(*shape, dtype=self.dtype, generator=self.generator)

    def gate(self, *shape: int) -> Tensor:
        """A log decay: mostly between -2 and 0, now and then a full stop."""
        g = -2 * self.uniform(*shape)
        return torch.where(self.uniform(*shape) < 0.05, -50.0, g)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)


Case = tuple[str, dict[str, Tensor], dict[str, Any], Any]  # name, inputs, options, state (read only if carried)


def examples(
    op: str, *, time: int = 70, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0
) -> list[Example]:
    """Calls that show each option of `op`, from nothing and from a state, as a batch and packed.

    The packed row holds an empty sequence and ends in padding.
    """
    if op not in _CASES:
        raise UserError(f"the op {op} has no examples; add them to subquad.kernels.examples")
    function = getattr(import_module(f"subquad.kernels.{op}"), op)
    generator = torch.Generator().manual_seed(seed)
    used = max(time - 3, 1)
    cu_seqlens = torch.tensor([0, used // 3, used // 3, used], dtype=torch.int32)
    found = []
    for setting, B, N, carried, cu in (
        ("fresh", 2, 2, False, None),
        ("carried", 2, 2, True, None),
        ("packed", 1, 3, False, cu_seqlens),
        ("packed, carried", 1, 3, True, cu_seqlens),
    ):
        if (carried and not carries(function)) or (cu is not None and not packs(function)):
            continue
        for name, inputs, options, state in _CASES[op](Draw(B, time, N, carried, dtype, generator)):
            example = Example(f"{name}, {setting}", function, inputs, options, state if carried else None, cu)
            found.append(example.to(device))
    return found


def load_ops() -> dict[str, tuple[str, ...]]:
    """Every op and its forms, once all of subquad.kernels is imported."""
    for module in iter_modules(subquad.kernels.__path__):
        import_module(f"subquad.kernels.{module.name}")
    return OPS


def run(example: Example, form: str, seed: int = 0) -> dict[str, Tensor]:
    """The output, the new state and the gradient of every input by name, with random gradients from above."""
    inputs, state = pytree.tree_map(_leaf, (example.inputs, example.state))
    with backend(form), torch.enable_grad():
        out, new_state = example._replace(inputs=inputs, state=state).call()
    results = {"out": out, **_named("new state", new_state)}
    generator = torch.Generator().manual_seed(seed)
    loss = out.new_zeros((), dtype=torch.float64)
    for value in results.values():
        if value.requires_grad:
            wide = torch.complex128 if value.is_complex() else torch.float64  # the same weights whatever the precision
            weight = torch.randn(value.shape, dtype=wide, generator=generator).to(value.device)
            loss = loss + (weight * value).sum().real
    sources = {name: x for name, x in {**inputs, **_named("state", state)}.items() if x.requires_grad}
    gradients = torch.autograd.grad(loss, list(sources.values()), materialize_grads=True)
    results |= {f"gradient of {name}": g for name, g in zip(sources, gradients, strict=True)}
    return {name: value.detach() for name, value in results.items()}


def run_in_place(example: Example, form: str) -> dict[str, Tensor]:
    """The output and the new state, without gradients, as in decoding."""
    state = pytree.tree_map(lambda x: x.to(accumulator_dtype(x.dtype), copy=True), example.state)
    with backend(form), torch.no_grad():
        out, new_state = example._replace(state=state).call()
    return {"out": out, **_named("new state", new_state)}


def differences(
    example: Example, form: str, run: Callable[[Example, str], dict[str, Tensor]] = run
) -> dict[str, float]:
    """||form - naive|| / ||naive|| of all that `run` returns, the naive form in float64 on the CPU, where a loop over
    short rows is fastest; NaN if either has one."""
    ours, reference = run(example, form), run(example.to(torch.float64).to("cpu"), "naive")
    return {name: relative_error(ours[name].cpu(), reference[name]) for name in reference}


def sensitivity(
    example: Example, step: float, run: Callable[[Example, str], dict[str, Tensor]] = run
) -> dict[str, float]:
    """How far the definition's results move when each input does by up to `step` of itself."""
    example = example.to(torch.float64).to("cpu")
    generator = torch.Generator().manual_seed(0)

    def nudged(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return x * (1 + step * (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1))

    inputs, state = pytree.tree_map(nudged, (example.inputs, example.state))
    there, here = run(example._replace(inputs=inputs, state=state), "naive"), run(example, "naive")
    return {name: relative_error(there[name], here[name]) for name in here}


def relative_error(value: Tensor, reference: Tensor) -> float:
    """||value - reference|| / ||reference||; inf where the shapes differ.

    It is absolute where the reference is below 1e-6, which is a zero that was rounded.
    """
    if value.shape != reference.shape:
        return float("inf")
    wide = torch.complex128 if reference.is_complex() else torch.float64
    value, reference = value.to(wide), reference.to(wide)
    norm = float(reference.detach().norm())
    return float((value - reference).norm()) / (norm if norm > 1e-6 else 1.0)


def _leaf(x: Any) -> Any:
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
        return x
    return x.detach().clone().requires_grad_()


def _named(name: str, tree: Any) -> dict[str, Tensor]:
    pairs, _ = pytree.tree_flatten_with_path(tree)
    return {name + pytree.keystr(path): x for path, x in pairs if isinstance(x, Tensor)}


def _attention(r: Draw) -> Iterator[Case]:
    H, G, K, V, W = 4, 2, 5, 7, 6
    seen = r.integers(0, 4 * W, r.N)

    def qkv() -> dict[str, Tensor]:
        return {"q": r.tokens(H, K), "k": r.tokens(G, K), "v": r.tokens(G, V)}

    def full() -> KVCache:
        slots = 4 * W + r.T
        return KVCache(r.normal(r.N, slots, G, K), r.normal(r.N, slots, G, V), seen.clone())

    def ring(n_sinks: int, spare: int) -> RingCache:
        slots = n_sinks + W + spare
        return RingCache(r.normal(r.N, slots, G, K), r.normal(r.N, slots, G, V), seen.clone())

    yield "all before", qkv(), {}, full()
    yield "sink logits", {**qkv(), "sink_logits": r.normal(H)}, {}, full()
    yield "window", qkv(), {"window": W}, ring(0, 3)
    yield "window, cache of everything", qkv(), {"window": W}, full()
    yield "window, sinks", qkv(), {"window": W, "n_sinks": 2}, ring(2, 0)
    yield "window, sinks, room to spare", qkv(), {"window": W, "n_sinks": 2}, ring(2, r.T)
    if r.carried:
        level = torch.full_like(seen, 9)
        yield "empty cache", qkv(), {}, full()._replace(count=torch.zeros_like(seen))
        yield "equal counts", qkv(), {}, full()._replace(count=level)
        yield "window, sinks, equal counts", qkv(), {"window": W, "n_sinks": 2}, ring(2, 0)._replace(count=level)
    else:
        yield "bidirectional", qkv(), {"causal": False}, None
        yield "bidirectional window", qkv(), {"causal": False, "window": W}, None


def _grouped_mlp(r: Draw) -> Iterator[Case]:
    D, F, E, k = 8, 12, 5, 2  # aligned for grouped products in float32
    M = r.B * r.T
    expert = r.uniform(M, E).argsort(-1)[:, :k].clamp(max=E - 2)  # nobody chooses the last, some choose one twice
    inputs = {"x": r.normal(M, D), "expert": expert, "weight": r.uniform(M, k)}
    inputs |= {"gate_up": r.normal(E, 2 * F, D), "down": r.normal(E, D, F)}
    yield "plain", inputs, {}, None
    biases = {"gate_up_bias": r.normal(E, 2 * F), "down_bias": r.normal(E, D)}
    yield "biases, clamped gate", inputs | biases, {"gate": "clamped"}, None


def _latent_attention(r: Draw) -> Iterator[Case]:
    H, K, P, V = 3, 5, 4, 7
    # A short latent is absorbed for every length; a long one only for few new tokens.
    for name, R in (("short latent", 2), ("long latent", 40)):
        inputs = {"q": r.tokens(H, K), "q_rope": r.tokens(H, P), "c": r.tokens(R), "k_rope": r.tokens(P)}
        weights = {"w_k": r.normal(H, K, R) / R**0.5, "w_v": r.normal(H, V, R)}
        slots = 24 + r.T
        cache = LatentCache(r.normal(r.N, slots, R), r.normal(r.N, slots, P), r.integers(0, 24, r.N))
        yield name, inputs | weights, {}, cache
        if r.carried:
            empty = cache._replace(count=torch.zeros_like(cache.count))
            yield f"{name}, empty cache", inputs | weights, {}, empty


def _linear_attention(r: Draw) -> Iterator[Case]:
    H, G, K, V = 4, 2, 5, 7

    def qkv(groups: int) -> dict[str, Tensor]:
        return {"q": r.tokens(groups, K), "k": r.tokens(groups, K), "v": r.tokens(H, V)}

    def S() -> Tensor:
        return r.normal(r.N, H, K, V)

    yield "no decay", qkv(G), {}, S()
    yield "constant decay", {**qkv(G), "decay": r.gate(H)}, {}, S()
    yield "constant vector decay", {**qkv(H), "decay": r.gate(H, K)}, {}, S()
    yield "scalar decay", {**qkv(G), "decay": r.gate(r.B, r.T, H)}, {}, S()
    yield "vector decay", {**qkv(G), "decay": r.gate(r.B, r.T, H, K)}, {}, S()
    yield (
        "exclusive, bonus",
        {**qkv(H), "decay": r.gate(r.B, r.T, H, K), "bonus": r.normal(H, K)},
        {"exclusive": True},
        S(),
    )
    positive = {name: x.abs() if name in "qk" else x for name, x in qkv(G).items()}
    yield "normalizer", positive, {"normalizer": 1e-3}, (S(), r.uniform(r.N, H, K))


def _linformer_attention(r: Draw) -> Iterator[Case]:
    H, K, V, R, C = 3, 5, 7, 2, 6

    def inputs(length: int) -> dict[str, Tensor]:
        qkv = {"q": r.tokens(H, K), "k": r.tokens(H, K), "v": r.tokens(H, V)}
        return qkv | {"e_k": r.normal(R, length), "e_v": r.normal(R, length)}

    slots = (24 + r.T) // C * R
    caches = [r.normal(r.N, n, H, width) for n in (slots, C) for width in (K, V)]
    yield "causal", inputs(C), {}, SummaryCache(*caches, r.integers(0, 24, r.N))
    if not r.carried:
        yield "bidirectional", inputs(r.T + 3), {"causal": False}, None


def _delta_rule(r: Draw) -> Iterator[Case]:
    H, G, K, V = 4, 2, 5, 7

    def inputs() -> dict[str, Tensor]:
        beta = r.uniform(r.B, r.T, H, high=1.99)
        return {"q": r.tokens(G, K), "k": r.unit(G, K), "v": r.tokens(H, V), "beta": beta}

    for name, decay in (("no", None), ("scalar", r.gate(r.B, r.T, H)), ("vector", r.gate(r.B, r.T, H, K))):
        yield f"{name} decay", inputs() | ({} if decay is None else {"decay": decay}), {}, r.normal(r.N, H, K, V)
    for R, decay in ((2, r.gate(r.B, r.T, H)), (3, r.gate(r.B, r.T, H, K))):
        beta = r.uniform(r.B, r.T, R, H, high=1.99)
        factors = {"k": r.unit(R, G, K), "v": r.tokens(R, H, V), "beta": beta, "decay": decay}
        yield f"{R} factors", {"q": r.tokens(G, K), **factors}, {}, r.normal(r.N, H, K, V)


def _dplr_rule(r: Draw) -> Iterator[Case]:
    H, K, V = 4, 5, 7

    def inputs() -> dict[str, Tensor]:
        a = r.unit(H, K)
        b = -a * r.uniform(r.B, r.T, H, K)
        return {"q": r.tokens(H, K), "k": r.tokens(H, K), "v": r.tokens(H, V), "a": a, "b": b}

    for name, decay in (("no", None), ("scalar", r.gate(r.B, r.T, H)), ("vector", r.gate(r.B, r.T, H, K))):
        yield f"{name} decay", inputs() | ({} if decay is None else {"decay": decay}), {}, r.normal(r.N, H, K, V)


def _short_conv(r: Draw) -> Iterator[Case]:
    D, W = 6, 4
    inputs = {"x": r.tokens(D), "weight": r.normal(D, W)}
    yield "no bias", inputs, {}, r.normal(r.N, W - 1, D)
    yield "bias, silu", {**inputs, "bias": r.normal(D)}, {"activation": "silu"}, r.normal(r.N, W - 1, D)


def _long_conv(r: Draw) -> Iterator[Case]:
    D = 5
    state = LongConvCache(r.normal(r.N, 24 + r.T, D), r.integers(0, 24, r.N))
    for name, length in (("whole", 24 + r.T), ("short", 1 + r.T // 3)):
        yield f"{name} filter", {"x": r.tokens(D), "filter": r.normal(D, length)}, {}, state


def _scan(r: Draw) -> Iterator[Case]:
    D = 5
    yield "real", {"a": r.gate(r.B, r.T, D).exp(), "b": r.tokens(D)}, {}, r.normal(r.N, D)
    turning = torch.polar(r.uniform(r.B, r.T, D), 3 * r.tokens(D))
    wide = turning.dtype
    yield "complex", {"a": turning, "b": r.normal(r.B, r.T, D, dtype=wide)}, {}, r.normal(r.N, D, dtype=wide)


def _lti(r: Draw) -> Iterator[Case]:
    H, N = 3, 4

    def system(dtype: torch.dtype) -> dict[str, Tensor]:
        decay = 0.5 + 0.5 * r.uniform(H, N)
        A = torch.polar(decay, 2 * r.normal(H, N)) if dtype.is_complex else decay
        return {"u": r.tokens(H), "A": A, "B": r.normal(H, N, dtype=dtype), "C": r.normal(H, N, dtype=dtype)}

    wide = r.dtype.to_complex()
    yield "real", system(r.dtype), {}, r.normal(r.N, H, N)
    yield "complex", system(wide), {}, r.normal(r.N, H, N, dtype=wide)
    for name, dtype in (("real", r.dtype), ("complex", wide)):
        P, Q = (0.3 * r.normal(H, N, dtype=dtype) for _ in range(2))
        inputs = system(dtype)
        inputs["A"] = 0.5 * inputs["A"]
        yield f"low rank, {name}", {**inputs, "P": P, "Q": Q}, {}, r.normal(r.N, H, N, dtype=dtype)


def _norm(r: Draw) -> Iterator[Case]:
    G, D = 3, 18
    x, weights = {"x": r.tokens(D)}, {"weight": r.normal(D), "bias": r.normal(D)}
    yield "plain", x, {"scale": 0.25}, None
    yield "weight, residual", {**x, "weight": r.normal(D), "residual": r.tokens(D)}, {}, None
    yield "heads, weight, gate", {"x": r.tokens(4, D), "weight": r.normal(D), "z": r.tokens(4, D)}, {}, None
    yield "centered, weight, bias, gate", {**x, **weights, "z": r.tokens(D)}, {"centered": True}, None
    gated = {**x, "weight": r.normal(D), "z": r.tokens(D)}
    yield "groups, gate first", gated, {"n_groups": G, "gate_first": True}, None
    options = {"centered": True, "n_groups": G, "activation": "sigmoid", "scale": 0.5}
    yield "centered, all", {**x, **weights, "z": r.tokens(D), "residual": r.tokens(D)}, options, None


def _nystrom_attention(r: Draw) -> Iterator[Case]:
    H, K, V = 3, 5, 7
    qkv = {"q": r.tokens(H, K), "k": r.tokens(H, K), "v": r.tokens(H, V)}
    yield "plain", qkv, {"n_landmarks": 4}, None
    yield "conv", {**qkv, "conv": r.normal(H, 5)}, {"n_landmarks": 30, "n_iterations": 3}, None


def _running_max(r: Draw) -> Iterator[Case]:
    D = 5
    yield "plain", {"f": r.gate(r.B, r.T, D), "i": 3 * r.tokens(D)}, {"initial": -1.5}, 3 * r.normal(r.N, D)


def _selective_scan(r: Draw) -> Iterator[Case]:
    D, N = 6, 4
    inputs = {"x": r.tokens(D), "dt": r.uniform(r.B, r.T, D), "A": -2 * r.uniform(D, N)}
    yield "plain", {**inputs, "B": r.tokens(N), "C": r.tokens(N)}, {}, r.normal(r.N, D, N)


def _sparse_attention(r: Draw) -> Iterator[Case]:
    H, G, K = 4, 2, 5
    parts = [{"name": "dilated_window", "window": 4, "dilation": [1, 2, 2, 3]}, {"name": "global_tokens", "n": 2}]
    for name, spec in (
        ("longformer", {"name": "longformer", "window": 6, "n_global": 3}),
        ("bigbird", {"name": "bigbird", "block": 4, "n_random": 2, "span": 5, "n_global": 4}),
        ("fixed", {"name": "sparse_transformer", "stride": 6, "width": 2}),
        ("strided", {"name": "sparse_transformer_strided", "stride": 6}),
        ("dilated", parts),
    ):
        for causal in (True,) if r.carried else (True, False):
            pattern = make_pattern(spec, causal)
            cache = empty_cache(pattern, r.N, 24 + r.T, G, K, r.dtype, torch.device("cpu"))
            filled = [r.normal(*x.shape) for x in cache[:4]]
            inputs = {"q": r.tokens(H, K), "k": r.tokens(G, K), "v": r.tokens(G, K)}
            state = SparseCache(*filled, r.integers(0, 24, r.N))
            yield name + ("" if causal else ", bidirectional"), inputs, {"pattern": pattern}, state


def _topk_attention(r: Draw) -> Iterator[Case]:
    H, G, K, V, block = 4, 2, 5, 7, 6
    slots = 24 + r.T
    for top_k in (1, 3):
        inputs = {"q": r.tokens(H, K), "k": r.tokens(G, K), "v": r.tokens(G, V)}
        cache = r.normal(r.N, slots, G, K), r.normal(r.N, slots, G, V), r.normal(r.N, -(-slots // block), G, K)
        state = TopKCache(*cache, r.integers(0, 24, r.N))
        yield f"{top_k} blocks", inputs, {"block": block, "top_k": top_k}, state


def _native_sparse_attention(r: Draw) -> Iterator[Case]:
    H, G, K, V, block = 4, 2, 5, 7, 6
    slots, blocks = 24 + r.T, -(-(24 + r.T) // block)
    inputs = {"q": r.tokens(H, K), "k": r.tokens(G, K), "v": r.tokens(G, V), "gates": r.uniform(r.B, r.T, H, 3)}
    caches = [r.normal(r.N, s, G, width) for s in (slots, blocks) for width in (K, V)]
    options = {"block": block, "top_k": 4, "window": 9}
    yield "plain", inputs, options, NSACache(*caches, r.integers(0, 24, r.N))


def _bucket_attention(r: Draw) -> Iterator[Case]:
    H, K, n, W = 3, 5, 4, 6
    inputs = {"q": r.tokens(H, K), "k": r.tokens(H, K), "v": r.tokens(H, K), "bucket": r.integers(0, n, r.B, r.T, H)}
    rings = r.normal(r.N, H, n, W, K), r.normal(r.N, H, n, W, K)
    state = BucketCache(*rings, r.integers(0, 3 * W, r.N, H, n), r.integers(0, 40, r.N))
    yield "plain", inputs, {"n_buckets": n, "window": W}, state


_CASES: dict[str, Callable[[Draw], Iterator[Case]]] = {
    "attention": _attention,
    "bucket_attention": _bucket_attention,
    "delta_rule": _delta_rule,
    "dplr_rule": _dplr_rule,
    "grouped_mlp": _grouped_mlp,
    "latent_attention": _latent_attention,
    "linear_attention": _linear_attention,
    "linformer_attention": _linformer_attention,
    "long_conv": _long_conv,
    "lti": _lti,
    "norm": _norm,
    "nystrom_attention": _nystrom_attention,
    "running_max": _running_max,
    "scan": _scan,
    "selective_scan": _selective_scan,
    "short_conv": _short_conv,
    "native_sparse_attention": _native_sparse_attention,
    "sparse_attention": _sparse_attention,
    "topk_attention": _topk_attention,
}
