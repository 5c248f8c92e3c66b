"""`orderppl diagnose` on fitted runs: files, numbers that can be traced, and one clear line for anything else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from orderppl.diagnostics import load
from orderppl.experiments.diagnose import frontier_points, open_run
from orderppl.experiments.results import read_results

from command_line import call

SMALL = ["task.train=64", "task.validation=16", "task.test=32", "task.length=6", "fit.updates=12", "num_steps=3"]
OPTIONS = ["--draws", "40", "--sequences", "3", "--set", "state_draws=4"]


def settings(*assignments: str) -> list[str]:
    return [word for assignment in (*SMALL, *assignments) for word in ("--set", assignment)]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    assert call("fit-order", "--config", "chain", "--out", str(folder / "plan"), *settings()) == 0
    policy = ["prior.name=learned_policy", "prior.network.width=8", "prior.network.layers=1", "guide=policy"]
    assert call("fit-order", "--out", str(folder / "policy"), *settings(*policy, "elbo.one_step=true")) == 0
    (folder / "policy" / "log.jsonl").unlink()
    assert call("chain", "--out", str(folder / "chain"), *settings("starts=2")) == 0
    return folder


@pytest.mark.parametrize("run", ["plan", "policy"])
def test_a_run_is_diagnosed(fitted: Path, tmp_path: Path, run: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    calibration = ["--set", f"simulations={80 if run == 'plan' else 0}"]
    assert call("diagnose", str(fitted / run), "--out", str(out), *OPTIONS, *calibration) == 0
    summary = json.loads((out / "summary.json").read_text())
    data = load(out / summary["data"])
    groups = {"posterior", "prior", "order_statistics", "states", "correlation", "path", "chain"}
    assert groups <= set(data.groups())
    assert data["posterior"]["reveal_step"].shape == (1, 40, 3, 6)
    figures = {f"{name}.png" for name in ("order", "precedence", "steps_used", "set_sizes", "token_types")}
    assert figures | {"pareto_k.png", "bound.png", "frontier.png"} <= set(summary["figures"])
    assert all((out / name).stat().st_size > 1000 for name in summary["figures"])
    assert not [path for path in out.iterdir() if path.name.startswith(".")]

    numbers = summary["numbers"]
    assert all(set(entry) >= {"value", "unit", "source"} for entry in numbers.values())
    gap = (data["chain"]["log_evidence"] - data["log_likelihood"]["tokens"]).mean()
    assert numbers["gap_nats"]["value"] == pytest.approx(float(gap))
    assert numbers["elbo"]["value"] == pytest.approx(float(data["sample_stats"]["log_weight"].mean()))
    records = {record["metric"]: record for record in read_results(out)["records"]}
    assert records["gap_nats"]["value"] == numbers["gap_nats"]["value"] and records["gap_nats"]["n"] == 3
    if run == "plan":
        assert numbers["training_elbo"]["value"] == pytest.approx(float(data["training"]["elbo"].mean()))
        assert {"elbo_parts.png", "gradient.png", "calibration.png"} <= set(summary["figures"])
        assert data["calibration"]["rank"].shape == (8, 80)
        smallest = min(1.0, 8 * float(data["calibration"]["p_value"].min()))
        assert numbers["calibration_p"]["value"] == pytest.approx(smallest)
    else:
        assert "no such file" in summary["left_out"]["training"]
        assert {"elbo_parts.png", "gradient.png"} <= set(summary["left_out"])
        # the prior is its own guide
        assert numbers["kl"]["value"] == pytest.approx(0, abs=1e-5)
    assert "k-hat is at most" in " ".join(capsys.readouterr().out.split())


def test_frontier_of_a_run_with_records(tmp_path: Path) -> None:
    arms = [
        ("threshold 0.9", 4.5, 1.0),
        ("threshold 0.8", 3.0, 1.2),
        ("random uniform T=2", 2.0, 2.0),
        ("learned", 4, 1),
    ]
    records = [
        {"metric": "path_nats", "arm": arm, "nfe": nfe, "value": value, "low": value - 0.1, "high": value + 0.1}
        for arm, nfe, value in arms
    ]
    (tmp_path / "results.json").write_text(json.dumps({"records": [*records, {"metric": "seconds", "value": 1}]}))
    points = frontier_points(tmp_path)
    assert points is not None
    assert points["arm"].values.tolist() == ["threshold", "threshold", "random uniform", "learned"]
    assert points["forwards"].values.tolist() == [4.5, 3, 2, 4]
    assert points.attrs["metric"] == "path_nats"
    (tmp_path / "results.json").write_text(json.dumps({"records": [{"metric": "gap_nats", "value": 1}]}))
    assert frontier_points(tmp_path) is None


def refused(capsys: pytest.CaptureFixture[str], out: Path, *arguments: str) -> str:
    capsys.readouterr()
    assert call("diagnose", *arguments, "--out", str(out)) == 2
    assert not out.exists()
    text = capsys.readouterr().err
    assert text.startswith("error: ") and len(text.strip().splitlines()) == 1
    return text


def test_bad_runs_are_named_and_nothing_is_written(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert "no_such" in refused(capsys, out, str(tmp_path / "no_such"))
    (tmp_path / "empty").mkdir()
    assert "holds no order.safetensors" in refused(capsys, out, str(tmp_path / "empty"))
    assert "holds 3 orders" in refused(capsys, out, str(fitted))
    file = tmp_path / "file"
    file.write_text("")
    assert "is no folder" in refused(capsys, out, str(file))
    assert "draws" in refused(capsys, out, str(fitted / "plan"), "--draws", "1")
    assert "split" in refused(capsys, out, str(fitted / "plan"), "--split", "other")
    assert "too few to test" in refused(capsys, out, str(fitted / "plan"), *OPTIONS, "--set", "simulations=5")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"guide": {"name": "mean_field", "colour": "red"}}, "colour"),
        ({"guide": {"name": "of_another_version"}}, "of_another_version"),
        ({"num_steps": 2}, "order.safetensors"),
    ],
)
def test_runs_of_another_version_are_refused(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, object], said: str
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    content = yaml.safe_load((fitted / "plan" / "order.yaml").read_text())
    (run / "order.yaml").write_text(yaml.safe_dump(content | change))
    (run / "order.safetensors").write_bytes((fitted / "plan" / "order.safetensors").read_bytes())
    assert said in refused(capsys, tmp_path / "out", str(run))


def test_a_run_is_never_overwritten_by_its_diagnosis(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (fitted / "plan" / "config.yaml").read_text()
    assert call("diagnose", str(fitted / "plan"), "--out", str(fitted / "plan")) == 2
    assert "is the run itself" in capsys.readouterr().err
    assert (fitted / "plan" / "config.yaml").read_text() == before


def test_the_kept_start_of_a_chain_run_is_found_with_its_log(fitted: Path) -> None:
    found = open_run(fitted / "chain")
    assert found.folder == fitted / "chain" / "seed-0"
    log = (found.folder / "log.jsonl").read_text()
    assert log in [path.read_text() for path in found.folder.glob("start-*/log.jsonl")]
    assert frontier_points(fitted / "chain") is None  # its records are gaps
    assert open_run(found.folder).num_steps == 3
