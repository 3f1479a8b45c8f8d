"""What layers share: the class that states the contract, and the small parts that appear in many of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import floor, gcd
from typing import Any, ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from subquad.errors import UserError
from subquad.kernels.packing import check_packed
from subquad.kernels.state import accumulator_dtype

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Card:
    """What a reader of the table of layers wants to know. Costs are for T tokens, in the letters of the docstrings."""

    paper: str
    op: str
    train: str
    decode: str
    state: str


Fact = Literal["no_decay", "float32", "residual", "keeps_init"]


@dataclass(frozen=True)
class Facts:
    """What a class says about the parameters and submodules of its instances, by the names of their attributes.

        class MyMixer(nn.Module):
            facts = Facts(no_decay=("A_log",), float32=("A_log",), residual=("o_proj",))

    Any module may declare them, whatever it derives from; a subclass adds to its bases. The class keeps them because
    torch and wrappers re-create tensors and submodules (copies, meta tensors, assigned weights, adapters, quantisers).
    A submodule's name stands for all within it, a name that an instance lacks for nothing.

    no_decay: what an optimiser must not shrink (decay rates, step sizes, filters); vectors, norms, biases and
        embeddings never are, and need no mention.
    float32: what `convert` leaves in float32 in a half-precision model: rates whose powers over thousands of tokens
        enlarge a rounding of 2^-9, and constants that the other weights were trained with.
    residual: projections back into the residual stream, whose initial weights the model divides with its depth.
    keeps_init: submodules whose initial weights follow from the layer's paper; the model leaves them alone.
    """

    no_decay: tuple[str, ...] = ()
    float32: tuple[str, ...] = ()
    residual: tuple[str, ...] = ()
    keeps_init: tuple[str, ...] = ()


def declared(module: nn.Module, fact: Fact) -> set[str]:
    """Dotted names of what the classes of `module` and of its submodules declare."""
    return {
        f"{owner}.{name}" if owner else name
        for owner, part in module.named_modules(remove_duplicate=False)
        for cls in type(part).__mro__
        if isinstance(facts := vars(cls).get("facts"), Facts)
        for name in getattr(facts, fact)
    }


def covers(names: set[str], name: str) -> bool:
    """Whether a dotted name, or one that it lies within, is among `names`."""
    parts = [part for part in name.split(".") if part != "parametrizations"]  # torch moves what it reparametrises there
    return any(".".join(parts[:n]) in names for n in range(1, len(parts) + 1))


def parameters_with(module: nn.Module, fact: Fact) -> set[str]:
    """Dotted names of the parameters and buffers for which a fact holds, second names of tied ones included."""
    names = declared(module, fact)
    return {name for name, _ in _tensors(module) if covers(names, name)}


def convert(module: M, dtype: torch.dtype) -> M:
    """`module` with its floating-point parameters and buffers in `dtype`, in place; those that stay float32 are not
    narrower than that."""
    names = parameters_with(module, "float32")
    kept = {id(part) for name, t in _tensors(module) if name in names for part in (t, t.grad)}
    wide = accumulator_dtype(dtype)
    return module._apply(lambda t: t.to(wide if id(t) in kept else dtype) if t.is_floating_point() else t)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


class Layer(nn.Module):
    """A token mixer or a feed-forward layer: y, state = layer(x, state=None, cu_seqlens=None).

    x, y: [batch, time, width]. `state=None` is a sequence from position 0 with nothing carried, and None comes back; a
    state is donated and continues the sequence for any number of tokens. `cu_seqlens` packs N sequences in one row.
    A layer that can decode has `init_state(batch_size, max_len, dtype=None)`; a stateless one returns `()` there.

    Deriving from this class is a convenience: anything that keeps the contract works. The class attributes tell the
    conformance suite what to expect and the table of layers what to print.
    """

    card: ClassVar[Card | None] = None
    kind: ClassVar[Literal["mixer", "ffn"]] = "mixer"
    causality: ClassVar[Literal["exact", "regrouped"]] = "exact"  # regrouped: equal up to the order of summation
    constant_state: ClassVar[bool] = True  # state bytes do not depend on max_len
    discrete: ClassVar[bool] = (
        False  # chooses (experts, blocks, buckets), so rounding may change an output at a near-tie
    )
    min_width: ClassVar[int] = 1
    max_len: int | None = None
    facts: ClassVar[Facts] = Facts()

    def __call__(
        self, x: Tensor, state: Any = None, cu_seqlens: Tensor | None = None, **shared: Any
    ) -> tuple[Tensor, Any]:
        check_packed(x, cu_seqlens, state)
        return super().__call__(x, state=state, cu_seqlens=cu_seqlens, **shared)


class available_if:
    """A method that exists only where `check(self)` holds, so `hasattr` tells the truth; `why` completes the error."""

    def __init__(self, check: Callable[[Any], bool], why: str):
        self.check, self.why = check, why

    def __call__(self, method: Callable[..., Any]) -> "available_if":
        self.method = method
        self.__doc__ = method.__doc__
        return self

    def __get__(self, instance: Any, owner: type) -> Callable[..., Any]:
        if instance is None:
            return self.method
        if not self.check(instance):
            raise AttributeError(f"this {owner.__name__} has no {self.method.__name__}: {self.why}")
        return self.method.__get__(instance, owner)


def default_head_dim(width: int, largest: int = 64) -> int:
    """The largest common divisor with `largest`: `largest` itself for the usual widths."""
    return gcd(width, largest)


def width_of(owner: object, name: str, ratio: float, whole: int, least: int = 1) -> int:
    """ratio * whole as a width, rounded to the nearest whole number, halves up: 960 / 704 times 704 is 960 and not the
    959 that float64 gives when cut off, and so is 1.3636 times 704."""
    width = floor(ratio * whole + 0.5)
    if width < least:
        raise UserError(f"{type(owner).__name__}: {name} {ratio} of {whole} is a width of {width}, below {least}")
    return width


def check_divides(owner: object, name: str, value: int, of: str, whole: int) -> None:
    """One sentence where `value` heads or groups do not divide a width."""
    if value < 1 or whole % value:
        raise UserError(f"{type(owner).__name__}: {name} {value} does not divide {of} {whole}")


def check_length(layer: Layer, time: int, count: Tensor | None = None, cu_seqlens: Tensor | None = None) -> None:
    """One sentence where a sequence of `time` more tokens, or of the packed lengths, grows past the layer's max_len.

    Counts and boundaries are read where that costs nothing, on the CPU; elsewhere init_state's check of max_len stands.
    """
    if layer.max_len is None:
        return
    tensors = [t for t in (count, cu_seqlens) if t is not None]
    if tensors:
        if torch.compiler.is_compiling() or any(t.device.type != "cpu" for t in tensors):
            return
        lengths = torch.tensor(time) if cu_seqlens is None else cu_seqlens.diff()
        ends = lengths if count is None else count + lengths
        time = int(ends.max()) if ends.numel() else 0
    if time > layer.max_len:
        raise UserError(f"{type(layer).__name__} serves sequences of up to {layer.max_len} tokens; {time} do not fit")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype in which autocast has projections compute, None where it is off."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):  # the meta device raises when it is asked
        return None
    return torch.get_autocast_dtype(device.type)


def placement(module: nn.Module, dtype: torch.dtype | None = None) -> tuple[torch.dtype, torch.device]:
    """The dtype and the device of caches: the dtype asked for, else autocast's, else that of the module's weights."""
    device = device_of(module)
    return dtype or autocast_dtype(device) or dtype_of(module), device


def device_of(module: nn.Module) -> torch.device:
    """Where the module's tensors are; torch's default device where a quantiser keeps them all out of sight."""
    return next((t.device for _, t in _tensors(module)), torch.get_default_device())


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of most weights: that of the largest tensor of those in sight, which need not be float32; else torch's
    default."""
    wide = declared(module, "float32")
    weights = [t for name, t in _tensors(module) if t.is_floating_point() and not covers(wide, name)]
    return max(weights, key=Tensor.numel).dtype if weights else torch.get_default_dtype()


def is_plain(module: nn.Module) -> bool:
    """Whether calling the module is F.linear on its `weight` and `bias` and nothing else.

    Not of an adapter's or a quantiser's module, nor of a Linear with hooks: those must be called to take effect.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    own = type_before_parametrizations(module) in (nn.Linear, WideLinear) and "forward" not in vars(module)
    return own and not any(hooks) and not is_traceable_wrapper_subclass(module.weight)


def matrix_of(module: nn.Module) -> Tensor | None:
    """The weight of a plain linear map without bias, for an op that needs the matrix itself; None for anything else,
    which must be called."""
    return module.weight if is_plain(module) and module.bias is None else None


def call_in_dtype(module: nn.Module, x: Tensor) -> Tensor:
    """module(x) computed in x's dtype, parameters of another cast for this call only."""
    cast = {name: t.to(x.dtype) for name, t in _tensors(module) if t.is_floating_point() and t.dtype != x.dtype}
    return functional_call(module, cast, (x,)) if cast else module(x)


class WideLinear(nn.Linear):
    """x W^T + bias with the bias added outside of the product: it stays float32 under autocast and in a half-precision
    model, and so does the sum. Rates, step sizes and filters follow from it.

    A class of its own, so that quantisers that exchange nn.Linear for one that rounds its inputs to int8 leave it.
    """

    facts = Facts(float32=("bias",))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        return y if self.bias is None else y + self.bias


MOST_TAPS = 256


def conv_weight(width: int, taps: int, bias: bool) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Weights [D, W] and bias [D] of a short convolution, uniform in +-1/sqrt(W) like torch's depthwise Conv1d."""
    if taps > MOST_TAPS:
        raise UserError(f"a short convolution of {taps:,} taps; it has at most {MOST_TAPS:,}, of which each is a pass")
    bound = taps**-0.5
    weight = nn.Parameter(torch.empty(width, taps).uniform_(-bound, bound))
    return weight, nn.Parameter(torch.empty(width).uniform_(-bound, bound)) if bias else None


def silu_gated(x: Tensor, z: Tensor) -> Tensor:
    """x * silu(z), the output gate of most linear-time mixers."""
    return x * F.silu(z)


def dt_bias(n: int, dt_min: float, dt_max: float, dt_floor: float = 1e-4) -> Tensor:
    """Biases whose softplus is log-uniform in [dt_min, dt_max] (Gu and Dao 2023, section 3.6)."""
    low, high = torch.tensor(dt_min).log(), torch.tensor(dt_max).log()
    dt = (torch.rand(n) * (high - low) + low).exp().clamp(min=dt_floor)
    return dt + (-torch.expm1(-dt)).log()  # the inverse of softplus
