"""The command line as a user calls it: in a folder of its own, with modules, data and models of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from own_things import MODULE

from orderppl.cli.main import main


class Shell(SimpleNamespace):
    """Runs commands, and what they printed."""

    def __call__(self, *arguments: object) -> int:
        self.status = main([str(item) for item in arguments])
        self.out, self.err = self.capture.readouterr()
        return self.status

    def fine(self, *arguments: object) -> str:
        """Standard output of a command that has to work."""
        assert self(*arguments) == 0, self.err
        return self.out

    def error(self, *arguments: object) -> str:
        """The one line of a command that has to fail."""
        assert self(*arguments) == 2, self.out
        lines = self.err.strip().replace("\r", "\n").splitlines()
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:], self.err
        assert "Traceback" not in self.err
        return lines[-1].removeprefix("error: ")


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Shell]:
    """In an empty folder with `my_module.py`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_module.py").write_text(MODULE)
    monkeypatch.setattr(sys, "path", [item for item in sys.path if item])
    monkeypatch.setenv("COLUMNS", "80")
    yield Shell(capture=capsys, folder=tmp_path)
    sys.modules.pop("my_module", None)


SMALL_CHAIN = ["--config", "chain", "--data.length=6", "--data.train=40", "--data.validation=8", "--data.test=10"]
QUICK = ["--fit.updates=3", "--fit.batch_size=8", "--fit.progress=false"]


@pytest.fixture
def small_chain() -> list[str]:
    """Options of fit-order that take half a second."""
    return [*SMALL_CHAIN, *QUICK]
