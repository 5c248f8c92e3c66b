"""Whole orders from one score per position: ranked and cut into steps, or renormalised over what is left."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from orderppl.distributions.independent_set import IndependentSet
from orderppl.distributions.order_distribution import OrderDistribution
from orderppl.distributions.ranked_set import RankedSet, open_uniform, perturbed, rank_masked
from orderppl.unmasking.trajectory import VISIBLE


class RankedOrder(OrderDistribution):
    """Positions ranked by score + Gumbel noise and cut into steps of given sizes.

        r_i = number of steps whose cumulative size is at most the rank of i

    As a chain of sets, z_t is a `RankedSet` of M_t: the ranking of what is left is Plackett-Luce again. With one
    position a step, p(r) = prod_t w_(t) / sum_{j in M_t} w_j (Plackett 1975), the guide of LO-ARM (arXiv 2503.05979).

    Args:
        scores: float [*, S], log weights.
        sizes: int64 [*, T], positions revealed at each step; sums to the number of masked positions.
        masked: bool [*, S].
        single: whether every size is known to be at most 1; see `RankedSet`.
    """

    def __init__(
        self, scores: Tensor, sizes: Tensor, masked: Tensor, single: bool = False, validate_args: bool | None = None
    ) -> None:
        self.scores, masked = torch.broadcast_tensors(scores, masked)
        self.sizes = sizes.expand(masked.shape[:-1] + sizes.shape[-1:])
        self.single = single
        super().__init__(masked, sizes.shape[-1], validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> RankedOrder:
        """Return the same distribution at a broader batch shape."""
        shape = torch.Size(batch_shape)
        scores, masked = self.scores.expand(shape + self.event_shape), self.masked.expand(shape + self.event_shape)
        sizes = self.sizes.expand(shape + self.sizes.shape[-1:])
        return RankedOrder(scores, sizes, masked, self.single, validate_args=self._validate_args)

    def set_at(self, masked: Tensor, step: Tensor) -> RankedSet:
        """The next `sizes[step]` positions of the ranking."""
        shape = torch.broadcast_shapes(masked.shape, self.masked.shape)  # enumerated orders lack the batch
        sizes = self.sizes.expand(shape[:-1] + self.sizes.shape[-1:])
        size = sizes.gather(-1, step.expand(shape[:-1])[..., None])[..., 0]
        return RankedSet(self.scores, size, masked.expand(shape), self.single)

    def _cut(self, keys: Tensor) -> Tensor:
        """Orders from keys, high first: int64 [*, S]."""
        rank = rank_masked(keys, self.masked)  # [*, S]
        cuts = self.sizes.cumsum(-1)[..., :-1]  # [*, T - 1]
        step = (cuts[..., None, :] <= rank[..., None]).sum(-1)
        return step.masked_fill(~self.masked, VISIBLE)

    @property
    def mode(self) -> Tensor:
        """The order of the scores, int64 [*, S]."""
        return self._cut(self.scores)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Draw whole orders by one ranking, int64 [*sample_shape, *, S]."""
        with torch.no_grad():
            return self.draw(open_uniform(torch.Size(sample_shape) + self.masked.shape, self.scores))

    def draw(self, noise: Tensor) -> Tensor:
        """See `OrderDistribution`."""
        return self._cut(perturbed(self.scores, noise))


class RenormalisedOrder(OrderDistribution):
    """The paper's posterior over whole orders: a chain of renormalised sets from one score per position.

        q_i(M_t) = exp((s_i - max_{j in M_t} s_j) / temperature)

    Every step reveals at least the best position left; see `IndependentSet.renormalised`.

    Args:
        scores: float [*, S].
        temperature: positive; small values reveal few positions a step.
        num_steps: T.
        masked: bool [*, S].
    """

    def __init__(
        self, scores: Tensor, temperature: float, num_steps: int, masked: Tensor, validate_args: bool | None = None
    ) -> None:
        self.scores, masked = torch.broadcast_tensors(scores, masked)
        self.temperature = temperature
        super().__init__(masked, num_steps, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> RenormalisedOrder:
        """Return the same distribution at a broader batch shape."""
        shape = torch.Size(batch_shape) + self.event_shape
        scores, masked = self.scores.expand(shape), self.masked.expand(shape)
        return RenormalisedOrder(scores, self.temperature, self.num_steps, masked, validate_args=self._validate_args)

    def set_at(self, masked: Tensor, step: Tensor) -> IndependentSet:
        """Renormalise the scores over what is still masked; the step itself does not matter."""
        return IndependentSet.renormalised(self.scores, self.temperature, masked)
