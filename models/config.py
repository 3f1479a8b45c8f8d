"""A model's configuration: a mapping, checked word by word before anything is built."""

import inspect
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import import_module
from math import isfinite
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from beartype import BeartypeConf
from beartype.door import is_bearable
from torch import nn

import subquad.layers
from subquad.errors import UserError, nearest

_NUMBERS = BeartypeConf(is_pep484_tower=True)  # an int may stand where a float is asked for
_GIVEN_BY_MODEL = ("d_model", "layer_idx", "n_layers")
Spec = Mapping[str, Any]


@dataclass
class LMConfig:
    """What an LM is made of.

    d_model: width D of the residual stream.
    blocks: a list of stages {repeat: n, pattern: [block, ...]}; a block is {mixer: {name: ..., **arguments}, ffn:
        {...}}, either of which may be left out. A name is a class of subquad.layers or a dotted path to anyone's class.
    vocab_size: V; 256 for bytes.
    tie_embeddings: the head uses the embedding's weights.
    norm_eps: of the RMSNorms.
    init_std: standard deviation of the initial weights; by default sqrt(2 / (5 D)) (Nguyen and Salazar 2019).
    """

    d_model: int
    blocks: list[dict[str, Any]] = field(default_factory=list)
    vocab_size: int = 256
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    init_std: float | None = None

    def __post_init__(self) -> None:
        hints = get_type_hints(LMConfig)
        for f in fields(self):
            _check_type(f.name, getattr(self, f.name), hints[f.name])
        for name in ("d_model", "vocab_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("norm_eps", "init_std"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be above 0")
        if not self.blocks:
            raise UserError("blocks is empty; give at least one stage, such as blocks: [{pattern: [{mixer: Mamba2}]}]")
        for i, stage in enumerate(self.blocks):
            _check_stage(f"blocks[{i}]", stage)

    @classmethod
    def from_dict(cls, values: Spec) -> "LMConfig":
        """From a mapping of these fields, or a training configuration that holds one under model.lm."""
        if isinstance(values.get("model"), Mapping):
            values = values["model"].get("lm", {})
        known = [f.name for f in fields(cls)]
        _check_keys("", values, known)
        if "d_model" not in values:
            raise UserError("the configuration has no d_model; a model needs at least d_model and blocks")
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> "LMConfig":
        """From a YAML or JSON file."""
        return cls.from_dict(read_mapping(path))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def flat_blocks(self) -> list[tuple[str, dict[str, Any]]]:
        """(path, block) of every block in order, repeats written out."""
        return [
            (f"blocks[{i}].pattern[{j}]", block)
            for i, stage in enumerate(self.blocks)
            for _ in range(stage.get("repeat", 1))
            for j, block in enumerate(stage["pattern"])
        ]


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the configuration {path}: {getattr(error, 'strerror', None) or error}") from error
    try:
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path} is no valid {'JSON' if path.suffix == '.json' else 'YAML'}: {_one_line(error)}"
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}; a configuration is a mapping of keys to values")
    return values


def build_layer(where: str, spec: str | Spec, *, d_model: int, layer_idx: int, n_layers: int) -> nn.Module:
    """The layer that `spec` names, a name or a mapping {name: ..., **arguments}; errors name `where` it stands."""
    arguments = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = arguments.pop("name", None)
    if not isinstance(name, str):
        raise UserError(f"{where} needs a name, such as {{name: Mamba2}}; it has: {', '.join(arguments) or 'nothing'}")
    cls = find_layer(where, name)
    parameters = inspect.signature(cls.__init__).parameters
    accepted = [p for p in parameters if p != "self" and p not in _GIVEN_BY_MODEL]
    _check_keys(f"{where} ({name})", arguments, accepted)
    hints = get_type_hints(cls.__init__)
    for key, value in arguments.items():
        _check_type(f"{where}.{key}", value, hints.get(key, Any))
        if "." not in name:
            _check_count(f"{where}.{key}", value, parameters[key].default)
    given = {"d_model": d_model, "layer_idx": layer_idx, "n_layers": n_layers}
    try:
        return cls(**{k: v for k, v in given.items() if k in parameters}, **arguments)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except (ArithmeticError, RuntimeError, ValueError) as error:  # what torch says to shapes that cannot be
        values = ", ".join(f"{key} {value!r}" for key, value in arguments.items())
        raise UserError(
            f"{where}: {name} cannot be built with {values or 'its defaults'}: {_one_line(error)}"
        ) from error


def find_layer(where: str, name: str) -> type[nn.Module]:
    """A class of subquad.layers by its bare name, anyone's by its dotted path."""
    if "." not in name:
        known = subquad.layers.available()
        if name not in known:
            raise UserError(f"{where}: there is no layer {name!r}; {nearest(name, known)}")
        return known[name]
    module_name, _, attribute = name.rpartition(".")
    # Commands keep the current folder off the path, where a user's own module may well lie; last, it shadows nothing.
    sys.path.append(os.getcwd())
    try:
        found = getattr(import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{where}: cannot import the layer {name!r}: {_one_line(error)}") from error
    finally:
        sys.path.pop()
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise UserError(f"{where}: {name!r} is no torch module class")
    return found


def _check_stage(where: str, stage: Any) -> None:
    if not isinstance(stage, Mapping):
        raise UserError(f"{where} is {stage!r}; a stage is a mapping {{repeat: n, pattern: [...]}}")
    _check_keys(where, stage, ["repeat", "pattern"])
    _check_type(f"{where}.repeat", stage.get("repeat", 1), int)
    if stage.get("repeat", 1) < 1:
        raise UserError(f"{where}.repeat is {stage['repeat']}; it must be at least 1")
    pattern = stage.get("pattern")
    if not isinstance(pattern, list) or not pattern:
        raise UserError(f"{where}.pattern is {pattern!r}; it must be a list of blocks such as [{{mixer: Mamba2}}]")
    for j, block in enumerate(pattern):
        here = f"{where}.pattern[{j}]"
        if not isinstance(block, Mapping) or not block:
            raise UserError(
                f"{here} is {block!r}; a block is a mapping {{mixer: ..., ffn: ...}} with at least one of them"
            )
        _check_keys(here, block, ["mixer", "ffn"])
        for part, spec in block.items():
            if spec is not None and not isinstance(spec, str | Mapping):
                raise UserError(f"{here}.{part} is {spec!r}; give a layer's name or a mapping {{name: ..., ...}}")


def _check_keys(where: str, given: Spec, allowed: list[str]) -> None:
    for key in given:
        if key not in allowed:
            place = f"{where}: " if where else ""
            raise UserError(f"{place}unknown key {key!r}; {nearest(str(key), allowed)}")


def _check_type(where: str, value: Any, hint: Any) -> None:
    if not is_bearable(value, hint, conf=_NUMBERS) or (isinstance(value, bool) and not _takes_bool(hint)):
        wanted = (
            hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "").replace("Literal", "one of ")
        )
        raise UserError(f"{where} is {value!r} ({type(value).__name__}); it must be {wanted}")
    if isinstance(value, float) and not isfinite(value):
        raise UserError(f"{where} is {value}; it must be a finite number")


def _takes_bool(hint: Any) -> bool:
    """Whether a truth value may stand there; for Python it is an int as well."""
    return hint in (Any, bool) or any(_takes_bool(part) for part in get_args(hint))


def _check_count(where: str, value: Any, default: Any) -> None:
    """The whole numbers of our layers are counts and widths: none is negative, and 0 only where it is the default."""
    smallest = 0 if default == 0 else 1
    if isinstance(value, int) and not isinstance(value, bool) and value < smallest:
        raise UserError(f"{where} is {value}; it must be at least {smallest}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
