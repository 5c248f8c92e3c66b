"""The protocols of everything that can decide a reveal set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

from orderppl.states import UnmaskingState

if TYPE_CHECKING:
    from orderppl.distributions import SetLaw


@runtime_checkable
class Policy(Protocol):
    """Chooses which masked positions to reveal now."""

    def select(self, state: UnmaskingState) -> Tensor:
        """Return the reveal set z_t: bool [B, L], a subset of `state.masked`."""
        ...


@runtime_checkable
class ScoredPolicy(Policy, Protocol):
    """A policy with a score per position (high = reveal first); the decoder falls back on its arg-max."""

    def score(self, state: UnmaskingState) -> Tensor:
        """Return the score of every position: float [B, L]; values at positions that are not masked are ignored."""
        ...


@runtime_checkable
class StochasticPolicy(Policy, Protocol):
    """A policy that is a distribution over reveal sets, such as a learned prior."""

    def distribution(self, state: UnmaskingState) -> SetLaw:
        """Return the distribution of z_t given the state: batch shape of `state.step`, event [L]."""
        ...
