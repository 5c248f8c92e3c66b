"""The experiments on pretrained models of molecules, end to end at a tiny size."""

from __future__ import annotations

import csv
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from orderppl.data.antibody_regions import REGIONS, antibody_regions
from orderppl.errors import UserError
from orderppl.experiments import evaluate
from orderppl.experiments.antibody_judge import AntibodyJudge
from orderppl.experiments.config import load_config
from orderppl.experiments.molecules import by_length, within_budget
from orderppl.experiments.reactions import Config as ReactionsConfig
from orderppl.experiments.reactions import token_kind

from command_line import call

FEW = [
    "--set",
    "denoiser_rows=null",
    "--set",
    "fit.updates=2",
    "--set",
    "elbo.num_particles=2",
    "--set",
    "fit.kl_weight.updates=1",
]
ANTIBODIES = Path(__file__).parents[3] / "shared" / "data" / "antibodies" / "heavy.csv"
DOMAIN = (
    "EVQLVESGGGLVQPGRSLRLSCAASGFTFDDYAMHWVRQAPGKGLEWVSAITWNSGHIDYADSVEGRFTISRDNAKNSLYLQMNSLRAEDTAVYYCAKVSYLS"
    "TASSLDYWGQGTLVTVSS"
)


def installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def reactions(path: Path, rows: int) -> Path:
    acids, amines = [f"C(=O)({'C' * (i % 5)})" for i in range(rows)], [f"N{'C' * (i % 7 + 1)}" for i in range(rows)]
    lines = [f"{acid}Cl.{amine}>>{acid}{amine}" for acid, amine in zip(acids, amines, strict=True)]
    path.write_text("rxn\n" + "\n".join(lines) + "\nno reaction\n")
    return path


@pytest.mark.skipif(not installed("rxnmapper"), reason="the reaction weights are not installed")
def test_reactions_learns_compares_and_draws(tmp_path: Path) -> None:
    train, out = reactions(tmp_path / "r.csv", 30), tmp_path / "out"
    assert call("reactions", "--train", str(train), "--steps", "2", "--out", str(out), *FEW) == 0
    records = json.loads((out / "results.json").read_text())["records"]
    values = {(r["metric"], r.get("arm")): r["value"] for r in records}
    arms = {arm for metric, arm in values if metric == "path_nats"}
    assert {"learned", "learned, sampled", "random cosine", "greedy_oracle uniform", "threshold 0.9"} <= arms
    assert 0 <= values["exact", "learned"] <= values["valid", "learned"] <= 1
    assert {r["kind"] for r in records if r["metric"] == "mean_step"} >= {"aliphatic C", "branch", "bond"}
    rejected = {r["outcome"]: r["value"] for r in records if r["metric"] == "load_rows"}
    assert rejected["no reactants>>product"] == 1
    assert (out / "order.png").stat().st_size > 5000
    assert (out / "order.safetensors").stat().st_size < 200_000  # without the denoiser
    again = evaluate.run(evaluate.Config(run=str(out)), tmp_path)
    learned = next(r for r in again if r["metric"] == "path_nats" and r["arm"] == "learned")
    assert learned["value"] == pytest.approx(values["path_nats", "learned"], abs=1e-5)


@pytest.mark.skipif(not installed("rxnmapper"), reason="the reaction weights are not installed")
def test_what_is_certain_overrules_a_plan(tmp_path: Path) -> None:
    """A plan of two steps in four: sizes from the schedule, a figure, and an order that comes back as it was."""
    train, out = reactions(tmp_path / "r.csv", 30), tmp_path / "out"
    settings = ["plan_steps=2", "overrule={weight: 2, sizes: cosine}", "guide.network={name: table, period: 3}"]
    given = [word for setting in [*settings, "refine=null", "rows_written=2"] for word in ("--set", setting)]
    assert call("reactions", "--train", str(train), "--steps", "4", "--out", str(out), *given, *FEW) == 0
    records = json.loads((out / "results.json").read_text())["records"]
    values = {r["arm"]: r["value"] for r in records if r["metric"] == "path_nats"}
    assert {"learned", "learned, sampled", "random cosine"} <= set(values)
    assert "learned, the plan alone" not in values  # it has other steps
    assert values["learned"] == pytest.approx(
        values["top_prob cosine"], abs=0.05
    )  # a plan hardly learned holds back little
    assert {r["value"] for r in records if r["metric"] == "nfe" and r["arm"] == "learned"} == {4.0}
    assert all(0 <= r["value"] <= 3 for r in records if r["metric"] == "mean_step")
    assert (out / "order.png").stat().st_size > 5000
    again = evaluate.run(evaluate.Config(run=str(out)), tmp_path)
    learned = next(r for r in again if r["metric"] == "path_nats" and r["arm"] == "learned")
    assert learned["value"] == pytest.approx(values["learned"], abs=1e-5)


def test_long_rows_are_put_together_and_keep_their_numbers() -> None:
    length = torch.tensor([3, 1, 2, 5, 4])
    mask = torch.arange(5) < length[:, None]
    batch = {"tokens": length[:, None].expand(5, 5), "attention_mask": mask, "row_ids": torch.arange(5)}
    parts = by_length([batch], size=2)
    assert [part["row_ids"].tolist() for part in parts] == [[1, 2], [0, 4], [3]]
    assert [part["tokens"].shape[1] for part in parts] == [2, 4, 5]
    assert all((part["tokens"][:, 0] == part["attention_mask"].sum(-1)).all() for part in parts)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["reactions", "--set", "plan_steps=2"], "plan_steps: a plan alone has all steps; set overrule"),
        (["reactions", "--set", "plan_steps=9", "--set", "overrule={}"], "plan_steps: 9 for 4 steps"),
        (["reactions", "--set", "overrule={}", "--set", "decision=rank"], "decision: what overrules a plan ranks"),
        (
            ["reactions", "--set", "overrule={}", "--set", "guide=policy", "--set", "refine=null"],
            "overrule: policy is no",
        ),
        (["reactions"], "train: no reactions; give a CSV file"),
        (["reactions", "--set", "task.name=antibodies"], "task.name"),
        (["antibodies", "--train", "TABLE", "--set", "task.names=(a"], "is no regular expression"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    table = tmp_path / "t.csv"
    table.write_text(f"name,heavy\na,{DOMAIN}\n")
    given = [str(table) if word == "TABLE" else word for word in arguments]
    assert call(*given, "--out", str(tmp_path / "x")) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error
    assert not (tmp_path / "x").exists()


def test_a_budget_of_denoiser_rows_sets_the_updates() -> None:
    """4 sequences an update: their hidden states once, and 3 or 7 more for each of 8 particles."""
    for steps, updates, annealed in ((4, 3000 // (4 * 25), 20), (8, 3000 // (4 * 57), 8)):
        settings = ["denoiser_rows=3000", f"num_steps={steps}", "fit.updates=300", "elbo.num_particles=8"]
        fit = within_budget(load_config(ReactionsConfig, "reactions", [*settings, "fit.kl_weight.updates=200"])).fit
        assert fit.kl_weight is not None
        assert (fit.updates, fit.kl_weight.updates) == (updates, annealed)
    enough = load_config(ReactionsConfig, "reactions", ["denoiser_rows=1000000", "fit.updates=9"])
    assert within_budget(enough).fit.updates == 9
    unlimited = load_config(ReactionsConfig, "reactions", ["denoiser_rows=null"])
    assert within_budget(unlimited) is unlimited


def test_kinds_of_tokens() -> None:
    tokens = ["C", "c", "N", "n", "Cl", "[C@H]", "(", ")", "1", "%10", "=", "/", "."]
    kinds = ["aliphatic C", "aromatic c", "N, O, S, P", "N, O, S, P", "halogen", "bracket atom", "branch", "branch"]
    assert [token_kind(token) for token in tokens] == [*kinds, "ring closure", "ring closure", "bond", "bond", None]


def test_regions_of_a_known_domain() -> None:
    """Adalimumab, whose loops are published."""
    regions = antibody_regions(DOMAIN)
    assert regions is not None and len(regions) == len(DOMAIN)
    loops = {name: "".join(a for a, r in zip(DOMAIN, regions, strict=True) if r == name) for name in REGIONS}
    assert (loops["CDR1"], loops["CDR2"], loops["CDR3"]) == ("GFTFDDYAMH", "AITWNSGHIDYADSVEG", "VSYLSTASSLDY")
    assert antibody_regions("A" * 120) is None


@pytest.mark.skipif(not ANTIBODIES.is_file(), reason="no antibody sequences beside the project")
def test_regions_of_real_domains() -> None:
    with ANTIBODIES.open() as file:
        found = [antibody_regions(row["heavy"]) for row in csv.DictReader(file)]
    assert sum(regions is not None for regions in found) > 0.95 * len(found)


@pytest.mark.skipif(not installed("antiberty"), reason="the judge is not installed")
def test_judge_prefers_a_real_domain_to_a_scrambled_one() -> None:
    judge = AntibodyJudge()
    order = torch.randperm(len(DOMAIN), generator=torch.Generator().manual_seed(0)).tolist()
    real, scrambled = judge.nats([DOMAIN, "".join(DOMAIN[i] for i in order)]).tolist()
    assert real < 0.6 and scrambled > 2.5


def test_a_missing_judge_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.files", missing)
    with pytest.raises(
        UserError, match=r"judge of antibodies is missing; run: pip install --no-deps antiberty==0\.1\.3"
    ):
        AntibodyJudge()
