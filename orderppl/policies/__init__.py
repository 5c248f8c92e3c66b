"""Policies: distributions over the next reveal set. Heuristics, wrappers around any policy, plans, oracles."""

from orderppl.policies.adaptive import EntropyBound, Factor, Klass, Threshold
from orderppl.policies.early_commit import EarlyCommit
from orderppl.policies.look_ahead import LookAhead
from orderppl.policies.oracles import CorrectOracle, Oracle
from orderppl.policies.plans import Dilated, FixedOrder, Halved, Plan, RandomSteps, ScanPlan
from orderppl.policies.policy import LogitPolicy, Policy, Renormalised
from orderppl.policies.price import PriceRange
from orderppl.policies.ranked import PositionWeighted, Ranked
from orderppl.policies.scans import ScanPolicy
from orderppl.policies.wrappers import AtPrice, Blocks, Eager, EndStop, EosAware, Smoothed, Spaced

__all__ = [
    "AtPrice",
    "Blocks",
    "CorrectOracle",
    "Dilated",
    "Eager",
    "EarlyCommit",
    "EndStop",
    "EntropyBound",
    "EosAware",
    "Factor",
    "FixedOrder",
    "Halved",
    "Klass",
    "LogitPolicy",
    "LookAhead",
    "Oracle",
    "Plan",
    "Policy",
    "PositionWeighted",
    "PriceRange",
    "RandomSteps",
    "Ranked",
    "Renormalised",
    "ScanPlan",
    "ScanPolicy",
    "Smoothed",
    "Spaced",
    "Threshold",
]
