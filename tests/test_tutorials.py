"""Every tutorial runs as it stands; each asserts what it says."""

from __future__ import annotations

import ast
import io
import runpy
from contextlib import redirect_stdout
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "tutorials"
SAYS = {  # a line that the reader must see
    "bring_your_own_data_and_model": "eve has 2 pens, 2 in all, and 7 cups, 7 in all.",
    "read_the_diagnostics": "posterior: no alarm",
    "swap_guide_and_prior": "nats from the evidence   a plan, its own prior",
    "write_your_own_guide": "gradient: largest |z| of 16 coordinates",
}


def test_every_tutorial_is_listed() -> None:
    scripts = [path.stem for path in FOLDER.glob("*.py") if path.read_text("utf-8").startswith("# %% [markdown]")]
    assert sorted(scripts) == sorted(SAYS)


@pytest.mark.parametrize("name", list(SAYS))
def test_a_tutorial_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where some of them write
    monkeypatch.syspath_prepend(FOLDER)  # as Python does with the folder of a script
    with redirect_stdout(io.StringIO()) as output:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert SAYS[name] in output.getvalue()


def test_the_guide_of_the_tutorial_has_30_lines() -> None:
    text = (FOLDER / "block_guide.py").read_text(encoding="utf-8")
    (guide,) = (node for node in ast.parse(text).body if isinstance(node, ast.ClassDef))
    assert guide.end_lineno is not None
    lines = text.splitlines()[guide.lineno - 1 : guide.end_lineno]
    assert sum(bool(line.strip()) for line in lines) <= 30
