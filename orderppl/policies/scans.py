"""Policies whose sets are drawn position by position."""

from __future__ import annotations

from typing import Any

from torch import nn

from orderppl.distributions.autoregressive_set import AutoregressiveSet
from orderppl.errors import UserError
from orderppl.policies.policy import Corrected, Policy
from orderppl.unmasking import State


class ScanPolicy(Policy):
    """A learned policy whose decisions of one step depend on each other: a scan along the positions, or groups of them.

        z_i ~ Bernoulli(sigmoid(network(context(s_t)_i, z_{before i}))),     i masked

    It sees what has been revealed, as `LearnedPolicy` does, and says "one of these two" as `ScanPlan` does. Deploy its
    draws; the most probable of a few draws stands for its mode.

    Args:
        network: a scan of two steps, wait and reveal (see `orderppl.distributions.autoregressive_order.Scan`), such as
            `ScanNetwork(2, PolicyNetwork(..., vectors=16), bias=-2.0)`.
        context: state -> float [*, S, W], what is known of every position; the network's own when left out.
        non_empty: condition every set on revealing something.

    Raises:
        UserError: a scan of more steps.
    """

    def __init__(self, network: nn.Module, context: nn.Module | None = None, non_empty: bool = True) -> None:
        super().__init__()
        steps = getattr(network, "num_steps", 2)
        if steps != 2:
            problem = f"scans over {steps} steps, where a set has two outcomes: wait and reveal"
            raise UserError("network", problem, "set its num_steps to 2, or use a ScanPlan")
        self.network, self.context, self.non_empty = network, context, non_empty

    def forward(self, state: State) -> AutoregressiveSet:
        """Decide position by position."""
        network: Any = self.network
        context = (network.context if self.context is None else self.context)(state)
        return AutoregressiveSet(network, context, state.masked, self.non_empty)

    def corrected(self, correction: nn.Module) -> ScanPolicy:
        """See `Policy`: what is known of the positions is corrected, float [*, S, W]."""
        context: Any = self.network.context if self.context is None else self.context
        return ScanPolicy(self.network, Corrected(context, correction), self.non_empty)
