"""What a comparison measures: layers by name or with arguments, and whole models by their configurations."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from subquad.compare.models import find_config
from subquad.errors import UserError, shown
from subquad.layers import available
from subquad.layers.build import build_layer
from subquad.models.lm import LM
from subquad.reading import parse_yaml

Spec = str | dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A layer on [B, T, D] or a model on tokens [B, T]; `build` makes it anew with the same weights."""

    name: str
    kind: Literal["layer", "model"]
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Tensor]  # of (batch, tokens)
    d_model: int

    def read(self, module: nn.Module, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Without gradients; of a model the logits of the last token only."""
        return module(x, state, logits="last") if self.kind == "model" else module(x, state)


def specification(option: str, text: str) -> Spec:
    """The name or the mapping {name: ..., ...} that a word of the command line is."""
    spec = parse_yaml(text, f"{option}: {shown(text)}")
    if not isinstance(spec, str | dict):
        raise UserError(f"{option}: {shown(text)} is neither a name nor a mapping {{name: ..., ...}}")
    return spec


def label(spec: Spec) -> str:
    """A name and its arguments in a row."""
    if isinstance(spec, str):
        return spec
    return ", ".join([str(spec.get("name")), *(f"{key} {value}" for key, value in spec.items() if key != "name")])


def mixers() -> list[str]:
    return [name for name, layer in available().items() if layer.kind == "mixer"]


def long_enough(spec: Spec, length: int) -> Spec:
    """A bare name with a max_len of `length` where its layer has one that is shorter; a mapping stays as it is."""
    layer = available().get(spec) if isinstance(spec, str) else None
    if layer is None:
        return spec
    parameter = inspect.signature(layer.__init__).parameters.get("max_len")
    if parameter is None or not isinstance(parameter.default, int) or parameter.default >= length:
        return spec
    return {"name": spec, "max_len": length}


def layer_subject(name: str, spec: Spec, d_model: int, device: torch.device, dtype: torch.dtype) -> Subject:
    """A layer of this width; what cannot be built is told at once."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return build_layer("--layers", spec, d_model=d_model, layer_idx=0, n_layers=1).to(device, dtype)

    def inputs(batch: int, tokens: int) -> Tensor:
        return torch.randn(batch, tokens, d_model, device=device, dtype=dtype)

    build()
    return Subject(name, "layer", build, inputs, d_model)


def model_subject(name: str, device: torch.device, dtype: torch.dtype, *, trust_code: bool = False) -> Subject:
    """The model of a configuration, with random weights; what cannot be built is told at once."""
    config = find_config(name, trust_code=trust_code)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return LM(config).to(device, dtype)

    def inputs(batch: int, tokens: int) -> Tensor:
        return torch.randint(config.vocab_size, (batch, tokens), device=device)

    try:
        with torch.device("meta"):
            LM(config)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    return Subject(name, "model", build, inputs, config.d_model)
