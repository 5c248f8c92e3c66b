"""What all guides share: the call signature of the model and the one site they sample."""

from __future__ import annotations

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor

from orderppl.decoding.schedules import SetSizes
from orderppl.denoising import Canvas, Denoiser
from orderppl.distributions import OrderedPartition
from orderppl.path import RevealPath


class RevealGuide(PyroModule):
    """Base of a guide q(r | x, c); a subclass says which distribution over orders it proposes.

    Args:
        num_steps: step budget T.

    Attributes:
        non_empty: whether every step reveals something for sure while anything is masked; a guide that may wait has an
            infinite KL to a prior that may not.
        sizes: the schedule that its set sizes always follow, if there is one.
    """

    non_empty = False
    sizes: SetSizes | None = None

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


class PathGuide(RevealGuide):
    """Base of a guide that is played out step by step along the true tokens, where it sees what the denoiser sees.

    Args:
        denoiser: the model's denoiser.
        num_steps: step budget T.
    """

    def __init__(self, denoiser: Denoiser, num_steps: int) -> None:
        super().__init__(num_steps)
        self.denoiser = denoiser

    def law(self, path: RevealPath) -> OrderedPartition:
        """Return q(r | x, c) along the true tokens, batch shape [B], event [L]."""
        raise NotImplementedError

    def order_distribution(
        self, tokens: Tensor, attention_mask: Tensor, context: Tensor | None, context_mask: Tensor | None
    ) -> OrderedPartition:
        """Follow the true tokens."""
        canvas = Canvas(self.denoiser, attention_mask, context, context_mask)
        return self.law(RevealPath(canvas, tokens, self.num_steps))
