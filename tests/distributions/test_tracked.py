"""Dependence on earlier draws at the border of a distribution."""

from __future__ import annotations

import torch
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from torch.distributions import kl_divergence

from orderppl.distributions import IndependentSet
from orderppl.distributions.tracked import Tracked

MASKED = torch.tensor([[True, True, False], [True, False, False]])


def sets() -> IndependentSet:
    return IndependentSet.bernoulli(torch.randn(2, 3), MASKED, non_empty=True)


def test_densities_carry_what_value_and_parameters_depend_on():
    base, names = sets(), frozenset({"reveal_0"})
    tracked = Tracked(base, names)
    value = track_provenance(base.sample(), frozenset({"reveal_1"}))
    log_prob = tracked.log_prob(value)
    assert get_provenance(log_prob) == {"reveal_0", "reveal_1"}
    assert torch.equal(detach_provenance(log_prob), base.log_prob(detach_provenance(value)))
    assert get_provenance(tracked.sample()) == names
    assert not get_provenance(base.log_reveal)


def test_divergences_are_those_of_the_bases():
    q, p = sets(), sets()
    names = frozenset({"a"}), frozenset({"b"})
    both = kl_divergence(Tracked(q, names[0]), Tracked(p, names[1]))
    assert get_provenance(both) == {"a", "b"}
    assert torch.equal(detach_provenance(both), kl_divergence(q, p))
    assert get_provenance(kl_divergence(q, Tracked(p, names[1]))) == {"b"}
    assert get_provenance(kl_divergence(Tracked(q, names[0]), p)) == {"a"}


def test_the_rest_is_the_base():
    base = sets()
    tracked = Tracked(base, frozenset({"a"})).expand(torch.Size([4, 2]))
    assert tracked.batch_shape == (4, 2)
    assert tracked.event_shape == (3,)
    assert tracked.provenance == {"a"}
    assert torch.equal(tracked.enumerate_support(), base.expand(torch.Size([4, 2])).enumerate_support())
    torch.manual_seed(0)
    mine = tracked.sample()
    torch.manual_seed(0)
    assert torch.equal(detach_provenance(mine), base.expand(torch.Size([4, 2])).sample())
