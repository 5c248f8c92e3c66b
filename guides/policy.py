"""The policy that generates, used as its own guide."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from orderppl.denoising import Canvas, Denoiser
from orderppl.distributions import OrderedPartition
from orderppl.guides.guide import RevealGuide
from orderppl.path import RevealPath


class PolicyGuide(RevealGuide):
    """q(z_t | s_t) = policy(s_t): no posterior network, KL 0 when the model's prior is the same object.

    The bound is then E_policy[ log p(x | r) ] (minus any step price), the expected path log-likelihood of what decodes.

    Args:
        policy: path -> law of the order; a reveal prior.
        denoiser: the model's denoiser, whose predictions the policy reads.
        num_steps: step budget T.
    """

    def __init__(
        self, policy: nn.Module | Callable[[RevealPath], OrderedPartition], denoiser: Denoiser, num_steps: int
    ) -> None:
        super().__init__(num_steps)
        self.policy = policy
        self.denoiser = denoiser

    def order_distribution(
        self, tokens: Tensor, attention_mask: Tensor, context: Tensor | None, context_mask: Tensor | None
    ) -> OrderedPartition:
        """Follow the policy along the true tokens."""
        canvas = Canvas(self.denoiser, attention_mask, context, context_mask)
        return self.policy(RevealPath(canvas, tokens, self.num_steps))
