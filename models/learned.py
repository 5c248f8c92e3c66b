"""Learned policies."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from orderppl.errors import UserError
from orderppl.policies import LogitPolicy, Plan
from orderppl.unmasking import State


class LearnedPolicy(LogitPolicy):
    """A network decides from what is visible, or corrects another policy.

        logit p_i = network(s_t)_i                          from scratch
        logit p_i = logit base_i + network(s_t)_i           a residual

    With a network whose output starts at zero a residual starts as its base and can only be trained away from it. A
    network that sees the true tokens makes it a posterior: for a guide, never for a decoder.

    Args:
        network: state -> logits, float [*, S].
        base: the policy to correct, such as `Threshold(temperature=1.0)`, or the prior of a posterior.
        non_empty: condition every set on revealing something.

    Raises:
        UserError: a base without log-odds.
    """

    def __init__(self, network: nn.Module, base: LogitPolicy | None = None, non_empty: bool = True) -> None:
        super().__init__()
        known: object = base
        if known is not None and not isinstance(known, LogitPolicy):
            problem = f"{type(base).__name__} has no log-odds to correct"
            raise UserError("base", problem, "use Threshold, EntropyBound, Ranked or another LogitPolicy")
        self.network = network
        self.base = base
        self.non_empty = non_empty

    def logits(self, state: State) -> Tensor:
        """Log-odds of revealing each position, float [*, S]."""
        logits: Tensor = self.network(state)
        return logits if self.base is None else self.base.logits(state) + logits


class HeldBack(LogitPolicy):
    """Another policy, with the later sets of a plan held back.

        logit p_i = logit base_i - weight * max(E[s_i] - t S / T, 0),    s_i ~ plan, of S steps

    A plan keeps apart what depends on each other, which the certainty of single positions cannot show.

    Args:
        base: the other policy, such as `Threshold(temperature=1.0)`.
        plan: independent steps per position; blind to the denoiser, for it is asked at every state.
        weight: log-odds per step of the plan, learned from this value.
    """

    def __init__(self, base: LogitPolicy, plan: Plan, weight: float = 0.5) -> None:
        super().__init__()
        self.base = base
        self.plan = plan
        self.non_empty = base.non_empty
        self.weight = nn.Parameter(torch.tensor(weight))

    def logits(self, state: State) -> Tensor:
        """Log-odds of revealing each position, float [*, S]."""
        probs = self.plan.network(state).softmax(-1)  # [*, S, steps of the plan]
        num_sets = probs.shape[-1]
        planned = probs @ torch.arange(num_sets, dtype=probs.dtype, device=probs.device)  # [*, S]
        now = (state.step * num_sets / state.num_steps).to(probs.dtype)  # in sets, [*]
        early = (planned - now[..., None]).clamp(min=0)  # [*, S]
        return self.base.logits(state) - self.weight * early
