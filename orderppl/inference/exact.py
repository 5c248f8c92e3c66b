"""Exact evidence, posterior and ELBO of small unmasking programs, by enumeration of all orders."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from orderppl.distributions import OrderedPartition
from orderppl.errors import UserError
from orderppl.inference.programs import Program
from orderppl.inference.sites import require_all_steps


class ExactTerms(NamedTuple):
    """Log-densities of all N orders of every sequence, float [N, B] each; differentiable.

    Attributes:
        orders: int64 [N, B, L].
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


def _trace_of_all_orders(program: Program, orders: Tensor, *args: Any, **batch: Any) -> poutine.Trace:
    # As context managers: Pyro's wrapped programs cannot be called with an argument named `context`.
    with poutine.trace() as tracer, poutine.condition(data={"reveal_step": orders}):
        program(*args, **batch)
    trace = tracer.trace
    for site in trace.nodes.values():
        require_all_steps(site.get("fn"), "an exact sum")
    trace.compute_log_prob()
    return trace


def _log_probs_of_all_orders(program: Program, orders: Tensor, *args: Any, **batch: Any) -> Tensor:
    """Log-density of every order under one program, float [N, B]."""
    trace = _trace_of_all_orders(program, orders, *args, **batch)
    return sum(site["log_prob"] for site in trace.nodes.values() if site["type"] == "sample")


def order_law(guide: Program, *args: Any, **batch: Any) -> OrderedPartition:
    """The distribution a guide draws `reveal_step` from.

    Raises:
        UserError: it has no such site, or one that is no `OrderedPartition`.
    """
    with poutine.trace() as tracer:
        guide(*args, **batch)
    site = tracer.trace.nodes.get("reveal_step")
    if site is None or not isinstance(site["fn"], OrderedPartition):
        what = "has no such site" if site is None else f"is a {type(site['fn']).__name__}, no OrderedPartition"
        raise UserError("reveal_step", f"the guide's site {what}", "exact sums need its support")
    return site["fn"]


def all_orders(guide: Program, *args: Any, **batch: Any) -> Tensor:
    """Every order the guide can draw for a batch, int64 [T**L, B, L]."""
    return order_law(guide, *args, **batch).enumerate_support()


def exact_evidence(model: Program, orders: Tensor, *args: Any, **batch: Any) -> Tensor:
    """Compute log p(x) = log sum_r p(x, r) per sequence, float [B], nats.

    Args:
        model: an unmasking program with a `reveal_step` site.
        orders: int64 [N, B, L] from `all_orders`.
        *args: the model's arguments.
        **batch: the model's arguments.
    """
    return _log_probs_of_all_orders(model, orders, *args, **batch).logsumexp(0)


def exact_terms(model: Program, guide: Program, orders: Tensor, *args: Any, **batch: Any) -> ExactTerms:
    """Score every order under both programs.

    Args:
        model: an unmasking program with a `reveal_step` site and one observed site.
        guide: its guide.
        orders: int64 [N, B, L] from `all_orders`.
        *args: the arguments of both.
        **batch: the arguments of both.
    """
    log_guide = _log_probs_of_all_orders(guide, orders, *args, **batch)
    sites = _trace_of_all_orders(model, orders, *args, **batch).nodes
    log_prior = sites["reveal_step"]["log_prob"]
    observed = [s["log_prob"] for s in sites.values() if s["type"] == "sample" and s["name"] != "reveal_step"]
    return ExactTerms(orders, sum(observed), log_prior, log_guide)


def exact_elbo(
    model: Program, guide: Program, orders: Tensor, kl_weight: float = 1.0, *args: Any, **batch: Any
) -> Tensor:
    """Compute E_q[ log p(x | r) + kl_weight (log p(r) - log q(r)) ] per sequence, float [B], nats; differentiable.

    Args:
        model: an unmasking program with a `reveal_step` site.
        guide: its guide.
        orders: int64 [N, B, L] from `all_orders`.
        kl_weight: 1 for the ELBO.
        *args: the arguments of both.
        **batch: the arguments of both.
    """
    return exact_terms(model, guide, orders, *args, **batch).elbo(kl_weight)
