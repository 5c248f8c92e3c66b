"""The noun: a distribution over the next reveal set, given what is visible."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
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
        forwards_per_step: denoiser forwards that a step of it is charged.
    """

    non_empty = False
    looks_back = False
    forwards_per_step = 1

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

    def corrected(self, correction: nn.Module) -> Policy:
        """The same policy with the numbers that it decides by corrected: a posterior that starts as the policy.

        Args:
            correction: what the policy's own network reads -> what is added to its output, of the same shape. It may
                see the truth, then it is for guides; it starts at zero where the policy is to be where one starts.

        Raises:
            UserError: a policy without such numbers.
        """
        problem = f"{type(self).__name__} has no log-odds to correct"
        raise UserError("policy", problem, "use a LogitPolicy, a Plan, a ScanPlan or Renormalised")

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

    def corrected(self, correction: nn.Module) -> LogitPolicy:
        """See `Policy`: log-odds are corrected, float [*, S]."""
        return _CorrectedLogits(self, correction)


class _CorrectedLogits(LogitPolicy):
    """Another policy's log-odds and a correction."""

    def __init__(self, base: LogitPolicy, correction: nn.Module) -> None:
        super().__init__()
        self.base, self.correction, self.non_empty = base, correction, base.non_empty

    def logits(self, state: State) -> Tensor:
        """The sum, float [*, S]."""
        moved: Tensor = self.correction(state)
        return self.base.logits(state) + moved


class Renormalised(Policy):
    """Another policy's probabilities, renormalised by the largest one: the paper's form, state by state.

        p_i = (b_i / max_{j in M_t} b_j)^(1 / temperature),      b = sigmoid(base.logits(s_t))

    Every set has the best position (arXiv 2602.23968; the formula is our reconstruction), which no other policy does
    for sure: as a prior it forbids the orders of any other guide.

    Args:
        base: a policy with log-odds.
        temperature: positive; small values reveal few positions.

    Raises:
        UserError: a temperature that is not positive.
    """

    # No set is empty, but without the condition that `non_empty` stands for.

    def __init__(self, base: LogitPolicy, temperature: float = 1.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise UserError("temperature", f"{temperature} is not positive", "use a value such as 1")
        self.base, self.temperature = base, temperature

    def forward(self, state: State) -> SetDistribution:
        """Reveal by the share of the best position's probability."""
        scores = F.logsigmoid(self.base.logits(state))
        return IndependentSet.renormalised(scores, self.temperature, state.masked)

    def corrected(self, correction: nn.Module) -> Renormalised:
        """See `Policy`: log-odds of the base are corrected, float [*, S]."""
        return Renormalised(self.base.corrected(correction), self.temperature)


class Corrected(Configurable, nn.Module):
    """A network's output and a correction of it, added up.

    Args:
        network: canvas or state -> float [*].
        correction: the same, of the same shape.
    """

    def __init__(self, network: nn.Module, correction: nn.Module) -> None:
        super().__init__()
        self.network, self.correction = network, correction

    def forward(self, canvas: Any) -> Tensor:
        """Add up, float [*]."""
        total: Tensor = self.network(canvas) + self.correction(canvas)
        return total


def selected_set(sets: SetDistribution, state: State) -> Tensor:
    """The reveal set of a state: a draw by its noise, or the most probable set where it takes modes; bool [*, S]."""
    if sets.is_certain or state.takes_mode:
        mode: Tensor = sets.mode
        return mode & state.masked
    return sets.draw(state.noise) & state.masked


def check_temperature(temperature: float) -> None:
    """Refuse what is no temperature."""
    if not temperature >= 0:
        raise UserError("temperature", f"{temperature} is negative", "use 0 for the hard rule, or a value such as 0.5")


def need_temperature(policy: LogitPolicy, temperature: float) -> None:
    """Refuse log-odds of a hard rule."""
    if temperature == 0:
        problem = f"{type(policy).__name__} at temperature 0 is a hard rule, which has no log-odds"
        raise UserError("temperature", problem, "give it a temperature above 0, such as 0.5")
