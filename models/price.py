"""What a step costs: the dial of a family of policies."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from orderppl.errors import UserError
from orderppl.randomness import even_spread


class PriceRange:
    """A price per step for every sequence, so that one network learns the policies of all prices.

        price_b = low (high / low)^u_b,      u_1, .., u_B spread evenly over the unit interval

    The price is a covariate, as the prompt is: it is given, not inferred, and what is learned maximises the mean of the
    bounds at all prices. A network that has the feature `price` reads the same range as the `StepPrice` that charges
    it. To decode, choose one price for all sequences (`StepPrice.at`).

    Args:
        low: smallest price, nats per executed step, above 0.
        high: largest price, at least `low`.

    Attributes:
        chosen: the price of all sequences, nats; None spreads them over the range.

    Raises:
        UserError: a price that is not positive, or `high` below `low`.
    """

    def __init__(self, low: float, high: float) -> None:
        if not 0 < low <= high:
            problem = f"{low} to {high} is no range of positive prices"
            raise UserError("price", problem, "use two prices above 0, the smaller one first")
        self.low, self.high = low, high
        self.chosen: float | None = None

    @property
    def config(self) -> dict[str, float]:
        """The arguments that make a range like this one."""
        return {"low": self.low, "high": self.high}

    @property
    def middle(self) -> float:
        """Geometric mean of the ends, nats."""
        return math.sqrt(self.low * self.high)

    def prices(self, sequences: int, device: torch.device) -> Tensor:
        """Price of each of B sequences, nats: float [B]."""
        if self.chosen is not None:
            return torch.full((sequences,), self.chosen, device=device)
        spread = even_spread(sequences, device).to(torch.get_default_dtype())
        return self.low * (self.high / self.low) ** spread

    def places(self, sequences: int, device: torch.device) -> Tensor:
        """Where the log-prices are in the range, from -1 to 1 (a price outside goes beyond): float [B]."""
        half = max(math.log(self.high / self.low) / 2, 1e-6)
        return (self.prices(sequences, device).log() - math.log(self.middle)) / half
