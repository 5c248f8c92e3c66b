"""The noun: a distribution over the next reveal set, given what is visible."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from orderppl.config import Configurable
from orderppl.distributions import IndependentSet, OrderDistribution, SetDistribution
from orderppl.distributions.order_distribution import PolicyOrder
from orderppl.errors import UserError
from orderppl.unmasking import Batch, Denoiser, State
from orderppl.unmasking.trajectory import Path

LOGIT_LIMIT = 12.0  # keeps reveal probabilities away from 0 and 1, so that every KL stays finite


class Policy(Configurable, nn.Module):
    """A distribution over the next reveal set. Prior, heuristic, plan, decoder and guide are roles that it plays.

    A subclass defines `forward`. One that looks back at earlier steps sets `looks_back` and defines `look_back`; one
    whose whole order has a closed form overrides `order`.

    Attributes:
        non_empty: whether every set has at least one position while any is masked.
        looks_back: whether it keeps something from step to step.
    """

    non_empty = False
    looks_back = False

    def forward(self, state: State) -> SetDistribution:
        """The distribution of z_t given s_t, batch shape [*], event [S]. The last step's completion is the caller's."""
        raise NotImplementedError

    def look_back(self, state: State) -> Any:
        """What to keep for this step and the next ones.

        Args:
            state: with what was kept at the step before in `state.carry`; None at the first step.

        Returns:
            A tensor, or a tuple of such (nested, with None): leading shape that of the state, rows first.
        """
        raise NotImplementedError

    def order(self, batch: Batch, denoiser: Denoiser, num_steps: int) -> OrderDistribution:
        """The distribution over whole orders that it plays out, batch shape [B], event [S]."""
        return PolicyOrder(self, Path(batch, denoiser, num_steps))

    def at_step(self, state: State) -> tuple[SetDistribution, Any]:
        """The distribution at a state, and what is kept for the next one."""
        carry = self.look_back(state) if self.looks_back else None
        sets: SetDistribution = self(state.replace(carry=carry) if self.looks_back else state)
        return sets, carry


class LogitPolicy(Policy):
    """Base of policies that reveal each position by log-odds of its own; a subclass defines `logits`.

    p_i = sigmoid(logits_i),  divided by Z = 1 - prod_{j in M_t} (1 - p_j) when `non_empty`
    """

    non_empty = True

    def logits(self, state: State) -> Tensor:
        """Log-odds of revealing each position, float [*, S]."""
        raise NotImplementedError

    def forward(self, state: State) -> SetDistribution:
        """Reveal by the log-odds, kept away from certainty."""
        logits = self.logits(state).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
        return IndependentSet.bernoulli(logits, state.masked, self.non_empty)


def check_temperature(temperature: float) -> None:
    """Refuse what is no temperature."""
    if not temperature >= 0:
        raise UserError("temperature", f"{temperature} is negative", "use 0 for the hard rule, or a value such as 0.5")


def need_temperature(policy: LogitPolicy, temperature: float) -> None:
    """Refuse log-odds of a hard rule."""
    if temperature == 0:
        problem = f"{type(policy).__name__} at temperature 0 is a hard rule, which has no log-odds"
        raise UserError("temperature", problem, "give it a temperature above 0, such as 0.5")
