"""RWKV-5, Eagle: a matrix state a head, a learned constant decay a channel."""

from torch import Tensor, nn

from subquad.kernels.state import accumulator_dtype
from subquad.layers.base import Card, Facts
from subquad.layers.rwkv_parts import MatrixWKV, TokenShift, initial_decay


class RWKV5(MatrixWKV):
    """Eagle's time mixing (Peng et al. 2024, arXiv:2404.05892).

    x_s = x_t + (x_{t-1} - x_t) mu_s for each of s = r, k, v, z;  r, k, v, z = their projections
    o_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t,  S_t = diag(exp(-exp(w))) S_{t-1} + k_t v_t^T
    y_t = o_proj(group_norm(o_t) * silu(z_t))

    Cost: train O(T D K), decode O(D K) a token, state D K + D; K = head_dim.

    Arguments
        head_dim: K, width of a head, 64 where it divides d_model. layer_idx, n_layers: set the initial values of mu, w
        and u, as in the paper's code. norm_eps: of the group norm (64e-5: 1e-5 on o / 8 in that code).
    """

    card = Card("Peng et al. 2024, arXiv:2404.05892", "linear_attention", "O(T D K)", "O(D K)", "D K + D")
    facts = Facts(no_decay=("w",), float32=("w",))

    def __init__(
        self,
        d_model: int,
        *,
        head_dim: int | None = None,
        layer_idx: int = 0,
        n_layers: int = 1,
        norm_eps: float = 64e-5,
    ):
        super().__init__(d_model, head_dim, layer_idx, n_layers, norm_eps)
        self.token_shift = TokenShift(
            d_model, (0.5, 1.0, 1.0, 0.5), lifts=(0.0, 0.0, 0.3, 0.0), layer_idx=layer_idx, n_layers=n_layers
        )
        w = initial_decay(d_model, layer_idx, n_layers).unflatten(0, (self.n_heads, -1))
        self.w = nn.Parameter(w)

    def log_decay(self, *streams: Tensor) -> Tensor:
        return -self.w.to(accumulator_dtype(self.w.dtype)).exp()
