"""The importance-weighted bound, per sequence: training and evaluation."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from orderppl.distributions.reveal_set import _weighted
from orderppl.errors import UserError
from orderppl.inference.objective import Objective
from orderppl.inference.particles import ParticleDensities, particle_densities


class ImportanceWeightedELBO(Objective, Trace_ELBO):
    """The bound with K orders per sequence, its guide trained by the leave-one-out score function.

        L_K = log (1/K) sum_k w_k,      w_k = p(x, r_k) / q(r_k | x),   r_k ~ q

    K = 1 is the ELBO; E[L_K] grows with K to log p(x), or to log of the part of p(x) that q reaches (a renormalised
    score guide never leaves its best position out, a policy that must reveal something never waits). With normalised
    weights v_k = w_k / sum_j w_j and L_{-k} the bound in which w_k is replaced by the geometric mean of the other
    weights (VIMCO),

        surrogate = sum_k [ stop(v_k) log w_k + stop(L_K - L_{-k}) log q(r_k | x) ]

    Its gradient is unbiased for that of E[L_K], for the parameters of model and guide alike; L_{-k} does not depend on
    r_k. Reparameterised sites get their path-wise gradient and no score. Orders are weighed per sequence; sites outside
    a common plate are added up over their plates first. Monte-Carlo value: unbiased for E[L_K], below log p(x).

    Reference: Burda et al., arXiv 1509.00519, eq. 8; Mnih & Rezende, arXiv 1602.06725, eq. 10.

    Args:
        num_particles: K.
        max_plate_nesting: see `Objective`.
        vectorize_particles: see `Objective`.
        kl_weight: exponent of p(r) / q(r | x) in the weights; 1 is the bound.

    Attributes:
        metrics: those of `Objective`, with `kl` the mean of log q - log p, and per sequence `bound` (L_K, nats) and
            `effective_particles`, 1 / sum_k v_k^2.

    Raises:
        UserError: when called with a one-step program: the exponential of an estimate is no weight.
    """

    def value_and_surrogate(
        self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """See `Objective`."""
        densities = self.densities(model, guide, args, kwargs)
        log_weight = densities.log_weight(self.kl_weight)  # [K, *]
        normalised = log_weight.detach().softmax(0)
        bound = log_mean_exp(log_weight.detach())  # [*]
        learned = bound - _bound_without(log_weight.detach())  # [K, *]
        surrogate = (_weighted(normalised, log_weight) + learned * densities.score).sum()
        self.metrics = weighted_metrics(densities, bound, normalised)
        return bound.sum(), surrogate

    def densities(self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ParticleDensities:
        """Draw K particles and score them."""
        vectorized = self.vectorize_particles and self.num_particles > 1
        return particle_densities(self._get_traces(model, guide, args, kwargs), vectorized, "an importance weight")


def log_mean_exp(log_weight: Tensor) -> Tensor:
    """log of the mean of exp over the first dimension, float [K, *] -> [*]."""
    return log_weight.logsumexp(0) - math.log(len(log_weight))


def weighted_metrics(densities: ParticleDensities, bound: Tensor, normalised: Tensor) -> dict[str, Tensor]:
    """Numbers of an objective of weights (float [K, *], normalised) with a bound (float [*])."""
    if not densities.metrics:
        return {}
    effective = normalised.square().sum(0).reciprocal()
    return densities.metrics | {"bound": bound.mean(), "effective_particles": effective.mean()}


def _bound_without(log_weight: Tensor) -> Tensor:
    """L_{-k}: the bound with the geometric mean of the other weights in place of w_k, float [K, *]; 0 for K = 1."""
    count = len(log_weight)
    if count == 1:
        return torch.zeros_like(log_weight)
    own = torch.eye(count, dtype=torch.bool, device=log_weight.device)
    own = own.reshape((count, count) + (1,) * (log_weight.dim() - 1))  # [K left out, K, ..]
    others = log_weight.expand((count,) + log_weight.shape)
    mean = others.masked_fill(own, 0.0).sum(1, keepdim=True) / (count - 1)
    return torch.where(own, mean, others).logsumexp(1) - math.log(count)


def importance_bound(log_weights: Tensor, num_particles: int | None = None) -> Tensor:
    """The bound L_K of every sequence from log weights.

    Args:
        log_weights: float [N, B], `orderppl.diagnostics.draw_orders(...).log_weight`: drawn a few at a time, any N
            fits in memory.
        num_particles: K at most N; all N when left out. With fewer, the mean over the N // K groups of K draws.

    Returns:
        float [B], nats.

    Raises:
        UserError: K is not within 1..N.
    """
    drawn = len(log_weights)
    count = drawn if num_particles is None else num_particles
    if not 1 <= count <= drawn:
        raise UserError("num_particles", f"{count} is not within 1..{drawn}", "draw more orders")
    groups = log_weights[: drawn // count * count].unflatten(0, (count, -1))  # [K, N // K, B]
    return log_mean_exp(groups).mean(0)
