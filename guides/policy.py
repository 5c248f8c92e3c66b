"""A policy as the guide: what generates, or one that may see the tokens."""

from __future__ import annotations

from orderppl.distributions import OrderDistribution
from orderppl.guides.guide import Guide
from orderppl.policies import Policy
from orderppl.unmasking import Batch, Denoiser


class PolicyGuide(Guide):
    """q(z_t | s_t) = policy(s_t), played out along the true tokens.

    With the model's own policy there is no posterior network, and the KL is 0: the bound is E_policy[ log p(x | r) ]
    less what the steps cost, the expected path log-likelihood of what decodes. With a `Plan` it is a mean-field guide
    that is deployable as it is. Any heuristic is a control, an importance proposal (`Smoothed`) or a teacher. A policy
    whose network sees the true tokens is a posterior: its sets may depend on everything but each other's members.

    Args:
        policy: any policy.
        denoiser: the model's denoiser, whose predictions the policy reads.
        num_steps: step budget T.
    """

    def __init__(self, policy: Policy, denoiser: Denoiser, num_steps: int) -> None:
        super().__init__(num_steps)
        self.policy = policy
        self.denoiser = denoiser

    def deployable(self) -> Policy | None:
        """The policy, unless a part of it sees the true tokens, which it says by an attribute `sees_truth`."""
        sees_truth = any(getattr(module, "sees_truth", False) for module in self.policy.modules())
        return None if sees_truth else self.policy

    def order(self, batch: Batch) -> OrderDistribution:
        """The policy's own distribution over orders."""
        return self.policy.order(batch, self.denoiser, self.num_steps)
