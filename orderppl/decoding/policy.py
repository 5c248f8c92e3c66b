"""The protocol of everything that can decide a reveal set."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from orderppl.distributions import RevealSet
from orderppl.states import UnmaskingState


@runtime_checkable
class Policy(Protocol):
    """Chooses which masked positions to reveal now."""

    def select(self, state: UnmaskingState) -> Tensor:
        """Return the reveal set z_t: bool [B, L], a subset of `state.masked`."""
        ...


@runtime_checkable
class StochasticPolicy(Policy, Protocol):
    """A policy that is a distribution over reveal sets, such as a learned prior."""

    def distribution(self, state: UnmaskingState) -> RevealSet:
        """Return the distribution of z_t given the state: batch shape of `state.step`, event [L]."""
        ...
