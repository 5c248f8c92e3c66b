"""The shape of the tree: which package may import which, and that packaging names every package."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("models", "guides")  # at the top of the tree, imported below orderppl

# What each part may not import; the first part whose folder holds a file is the part of that file.
FORBIDDEN = {
    "models": ("orderppl.guides", "orderppl.cli"),
    "guides": ("orderppl.models", "orderppl.cli"),
    "experiments": ("orderppl.cli",),
    "orderppl/cli": (),  # the commands build on everything
    "orderppl": ("orderppl.models", "orderppl.guides", "orderppl.cli"),
}


def sources(part: str) -> list[Path]:
    """Python files of a part, without following the symlinks in orderppl/."""
    found = [
        Path(folder) / name
        for folder, _, names in os.walk(ROOT / part, followlinks=False)
        for name in names
        if name.endswith(".py")
    ]
    return [path for path in found if part != "orderppl" or "cli" not in path.relative_to(ROOT).parts]


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module a file names in an import, at any depth; `from a import b` counts as a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def faults(part: str, source: str) -> list[str]:
    """Imports of a file that go against the direction, or name a part by its top-level or relative name."""
    found = []
    for name in imported(ast.parse(source)):
        upward = any(name == module or name.startswith(f"{module}.") for module in FORBIDDEN[part])
        if upward or name.startswith(".") or name.split(".")[0] in (*OUTSIDE, "experiments"):
            found.append(name)
    return found


@pytest.mark.parametrize("part", list(FORBIDDEN))
def test_imports_follow_the_direction(part: str) -> None:
    files = sources(part)
    assert files
    wrong = {str(path.relative_to(ROOT)): found for path in files if (found := faults(part, path.read_text()))}
    assert wrong == {}


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("models", "from orderppl.guides import PolicyGuide"),
        ("guides", "def f():\n    import orderppl.models.learned"),
        ("orderppl", "from orderppl import guides"),
        ("orderppl", "from .unmasking import VISIBLE"),
        ("experiments", "from models import UnmaskingModel"),
    ],
)
def test_an_import_against_the_direction_is_seen(part: str, source: str) -> None:
    assert faults(part, source)


# What the parts of the core build on, besides what stands at its top; imports for type checkers alone do not count.
BUILDS_ON = {
    "unmasking": set(),
    "distributions": {"unmasking"},
    "policies": {"unmasking", "distributions"},
    "decoding": {"unmasking", "distributions", "policies"},
    "inference": {"unmasking", "distributions"},
    "data": {"unmasking"},
}


@pytest.mark.parametrize("part", BUILDS_ON)
def test_the_core_is_in_layers(part: str) -> None:
    found: set[str] = set()
    for path in sources(f"orderppl/{part}"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                node.body = []
        found |= {name.split(".")[1] for name in imported(tree) if name.startswith("orderppl.")}
    assert found & BUILDS_ON.keys() - {part} <= BUILDS_ON[part]


def test_pyproject_names_every_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packaged = [part for part in FORBIDDEN if part != "experiments"]
    folders = {path.parent.relative_to(ROOT) for part in packaged for path in sources(part)}
    in_tree = {".".join(path.parts if path.parts[0] == "orderppl" else ("orderppl", *path.parts)) for path in folders}
    assert set(settings["packages"]) == in_tree
    assert settings["package-dir"] == {"orderppl": "orderppl"} | {f"orderppl.{part}": part for part in OUTSIDE}
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)


@pytest.mark.parametrize("part", OUTSIDE)
def test_symlinks_serve_type_checkers(part: str) -> None:
    link = ROOT / "orderppl" / part
    assert link.is_symlink()
    assert os.readlink(link) == f"../{part}"


def test_experiments_are_no_package() -> None:
    assert not (ROOT / "experiments" / "__init__.py").exists()
    assert not (ROOT / "orderppl" / "experiments").exists()


@pytest.mark.parametrize("part", OUTSIDE)
def test_a_top_level_import_is_refused(part: str) -> None:
    command = [sys.executable, "-c", f"import {part}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert f"import orderppl.{part}, not {part}" in run.stderr


def test_importing_the_command_stays_cheap() -> None:
    code = "import sys, orderppl, orderppl.cli.main; sys.exit(sum(n in sys.modules for n in ('torch', 'pyro')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
