from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from orderppl.errors import UserError
from orderppl.experiments.config import config_dict, setting
from orderppl.experiments.results import Record
from orderppl.experiments.stages import STAGE_FILE, Stages


@dataclass(frozen=True)
class Settings:
    size: int = setting(3, "a setting")
    later: str = setting("none", "one that a later version has gained")


def run(out: Path, settings: Settings, done: list[bool], weights: str = "abc") -> list[Record]:
    def work(resume: bool) -> list[Record]:
        done.append(resume)
        return [{"metric": "drawn", "value": float(torch.rand(()))}]

    return Stages(out, 5, "study").run("part", settings, config_dict(settings) | {"weights": weights}, work)


def test_a_finished_stage_is_not_run_again(tmp_path: Path) -> None:
    done: list[bool] = []
    first = run(tmp_path, Settings(), done)
    torch.rand(7)
    assert run(tmp_path, Settings(), done) == first
    assert done == [False]
    again = run(tmp_path / "other", Settings(), done)
    assert again == first  # it starts from a random state of its own
    with pytest.raises(UserError, match="study.part: size differs"):
        run(tmp_path, Settings(size=4), done)
    with pytest.raises(UserError, match="study.part: weights differs"):
        run(tmp_path, Settings(), done, "xyz")
    records = Stages(tmp_path, 5, "study").records("part", {"task": "x"})
    assert {r["metric"] for r in records} == {"seconds", "cpu_seconds", "drawn"}
    assert all(r["task"] == "x" for r in records)


def test_a_killed_stage_goes_on(tmp_path: Path) -> None:
    done: list[bool] = []
    run(tmp_path, Settings(), done)
    path = tmp_path / "part" / STAGE_FILE
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"finished": False, "records": [], "seconds": 100.0}))
    assert Stages(tmp_path, 5, "study").records("part", {}) == []
    with pytest.raises(UserError, match="is not finished"):
        Stages(tmp_path, 5, "study").finished("part", "run it")
    run(tmp_path, Settings(), done)
    assert done == [False, True]
    assert json.loads(path.read_text())["seconds"] >= 100.0  # what was spent before counts


def test_a_setting_gained_since_had_its_default(tmp_path: Path) -> None:
    done: list[bool] = []
    run(tmp_path, Settings(), done)
    path = tmp_path / "part" / STAGE_FILE
    state = json.loads(path.read_text())
    del state["identity"]["later"]
    path.write_text(json.dumps(state))
    run(tmp_path, Settings(), done)
    assert done == [False]
    with pytest.raises(UserError, match="later differs"):
        run(tmp_path, Settings(later="new"), done)
