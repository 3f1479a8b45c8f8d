"""What every Triton kernel here shares: tiles of rows, products, cumulated gates; and on the host their precision."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.kernels.backend import INTERPRETED
from subquad.kernels.triton.launch import power_of_2

EMULATED = tl.constexpr(INTERPRETED)  # kernels see no other globals


def precision(dtype: torch.dtype) -> dict[str, object]:
    """The constexpr pair (DOT, PRECISION): what products take their operands in; they always accumulate in float32.

    bfloat16 multiplies as it is. float16 goes through tf32, which has its mantissa and none of its overflow. float32
    takes three tf32 products, as good as float32, or one where torch was told that tf32 will do. The interpreter's
    bfloat16 products are wrong, so all is float32 there.
    """
    if INTERPRETED:
        return {"DOT": tl.float32, "PRECISION": "ieee"}
    if dtype == torch.bfloat16:
        return {"DOT": tl.bfloat16, "PRECISION": "tf32"}
    single = dtype == torch.float16 or torch.get_float32_matmul_precision() != "highest"
    return {"DOT": tl.float32, "PRECISION": "tf32" if single else "tf32x3"}


def operand_size(dtype: torch.dtype) -> int:
    """The bytes of an element of what products take their operands in, by which they fill shared memory."""
    return 2 if dtype == torch.bfloat16 else 4


def padded(width: int) -> int:
    """The tile that holds `width` columns: a power of two, and no less than a matrix product takes."""
    return max(16, power_of_2(width))


def columns(width: int, dtype: torch.dtype, most: int | None = None) -> int:
    """The columns of a tile of operands: enough for `width`, or `most` at a time, and 128 bytes at least.

    On Hopper triton 3.6 lets products of narrower ones read past their shared memory, as compute-sanitizer finds.
    """
    least = 16 if INTERPRETED else 64 if dtype == torch.bfloat16 else 32
    return max(least, padded(width) if most is None else min(padded(width), most))


def rows(x: Tensor) -> Tensor:
    """x as the kernels read it: any strides but the last, which is one."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strided(x: Tensor | None):
    """A row tensor [B, T, heads, width] and three strides, as kernels take it; None stands for none."""
    if x is None:
        return None, 0, 0, 0
    x = rows(x)
    return x, *x.stride()[:3]


def shared(x: Tensor | None, H: int):
    """The same, and how many of H heads share one of x's."""
    return (*strided(x), 1 if x is None else H // x.shape[2])


def in_place(*states: Tensor | None) -> bool:
    """Whether a call may write into the states it was given; None stands for none."""
    if torch.is_grad_enabled() or states[0] is None:
        return False
    return all(s is None or (s.dtype == torch.float32 and s.is_contiguous()) for s in states)


def new_state(S: Tensor | None, like: Tensor) -> Tensor:
    """Room for the state after a call, or its gradient; empty, on `like`'s device, where none was given."""
    return like.new_empty(0, dtype=torch.float32) if S is None else torch.empty_like(S)


def nothing(like: Tensor, count: int) -> tuple[Tensor, ...]:
    """What an operator returns in place of so many tensors that there are not."""
    return tuple(new_state(None, like) for _ in range(count))


def sum_heads(x: Tensor, G: int) -> Tensor:
    """Gradients [B, T, H, K] of what G heads shared, summed over those that share."""
    return x if x.shape[2] == G else x.unflatten(2, (G, -1)).sum(3)


def accumulating(state: Tensor | None) -> Tensor | None:
    """A state as the kernels read it."""
    return None if state is None else state.float().contiguous()


@triton.jit
def dot(a, b, DOT: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a.to(DOT), b.to(DOT), input_precision=PRECISION)


@triton.jit
def exp2(x):
    """2^x in one instruction, zero below 2^-126: exact there takes three more."""
    if EMULATED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def load_tile(base, stride, row, col, inside, WIDTH: tl.constexpr):
    """Rows `row` (where `inside`) and columns `col` (below WIDTH) of a matrix; zero elsewhere."""
    return tl.load(
        base + row[:, None] * stride + col[None, :], mask=inside[:, None] & (col < WIDTH)[None, :], other=0.0
    )


@triton.jit
def fetch(base, stride, token, col, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Asks that columns from `col` on of the rows `token` come into the L2 cache. No interpreter knows the instruction.

    Pipelined loads are issued at the end of a turn of a loop and awaited at the start of the next, which hides nothing
    but what is already near.
    """
    LINE: tl.constexpr = 1024 // base.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = triton.next_power_of_2((BLOCK + LINE - 1) // LINE)
    line = tl.minimum(col + tl.arange(0, LINES) * LINE, WIDTH - 1)
    at = (base + token.to(tl.int64)[:, None] * stride + line[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def store_tile(base, stride, row, col, inside, value, WIDTH: tl.constexpr):
    mask = inside[:, None] & (col < WIDTH)[None, :]
    tl.store(base + row[:, None] * stride + col[None, :], value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def split(x):
    """float64 as a pair (high, low) of float32 whose differences keep float64's precision."""
    high = x.to(tl.float32)
    return high, (x - high.to(tl.float64)).to(tl.float32)


@triton.jit
def cumulated(g, EXCLUSIVE: tl.constexpr):
    """A chunk's log decays [C], cumulated: as readers and as writers see them (pairs), and three exponentials.

    Returns (reader's pair, writer's pair, decay since the chunk's start, decay until its end, the whole). Sums run in
    float64: a float32 sum over gates that mix -0.01 and -1e4 is off by 4e-4. EXCLUSIVE readers come before their own
    token's decay.
    """
    wide = g.to(tl.float64)
    writer = tl.cumsum(wide, 0)
    reader = writer - wide if EXCLUSIVE else writer
    whole = tl.sum(wide, 0)
    since = tl.exp(reader.to(tl.float32))
    until = tl.exp(tl.minimum((whole - writer).to(tl.float32), 0.0))
    reader_high, reader_low = split(reader)
    writer_high, writer_low = split(writer)
    return reader_high, reader_low, writer_high, writer_low, since, until, whole.to(tl.float32)
