"""The one language model: an embedding, blocks of a mixer and a feed-forward layer, a head."""

import inspect
from collections.abc import Callable
from functools import partial
from math import sqrt
from pathlib import Path
from types import MethodType
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from subquad.errors import UserError
from subquad.layers.base import covers, declared
from subquad.layers.build import build_layer
from subquad.layers.norms import GroupNorm, RMSNorm
from subquad.memory import room_for
from subquad.models.config import LMConfig


class BlockState(NamedTuple):
    mixer: Any
    ffn: Any


class LMState(NamedTuple):
    """The states of all blocks, in order."""

    blocks: tuple[BlockState, ...]


class Block(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)); either may be absent.

    x, y, state, shared = block(x, y, state, cu_seqlens, shared): y is what the block before (or this one) adds to the
    residual stream x, left to the norm that comes next, which does both in one call; None at first.
    parallel: x + mixer(norm(x)) + ffn(norm(x)) with one norm for both.
    """

    def __init__(
        self, mixer: nn.Module | None, ffn: nn.Module | None, make_norm: Callable[[], nn.Module], parallel: bool = False
    ):
        super().__init__()
        self.mixer, self.ffn, self.parallel = mixer, ffn, parallel
        self.mixer_norm = make_norm() if mixer is not None or parallel else None
        self.ffn_norm = make_norm() if ffn is not None and not parallel else None
        self.takes_shared = {
            part: layer is not None and "shared" in inspect.signature(layer.forward).parameters
            for part, layer in (("mixer", mixer), ("ffn", ffn))
        }

    def forward(
        self,
        x: Tensor,
        y: Tensor | None,
        state: BlockState | None,
        cu_seqlens: Tensor | None,
        shared: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None, BlockState | None, dict[str, Any]]:
        # A copy: under activation checkpointing this runs twice, and a dict that was mutated the first time would not
        # be the one that the first run saw.
        shared = dict(shared)
        states = []
        if self.parallel and self.mixer_norm is not None:
            normed, x = added_norm(self.mixer_norm, x, y)
            y = None
        for part, norm in (("mixer", self.mixer_norm), ("ffn", self.ffn_norm)):
            layer = getattr(self, part)
            if layer is None:
                states.append(())
                continue
            extra = {"shared": shared} if self.takes_shared[part] else {}
            before = None if state is None else getattr(state, part)
            if not self.parallel:
                normed, x = added_norm(norm, x, y)
                y = None
            made, after = layer(normed, state=before, cu_seqlens=cu_seqlens, **extra)
            y = made if y is None else y + made
            states.append(after)
        return x, y, None if state is None else BlockState(*states), shared

    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None) -> BlockState:
        return BlockState(
            *(() if p is None else p.init_state(batch_size, max_len, dtype) for p in (self.mixer, self.ffn))
        )


def added_norm(norm: nn.Module, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """(norm(x + y), x + y)"""
    return (norm(x), x) if y is None else norm(y, residual=x)


class LM(nn.Module):
    """A language model over any pattern of layers.

        logits, state = model(tokens, state=None, cu_seqlens=None, logits="all" | "last")

    tokens: int [B, T], or [1, total] packed with cu_seqlens [N+1]. logits: [B, T, V]; "last" gives [N, V], one row a
    sequence (the zero vector's logits for an empty one). `state=None` is a sequence from position 0 and None comes
    back; a state from `init_state` continues sequences for any number of tokens and is donated.
    """

    def __init__(self, config: LMConfig):
        super().__init__()
        self.config = config
        d, flat = config.d_model, config.flat_blocks()
        make_norm = partial(RMSNorm if config.norm == "rms" else GroupNorm, d, eps=config.norm_eps)
        with room_for("the embedding"):
            self.embedding = nn.Embedding(config.vocab_size, d)
            blocks = []
            for i, (where, spec) in enumerate(flat):
                parts = [
                    build_layer(f"{where}.{part}", spec[part], d_model=d, layer_idx=i, n_layers=len(flat))
                    if spec.get(part) is not None
                    else None
                    for part in ("mixer", "ffn")
                ]
                blocks.append(Block(parts[0], parts[1], make_norm, spec.get("parallel", False)))
            self.blocks = nn.ModuleList(blocks)
            self.embedding_norm = make_norm() if config.embedding_norm else None
            self.norm = make_norm()
            self.head = nn.Linear(d, config.vocab_size, bias=False)
        self.tie_weights()
        self.register_load_state_dict_post_hook(_tie)
        self.checkpoint_activations = False  # recompute each block in the backward pass
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: LMConfig | dict[str, Any] | str | Path) -> "LM":
        """From an LMConfig, a mapping, or a YAML or JSON file (of a model, or of a training run)."""
        if isinstance(config, str | Path):
            config = LMConfig.from_file(config)
        return cls(config if isinstance(config, LMConfig) else LMConfig.from_dict(config))

    def tie_weights(self) -> None:
        """Make the head use the embedding's weights, where the configuration says so and both hold them themselves."""
        if self.config.tie_embeddings and all("weight" in part._parameters for part in (self.embedding, self.head)):
            self.head.weight = self.embedding.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LM":
        """What .to and its kin call; tensors made anew, as those of the meta device are, are tied again."""
        super()._apply(fn, recurse)
        self.tie_weights()
        return self

    def reset_parameters(self) -> None:
        """Normal weights of one small scale, those into the residual stream divided by sqrt(2 n_layers) (GPT-2).

        What a layer's paper initialises otherwise (A_log, dt, convolutions, norms) keeps the layer's own values. A
        module whose weights are no Linear's takes part through a method `init_weights(std, depth_scale)`.
        """
        std = self.config.init_std or sqrt(2 / (5 * self.config.d_model))
        depth_scale = 1 / sqrt(2 * len(self.blocks))
        kept, residual = declared(self, "keeps_init"), declared(self, "residual")
        for name, module in self.named_modules():
            if covers(kept, name):
                continue
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std * (depth_scale if covers(residual, name) else 1))
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(method := getattr(module, "init_weights", None), MethodType):
                method(std, depth_scale)

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        state: LMState | None = None,
        cu_seqlens: Int[Tensor, "M"] | None = None,
        logits: Literal["all", "last"] = "all",
    ) -> tuple[Float[Tensor, "*shape V"], LMState | None]:
        x, state, _ = self.hidden(tokens, state, cu_seqlens)
        if logits == "last":
            x = last_tokens(x, cu_seqlens)
        return self.logits(x), state

    def logits(self, x: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape V"]:
        """The head on what `hidden` returns."""
        y, cap = self.head(x), self.config.logit_softcap
        return y if cap is None else cap * torch.tanh(y / cap)

    def hidden(
        self, tokens: Int[Tensor, "B T"], state: LMState | None = None, cu_seqlens: Int[Tensor, "M"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], LMState | None, dict[str, Any]]:
        """What the head reads, the new state, and what the layers shared (losses, router loads) by name."""
        x, y, shared, states = self.embedding(tokens), None, {}, []
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        for i, block in enumerate(self.blocks):
            before = None if state is None else state.blocks[i]
            if self.checkpoint_activations and torch.is_grad_enabled():
                x, y = x if y is None else x + y, None  # a block keeps one tensor, not two
                x, y, after, shared = checkpoint(block, x, y, before, cu_seqlens, shared, use_reentrant=False)
            else:
                x, y, after, shared = block(x, y, before, cu_seqlens, shared)
            states.append(after)
        return added_norm(self.norm, x, y)[0], None if state is None else LMState(tuple(states)), shared

    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> LMState:
        """The state of `batch_size` sequences before any token, with caches for max_len tokens."""
        for i, block in enumerate(self.blocks):
            for part in (block.mixer, block.ffn):
                if part is not None and not hasattr(part, "init_state"):
                    raise UserError(
                        f"block {i}'s {type(part).__name__} cannot decode: it reads the whole sequence at once"
                    )
        with room_for(f"the state of {batch_size:,} x {max_len:,} tokens", self.embedding.weight.device):
            return LMState(tuple(block.init_state(batch_size, max_len, dtype) for block in self.blocks))

    def n_parameters(self) -> int:
        """Trained values, tied ones counted once."""
        return sum(p.numel() for p in self.parameters())


def _tie(model: LM, keys: Any) -> None:
    """After a state dict was loaded: assigned tensors are new ones."""
    model.tie_weights()


def last_tokens(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The last row of each sequence, [N, D]; zero for an empty one."""
    if x.shape[1] == 0:
        return x.new_zeros(x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1, x.shape[2])
    if cu_seqlens is None:
        return x[:, -1]
    rows = x[0].index_select(0, (cu_seqlens[1:].long() - 1).clamp(min=0))
    return torch.where((cu_seqlens.diff() > 0)[:, None], rows, 0)


def cross_entropy(logits: Float[Tensor, "*B V"], targets: Int[Tensor, "*B"]) -> Float[Tensor, ""]:
    """Mean loss in nats over the targets that are not -100, in float32."""
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten().long(), ignore_index=-100)
