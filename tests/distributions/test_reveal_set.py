"""Reveal sets against sums over all subsets: mass, samples, moments, divergences, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import kl_divergence

from orderppl.distributions import BernoulliSet, RenormalisedSet, RevealSet
from orderppl.distributions.reveal_set import log1mexp

LENGTH = 4
# Everything masked, some of it, one position (not the first), nothing.
MASKED = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()
SETS = {
    "bernoulli": lambda x, m: BernoulliSet(x, m),
    "non_empty": lambda x, m: BernoulliSet(x, m, non_empty=True),
    "renormalised": lambda x, m: RenormalisedSet(x, 0.8, m),
}
every_set = pytest.mark.parametrize("name", SETS)


def make_set(name: str, masked: Tensor = MASKED, scores: Tensor | None = None) -> RevealSet:
    return SETS[name](torch.randn(masked.shape) if scores is None else scores, masked)


def subsets(q: RevealSet) -> tuple[Tensor, Tensor]:
    """All subsets, bool [2**L, *, L], and their probabilities, [2**L, *]."""
    values = q.enumerate_support()
    return values, q.log_prob(values).exp()


def by_enumeration(q: RevealSet, p: RevealSet) -> Tensor:
    """KL(q || p) summed over subsets."""
    values = q.enumerate_support()
    log_q, log_p = q.log_prob(values), p.log_prob(values)
    possible = log_q > -torch.inf
    terms = log_q.exp() * (log_q - log_p.masked_fill(~possible, 0.0)).masked_fill(~possible, 0.0)
    return terms.sum(0)


@every_set
def test_mass_is_one_and_stays_inside_the_masked_positions(name: str):
    q = make_set(name)
    values, probs = subsets(q)
    assert values.shape == (2**LENGTH, *MASKED.shape)
    assert len(values[:, 0].unique(dim=0)) == 2**LENGTH
    assert torch.allclose(probs.sum(0), torch.ones(len(MASKED)), atol=1e-5)
    outside = (values & ~MASKED).any(-1)
    assert (probs[outside] == 0).all()
    empty = ~values.any(-1)
    never = torch.full((3,), name == "bernoulli")
    assert torch.equal(probs[empty][:3] > 0, never)
    assert probs[empty][3] == 1  # nothing masked: the empty set for sure


@every_set
def test_enumeration_without_expansion_broadcasts(name: str):
    q = make_set(name)
    values = q.enumerate_support(expand=False)
    assert values.shape == (2**LENGTH, 1, LENGTH)
    assert torch.equal(q.log_prob(values), q.log_prob(q.enumerate_support()))


@every_set
def test_samples_follow_log_prob(name: str):
    """n = 20,000 draws per row: every subset's frequency within |z| < 5 of its probability."""
    n = 20_000
    q = make_set(name)
    draws = q.sample((n,))
    assert draws.dtype == torch.bool and draws.shape == (n, *MASKED.shape)
    assert not (draws & ~MASKED).any()
    values, probs = subsets(q)
    code = 2 ** torch.arange(LENGTH)
    for row in range(len(MASKED)):
        seen = torch.bincount((draws[:, row] * code).sum(-1), minlength=2**LENGTH) / n
        order = (values[:, row] * code).sum(-1)
        expected = torch.empty(2**LENGTH).scatter(0, order, probs[:, row])
        error = (expected * (1 - expected) / n).clamp_min(1e-12).sqrt()
        assert (((seen - expected) / error).abs()[expected > 1e-6] < 5).all()
        assert (seen[expected == 0] == 0).all()


@every_set
def test_inclusion_probability_and_entropy(name: str):
    q = make_set(name)
    values, probs = subsets(q)
    assert torch.allclose(q.probs, (values * probs.unsqueeze(-1)).sum(0), atol=1e-5)
    assert torch.equal(q.mean, q.probs)
    assert torch.allclose(q.entropy(), -torch.special.xlogy(probs, probs).sum(0), atol=1e-5)


@every_set
def test_mode_is_the_most_probable_set(name: str):
    for low in (False, True):  # low: no single position is likelier revealed than kept
        scores = torch.randn(MASKED.shape) - 6.0 * low
        q = make_set(name, scores=scores)
        best = subsets(q)[1].amax(0)
        assert torch.allclose(q.log_prob(q.mode).exp(), best, atol=1e-6)
        assert not (q.mode & ~MASKED).any()


@pytest.mark.parametrize("p_name", SETS)
@every_set
def test_divergence(name: str, p_name: str):
    """The registered KL is the sum over subsets, and infinite exactly where p misses subsets of q."""
    q, p = make_set(name), make_set(p_name)
    kl, enumerated = kl_divergence(q, p), by_enumeration(q, p)
    assert torch.equal(kl.isinf(), enumerated.isinf())
    finite = ~kl.isinf()
    assert torch.allclose(kl[finite], enumerated[finite], atol=1e-5)
    assert (kl[finite] > -1e-6).all()
    if name == "bernoulli" and p_name == "non_empty":
        assert kl[:3].isinf().all()  # the guide may reveal nothing, the prior may not
    if p_name == "bernoulli" or name == p_name == "non_empty":
        assert finite.all()
    assert kl[3] == 0  # nothing masked
    assert torch.allclose(kl_divergence(q, q), torch.zeros(len(MASKED)), atol=1e-6)


def test_divergence_is_infinite_where_the_prior_hides_a_position():
    scores = torch.zeros(1, 2)
    q = BernoulliSet(scores, torch.tensor([[True, True]]))
    p = BernoulliSet(scores, torch.tensor([[True, False]]))
    assert kl_divergence(q, p).isinf().all()
    assert kl_divergence(p, p) == 0


@every_set
def test_expand(name: str):
    q = make_set(name)
    wide = q.expand((5, *q.batch_shape))
    values = q.enumerate_support()[3]
    assert wide.batch_shape == (5, len(MASKED)) and wide.event_shape == (LENGTH,)
    assert torch.equal(wide.log_prob(values), q.log_prob(values).expand(5, -1))
    assert torch.equal(wide.probs, q.probs.expand(5, -1, -1))
    assert wide.sample((2,)).shape == (2, 5, len(MASKED), LENGTH)
    assert torch.allclose(kl_divergence(wide, q.expand((5, len(MASKED)))), torch.zeros(5, len(MASKED)), atol=1e-6)


@every_set
def test_at_picks_steps(name: str):
    stack = make_set(name, MASKED.expand(3, *MASKED.shape))  # [T, B, L]
    steps = torch.tensor([[2, 0, 1, 1]])
    picked = stack.at(steps)
    assert picked.batch_shape == (1, len(MASKED))
    values = stack.enumerate_support()
    everything = stack.log_prob(values)  # [2**L, T, B]
    assert torch.equal(picked.log_prob(values[:, :1])[:, 0], everything[:, steps[0], torch.arange(4)])


@every_set
def test_certain_reveals_all_that_is_masked(name: str):
    q = make_set(name).certain(torch.tensor([True, False, True, True]))
    original = make_set(name, scores=torch.zeros(MASKED.shape))
    assert original.certain(torch.zeros(4, dtype=torch.bool)).probs.equal(original.probs)
    for row in (0, 2, 3):
        assert q.log_prob(MASKED)[row] == 0
        assert q.probs[row].equal(MASKED[row].float())
        assert q.entropy()[row] == 0
        assert (q.sample((100,))[:, row] == MASKED[row]).all()
    assert 0 < q.probs[1, 0] <= 1
    assert (subsets(q)[1].sum(0) - 1).abs().max() < 1e-5


@every_set
def test_weight_multiplies_the_density(name: str):
    q = make_set(name)
    price = torch.tensor([-0.3, -0.7, -1.1, 0.0])
    weighted = q.weighted(price)
    value = q.sample()
    assert torch.allclose(weighted.log_prob(value), q.log_prob(value) + price)
    assert torch.equal(weighted.probs, q.probs)  # moments are those of the normalised sets
    assert torch.allclose(weighted.entropy(), q.entropy())
    # As a prior, a price adds to the divergence; two prices add up.
    assert torch.allclose(kl_divergence(q, weighted.weighted(price)), -2 * price, atol=1e-6)


@pytest.mark.parametrize("p_name", SETS)
@every_set
def test_gradients_are_finite_and_match_enumeration(name: str, p_name: str):
    """Also where an arg-max is certain, in rows with nothing masked, and at saturated logits."""
    scores, prior_scores = (torch.randn(MASKED.shape, dtype=torch.float64) for _ in range(2))
    scores[0, 1] = 12.0
    # Rows with an infinite divergence have no gradient.
    finite = by_enumeration(make_set(name, scores=scores), make_set(p_name, scores=prior_scores)).isfinite()
    masked = MASKED[finite]
    over = [x[finite].requires_grad_() for x in (scores, prior_scores)]
    q, p = make_set(name, masked, over[0]), make_set(p_name, masked, over[1])
    got = torch.autograd.grad(kl_divergence(q, p).sum(), over, retain_graph=True)
    wanted = torch.autograd.grad(by_enumeration(q, p).sum(), over, retain_graph=True)
    for a, b in zip(got, wanted, strict=True):
        assert torch.isfinite(a).all()
        assert torch.allclose(a, b, atol=1e-6)
        assert (a[~masked] == 0).all()
    for value in (q.entropy().sum(), q.probs.sum(), q.log_prob(q.sample()).sum()):
        (gradient,) = torch.autograd.grad(value, over[0], retain_graph=True)
        assert torch.isfinite(gradient).all()


def test_renormalised_set_by_hand():
    """q_i = exp((s_i - max) / temperature); the maximum is certain, with zero gradient of its log(1 - q)."""
    scores = torch.tensor([0.0, -0.1, 3.0, -0.2], requires_grad=True)
    q = RenormalisedSet(scores, 0.1, torch.tensor([True, True, False, True]))
    assert torch.allclose(q.probs, torch.tensor([1.0, math.exp(-1), 0.0, math.exp(-2)]))
    assert q.log_keep[0] == -torch.inf
    q.log_prob(torch.tensor([True, False, False, True])).backward()
    # d/ds_1 log(1 - e^{-1}) = -10 / (e - 1), d/ds_3 of (s_3 - s_0) / 0.1 = 10, the maximum takes the rest.
    slope = -10 / (math.e - 1)
    assert torch.allclose(scores.grad, torch.tensor([-10 - slope, slope, 0.0, 10.0]), atol=1e-4)


def test_tied_maxima_are_all_certain():
    q = RenormalisedSet(torch.tensor([1.0, 1.0, 0.0]), 0.5, torch.ones(3, dtype=torch.bool))
    assert q.probs[:2].equal(torch.ones(2))
    assert q.sample((50,))[:, :2].all()


@pytest.mark.parametrize("logit", [-40.0, -12.0, 12.0, 40.0])
def test_non_empty_at_extreme_logits(logit: float):
    """The normaliser does not cancel: tiny probabilities give a uniform single position, large ones everything."""
    q = BernoulliSet(torch.full((LENGTH,), logit), torch.ones(LENGTH, dtype=torch.bool), non_empty=True)
    assert torch.allclose(q.probs, torch.full((LENGTH,), 0.25 if logit < 0 else 1.0), atol=1e-4)
    draws = q.sample((200,))
    assert draws.any(-1).all()
    assert (draws.sum(-1) == (1 if logit < 0 else LENGTH)).float().mean() > 0.95
    assert torch.isfinite(q.entropy())


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature_is_positive(temperature: float):
    with pytest.raises(ValueError, match="temperature"):
        RenormalisedSet(torch.zeros(2), temperature, torch.ones(2, dtype=torch.bool))


@pytest.mark.parametrize("name", SETS)
def test_bad_values_are_refused(name: str):
    q = make_set(name)
    with pytest.raises(ValueError, match="support"):
        q.log_prob(torch.full(MASKED.shape, 2))
    with pytest.raises(ValueError, match="shape"):
        q.log_prob(torch.zeros(len(MASKED), LENGTH + 1, dtype=torch.bool))


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
