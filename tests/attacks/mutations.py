"""Seeded mutations of bytes, of nested values, and of command lines."""

import copy
import json
import math
import random
import sys
from typing import Any

import yaml

NUMBERS = [
    *(0, 1, -1, 2, 3, 7, 64, 1000, 2**15, 2**20, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1),
    *(10**30, 10**5000, 0.0, -0.0, 0.5, 1.5, 1e-5, 1e5, 1e300, -1e300, 5e-324, math.inf, -math.inf, math.nan),
]
WORDS = [
    *("", " ", "a", "0", "1e-5", "1e999", "null", "true", "yes", "2026-01-31", "12:30:00", "0x10", "1_000", "~", "<<"),
    *("\0", "\ud800", "é", "\u202e", "a\nb", "x" * 10_000, "a/b", "../..", "/dev/zero", "n" * 300, "%s{}", "[", "*a"),
    *("Mamba2", "Attention", "helper.Mixer", "os.system", "subquad.layers", "torch.nn.Linear", ".", "a..b", "lm", "-"),
]


def nested(depth: int) -> Any:
    value: Any = 1
    for i in range(depth):
        value = [value] if i % 2 else {"a": value}
    return value


def odd(draw: random.Random) -> Any:
    """A value that stands nowhere in a valid file."""
    if draw.random() < 0.45:
        return draw.choice(NUMBERS)
    if draw.random() < 0.7:
        return draw.choice(WORDS)
    return draw.choice([None, True, False, [], {}, [[]], [None], {"name": "Mamba2"}, {"a": 1}, nested(20), nested(90)])


def paths(value: Any, path: tuple = ()) -> list[tuple]:
    """The place of every value but the outermost one."""
    if not isinstance(value, dict | list):
        return []
    inner = list(value.items() if isinstance(value, dict) else enumerate(value))
    return [p for key, item in inner for p in ((*path, key), *paths(item, (*path, key)))]


def mutated_value(value: Any, draw: random.Random) -> Any:
    """A copy with one to three changes: a value, its type, a key, or the nesting."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        places = paths(value)
        if not places:
            return odd(draw)
        *outer, key = draw.choice(places)
        holder = value
        for step in outer:
            holder = holder[step]
        change = draw.random()
        if change < 0.55:
            holder[key] = odd(draw)
        elif change < 0.65:
            del holder[key]
        elif change < 0.75 and isinstance(holder, dict):
            name = draw.choice([*WORDS, str(key)[:-1], f"{key}s", *NUMBERS[:4]])
            holder[name] = holder.pop(key)
        elif change < 0.85 and isinstance(holder, list):
            holder[key:key] = [copy.deepcopy(holder[key])] * draw.choice([1, 2, 50])
        elif change < 0.93:
            *other, last = draw.choice(places)
            found = value
            for step in (*other, last):
                try:
                    found = found[step]
                except (KeyError, IndexError, TypeError):
                    break
            holder[key] = copy.deepcopy(found)
        else:
            holder[key] = [holder[key]] if draw.random() < 0.5 else {"name": holder[key]}
    return value


def written(value: Any, draw: random.Random, kind: str) -> bytes:
    """The value as JSON or YAML, also where it holds what neither should."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        if kind == "json":
            text = json.dumps(value, ensure_ascii=draw.random() < 0.5, default=str)
        else:
            text = yaml.safe_dump(value, default_flow_style=draw.choice([None, True, False]), allow_unicode=True)
    except (TypeError, RecursionError, ValueError):
        text = repr(value)
    finally:
        sys.set_int_max_str_digits(limit)
    return text.encode("utf-8", "surrogatepass")


def mutated_bytes(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """A copy with some bits, bytes or spans changed, cut off, doubled, or taken from another valid file."""
    out = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        i = draw.randrange(len(out) + 1)
        j = min(len(out), i + int(2 ** draw.uniform(0, 12)))
        change = draw.randrange(8)
        if change < 3 and i < len(out):
            out[i] ^= 1 << draw.randrange(8)
        elif change == 3:
            del out[i:j]
        elif change == 4:
            out[i:i] = draw.choice([out[i:j], draw.randbytes(j - i), b"\0" * (j - i), b"9" * (j - i), b"[" * (j - i)])
        elif change == 5:
            del out[i:]
        elif change == 6:
            out[i:j] = draw.randbytes(j - i)
        else:
            k = draw.randrange(len(other) + 1)
            out[i:] = other[k:]
    return bytes(out)


def mutated_words(words: list[str], draw: random.Random) -> list[str]:
    """A command line with arguments changed, left out, doubled, misspelt or swapped."""
    out = list(words)
    for _ in range(draw.choice([1, 1, 2])):
        if not out:
            break
        i = draw.randrange(1, len(out)) if len(out) > 1 else 0
        change = draw.random()
        if change < 0.6:
            value = odd(draw)
            new = written(value, draw, "json").decode("utf-8", "surrogatepass") if not isinstance(value, str) else value
            out[i] = new.replace("\0", "")  # a process cannot be given one
        elif change < 0.7:
            del out[i]
        elif change < 0.8:
            out[i:i] = out[i : i + 2]
        elif change < 0.9:
            out[i] = out[i][:-1] + draw.choice(["", "x", "\udcff", "=", "é"])
        else:
            j = draw.randrange(len(out))
            out[i], out[j] = out[j], out[i]
    return out
