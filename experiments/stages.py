"""Stages of a long experiment: each runs once, in a folder of its own, and says what its result depends on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyro

from orderppl.errors import UserError
from orderppl.experiments.config import build_config, dump_config, identity_dict
from orderppl.experiments.identity import first_difference
from orderppl.experiments.results import Record
from orderppl.inference.checkpoints import write_text
from orderppl.inference.processes import Processes

STAGE_FILE = "stage.json"


class Stages:
    """The stages of an experiment in its folder. A finished one is not run again, a killed one goes on.

    Processes of a launcher run a stage together; the first one keeps its file.

    Args:
        out: the folder.
        seed: of the random state that a stage starts from, so that its result is the same whichever stages a call runs.
        name: what the stages belong to, for messages.
        processes: that run the stages.
    """

    def __init__(self, out: Path, seed: int, name: str, processes: Processes | None = None) -> None:
        self.out, self.seed, self.name = out, seed, name
        self.processes = Processes() if processes is None else processes

    def run(
        self,
        stage: str,
        settings: Any,
        identity: Mapping[str, Any],
        work: Callable[[bool], list[Record]],
        seed: int | None = None,
    ) -> list[Record]:
        """Run a stage unless it is finished.

        Its file is written when it starts, with all that its result depends on, and again when it has ended. Settings
        that there were not yet when it was written had their default.

        Args:
            stage: its folder.
            settings: config that is kept beside it.
            identity: plain values that its result depends on.
            work: told whether an interrupted run is there to go on from, it does the stage and returns its records,
                of which those of the first process count.
            seed: of the random state; that of the experiment when left out.

        Raises:
            UserError: the folder holds a stage with another identity.
        """
        depends_on = json.loads(json.dumps(identity))
        state, resume = self.processes.from_first(lambda: self._begin(stage, settings, depends_on))
        if state["finished"]:
            return list(state["records"])
        pyro.set_rng_seed(self.seed if seed is None else seed)
        spent = {"seconds": time.perf_counter, "cpu_seconds": time.process_time}
        begin = {key: clock() for key, clock in spent.items()}
        try:
            state["records"] = work(resume)
            state["finished"] = True
        finally:  # also when interrupted: what was spent counts
            for key, clock in spent.items():
                state[key] = round(state[key] + clock() - begin[key], 3)
            if self.processes.is_first:
                write_text(self.out / stage / STAGE_FILE, json.dumps(state, indent=1) + "\n")
        records: list[Record] = self.processes.from_first(lambda: state["records"])
        return list(records)

    def _begin(self, stage: str, settings: Any, identity: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """What a stage wrote down if it is finished; else what it writes down now, and whether it was begun before."""
        folder = self.out / stage
        before = read_stage(folder)
        if before is not None:
            changed = first_difference(_as_now(before["identity"], identity, settings), identity)
            if changed is not None:
                problem = f"{changed} differs from that of {folder}"
                raise UserError(f"{self.name}.{stage}", problem, "delete that folder or change --out")
            if before["finished"]:
                return before, True
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.yaml", dump_config(settings))
        state: dict[str, Any] = {"finished": False}
        state |= {key: 0.0 if before is None else before.get(key, 0.0) for key in ("seconds", "cpu_seconds")}
        state |= {"records": [], "identity": identity}
        write_text(folder / STAGE_FILE, json.dumps(state, indent=1) + "\n")
        return state, before is not None

    def finished(self, stage: str, remedy: str) -> Path:
        """Folder of a finished stage.

        Raises:
            UserError: it is not finished; `remedy` says how to finish it.
        """
        if not self.is_finished(stage):
            raise UserError("--stage", f"{self.out / stage} is not finished", remedy)
        return self.out / stage

    def is_finished(self, stage: str) -> bool:
        """Whether a stage has been run to its end."""
        return self._result(stage) is not None

    def records(self, stage: str, labels: Record) -> list[Record]:
        """What a finished stage found, with the `seconds` and `cpu_seconds` it took; else nothing.

        Args:
            stage: its folder.
            labels: added to every record.
        """
        found = self._result(stage)
        if found is None:
            return []
        spent = [(key, found[key]) for key in ("seconds", "cpu_seconds") if key in found]
        times = [{"metric": key, "value": value, "stage": stage, **labels} for key, value in spent]
        return [*times, *({**labels, **record} for record in found["records"])]

    def _result(self, stage: str) -> dict[str, Any] | None:
        """What a stage wrote down, if it has been run to its end."""
        found = read_stage(self.out / stage)
        return found if found is not None and found["finished"] else None


def _as_now(before: Mapping[str, Any], now: Mapping[str, Any], settings: Any) -> dict[str, Any]:
    """The identity of an earlier run, its settings filled up with the defaults of those that were added since."""
    plain = json.loads(json.dumps(identity_dict(settings)))
    own = [key for key in now if key in plain and plain[key] == now[key]]
    try:
        filled = identity_dict(build_config(type(settings), {key: before[key] for key in own if key in before}))
    except UserError:  # settings that this version refuses
        return dict(before)
    return {**before, **{key: json.loads(json.dumps(filled[key])) for key in own}}


def read_stage(folder: Path) -> dict[str, Any] | None:
    """What a stage wrote down, or None where there is none.

    Raises:
        UserError: the file is not that of a stage.
    """
    path = folder / STAGE_FILE
    if not path.is_file():
        return None
    try:
        stage = json.loads(path.read_text(encoding="utf-8"))
        assert {"finished", "seconds", "records", "identity"} <= set(stage)
    except (ValueError, AssertionError, TypeError) as error:
        raise UserError(str(path), "is not the file of a stage", f"delete {folder} or change --out") from error
    return dict(stage)
