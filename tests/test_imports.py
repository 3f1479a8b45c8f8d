"""Imports run one way: kernels <- layers <- models <- train, infer <- compare."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "kernels": set(),
    "layers": {"kernels"},
    "models": {"kernels", "layers"},
    "train": {"kernels", "layers", "models"},
    "infer": {"kernels", "layers", "models"},
    "compare": {"kernels", "layers", "models", "train", "infer"},
    "configs": set(),
}
ANYONE_MAY_IMPORT = {
    "errors",
    "reading",
    "memory",
    "files",
    "checksums",
    "terminal",
    "arguments",
    "configs",
    "folders",
    "__version__",
}


def imported_parts(source: str) -> set[str]:
    """The first word below `subquad` of every import, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            paths = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            paths = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "subquad" else [node.module]
            )
        else:
            continue
        found |= {path.split(".")[1] for path in paths if path.startswith("subquad.")}
    return found


def test_imported_parts_sees_every_form():
    source = (
        "import subquad.a.b\ndef f():\n    from subquad.c import d\n    from subquad import e\nimport torch, subquad"
    )
    assert imported_parts(source) == {"a", "c", "e"}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_what_lies_below_it(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    allowed = MAY_IMPORT[package] | ANYONE_MAY_IMPORT | {package}
    wrong = {str(f.relative_to(ROOT)): imported_parts(f.read_text()) - allowed for f in files}
    assert not {name: parts for name, parts in wrong.items() if parts}


def test_the_top_imports_nothing_when_it_loads():
    """subquad/*.py may name every part, but only inside functions and for type checkers."""
    for file in sorted((ROOT / "subquad").glob("*.py")):
        top_level = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        source = "\n".join(ast.unparse(node) for node in top_level)
        assert imported_parts(source) <= ANYONE_MAY_IMPORT, file.name


def test_every_package_is_declared():
    import tomllib

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = [*MAY_IMPORT, *(str(f.parent.relative_to(ROOT)) for top in MAY_IMPORT for f in _nested(top))]
    homes = {f"subquad.{folder.replace('/', '.')}": folder for folder in folders}
    assert set(declared["packages"]) == {"subquad", *homes}
    assert declared["package-dir"] == {"subquad": "subquad", **homes}


def _nested(top):
    return (ROOT / top).rglob("*/__init__.py")
