"""Objectives of importance weights per sequence: the importance-weighted bound and wake-sleep."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from pyro.infer import Trace_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor

from orderppl.distributions.independent_set import weighted
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
        surrogate = (weighted(normalised, log_weight) + learned * densities.score).sum()
        self.metrics = weighted_metrics(densities, bound, normalised)
        return bound.sum(), surrogate

    def densities(self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ParticleDensities:
        """Draw K particles and score them."""
        vectorized = self.vectorize_particles and self.num_particles > 1
        return particle_densities(self._get_traces(model, guide, args, kwargs), vectorized)


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


class SequenceWakeSleep(Objective, Trace_ELBO):
    """Reweighted wake-sleep, both wake phases, with weights normalised per sequence.

        w_k = p(x, r_k) / q(r_k | x),   v_k = w_k / sum_j w_j,   r_k ~ q
        surrogate = sum_k stop(v_k) [ log p(x, r_k) + log q(r_k | x) ]

    wake-theta: the gradient for the model is unbiased for that of E[L_K] (`ImportanceWeightedELBO`) at a fixed guide.
    wake-phi: the gradient for the guide is that of -KL(p(r | x) || q), **biased** at finite K (self-normalised
    weights, O(1/K)) and consistent as K grows; p(r | x) is restricted to the orders that q can draw. Value: L_K, the
    importance-weighted bound; it is not what the guide climbs. `pyro.infer.ReweightedWakeSleep` gives one weight to a
    whole batch, which leaves one sequence of it with a useful weight; here every sequence has weights of its own. No
    sleep phase: the stacked program cannot dream.

    Reference: Bornschein & Bengio, arXiv 1406.2751; Le et al., arXiv 1805.10469, eq. 5-6.

    Args:
        num_particles: K, at least 2 for the guide to learn anything.
        max_plate_nesting: see `Objective`.
        vectorize_particles: see `Objective`.

    Attributes:
        metrics: as `ImportanceWeightedELBO`.
    """

    def __init__(
        self, num_particles: int = 8, max_plate_nesting: int = 1, vectorize_particles: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(num_particles, max_plate_nesting, vectorize_particles, **kwargs)
        del self.kl_weight  # a setting that this objective does not have

    def _get_traces(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Iterator[Any]:
        with _DetachedSamples():
            yield from super()._get_traces(model, guide, args, kwargs)

    def value_and_surrogate(
        self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """See `Objective`."""
        vectorized = self.vectorize_particles and self.num_particles > 1
        densities = particle_densities(self._get_traces(model, guide, args, kwargs), vectorized)
        log_weight = densities.log_weight().detach()  # [K, *]
        normalised = log_weight.softmax(0)
        log_joint = densities.log_likelihood + densities.log_prior
        surrogate = (weighted(normalised, log_joint) + weighted(normalised, densities.log_guide)).sum()
        bound = log_mean_exp(log_weight)
        self.metrics = weighted_metrics(densities, bound, normalised)
        return bound.sum(), surrogate


class _DetachedSamples(Messenger):
    """Stops gradients at sampled values: both densities are taken at given particles, reparameterised or not."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and msg["value"].requires_grad:
            msg["value"] = msg["value"].detach()
