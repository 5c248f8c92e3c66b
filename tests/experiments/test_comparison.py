"""Commands that learn their orders and compare them: sudoku, ablate."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orderppl.experiments import ablate, sudoku
from orderppl.experiments.build import SudokuTask
from orderppl.experiments.config import load_config
from orderppl.experiments.orders import Orders
from orderppl.experiments.results import read_results
from orderppl.experiments.stages import Stages
from orderppl.inference import OrderLoss

import command_line

NETWORK = "network: {width: 8, layers: 1, heads: 2}"
FIT = "fit: {updates: 2, batch_size: 4, validate_every: null}, elbo: {num_particles: 2}"
ARM = f"prior: {{name: learned_policy, {NETWORK}}}, guide: policy, {FIT}"
SMALL = {
    "rows": "12",
    "task": "{name: sudoku, train: 40, validation: 10, test: 20, min_clues: 2, max_clues: 6}",
    "heuristics": "[{policy: random, budgets: [1, 2, 3]}, {policy: threshold, tau: [0.1, 0.9]}]",
    "learn": f"[{{arm: T2, num_steps: 2, {ARM}}}, {{arm: T3, num_steps: 3, {ARM}}}]",
    "samples.count": "1",
    "random_seeds": "1",
    "resamples": "100",
}
CURVE = SMALL | {"curve": "learned"}


def call(command: str, denoiser: Path, out: Path, settings: dict[str, str], *more: str) -> int:
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return command_line.call(command, "--denoiser", str(denoiser), "--out", str(out), *sets, *more)


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sudoku") / "denoiser"
    settings = [
        "task={name: sudoku, train: 40, validation: 10, test: 20}",
        "denoiser={name: transformer, width: 16, layers: 1, heads: 2}",
    ]
    settings += ["fit={updates: 3, batch_size: 8, warmup: 1}"]
    sets = [part for value in settings for part in ("--set", value)]
    assert command_line.call("train-denoiser", "--config", "sudoku_denoiser", "--out", str(out), *sets) == 0
    return out


@pytest.fixture(scope="module")
def finished(denoiser: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "sudoku"
    assert call("sudoku", denoiser, out, CURVE, "--seeds", "2") == 0
    return out


def test_sudoku_compares_what_it_has_learned(finished: Path) -> None:
    records = read_results(finished)["records"]
    accuracy = {r["arm"]: r for r in records if r["metric"] == "accuracy"}
    learned = {f"learned (mode) {arm} #{seed}" for arm in ("T2", "T3") for seed in (0, 1)}
    assert {arm for arm, r in accuracy.items() if r["kind"] == "learned"} == learned
    assert accuracy["random uniform T=1"]["nfe"] == 1
    for arm in learned:
        assert accuracy[arm]["n"] == 12
        assert accuracy[arm]["nfe"] <= accuracy[arm]["steps"]
    advantages = [r for r in records if r["metric"] == "advantage" and r.get("dial") == "T2"]
    assert {r["measured"] for r in advantages} == {"accuracy", "path_nats"}
    assert all(r["training_seeds"] == 2 for r in advantages)
    spent = {r["stage"] for r in records if r["metric"] == "cpu_seconds"}
    assert spent == {f"seed-{seed}/{arm}" for seed in (0, 1) for arm in ("T2", "T3")}


def test_what_is_learned_and_measured_is_kept(finished: Path, denoiser: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    shutil.copytree(finished, out)
    weights = {path: path.stat().st_mtime_ns for path in out.rglob("order.safetensors")}
    assert len(weights) == 4
    lost = out / "orders" / "seed-1" / "T3"
    before = (lost / "order.safetensors").read_bytes()
    shutil.rmtree(lost)
    lines = (out / "rows-1-of-1.jsonl").read_text().splitlines()
    (out / "rows-1-of-1.jsonl").write_text("\n".join(lines[:-3]) + "\n")
    assert call("sudoku", denoiser, out, CURVE, "--seeds", "2") == 0
    kept = {path: path.stat().st_mtime_ns for path in weights if lost not in path.parents}
    assert kept == {path: weights[path] for path in kept}
    assert (lost / "order.safetensors").read_bytes() == before  # the same fit again
    keys = ("metric", "arm", "value", "low", "high", "nfe", "dial", "target_nfe")
    old, new = (
        [[r.get(key) for key in keys] for r in read_results(run)["records"] if "seconds" not in r["metric"]]
        for run in (finished, out)
    )
    assert new == old
    assert call("sudoku", denoiser, out, CURVE | {"learn": SMALL["learn"].replace("updates: 2", "updates: 3")}) == 2


def test_training_seeds_differ_and_share_the_data(finished: Path) -> None:
    stages = [json.loads((finished / "orders" / f"seed-{seed}" / "T2" / "stage.json").read_text()) for seed in (0, 1)]
    assert [stage["identity"]["seed"] for stage in stages] == [0, 0]
    weights = [(finished / "orders" / f"seed-{seed}" / "T2" / "order.safetensors").read_bytes() for seed in (0, 1)]
    assert weights[0] != weights[1]


def test_ablate_compares_arms_with_the_reference(denoiser: Path, tmp_path: Path) -> None:
    scores = "{name: renormalised_score, network: {name: transformer, width: 8, layers: 1, heads: 2}}"
    paper = f"num_steps: 2, prior: {{name: learned_policy, {NETWORK}}}, guide: {scores}, {FIT}"
    settings = SMALL | {
        "task": "{name: sudoku, train: 40, validation: 10, test: 20}",
        "heuristics": "[{policy: top_prob, budgets: [2]}, {policy: top_prob, budgets: [2], eos_aware: true}]",
        "learn": f"[{{arm: paper, decisions: [mode, sample], {paper}}}, {{arm: tied, {ARM}, num_steps: 2}}]",
        "reference": "paper",
    }
    assert call("ablate", denoiser, tmp_path / "run", settings, "--seeds", "1") == 0
    records = read_results(tmp_path / "run")["records"]
    value = {(r["metric"], r["arm"]): r["value"] for r in records if "arm" in r and r["metric"] != "advantage"}
    for metric in ("accuracy", "path_nats"):
        gap = value[metric, "tied (mode)"] - value[metric, "paper (mode)"]
        assert value[f"{metric}_difference", "tied (mode)"] == pytest.approx(gap, abs=1e-12)
    assert ("accuracy_difference", "paper (sample)") not in value  # the reference of its own decision
    assert {"top_prob uniform T=2", "top_prob uniform eos-aware T=2"} <= {arm for _, arm in value}
    assert (tmp_path / "run" / "ingredients.png").is_file()
    assert call("ablate", denoiser, tmp_path / "other", settings | {"reference": "nothing"}) == 2


def test_every_arm_of_the_ablation_can_be_fitted(denoiser: Path, tmp_path: Path) -> None:
    config = load_config(ablate.Config, "ablate", [f"source={denoiser}"])
    task = SudokuTask(train=8, validation=4, test=4)
    orders = Orders(Stages(tmp_path, 0, "orders"), config, task, denoiser)
    assert config.training_seeds >= 3
    assert {arm.num_steps for arm in config.learn} == {5, 10, 15}
    for arm in config.learn:
        problem = orders.problem(replace(arm, num_steps=3))
        batch = next(problem.task.stream("train", 2))
        assert torch.isfinite(OrderLoss(problem.model, problem.guide, problem.elbo)(**batch)), arm.arm


@pytest.mark.parametrize("preset", list(sudoku.PRESETS.values()))
def test_the_presets_are_read(preset: str, denoiser: Path) -> None:
    config = load_config(sudoku.Config, preset, [f"source={denoiser}"])
    assert [arm.num_steps for arm in config.learn] == [8, 8, 2]  # two ranges of prices, and two steps
    assert config.training_seeds >= 3
