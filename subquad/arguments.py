"""Command lines whose errors are one sentence."""

import argparse
import re
from typing import Any, NoReturn

from subquad.errors import UserError, nearest


class Parser(argparse.ArgumentParser):
    """argparse, except that a wrong argument raises UserError and names the nearest valid one."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown and unknown[1].startswith("-"):
            word = unknown[1].split("=")[0]
            raise UserError(f"{self.prog} has no option {word}; {nearest(word, self._option_string_actions)}")
        raise UserError(f"{self.prog}: {message}")

    def at_least(self, arguments: argparse.Namespace, name: str, smallest: int) -> int:
        """The value of an option that must not be smaller."""
        value = getattr(arguments, name)
        if value < smallest:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {smallest}")
        return value
