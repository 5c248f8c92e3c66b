"""The policy that generates, used as its own guide."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from orderppl.denoising import Denoiser
from orderppl.distributions import OrderedPartition
from orderppl.guides.guide import PathGuide
from orderppl.path import RevealPath


class PolicyGuide(PathGuide):
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
        super().__init__(denoiser, num_steps)
        self.policy = policy
        self.non_empty = bool(getattr(policy, "non_empty", False))
        self.sizes = getattr(policy, "sizes", None)

    def law(self, path: RevealPath) -> OrderedPartition:
        """The policy's own law of orders."""
        return self.policy(path)
