"""A guide of one's own, in a file of its own: see write_your_own_guide.py."""

import torch
from torch import nn

from orderppl import Batch
from orderppl.distributions import OrderDistribution, StepwiseOrder
from orderppl.guides import Guide


class BlockGuide(Guide):
    """Blocks from left to right; within its block, each position has a step of its own.

        q(r | x) = prod_i Categorical(r_i; softmax of network(x)_i over the steps of block(i))

    Args:
        network: batch -> step logits, float [B, S, T].
        num_steps: step budget T, a multiple of `num_blocks`.
        num_blocks: blocks of equal length, counted over the row's own positions to reveal.
    """

    def __init__(self, network: nn.Module, num_steps: int, num_blocks: int = 2) -> None:
        super().__init__(num_steps)
        if num_steps % num_blocks:
            raise ValueError(f"num_blocks: {num_blocks} does not divide {num_steps} steps; use a divisor")
        self.network, self.num_blocks = network, num_blocks

    def order(self, batch: Batch) -> OrderDistribution:
        """One categorical per position, over the steps of its block."""
        place = (batch.latent.cumsum(-1) - 1).clamp(min=0)  # [B, S]
        block = place * self.num_blocks // batch.latent.sum(-1, keepdim=True).clamp(min=1)  # [B, S]
        step = torch.arange(self.num_steps, device=batch.device)
        elsewhere = block.unsqueeze(-1) != step * self.num_blocks // self.num_steps  # [B, S, T]
        return StepwiseOrder(self.network(batch).masked_fill(elsewhere, -100.0), batch.latent)
