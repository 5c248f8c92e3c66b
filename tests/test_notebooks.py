"""The notebooks are valid and run from top to bottom; each asserts what it says, and shows little."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import notebooks
import pytest

from orderppl.inference.checkpoints import CheckpointFolder

SAYS = {
    "first_order": "Batch(64 x 6 tokens, 384 to reveal)",
    "learn_an_order": "learned ahead of top_prob by 0.",
    "write_a_guide": "ours is higher by",
}


@pytest.fixture(autouse=True)
def in_a_folder_with_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").symlink_to(notebooks.ROOT / "docs")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", notebooks.NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_little(path: Path) -> None:
    notebook = json.loads(path.read_text("utf-8"))
    assert notebook["nbformat"] == 4 and notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in notebook["cells"])
    shown = [cell.shown for cell in notebooks.run(path)]
    assert any(SAYS[path.stem] in text for text in shown)
    assert all(len(text) < 2000 for text in shown)


def test_ctrl_c_in_a_cell_keeps_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {}
    cells = notebooks.cells_of(next(path for path in notebooks.NOTEBOOKS if path.stem == "first_order"))
    imports, programs, fit = [cell.source for cell in cells if cell.kind == "code"][:3]
    for source in (imports, programs):
        notebooks.show(source, names)
    forward, calls = type(names["model"]).forward, [0]

    def interrupted(self: Any, batch: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, batch)

    monkeypatch.setattr(type(names["model"]), "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        notebooks.show(fit, names)
    left = CheckpointFolder(tmp_path / "first-order" / "checkpoints").latest()
    assert left is not None
    assert left.name == "update_00000003.pt"
