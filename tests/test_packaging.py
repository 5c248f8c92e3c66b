"""What the built wheel holds; it must not depend on the symlinks of the tree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("models", "guides")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy of the tree without its symlinks, as some archives unpack it."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    ignored = shutil.ignore_patterns("__pycache__")
    for part in PARTS:
        shutil.copytree(ROOT / part, copy / part, ignore=ignored)
    shutil.copytree(ROOT / "orderppl", copy / "orderppl", ignore=shutil.ignore_patterns("__pycache__", *PARTS))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."]
    built = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (path,) = (copy / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_every_source_file_once_and_no_other(wheel: zipfile.ZipFile) -> None:
    packed = [name for name in wheel.namelist() if ".dist-info/" not in name]
    wanted = ["orderppl/py.typed"]
    for part in ("orderppl", *PARTS):
        for folder, _, names in os.walk(ROOT / part, followlinks=False):
            inside = Path("" if part == "orderppl" else "orderppl") / Path(folder).relative_to(ROOT)
            wanted += [(inside / name).as_posix() for name in names if name.endswith((".py", ".yaml", ".css", ".js"))]
    assert sorted(packed) == sorted(wanted)


def test_the_wheel_names_its_command_and_licence(wheel: zipfile.ZipFile) -> None:
    (entry,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "orderppl = orderppl.cli.main:main" in wheel.read(entry).decode()
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())
    (about,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    text = wheel.read(about).decode()
    assert "Requires-Dist: torch>=2.6\n" in text
    assert "Requires-Python: >=3.11\n" in text
    assert "Classifier: Programming Language :: Python :: 3.12\n" in text


def test_every_dependency_has_a_lower_bound() -> None:
    """What `make lower-bounds` installs; a dependency without a bound stops it."""
    script = ROOT / ".ci" / "lower_bounds.py"
    printed = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True).stdout
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["lm-eval"]]
    bounds = [re.sub(r"\[.*\]", "", text.partition(",")[0]) for text in wanted]
    assert printed.splitlines() == [bound.replace(">=", "==") for bound in bounds]
    assert all("==" in line for line in printed.splitlines())


def test_a_release_has_one_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f'__version__ = "{version}"' in (ROOT / "orderppl" / "__init__.py").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^## {re.escape(version)} ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_issues_are_asked_for_versions() -> None:
    templates = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.md"))
    assert len(templates) == 2 and all("orderppl env" in path.read_text() for path in templates)
