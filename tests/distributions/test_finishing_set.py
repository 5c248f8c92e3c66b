"""Sets that may be everything against sums over all subsets."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import kl_divergence

from orderppl.decoding import StochasticDecision
from orderppl.distributions import BernoulliSet, FinishingSet, PlackettLuceSet

LENGTH = 4
# Everything masked, some of it, one position (not the first), nothing.
MASKED = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()
BASES = {
    "bernoulli": lambda: BernoulliSet(torch.randn(MASKED.shape), MASKED),
    "non_empty": lambda: BernoulliSet(torch.randn(MASKED.shape), MASKED, non_empty=True),
    "plackett_luce": lambda: PlackettLuceSet(torch.randn(MASKED.shape), MASKED.sum(-1).clamp(max=2), MASKED),
}
every_base = pytest.mark.parametrize("name", BASES)


def make(name: str) -> FinishingSet:
    return FinishingSet(BASES[name](), torch.randn(len(MASKED)))


@every_base
def test_it_is_the_mixture_it_says(name: str):
    law = make(name)
    values = law.enumerate_support()
    finish = law.logit.sigmoid()
    by_hand = finish * (values == MASKED).all(-1) + (1 - finish) * law.base.log_prob(values).exp()
    assert torch.allclose(law.log_prob(values).exp(), by_hand, atol=1e-6)
    assert torch.allclose(by_hand.sum(0), torch.ones(len(MASKED)), atol=1e-5)
    assert torch.allclose(law.log_prob(law.mode), law.log_prob(values).amax(0), atol=1e-6)
    assert torch.allclose(law.weighted(torch.tensor(-0.7)).log_prob(values), law.log_prob(values) - 0.7)


@pytest.mark.parametrize("name", ["bernoulli", "non_empty"])
def test_inclusion_probability(name: str):
    law = make(name)
    values = law.enumerate_support()
    assert torch.allclose(law.probs, (values * law.log_prob(values).exp().unsqueeze(-1)).sum(0), atol=1e-6)


@every_base
def test_samples_and_draws_follow_log_prob(name: str):
    """n = 20,000 per row: every set's frequency within |z| < 5 of its probability."""
    n, law = 20_000, make(name)
    values, probs = law.enumerate_support(), law.log_prob(law.enumerate_support()).exp()
    code = 2 ** torch.arange(LENGTH)
    for draws in (law.sample((n,)), law.draw(torch.rand((n, *MASKED.shape), dtype=torch.float64))):
        assert not (draws & ~MASKED).any()
        for row in range(len(MASKED)):
            seen = torch.bincount((draws[:, row] * code).sum(-1), minlength=2**LENGTH) / n
            expected = torch.zeros(2**LENGTH).index_add(0, (values[:, row] * code).sum(-1), probs[:, row])
            error = (expected * (1 - expected) / n).sqrt().clamp_min(1e-6)
            assert ((seen - expected).abs() / error).max() < 5


def test_a_factor_finishes_more_often_and_decides_by_the_one_decision():
    """n = 20,000: a factor of 2 doubles the share that finishes, |z| < 5."""
    n, law = 20_000, FinishingSet(BernoulliSet(torch.full((4, 4), -9.0), MASKED), torch.full((4,), -1.2))
    share = 2 * law.logit.sigmoid()[0].item()
    noise = torch.rand((n, *MASKED.shape), dtype=torch.float64)
    finished = (law.draw(noise, 2.0)[:, 0] == MASKED[0]).all(-1).float().mean().item()
    assert abs(finished - share) < 5 * (share * (1 - share) / n) ** 0.5
    assert not law.decide().any()
    assert torch.equal(law.decide(3.0), MASKED)
    half = FinishingSet(BernoulliSet(torch.full((4, 4), -0.2), MASKED), torch.full((4,), -0.2))
    assert (half.probs > 0.5).any() and not half.decide().any()  # neither decision alone says yes

    class Fixed:
        def distribution(self, state: object) -> FinishingSet:
            return half

    state = type("State", (), {"masked": MASKED, "noise": None})()
    assert not StochasticDecision(Fixed(), "mode").select(state).any()  # type: ignore[arg-type]


def test_stacks_picks_and_the_last_step():
    laws = [make("non_empty") for _ in range(3)]
    stacked = FinishingSet.stack(laws)
    values = laws[0].enumerate_support().unsqueeze(1)
    by_one = torch.stack([law.log_prob(values[:, 0]) for law in laws], 1)
    assert torch.allclose(stacked.log_prob(values), by_one)
    assert torch.allclose(stacked.at(torch.tensor([[2]])).log_prob(values), by_one[:, 2:])
    assert torch.equal(stacked.expand((3, 4)).log_prob(values), stacked.log_prob(values))
    last = laws[0].certain(torch.tensor([True, False, True, True]))
    chosen = last.log_prob(MASKED)
    assert torch.allclose(chosen[[0, 2, 3]], torch.zeros(3), atol=1e-6) and chosen[1] < -1e-3
    everything = laws[0].everything(MASKED)
    assert torch.allclose(everything.log_prob(MASKED), torch.zeros(4), atol=1e-6)


def test_a_tied_pair_has_no_divergence_and_others_no_closed_form():
    law = make("non_empty")
    assert torch.equal(kl_divergence(law, law.weighted(torch.tensor(-0.7))), torch.full((4,), 0.7))
    for other in (make("non_empty"), law.base):
        with pytest.raises(NotImplementedError):
            kl_divergence(law, other)
    with pytest.raises(ValueError, match="base: has a weight"):
        FinishingSet(law.base.weighted(torch.tensor(-0.7)), law.logit)
