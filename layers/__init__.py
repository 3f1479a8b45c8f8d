"""The zoo: token mixers and feed-forward layers, each with one signature and one op.

y, state = layer(x, state=None, cu_seqlens=None)
"""

from subquad.layers.attention import Attention as Attention
from subquad.layers.base import Card as Card
from subquad.layers.base import Facts as Facts
from subquad.layers.base import Layer as Layer
from subquad.layers.deltanet import DeltaNet as DeltaNet
from subquad.layers.gated_deltanet import GatedDeltaNet as GatedDeltaNet
from subquad.layers.gated_deltaproduct import GatedDeltaProduct as GatedDeltaProduct
from subquad.layers.gated_short_conv import GatedShortConv as GatedShortConv
from subquad.layers.gla import GatedLinearAttention as GatedLinearAttention
from subquad.layers.hgrn import HGRN as HGRN
from subquad.layers.hgrn2 import HGRN2 as HGRN2
from subquad.layers.hyena import Hyena as Hyena
from subquad.layers.kimi_delta_attention import KimiDeltaAttention as KimiDeltaAttention
from subquad.layers.latent_attention import LatentAttention as LatentAttention
from subquad.layers.lightning_attention import LightningAttention as LightningAttention
from subquad.layers.linear_attention import LinearAttention as LinearAttention
from subquad.layers.linformer import LinformerAttention as LinformerAttention
from subquad.layers.lsh_attention import LSHAttention as LSHAttention
from subquad.layers.mamba import Mamba as Mamba
from subquad.layers.mamba2 import Mamba2 as Mamba2
from subquad.layers.mingru import MinGRU as MinGRU
from subquad.layers.mlp import MLP as MLP
from subquad.layers.mlp import SwiGLU as SwiGLU
from subquad.layers.mlstm import MLSTM as MLSTM
from subquad.layers.modal_hyena import ModalHyena as ModalHyena
from subquad.layers.moe import MoE as MoE
from subquad.layers.native_sparse_attention import NativeSparseAttention as NativeSparseAttention
from subquad.layers.nystrom import NystromAttention as NystromAttention
from subquad.layers.parallel import Parallel as Parallel
from subquad.layers.retention import Retention as Retention
from subquad.layers.rglru import RGLRU as RGLRU
from subquad.layers.rwkv4 import RWKV4 as RWKV4
from subquad.layers.rwkv5 import RWKV5 as RWKV5
from subquad.layers.rwkv6 import RWKV6 as RWKV6
from subquad.layers.rwkv7 import RWKV7 as RWKV7
from subquad.layers.rwkv_channel_mix import RWKVChannelMix as RWKVChannelMix
from subquad.layers.s4 import S4 as S4
from subquad.layers.s4d import S4D as S4D
from subquad.layers.s5 import S5 as S5
from subquad.layers.sparse_attention import SparseAttention as SparseAttention
from subquad.layers.topk_attention import TopKAttention as TopKAttention


def available() -> dict[str, type[Layer]]:
    """Every layer by name: the classes imported above."""
    found = {n: c for n, c in globals().items() if isinstance(c, type) and issubclass(c, Layer) and c is not Layer}
    return dict(sorted(found.items()))
