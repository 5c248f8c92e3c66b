"""Objectives for a (model, guide) pair, and the loop that optimises them."""

from orderppl.inference.annealing import Anneal
from orderppl.inference.enumerated import EnumeratedELBO
from orderppl.inference.fitting import FitSettings, fit
from orderppl.inference.imitation import Imitation
from orderppl.inference.importance_weighted import ImportanceWeightedELBO, SequenceWakeSleep
from orderppl.inference.refine import refine_plan
from orderppl.inference.reveal_elbo import RevealTraceGraph_ELBO

__all__ = [
    "Anneal",
    "EnumeratedELBO",
    "FitSettings",
    "Imitation",
    "ImportanceWeightedELBO",
    "RevealTraceGraph_ELBO",
    "SequenceWakeSleep",
    "fit",
    "refine_plan",
]
