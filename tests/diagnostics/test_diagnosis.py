"""All diagnostics of a fitted pair or a run: files, numbers that can be traced, and one line for anything else."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from orderppl import RevealTraceGraph_ELBO, fit, load_run
from orderppl.data import Chains
from orderppl.diagnostics import diagnose
from orderppl.diagnostics.backend import load
from orderppl.errors import UserError
from orderppl.guides import PolicyGuide
from orderppl.models import LearnedPolicy, PolicyNetwork, SequentialUnmaskingModel, UnmaskingModel
from orderppl.models.denoisers import MarkovChainDenoiser

from chain_programs import chain_batch, chain_programs, plan_guide, with_holes

OPTIONS = {"num_samples": 40, "num_state_draws": 4}
FIGURES = {"order", "precedence", "steps_used", "set_sizes", "token_types", "pareto_k", "bound"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A posterior, and a learned policy that is its own guide."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    denoiser = MarkovChainDenoiser(3, 0.85, 6)
    policy = LearnedPolicy(PolicyNetwork(4, width=8, layers=1))
    pairs = {
        "plan": (chain_programs(6, 3)[0], plan_guide(6, 3, noise=1.0)),
        "policy": (UnmaskingModel(denoiser, policy, 3), PolicyGuide(policy, denoiser, 3)),
    }
    data = Chains(num_states=3, length=6, train=64, validation=16, test=32)
    settings = {"optimizer": partial(torch.optim.Adam, lr=0.05), "batch_size": 16, "updates": 12, "progress": False}
    for name, (model, guide) in pairs.items():
        objective = RevealTraceGraph_ELBO(2)
        fit(model, guide, data.splits()["train"], objective=objective, out=folder / name, grad_clip=1.0, **settings)
    (folder / "policy" / "log.jsonl").unlink()
    return folder


@pytest.mark.parametrize("name", ["plan", "policy"])
def test_a_run_is_diagnosed(runs: Path, tmp_path: Path, name: str) -> None:
    run, out = load_run(runs / name), tmp_path / "out"
    batch = with_holes(chain_batch(3, 6), given=[[1, 2], [1, 3]], padding=[])
    model = run.model
    sequential = SequentialUnmaskingModel(model.denoiser, model.policy, 3) if name == "plan" else None
    found = diagnose(run, batch, out, sequential=sequential, num_simulations=80, **OPTIONS)
    summary = json.loads((out / "summary.json").read_text())
    data = load(out / summary["data"])
    assert {"posterior", "prior", "order_statistics", "states", "correlation", "path", "exact"} <= set(data.groups())
    assert data["posterior"]["reveal_step"].shape == (2, 20, 3, 6)
    assert {f"{figure}.svg" for figure in FIGURES} <= set(summary["figures"])
    assert all((out / figure).read_text("utf-8").startswith("<svg") for figure in summary["figures"])
    assert {path.name for path in out.iterdir()} == {"draws.nc", "summary.json", *summary["figures"]}

    numbers = summary["numbers"]
    assert numbers == found.numbers and summary["alarms"] == found.alarms and summary["run"] == str(runs / name)
    assert all(set(entry) >= {"value", "unit", "source"} for entry in numbers.values())
    gap = (data["exact"]["log_evidence"] - data["log_likelihood"]["tokens"]).mean()
    assert numbers["gap_nats"]["value"] == pytest.approx(float(gap))
    whole = model.denoiser.log_evidence(batch.tokens).numpy()
    assert data["exact"]["log_evidence"].values[[0, 2]] == pytest.approx(whole[[0, 2]], abs=1e-5)
    assert data["exact"]["log_evidence"].values[1] > whole[1]  # what is given has not to be guessed
    assert numbers["elbo"]["value"] == pytest.approx(float(data["sample_stats"]["log_weight"].mean()))
    assert data["path"]["tokens"].values.tolist() == [[6, 4, 6]] * 2
    nats = data["path"]["nats"].sel(decision="mode").sum() / 16
    assert numbers["path_nats_mode"]["value"] == pytest.approx(float(nats))
    assert "k-hat is at most" in repr(found) and len(repr(found)) < 1000
    if name == "plan":
        assert numbers["training_elbo"]["value"] == pytest.approx(float(data["training"]["elbo"].mean()))
        assert data["training"].attrs["grad_clip"] == 1.0
        assert {"elbo_parts.svg", "gradient.svg", "calibration.svg"} <= set(summary["figures"])
        assert data["calibration"]["rank"].shape == (8, 80)
        smallest = min(1.0, 8 * float(data["calibration"]["p_value"].min()))
        assert numbers["calibration_p"]["value"] == pytest.approx(smallest)
    else:
        assert "no such file" in summary["left_out"]["training"]
        assert {"elbo_parts.svg", "gradient.svg"} <= set(summary["left_out"])
        assert numbers["kl"]["value"] == pytest.approx(0, abs=1e-5)  # the policy is its own guide


def test_a_pair_is_diagnosed_without_a_folder() -> None:
    model, _ = chain_programs(4, 2)
    guide = plan_guide(4, 2, noise=1.0)
    result = fit(model, guide, chain_batch(8, 4), updates=3, batch_size=4, progress=False)
    found = diagnose((model, guide), chain_batch(2, 4), log=result.trace, **OPTIONS)
    assert np.isfinite(found.numbers["training_elbo"]["value"]) and not found.left_out
    assert set(found.figures()) >= FIGURES
    plain = diagnose((model, guide), chain_batch(2, 4), num_samples=3)
    assert set(plain.left_out) == {"training"} and "k_hat_largest" not in plain.numbers
    assert "pareto_k" not in plain.figures() and "at least 25" in plain.left_out["pareto_k.svg"]


def test_examples_bring_their_tokens(runs: Path) -> None:
    run = load_run(runs / "plan")
    examples = Chains(num_states=3, length=6, test=5).splits()["test"]
    found = diagnose(run, examples.take(2), **OPTIONS)
    token = found.data["posterior"]["token"].values
    assert token.tolist() == [[str(number) for number in row] for row in examples.batch.tokens[:2].tolist()]


def test_bad_runs_are_named_and_nothing_is_written(runs: Path, tmp_path: Path) -> None:
    run, out = load_run(runs / "plan"), tmp_path / "out"
    sequential = SequentialUnmaskingModel(run.model.denoiser, run.model.policy, 3)
    with pytest.raises(UserError, match="too few to test"):
        diagnose(run, chain_batch(2, 6), out, sequential=sequential, num_simulations=5, **OPTIONS)
    with pytest.raises(UserError, match="num_samples"):
        diagnose(run, chain_batch(2, 6), out, num_samples=0)
    run.guide = None
    with pytest.raises(UserError, match="holds no model and guide"):
        diagnose(run, chain_batch(2, 6), out)
    assert not out.exists()
