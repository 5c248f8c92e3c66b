"""Distributions over reveal sets and over ordered partitions, with closed-form Kullback-Leibler divergences."""

from orderppl.distributions.finishing_set import FinishingSet
from orderppl.distributions.heuristic_reveal import HeuristicReveal
from orderppl.distributions.ordered_partition import OrderedPartition, SequentialReveal
from orderppl.distributions.plackett_luce import PlackettLuceReveal, PlackettLuceSet, UniformSet
from orderppl.distributions.priced_reveal import PricedReveal
from orderppl.distributions.renormalised_reveal import RenormalisedReveal
from orderppl.distributions.reveal_set import BernoulliSet, RenormalisedSet, RevealSet, SmoothedSet
from orderppl.distributions.revealed_tokens import HiddenTokens, RevealedTokens
from orderppl.distributions.set_law import SetLaw
from orderppl.distributions.stepwise_reveal import StepwiseReveal
from orderppl.distributions.tracked import Tracked

__all__ = [
    "BernoulliSet",
    "FinishingSet",
    "HeuristicReveal",
    "HiddenTokens",
    "OrderedPartition",
    "PlackettLuceReveal",
    "PlackettLuceSet",
    "PricedReveal",
    "RenormalisedReveal",
    "RenormalisedSet",
    "RevealSet",
    "RevealedTokens",
    "SequentialReveal",
    "SetLaw",
    "SmoothedSet",
    "StepwiseReveal",
    "Tracked",
    "UniformSet",
]
