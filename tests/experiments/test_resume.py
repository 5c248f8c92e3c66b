"""A fit that is killed and resumed ends where an uninterrupted one ends."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orderppl.experiments.results import read_results

UPDATES = 60
SETTINGS = [
    "task.train=200",
    "task.validation=50",
    "task.test=50",
    "elbo.num_particles=4",
    "fit.batch_size=16",
    f"fit.updates={UPDATES}",
    "fit.log_every=1",
    "fit.validate_every=20",
    "fit.checkpoint_every=7",
]


@contextmanager
def started(out: Path, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a process of its own, gone at the end; what it said is in `out`.txt."""
    command = [sys.executable, "-m", "orderppl.experiments.cli", "fit-order", "--config", "chain", "--out", str(out)]
    for assignment in SETTINGS:
        command += ["--set", assignment]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(f"{out}.txt", "ab") as said:
        process = subprocess.Popen([*command, *more], env=environment, stdout=said, stderr=said)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def lines(out: Path) -> int:
    log = out / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def trace(out: Path) -> list[dict[str, object]]:
    """Every record of the log but its wall-clock time."""
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def test_a_killed_and_resumed_fit_has_the_same_trace(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    stop_after = random.Random().randint(8, UPDATES - 10)  # not seeded: any update must do
    with started(whole) as uninterrupted:
        with started(broken) as process:
            deadline = time.monotonic() + 120
            while lines(broken) < stop_after and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL, Path(f"{broken}.txt").read_text()[-2000:]
        killed_at = lines(broken)
        assert killed_at < UPDATES
        assert not (broken / "results.json").exists()
        with started(broken, "--resume") as process:
            assert process.wait(timeout=120) == 0, Path(f"{broken}.txt").read_text()[-2000:]
        assert uninterrupted.wait(timeout=120) == 0, Path(f"{whole}.txt").read_text()[-2000:]

    assert trace(broken) == trace(whole), f"killed after {killed_at} log lines"
    assert len([record for record in trace(whole) if "loss" in record]) == UPDATES
    assert (broken / "order.safetensors").read_bytes() == (whole / "order.safetensors").read_bytes()
    assert read_results(broken)["records"] == read_results(whole)["records"]
