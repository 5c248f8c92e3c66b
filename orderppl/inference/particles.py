"""Densities of every drawn particle of every sequence: what importance weights are made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import is_identically_zero
from pyro.infer.util import get_dependent_plate_dims, torch_sum
from pyro.poutine import Trace
from torch import Tensor

from orderppl.inference.programs import mean_metrics, order_metrics, reveal_sites


class ParticleDensities(NamedTuple):
    """Log-densities of K particles, float [K, *] each; `*` are the plates that all sites share ([B] in this library).

    Attributes:
        log_likelihood: observed sites of the model, log p(x | r).
        log_prior: its latent sites, log p(r).
        log_guide: sites of the guide, log q(r | x).
        score: the part of `log_guide` whose samples carry no gradient (discrete sites), without scales.
        metrics: see `Objective`; empty unless the pair is an unmasking program.
    """

    log_likelihood: Tensor
    log_prior: Tensor
    log_guide: Tensor
    score: Tensor
    metrics: dict[str, Tensor]

    def log_weight(self, kl_weight: float = 1.0) -> Tensor:
        """log w = log p(x | r) + kl_weight (log p(r) - log q(r | x)), float [K, *]."""
        return self.log_likelihood + kl_weight * (self.log_prior - self.log_guide)


def particle_densities(traces: Iterable[tuple[Trace, Trace]], vectorized: bool) -> ParticleDensities:
    """Add up the sites of (model, guide) traces.

    Args:
        traces: all particles in one pair of traces, or one particle in each.
        vectorized: whether the traces have the particles as leftmost dimension.
    """
    found, metrics = [], []
    for model_trace, guide_trace in traces:
        sites = reveal_sites(model_trace, guide_trace)
        found.append(_densities(model_trace, guide_trace))
        if sites is not None:
            log_likelihood, log_prior, log_guide, _ = (density.sum() for density in found[-1])
            metrics.append(order_metrics(log_likelihood, log_guide - log_prior, sites.guide["value"]))
    together = found[0] if vectorized else [torch.stack(parts) for parts in zip(*found, strict=True)]
    likelihood, prior, guide, score = together
    return ParticleDensities(likelihood, prior, guide, score, mean_metrics(metrics))


def _densities(model_trace: Trace, guide_trace: Trace) -> list[Tensor]:
    latent = [site for site in guide_trace.nodes.values() if site["type"] == "sample"]
    generative = [site for site in model_trace.nodes.values() if site["type"] == "sample"]
    observed = [site for site in generative if site["is_observed"]]
    prior = [site for site in generative if not site["is_observed"]]
    dims = get_dependent_plate_dims(latent + generative)  # plates that only some of the sites are in

    def total(terms: Iterable[Any]) -> Any:
        return sum(torch_sum(term, dims) for term in terms if not is_identically_zero(term))

    totals = [
        total(site["log_prob"] for site in observed),
        total(site["log_prob"] for site in prior),
        total(site["log_prob"] for site in latent),
        total(site["score_parts"].score_function for site in latent),
    ]
    like = next(density for density in totals if isinstance(density, Tensor))
    return list(torch.broadcast_tensors(*(torch.zeros_like(like) + t for t in totals)))
