"""What the page on GPUs tells of a large denoiser: its config, its launch, its estimate, at small sizes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from orderppl import Batch, load_run
from orderppl.cli.main import main
from orderppl.inference.cost import find_costs
from orderppl.inference.fitting import FitSettings

import scale
from tiny_models import write_model

PAGE = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text("utf-8")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The config of the page in a folder, with a tiny model, few rows and few updates."""
    torch.manual_seed(0)
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    config: dict[str, Any] = yaml.safe_load(text)
    config |= {"num_steps": 4, "dtype": "float64"}
    config["denoiser"]["init_args"]["name_or_path"] = str(write_model(tmp_path / "llada", "llada"))
    config["denoiser"]["init_args"]["dtype"] = "float64"
    config["data"]["init_args"] |= {"canvas": 6, "validation_share": 0.0}
    config["objective"]["init_args"]["scored_steps"] = 2
    config["policy"]["init_args"]["network"]["init_args"] |= {"width": 8, "layers": 1, "heads": 2}
    config["fit"] |= {"updates": 3, "batch_size": 4, "bfloat16": False, "lr": 0.05, "progress": False}
    rows = (f'{{"question": "{a} + {b}", "answer": "#### {a + b}"}}\n' for a in range(6) for b in range(4))
    (tmp_path / "train.jsonl").write_text("".join(rows))
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def launch(folder: Path, processes: int, *words: str) -> None:
    """The launch of the page, on the CPU."""
    (line,) = re.findall(r"^torchrun .*--config large.yaml.*$", PAGE, flags=re.MULTILINE)
    command = line.replace("--nproc_per_node 8", f"--standalone --nproc_per_node {processes}")
    command = command.replace("--device cuda", "").replace("large.yaml", "my.yaml").split()
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *command[1:], *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_two_processes_learn_what_one_does(small: Path) -> None:
    """Each has half of every batch, and scores two of four steps of every order."""
    for processes in (1, 2):
        launch(small, processes, "--out", f"run-{processes}")
    one, two = (load_run(small / f"run-{processes}", trust=True) for processes in (1, 2))
    for (name, mine), theirs in zip(one.policy.state_dict().items(), two.policy.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9, msg=name)
    assert float(one.policy.network.head.bias.detach()) != -2.0  # it has learned


def test_an_estimate_for_several_processes(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two processes each has less memory and half of the hours; all steps take more of both than two of four."""
    monkeypatch.chdir(small)
    found = {}
    for name, words in (
        ("one", ()),
        ("two", ("--processes", "2", "--fit.accumulate", "1")),
        ("all", ("--objective.scored_steps", "4")),
    ):
        assert main(["fit-order", "--config", "my.yaml", "--estimate", "0.001", *words]) in (0, None)
        text = capsys.readouterr().out
        flops = re.search(r"TFLOP of an update[\s│]+([\d.e+-]+)", text)
        hours = re.search(r"hours of (\d) at 0.001 TFLOP/s each[\s│]+([\d.e+-]+)", text)
        assert flops is not None and hours is not None, text
        found[name] = float(flops[1]), float(hours[2])
        assert hours[1] == ("2" if name == "two" else "1")
    assert not (small / "runs").exists()
    assert found["two"] == pytest.approx((found["one"][0], found["one"][1] / 2), rel=0.02)
    assert found["all"][0] > 1.2 * found["one"][0]


@pytest.mark.slow
def test_the_table_of_the_page_is_that_of_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    scale.main()
    assert f"\n{capsys.readouterr().out.strip()}\n\n" in PAGE, "python experiments/scale.py"


def test_the_shape_is_that_of_eight_billion_weights_and_its_cost_what_they_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two operations for every weight and token that is read, on one layer in place of 32."""
    denoiser = scale.make_loss(2, 1, 1).model.denoiser
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == pytest.approx(8.02e9, rel=1e-3)
    monkeypatch.setattr(scale, "LLADA", scale.LLADA | {"n_layer": 1})
    rows, settings = Batch(torch.zeros(2, 256, dtype=torch.long)), FitSettings(updates=1, batch_size=2)
    for scored, states in ((2, 1 + 2), (1, 2)):  # the first state is the same for both orders, where all are scored
        loss = scale.make_loss(2, 2, scored)
        names = {name: weight.numel() for name, weight in loss.model.denoiser.named_parameters()}
        read = sum(names.values()) - names["transformer.wte.weight"]  # what is looked up is not multiplied
        found = find_costs(loss, rows, settings, 1.0)
        assert found["flops"] == pytest.approx(2 * read * states * 2 * 256, rel=0.05)
        assert found["weights"] == pytest.approx(2 * sum(names.values()) + 4 * found["trained"], rel=1e-3)
