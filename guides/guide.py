"""What all guides share: the call signature of the model and the one site they sample."""

from __future__ import annotations

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor

from orderppl.distributions import OrderedPartition


class RevealGuide(PyroModule):
    """Base of a guide q(r | x, c); a subclass says which distribution over orders it proposes.

    Args:
        num_steps: step budget T.
    """

    def __init__(self, num_steps: int) -> None:
        super().__init__("guide")  # a root name of its own, see UnmaskingModel
        if num_steps < 1:
            raise ValueError(f"num_steps: {num_steps} is below 1; use at least one step")
        self.num_steps = num_steps

    def order_distribution(
        self, tokens: Tensor, attention_mask: Tensor, context: Tensor | None, context_mask: Tensor | None
    ) -> OrderedPartition:
        """Return q(r | x, c), batch shape [B], event [L]."""
        raise NotImplementedError

    def forward(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Sample the site `reveal_step`.

        Args:
            tokens: int64 [B, L], response tokens.
            attention_mask: bool [B, L], False at padding; all True when left out.
            context: int64 [B, C], prompt tokens.
            context_mask: bool [B, C].

        Returns:
            The order under its site name, int64 [*, B, L].
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(tokens, dtype=torch.bool)
        with pyro.plate("batch", len(tokens), dim=-1):
            distribution = self.order_distribution(tokens, attention_mask.bool(), context, context_mask)
            return {"reveal_step": pyro.sample("reveal_step", distribution)}
