"""The Python of the README runs as it stands, top to bottom, in one session."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


@pytest.mark.filterwarnings("ignore:.*requires_grad.*:UserWarning")  # Pyro 1.9 converts its own loss that way
def test_python_blocks_run_in_order():
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 3
    session: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), session)  # the file under test is our own
    assert session["loss"] == session["loss"]
    assert session["nats"] > 0
