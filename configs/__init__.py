"""The shipped configurations: the zoo's table of contents."""

from importlib.resources import files
from pathlib import Path

EXPERIMENTS = ("recall",)


def folder() -> Path:
    """The folder that holds the shipped YAML files."""
    return Path(str(files(__name__)))


def names(kind: str | None = None) -> list[str]:
    """The shipped model configurations, as paths below `folder()` without their ending; those of experiments, which
    lie in folder `kind` ("recall": of `subquad compare recall`), without the folder as well."""
    paths = [p.relative_to(folder()).with_suffix("") for p in folder().rglob("*.yaml")]
    if kind is not None:
        return sorted(str(p.relative_to(kind)) for p in paths if p.parts[0] == kind)
    return sorted(str(p) for p in paths if p.parts[0] not in EXPERIMENTS)
