"""The base of policies without parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from orderppl.states import UnmaskingState


class Heuristic(ABC):
    """A policy with a score (high = reveal first) and a rule that cuts the ranking.

    Attributes:
        needs_truth: whether it reads the true tokens, which only path evaluation can give.
        needs_noise: whether it reads the noise of the state.
        remembers: whether it reads what it kept in the memory at earlier steps.
    """

    name: str
    needs_truth = False
    needs_noise = False
    remembers = False

    @abstractmethod
    def score(self, state: UnmaskingState) -> Tensor:
        """Score of every position: float [*, L]."""

    @abstractmethod
    def choose(self, state: UnmaskingState, last: Tensor | None = None) -> Tensor:
        """Reveal set when the positions in `last` (bool [*, L]) rank behind all others: bool [*, L]."""

    def select(self, state: UnmaskingState) -> Tensor:
        """Reveal set z_t: bool [*, L]."""
        return self.choose(state)
