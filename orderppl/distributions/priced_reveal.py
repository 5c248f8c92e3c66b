"""Any law of orders with a price on every executed step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from orderppl.distributions.ordered_partition import OrderedPartition
from orderppl.distributions.set_law import SetLaw
from orderppl.states import UnmaskingState


class PricedReveal(OrderedPartition):
    """p(r) exp(-price * number of executed steps), unnormalised; a step is executed while anything is masked.

    Args:
        law: p(r); samples are its own.
        price: nats per executed step, one number or float [B], one for each sequence.
    """

    def __init__(self, law: OrderedPartition, price: float | Tensor, validate_args: bool | None = None) -> None:
        self.law = law
        self.price = price
        super().__init__(law.masked, law.num_steps, law.steps, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> PricedReveal:
        """Return the same distribution at a broader batch shape."""
        return PricedReveal(self.law.expand(batch_shape), self.price, validate_args=self._validate_args)

    def _priced(self, sets: SetLaw) -> SetLaw:
        return sets.weighted(-self.price * sets.masked.any(-1).to(sets.log_weight.dtype))

    def set_at(self, masked: Tensor, step: Tensor) -> SetLaw:
        """The set of the law, with the price of the step."""
        return self._priced(self.law.set_at(masked, step))

    def _sets_along(self, reveal_step: Tensor, steps: Tensor | None) -> SetLaw:
        return self._priced(self.law.reveal_sets(reveal_step, steps))

    def share(self, reveal_step: Tensor, tokens: Tensor, states: UnmaskingState) -> None:
        """Share the sets of the law; see `OrderedPartition.share`."""
        self.law.share(reveal_step, tokens, states)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Draw orders from the law, int64 [*sample_shape, *, L]."""
        return self.law.sample(sample_shape)
