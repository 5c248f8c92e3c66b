"""Objectives for a (model, guide) pair, and the loop that optimises them."""

from orderppl.inference.annealing import Anneal
from orderppl.inference.batches import BatchStream
from orderppl.inference.elbo import RevealTraceGraph_ELBO
from orderppl.inference.enumerated import EnumeratedELBO
from orderppl.inference.exact import ExactTerms, all_orders, exact_elbo, exact_evidence, exact_terms
from orderppl.inference.fit import OrderLoss, fit
from orderppl.inference.imitation import Imitation
from orderppl.inference.importance_weighted import ImportanceWeightedELBO, importance_bound
from orderppl.inference.objective import Objective
from orderppl.inference.optimise import FitResult, optimise
from orderppl.inference.refine import Refinement, refine_plan
from orderppl.inference.relaxed import RelaxedELBO
from orderppl.inference.wake_sleep import SequenceWakeSleep

__all__ = [
    "Anneal",
    "BatchStream",
    "EnumeratedELBO",
    "ExactTerms",
    "FitResult",
    "Imitation",
    "ImportanceWeightedELBO",
    "Objective",
    "OrderLoss",
    "Refinement",
    "RelaxedELBO",
    "RevealTraceGraph_ELBO",
    "SequenceWakeSleep",
    "all_orders",
    "exact_elbo",
    "exact_evidence",
    "exact_terms",
    "fit",
    "importance_bound",
    "optimise",
    "refine_plan",
]
