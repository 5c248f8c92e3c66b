"""The notebook runs from top to bottom, and what its cells show is short."""

from __future__ import annotations

import ast
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from orderppl.inference.checkpoints import CheckpointFolder

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebooks" / "first_order.ipynb"


def sources() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") for cell in cells)  # they are not kept
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run_cell(source: str, names: dict[str, Any]) -> str:
    """Run a cell; what a notebook shows of it."""
    *lines, last = ast.parse(source).body
    assert isinstance(last, ast.Expr)
    exec(compile(ast.Module(lines, []), "cell", "exec"), names)
    return repr(eval(compile(ast.Expression(last.value), "cell", "eval"), names))


def test_the_notebook_runs_and_shows_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    shown = [run_cell(source, names) for source in sources()]
    assert shown[0] == "Batch(64 x 6 tokens, 384 to reveal)"
    assert all(len(text) < 2000 for text in shown)
    assert names["result"].updates == 40


def test_ctrl_c_in_a_cell_keeps_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for source in sources()[:2]:
        run_cell(source, names)
    forward, calls = type(names["model"]).forward, [0]

    def interrupted(self: Any, batch: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, batch)

    monkeypatch.setattr(type(names["model"]), "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_cell(sources()[2], names)
    left = CheckpointFolder(tmp_path / "first-order" / "checkpoints").latest()
    assert left is not None
    assert left.name == "update_00000003.pt"
