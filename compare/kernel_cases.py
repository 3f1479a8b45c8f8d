"""What `subquad compare kernels` runs: for each op the tensors of its variants, and beside them the peers' calls.

A peer gets the same tensors, or the same quantities in its own layout, and q unscaled.
"""

import re
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.errors import UserError
from subquad.kernels.examples import Example

Tensors = dict[str, Tensor]

# What --peer takes, and the package that has to be there for it; "torch" is our own torch form.
PEERS = {"fla": "fla", "mamba_ssm": "mamba_ssm", "causal_conv1d": "causal_conv1d", "torch": "torch"}


class Sizes(NamedTuple):
    """B sequences of T tokens in H heads, whose keys are D wide and whose values V, by default as wide."""

    B: int
    T: int
    H: int
    D: int
    V: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Sizes":
        match = re.fullmatch(r"B(\d+)T(\d+)H(\d+)D(\d+)(?:V(\d+))?", text)
        if not match or "0" in match.groups():
            raise UserError(f"--shapes: {text!r} is no shape; write one like B8T2048H16D128")
        return cls(*(None if size is None else int(size) for size in match.groups()))

    def __str__(self) -> str:
        return "".join(f"{name}{size}" for name, size in zip(self._fields, self, strict=True) if size is not None)


class Random:
    """Random tensors of a size, made where they are used."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype, device: torch.device | str):
        self.sizes, self.dtype = sizes, dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def wide(self, *shape: int) -> Tensor:
        """Normal, in float32."""
        return torch.randn(*shape, generator=self.generator, device=self.generator.device)

    def rows(self, *shape: int) -> Tensor:
        """[B, T, shape]"""
        return self.wide(self.sizes.B, self.sizes.T, *shape).to(self.dtype)

    def unit(self, *shape: int) -> Tensor:
        """[B, T, shape] of unit length in the last dimension."""
        return F.normalize(self.wide(self.sizes.B, self.sizes.T, *shape), dim=-1).to(self.dtype)

    def rate(self, *shape: int) -> Tensor:
        """[B, T, shape] between 0 and 1."""
        return self.wide(self.sizes.B, self.sizes.T, *shape).sigmoid().to(self.dtype)

    def decay(self, *shape: int) -> Tensor:
        """[B, T, shape], log decays in float32, as the layers pass them: mostly between -0.2 and -0.01."""
        return F.logsigmoid(self.wide(self.sizes.B, self.sizes.T, *shape)) / 16

    def qkv(self) -> Tensors:
        H, D, V = self.sizes.H, self.sizes.D, self.sizes.V or self.sizes.D
        return {"q": self.unit(H, D), "k": self.unit(H, D), "v": self.rows(H, V)}


class Peer(NamedTuple):
    """Another library's call: its tensors from ours, outside the time that counts, and what is timed."""

    call: Callable[[Tensors], Tensor]
    prepare: Callable[[Tensors], Tensors] = dict


class Case(NamedTuple):
    """One variant of an op. `kernels`: those of the table of launch values that it uses, each with the widths that it
    asks for whatever the sizes and the precision; `constants` names the inputs that need no gradient."""

    name: str
    op: str
    inputs: Callable[[Random], Tensors]
    kernels: Mapping[str, Mapping[str, int]]
    peers: Mapping[str, Peer]
    options: Mapping[str, Any] = {}
    constants: tuple[str, ...] = ()

    def example(self, sizes: Sizes, dtype: torch.dtype, device: torch.device | str) -> Example:
        op = getattr(import_module(f"subquad.kernels.{self.op}"), self.op)
        inputs = self.inputs(Random(sizes, dtype, device))
        return Example(f"{self.name}, {sizes}", op, inputs, dict(self.options), None, None)


def _fla(module: str, name: str, *arguments: str, **options: Any) -> dict[str, Peer]:
    """fla.ops.`module`.`name` on our tensors in the order that it wants them."""

    def call(x: Tensors) -> Tensor:
        function = getattr(import_module(f"fla.ops.{module}"), name)
        return function(*(x[argument] for argument in arguments), **{"scale": 1.0, **options})[0]

    return {"fla": Peer(call)}


def _fla_product() -> dict[str, Peer]:
    """fla has the factors of a token one after the other in time."""

    def prepare(x: Tensors) -> Tensors:
        return {**x, **{name: x[name].flatten(1, 2) for name in ("k", "v", "beta")}}

    arguments = ("q", "k", "v", "decay", "beta")
    peers = _fla("gated_delta_product", "chunk_gated_delta_product", *arguments, num_householder=2)
    return {"fla": peers["fla"]._replace(prepare=prepare)}


def _mamba_ssd() -> dict[str, Peer]:
    """Mamba-2: C, B, dt x and dt A are our q, k, v and decay."""

    def prepare(x: Tensors) -> Tensors:
        dt = -x["decay"]
        A = -torch.ones(dt.shape[2], device=dt.device)
        return {"x": (x["v"] / dt[..., None]).to(x["v"].dtype), "dt": dt, "A": A, "B": x["k"], "C": x["q"]}

    def call(x: Tensors) -> Tensor:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        return mamba_chunk_scan_combined(x["x"], x["dt"], x["A"], x["B"], x["C"], chunk_size=256)

    return {"mamba_ssm": Peer(call, prepare)}


def _causal_conv1d() -> dict[str, Peer]:
    def call(x: Tensors) -> Tensor:
        from causal_conv1d import causal_conv1d_fn

        return causal_conv1d_fn(x["x"].transpose(1, 2), x["weight"], activation="silu").transpose(1, 2)

    return {"causal_conv1d": Peer(call)}


def _retention(r: Random) -> Tensors:
    heads = torch.arange(r.sizes.H, device=r.generator.device)
    return {**r.qkv(), "decay": torch.log1p(-torch.exp2(-5.0 - heads))}


def _rwkv6(r: Random) -> Tensors:
    H, D = r.sizes.H, r.sizes.D
    return {**r.qkv(), "decay": r.decay(H, D), "bonus": r.wide(H, D).to(r.dtype)}


def _product(r: Random) -> Tensors:
    H, D, V = r.sizes.H, r.sizes.D, r.sizes.V or r.sizes.D
    factors = {"k": r.unit(2, H, D), "v": r.rows(2, H, V), "beta": r.rate(2, H)}
    return {"q": r.unit(H, D), **factors, "decay": r.decay(H)}


def _rwkv7(r: Random) -> Tensors:
    H, D = r.sizes.H, r.sizes.D
    a = r.unit(H, D)
    return {**r.qkv(), "a": a, "b": -a * r.rate(H, D), "decay": r.decay(H, D)}


def _running_max(r: Random) -> Tensors:
    D = r.sizes.H * r.sizes.D
    return {"f": r.decay(D), "i": r.wide(r.sizes.B, r.sizes.T, D)}


def _short_conv(r: Random) -> Tensors:
    D = r.sizes.H * r.sizes.D
    return {"x": r.rows(D), "weight": r.wide(D, 4).to(r.dtype)}


def _norm(r: Random) -> Tensors:
    H, D = r.sizes.H, r.sizes.D
    return {"x": r.rows(H, D), "weight": r.wide(D).to(r.dtype), "z": r.rows(H, D)}


def _through_states(**kernels: Mapping[str, int]) -> dict[str, Mapping[str, int]]:
    """These and what all with a pass over states of their own use."""
    return {"affine": {}, "chunk_products": {}} | kernels


def _decayed(readers: int, writers: int) -> dict[str, Mapping[str, int]]:
    """What makes a decay for every channel ready."""
    return {name: {"readers": readers, "writers": writers} for name in ("decayed_rows", "pair_scores")}


_CARRY = {"carry": {}}
_LINEAR = _through_states(**_decayed(1, 1), prepare_linear={}, linear_gradient={})
_DELTA, _GATED = (_through_states(prepare_delta={"gates": n}, chunk_gradient={"gates": n}) for n in (0, 1))
_KDA = _through_states(**_decayed(2, 1), prepare_delta={"gates": 2}, delta_gradient={})
_DPLR = _through_states(**_decayed(2, 2), prepare_dplr={}, dplr_gradient={})

CASES = (
    Case(
        "no decay",
        "linear_attention",
        Random.qkv,
        _CARRY,
        _fla("linear_attn", "chunk_linear_attn", *"qkv", normalize=False),
    ),
    Case(
        "constant decay",
        "linear_attention",
        _retention,
        _CARRY,
        _fla("retention", "chunk_retention", *"qkv"),
        constants=("decay",),
    ),
    Case(
        "scalar decay",
        "linear_attention",
        lambda r: {**r.qkv(), "decay": r.decay(r.sizes.H)},
        _CARRY,
        _fla("simple_gla", "chunk_simple_gla", *"qkv", "decay") | _mamba_ssd(),
    ),
    Case(
        "vector decay",
        "linear_attention",
        lambda r: {**r.qkv(), "decay": r.decay(r.sizes.H, r.sizes.D)},
        _LINEAR,
        _fla("gla", "chunk_gla", *"qkv", "decay"),
    ),
    Case(
        "RWKV-6",
        "linear_attention",
        _rwkv6,
        _LINEAR,
        _fla("rwkv6", "chunk_rwkv6", *"qkv", "decay", "bonus"),
        {"exclusive": True},
    ),
    Case(
        "delta",
        "delta_rule",
        lambda r: {**r.qkv(), "beta": r.rate(r.sizes.H)},
        _DELTA,
        _fla("delta_rule", "chunk_delta_rule", *"qkv", "beta"),
    ),
    Case(
        "gated delta",
        "delta_rule",
        lambda r: {**r.qkv(), "beta": r.rate(r.sizes.H), "decay": r.decay(r.sizes.H)},
        _GATED,
        _fla("gated_delta_rule", "chunk_gated_delta_rule", *"qkv", "decay", "beta"),
    ),
    Case(
        "KDA",
        "delta_rule",
        lambda r: {**r.qkv(), "beta": r.rate(r.sizes.H), "decay": r.decay(r.sizes.H, r.sizes.D)},
        _KDA,
        _fla("kda", "chunk_kda", *"qkv", "decay", "beta"),
    ),
    Case("delta product", "delta_rule", _product, _GATED, _fla_product()),
    Case(
        "RWKV-7",
        "dplr_rule",
        _rwkv7,
        _DPLR,
        _fla("rwkv7", "chunk_rwkv7", "q", "decay", *"kvab"),
    ),
    Case("running max", "running_max", _running_max, {}, {}),
    Case("short conv", "short_conv", _short_conv, {}, _causal_conv1d(), {"activation": "silu"}),
    Case("norm, gate", "norm", _norm, {}, {}),
)
