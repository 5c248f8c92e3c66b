"""The benchmark of estimators: its ground truth, and a small run of the command."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pyro
import pytest
import torch
from torch import Tensor

from orderppl.experiments import benchmark_estimators
from orderppl.experiments.baseline_limits import BY_HISTORY, BY_PARAMETER, _gradient_and_scores, baseline_limits
from orderppl.experiments.benchmark_estimators import (
    ESTIMATORS,
    Case,
    Config,
    Estimator,
    enumerated_gradients,
    measure,
)
from orderppl.experiments.benchmark_speed import denoiser_rows
from orderppl.experiments.cli import run_experiment
from orderppl.experiments.replicates import chain_problem, tiny_problem
from orderppl.experiments.results import read_results
from orderppl.inference import OrderLoss, RelaxedELBO, RevealTraceGraph_ELBO, all_orders, exact_elbo, exact_terms


@pytest.fixture(autouse=True)
def local_parameters():
    with pyro.settings.context(module_local_params=True):
        yield


def tiny_case(guide: str) -> Case:
    problem = tiny_problem(guide)
    return Case("tiny", guide, problem, enumerated_gradients(problem))


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
    pair = tiny_problem("mean_field")(500, False)
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

    config, case = Config(draws=20_000, rows=1000), tiny_case("mean_field")
    assert measure(Estimator(SignError), case, config)["order"]["bias_z"] > 10
    assert measure(Estimator(RevealTraceGraph_ELBO), case, config)["order"]["bias_z"] < 4


def test_no_constant_baseline_leaves_less_than_the_limit() -> None:
    """Limits of a tied policy against a search over a constant per history, and against 20,000 draws without any."""
    problem = tiny_problem("policy")
    limits = baseline_limits(problem, 4)
    assert 0 < limits[BY_PARAMETER] < limits[BY_HISTORY]
    pyro.set_rng_seed(0)
    without = Estimator(partial(RevealTraceGraph_ELBO, leave_one_out=False))
    drawn = measure(without, tiny_case("policy"), Config(draws=20_000, rows=1000))["order"]["variance_per_update"]
    assert limits[BY_HISTORY] < drawn

    one = problem(1, False)
    orders = all_orders(one.guide, **one.batch)
    log_q = exact_terms(one.model, one.guide, orders, **one.batch).log_guide[:, 0]
    orders, probability = orders[log_q > -torch.inf, 0], log_q[log_q > -torch.inf].double().exp().detach()
    gradient, scores = _gradient_and_scores(problem(len(orders), False), orders)
    histories = [(score, torch.where(orders < step, orders, 9)) for step, score in enumerate(scores[:-1])]
    features = [
        (before == row).all(-1).double().unsqueeze(-1) * score
        for score, before in histories
        for row in before.unique(dim=0)
    ]

    def variance(constants: Tensor) -> Tensor:
        left = gradient - sum(c * f for c, f in zip(constants, features, strict=True))
        mean = (probability.unsqueeze(-1) * left).sum(0)
        return ((probability.unsqueeze(-1) * left.square()).sum() - mean.square().sum()) / 4

    constants = torch.zeros(len(features), dtype=torch.float64, requires_grad=True)
    assert variance(constants).item() == pytest.approx(drawn, rel=0.1)
    optimizer = torch.optim.LBFGS([constants], max_iter=100)
    optimizer.step(lambda: [optimizer.zero_grad(), (value := variance(constants)).backward(), value][-1])
    assert variance(constants).item() == pytest.approx(limits[BY_HISTORY], rel=1e-6)


def test_a_soft_table_is_the_table_at_hard_states() -> None:
    """All 8 states of 3 positions; between them, the expected logits under independent visibility."""
    denoiser = tiny_problem("mean_field")(8, False).model.denoiser
    hidden = torch.arange(8).unsqueeze(-1) >> torch.arange(3) & 1
    attended = torch.ones(8, 3, dtype=torch.bool)
    tokens = torch.zeros(8, 3, dtype=torch.int64)
    hard = denoiser(torch.where(hidden.bool(), denoiser.mask_index, tokens), attended)
    torch.testing.assert_close(denoiser.soft_logits(tokens, 1.0 - hidden, attended), hard)
    degrees = torch.tensor([0.3, 0.9, 0.0])
    weight = torch.where(hidden.bool(), 1 - degrees, degrees).prod(-1)  # of the 8 states
    found = denoiser.soft_logits(tokens, degrees.expand(8, 3), attended)[0]
    torch.testing.assert_close(found, torch.einsum("s,slv->lv", weight, hard))


def test_softly_revealed_sequences_count_as_denoiser_rows() -> None:
    """T K rows of one sequence for the relaxed bound; the first state is not shared."""
    pair = tiny_problem("mean_field")(5, False)
    loss = OrderLoss(pair.model, pair.guide, RelaxedELBO(4))
    with pyro.validation_enabled(False):
        assert denoiser_rows(pair.model.denoiser, lambda: loss(**pair.batch)) == 3 * 4 * 5
    assert "soft_logits" not in vars(pair.model.denoiser)


def test_the_command_writes_a_table_a_json_and_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Config(draws=200, rows=50, rounds=1, particles=2)
    run_experiment("benchmark estimators", benchmark_estimators, config, tmp_path / "run")
    records = read_results(tmp_path / "run")["records"]
    assert {record["estimator"] for record in records} == {*ESTIMATORS, BY_HISTORY, BY_PARAMETER}
    assert {r["point"] for r in records if r["estimator"] == "relaxed" and "point" in r} == {
        "mean_field",
        "start",
        "half learned",
    }
    assert not any(r["unbiased"] for r in records if r["estimator"] in ("relaxed", "wake-sleep") and "unbiased" in r)
    for metric in ("bias_z", "gradient_variance", "variance_ratio", "time_ratio"):
        assert any(record["metric"] == metric for record in records), metric
    stock = [r for r in records if r["metric"] == "variance_ratio" and r["estimator"] == benchmark_estimators.STOCK]
    assert all(record["value"] == 1.0 for record in stock)
    one_step = [r for r in records if r["metric"] == "denoiser_rows" and r["mode"] == "one step"]
    assert all(record["value"] <= 2 * 4 for record in one_step)
    assert (tmp_path / "run" / "variance.png").stat().st_size > 0
    assert "bias_z" in capsys.readouterr().out
