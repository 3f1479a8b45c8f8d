"""From a name and arguments to a layer, with errors that say what would do."""

import inspect
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from math import isinf
from typing import Any, get_args, get_type_hints

from beartype import BeartypeConf
from beartype.door import is_bearable
from torch import nn

from subquad.errors import UserError, nearest, one_line, shown, shown_text
from subquad.memory import room_for

Spec = Mapping[str, Any]
_NUMBERS = BeartypeConf(is_pep484_tower=True)  # an int may stand where a float is asked for
_GIVEN_BY_MODEL = ("d_model", "layer_idx", "n_layers")
FLOAT32 = 3.4e38
MOST = 2**31 - 1  # of every count and width: kernels index with 32 bits


def build_layer(where: str, spec: str | Spec, *, d_model: int, layer_idx: int, n_layers: int) -> nn.Module:
    """The layer that `spec` names, a name or a mapping {name: ..., **arguments}; errors name `where` it stands."""
    if not isinstance(spec, str | Mapping):
        raise UserError(f"{where} is {shown(spec)}; give a layer's name or a mapping {{name: ..., ...}}")
    arguments = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = arguments.pop("name", None)
    if not isinstance(name, str):
        given = shown_text(", ".join(map(str, arguments)) or "nothing")
        raise UserError(f"{where} needs a name, such as {{name: Mamba2}}; it has: {given}")
    cls = find_layer(where, name)
    parameters = inspect.signature(cls.__init__).parameters
    accepted = [p for p in parameters if p != "self" and p not in _GIVEN_BY_MODEL]
    check_keys(f"{where} ({name})", arguments, accepted)
    hints = get_type_hints(cls.__init__)
    for key, value in arguments.items():
        hint = hints.get(key, Any)
        if isinstance(value, list) and is_bearable(tuple(value), hint, conf=_NUMBERS):
            arguments[key] = value = tuple(value)  # YAML and JSON have no tuples
        check_type(f"{where}.{key}", value, hint)
        if "." not in name:
            _check_count(f"{where}.{key}", value, parameters[key].default)
    given = {"d_model": d_model, "layer_idx": layer_idx, "n_layers": n_layers}
    try:
        with room_for(name):
            return cls(**{k: v for k, v in given.items() if k in parameters}, **arguments)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:  # what torch says to shapes that cannot be
        values = ", ".join(f"{key} {shown(value)}" for key, value in arguments.items())
        raise UserError(
            f"{where}: {name} cannot be built with {values or 'its defaults'}: {one_line(error)}"
        ) from error


def find_layer(where: str, name: str) -> type[nn.Module]:
    """A class of subquad.layers by its bare name, anyone's by its dotted path."""
    if "." not in name:
        from subquad.layers import available  # which imports the layers, and they may import this

        known = available()
        if name not in known:
            raise UserError(f"{where}: there is no layer {shown(name)}; {nearest(name, known)}")
        return known[name]
    module_name, _, attribute = name.rpartition(".")
    # Commands keep the current folder off the path, where a user's own module may well lie; last, it shadows nothing.
    sys.path.append(os.getcwd())
    try:
        found = getattr(import_module(module_name), attribute)
    except Exception as error:  # whatever the module raises
        reason = one_line(error) if isinstance(error, ImportError | AttributeError) else shown(error)
        raise UserError(f"{where}: cannot import the layer {shown(name)}: {reason}") from error
    finally:
        sys.path.pop()
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise UserError(f"{where}: {shown(name)} is no torch module class")
    return found


def check_keys(where: str, given: Spec, allowed: list[str]) -> None:
    for key in given:
        if key not in allowed:
            place = f"{where}: " if where else ""
            raise UserError(f"{place}unknown key {shown(key)}; {nearest(str(key), allowed)}")


def check_type(where: str, value: Any, hint: Any) -> None:
    if not is_bearable(value, hint, conf=_NUMBERS) or (isinstance(value, bool) and not _takes_bool(hint)):
        wanted = (
            hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "").replace("Literal", "one of ")
        )
        raise UserError(f"{where} is {shown(value)} ({type(value).__name__}); it must be {wanted}")
    if not _finite(value):
        raise UserError(f"{where} is {shown(value)}; its numbers must be finite, also in 32 bits")


def _finite(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_finite, value))
    return not isinstance(value, int | float) or abs(value) <= FLOAT32


def without_infinities(value: Any, within: bool = False) -> Any:
    """A configuration's value with None for each infinite number in a list: JSON has none, and there both say no limit
    (`dt_limit: [0, .inf]`). One that stands alone is left for `check_type` to refuse."""
    if isinstance(value, Mapping):
        return {key: without_infinities(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(without_infinities(item, within=True) for item in value)
    return None if within and isinstance(value, float) and isinf(value) else value


def check_range(where: str, value: int, smallest: int, largest: int = MOST) -> None:
    if value < smallest:
        raise UserError(f"{where} is {shown(value)}; it must be at least {smallest}")
    if value > largest:
        raise UserError(f"{where} is {shown(value)}; it must be at most {largest:,}")


def _takes_bool(hint: Any) -> bool:
    """Whether a truth value may stand there; for Python it is an int as well."""
    return hint in (Any, bool) or any(_takes_bool(part) for part in get_args(hint))


def _check_count(where: str, value: Any, default: Any) -> None:
    """The whole numbers of our layers are counts and widths: none is negative, and 0 only where it is the default."""
    if isinstance(value, int) and not isinstance(value, bool):
        check_range(where, value, 0 if default == 0 else 1)
