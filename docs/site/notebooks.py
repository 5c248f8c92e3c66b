"""Run a notebook cell by cell, as Jupyter shows it: for the pages of the site and for the tests."""

from __future__ import annotations

import ast
import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


class Cell(NamedTuple):
    """What a reader sees: Markdown, or code and what it shows."""

    kind: str
    source: str
    shown: str = ""


def cells_of(path: Path) -> list[Cell]:
    """The cells of a notebook, without outputs; none are kept in the files."""
    return [Cell(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(path.read_text("utf-8"))["cells"]]


def run(path: Path) -> list[Cell]:
    """Run a notebook in one session and in the current folder."""
    session: dict[str, Any] = {}
    return [cell if cell.kind != "code" else cell._replace(shown=show(cell.source, session)) for cell in cells_of(path)]


def show(source: str, session: dict[str, Any]) -> str:
    """Run one cell; what a notebook shows below it: what it prints, and its last expression."""
    *lines, last = ast.parse(source).body
    if not isinstance(last, ast.Expr):
        lines, last = [*lines, last], ast.parse("None").body[0]
    with redirect_stdout(io.StringIO()) as printed, redirect_stderr(io.StringIO()):  # progress bars are on the latter
        exec(compile(ast.Module(lines, []), "cell", "exec"), session)  # the files are our own
        value = eval(compile(ast.Expression(last.value), "cell", "eval"), session)
    return printed.getvalue() + ("" if value is None else f"{value!r}\n")
