"""The paper's posterior: one score per position, renormalised over what is still masked."""

from __future__ import annotations

from torch import Tensor, nn

from orderppl.distributions import OrderedPartition, RenormalisedReveal
from orderppl.guides.guide import RevealGuide


class RenormalisedScoreGuide(RevealGuide):
    """q(z_t | M_t, x) = prod_{i in M_t} Bernoulli( exp((s_i - max_{j in M_t} s_j) / temperature) ),  s = network(x, c).

    The scores are computed once per sequence; sampling T steps costs no further network pass, and every step reveals
    at least one position (arXiv 2602.23968; the formula is our reconstruction).

    Args:
        network: (tokens, attention_mask, context, context_mask) -> scores, float [B, L, 1].
        num_steps: step budget T.
        temperature: positive; 0.05-0.1 in the paper. May be annealed while training.
    """

    non_empty = True

    def __init__(self, network: nn.Module, num_steps: int, temperature: float = 0.1) -> None:
        super().__init__(num_steps)
        if not temperature > 0:
            raise ValueError(f"temperature: {temperature} is not positive; use a value such as 0.1")
        self.network = network
        self.temperature = temperature

    def order_distribution(
        self, tokens: Tensor, attention_mask: Tensor, context: Tensor | None, context_mask: Tensor | None
    ) -> OrderedPartition:
        """A chain of renormalised sets."""
        scores = self.network(tokens, attention_mask, context, context_mask).squeeze(-1)  # [B, L]
        return RenormalisedReveal(scores, self.temperature, self.num_steps, attention_mask)
