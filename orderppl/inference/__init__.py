"""Objectives for a (model, guide) pair, and the loop that optimises them."""

from orderppl.inference.annealing import Anneal
from orderppl.inference.batches import BatchStream
from orderppl.inference.enumerated import EnumeratedELBO
from orderppl.inference.exact import all_orders, exact_elbo, exact_evidence, exact_terms
from orderppl.inference.fitting import FitSettings, fit
from orderppl.inference.imitation import Imitation
from orderppl.inference.importance_weighted import ImportanceWeightedELBO, SequenceWakeSleep, importance_bound
from orderppl.inference.objective import Objective
from orderppl.inference.refine import refine_plan
from orderppl.inference.reveal_elbo import RevealTraceGraph_ELBO
from orderppl.inference.trainer import FitResult, TrainSettings, train

__all__ = [
    "Anneal",
    "BatchStream",
    "EnumeratedELBO",
    "FitResult",
    "FitSettings",
    "Imitation",
    "ImportanceWeightedELBO",
    "Objective",
    "RevealTraceGraph_ELBO",
    "SequenceWakeSleep",
    "TrainSettings",
    "all_orders",
    "exact_elbo",
    "exact_evidence",
    "exact_terms",
    "fit",
    "importance_bound",
    "refine_plan",
    "train",
]
