"""Policies that rank the masked positions and reveal as many as a schedule says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from orderppl.distributions import DecidedSet, RankedSet, SetDistribution
from orderppl.distributions.ranked_set import UniformSet
from orderppl.errors import UserError
from orderppl.policies.policy import LOGIT_LIMIT, LogitPolicy, Policy, check_temperature, need_temperature
from orderppl.policies.schedules import SetSizes, make_sizes
from orderppl.policies.scores import SCORES, confidence, first_of, predicted_tokens, reveal_rank
from orderppl.unmasking import State

Score = Literal["random", "top_prob", "log_odds", "margin", "entropy", "left_to_right"]


def due_count(sizes: SetSizes, state: State) -> Tensor:
    """Positions to reveal now: int64 [*], at least 1; a row ahead of or behind its schedule returns to it."""
    positions = state.num_latent
    revealed = positions - state.num_hidden
    return (sizes.cumulative(positions, state.step + 1, state.num_steps) - revealed).clamp(min=1)


class Ranked(LogitPolicy):
    """The K positions of highest score, K from a schedule.

        temperature 0:  the K largest scores, the leftmost of equal ones
        above 0:        Plackett-Luce, the K largest of score / temperature + Gumbel noise

    A very small temperature breaks ties at random, and nothing else.

    Args:
        score: "random" (all sets of K alike), "top_prob" (c = max_v p(v)), "log_odds" (the same order, also where c
            rounds to 1), "margin" (p1 - p2), "entropy" (-H) or "left_to_right"; or a policy whose log-odds rank.
        sizes: "uniform", "cosine", "llada", "dream" or a number of positions a step; or a schedule.
        temperature: at least 0, in the unit of the score.

    Raises:
        UserError: an unknown score or schedule, or a negative temperature.
    """

    non_empty = True

    def __init__(
        self,
        score: Score | LogitPolicy = "top_prob",
        sizes: SetSizes | Literal["uniform", "cosine", "llada", "dream"] | float = "uniform",
        temperature: float = 0.0,
    ) -> None:
        super().__init__()
        if isinstance(score, str) and score != "random" and score not in SCORES:
            raise UserError("score", f"unknown score {score!r}", f"use random, {', '.join(SCORES)}, or a policy")
        check_temperature(temperature)
        self.score = score
        self.sizes = make_sizes(sizes)
        self.temperature = temperature

    def scores(self, state: State) -> Tensor:
        """What ranks the positions, high first: float [*, S]."""
        if isinstance(self.score, Policy):
            return self.score.logits(state)
        if self.score == "random":
            return torch.zeros((), device=state.masked.device).expand(state.shape)
        return SCORES[self.score](state)

    def forward(self, state: State) -> SetDistribution:
        """As many as are due."""
        count = due_count(self.sizes, state)
        if self.score == "random":
            return UniformSet(count, state.masked)
        scores = self.scores(state)
        if self.temperature == 0:
            return DecidedSet(first_of(scores, state.masked, count), state.masked, non_empty=True)
        return RankedSet(scores / self.temperature, count, state.masked)

    def logits(self, state: State) -> Tensor:
        """(K - 1/2 - rank_i) / temperature, the log-odds of a base to correct: float [*, S].

        Raises:
            UserError: a temperature of 0.
        """
        need_temperature(self, self.temperature)
        rank = reveal_rank(self.scores(state), state.masked)
        size = due_count(self.sizes, state)
        return ((size.unsqueeze(-1) - 0.5 - rank) / self.temperature).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)


class PositionWeighted(Ranked):
    """The K positions of largest confidence, weighted by where they stand and by how rare their token is.

        w_i = exp(-decay i) c_i (-log f(v_i)),      v_i the most likely token, i counted over the positions to reveal

    Position-aware confidence of PC-Sampler (arXiv 2508.13021): the front goes first, and frequent tokens such as ends
    do not crowd out the others.

    Args:
        decay: at least 0; 0 knows no position.
        frequencies: share f of every token class among texts, V positive numbers; all alike when left out.
        sizes: see `Ranked`.
        temperature: see `Ranked`.

    Raises:
        UserError: a negative decay, or frequencies that are none.
    """

    def __init__(
        self,
        decay: float = 0.25,
        frequencies: Sequence[float] | Tensor | None = None,
        sizes: SetSizes | Literal["uniform", "cosine", "llada", "dream"] | float = "uniform",
        temperature: float = 0.0,
    ) -> None:
        super().__init__("top_prob", sizes, temperature)
        if not decay >= 0:
            raise UserError("decay", f"{decay} is negative", "use 0 or more")
        rarity = None if frequencies is None else -torch.as_tensor(frequencies, dtype=torch.float64).log()
        if rarity is not None and not bool((rarity.isfinite() & (rarity >= 0)).all()):
            raise UserError("frequencies", "are no shares", "give positive numbers that sum to 1, one per token class")
        self.decay = decay
        self.register_buffer("rarity", rarity, persistent=False)
        self.rarity: Tensor | None

    def scores(self, state: State) -> Tensor:
        """What ranks the positions, float [*, S]."""
        place = (state.latent.long().cumsum(-1) - 1).clamp(min=0)
        weighted = (-self.decay * place.double()).exp() * confidence(state)
        if self.rarity is None:
            return weighted
        return weighted * self.rarity[predicted_tokens(state).clamp(min=0, max=len(self.rarity) - 1)]
