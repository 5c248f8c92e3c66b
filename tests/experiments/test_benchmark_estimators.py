"""The benchmark of estimators: its ground truth, and a small run of the command."""

from __future__ import annotations

from pathlib import Path

import pyro
import pytest
import torch

from orderppl.experiments import benchmark_estimators
from orderppl.experiments.benchmark_estimators import ESTIMATORS, Config, Estimator, make_cases, measure
from orderppl.experiments.cli import run_experiment
from orderppl.experiments.replicates import chain_problem
from orderppl.experiments.results import read_results
from orderppl.inference import RevealTraceGraph_ELBO, all_orders, exact_elbo


@pytest.fixture(autouse=True)
def local_parameters():
    with pyro.settings.context(module_local_params=True):
        yield


def test_closed_form_of_the_chain_is_the_sum_over_all_orders() -> None:
    """Gradient of a plan of 6 positions in 3 steps: closed form against enumeration."""
    torch.manual_seed(0)
    tokens, logits = torch.randint(0, 4, (6,)), torch.randn(6, 3)
    one = chain_problem(tokens, 3, logits)(1, False)
    orders = all_orders(one.guide, **one.batch)
    exact_elbo(one.model, one.guide, orders, **one.batch).sum().backward()
    closed = benchmark_estimators.chain_gradient(tokens, logits)
    torch.testing.assert_close(one.gradients()["order"][0], closed, rtol=0, atol=1e-4)


def test_rows_are_independent_draws_of_one_gradient() -> None:
    """The two halves of 500 rows have the same mean gradient; |z| < 5 per coordinate."""
    config = Config(draws=2000, rows=500)
    case = make_cases(config)[0]
    pair = case.problem(500, False)
    pyro.set_rng_seed(0)
    RevealTraceGraph_ELBO(4)(pair.model, pair.guide)(**pair.batch).backward()
    draws = -pair.gradients()["order"]
    assert len(draws) == 500 and draws.std(0).max() > 0
    halves = draws[:250].mean(0) - draws[250:].mean(0)
    assert (halves / draws.std(0).clamp_min(1e-9) / (2 / 250) ** 0.5).abs().max() < 5


def test_a_biased_estimator_is_noticed() -> None:
    """20,000 draws of an estimator with the sign of its score function turned: |bias_z| far above 4."""

    class SignError(RevealTraceGraph_ELBO):
        def _centred(self, cost):
            return -super()._centred(cost)

    config = Config(draws=20_000, rows=1000)
    case = make_cases(config)[0]
    assert measure(Estimator(SignError), case, config)["order"]["bias_z"] > 10
    assert measure(Estimator(RevealTraceGraph_ELBO), case, config)["order"]["bias_z"] < 4


def test_the_command_writes_a_table_a_json_and_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Config(draws=200, rows=50, rounds=1, particles=2)
    run_experiment("benchmark estimators", benchmark_estimators, config, tmp_path / "run")
    records = read_results(tmp_path / "run")["records"]
    assert {record["estimator"] for record in records} == set(ESTIMATORS)
    for metric in ("bias_z", "gradient_variance", "variance_ratio", "time_ratio"):
        assert any(record["metric"] == metric for record in records), metric
    stock = [r for r in records if r["metric"] == "variance_ratio" and r["estimator"] == benchmark_estimators.STOCK]
    assert all(record["value"] == 1.0 for record in stock)
    one_step = [r for r in records if r["metric"] == "denoiser_rows" and r["mode"] == "one step"]
    assert all(record["value"] <= 2 * 4 for record in one_step)
    assert (tmp_path / "run" / "variance.png").stat().st_size > 0
    assert "bias_z" in capsys.readouterr().out
