"""Policies that may end a sequence early."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from orderppl.distributions import SetDistribution
from orderppl.distributions.finishing_set import FinishingSet
from orderppl.errors import UserError
from orderppl.policies.policy import LOGIT_LIMIT, Policy, check_temperature
from orderppl.policies.price import PriceRange
from orderppl.policies.scores import confidence, predicted_tokens
from orderppl.policies.wrappers import Wrapper
from orderppl.unmasking import State

Answer = Callable[[Tensor, Tensor], Tensor]
"""(tokens int64 [*, S], -1 at padding; what of them is latent bool [*, S]) -> bool [*, S], which are the answer."""


class EarlyCommit(Wrapper):
    """Another policy, with one decision before each of its own: reveal all that is left at once.

        p(z_t | s_t) = f_t [z_t = M_t] + (1 - f_t) policy(z_t | s_t)
        logit f_t = (logit min_{i in A and M_t} c_i - logit sure) / temperature
                    + slope u + mean_{i in M_t} network(s_t)_i

    A is where the answer stands if every hidden token is the most likely one, u in [-1, 1] the place of the log-price
    in its range. With an answer alone, at temperature 0, it is the heuristic of that name: a row ends once the answer
    is known (Prophet, arXiv 2508.19982, by confidence). Under a step price a network learns for which sequences further
    steps are worth what they cost; without the term of u, the decision for all sequences and prices grows certain long
    before it learns to tell them apart.

    Args:
        policy: the other policy.
        answer: finds the answer, such as `orderppl.data.AnswerTokens`; None leaves out its term.
        sure: confidence at which ending has odds of one, in [0, 1]; inside, where the temperature is above 0.
        temperature: of the answer's term, at least 0.
        network: state -> float [*, S]; None leaves out its term.
        prices: the range that the model charges; None leaves out the term of u.
        slope: log-odds of finishing between the middle of the range and its ends.

    Raises:
        UserError: neither answer nor network, or a number outside its bounds.
    """

    def __init__(
        self,
        policy: Policy,
        answer: Answer | None = None,
        sure: float = 0.9,
        temperature: float = 0.0,
        network: nn.Module | None = None,
        prices: PriceRange | None = None,
        slope: float = 4.0,
    ) -> None:
        super().__init__(policy)
        if answer is None and network is None:
            raise UserError("answer", "neither an answer nor a network says when to end", "give one of them")
        if not 0 <= sure <= 1 or (temperature > 0 and sure in (0, 1)):
            raise UserError("sure", f"{sure} is no probability to compare with", "give a number such as 0.9")
        check_temperature(temperature)
        if answer is not None and network is not None and temperature == 0:
            raise UserError("temperature", "a hard rule leaves a network nothing to correct", "use a value such as 0.5")
        self.answer, self.sure, self.temperature = answer, sure, temperature
        self.network, self.prices, self.slope = network, prices, slope

    def finish_logit(self, state: State) -> Tensor:
        """Log-odds of ending, float [*]; infinite for the hard rule."""
        logit: Any = 0.0
        if self.network is not None:
            values = self.network(state).masked_fill(~state.masked, 0.0)  # [*, S]
            logit = values.sum(-1) / state.masked.sum(-1).clamp(min=1)
        if self.prices is not None:
            logit = logit + self.slope * self.prices.places(state)
        if self.answer is not None:
            known = self._answer_confidence(state)  # [*]
            if self.temperature == 0:
                decided = torch.full_like(known, torch.inf)
                return torch.where(known >= self.sure, decided, -decided)
            odds = torch.logit(known, eps=1e-6) - math.log(self.sure / (1 - self.sure))
            logit = logit + (odds / self.temperature).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
        return logit.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)

    def _answer_confidence(self, state: State) -> Tensor:
        """How sure the answer is: the smallest c of its hidden tokens, 1 where none is hidden; float [*]."""
        assert self.answer is not None
        there = self.answer(predicted_tokens(state), state.latent) & state.masked
        return confidence(state).masked_fill(~there, 1.0).amin(-1)

    def forward(self, state: State) -> SetDistribution:
        """Finish, or reveal as the other policy does."""
        logit = self.finish_logit(state)
        return FinishingSet(super().forward(state), logit, state.masked)
