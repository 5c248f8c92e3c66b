"""Orders whose steps are played in two."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions.kl import kl_divergence, register_kl

from orderppl.distributions.order_distribution import OrderDistribution
from orderppl.unmasking.trajectory import VISIBLE


def halved(order: Tensor, num_steps: int) -> Tensor:
    """Every other position of each step first, the ones between them after it: int64 [*, S] -> [*, S].

        r'_i = min(2 r_i + (number of positions before i that have its step) mod 2, T - 1)

    Args:
        order: int64 [*, S], -1 where nothing is revealed.
        num_steps: T; of an odd number the last step is played at once.
    """
    steps, places = order.sort(stable=True)  # [*, S]
    index = torch.arange(order.shape[-1], device=order.device).expand(order.shape)
    begins = F.pad(steps[..., 1:] != steps[..., :-1], (1, 0), value=True)
    rank = index - torch.where(begins, index, 0).cummax(-1).values  # among those of the same step
    fine = (2 * steps + rank % 2).clamp(max=num_steps - 1).masked_fill(steps < 0, VISIBLE)
    return torch.empty_like(order).scatter_(-1, places, fine)


class HalvedOrder(OrderDistribution):
    """An order of half as many steps, each played in two (see `halved`): as probable as the order it comes from.

        log p(r') = log p(r),      r = floor(r' / 2)

    Args:
        coarse: the distribution of the order r.
        num_steps: T; twice the steps of `coarse`, or one less.
    """

    has_steps = False

    def __init__(self, coarse: OrderDistribution, num_steps: int, validate_args: bool | None = None) -> None:
        self.coarse = coarse
        super().__init__(coarse.masked, num_steps, validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> HalvedOrder:
        """Return the same distribution at a broader batch shape."""
        coarse = self.coarse.expand(batch_shape)
        return HalvedOrder(coarse, self.num_steps, self._validate_args)._sharing_like(self)

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
        return halved(order, self.num_steps)


@register_kl(HalvedOrder, HalvedOrder)
def _kl_halved(q: HalvedOrder, p: HalvedOrder) -> Tensor:
    """KL(q || p) in nats, float [*]: that of the orders that were halved, which halving keeps apart."""
    return kl_divergence(q.coarse, p.coarse)
