"""Simulation-based calibration on the exact chain, where the posterior can be enumerated."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from orderppl.data import AnswerTokens
from orderppl.diagnostics import calibrate
from orderppl.diagnostics.calibration import FUNCTIONS, _ranks, simulate, step_at, uniformity
from orderppl.errors import UserError
from orderppl.guides import PolicyGuide
from orderppl.models import UnmaskingModel
from orderppl.policies import RandomSteps, Threshold
from orderppl.unmasking import Batch

from chain_programs import (
    ExactPosterior,
    chain_batch,
    chain_programs,
    fixed_guide,
    left_to_right,
    random_guide,
    with_holes,
)

LENGTH, STEPS = 4, 3


@pytest.mark.parametrize("policy", [RandomSteps(), Threshold(0.5, temperature=1.0)])
def test_the_exact_posterior_passes(policy):
    """320 simulations of 31 draws, 8 test functions: corrected p above 0.01 for the posterior by enumeration.

    In one of the rows a position in the middle is given.
    """
    model, sequential = chain_programs(LENGTH, STEPS, policy)
    batch = with_holes(chain_batch(2, LENGTH), given=[[1, 1]], padding=[])
    result = calibrate(model, ExactPosterior(model), sequential, batch, num_simulations=320, num_draws=31)
    assert result.attrs["smallest_p"] > 0.01
    assert "no deviation" in result.attrs["summary"]
    assert result["rank"].shape == (8, 320)
    assert (np.abs(result["skew"]) < 5 / np.sqrt(12 * 320)).all()


@pytest.mark.parametrize("wrong", ["prior", "left_to_right", "too_narrow", "too_wide"])
def test_a_wrong_guide_fails(wrong):
    """The same test on guides that are not the posterior: corrected p below 1e-4."""
    model, sequential = chain_programs(LENGTH, STEPS)
    guide = {
        "prior": random_guide(STEPS),
        "left_to_right": fixed_guide(left_to_right(LENGTH, STEPS), STEPS, 2.0),
        "too_narrow": ExactPosterior(model, power=2.5),
        "too_wide": ExactPosterior(model, power=0.3),
    }[wrong]
    result = calibrate(model, guide, sequential, chain_batch(2, LENGTH), num_simulations=320, num_draws=31)
    assert result.attrs["smallest_p"] < 1e-4
    assert "not calibrated" in result.attrs["summary"]
    p_value = dict(zip(result["function"].values, result["p_value"].values, strict=True))
    if wrong == "prior":  # passes with every function of the order alone
        assert p_value.pop("log_joint") < 1e-4 < min(p_value.values())
        assert result["skew"].sel(function="log_joint") > 0.1  # prior draws fit the tokens worse than the true order
    if wrong == "left_to_right":
        assert p_value["first_step"] < 1e-4 and result["skew"].sel(function="first_step") > 0


def test_a_state_dependent_policy_is_simulated_along_its_own_tokens():
    """A policy as its own guide is the prior: calibrated in the order, not in log p(x, r)."""
    policy = Threshold(0.5, temperature=1.0)
    model, sequential = chain_programs(LENGTH, STEPS, policy)
    guide = PolicyGuide(policy, model.denoiser, STEPS)
    batch = with_holes(chain_batch(2, LENGTH), given=[], padding=[[1, 3]])
    result = calibrate(model, guide, sequential, batch, num_simulations=160, num_draws=31)
    assert result["p_value"].sel(function="first_step") > 1e-3


def test_simulation_draws_prior_and_chain():
    """n = 8,000: steps are uniform and neighbours repeat as the chain says when revealed one after another, |z| < 5."""
    n = 8000
    _, sequential = chain_programs(2, 2)
    torch.manual_seed(0)
    order, tokens = simulate(sequential, Batch(torch.zeros(n, 2, dtype=torch.int64)))
    assert abs(order.double().mean() - 0.5) < 5 * 0.5 / (2 * n) ** 0.5
    same = (tokens[:, 0] == tokens[:, 1]).double()
    apart = order[:, 0] != order[:, 1]
    for rows, expected in ((apart, 0.85), (~apart, 1 / 3)):
        assert abs(same[rows].mean() - expected) < 5 * (expected * (1 - expected) / rows.sum()) ** 0.5


def test_given_tokens_stay_and_speak():
    """n = 8,000: a position between two given ones follows the chain between them, |z| < 5."""
    n = 8000
    _, sequential = chain_programs(3, 2)
    given = torch.tensor([True, False, True]).expand(n, -1)
    torch.manual_seed(0)
    order, tokens = simulate(sequential, Batch(torch.tensor([[0, 1, 0]]).expand(n, -1), given=given))
    assert (tokens[:, [0, 2]] == 0).all() and (order[:, [0, 2]] == -1).all()
    expected = 0.85**2 / (0.85**2 + 2 * 0.075**2)
    assert abs((tokens[:, 1] == 0).double().mean() - expected) < 5 * (expected * (1 - expected) / n) ** 0.5


def test_ranks_break_ties_at_random():
    """20,000 comparisons of 0 with draws (0, 0, -1, 1): ranks 1, 2, 3 a third each; rounding does not decide a tie."""
    n = 20_000
    values = np.array([0.0, 1e-7, -1e-7, -1.0, 1.0])[:, None].repeat(n, 1)
    ranks = _ranks(values, np.random.default_rng(0))
    seen = np.bincount(ranks, minlength=5)
    assert seen[0] == seen[4] == 0
    assert stats.chisquare(seen[1:4]).pvalue > 1e-5


def test_uniformity_is_uniform_and_notices():
    """200 null p-values pass a KS test; a shift of the ranks is found; unequal bins are weighted."""
    generator = np.random.default_rng(0)
    null = [uniformity(generator.integers(0, 21, size=500), 20) for _ in range(200)]
    assert stats.kstest(null, "uniform").pvalue > 1e-4
    assert uniformity(generator.integers(0, 15, size=500), 20) < 1e-10


def test_functions_by_hand():
    """A row of five and a row of three positions, nothing to reveal in front."""
    order = torch.tensor([[2, 0, 1, 1, 0], [-1, -1, 1, 2, 1]])
    mask = order >= 0
    log_joint = torch.tensor([-3.0, -4.0])
    values = {name: f(order, mask, log_joint).tolist() for name, f in FUNCTIONS.items()}
    assert values == {
        "first_step": [2, 1],
        "middle_step": [1, 2],
        "last_step": [0, 1],
        "mean_step": [pytest.approx(0.8), pytest.approx(4 / 3)],
        "first_before_last": [0, 0],
        "middle_before_first": [1, 0],
        "steps_used": [3, 3],
        "log_joint": [-3, -4],
    }
    assert step_at(order.expand(7, -1, -1), mask, 0.0).shape == (7, 2)


def test_a_seed_gives_the_same_ranks_and_leaves_the_state():
    model, sequential = chain_programs(3, 2)
    before = torch.get_rng_state()
    ranks = [
        calibrate(model, random_guide(2), sequential, chain_batch(2, 3), num_simulations=80, num_draws=5, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert ranks[0]["rank"].equals(ranks[1]["rank"]) and not ranks[0]["rank"].equals(ranks[2]["rank"])
    assert torch.equal(before, torch.get_rng_state())


def test_faults_are_named():
    model, sequential = chain_programs(3, 2)
    batch, guide = chain_batch(2, 3), random_guide(2)
    for options in (
        {"step_price": 0.5},
        {"robustness": 0.1},
        {"temperature": 0.5},
        {"answer": AnswerTokens(marks=[1])},
    ):
        other = UnmaskingModel(model.denoiser, model.policy, 2, **options)
        with pytest.raises(UserError, match="does not generate"):
            calibrate(other, guide, sequential, batch)
    with pytest.raises(UserError, match="SequentialUnmaskingModel"):
        calibrate(model, guide, model, batch)
    with pytest.raises(UserError, match="too few"):
        calibrate(model, guide, sequential, batch, num_simulations=10)
    with pytest.raises(UserError, match="num_draws"):
        calibrate(model, guide, sequential, batch, num_draws=0)
    with pytest.raises(UserError, match="a row has nothing to reveal"):
        calibrate(model, guide, sequential, with_holes(batch, [[0, 0], [0, 1], [0, 2]], []))
