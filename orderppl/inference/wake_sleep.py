"""Reweighted wake-sleep with weights of every sequence's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyro.infer import Trace_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor

from orderppl.distributions.reveal_set import _weighted
from orderppl.inference.importance_weighted import log_mean_exp, weighted_metrics
from orderppl.inference.objective import Objective
from orderppl.inference.particles import particle_densities


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

    Raises:
        UserError: when called with a one-step program: the exponential of an estimate is no weight.
    """

    def __init__(
        self, num_particles: int = 8, max_plate_nesting: int = 1, vectorize_particles: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(num_particles, max_plate_nesting, vectorize_particles, **kwargs)
        del self.kl_weight  # a dial that this objective does not have

    def _get_traces(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Iterator[Any]:
        with _DetachedSamples():
            yield from super()._get_traces(model, guide, args, kwargs)

    def value_and_surrogate(
        self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """See `Objective`."""
        vectorized = self.vectorize_particles and self.num_particles > 1
        densities = particle_densities(self._get_traces(model, guide, args, kwargs), vectorized, "wake-sleep")
        log_weight = densities.log_weight().detach()  # [K, *]
        normalised = log_weight.softmax(0)
        log_joint = densities.log_likelihood + densities.log_prior
        surrogate = (_weighted(normalised, log_joint) + _weighted(normalised, densities.log_guide)).sum()
        bound = log_mean_exp(log_weight)
        self.metrics = weighted_metrics(densities, bound, normalised)
        return bound.sum(), surrogate


class _DetachedSamples(Messenger):
    """Stops gradients at sampled values: both densities are taken at given particles, reparameterised or not."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and msg["value"].requires_grad:
            msg["value"] = msg["value"].detach()
