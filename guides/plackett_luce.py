"""Scores ranked under Gumbel noise and cut into steps of fixed sizes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from orderppl.decoding.schedules import SetSizes, UniformSizes, make_sizes
from orderppl.distributions import OrderedPartition, PlackettLuceReveal
from orderppl.guides.guide import RevealGuide


class PlackettLuceGuide(RevealGuide):
    """q(z_t | M_t, x, c) = p(the next k_t positions of a Plackett-Luce ranking with scores s = network(x, c) are z_t).

    The order comes from the scores, how many at a time from a schedule. The scores are computed once per sequence and
    an order is drawn by one sort. With num_steps >= L and uniform sizes it reveals one position a step: the guide of
    LO-ARM (arXiv 2503.05979), whose step-wise divergences are exact; otherwise the bound takes sampled log-ratios.

    Args:
        network: (tokens, attention_mask, context, context_mask) -> scores, float [B, L, 1].
        num_steps: step budget T.
        sizes: schedule of set sizes, or what `make_sizes` reads: "uniform", "cosine" or mean positions per step.

    Raises:
        UserError: an unknown schedule.
    """

    non_empty = True
    sizes: SetSizes

    def __init__(self, network: nn.Module, num_steps: int, sizes: SetSizes | str | float = "uniform") -> None:
        super().__init__(num_steps)
        self.network = network
        self.sizes = make_sizes(sizes)

    def order_distribution(
        self, tokens: Tensor, attention_mask: Tensor, context: Tensor | None, context_mask: Tensor | None
    ) -> OrderedPartition:
        """Rank each row's own positions and cut by its own length."""
        scores = self.network(tokens, attention_mask, context, context_mask).squeeze(-1)  # [B, L]
        step = torch.arange(self.num_steps, device=scores.device)
        sizes = self.sizes.sizes(attention_mask.sum(-1, keepdim=True), step, self.num_steps)  # [B, T]
        return PlackettLuceReveal(scores, sizes, attention_mask, single=self._single(attention_mask.shape[-1]))

    def _single(self, length: int) -> bool:
        """Whether no row of at most `length` positions has a step of more than one."""
        if not isinstance(self.sizes, UniformSizes):
            return False
        steps = self.num_steps if self.sizes.num_steps is None else min(self.num_steps, self.sizes.num_steps)
        return steps >= length
