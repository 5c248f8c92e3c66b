"""Distributions over reveal sets and over ordered partitions, with closed-form Kullback-Leibler divergences."""

from orderppl.distributions.autoregressive_order import AutoregressiveOrder
from orderppl.distributions.finishing_set import FinishingSet
from orderppl.distributions.independent_set import IndependentSet, decided_set
from orderppl.distributions.order_distribution import OrderDistribution, PolicyOrder, SetSequence
from orderppl.distributions.ranked_order import RankedOrder, RenormalisedOrder
from orderppl.distributions.ranked_set import RankedSet, UniformSet
from orderppl.distributions.revealed_tokens import HiddenTokens, RevealedTokens
from orderppl.distributions.set_distribution import DecidedSet, SetDistribution
from orderppl.distributions.stepwise_order import StepwiseOrder
from orderppl.distributions.tracked import Tracked

__all__ = [
    "AutoregressiveOrder",
    "DecidedSet",
    "FinishingSet",
    "HiddenTokens",
    "IndependentSet",
    "OrderDistribution",
    "PolicyOrder",
    "RankedOrder",
    "RankedSet",
    "RenormalisedOrder",
    "RevealedTokens",
    "SetDistribution",
    "SetSequence",
    "StepwiseOrder",
    "Tracked",
    "UniformSet",
    "decided_set",
]
