"""What a step costs: the covariate of a family of policies."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from orderppl.config import Configurable
from orderppl.errors import UserError
from orderppl.randomness import even_spread
from orderppl.unmasking import State


class PriceRange(Configurable):
    """A price per step for every sequence, so that one network learns the policies of all prices.

        price_b = low (high / low)^u_b,      u_1, .., u_B spread evenly over the unit interval

    The price is a covariate, as the prompt is: it is given, not inferred, and what is learned maximises the mean of the
    bounds at all prices. A network that has the feature `price` reads the range that the model charges; two ranges with
    the same ends are the same. To decode, choose one price for all sequences (`AtPrice`).

    Args:
        low: smallest price, nats per executed step, above 0.
        high: largest price, at least `low`.

    Raises:
        UserError: a price that is not positive, or `high` below `low`.
    """

    def __init__(self, low: float, high: float) -> None:
        if not 0 < low <= high:
            problem = f"{low} to {high} is no range of positive prices"
            raise UserError("price", problem, "use two prices above 0, the smaller one first")
        self.low, self.high = low, high

    def spread(self, sequences: int, device: torch.device) -> Tensor:
        """Price of each of B sequences, nats: float [B]."""
        even = even_spread(sequences, device).to(torch.get_default_dtype())
        return self.low * (self.high / self.low) ** even

    def grid(self, count: int) -> list[float]:
        """So many prices across the range, two or more, at equal ratios: to play a policy at."""
        return [self.low * (self.high / self.low) ** (place / (count - 1)) for place in range(count)]

    def places(self, state: State) -> Tensor:
        """Where the log-prices of a state are in the range, from -1 to 1 (a price outside goes beyond): float [B].

        Raises:
            UserError: when decoding, no price has been chosen: those of the range depend on the batch.
        """
        sequences, device = state.shape[-2], state.masked.device
        if state.price is None and not state.is_scored:
            problem = f"the policy was learned for prices from {self.low} to {self.high} nats a step"
            raise UserError("price", problem, "choose one to decode at, by AtPrice")
        if state.price is None:
            prices = self.spread(sequences, device)
        else:
            prices = torch.as_tensor(state.price, dtype=torch.get_default_dtype(), device=device).expand(sequences)
        half = max(math.log(self.high / self.low) / 2, 1e-6)
        return (prices.log() - math.log(self.low * self.high) / 2) / half
