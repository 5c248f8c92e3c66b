"""A policy as the guide: what generates, or one that may see the tokens."""

from __future__ import annotations

from torch import nn

from orderppl.distributions import OrderDistribution
from orderppl.errors import UserError
from orderppl.guides.guide import Guide
from orderppl.policies import LogitPolicy, Policy, Renormalised
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
        shares_orders: see `Guide`.
    """

    def __init__(self, policy: Policy, denoiser: Denoiser, num_steps: int, *, shares_orders: bool = False) -> None:
        super().__init__(num_steps, shares_orders=shares_orders)
        self.policy = policy
        self.denoiser = denoiser

    def deployable(self) -> Policy | None:
        """The policy, unless a part of it sees the true tokens, which it says by an attribute `sees_truth`."""
        sees_truth = any(getattr(module, "sees_truth", False) for module in self.policy.modules())
        return None if sees_truth else self.policy

    def order(self, batch: Batch) -> OrderDistribution:
        """The policy's own distribution over orders."""
        return self.policy.order(batch, self.denoiser, self.num_steps)


class PosteriorGuide(PolicyGuide):
    """A posterior that starts as the prior: the policy with its log-odds corrected by a network that sees the tokens.

        logit q_i(s_t, x) = logit policy_i(s_t) + correction(s_t, x)_i

    The correction starts at zero, so that the KL starts at 0 and the bound at the policy's own; what it learns is what
    the tokens say about the order. Of a `Plan` the step logits are corrected, of a `ScanPlan` what it knows of the
    positions. In the renormalised form of the paper the KL starts at what it costs that every set has the best
    position. The prior's weights are shared: `lr={"correction": 0.003, "policy": 0.0003}` gives each its own rate.

    Args:
        policy: the prior: a policy with log-odds, a `Plan` or a `ScanPlan`.
        denoiser: the model's denoiser, whose predictions the policy reads.
        num_steps: step budget T.
        correction: reads what the policy's network reads, and the true tokens, such as
            `PolicyNetwork(num_tokens, sees_truth=True, zero_init=True)`; `SequenceEncoder` with the same for plans.
        temperature: that of the renormalised form, see `Renormalised`; None leaves the policy its own form.

    Raises:
        UserError: a policy that cannot be corrected, or has no renormalised form.
    """

    def __init__(
        self,
        policy: Policy,
        denoiser: Denoiser,
        num_steps: int,
        correction: nn.Module,
        *,
        temperature: float | None = None,
    ) -> None:
        corrected = policy.corrected(correction)
        if temperature is not None:
            if not isinstance(corrected, LogitPolicy):
                problem = f"{type(policy).__name__} has no log-odds to renormalise"
                raise UserError("temperature", problem, "leave it out, or use a policy with log-odds")
            corrected = Renormalised(corrected, temperature)
        super().__init__(corrected, denoiser, num_steps)
