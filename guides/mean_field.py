"""Independent steps per position, from one network pass."""

from __future__ import annotations

from torch import Tensor, nn

from orderppl.distributions import OrderedPartition, StepwiseReveal
from orderppl.guides.guide import RevealGuide


class MeanFieldGuide(RevealGuide):
    """q(r | x, c) = prod_i Categorical(r_i; softmax(network(x, c)_i)).

    With `sees_tokens=False` the network gets prompt and positions only; the guide can then be tied to a prior by
    sharing its network (`LearnedSteps`) and is itself a plan of the whole order that a decoder can follow.

    Args:
        network: (tokens or None, attention_mask, context, context_mask) -> step logits, float [B, L, T].
        num_steps: step budget T.
        sees_tokens: show the response tokens to the network.
    """

    def __init__(self, network: nn.Module, num_steps: int, sees_tokens: bool = True) -> None:
        super().__init__(num_steps)
        self.network = network
        self.sees_tokens = sees_tokens

    def order_distribution(
        self, tokens: Tensor, attention_mask: Tensor, context: Tensor | None, context_mask: Tensor | None
    ) -> OrderedPartition:
        """One categorical per position."""
        logits = self.network(tokens if self.sees_tokens else None, attention_mask, context, context_mask)
        return StepwiseReveal(logits, attention_mask)
