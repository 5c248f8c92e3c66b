"""Objectives for a (model, guide) pair, and the loop that optimises them."""

from orderppl.inference.annealing import Anneal
from orderppl.inference.enumerated import EnumeratedELBO
from orderppl.inference.imitation import Imitation
from orderppl.inference.importance_weighted import ImportanceWeightedELBO, SequenceWakeSleep
from orderppl.inference.reveal_elbo import RevealTraceGraph_ELBO
from orderppl.inference.rollouts import AnswerReward, LikelihoodReward, Rollout

__all__ = [
    "Anneal",
    "AnswerReward",
    "EnumeratedELBO",
    "Imitation",
    "ImportanceWeightedELBO",
    "LikelihoodReward",
    "RevealTraceGraph_ELBO",
    "Rollout",
    "SequenceWakeSleep",
]
