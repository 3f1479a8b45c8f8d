"""What a stated cost such as "O(T (T R / C + C) D)" says about growth with length: one small reader for all of them.

Names next to each other are multiplied. T and S, the tokens and the cached ones, are the length; every other name (a
window, a chunk, a width) is a constant.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import log
from typing import Any, NamedTuple

from subquad.errors import UserError

LENGTHS = ("T", "S")
LOGARITHM = 0.2  # what a factor log T may add to an exponent at the lengths that are measured
TOKEN = re.compile(r"\s*(?:([A-Za-z_]\w*'?)|(\d+)|([-+*/^()]))")


class Term(NamedTuple):
    """A product of the sum that a cost is."""

    degree: int  # in the length
    logs: int  # factors log T


@dataclass(frozen=True)
class Cost:
    """A stated cost: its text, its terms, and its value for given letters."""

    text: str
    tree: Any

    def terms(self, constants: tuple[str, ...] = ()) -> frozenset[Term]:
        """With each name in `constants` a constant as well."""
        return _terms(self.tree, constants)

    def exponents(self, constants: tuple[str, ...] = ()) -> tuple[float, float]:
        """Of the slowest term and of the fastest, which lead at short lengths and at long ones."""
        found = self.terms(constants)
        return min(t.degree for t in found), max(t.degree + LOGARITHM * (t.logs > 0) for t in found)

    def value(self, letters: Mapping[str, float]) -> float:
        """Logarithms are to base 2."""
        return _value(self.tree, letters)


def read(text: str) -> Cost:
    """The cost in O(...), or that is the text; a UserError where it is none."""
    inside = _inside(text)
    found, tokens = [], 0
    while tokens < len(inside.rstrip()):
        match = TOKEN.match(inside, tokens)
        if not match:
            raise UserError(f"{text!r} is no cost: {inside[tokens:].strip()!r} cannot be read")
        found.append(match[0].strip())
        tokens = match.end()
    reader = _Reader(text, found)
    tree = reader.sum()
    if reader.left:
        raise UserError(f"{text!r} is no cost: {reader.left[0]!r} stands where nothing fits it")
    return Cost(text, tree)


def _inside(text: str) -> str:
    """Between the parentheses of the first O(...)."""
    start = re.search(r"\bO\(", text)
    if not start:
        return text
    depth = 0
    for end in range(start.end() - 1, len(text)):
        depth += {"(": 1, ")": -1}.get(text[end], 0)
        if not depth:
            return text[start.end() : end]
    raise UserError(f"{text!r} is no cost: a parenthesis is not closed")


class _Reader:
    """Trees are numbers, names, ("log", tree), ("^", tree, power) and ("+" | "-" | "*" | "/", left, right)."""

    def __init__(self, text: str, tokens: list[str]):
        self.text, self.left = text, tokens

    def next(self) -> str:
        if not self.left:
            raise UserError(f"{self.text!r} is no cost: it ends too early")
        return self.left.pop(0)

    def sum(self) -> Any:
        tree = self.product()
        while self.left and self.left[0] in "+-":
            tree = (self.next(), tree, self.product())
        return tree

    def product(self) -> Any:
        tree = self.power()
        while self.left and self.left[0] not in "+-)":
            sign = self.next() if self.left[0] in "*/" else "*"
            tree = (sign, tree, self.power())
        return tree

    def power(self) -> Any:
        tree = self.atom()
        if self.left and self.left[0] == "^":
            self.next()
            return "^", tree, int(self.next())
        return tree

    def atom(self) -> Any:
        token = self.next()
        if token == "(":
            tree = self.sum()
            if self.next() != ")":
                raise UserError(f"{self.text!r} is no cost: a parenthesis is not closed")
            return tree
        if token == "log":
            return "log", self.power()
        if token in "+-*/^)":
            raise UserError(f"{self.text!r} is no cost: {token!r} stands where nothing fits it")
        return int(token) if token.isdigit() else token


def _terms(tree: Any, constants: tuple[str, ...]) -> frozenset[Term]:
    if not isinstance(tree, tuple):
        return frozenset({Term(int(tree in LENGTHS and tree not in constants), 0)})
    sign, *parts = tree
    if sign == "log":
        grows = any(t.degree for t in _terms(parts[0], constants))
        return frozenset({Term(0, int(grows))})
    first = _terms(parts[0], constants)
    if sign == "^":
        return frozenset(Term(t.degree * parts[1], t.logs * parts[1]) for t in first)
    second = _terms(parts[1], constants)
    if sign in "+-":
        return first | second
    if sign == "/":
        fastest = max(second)
        return frozenset(Term(t.degree - fastest.degree, t.logs - fastest.logs) for t in first)
    return frozenset(Term(a.degree + b.degree, a.logs + b.logs) for a, b in product(first, second))


def _value(tree: Any, letters: Mapping[str, float]) -> float:
    if isinstance(tree, str):
        return letters[tree]
    if not isinstance(tree, tuple):
        return float(tree)
    sign, *parts = tree
    first = _value(parts[0], letters)
    if sign == "log":
        return log(first, 2)
    if sign == "^":
        return first ** parts[1]
    second = _value(parts[1], letters)
    return {"+": first + second, "-": first - second, "*": first * second, "/": first / second}[sign]
