"""Policies that may end a sequence early."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from orderppl.data.answer_tokens import AnswerTokens
from orderppl.decoding.scores import answer_confidence
from orderppl.distributions import FinishingSet, SetLaw
from orderppl.models.price import PriceRange
from orderppl.models.priors import LOGIT_LIMIT, RevealPrior
from orderppl.states import UnmaskingState


class AnswerOdds(nn.Module):
    """Log-odds of ending a sequence because its answer is known: early commit made soft.

        (logit min_{i in A and M_t} c_i - logit sure) / temperature,    c_i = max_v p(x_i = v | s_t)

    A is where the answer stands if every hidden token is the most likely one. Towards temperature 0 this is the wrapper
    `AnswerReady`.

    Args:
        answer: which tokens are the answer.
        sure: confidence at which ending has odds of one, in (0, 1).
        temperature: positive.
    """

    def __init__(self, answer: AnswerTokens, sure: float = 0.9, temperature: float = 0.5) -> None:
        super().__init__()
        if not 0 < sure < 1:
            raise ValueError(f"sure: {sure} is not in (0, 1); use a value such as 0.9")
        if not temperature > 0:
            raise ValueError(f"temperature: {temperature} is not positive; use a value such as 0.5")
        self.answer, self.sure, self.temperature = answer, sure, temperature
        self.config = {"answer": answer, "sure": sure, "temperature": temperature}

    def forward(self, state: UnmaskingState) -> Tensor:
        """Return float [*]."""
        odds = torch.logit(answer_confidence(state, self.answer), eps=1e-6)
        odds = (odds - math.log(self.sure / (1 - self.sure))) / self.temperature
        return odds.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)


class FinishingPolicy(RevealPrior):
    """Another policy, with one decision before each of its own: reveal all that is left at once.

        p(z_t | s_t) = f_t [z_t = M_t] + (1 - f_t) prior(z_t | s_t)
        logit f_t = base(s_t) + slope u + mean_{i in M_t} network(s_t)_i

    with u in [-1, 1] the place of the log-price in its range.

    Under a step price it learns for which sequences further steps are worth what they cost. With a range of prices
    the network says where the price is at which that changes; without the term of u, the decision for all sequences
    and prices grows certain long before it learns to tell them apart.

    Args:
        prior: the other policy.
        network: state -> float [*, L].
        prices: the range that a `StepPrice` around it charges; None leaves out the term of u.
        slope: log-odds of finishing between the middle of the range and its ends.
        base: a heuristic to correct, state -> float [*], such as `AnswerOdds`; None leaves out this term.
    """

    def __init__(
        self,
        prior: RevealPrior,
        network: nn.Module,
        prices: PriceRange | None = None,
        slope: float = 4.0,
        base: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.prior = prior
        self.network = network
        self.prices = prices
        self.slope = slope
        self.base = base
        self.non_empty = prior.non_empty

    def distribution(self, state: UnmaskingState) -> SetLaw:
        """Finish, or reveal as the other policy does."""
        logits = self.network(state)  # [*, L]
        if self.prices is not None:
            places = self.prices.places(logits.shape[-2], logits.device).to(logits.dtype)  # [B]
            logits = logits + self.slope * places[:, None]
        logits = torch.where(state.masked, logits, 0.0)
        finish = logits.sum(-1) / state.masked.sum(-1).clamp(min=1)  # [*]
        if self.base is not None:
            finish = finish + self.base(state)
        return FinishingSet(state.law(self.prior.distribution), finish.clamp(-LOGIT_LIMIT, LOGIT_LIMIT))
