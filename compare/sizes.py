"""Weights and state of a layer or a model by the name that a file of measurements has for it, counted."""

import re
from ast import literal_eval
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch

from subquad.compare.models import find_config
from subquad.compare.subjects import Spec, long_enough
from subquad.errors import UserError, one_line
from subquad.infer.state import nbytes
from subquad.layers.build import build_layer
from subquad.models.config import refuse_code
from subquad.models.lm import LM

GROWS = 1.5  # a state that is so many times larger at twice the length grows with it


class Sizes(NamedTuple):
    """Bytes of one layer or model; no state where it cannot decode at the length, and why."""

    parameters: int  # a count
    weights: int
    state: int | None
    grows: bool  # with the length
    cannot: str
    too_long: bool  # for training and prefill as well


def sizes(
    subject: str,
    kind: Literal["layer", "model"],
    d_model: int | None,
    length: int,
    batch: int,
    dtype: torch.dtype,
    trust_code: bool = False,
) -> Sizes:
    module = _built(subject, kind, d_model, length, trust_code)
    parameters = sum(p.numel() for p in module.parameters())
    weights = parameters * dtype.itemsize
    limits = (getattr(part, "max_len", None) for part in module.modules())
    longest = min((limit for limit in limits if isinstance(limit, int)), default=length)
    if longest < length:
        return Sizes(parameters, weights, None, False, f"at most {longest:,} tokens", True)
    if not hasattr(module, "init_state"):
        return Sizes(parameters, weights, None, False, "cannot decode: reads whole sequences", False)
    with torch.device("meta"), torch.no_grad():
        try:
            state, half = (nbytes(module.init_state(batch, n, dtype)) for n in (length, max(length // 2, 1)))
        except UserError as error:
            return Sizes(parameters, weights, None, False, one_line(error), False)
    return Sizes(parameters, weights, state, state > GROWS * half, "", False)


@lru_cache(maxsize=256)
def _built(subject: str, kind: str, d_model: int | None, length: int, trust_code: bool) -> Any:
    """On the meta device."""
    with torch.device("meta"):
        if kind == "model":
            config = find_config(subject, trust_code=trust_code)
            if not trust_code:  # nobody named it but the measurements
                refuse_code(config.blocks, subject)
            return LM(config).eval()
        if d_model is None:
            raise UserError(f"the measurements of {subject} do not say its width: 'd_model' is not among the settings")
        spec = specification_of(subject)
        if not trust_code:
            refuse_code(spec, "the measurements")
        spec = long_enough(spec, length)
        return build_layer("the measurements", spec, d_model=d_model, layer_idx=0, n_layers=1).eval()


def specification_of(label: str) -> Spec:
    """The layer that `subquad.compare.subjects.label` called so: "Attention, window 512"."""
    name, *arguments = re.split(r", (?=\w+ )", label)
    if not arguments:
        return name
    return {"name": name, **{key: _value(text) for key, text in (argument.split(" ", 1) for argument in arguments)}}


def _value(text: str) -> Any:
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):  # a word
        return text
