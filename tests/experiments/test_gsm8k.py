from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from orderppl.experiments import gsm8k
from orderppl.experiments.evaluate import load_order
from orderppl.experiments.results import read_results

import command_line
from gsm8k_rows import write_rows

REAL = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"
FIT = "fit: {updates: 2, batch_size: 4}, elbo: {num_particles: 2}"
NETWORK = "network: {width: 8, layers: 1, heads: 2}"
SCORES = "{name: renormalised_score, network: {name: transformer, width: 8, layers: 1, heads: 2}}"
PRICED = f"{{name: step_price, price: 0.5, prior: {{name: residual_policy, {NETWORK}}}}}"
TIED = "{name: mean_field, tied: true}"
ORDERS = f"""[
  {{arm: residual, num_steps: 4, adaptive: true, prior: {PRICED}, {FIT}, decisions: [mode, sample]}},
  {{arm: posterior, num_steps: 2, prior: {{name: learned_policy, {NETWORK}}}, guide: {SCORES}, {FIT}}},
  {{arm: plan, num_steps: 2, prior: learned_steps, guide: {TIED}, {FIT}, decisions: [rank]}}]"""


def small(form: str) -> list[str]:
    """Settings under which everything runs in seconds."""
    values = {
        "denoiser": "{width: 16, layers: 1, heads: 2}",
        "training": "{updates: 4, batch_size: 8, warmup: 1, validate_every: 2, checkpoint_every: 2}",
        "task.augment": "40" if form == "programs" else "0",
        "task.min_count": "1",
        "task.validation": "0.2",
        "orders": ORDERS,
        "budgets": "[2, 4]",
        "thresholds": "[0.01, 0.5, 0.99]",
        "sizes": "[uniform, cosine]",
        "soft_thresholds": "[0.5, 0.9]",
        "random_seeds": "2",
        "rows": "12",
        "batch_size": "5",
    }
    return [part for key, value in values.items() for part in ("--set", f"{form}.{key}={value}")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gsm8k")
    write_rows(folder, "train.jsonl", 0, 45)
    with open(folder / "train.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"question": "How many?", "answer": "None that anybody knows."}) + "\n")
    write_rows(folder, "test.jsonl", 1000, 15)
    return folder


def call(data: Path, out: Path, *more: str) -> int:
    both = [part for form in ("programs", "equations") for part in small(form)]
    return command_line.call("gsm8k", "--preset", "cpu", "--data", str(data), "--out", str(out), *both, *more)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "gsm8k"
    assert call(data, out) == 0
    return out


def test_both_forms_end_in_one_table_of_records(finished: Path) -> None:
    results = read_results(finished)
    records = results["records"]
    assert results["experiment"] == "gsm8k"
    for form in ("programs", "equations"):
        arms = [r for r in records if r["form"] == form and "arm" in r and not r["metric"].endswith("_difference")]
        fixed = {f"{rank} {size} T={T}" for rank in ("random", "left_to_right", "top_prob", "margin", "entropy")
                 for size in ("uniform", "cosine") for T in (2, 4)}  # fmt: skip
        others = {f"threshold {tau}" for tau in (0.01, 0.5, 0.99)} | {f"easy_first {tau} T=4" for tau in (0.5, 0.9)}
        others |= {"left_to_right sequential", "top_prob sequential"}
        learned = {"residual (mode) T=4", "residual (sample) T=4", "posterior (mode) T=2", "plan (rank) T=2"}
        assert {r["arm"] for r in arms if r["metric"] == "path_nats"} == fixed | others | learned
        for record in arms:
            assert record["task"] == "gsm8k"
            assert record["n"] == 12
            assert record["low"] <= record["value"] <= record["high"]
            assert 1 <= record["nfe_min"] <= record["nfe"] <= record["nfe_max"] <= record["steps"]
            assert record["policy"]
            assert record["parameters"]
            assert (record["policy_weights"] > 0) == (record["family"] == "learned")
        assert {r["seed"] for r in arms if r["arm"] == "random uniform T=2"} == {0, 1}
        assert {r["stage"] for r in records if r["form"] == form and r["metric"] == "seconds"} == {
            "denoiser", "residual", "posterior", "plan", "evaluation"
        }  # fmt: skip
        by_arm = {r["arm"]: r for r in arms if r["metric"] == "path_nats" and r["seed"] == 0}
        # one token a step: as many forwards as tokens; a threshold that every token passes: one forward
        assert by_arm["left_to_right sequential"]["tokens_per_forward"] == 1.0
        assert by_arm["threshold 0.01"]["nfe_max"] == 1
    decoded = {r["arm"] for r in records if r["form"] == "equations" and r["metric"] == "accuracy"}
    assert decoded and not any(arm.endswith("T=2") for arm in decoded)  # `decode: longest`
    rejected = [r for r in records if r["metric"] == "rows" and r["outcome"] == "no number after ####"]
    assert [(r["file"], r["value"]) for r in rejected] == [("train.jsonl", 1)] * 2  # reported once per form


def test_learned_arms_are_compared_in_pairs_with_their_baselines(finished: Path) -> None:
    records = read_results(finished)["records"]
    value = {
        (r["metric"], r["arm"]): r["value"]
        for r in records
        if r["form"] == "programs" and "arm" in r and r["seed"] == 0
    }
    pairs = [r for r in records if r["metric"] == "path_nats_difference" and r["form"] == "programs"]
    against = {r["baseline"] for r in pairs if r["arm"] == "plan (rank) T=2"}
    assert {"top_prob cosine T=2", "posterior (mode) T=2"} <= against
    assert not any("T=4" in name for name in against)
    adaptive = {r["baseline"] for r in pairs if r["arm"].startswith("residual")}
    assert adaptive <= {"threshold at equal NFE", "easy_first at equal NFE"}
    assert "threshold at equal NFE" in adaptive  # from 1 step (0.01) to one token a step (0.99)
    for record in pairs:
        if record["arm"] == "plan (rank) T=2" and record["baseline"] == "top_prob uniform T=2":
            expected = value["path_nats", "plan (rank) T=2"] - value["path_nats", "top_prob uniform T=2"]
            assert record["value"] == pytest.approx(expected, abs=1e-9)


def test_a_curve_is_read_between_its_points() -> None:
    curve = [(4.0, torch.tensor([1.0, 1.0])), (2.0, torch.tensor([0.0, 1.0]))]
    matched = gsm8k._at_equal_nfe(curve, 2.5)
    assert matched is not None
    assert matched.tolist() == [0.25, 1.0]
    assert gsm8k._at_equal_nfe(curve, 4.5) is None


def test_finished_stages_are_kept_and_lost_ones_redone(finished: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    shutil.copytree(finished, out)
    before = {path: path.read_bytes() for path in out.rglob("*.safetensors")}
    records = [r for r in read_results(out)["records"] if r["metric"] not in ("seconds", "cpu_seconds")]
    shutil.rmtree(out / "programs" / "plan")
    assert call(data, out) == 0
    assert {path: path.read_bytes() for path in out.rglob("*.safetensors")} == before
    after = [r for r in read_results(out)["records"] if r["metric"] not in ("seconds", "cpu_seconds")]
    assert after == records


def test_a_killed_fit_goes_on_from_its_checkpoint(finished: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    shutil.copytree(finished / "programs" / "denoiser", out / "programs" / "denoiser")
    folder = out / "programs" / "denoiser"
    # the state in which a kill after update 2 leaves the folder
    shutil.rmtree(folder / "checkpoints" / "update_00000004")
    (folder / "denoiser.safetensors").unlink()
    stage = json.loads((folder / "stage.json").read_text())
    (folder / "stage.json").write_text(json.dumps(stage | {"finished": False, "records": []}))
    assert call(data, out, "--form", "programs", "--stage", "denoiser") == 0
    for name in ("denoiser.safetensors", "tokenizer.json"):
        assert (folder / name).read_bytes() == (finished / "programs" / "denoiser" / name).read_bytes()
    logs = [(run / "programs" / "denoiser" / "log.jsonl").read_text() for run in (out, finished)]
    trace = [[json.loads(line) for line in log.splitlines()] for log in logs]
    resumed, whole = ([r["loss"] for r in records if "loss" in r] for records in trace)
    assert resumed == whole
    assert len(whole) == 4


def test_stages_say_what_they_need(
    finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(data, tmp_path / "new", "--form", "programs", "--stage", "order") == 2
    assert "run --stage denoiser first" in capsys.readouterr().err
    out = tmp_path / "changed"
    shutil.copytree(finished, out)
    assert call(data, out, "--set", "programs.training.lr=0.1", "--stage", "denoiser") == 2
    assert "programs.denoiser: fit.lr differs" in capsys.readouterr().err
    (out / "equations" / "denoiser" / "stage.json").write_text("{")
    assert call(data, out, "--form", "equations", "--stage", "denoiser") == 2
    assert "is not the file of a stage" in capsys.readouterr().err
    assert call(tmp_path / "nowhere", tmp_path / "none") == 2
    assert "no local path" in capsys.readouterr().err


def test_the_shipped_run_prints_its_tables_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Settings that were added since have defaults: its stages are finished, and no data are read."""
    shipped = Path(__file__).parents[2] / "docs" / "results" / "gsm8k"
    shutil.copytree(shipped / "run", tmp_path / "runs" / "gsm8k")
    monkeypatch.chdir(tmp_path)
    assert command_line.call("gsm8k", "--preset", "cpu", "--data", "../shared/data/gsm8k", "--out", "runs/gsm8k") == 0
    assert "GSM8K, equations form, test rows" in capsys.readouterr().out
    now, before = (
        [r for r in read_results(folder)["records"] if r["metric"] != "cpu_seconds"]
        for folder in (tmp_path / "runs" / "gsm8k", shipped)
    )
    assert [r["value"] for r in now if "arm" in r] == [r["value"] for r in before if "arm" in r]


def test_an_order_is_a_run_of_fit_order(finished: Path) -> None:
    config, problem = load_order(finished / "programs" / "residual")
    assert config.num_steps == 4
    assert problem.task.name == "gsm8k"


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="the real GSM8K files are not at hand")
def test_the_real_files_run_end_to_end(tmp_path: Path) -> None:
    training = "{updates: 800, batch_size: 32, group: 20, lr: 0.003, warmup: 50, ema_decay: 0.99, validate_every: 400}"
    larger = ("rows=100", "task.augment=4000", "denoiser={width: 64, layers: 2, heads: 4}", f"training={training}")
    more = ["--form", "programs", *(part for value in larger for part in ("--set", f"programs.{value}"))]
    assert call(REAL, tmp_path / "run", *more) == 0
    records = read_results(tmp_path / "run")["records"]
    nats = {r["arm"]: r["value"] for r in records if r["metric"] == "path_nats"}
    # untrained: log 120 = 4.8 nats per token; more steps must help a trained one
    assert nats["left_to_right sequential"] < nats["left_to_right uniform T=2"] < 2.5
    kept = {r["file"]: r["value"] for r in records if r["metric"] == "rows" and r["outcome"] == "kept"}
    assert kept["test"] == 408
