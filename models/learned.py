"""Learned policies."""

from __future__ import annotations

from torch import Tensor, nn

from orderppl.errors import UserError
from orderppl.policies import LogitPolicy
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
