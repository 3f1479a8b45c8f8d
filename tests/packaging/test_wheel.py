"""The wheel: built without a network, it holds every package and its data, imports from anywhere, and type-checks."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
from email import message_from_string
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from subquad.compare.kernel_cases import PEERS

ROOT = Path(__file__).parents[2]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


def run(*command, **kwargs):
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy to build in: setuptools leaves a build folder behind, whose stale files end up in later wheels."""
    copy = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"].values()
    for name in sorted(folders):  # a folder before those within it, which come along
        if not (copy / name).exists():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    deep = copy / "configs" / "below" / "further"
    deep.mkdir(parents=True)
    (deep / "nested.yaml").write_text("d_model: 8\n")
    return copy


@pytest.fixture(scope="module")
def installed(sources, tmp_path_factory):
    """A folder with the wheel installed in it and nothing else."""
    folder, wheels = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("wheels")
    run(*PIP, "wheel", "--no-index", "--no-build-isolation", "--no-deps", "--wheel-dir", wheels, sources)
    (wheel,) = wheels.glob("*.whl")
    run(*PIP, "install", "--no-index", "--no-deps", "--target", folder, wheel)
    return folder


def environment(installed):
    return os.environ | {"PYTHONPATH": str(installed)}


def python(installed, cwd, code):
    return run(sys.executable, "-P", "-c", code, cwd=cwd, env=environment(installed))


def test_it_holds_every_module_and_data_file(sources, installed):
    folders = tomllib.loads((sources / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    kinds = ("*.py", "*.yaml", "*.json", "*.html", "*.css", "*.js", "py.typed")
    wanted = {
        str(Path(*package.split("."), file.relative_to(sources / folder)))
        for package, folder in folders.items()
        for kind in kinds
        for file in (sources / folder).rglob(kind)
    }
    held = {str(file.relative_to(installed)) for kind in kinds for file in (installed / "subquad").rglob(kind)}
    assert held == wanted
    assert "subquad/configs/below/further/nested.yaml" in held
    assert "subquad/py.typed" in held


def test_metadata(installed):
    (info,) = installed.glob("subquad-*.dist-info")
    assert (info / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    metadata = message_from_string((info / "METADATA").read_text())
    assert metadata["License-Expression"] == "MIT"
    commands = (info / "entry_points.txt").read_text().split()
    assert {"subquad", "infer"} <= set(commands)


def test_every_module_imports_from_another_folder(installed, tmp_path):
    code = """
import importlib, pkgutil, subquad
names = [m.name for m in pkgutil.walk_packages(subquad.__path__, "subquad.")]
for name in names:
    print(name, importlib.import_module(name).__file__)
print("configs", subquad.configs.names())
"""
    lines = python(installed, tmp_path, code).splitlines()
    homes = [line.split()[1] for line in lines[:-1]]
    assert len(homes) > 30
    assert all(home.startswith(str(installed)) for home in homes), homes
    assert "below/further/nested" in lines[-1]


def test_the_version_agrees(installed, tmp_path):
    (info,) = installed.glob("subquad-*.dist-info")
    code = "from subquad.cli import main; main(['--version'])"
    assert python(installed, tmp_path, code).split() == info.name.removesuffix(".dist-info").split("-")


# Far the most of the time would go to reading libraries that no public signature names.
MYPY = """
[mypy]
warn_unused_ignores = True
[mypy-transformers.*,lightning.*,matplotlib.*]
follow_imports = skip
"""


def test_public_signatures_type_check(installed, tmp_path):
    """On the wheel, from another folder: static checkers cannot follow the mapping of an editable install."""
    shutil.copy(Path(__file__).with_name("consumer.py"), tmp_path)
    (tmp_path / "mypy.ini").write_text(MYPY)
    out = run(sys.executable, "-P", "-m", "mypy", "consumer.py", cwd=tmp_path, env=environment(installed))
    assert out == "Success: no issues found in 1 source file\n"


def test_dependencies_cover_the_imports():
    """Every third-party module that subquad imports belongs to a declared dependency or is one to compare with."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = {d.split(";")[0].split("[")[0].split(">")[0].strip().lower() for d in project["project"]["dependencies"]}
    imported = set()
    for folder in project["tool"]["setuptools"]["package-dir"].values():
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    imported.add(node.module.split(".")[0])
    homes = packages_distributions()
    foreign = imported - set(sys.stdlib_module_names) - set(PEERS) - {"subquad"}
    undeclared = {name for name in foreign if not declared & {home.lower() for home in homes.get(name, [])}}
    assert not undeclared
