"""Importance weights of guides on the exact chain: good and bad ones, and against enumeration."""

from __future__ import annotations

from functools import partial

import numpy as np
import pyro
import pytest
import torch

from orderppl import RevealTraceGraph_ELBO, fit
from orderppl.diagnostics import bound_curve, draw_orders, importance_report
from orderppl.diagnostics.draws import numbers, prior_log_weights, scored
from orderppl.diagnostics.importance import khat_threshold, pareto_k
from orderppl.errors import UserError
from orderppl.guides import PolicyGuide
from orderppl.inference import ImportanceWeightedELBO
from orderppl.inference.exact import all_orders, exact_elbo
from orderppl.inference.importance_weighted import importance_bound
from orderppl.models import UnmaskingModel
from orderppl.models.denoisers import MarkovChainDenoiser
from orderppl.policies import RandomSteps, Threshold
from orderppl.unmasking import Batch

from chain_programs import (
    ExactPosterior,
    chain_batch,
    chain_programs,
    enumerated_evidence,
    fixed_guide,
    left_to_right,
    plan_guide,
    random_guide,
    with_holes,
)

CONFIDENT = Threshold(0.5, temperature=1.0)  # never reveals nothing


def test_khat_tells_a_good_guide_from_a_bad_one():
    """Exact chain, L = 8, T = 3, 10 sequences, 1,000 draws: k-hat of a fitted guide, and of two that miss."""
    length, num_steps = 8, 3
    denoiser = MarkovChainDenoiser(4, 0.85, length)
    model = UnmaskingModel(denoiser, RandomSteps(), num_steps)
    good = plan_guide(length, num_steps)
    fit(
        model,
        good,
        chain_batch(200, length, 4, seed=0),
        objective=RevealTraceGraph_ELBO(num_particles=4),
        optimizer=partial(torch.optim.Adam, lr=0.1),
        batch_size=16,
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
    batch = with_holes(chain_batch(6), given=[[0, 2], [3, 1], [3, 3]], padding=[])
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
    ("policy", "guide", "price", "given"),
    [
        (RandomSteps(), "random", 0.0, []),
        (RandomSteps("cosine"), "left", 0.0, []),
        (RandomSteps(), "random", 0.5, []),
        (CONFIDENT, "policy", 0.0, []),
        (CONFIDENT, "policy", 0.5, [[0, 1], [2, 0]]),
    ],
)
def test_bound_curve_rises_from_the_elbo_to_the_evidence(policy, guide, price, given):
    """10,000 draws for each of 4 sequences: L_1 is the exact ELBO and L_K the evidence, |z| < 5; L_K rises with K."""
    model, _ = chain_programs(4, 3, policy, step_price=price)
    batch = with_holes(chain_batch(4, 4), given, [])
    programs = {
        "random": random_guide(3),
        "left": fixed_guide(left_to_right(4, 3), 3, 1.0),
        "policy": PolicyGuide(policy, model.denoiser, 3),
    }
    program = programs[guide]
    evidence = enumerated_evidence(model, batch)
    curve = bound_curve(draw_orders(model, program, batch, 10_000).log_weight, evidence, [1, 10, 100, 1000])
    elbo = exact_elbo(model, program, all_orders(random_guide(3), batch), batch).detach().numpy()
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
    batch, guide = chain_batch(3), random_guide(3)
    objective = ImportanceWeightedELBO(90)
    torch.manual_seed(0)
    objective.loss(model, guide, batch)
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
    heavy = np.zeros((1000, 1))
    heavy[0] = 20.0  # one draw outweighs all: nothing to fit, and nothing to trust
    assert np.isposinf(pareto_k(heavy)).all()
    assert not importance_report(heavy)["trusted"].any()


def test_draws_outside_the_support_weigh_nothing():
    """A guide that may reveal nothing under a prior that may not: -inf weights are weights of 0."""
    model, _ = chain_programs(4, 3, CONFIDENT)
    batch = chain_batch(3, 4)
    draws = draw_orders(model, random_guide(3), batch, 4000)
    assert torch.isneginf(draws.log_weight).any()
    estimate = importance_report(draws.log_weight)["log_evidence"].values
    assert estimate == pytest.approx(enumerated_evidence(model, batch).numpy(), abs=0.2)


def test_thresholds():
    assert khat_threshold(1000) == pytest.approx(2 / 3)
    assert khat_threshold(10**6) == 0.7


def test_a_small_khat_is_not_enough():
    """Weights with a light tail are trusted until other draws find 3 nats more evidence; without a tail only then."""
    light = np.random.default_rng(0).normal(size=(1000, 1)) * 0.3
    for weights, without in ((light, True), (np.zeros((1000, 1)), False)):
        assert bool(importance_report(weights)["trusted"].all()) == without
        for more, trusted in ((2.5, True), (3.5, False)):
            assert bool(importance_report(weights, weights + more)["trusted"].all()) == trusted


@pytest.mark.parametrize("price", [0.0, 0.5])
def test_a_guide_that_draws_one_order_is_not_trusted(price):
    """Its weights are all the same and k-hat sees nothing; draws from the prior do."""
    model, _ = chain_programs(6, 3, step_price=price)
    batch = chain_batch(4, 6)
    draws = draw_orders(model, fixed_guide(left_to_right(6, 3), 3, 40.0), batch, 300)
    reference = prior_log_weights(model, batch, 4000, max_states=500)
    assert torch.allclose(reference.logsumexp(0) - np.log(4000), enumerated_evidence(model, batch).double(), atol=0.1)
    report = importance_report(draws.log_weight, reference)
    assert np.isneginf(report["pareto_k"]).all()
    assert (report["missed"] > 3).all() and not report["trusted"].any()
    assert "other draws find more evidence for 4" in report.attrs["summary"]


def test_padding_given_positions_and_chunks_change_no_weight():
    """Rows of a batch weigh as they do alone, without their padding; the size of the denoiser calls does not matter."""
    model, _ = chain_programs(5, 3)
    batch = with_holes(chain_batch(3), given=[[1, 1], [2, 3]], padding=[[1, 3], [1, 4]])
    draws = []
    for max_states in (9, 10_000):
        torch.manual_seed(0)
        draws.append(draw_orders(model, random_guide(3), batch, 30, max_states=max_states))
    assert draws[0].reveal_step.shape == (30, 3, 5)
    assert ((draws[0].reveal_step == -1) == ~batch.latent).all()
    short = Batch(batch.tokens[1:2, :3], given=batch.given[1:2, :3])
    alone = numbers(scored(model, short, 30, draws[0].reveal_step[:, 1:2, :3]))
    assert torch.allclose(alone.log_likelihood[:, 0], draws[0].log_likelihood[:, 1], atol=1e-5)
    assert torch.allclose(alone.log_prior[:, 0], draws[0].log_prior[:, 1], atol=1e-5)
    for one in draws:
        # What is given is no part of p(x | r): uniform steps cost log 3 for each of 5 + 2 + 4 positions to reveal.
        assert torch.allclose(one.log_prior, -np.log(3) * torch.tensor([5, 2, 4]).double(), atol=1e-5)


def test_dropout_is_off():
    """A denoiser in training mode is asked as a decoder asks it, and is left as it was."""
    model, _ = chain_programs(4, 2)
    batch = chain_batch(2, 4)
    plain = model.denoiser

    class Noisy(torch.nn.Module):
        mask_index, vocab_size = plain.mask_index, plain.vocab_size

        def forward(self, state, attention_mask):
            logits = plain(state, attention_mask)
            return torch.nn.functional.dropout(logits, 0.5, self.training)

    noisy = UnmaskingModel(Noisy(), RandomSteps(), 2).train()
    torch.manual_seed(0)
    expected = draw_orders(model, random_guide(2), batch, 20)
    torch.manual_seed(0)
    assert torch.equal(draw_orders(noisy, random_guide(2), batch, 20).log_likelihood, expected.log_likelihood)
    assert noisy.training and noisy.denoiser.training


def test_global_parameters_stay_untouched():
    """Programs built for Pyro's global store are scored with their own parameters, and the store stays empty."""
    with pyro.settings.context(module_local_params=False):
        model, _ = chain_programs(4, 2)
        first, second = (plan_guide(4, 2, noise=1.0) for _ in range(2))
        batch = chain_batch(2, 4)
        log_q = []
        for guide in (first, second):
            torch.manual_seed(0)
            log_q.append(draw_orders(model, guide, batch, 5).log_q)
        assert not torch.equal(*log_q)
        assert not list(pyro.get_param_store().keys())


def by_position(batch):
    """A guide with a distribution of its own."""
    with pyro.plate("batch", len(batch), dim=-1):
        steps = pyro.distributions.Categorical(logits=torch.zeros(*batch.tokens.shape, 2))
        pyro.sample("reveal_step", steps.to_event(1))


def test_faults_are_named():
    model, _ = chain_programs(4, 2)
    batch, guide = chain_batch(2, 4), random_guide(2)
    with pytest.raises(UserError, match="num_samples"):
        draw_orders(model, guide, batch, 0)
    with pytest.raises(UserError, match="at least one sequence"):
        draw_orders(model, guide, batch.rows(slice(0, 0)), 5)
    with pytest.raises(UserError, match="nothing to reveal"):
        draw_orders(model, guide, Batch(batch.tokens, given=torch.ones_like(batch.attention_mask)), 5)
    with pytest.raises(UserError, match="model: has no site"):
        draw_orders(lambda batch: None, guide, batch, 5)
    with pytest.raises(UserError, match="observes no tokens"):
        draw_orders(guide, guide, batch, 5)
    with pytest.raises(UserError, match="guide: has no site"):
        draw_orders(model, lambda *_: None, batch, 5)
    with pytest.raises(UserError, match="is a Independent, no OrderDistribution"):
        draw_orders(model, by_position, batch, 5)
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
