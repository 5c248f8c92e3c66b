"""Distributions over reveal sets and over ordered partitions, with closed-form Kullback-Leibler divergences."""

from orderppl.distributions.autoregressive_order import AutoregressiveOrder
from orderppl.distributions.autoregressive_set import AutoregressiveSet
from orderppl.distributions.independent_set import IndependentSet
from orderppl.distributions.order_distribution import OrderDistribution
from orderppl.distributions.ranked_set import RankedSet
from orderppl.distributions.set_distribution import DecidedSet, SetDistribution
from orderppl.distributions.stepwise_order import StepwiseOrder

__all__ = [
    "AutoregressiveOrder",
    "AutoregressiveSet",
    "DecidedSet",
    "IndependentSet",
    "OrderDistribution",
    "RankedSet",
    "SetDistribution",
    "StepwiseOrder",
]
