"""The shipped configurations: the zoo's table of contents."""

from importlib.resources import files
from pathlib import Path


def folder() -> Path:
    """The folder that holds the shipped YAML files."""
    return Path(str(files(__name__)))


def names() -> list[str]:
    """The shipped configurations, as paths below `folder()` without their ending."""
    return sorted(str(p.relative_to(folder()).with_suffix("")) for p in folder().rglob("*.yaml"))
