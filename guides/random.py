"""The control: every position at a uniformly random step."""

from __future__ import annotations

import torch
from torch import Tensor

from orderppl.distributions import OrderedPartition, StepwiseReveal
from orderppl.guides.guide import RevealGuide


class RandomGuide(RevealGuide):
    """q(r_i = t) = 1 / T, with nothing to learn.

    Args:
        num_steps: step budget T.
    """

    def order_distribution(
        self, tokens: Tensor, attention_mask: Tensor, context: Tensor | None, context_mask: Tensor | None
    ) -> OrderedPartition:
        """Uniform over steps."""
        flat = torch.zeros(attention_mask.shape + (self.num_steps,), device=attention_mask.device)
        return StepwiseReveal(flat, attention_mask)
