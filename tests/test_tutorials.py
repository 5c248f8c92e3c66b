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
    "read_the_diagnostics": "posterior: no alarm",
    "swap_guide_and_prior": "nats from the evidence   LearnedSteps, tied",
    "write_your_own_guide": "gradient: largest |z| of 16 coordinates",
}


def test_every_tutorial_is_listed():
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted(SAYS)


@pytest.mark.parametrize("name", list(SAYS))
def test_a_tutorial_runs(name: str):
    with redirect_stdout(io.StringIO()) as output:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert SAYS[name] in output.getvalue()


def test_the_guide_of_the_tutorial_has_30_lines():
    text = (FOLDER / "write_your_own_guide.py").read_text(encoding="utf-8")
    (guide,) = (node for node in ast.parse(text).body if isinstance(node, ast.ClassDef))
    assert guide.end_lineno - guide.lineno + 1 <= 33
    assert sum(bool(line.strip()) for line in text.splitlines()[guide.lineno - 1 : guide.end_lineno]) <= 30
