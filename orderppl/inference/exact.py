"""Exact evidence, posterior and ELBO of small unmasking programs, by enumeration of all orders."""

from __future__ import annotations

from typing import NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from orderppl.distributions import OrderDistribution
from orderppl.errors import UserError
from orderppl.inference.programs import Program
from orderppl.unmasking import Batch


class ExactTerms(NamedTuple):
    """Log-densities of all N orders of every sequence, float [N, B] each; differentiable.

    Attributes:
        orders: int64 [N, B, S].
        log_likelihood: log p(x | r).
        log_prior: log p(r); -inf for orders that padding repeats.
        log_guide: log q(r | x); -inf likewise.
    """

    orders: Tensor
    log_likelihood: Tensor
    log_prior: Tensor
    log_guide: Tensor

    def elbo(self, kl_weight: float = 1.0) -> Tensor:
        """E_q[ log p(x | r) + kl_weight (log p(r) - log q(r)) ] per sequence, float [B], nats."""
        possible = self.log_guide > -torch.inf
        log_q = self.log_guide.masked_fill(~possible, 0.0)
        value = self.log_likelihood + kl_weight * (self.log_prior - log_q)
        return torch.where(possible, log_q.exp() * value.masked_fill(~possible, 0.0), 0.0).sum(0)

    def log_joint(self) -> Tensor:
        """log p(x, r), float [N, B]."""
        return self.log_likelihood + self.log_prior

    def posterior(self) -> Tensor:
        """p(r | x), float [N, B]; sums to 1 over the orders."""
        return self.log_joint().softmax(0)


def _sites_of_all_orders(program: Program, orders: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Log-density of every order at every site of one program, float [N, B] (or [B]).

    Raises:
        UserError: a site outside of the plate of the sequences, or another latent one.
    """
    with poutine.trace() as tracer, poutine.condition(data={"reveal_step": orders}):
        program(batch)
    trace = poutine.util.prune_subsample_sites(tracer.trace)
    trace.compute_log_prob()
    sites = {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
    for name, site in sites.items():
        if not site["is_observed"]:
            raise UserError(name, "is drawn besides the order", "exact sums are over orders alone")
    densities = {name: site["log_prob"] for name, site in sites.items()}
    for name, density in densities.items():
        if density.shape[-1:] != (len(Batch.of(batch)),):
            raise UserError(name, "is no term of one sequence", "sample it within the plate over the batch")
    return densities


def _added(densities: dict[str, Tensor]) -> Tensor:
    return sum(densities.values(), torch.zeros(()))


def order_distribution(guide: Program, batch: Batch) -> OrderDistribution:
    """The distribution a guide draws `reveal_step` from.

    Raises:
        UserError: it has no such site, or one that is no `OrderDistribution`.
    """
    with poutine.trace() as tracer:
        guide(batch)
    site = tracer.trace.nodes.get("reveal_step")
    if site is None or not isinstance(site["fn"], OrderDistribution):
        what = "the guide has no such site"
        if site is not None:
            what = f"the guide's site is a {type(site['fn']).__name__}, no OrderDistribution"
        raise UserError("reveal_step", what, "exact sums need its support")
    return site["fn"]


def all_orders(guide: Program, batch: Batch) -> Tensor:
    """Every order the guide can draw for a batch, int64 [T**C, B, S]."""
    return order_distribution(guide, batch).enumerate_support()


def exact_evidence(model: Program, orders: Tensor, batch: Batch) -> Tensor:
    """Compute log p(x) = log sum_r p(x, r) per sequence, float [B], nats.

    Args:
        model: an unmasking program with a `reveal_step` site.
        orders: int64 [N, B, S] from `all_orders`.
        batch: clean sequences.
    """
    return _added(_sites_of_all_orders(model, orders, batch)).logsumexp(0)


def exact_terms(model: Program, guide: Program, orders: Tensor, batch: Batch) -> ExactTerms:
    """Score every order under both programs.

    Args:
        model: an unmasking program with a `reveal_step` site and one observed site.
        guide: its guide.
        orders: int64 [N, B, S] from `all_orders`.
        batch: clean sequences.
    """
    log_guide = _added(_sites_of_all_orders(guide, orders, batch))
    densities = _sites_of_all_orders(model, orders, batch)
    log_prior = densities.pop("reveal_step")
    return ExactTerms(orders, _added(densities), log_prior, log_guide)


def exact_elbo(model: Program, guide: Program, orders: Tensor, batch: Batch, kl_weight: float = 1.0) -> Tensor:
    """Compute E_q[ log p(x | r) + kl_weight (log p(r) - log q(r)) ] per sequence, float [B], nats; differentiable.

    Args:
        model: an unmasking program with a `reveal_step` site.
        guide: its guide.
        orders: int64 [N, B, S] from `all_orders`.
        batch: clean sequences.
        kl_weight: 1 for the ELBO.
    """
    return exact_terms(model, guide, orders, batch).elbo(kl_weight)
