"""The one decision that ends a sequence, by hand; what holds for all sets is in test_sets.py."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import kl_divergence

from orderppl.distributions import IndependentSet, RankedSet
from orderppl.distributions.finishing_set import FinishingSet

MASKED = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()
BASES = {
    "bernoulli": lambda: IndependentSet.bernoulli(torch.randn(MASKED.shape), MASKED),
    "non_empty": lambda: IndependentSet.bernoulli(torch.randn(MASKED.shape), MASKED, non_empty=True),
    "ranked": lambda: RankedSet(torch.randn(MASKED.shape), MASKED.sum(-1).clamp(max=2), MASKED),
    "shown_less": lambda: IndependentSet.bernoulli(torch.randn(MASKED.shape), MASKED & (torch.arange(4) < 3)),
}


@pytest.mark.parametrize("name", BASES)
def test_it_is_the_mixture_it_says(name: str):
    """f [z = M] + (1 - f) base(z), with M all that is masked, whatever the base was shown."""
    q = FinishingSet(BASES[name](), torch.randn(len(MASKED)), MASKED)
    values = q.enumerate_support()
    finish = q.logit.sigmoid()
    by_hand = finish * (values == MASKED).all(-1) + (1 - finish) * q.base.log_prob(values).exp()
    assert torch.allclose(q.log_prob(values).exp(), by_hand, atol=1e-6)
    assert torch.allclose(by_hand.sum(0), torch.ones(len(MASKED)), atol=1e-5)


def test_the_masked_positions_are_those_of_the_base_when_left_out():
    base = BASES["shown_less"]()
    assert torch.equal(FinishingSet(base, torch.zeros(4)).masked, base.masked)


def test_a_factor_finishes_more_often_and_the_mode_follows_the_one_decision():
    """n = 20,000: a factor of 2 doubles the share that finishes, |z| < 5."""
    n = 20_000
    q = FinishingSet(IndependentSet.bernoulli(torch.full((4, 4), -9.0), MASKED), torch.full((4,), -1.2))
    share = 2 * q.logit.sigmoid()[0].item()
    noise = torch.rand((n, *MASKED.shape), dtype=torch.float64)
    finished = (q.scaled(2.0).draw(noise)[:, 0] == MASKED[0]).all(-1).float().mean().item()
    assert abs(finished - share) < 5 * (share * (1 - share) / n) ** 0.5
    assert not q.mode.any()
    assert torch.equal(q.scaled(3.0).mode, MASKED)
    half = FinishingSet(IndependentSet.bernoulli(torch.full((4, 4), -0.2), MASKED), torch.full((4,), -0.2))
    assert (half.probs > 0.5).any() and not half.mode.any()  # neither decision alone says yes


@pytest.mark.parametrize("logit", [-torch.inf, torch.inf])
def test_a_hard_decision(logit: float):
    """Infinite log-odds: samples, draws and densities without a NaN."""
    base = BASES["non_empty"]()
    q = FinishingSet(base, torch.full((4,), logit))
    for z in (q.sample((50,)), q.draw(torch.rand((50, *MASKED.shape), dtype=torch.float64))):
        assert q.log_prob(z).isfinite().all()
        assert (z == MASKED).all() == (logit > 0)
    values = q.enumerate_support()
    wanted = (values == MASKED).all(-1).float() if logit > 0 else base.log_prob(values).exp()
    assert torch.allclose(q.log_prob(values).exp(), wanted, atol=1e-6)


def test_a_draw_uses_what_is_left_of_its_number():
    """n = 20,000: given that it does not finish, the leftmost position is still revealed by its own probability."""
    n = 20_000
    q = FinishingSet(IndependentSet.bernoulli(torch.zeros(4, 4), MASKED), torch.zeros(4))
    z = q.draw(torch.rand((n, *MASKED.shape), dtype=torch.float64))[:, 0]
    goes_on = z[~z.all(-1)]
    wanted = torch.tensor(7 / 15)  # of 15 sets that are not everything, 7 have the first position
    seen = goes_on[:, 0].float().mean()
    assert abs(seen - wanted) < 5 * (wanted * (1 - wanted) / len(goes_on)).sqrt()


def test_no_closed_form_of_the_divergence():
    q = FinishingSet(BASES["non_empty"](), torch.randn(4))
    for other in (FinishingSet(BASES["non_empty"](), torch.randn(4)), q.base):
        with pytest.raises(NotImplementedError):
            kl_divergence(q, other)
