"""Importance weights of guides on the exact chain: good and bad ones, and against enumeration."""

from __future__ import annotations

from functools import partial

import numpy as np
import pyro
import pytest
import torch

from orderppl import RevealTraceGraph_ELBO, fit
from orderppl.diagnostics import bound_curve, draw_orders, importance_report, pareto_k, prior_log_weights
from orderppl.diagnostics.draws import score_orders
from orderppl.diagnostics.importance import khat_threshold, verdict
from orderppl.errors import UserError
from orderppl.guides import MeanFieldGuide, PolicyGuide, RandomGuide
from orderppl.inference import BatchStream, ImportanceWeightedELBO, exact_elbo, importance_bound
from orderppl.inference.exact import all_orders
from orderppl.models import CosineSteps, EasyFirst, StepPrice, UniformSteps, UnmaskingModel
from orderppl.models.denoisers import MarkovChainDenoiser
from orderppl.models.networks import PositionTable

from chain_programs import (
    ExactPosterior,
    chain_batch,
    chain_programs,
    enumerated_evidence,
    fixed_guide,
    left_to_right,
)


def test_khat_tells_a_good_guide_from_a_bad_one():
    """Exact chain, L = 8, T = 3, 10 sequences, 1,000 draws: k-hat of a fitted guide, and of two that miss."""
    length, num_steps = 8, 3
    denoiser = MarkovChainDenoiser(4, 0.85, length)
    model = UnmaskingModel(denoiser, UniformSteps(), num_steps)
    good = MeanFieldGuide(PositionTable(length, num_steps), num_steps, sees_tokens=False)
    fit(
        model,
        good,
        BatchStream(chain_batch(200, length, 4, seed=0), batch_size=16),
        elbo=RevealTraceGraph_ELBO(num_particles=4),
        optimizer=partial(torch.optim.Adam, lr=0.1),
        updates=30,
        progress=False,
    )
    batch = chain_batch(10, length, 4)
    shape = {
        name: pareto_k(draw_orders(model, guide, batch, 1000).log_weight)
        for name, guide in {
            "good": good,
            "left to right": fixed_guide(left_to_right(length, num_steps), num_steps),
            "best plan, far too sure": fixed_guide(denoiser.best_order(num_steps)[0], num_steps),
        }.items()
    }
    assert shape["good"].max() < 0.7
    assert shape["left to right"].min() > 0.7
    assert shape["best plan, far too sure"].min() > 0.7


def test_weights_of_the_exact_posterior_are_the_evidence():
    """Every weight is p(x), whichever order is drawn; k-hat says that there is no tail; L_K is flat with gap 0."""
    model, _ = chain_programs()
    batch = chain_batch(6)
    evidence = enumerated_evidence(model, batch)
    draws = draw_orders(model, ExactPosterior(model), batch, 200, max_states=300)
    assert torch.allclose(draws.log_weight, evidence.double().expand(200, -1), atol=1e-4)
    assert not importance_report(draws.log_weight)["trusted"].any()
    report = importance_report(draws.log_weight, prior_log_weights(model, batch, 300))
    assert report["trusted"].all()
    assert np.isneginf(report["pareto_k"]).all()
    assert np.allclose(report["ess"], 200, rtol=1e-3)
    assert "can be used for 6 of 6" in report.attrs["summary"]
    gap = bound_curve(draws.log_weight, evidence)["gap"]
    assert np.abs(gap).max() < 1e-4


@pytest.mark.parametrize(
    ("prior", "guide"),
    [
        (UniformSteps(), "random"),
        (CosineSteps(), "left"),
        (StepPrice(UniformSteps(), 0.5), "random"),
        (EasyFirst(0.5), "policy"),
    ],
)
def test_bound_curve_rises_from_the_elbo_to_the_evidence(prior, guide):
    """10,000 draws for each of 4 sequences: L_1 is the exact ELBO and L_K the evidence, |z| < 5; L_K rises with K."""
    model, _ = chain_programs(4, 3, prior)
    batch = chain_batch(4, 4)
    programs = {
        "random": RandomGuide(3),
        "left": fixed_guide(left_to_right(4, 3), 3, 1.0),
        "policy": PolicyGuide(prior, model.denoiser, 3),
    }
    program = programs[guide]
    evidence = enumerated_evidence(model, batch)
    curve = bound_curve(draw_orders(model, program, batch, 10_000).log_weight, evidence, [1, 10, 100, 1000])
    elbo = exact_elbo(model, program, all_orders(RandomGuide(3), **batch), **batch).detach().numpy()
    error = (curve["bound"].sel(K=1) - elbo) / curve["standard_error"].sel(K=1)
    assert np.abs(error).max() < 5
    # The bias of log mean_K w is var(w) / (2 K) to first order, below the standard error over 10 groups.
    assert (np.abs(curve["gap"].sel(K=1000)) < 5 * curve["standard_error"].sel(K=1000) + 2e-3).all()
    assert (curve["mean_bound"].diff("K") > -3 * curve["mean_standard_error"].values[1:]).all()
    assert curve["mean_gap"].sel(K=1) > 0.05
    assert list(curve["groups"].values) == [10_000, 1_000, 100, 10]


def test_bound_curve_by_hand():
    """Weights 1, 3 | 2, 2 of one sequence: L_1 = mean log w, L_2 = (log 2 + log 2) / 2, L_4 = log 2."""
    weights = torch.tensor([[1.0], [2.0], [3.0], [2.0]]).log()
    curve = bound_curve(weights, torch.tensor([0.9]), [1, 2, 4])
    assert curve["bound"].values[:, 0] == pytest.approx([np.log(12) / 4, np.log(2), np.log(2)])
    assert curve["mean_gap"].values == pytest.approx([0.9 - np.log(12) / 4, 0.9 - np.log(2), 0.9 - np.log(2)])
    logs = np.log([1, 2, 3, 2])
    error = curve["standard_error"].values[:, 0]
    assert error == pytest.approx([logs.std(ddof=1) / 2, 0, np.nan], abs=1e-6, nan_ok=True)
    assert list(bound_curve(np.zeros((30, 2)))["K"].values) == [1, 2, 5, 10, 20, 30]


def test_the_curve_is_the_objective_s_bound():
    """Weights and bound are those of `ImportanceWeightedELBO` and `importance_bound`, draw for draw."""
    model, _ = chain_programs(5, 3)
    batch, guide = chain_batch(3), RandomGuide(3)
    objective = ImportanceWeightedELBO(90)
    torch.manual_seed(0)
    objective.loss(model, guide, **batch)
    torch.manual_seed(0)
    draws = draw_orders(model, guide, batch, 90)
    assert float(importance_bound(draws.log_weight).mean()) == pytest.approx(
        float(objective.metrics["bound"]), abs=1e-4
    )
    curve = bound_curve(draws.log_weight, sizes=[1, 10, 40, 90])
    for size in (1, 10, 40, 90):
        expected = importance_bound(draws.log_weight, size).numpy()
        assert curve["bound"].sel(K=size).values == pytest.approx(expected, abs=1e-6)


def test_khat_of_known_tails():
    """20,000 Pareto weights of shape 0.3 and 1.2: k-hat within 0.2; repeats of few values are no tail."""
    generator = np.random.default_rng(0)
    for shape in (0.3, 1.2):
        log_weight = shape * generator.exponential(size=(20_000, 1))  # w = u^-shape
        assert pareto_k(log_weight)[0] == pytest.approx(shape, abs=0.2)
    atoms = generator.choice([0.0, 1.0, 2.0], size=(1000, 1)) + 1e-6 * generator.normal(size=(1000, 1))
    assert np.isneginf(pareto_k(atoms)).all()
    assert np.isneginf(pareto_k(np.zeros((100, 1)))).all()
    outlier = np.zeros((1000, 1))
    outlier[0] = 20.0  # one draw outweighs all: nothing to fit, and nothing to trust
    assert np.isposinf(pareto_k(outlier)).all()
    assert not importance_report(outlier)["trusted"].any()


def test_draws_outside_the_support_weigh_nothing():
    """A guide that may reveal nothing under a prior that may not: -inf weights are weights of 0."""
    model, _ = chain_programs(4, 3, EasyFirst(0.5))
    batch = chain_batch(3, 4)
    draws = draw_orders(model, RandomGuide(3), batch, 4000)
    assert torch.isneginf(draws.log_weight).any()
    estimate = importance_report(draws.log_weight)["log_evidence"].values
    assert estimate == pytest.approx(enumerated_evidence(model, batch).numpy(), abs=0.2)


def test_thresholds_and_words():
    assert khat_threshold(1000) == pytest.approx(2 / 3)
    assert khat_threshold(10**6) == 0.7
    words = [verdict(k, 1000).split(":")[0] for k in (-np.inf, 0.2, 0.6, 0.68, 1.5, np.inf)]
    assert words == ["unknown", "good", "usable", "poor", "bad", "bad"]
    assert [verdict(-np.inf, 1000, missed).split(":")[0] for missed in (0.1, 3.1)] == ["good", "bad"]
    assert verdict(0.2, 1000, 9.0).startswith("bad")


@pytest.mark.parametrize("prior", [UniformSteps(), StepPrice(UniformSteps(), 0.5)])
def test_a_guide_that_draws_one_order_is_not_trusted(prior):
    """Its weights are all the same and k-hat sees nothing; draws from the prior do."""
    model, _ = chain_programs(6, 3, prior)
    batch = chain_batch(4, 6)
    draws = draw_orders(model, fixed_guide(left_to_right(6, 3), 3, 40.0), batch, 300)
    reference = prior_log_weights(model, batch, 4000, max_states=500)
    assert torch.allclose(reference.logsumexp(0) - np.log(4000), enumerated_evidence(model, batch).double(), atol=0.1)
    report = importance_report(draws.log_weight, reference)
    assert np.isneginf(report["pareto_k"]).all()
    assert (report["missed"] > 3).all() and not report["trusted"].any()
    assert "other draws find more evidence for 4" in report.attrs["summary"]


def test_padding_and_chunks_change_no_weight():
    """Rows of a padded batch weigh as they do alone; the size of the denoiser calls does not matter."""
    model, _ = chain_programs(5, 3)
    batch = chain_batch(3)
    batch["attention_mask"][1, 3:] = False
    guide = RandomGuide(3)
    draws = []
    for max_states in (9, 10_000):
        torch.manual_seed(0)
        draws.append(draw_orders(model, guide, batch, 30, max_states=max_states))
    assert draws[0].reveal_step.shape == (30, 3, 5)
    assert (draws[0].reveal_step[:, 1, 3:] == -1).all()
    short = {"tokens": batch["tokens"][1:2, :3]}
    log_prior, log_likelihood = score_orders(model, short, draws[0].reveal_step[:, 1:2, :3], max_states=7)
    assert torch.allclose(log_likelihood[:, 0], draws[0].log_likelihood[:, 1], atol=1e-5)
    assert torch.allclose(log_prior[:, 0], draws[0].log_prior[:, 1], atol=1e-5)


def test_global_parameters_stay_untouched():
    """Programs built for Pyro's global store are scored with their own parameters, and the store stays empty."""
    with pyro.settings.context(module_local_params=False):
        model, _ = chain_programs(4, 2)
        first, second = (MeanFieldGuide(PositionTable(4, 2, noise=1.0), 2, sees_tokens=False) for _ in range(2))
        batch = chain_batch(2, 4)
        log_q = []
        for guide in (first, second):
            torch.manual_seed(0)
            log_q.append(draw_orders(model, guide, batch, 5).log_q)
        assert not torch.equal(*log_q)
        assert not list(pyro.get_param_store().keys())


def test_faults_are_named():
    model, sequential = chain_programs(4, 2)
    batch, guide = chain_batch(2, 4), RandomGuide(2)
    with pytest.raises(UserError, match="num_samples"):
        draw_orders(model, guide, batch, 0)
    with pytest.raises(UserError, match="at least one sequence"):
        draw_orders(model, guide, {name: rows[:0] for name, rows in batch.items()}, 5)
    with pytest.raises(UserError, match="has no tokens"):
        draw_orders(model, guide, {}, 5)
    with pytest.raises(UserError, match="model: has no site"):
        draw_orders(sequential, guide, batch, 5)
    with pytest.raises(UserError, match="guide: has no site"):
        draw_orders(model, lambda *_: None, batch, 5)
    with pytest.raises(UserError, match="one_step"):
        draw_orders(UnmaskingModel(model.denoiser, UniformSteps(), 2, one_step=True), guide, batch, 5)
    with pytest.raises(UserError, match="at least 25"):
        importance_report(np.zeros((10, 2)))
    with pytest.raises(UserError, match="NaN"):
        importance_report(np.full((30, 2), np.nan))
    with pytest.raises(UserError, match="draws by sequences"):
        bound_curve(np.zeros(5))
    with pytest.raises(UserError, match="within 1..30"):
        bound_curve(np.zeros((30, 2)), sizes=[31])
    with pytest.raises(UserError, match="3 sequences for 2"):
        importance_report(np.zeros((30, 2)), np.zeros((30, 3)))
    with pytest.raises(UserError, match="one number per sequence"):
        bound_curve(np.zeros((30, 2)), np.zeros(3))
