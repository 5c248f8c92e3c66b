"""The frontier command: exact merges, resumption after a kill, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orderppl.experiments.build import (
    DENOISER_FILE,
    ArithmeticTask,
    LearnedPolicyConfig,
    OrderConfig,
    PolicyGuideConfig,
    SavedDenoiserConfig,
    StepPriceConfig,
    TransformerConfig,
    build_denoiser,
    build_problem,
    build_task,
    save_tokenizer,
)
from orderppl.experiments.build.networks import PolicyNetworkConfig
from orderppl.experiments.config import dump_config, load_config
from orderppl.experiments.fit_order import save_order
from orderppl.experiments.frontier_report import pass_at_k
from orderppl.experiments.results import read_results
from orderppl.experiments.train_denoiser import Config as TrainDenoiserConfig
from orderppl.inference.checkpoints import save_weights, write_text

import command_line

TASK = ArithmeticTask(variant="dual", num_operations=2, train=60, validation=20, test=30)
GRID = """
heuristics:
  - {policy: [random, margin], budgets: [2, 4], sizes: [uniform]}
  - {policy: threshold, tau: [0.01, 0.1, 0.3]}
  - {policy: greedy_oracle, budgets: [2]}
targets: [1.5, 2.0]
random_seeds: 2
batch_size: 15
resamples: 100
dials: {decisions: [mode, sample], beta: [0.5, 2.0]}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A denoiser that knows nothing, two orders "learned" for it with different seeds, and a grid."""
    root = tmp_path_factory.mktemp("frontier")
    torch.manual_seed(1)
    trained = TrainDenoiserConfig(task=TASK, denoiser=TransformerConfig(width=16, layers=1, heads=2))
    task = build_task(TASK, trained.seed)
    denoiser = build_denoiser(trained.denoiser, task, TASK)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.mul_(3)  # confident about nonsense: heuristics then differ
    (root / "denoiser").mkdir()
    save_weights(denoiser, root / "denoiser" / DENOISER_FILE)
    assert task.tokenizer is not None
    save_tokenizer(task.tokenizer, root / "denoiser")
    write_text(root / "denoiser" / "config.yaml", dump_config(trained))
    for seed in (0, 1):
        order = OrderConfig(
            num_steps=4,
            task=TASK,
            denoiser=SavedDenoiserConfig(run=str(root / "denoiser")),
            prior=LearnedPolicyConfig(network=PolicyNetworkConfig(width=8, layers=1, heads=2)),
            guide=PolicyGuideConfig(),
        )
        torch.manual_seed(seed)
        problem = build_problem(order, task, denoiser)
        (root / f"order-{seed}").mkdir()
        save_order(order, problem, root / f"order-{seed}")
    write_text(root / "grid.yaml", GRID)
    return root


def command(folder: Path, out: Path, *more: str) -> list[str]:
    runs = ["--run", str(folder / "order-0"), "--run", str(folder / "order-1")]
    words = ["frontier", "--config", str(folder / "grid.yaml"), "--denoiser", str(folder / "denoiser"), *runs]
    return [*words, "--out", str(out), *more]


def call(folder: Path, out: Path, *more: str) -> int:
    return command_line.call(*command(folder, out, *more))


def records(out: Path) -> list[dict[str, Any]]:
    """All records without what a clock has measured."""
    clock = ("seconds_per_row", "policy_wall_share")
    return [{k: v for k, v in record.items() if k not in clock} for record in read_results(out)["records"]]


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    assert call(folder, folder / "whole") == 0
    return folder / "whole"


def test_every_arm_has_its_standard_row(whole: Path) -> None:
    found = records(whole)
    arms = {r["arm"]: r for r in found if r["metric"] == "accuracy"}
    assert {"random uniform T=2", "threshold tau=0.1", "order-0 (sample) beta=2 #1"} <= set(arms)
    assert not any("oracle" in arm for arm in arms)  # an oracle cannot decode
    paths = {r["arm"]: r for r in found if r["metric"] == "path_nats"}
    assert paths["greedy_oracle uniform T=2"]["kind"] == "oracle"
    assert paths["greedy_oracle uniform T=2"]["value"] < paths["random uniform T=2"]["value"]
    for record in (*arms.values(), *paths.values()):
        assert record["n"] == 30 and record["low"] <= record["value"] <= record["high"]
        assert (
            1 <= record["nfe_min"] <= record["nfe"] <= record["nfe_batch_max"] <= record["nfe_max"] <= record["steps"]
        )
        assert record["tokens_per_forward"] <= record["tokens_per_forward_canvas"]
        assert record["seeds"] == (2 if "random" in record["arm"] or "sample" in record["arm"] else 1)
    assert arms["margin uniform T=2"]["nfe"] == 2.0
    assert arms["margin uniform T=4"]["nfe_se"] == 0.0
    assert {arms[name]["training_seed"] for name in arms if name.startswith("order-0 (mode)")} == {0, 1}


def test_learned_arms_are_compared_with_the_frontier(whole: Path) -> None:
    found = records(whole)
    gains = [r for r in found if r["metric"] == "advantage" and r["arm"] == "order-0 (sample)"]
    assert all(r["training_seeds"] == 2 and r["low"] <= r["high"] for r in gains)
    own = [r for r in gains if r.get("dial") == "beta=2" and r["measured"] == "path_nats"]
    assert len(own) == 1 and own[0]["seed_low"] <= own[0]["value"] <= own[0]["seed_high"]
    assert own[0]["value"] == pytest.approx(own[0]["frontier"] - own[0]["own"])  # nats: lower is better
    arms = [r for r in found if r["metric"] == "path_nats" and r["arm"].startswith("order-0 (sample) beta=2 #")]
    assert own[0]["own"] == pytest.approx(sum(r["value"] for r in arms) / 2)
    assert own[0]["nfe"] == pytest.approx(sum(r["nfe"] for r in arms) / 2)
    best = {(r["measured"], r["target_nfe"]): r for r in found if r["metric"] == "frontier"}
    two = [r["value"] for r in found if r["metric"] == "accuracy" and r["arm"].endswith("uniform T=2")]
    assert best["accuracy", 2.0]["value"] >= max(two) - 1e-12


def test_two_shards_are_one_run(folder: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "shards"
    assert call(folder, out, "--shard", "1/2") == 0
    assert "left to the other shards" in capsys.readouterr().out
    assert [r["metric"] for r in records(out)] == ["missing"]
    assert call(folder, out, "--shard", "2/2") == 0
    assert records(out) == records(whole)
    assert (out / "tables.txt").is_file() and (out / "frontier.png").is_file()
    assert call(folder, out) == 0  # the command without --shard finds everything done
    assert records(out) == records(whole)
    assert not (out / "rows-1-of-1.jsonl").exists()


@pytest.mark.slow
def test_two_processes_of_a_launcher_are_one_run(folder: Path, whole: Path) -> None:
    out = folder / "launched"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "--"]
    words = [*launcher, "orderppl.experiments.cli", *command(folder, out)]
    subprocess.run(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    assert records(out) == records(whole)
    assert {path.name for path in out.glob("*.jsonl")} == {"rows-1-of-2.jsonl", "rows-2-of-2.jsonl"}


def test_a_killed_run_goes_on(folder: Path, whole: Path) -> None:
    out = folder / "killed"
    rows = out / "rows-1-of-1.jsonl"
    words = [sys.executable, "-m", "orderppl.experiments.cli", *command(folder, out)]
    with open(folder / "killed.txt", "wb") as said:
        process = subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=said, stderr=said)
        try:
            deadline = time.monotonic() + 300
            while not rows.exists() or rows.read_bytes().count(b"\n") < 8:
                assert process.poll() is None, (folder / "killed.txt").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            process.kill()
            process.wait()
    done = rows.read_bytes().split(b"\n")[:-1]
    assert not (out / "results.json").exists()
    with open(rows, "ab") as file:
        file.write(b'{"key": "torn')  # what a kill in the middle of a line leaves
    assert call(folder, out) == 0
    assert records(out) == records(whole)
    now = rows.read_bytes().split(b"\n")[:-1]
    assert now[: len(done)] == done  # nothing was lost or done again
    assert len(now) == len((whole / "rows-1-of-1.jsonl").read_bytes().split(b"\n")[:-1])


def test_only_what_changed_in_the_grid_is_computed(folder: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "changed"
    shutil.copytree(whole, out)
    before = (out / "rows-1-of-1.jsonl").read_bytes().count(b"\n")
    assert call(folder, out, "--set", "heuristics=[{policy: threshold, tau: [0.1, 0.2]}]") == 0
    new = [json.loads(line) for line in (out / "rows-1-of-1.jsonl").read_text().splitlines()[before:]]
    assert {entry["arm"] for entry in new} == {"threshold tau=0.2"}
    arms = {r["arm"] for r in records(out) if r["metric"] == "path_nats" and r["kind"] == "heuristic"}
    assert arms == {"threshold tau=0.1", "threshold tau=0.2"}


def test_results_of_another_denoiser_are_refused(
    folder: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "denoiser"
    shutil.copytree(folder / "denoiser", other)
    task = build_task(TASK, 0)
    save_weights(build_denoiser(TransformerConfig(width=16, layers=1, heads=2), task, TASK), other / DENOISER_FILE)
    before = (whole / "rows-1-of-1.jsonl").read_bytes()
    words = ["frontier", "--config", str(folder / "grid.yaml"), "--denoiser", str(other)]
    for more, message in (
        (["--out", str(whole)], "denoiser.weights differs"),
        (["--out", str(tmp_path / "new"), "--run", str(folder / "order-0")], "learned for another denoiser"),
    ):
        assert command_line.call(*words, *more) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
    assert (whole / "rows-1-of-1.jsonl").read_bytes() == before
    assert not (tmp_path / "new").exists()
    call(folder, whole)  # puts back the results that the refused command had removed


def test_rows_that_a_run_has_seen_in_training_are_left_out(folder: Path, tmp_path: Path) -> None:
    """An order whose seed draws the evaluated problems as training problems."""
    order = tmp_path / "leaky"
    shutil.copytree(folder / "order-0", order)
    settings = (order / "order.yaml").read_text()
    # one stream of problems: 60 training, 20 validation and 30 test rows here, 95 training rows there
    leaky = settings.replace("train: 60", "train: 95")
    assert leaky != settings
    (order / "order.yaml").write_text(leaky)
    words = ["frontier", "--denoiser", str(folder / "denoiser"), "--run", str(order), "--out", str(tmp_path / "out")]
    grid = ["--config", str(folder / "grid.yaml"), "--set", "heuristics=[]", "--set", "dials={}"]
    assert command_line.call(*words, *grid) == 0
    found = records(tmp_path / "out")
    assert {record["n"] for record in found} == {15}  # rows 80 to 94 are training rows of that run
    assert "15 rows left out" in (tmp_path / "out" / "tables.txt").read_text()


def test_one_policy_for_a_range_of_prices_is_a_curve(folder: Path, tmp_path: Path) -> None:
    task = build_task(TASK, 0)
    network = PolicyNetworkConfig(width=8, layers=1, heads=2, features=("confidence", "price"))
    order = OrderConfig(
        num_steps=8,
        task=TASK,
        denoiser=SavedDenoiserConfig(run=str(folder / "denoiser")),
        prior=StepPriceConfig(prior=LearnedPolicyConfig(network=network), price=0.1, highest=10.0),
        guide=PolicyGuideConfig(),
    )
    problem = build_problem(order, task)
    with torch.no_grad():  # larger weights: the price then matters without training
        for parameter in problem.model.prior.parameters():
            parameter.mul_(3)
    (tmp_path / "order").mkdir()
    save_order(order, problem, tmp_path / "order")
    words = ["frontier", "--denoiser", str(folder / "denoiser"), "--run", str(tmp_path / "order")]
    words += ["--out", str(tmp_path / "out"), "--config", str(folder / "grid.yaml"), "--set", "metrics=path_nats"]

    def measured(dials: str) -> dict[str, dict[str, Any]]:
        more = ("--set", f"dials={{decisions: sample, {dials}}}", "--set", "random_seeds=1")
        assert command_line.call(*words, *more) == 0
        found = records(tmp_path / "out")
        return {r["arm"]: r for r in found if r["metric"] == "path_nats" and r["kind"] == "learned"}

    arms = measured("price: [0.1, 10]")
    assert list(arms) == ["order (sample) price=0.1", "order (sample) price=10"]
    cheap, dear = arms.values()
    assert cheap["price"] == 0.1 and cheap["policy_parameters"] == dear["policy_parameters"] > 0
    assert cheap["value"] != dear["value"]  # the network reads the price: all else, the noise too, is the same
    arms = measured("turns: [{price: 0.1}, {price: 10}, {price: 10, beta: 100}]")
    assert list(arms) == [
        *(f"order (sample) price={price}" for price in ("0.1", "10")),
        "order (sample) beta=100 price=10",
    ]
    assert [arm["value"] for arm in arms.values()][:2] == [cheap["value"], dear["value"]]
    assert [arm["nfe"] for arm in arms.values()][2] < dear["nfe"]  # a larger beta reveals more


def test_runs_with_dials_of_their_own_can_share_a_curve(folder: Path, tmp_path: Path) -> None:
    """Two curves, seed 0 of two runs and seed 1 of one; each run is asked for its own betas only."""
    runs = [str(folder / f"order-{seed}") for seed in (0, 1)]
    entries = [(0, runs[0], "[0.5, 1]"), (0, runs[1], "[2]"), (1, runs[1], "[1]")]
    orders = [
        f"{{arm: both, training_seed: {seed}, runs: [{run}], decisions: sample, beta: {beta}}}"
        for seed, run, beta in entries
    ]
    words = ["frontier", "--config", str(folder / "grid.yaml"), "--denoiser", str(folder / "denoiser")]
    words += ["--set", f"orders=[{', '.join(orders)}]", "--set", "random_seeds=1", "--out", str(tmp_path / "out")]
    assert command_line.call(*words, "--set", "targets=[4.0]") == 0
    found = records(tmp_path / "out")
    arms = [r["arm"] for r in found if r["metric"] == "accuracy" and r["kind"] == "learned"]
    assert arms == [
        "both (sample) beta=0.5 order-0 #0",
        "both (sample) beta=1 order-0 #0",
        "both (sample) beta=2 order-1 #0",
        "both (sample) beta=1 order-1 #1",
    ]
    gains = [r for r in found if r["metric"] == "advantage" and r.get("dial") is None]
    assert gains and all(r["arm"] == "both (sample)" and r["training_seeds"] == 2 for r in gains)


def test_a_denoiser_is_found_without_the_run_that_it_went_on_from(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "denoiser", tmp_path / "denoiser")
    path = tmp_path / "denoiser" / "config.yaml"
    settings = load_config(TrainDenoiserConfig, path)
    write_text(path, dump_config(replace(settings, denoiser=SavedDenoiserConfig(run="runs/gone"))))
    words = ["frontier", "--config", str(folder / "grid.yaml"), "--denoiser", str(tmp_path / "denoiser")]
    words += ["--set", "random_seeds=1", "--set", "metrics=[path_nats]", "--out", str(tmp_path / "out")]
    assert command_line.call(*words) == 0
    assert records(tmp_path / "out")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--shard", "3/2"], "write 1/4"),
        (["--set", "heuristics=[{policy: margin, tau: [0.5]}]"], "margin has no option 'tau'"),
        (["--set", "heuristics=[{policy: margin, budgets: [2, 2]}]"], "comes twice"),
        (["--set", "heuristics=[{policy: margin, budgets: [2], block_size: [2]}]"], "blocks of 2 in 2 steps"),
        (["--set", "dials.price=[1.0]"], "not learned for a range of prices"),
        (["--set", "dials={price: [1.0], turns: [{price: 2.0}]}"], "given together with beta or price"),
        (["--set", "metrics=[]"], "metrics"),
        (["--set", "orders=[{arm: x, runs: [nowhere]}]"], "holds no order.safetensors"),
    ],
)
def test_bad_input_is_one_line(
    more: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(folder, tmp_path / "bad", *more) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "bad").exists()


def test_sampled_tokens_make_a_second_table(folder: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "sampled"
    shutil.copytree(whole, out)
    settings = ["samples={count: 3, k: [1, 2, 4], arms: ['threshold*'], temperature: 2.0}"]
    assert call(folder, out, "--set", *settings) == 0
    found = {(r["arm"], r["k"]): r for r in records(out) if r["metric"] == "pass_at_k"}
    assert {k for _, k in found} == {1, 2} and {arm for arm, _ in found} == {
        f"threshold tau={t}" for t in (0.01, 0.1, 0.3)
    }
    assert all(r["samples"] == 3 and r["temperature"] == 2.0 for r in found.values())
    assert "pass@2" in (out / "tables.txt").read_text()


def test_pass_at_k_counts_the_draws_with_a_right_one() -> None:
    right = torch.tensor([0.0, 1.0, 2.0, 4.0], dtype=torch.float64)
    # of the 6 pairs of 4 samples 0, 3, 5 and 6 hold a right one
    assert pass_at_k(right, 4, 2).tolist() == pytest.approx([0, 3 / 6, 5 / 6, 1])
    assert pass_at_k(right, 4, 1).tolist() == pytest.approx([0, 1 / 4, 2 / 4, 1])
    assert pass_at_k(right, 4, 4).tolist() == pytest.approx([0, 1, 1, 1])
