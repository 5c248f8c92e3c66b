"""Whatever ends a command is one line and exit code 2; its traceback is in the log file of the run, and in --debug."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orderppl.cli import env
from orderppl.cli import main as command
from orderppl.cli.main import main
from orderppl.errors import UserError


class UnreadableError(Exception):
    """Cannot even be shown."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class Panic(BaseException):
    """As extensions written in Rust raise it."""


ERRORS = {
    "bug": KeyError("x\ny"),
    "unreadable": UnreadableError(),
    "panic": Panic("index out of range"),
    "exit": SystemExit("own words"),
    "recursion": RecursionError("maximum recursion depth exceeded"),
    "known": UserError("field", "is wrong", "correct it"),
    "assertion": AssertionError(),
    "half a character": ValueError("\ud800"),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("debug", [False, True])
def test_any_error_is_one_line(
    name: str, debug: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Config:
        out = tmp_path

    def fail(config: Any) -> None:
        raise ERRORS[name]

    monkeypatch.setattr(command, "_parse", lambda *_: Config())
    monkeypatch.setattr(env, "run", fail)
    assert main(["env", *["--debug"] * debug]) == 2
    said = capfd.readouterr().err
    assert ("Traceback" in said) == debug
    if not debug:
        (line,) = said.splitlines()
        assert line.startswith("error: ")
    assert "Traceback" in (tmp_path / "error.log").read_text(encoding="utf-8")


FAILING = '''
import os
from orderppl.data import Chains

class Data(Chains):
    """Fails on one process only."""

    def splits(self, *arguments):
        if os.environ["RANK"] == "1":
            raise RuntimeError("only here")
        return super().splits(*arguments)
'''


@pytest.mark.parametrize("option", ["--data=failing.Data", "--data=Chains,--num_steps=none"])
def test_of_several_processes_one_speaks_once(option: str, tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = ["fit-order", "--config", "chain", *option.split(","), "--fit.updates=2", "--fit.progress=false"]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), str(tmp_path)])
    found = subprocess.run(
        [*launcher, "-m", "orderppl.cli.main", *options, "--out", str(tmp_path / "run")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert found.returncode != 0
    lines = [line for line in found.stderr.splitlines() if "error: " in line and "torch" not in line]
    assert len(lines) == 1, found.stderr
    assert ("process 1: error: RuntimeError: only here" in lines[0]) == ("failing" in option)
