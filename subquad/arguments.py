"""Command lines whose errors are one sentence."""

import argparse
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
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


def dispatch(prog: str, about: str, commands: Mapping[str, tuple[str, str]], argv: Sequence[str]) -> int:
    """Run the `main(argv)` of the module that the first word of argv stands for; each loads only when it is asked for.

    `commands` maps a word to (module, what it does). Without a word, or with --help, they are listed.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {prog} COMMAND [arguments]      {prog} COMMAND --help\n\n{about}\n")
        for name, (_, what) in commands.items():
            print(f"  {name:8} {what}")
        return 0
    name, *rest = argv
    if name not in commands:
        raise UserError(f"{prog} has no command {name!r}; {nearest(name, commands)}")
    return import_module(commands[name][0]).main(rest) or 0
