"""YAML and JSON to plain values: one reader, with limits, for every file and every word of a command line.

YAML is read by the core schema of YAML 1.2, which JSON and the numbers of Python agree with: 1e-5 is a number; yes, no,
on, off, 2026-01-31, 1_000 and 12:30:00 are words; a key is its text. Anchors, aliases and merge keys (<<) are read,
tags are refused, and so is a key that stands twice in one mapping.
"""

import json
import os
import re
import stat
from collections.abc import Iterator
from copy import deepcopy
from math import inf
from pathlib import Path
from typing import Any

import yaml

from subquad.errors import UserError, one_line, shown, shown_text

MOST_BYTES = 2**20
MOST_VALUES = 100_000  # after aliases are written out: nine lines of nine aliases stand for a billion
DEEPEST = 50
WHOLE_NUMBERS = range(-(2**63), 2**63)

_NULL = re.compile(r"(?:null|Null|NULL|~|)\Z")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_INT = re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z")
_NOT_FINITE = re.compile(r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z")


def read_mapping(path: str | Path, what: str = "configuration", most: int = MOST_BYTES) -> dict[str, Any]:
    """The mapping in a YAML file, or in a JSON file where its name ends so."""
    text, name = read_text(path, what, most), shown_text(str(path))
    values = (parse_json if Path(path).suffix == ".json" else parse_yaml)(text, name)
    if not isinstance(values, dict):
        raise UserError(f"{name} holds a {type(values).__name__}; a {what} is a mapping of keys to values")
    return values


def read_text(path: str | Path, what: str, most: int = MOST_BYTES) -> str:
    """The text of a regular file in UTF-8 of at most `most` bytes."""
    name = shown_text(str(path))
    try:
        # Without waiting, as for a pipe that nobody writes to; only regular files come to an end.
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            data = file.read(most + 1) if regular else b""
    except (OSError, ValueError) as error:  # ValueError: a NUL or a lone surrogate in the name
        raise UserError(f"cannot read the {what} {name}: {getattr(error, 'strerror', None) or error}") from error
    if not regular:
        raise UserError(f"cannot read the {what} {name}: it is no regular file")
    if len(data) > most:
        raise UserError(f"cannot read the {what} {name}: it is longer than {most:,} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        why = "it is UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else f"byte {error.start} is not UTF-8"
        raise UserError(f"cannot read the {what} {name}: {why}; write it in UTF-8") from error


def parse_yaml(text: str, where: str) -> Any:
    """The value that a text of YAML stands for; errors name `where` it came from."""
    try:
        _check_text(text, where)
        events = yaml.parse(text.removeprefix("\ufeff"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        value = _Builder(events).document()
    except (yaml.YAMLError, _Refused) as error:
        raise UserError(f"{where} is no valid YAML: {shown_text(one_line(error))}") from error
    _check_words(value, where)
    return value


def parse_json(text: str, where: str) -> Any:
    """The value that a text of JSON stands for; errors name `where` it came from."""
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_int=_whole, parse_float=_fraction)
        _check_depth(value)
        _check_words(value, where)
    except RecursionError as error:
        raise UserError(f"{where} is no valid JSON: it is nested deeper than {DEEPEST} levels") from error
    except (json.JSONDecodeError, _Refused) as error:
        raise UserError(f"{where} is no valid JSON: {shown_text(one_line(error))}") from error
    return value


def dump_yaml(values: Any) -> str:
    """YAML that `parse_yaml` reads back as it was, and that a reader of YAML 1.1 reads the same."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


class _Refused(Exception):
    """What is no mistake of syntax but is not read here either."""


class _Builder:
    """Values from the parser's events: no more, no deeper and no stranger than the limits allow."""

    def __init__(self, events: Iterator[yaml.Event]):
        self.events = events
        self.count = 0
        self.anchors: dict[str, tuple[Any, int]] = {}

    def document(self) -> Any:
        value = None
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                if self.count:
                    raise _at(event, "a second document begins; give one")
                value = self.value(next(self.events), 1)
        return value

    def value(self, event: yaml.Event, depth: int) -> Any:
        before = self.count
        self.count += 1
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.anchors:
                raise _at(event, f"the alias *{event.anchor} stands before its anchor is complete")
            value, size = self.anchors[event.anchor]
            self._limit(event, size)
            return deepcopy(value)
        self._limit(event, 0)
        if depth > DEEPEST:
            raise _at(event, f"it is nested deeper than {DEEPEST} levels")
        if event.tag not in (None, "!"):
            raise _at(event, f"the tag {shown(event.tag)} is not read; write the value without it")
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = []
            while not isinstance(item := next(self.events), yaml.SequenceEndEvent):
                value.append(self.value(item, depth + 1))
        else:
            value = self._mapping(depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = value, self.count - before
        return value

    def _limit(self, event: yaml.Event, more: int) -> None:
        self.count += more
        if self.count > MOST_VALUES:
            raise _at(event, f"it holds more than {MOST_VALUES:,} values, aliases written out")

    def _mapping(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        merged: list[dict[str, Any]] = []
        while not isinstance(key := next(self.events), yaml.MappingEndEvent):
            if not isinstance(key, yaml.ScalarEvent):
                raise _at(key, "a key must be a word, not a list, a mapping or an alias")
            self.value(key, depth)
            value = self.value(next(self.events), depth + 1)
            if key.value == "<<" and key.implicit[0]:
                several = value if isinstance(value, list) else [value]
                if not all(isinstance(one, dict) for one in several):
                    raise _at(key, "<< merges a mapping, or a list of mappings")
                merged += several
            elif key.value in found:
                raise _at(key, f"the key {shown(key.value)} stands twice in one mapping")
            else:
                found[key.value] = value
        for one in merged:
            found = found | {name: value for name, value in one.items() if name not in found}
        return found

    @staticmethod
    def _scalar(event: yaml.ScalarEvent) -> Any:
        text = event.value
        if not event.implicit[0]:  # in quotes
            return text
        try:
            if _NULL.match(text):
                return None
            if _BOOL.match(text):
                return text.lower() == "true"
            if _INT.match(text):
                return _whole(text)
            if _FLOAT.match(text):
                return _fraction(text)
            if _NOT_FINITE.match(text):
                return float(text.replace(".", ""))
        except _Refused as error:
            raise _at(event, str(error)) from error
        return text


class _Dumper(yaml.SafeDumper):
    """Quotes words that either version of YAML takes for something else, and writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern in (("int", _INT), ("float", _FLOAT), ("float", _NOT_FINITE)):
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list("-+.0123456789"))


def _whole(text: str) -> int:
    digits = text.lstrip("+-")
    if len(digits) > 30:
        raise _Refused(f"a number of {len(digits):,} digits is beyond 64 bits")
    number = int(digits, {"0o": 8, "0x": 16}.get(digits[:2], 10)) * (-1 if text[0] == "-" else 1)
    if number not in WHOLE_NUMBERS:
        raise _Refused(f"the number {number} is beyond 64 bits")
    return number


def _fraction(text: str) -> float:
    number = float(text) if len(text) <= 1000 else inf
    if number in (inf, -inf):
        raise _Refused(f"the number {shown_text(text)} is beyond 64 bits")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Refused(f"the key {shown(key)} stands twice in one mapping")
        found[key] = value
    return found


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise _Refused(f"it is nested deeper than {DEEPEST} levels")
        inner = [v for v in level if isinstance(v, dict | list)]
        level = [item for v in inner for item in (v.values() if isinstance(v, dict) else v)]


def _check_words(value: Any, where: str) -> None:
    """Escapes can write what UTF-8 and file names cannot hold."""
    if isinstance(value, str):
        _check_text(value, where)
    elif isinstance(value, dict | list):
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            _check_words(item, where)


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} holds characters that are not UTF-8, at {error.start}") from error
    if "\0" in text:
        raise UserError(f"{where} holds the character NUL, which no name or path can have")


def _at(event: yaml.Event, message: str) -> _Refused:
    return _Refused(f"line {event.start_mark.line + 1}: {message}")
