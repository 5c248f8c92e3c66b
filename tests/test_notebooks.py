"""The notebooks are valid and run from top to bottom; each asserts what it says."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
SAYS = {"learn_an_order": "Interval(", "write_a_guide": "ours is higher by"}
NOTEBOOKS = [FOLDER / f"{name}.ipynb" for name in SAYS]


def test_every_notebook_is_run_here_or_cell_by_cell() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {*SAYS, "first_order"}  # see test_notebook.py


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = json.loads(path.read_text("utf-8"))
    assert notebook["nbformat"] == 4 and notebook["metadata"]["kernelspec"]["name"] == "python3"
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)  # kept free of outputs
    monkeypatch.chdir(FOLDER)  # as a server of notebooks does
    session: dict[str, object] = {}
    with redirect_stdout(io.StringIO()) as printed, redirect_stderr(io.StringIO()):
        for cell in cells:
            exec(compile("".join(cell["source"]), path.name, "exec"), session)  # the file under test is our own
    assert SAYS[path.stem] in printed.getvalue()
