"""Sets of single decisions by hand, and their numerics."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import kl_divergence

from orderppl.distributions import DecidedSet, IndependentSet
from orderppl.distributions.independent_set import decided_set, log1mexp

LENGTH = 4
MASKED = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()
SETS = {
    "bernoulli": lambda x, m: IndependentSet.bernoulli(x, m),
    "non_empty": lambda x, m: IndependentSet.bernoulli(x, m, non_empty=True),
    "renormalised": lambda x, m: IndependentSet.renormalised(x, 0.8, m),
}


def by_enumeration(q: IndependentSet, p: IndependentSet) -> torch.Tensor:
    values = q.enumerate_support()
    log_q, log_p = q.log_prob(values), p.log_prob(values)
    possible = log_q > -torch.inf
    return (log_q.exp() * (log_q - log_p.masked_fill(~possible, 0.0)).masked_fill(~possible, 0.0)).sum(0)


@pytest.mark.parametrize("p_name", SETS)
@pytest.mark.parametrize("name", SETS)
def test_gradients_match_enumeration(name: str, p_name: str):
    """Also where an arg-max is certain, in rows with nothing masked, and at saturated logits."""
    scores, prior_scores = (torch.randn(MASKED.shape, dtype=torch.float64) for _ in range(2))
    scores[0, 1] = 12.0
    # Rows with an infinite divergence have no gradient.
    finite = by_enumeration(SETS[name](scores, MASKED), SETS[p_name](prior_scores, MASKED)).isfinite()
    masked = MASKED[finite]
    over = [x[finite].requires_grad_() for x in (scores, prior_scores)]
    q, p = SETS[name](over[0], masked), SETS[p_name](over[1], masked)
    got = torch.autograd.grad(kl_divergence(q, p).sum(), over, retain_graph=True)
    wanted = torch.autograd.grad(by_enumeration(q, p).sum(), over, retain_graph=True)
    for a, b in zip(got, wanted, strict=True):
        assert torch.isfinite(a).all()
        assert torch.allclose(a, b, atol=1e-6)
        assert (a[~masked] == 0).all()
    for value in (q.entropy().sum(), q.probs.sum(), q.log_prob(q.sample()).sum()):
        (gradient,) = torch.autograd.grad(value, over[0], retain_graph=True)
        assert torch.isfinite(gradient).all()


def test_divergences_are_finite_where_they_should_be():
    q, p = (IndependentSet.bernoulli(torch.randn(MASKED.shape), MASKED, non_empty) for non_empty in (False, True))
    assert kl_divergence(q, p)[:3].isinf().all()  # the guide may reveal nothing, the prior may not
    assert kl_divergence(p, q).isfinite().all()


def test_divergence_where_one_of_the_two_was_shown_less():
    """Infinite where the prior hides a position; where the guide does, it keeps it for sure: -log(1 - p)."""
    scores = torch.zeros(1, 2)
    both, one = torch.tensor([[True, True]]), torch.tensor([[True, False]])
    q, p = IndependentSet.bernoulli(scores, both), IndependentSet.bernoulli(scores, one)
    assert kl_divergence(q, p).isinf().all()
    assert kl_divergence(p, p) == 0
    assert kl_divergence(p, q).item() == pytest.approx(math.log(2))


def test_renormalised_set_by_hand():
    """q_i = exp((s_i - max) / temperature); the maximum is certain, with zero gradient of its log(1 - q)."""
    scores = torch.tensor([0.0, -0.1, 3.0, -0.2], requires_grad=True)
    q = IndependentSet.renormalised(scores, 0.1, torch.tensor([True, True, False, True]))
    assert torch.allclose(q.probs, torch.tensor([1.0, math.exp(-1), 0.0, math.exp(-2)]))
    assert q.log_keep[0] == -torch.inf
    q.log_prob(torch.tensor([True, False, False, True])).backward()
    # d/ds_1 log(1 - e^{-1}) = -10 / (e - 1), d/ds_3 of (s_3 - s_0) / 0.1 = 10, the maximum takes the rest.
    slope = -10 / (math.e - 1)
    assert torch.allclose(scores.grad, torch.tensor([-10 - slope, slope, 0.0, 10.0]), atol=1e-4)


def test_tied_maxima_are_all_certain():
    q = IndependentSet.renormalised(torch.tensor([1.0, 1.0, 0.0]), 0.5, torch.ones(3, dtype=torch.bool))
    assert q.probs[:2].equal(torch.ones(2))
    assert q.sample((50,))[:, :2].all()


@pytest.mark.parametrize("logit", [-40.0, -12.0, 12.0, 40.0])
def test_non_empty_at_extreme_logits(logit: float):
    """The normaliser does not cancel: tiny probabilities give a uniform single position, large ones everything."""
    q = IndependentSet.bernoulli(torch.full((LENGTH,), logit), torch.ones(LENGTH, dtype=torch.bool), non_empty=True)
    assert torch.allclose(q.probs, torch.full((LENGTH,), 0.25 if logit < 0 else 1.0), atol=1e-4)
    draws = q.sample((200,))
    assert draws.any(-1).all()
    assert (draws.sum(-1) == (1 if logit < 0 else LENGTH)).float().mean() > 0.95
    assert torch.isfinite(q.entropy())


def test_smoothed_set_by_hand():
    decided = torch.tensor([[True, False, False], [True, True, False]])
    masked = torch.tensor([[True, True, False], [False, True, True]])
    q = IndependentSet.smoothed(decided, masked, 0.1)
    assert torch.allclose(q.probs, torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.9, 0.1]]))
    point = decided_set(decided & masked, masked)
    assert isinstance(point, DecidedSet)
    assert torch.equal(point.sample(), decided & masked)
    assert torch.equal(point.log_prob(decided & masked), torch.zeros(2))
    assert (point.log_prob(masked) == -torch.inf).all()
    assert torch.equal(point.entropy(), torch.zeros(2))
    assert isinstance(decided_set(decided & masked, masked, 0.1), IndependentSet)


def test_scaled_by_hand():
    q = IndependentSet.bernoulli(torch.tensor([0.2, 0.6]).logit(), torch.ones(2).bool())
    assert torch.allclose(q.scaled(2.0).probs, torch.tensor([0.4, 1.0]))
    assert torch.allclose(q.scaled(0.5).probs, torch.tensor([0.1, 0.3]))


def test_log1mexp():
    """Against float64 on both sides of its switch, with a finite gradient up to p = 1 and down to p = 0."""
    log_p = torch.tensor([-1e-6, -1e-3, -0.5, -0.6931471805599453, -0.7, -5.0, -40.0, -200.0], requires_grad=True)
    exact = torch.tensor([math.log1p(-math.exp(x)) for x in log_p.tolist()])
    assert torch.allclose(log1mexp(log_p), exact, rtol=1e-5, atol=1e-30)
    edge = torch.tensor([0.0, -torch.inf, -1.0], requires_grad=True)
    value = log1mexp(edge)
    assert value[0] == -torch.inf and value[1] == 0
    (gradient,) = torch.autograd.grad(value[2] + value[:2].masked_fill(value[:2].isinf(), 0.0).sum(), edge)
    assert torch.allclose(gradient, torch.tensor([0.0, 0.0, -1 / (math.e - 1)]))
    (gradient,) = torch.autograd.grad(log1mexp(log_p).sum(), log_p)
    assert torch.isfinite(gradient).all()
