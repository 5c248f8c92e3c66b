"""The experiments of the main job, end to end at a tiny size: chain, tree, antibodies and quickstart by the command."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from orderppl.errors import UserError
from orderppl.experiments import evaluate, posterior
from orderppl.experiments.build import ArithmeticTask

from command_line import call

FEW = ["--set", "fit.updates=3", "--set", "fit.kl_weight.updates=2", "--set", "elbo.num_particles=2"]


def installed(package: str, wanted: str) -> bool:
    try:
        return version(package) == wanted
    except PackageNotFoundError:
        return False


needs_weights = pytest.mark.skipif(not installed("sapiens", "1.0.5"), reason="the antibody weights are not installed")


def read(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def fasta(path: Path, rows: int) -> Path:
    residues = "ACDEFGHIKLMNPQRSTVWY"
    turns = [residues[i % 20 :] + residues[: i % 20] for i in range(rows)]
    domains = [5 * turn + turn[: 3 + i % 17] for i, turn in enumerate(turns)]
    path.write_text("".join(f">d{i}\n{domain}\n" for i, domain in enumerate(domains)))
    return path


def test_chain_measures_every_arm_for_every_seed(tmp_path: Path):
    few = [*FEW, "--set", "starts=2", "--set", "task.test=200"]
    assert call("chain", "--out", str(tmp_path / "c"), "--seeds", "2", *few) == 0
    result = read(tmp_path / "c")
    gaps = {(r["arm"], r["seed"]): r["value"] for r in result["records"] if r["metric"] == "gap_nats"}
    assert {seed for arm, seed in gaps if arm == "learned"} == {0, 1}
    assert gaps["best fixed order", 0] < 0.15 < 1 < gaps["random", 0] < gaps["left to right", 0]
    expected = [r for r in result["records"] if r["metric"] == "expected_gap_nats"]
    best = {r["arm"]: r["value"] for r in expected if r["arm"] != "learned"}
    assert best == {arm: pytest.approx(0.0386, abs=1e-4) for arm in ("best fixed order", "best policy")}
    learned = {r["seed"]: r["value"] for r in expected if r["arm"] == "learned"}
    assert learned.keys() == {0, 1}
    assert all(
        best["best fixed order"] - 1e-9 < value < gaps["learned", seed] + 0.15 for seed, value in learned.items()
    )
    assert abs(gaps["best policy", 0] - 0.0386) < 0.1
    assert result["experiment"] == "chain" and result["environment"]["device"]
    fitted = evaluate.Config(run=str(tmp_path / "c" / "seed-1"))  # kept with the data of the first seed
    again = {r["arm"]: r["value"] for r in evaluate.run(fitted, tmp_path) if r["metric"] == "gap_nats"}
    assert again["learned"] == pytest.approx(gaps["learned", 1], abs=1e-6)


def test_tree_measures_every_arm(tmp_path: Path):
    few = [*FEW, "--set", "starts=1", "--set", "task.depth=3", "--set", "task.test=200"]
    assert call("tree", "--out", str(tmp_path / "t"), "--steps", "2", *few) == 0
    records = read(tmp_path / "t")["records"]
    assert {r["task"] for r in records} == {"tree"}
    gaps = {r["arm"]: r["value"] for r in records if r["metric"] == "gap_nats"}
    assert {"learned", "learned, sampled", "top prob", "entropy"} < gaps.keys()
    assert gaps["best fixed order"] < 0.8 < gaps["random"] < gaps["left to right"]
    fitted = evaluate.Config(run=str(tmp_path / "t" / "seed-0"))
    again = {r["arm"]: r["value"] for r in evaluate.run(fitted, tmp_path) if r["metric"] == "gap_nats"}
    assert again["learned"] == pytest.approx(gaps["learned"], abs=1e-6)


def test_posterior_compares_bounds_with_the_best_orders(tmp_path: Path):
    few = [*FEW, "--set", "draws=8", "--set", "task.test=200", "--set", "fit.validate_every=2"]
    assert call("posterior", "--out", str(tmp_path / "p"), "--seeds", "2", *few) == 0
    records = read(tmp_path / "p")["records"]
    gaps = {(r["arm"], r["seed"]): r["value"] for r in records if r["metric"] == "gap_nats"}
    assert gaps["best policy", 0] == gaps["best fixed order", 0]  # with two steps
    for seed in (0, 1):
        tightened = gaps["posterior guide, importance-weighted", seed]
        assert 0 < tightened < gaps["posterior guide", seed] < 10  # nothing was learned in 3 updates
    assert (tmp_path / "p" / "posterior.png").stat().st_size > 5000
    fitted = evaluate.Config(run=str(tmp_path / "p" / "seed-1"), decision="sample")
    again = {r["arm"]: r["value"] for r in evaluate.run(fitted, tmp_path) if r["metric"] == "gap_nats"}
    assert again["learned"] == pytest.approx(gaps["its prior, sampled", 1], abs=0.6)  # other draws of the orders
    with pytest.raises(UserError, match="task.name: is 'arithmetic'"):
        posterior.Config(task=ArithmeticTask())


@needs_weights
def test_antibodies_learns_from_a_file_and_draws_the_order(tmp_path: Path):
    train, out = fasta(tmp_path / "train.fasta", 30), tmp_path / "a"
    assert call("antibodies", "--train", str(train), "--steps", "2", "--out", str(out), *FEW) == 0
    values = {r["arm"]: r["value"] for r in read(out)["records"] if r["metric"] == "path_nats"}
    assert {"learned", "random uniform", "entropy cosine", "greedy_oracle uniform", "threshold 0.9"} <= set(values)
    assert (out / "order.png").stat().st_size > 5000
    assert call("antibodies", "--train", str(train), "--steps", "2", "--out", str(out), *FEW) == 0  # again, in place


@needs_weights
def test_quickstart_draws_its_own_sequences(tmp_path: Path):
    few = [f"{part}.{option}" for part in ("chain", "antibodies") for option in FEW[1::2]]
    options = [word for option in few for word in ("--set", option)]
    options += ["--set", "chain.starts=1", "--set", "antibodies.draw=20"]
    assert call("quickstart", "--out", str(tmp_path / "q"), *options) == 0
    tasks = {r["task"] for r in read(tmp_path / "q")["records"]}
    assert tasks == {"chain", "antibodies"}
    assert (tmp_path / "q" / "antibodies" / "drawn.fasta").read_text().count(">") == 20


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["chain", "--steps", "0"], "num_steps"),
        (["chain", "--set", "task.name=antibodies"], "task"),
        (["tree", "--set", "denoiser=markov_chain"], "denoiser.name"),
        (["chain", "--set", "guide={name: renormalised_score, temperature: 0}"], "temperature"),
        (["antibodies", "--train", "no-such-file.fasta"], "train"),
        (["antibodies", "--set", "draw=3"], "draw"),
        (["fit-order", "--set", "prior=easy_first"], "guide"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], field: str
):
    out = tmp_path / "x"
    assert call(*arguments, "--out", str(out)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and field in error and "\n" not in error
    assert not out.exists()


@needs_weights
def test_wrong_column_and_empty_split_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    table = tmp_path / "rows.csv"
    table.write_text("name,heavy\na,EVQLVESGGG\n")
    assert call("antibodies", "--train", str(table), "--set", "task.column=light", "--out", str(tmp_path / "y")) == 2
    assert "light" in capsys.readouterr().err
    table.write_text("name,heavy\n")
    assert call("antibodies", "--train", str(table), "--out", str(tmp_path / "y")) == 2
    assert str(table) in capsys.readouterr().err
    assert not (tmp_path / "y").exists()
