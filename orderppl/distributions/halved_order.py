"""Orders whose steps are played in two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions.kl import kl_divergence, register_kl

from orderppl.distributions.order_distribution import OrderDistribution


def halved(order: Tensor, num_steps: int) -> Tensor:
    """Every other position of each step first, the ones between them after it: int64 [*, S] -> [*, S].

        r'_i = 2 r_i + (number of positions before i that have its step) mod 2

    Args:
        order: int64 [*, S], -1 where nothing is revealed.
        num_steps: steps of the order.
    """
    fine = order
    for step in range(num_steps):
        same = order == step
        fine = torch.where(same, 2 * step + (same.long().cumsum(-1) - 1) % 2, fine)
    return fine


class HalvedOrder(OrderDistribution):
    """An order of T / 2 steps, each played in two (see `halved`): as probable as the order it comes from.

        log p(r') = log p(r),      r = floor(r' / 2)

    Args:
        coarse: the distribution of the order r.
    """

    has_steps = False

    def __init__(self, coarse: OrderDistribution, validate_args: bool | None = None) -> None:
        self.coarse = coarse
        super().__init__(coarse.masked, 2 * coarse.num_steps, validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> HalvedOrder:
        """Return the same distribution at a broader batch shape."""
        return HalvedOrder(self.coarse.expand(batch_shape), self._validate_args)._sharing_like(self)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of an order, int64 [*, S] -> float [*]; -inf where no order was halved into it."""
        if self._validate_args:
            self._validate_sample(value)
        order = value.div(2, rounding_mode="floor")
        other = self._fine(order) != value
        return self.coarse.log_prob(order).masked_fill(other.any(-1), -torch.inf)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Draw orders, int64 [*sample_shape, *, S]."""
        with torch.no_grad():
            return self.draw(self._noise(sample_shape))

    def draw(self, noise: Tensor) -> Tensor:
        """See `OrderDistribution`."""
        return self._fine(self.coarse.draw(noise))

    @property
    def mode(self) -> Tensor:
        """The halved mode, int64 [*, S]."""
        return self._fine(self.coarse.mode)

    def _fine(self, order: Tensor) -> Tensor:
        return halved(order, self.coarse.num_steps)


@register_kl(HalvedOrder, HalvedOrder)
def _kl_halved(q: HalvedOrder, p: HalvedOrder) -> Tensor:
    """KL(q || p) in nats, float [*]: that of the orders that were halved, which halving keeps apart."""
    return kl_divergence(q.coarse, p.coarse)
