"""Decoding: reveal policies, set-size schedules and the one loop that runs them."""

from orderppl.decoding.adaptive import EntropyBound, Factor, Klass, Threshold
from orderppl.decoding.alternatives import Alternatives, alternatives_at_reveal
from orderppl.decoding.decisions import NetworkPlan, PlannedOrder, StochasticDecision
from orderppl.decoding.decode import DecodeOutput, PathOutput, decode, follow
from orderppl.decoding.generate import GenerateOutput, generate
from orderppl.decoding.heuristic import Heuristic
from orderppl.decoding.oracles import GreedyOracle, OracleMargin
from orderppl.decoding.policy import Policy, ScoredPolicy, StochasticPolicy
from orderppl.decoding.ranking import Entropy, LeftToRight, Margin, Random, RankPolicy, TopProb
from orderppl.decoding.registry import POLICIES, describe_policy, make_policy
from orderppl.decoding.scheduler import RevealScheduler, SchedulerOutput
from orderppl.decoding.schedules import CosineSizes, FractionalSizes, SetSizes, UniformSizes, make_sizes
from orderppl.decoding.wrappers import AnswerReady, Block, EosAware
from orderppl.randomness import uniform_noise

__all__ = [
    "POLICIES",
    "Alternatives",
    "AnswerReady",
    "Block",
    "CosineSizes",
    "DecodeOutput",
    "Entropy",
    "EntropyBound",
    "EosAware",
    "Factor",
    "FractionalSizes",
    "GenerateOutput",
    "GreedyOracle",
    "Heuristic",
    "Klass",
    "LeftToRight",
    "Margin",
    "NetworkPlan",
    "OracleMargin",
    "PathOutput",
    "PlannedOrder",
    "Policy",
    "Random",
    "RankPolicy",
    "RevealScheduler",
    "SchedulerOutput",
    "ScoredPolicy",
    "SetSizes",
    "StochasticDecision",
    "StochasticPolicy",
    "Threshold",
    "TopProb",
    "UniformSizes",
    "alternatives_at_reveal",
    "decode",
    "describe_policy",
    "follow",
    "generate",
    "make_policy",
    "make_sizes",
    "uniform_noise",
]
