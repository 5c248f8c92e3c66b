"""Objectives for a (model, guide) pair, and the loop that optimises them."""

from orderppl.inference.elbo import RevealTraceGraph_ELBO
from orderppl.inference.exact import exact_elbo, exact_evidence

__all__ = ["RevealTraceGraph_ELBO", "exact_elbo", "exact_evidence"]
