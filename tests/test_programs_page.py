"""docs/programs.md: its Python runs, its shapes are those that Pyro prints, its drawings are drawn."""

from __future__ import annotations

import importlib.util
import io
import re
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "programs.md"
BLOCK = re.compile(r"```(python draw|python|text)\n(.*?)```", re.DOTALL)


def lines(text: str) -> list[str]:
    """Without the white space that Pyro leaves at the ends of lines."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def run_page(session: dict[str, object], draw: bool) -> tuple[list[list[str]], list[list[str]]]:
    """Run the blocks in one session; what the page says was printed, and what was."""
    said, printed = [], []
    for kind, body in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if kind == "text":
            said.append(lines(body))
        elif kind == "python" or draw:
            with redirect_stdout(io.StringIO()) as output:
                exec(compile(body, PAGE.name, "exec"), session)  # the file under test is our own
            if output.getvalue():
                printed.append(lines(output.getvalue()))
    return said, printed


def test_the_shapes_are_those_that_pyro_prints():
    said, printed = run_page({}, draw=False)
    assert len(said) == 4
    assert printed == said


@pytest.mark.skipif(importlib.util.find_spec("graphviz") is None, reason="the extra `draw` is not installed")
def test_the_graph_of_a_program_has_its_sites_and_their_dependence():
    session: dict[str, object] = {}
    run_page(session, draw=False)
    import pyro

    source = pyro.render_model(session["model"], model_args=(session["batch"],), render_distributions=True).source
    assert "reveal_step -> tokens" in source
    assert "reveal_step ~ StepwiseOrder" in source and "tokens ~ RevealedTokens" in source
    assert re.search(r"tokens \[label=tokens fillcolor=gray", source)  # observed
    assert re.search(r"reveal_step \[label=reveal_step fillcolor=white", source)


@pytest.mark.skipif(importlib.util.find_spec("graphviz") is None, reason="the extra `draw` is not installed")
@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz's dot is not on the PATH")
def test_the_drawings_of_the_page_are_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page({}, draw=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["guide.svg", "model.svg"]
    assert "RevealedTokens" in (tmp_path / "model.svg").read_text()
