"""The time-invariant state-space recurrence of S4 and its kin, one system a channel: a convolution in training, a few
products a token when decoding."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Inexact, Int
from torch import Tensor

from subquad.errors import UserError
from subquad.kernels.backend import pick, register
from subquad.kernels.packing import Chunks
from subquad.kernels.state import accumulator_dtype, commit
from subquad.kernels.wrapping import by_sequence, full_precision, sequence_op

LOG_CHUNK = 6  # of the largest chunk, 64 tokens
FEW = 128  # so many tokens are stepped through: for fewer, a chunk's matrices cost more than they save
FEW_LOW_RANK = 384


@sequence_op
def lti(
    u: Float[Tensor, "B T H"],
    A: Inexact[Tensor, "H N"],
    B: Inexact[Tensor, "H N"],
    C: Inexact[Tensor, "H N"],
    P: Inexact[Tensor, "H N"] | None = None,
    Q: Inexact[Tensor, "H N"] | None = None,
    *,
    state: Inexact[Tensor, "M H N"] | None = None,
    cu_seqlens: Int[Tensor, "S"] | None = None,
) -> tuple[Float[Tensor, "B T H"], Inexact[Tensor, "M H N"] | None]:
    """x_t = A * x_{t-1} + P Re(Q^H x_{t-1}) + B u_t,  y_t = Re(C . x_t), for each of the H channels.

    A, B, C: the discrete system, all real or all complex: A is the transition's diagonal, of absolute value at most 1.
    P, Q: a transition of low rank, both or neither. A complex mode stands for itself and its conjugate, which a real
    system always has: half of the modes, with twice C and twice Q, give that system exactly.
    state: x [sequences, H, N] in u's precision, at least float32. Returns (y in u's dtype, the new state or None).

    The convolution runs within chunks of up to 64 tokens and the exact state between them, so any length, packed rows
    and a carried state are one computation; its kernels are built in float64 from what they are given.
    Cost: O(T H (N + C)) for chunks of C <= 64 tokens, decoding O(H N) a token; N (complex) values of state a channel.
    """
    system = [A, B, C] if P is None or Q is None else [A, B, C, P, Q]
    if len({t.is_complex() for t in system}) > 1:
        raise UserError(f"lti: A, B, C, P, Q are all real or all complex; got {[str(t.dtype) for t in system]}")
    if (P is None) != (Q is None):
        raise UserError("lti: a transition of low rank takes both P and Q")
    form = pick("lti", _FORMS, u)
    real = accumulator_dtype(u.dtype)
    dtype = torch.promote_types(real, torch.complex64) if A.is_complex() else real
    with full_precision(u):
        n_seqs = u.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        x0 = u.new_zeros(n_seqs, *A.shape, dtype=dtype) if state is None else state.to(dtype)
        y, last = form(u.to(real), A, B, C, P, Q, x0, cu_seqlens)
    return y.to(u.dtype), None if state is None else commit(state, last)


def _naive(u, A, B, C, P, Q, x, cu_seqlens):
    if cu_seqlens is not None:
        return by_sequence(lambda u, x: _naive(u, A, B, C, P, Q, x, None), [u], [x], cu_seqlens)
    A, B, C = (t.to(x.dtype) for t in (A, B, C))
    if P is not None:
        P, Q = P.to(x.dtype), Q.to(x.dtype)
    outs = []
    for u_t in u.unbind(1):
        new = A * x + B * u_t[..., None]
        if P is not None:
            new = new + P * (Q.conj() * x).sum(-1, keepdim=True).real
        x = new
        outs.append((C * x).sum(-1).real)
    return torch.stack(outs, 1) if outs else torch.zeros_like(u), x


def _torch(u, A, B, C, P, Q, x0, cu_seqlens):
    time = u.shape[1]
    if time <= (FEW if P is None else FEW_LOW_RANK) and cu_seqlens is None:
        return _naive(u, A, B, C, P, Q, x0, None)
    size = 1 << min(LOG_CHUNK, max(time - 1, 1).bit_length() // 2)
    maps = _Maps(A, B, C, P, Q, size, u.dtype)
    chunks = Chunks(u, size, cu_seqlens)
    parts = chunks.split(u)  # [B, n, C, H]
    # Channels first and contiguous: batched products over anything else run one by one.
    rows = parts.permute(3, 0, 1, 2).contiguous().flatten(1, 2)  # [H, B n, C]
    inflow = (rows @ maps.write).unflatten(1, parts.shape[:2]).permute(1, 2, 0, 3).contiguous()
    inflow = _vectors(inflow, x0).unbind(1)
    before, end = chunks.carry(x0, lambda i, x: maps.step(x) + inflow[i])
    states = _pairs(before).permute(2, 0, 1, 3).flatten(1, 2)  # [H, B n, K]
    y = torch.baddbmm(rows @ maps.within, states, maps.read).unflatten(1, parts.shape[:2]).permute(1, 2, 3, 0)

    if cu_seqlens is None and time == chunks.count * size:
        return chunks.join(y), end
    # The last chunk of a sequence may be filled up in part: go from its start by as many tokens as it has.
    if cu_seqlens is None:
        used = torch.full((u.shape[0],), time - (chunks.count - 1) * size, device=u.device)
        return chunks.join(y), maps.part(parts[:, -1], before[:, -1], used)
    lengths = cu_seqlens.long().diff()
    used = (lengths - 1) % size + 1
    tail, at_tail = parts[0].index_select(0, chunks.last_of), before[0].index_select(0, chunks.last_of)
    last = torch.where((lengths > 0)[:, None, None], maps.part(tail, at_tail, used), x0)
    return chunks.join(y), last


class _Maps:
    """A system over a chunk of C tokens, as products of real matrices.

    A complex vector [.., N] enters them as its real and imaginary parts in turn, [.., K]. With a low rank, the scalar
    s_t = Re(Q^H x_{t-1}) is one more input of the diagonal system: s = (I - L)^-1 (what u and the state before give),
    L [C, C] being the response of s to itself.

    All is built in double precision: what the diagonal system alone gives, s cancels to a large part (in float32 three
    digits were lost). Kept in `dtype`:
        within [H, C, C]: y_t (last) from u_s, s <= t.   write [H, C, K]: the state after the chunk from u_s.
        read [H, K, C]: y_t from the state before.
    """

    def __init__(self, A, B, C, P, Q, size: int, dtype: torch.dtype):
        wide = torch.complex128 if A.is_complex() else torch.float64
        A, B, C = (t.to(wide) for t in (A, B, C))
        self.size, self.low_rank = size, P is not None
        self.powers = torch.ones_like(A)[:, None]  # A^j for j = 0 .. size - 1, by doubling
        factor = A[:, None]
        while self.powers.shape[1] < size:
            self.powers = torch.cat([self.powers, factor * self.powers], 1)
            factor = factor.square()
        self.A, self.falling = A, self.powers.flip(1)
        self.direct = self._write(B)
        if self.low_rank:
            P, Q = P.to(wide), Q.to(wide).conj()
            kernel, s_from_u, loop, s_to_y = self._responses(B * C, B * Q, P * Q, P * C)
            s_from_u, loop = (F.pad(k[:, :, :-1], (1, 0)) for k in (s_from_u, loop))  # s reads the state before
            # All these matrices are Toeplitz, and so are their products and inverses: a row of each is enough.
            first = torch.zeros_like(loop)
            first[..., 0] = 1
            feedback = torch.linalg.solve_triangular(_toeplitz(first - loop), first, upper=True, left=False)
            feedback, s_to_y = _toeplitz(feedback), _toeplitz(s_to_y)
            s_from_u = s_from_u @ feedback
            self.s_from_u, self.s_from_x, self.indirect = _toeplitz(s_from_u), self._read(Q) @ feedback, self._write(P)
            within, write = _toeplitz(kernel + s_from_u @ s_to_y), self.direct + self.s_from_u @ self.indirect
            read = self._read(A * C) + self.s_from_x @ s_to_y
            whole = _plus_diagonal(self.indirect.mT @ self.s_from_x.mT, factor[:, 0])
        else:
            (kernel,) = self._responses(B * C)
            within, write, read, whole = _toeplitz(kernel), self.direct, self._read(A * C), factor[:, 0]
        self.within, self.read, self.write = within.to(dtype), read.to(dtype), write.to(dtype)
        self.whole = whole.to(torch.promote_types(dtype, torch.complex64) if whole.is_complex() else dtype)

    def _responses(self, *weights: Tensor) -> list[Tensor]:
        """Re sum(w A^j), j = 0 .. C - 1, of each of the weights w [H, N]: [H, 1, C]."""
        return list(_real(self.powers @ torch.stack(weights, -1)).mT.split(1, 1))

    def _write(self, B: Tensor) -> Tensor:
        return _pairs(self.falling * B[:, None])

    def _read(self, C: Tensor) -> Tensor:
        return _pairs((self.powers * C[:, None]).conj()).mT.contiguous()

    def step(self, x: Tensor) -> Tensor:
        """The state a chunk later, without input."""
        return _vectors(torch.einsum("hij,nhj->nhi", self.whole, _pairs(x)), x) if self.low_rank else self.whole * x

    def part(self, u: Tensor, x: Tensor, used: Tensor) -> Tensor:
        """The state after `used` [N] >= 1 of the tokens u [N, C, H] from x [N, H, N], in double precision."""
        u, wide = u.double(), x.to(self.powers.dtype)
        slot = torch.arange(self.size, device=u.device)
        # To the end of the chunk, where the last of them stands; what wraps around is zero.
        slot = ((slot + used[:, None]) % self.size)[..., None]
        after = _pairs((self.A[:, None] * self.powers[:, used - 1]).transpose(0, 1) * wide)
        after = after + torch.einsum("nch,hck->nhk", u.take_along_dim(slot, 1), self.direct)
        if self.low_rank:
            s = torch.einsum("nsh,hsc->nch", u, self.s_from_u)
            s = s + torch.einsum("nhk,hkc->nch", _pairs(wide), self.s_from_x)
            s = torch.where(torch.arange(self.size, device=u.device)[:, None] < used[:, None, None], s, 0)
            after = after + torch.einsum("nch,hck->nhk", s.take_along_dim(slot, 1), self.indirect)
        return _vectors(after, x).to(x.dtype)


def _toeplitz(kernel: Tensor) -> Tensor:
    """[H, 1, C] -> [H, source, target], kernel[target - source] for target >= source, else 0."""
    size = kernel.shape[-1]
    return F.pad(kernel[:, 0], (size - 1, 0)).unfold(1, size, 1).flip(1)  # a contiguous copy


def _pairs(x: Tensor) -> Tensor:
    """[.., N] -> [.., K]: real and imaginary parts in turn; a real x as it is."""
    return torch.view_as_real(x.resolve_conj()).flatten(-2) if x.is_complex() else x


def _vectors(x: Tensor, like: Tensor) -> Tensor:
    """[.., K] -> [.., N], complex if `like` is."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2))) if like.is_complex() else x


def _real(x: Tensor) -> Tensor:
    return x.real if x.is_complex() else x


def _plus_diagonal(M: Tensor, A: Tensor) -> Tensor:
    """M [H, K, K] plus the diagonal A [H, N] as a matrix over `_pairs`: blocks [[Re, -Im], [Im, Re]]; M is consumed."""
    if not A.is_complex():
        M.diagonal(dim1=1, dim2=2).add_(A)
        return M
    blocks = torch.stack([torch.stack([A.real, -A.imag], 1), torch.stack([A.imag, A.real], 1)], 1)  # [H, 2, 2, N]
    M.view(*A.shape, 2, *A.shape[1:], 2).diagonal(dim1=1, dim2=3).add_(blocks)
    return M


_FORMS = register("lti", naive=_naive, torch=_torch)
