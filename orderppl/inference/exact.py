"""Exact evidence and ELBO of small unmasking programs, by enumeration of all orders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from orderppl.distributions import OrderedPartition

Program = Callable[..., Any]


def _log_probs_of_all_orders(program: Program, orders: Tensor, **batch: Tensor) -> Tensor:
    """Log-density of every order under one program, float [N, B]."""
    # As context managers: Pyro's wrapped programs cannot be called with an argument named `context`.
    with poutine.trace() as tracer, poutine.condition(data={"reveal_step": orders}):
        program(**batch)
    trace = tracer.trace
    trace.compute_log_prob()
    return sum(site["log_prob"] for site in trace.nodes.values() if site["type"] == "sample")


def all_orders(guide: Program, **batch: Tensor) -> Tensor:
    """Every order the guide can draw for a batch, int64 [T**L, B, L]."""
    fn = poutine.trace(guide).get_trace(**batch).nodes["reveal_step"]["fn"]
    if not isinstance(fn, OrderedPartition):
        raise TypeError(f"reveal_step: {type(fn).__name__} is no OrderedPartition; exact sums need its support")
    return fn.enumerate_support()


def exact_evidence(model: Program, orders: Tensor, **batch: Tensor) -> Tensor:
    """Compute log p(x) = log sum_r p(x, r) per sequence, float [B], nats.

    Args:
        model: an unmasking program with a `reveal_step` site.
        orders: int64 [N, B, L] from `all_orders`.
        **batch: the model's arguments.
    """
    return _log_probs_of_all_orders(model, orders, **batch).logsumexp(0)


def exact_elbo(model: Program, guide: Program, orders: Tensor, kl_weight: float = 1.0, **batch: Tensor) -> Tensor:
    """Compute E_q[ log p(x | r) + kl_weight (log p(r) - log q(r)) ] per sequence, float [B], nats; differentiable.

    Args:
        model: an unmasking program with a `reveal_step` site.
        guide: its guide.
        orders: int64 [N, B, L] from `all_orders`.
        kl_weight: 1 for the ELBO.
        **batch: the arguments of both.
    """
    log_q = _log_probs_of_all_orders(guide, orders, **batch)
    possible = log_q > -torch.inf
    log_q = log_q.masked_fill(~possible, 0.0)
    log_joint = _log_probs_of_all_orders(model, orders, **batch)

    def prior(**batch: Tensor) -> None:
        with poutine.block(expose=["reveal_step"]):
            model(**batch)

    log_prior = _log_probs_of_all_orders(prior, orders, **batch)
    value = log_joint - log_prior + kl_weight * (log_prior - log_q)
    return torch.where(possible, log_q.exp() * value.masked_fill(~possible, 0.0), 0.0).sum(0)
