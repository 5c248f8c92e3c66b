from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from orderppl.errors import UserError
from orderppl.experiments import cli
from orderppl.experiments.config import RunConfig, setting
from orderppl.experiments.results import read_results

from command_line import call


@dataclass(frozen=True)
class Config(RunConfig):
    num_steps: int = setting(4, "step budget", at_least=1, option="--steps")
    train: str | None = setting(None, "a file", file=True, option="--train")
    budgets: tuple[int, ...] = setting((1,), "budgets", option="--budget")
    fault: str = setting("", "what goes wrong")


def run(config: Config, out: Path, resume: bool = False) -> Iterator[dict[str, object]]:
    if config.fault == "data":
        raise UserError("train", "no rows", "give a file with rows")
    (out / "log.jsonl").write_text("{}\n")
    if config.fault == "loss":
        raise UserError("loss", "is NaN at update 3", "lower optimizer.lr")
    yield {"metric": "draw", "value": torch.rand(()), "resumed": resume, "steps": config.num_steps}


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A small experiment, plugged in as every other."""
    module = types.ModuleType("orderppl.experiments.demo_run", "Draws a number.\n\nReally.")
    module.__dict__.update(Config=Config, run=run)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(cli.EXPERIMENTS, "demo-run", "Draws a number.")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_help_lists_every_experiment_without_loading_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    listed = capsys.readouterr().out
    assert all(name.split()[0] in listed for name in cli.EXPERIMENTS)
    code = "import sys; from orderppl.experiments.cli import build_app; build_app(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "orderppl.experiments.cli" in loaded
    assert not {"torch", "pyro", "datasets", "matplotlib"} & set(loaded)


@pytest.mark.parametrize("name", list(cli.EXPERIMENTS))
def test_every_experiment_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*name.split(), "--help") == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--out", "--seed", "--config", "--set", "--debug"))


def test_a_run_writes_its_config_and_results(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("demo-run", "--out", "a", "--steps", "3", "--set", "budgets=[2,3]", "--seed", "7") == 0
    document = read_results("a")
    assert document["experiment"] == "demo-run"
    assert document["records"][0]["steps"] == 3
    saved = yaml.safe_load(Path("a/config.yaml").read_text())
    assert saved == document["config"]
    assert (saved["seed"], saved["num_steps"], saved["budgets"]) == (7, 3, [2, 3])
    assert call("demo-run", "--out", "b", "--config", "a/config.yaml") == 0
    assert read_results("b")["records"] == document["records"]  # the same seed, the same draw
    written = capsys.readouterr().out
    assert all(f"b/{name}" in written for name in ("config.yaml", "log.jsonl", "results.json"))


def test_options_come_from_the_config(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("demo-run", "--help") == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--steps", "--train", "--budget", "--device", "--dtype", "--resume"))
    assert "Draws a number." in text
    assert call("demo-run", "--out", "a", "--budget", "5", "--budget", "6") == 0
    assert read_results("a")["config"]["budgets"] == [5, 6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "error: num_steps: must be at least 1, got 0; "),
        (["--train", "missing.csv"], "error: train: no such file: missing.csv; "),
        (["--config", "missing.yaml"], "error: --config: no file 'missing.yaml'; "),
        (["--set", "num_stesp=3"], "error: num_stesp: no such setting; did you mean num_steps?"),
        (["--device", "abacus"], "error: device: cannot use 'abacus'; "),
        (["--resume"], "error: --resume: new holds no run; "),
        (["--set", "fault=data"], "error: train: no rows; give a file with rows"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    demo: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert call("demo-run", "--out", "new", *arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(message)
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert list(demo.iterdir()) == []


def test_debug_shows_where_bad_input_was_found(demo: Path) -> None:
    with pytest.raises(UserError, match="no rows"):
        cli.main(["demo-run", "--out", "new", "--set", "fault=data", "--debug"])


def test_a_failed_run_keeps_its_log_but_no_results(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("demo-run", "--out", "a") == 0
    assert call("demo-run", "--out", "a", "--set", "fault=loss") == 2
    assert sorted(path.name for path in Path("a").iterdir()) == ["config.yaml", "log.jsonl"]
    assert "error: loss: is NaN at update 3" in capsys.readouterr().err


def test_resume_wants_the_same_settings(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("demo-run", "--out", "a") == 0
    assert call("demo-run", "--out", "a", "--resume") == 0
    assert read_results("a")["records"][0]["resumed"] is True
    assert call("demo-run", "--out", "a", "--resume", "--steps", "5") == 2
    assert "error: num_steps: is 5, the interrupted run has 4; " in capsys.readouterr().err


def test_an_unknown_experiment_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("chian") == 2
    assert "chian" in capsys.readouterr().err
