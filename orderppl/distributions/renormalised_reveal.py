"""The paper's posterior over whole orders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from orderppl.distributions.ordered_partition import OrderedPartition
from orderppl.distributions.reveal_set import RenormalisedSet, RevealSet


class RenormalisedReveal(OrderedPartition):
    """A chain of `RenormalisedSet`s from one score per position; every step reveals at least the best position left.

    Args:
        scores: float [*, L].
        temperature: positive; small values reveal few positions a step.
        num_steps: T.
        masked: bool [*, L].
    """

    def __init__(
        self,
        scores: Tensor,
        temperature: float,
        num_steps: int,
        masked: Tensor,
        validate_args: bool | None = None,
    ) -> None:
        self.scores, masked = torch.broadcast_tensors(scores, masked)
        self.temperature = temperature
        super().__init__(masked, num_steps, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> RenormalisedReveal:
        """Return the same distribution at a broader batch shape."""
        shape = torch.Size(batch_shape) + self.event_shape
        scores, masked = self.scores.expand(shape), self.masked.expand(shape)
        return RenormalisedReveal(scores, self.temperature, self.num_steps, masked, validate_args=self._validate_args)

    def set_at(self, masked: Tensor, step: Tensor) -> RevealSet:
        """Renormalise the scores over what is still masked; the step itself does not matter."""
        return RenormalisedSet(self.scores, self.temperature, masked)
