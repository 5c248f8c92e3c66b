"""Objectives for a (model, guide) pair, and the loop that optimises them."""

from orderppl.inference.annealing import Anneal
from orderppl.inference.batches import BatchStream
from orderppl.inference.elbo import RevealTraceGraph_ELBO
from orderppl.inference.exact import all_orders, exact_elbo, exact_evidence
from orderppl.inference.fit import OrderLoss, fit
from orderppl.inference.optimise import FitResult, optimise

__all__ = [
    "Anneal",
    "BatchStream",
    "FitResult",
    "OrderLoss",
    "RevealTraceGraph_ELBO",
    "all_orders",
    "exact_elbo",
    "exact_evidence",
    "fit",
    "optimise",
]
