"""The protocols of everything that can decide a reveal set, and what may be asked of any of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

from orderppl.decoding.scores import confidence
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


def needs_noise(policy: Policy) -> bool:
    """Whether a policy reads `state.noise`; a policy that does not say so may."""
    return bool(getattr(policy, "needs_noise", True))


def remembers(policy: Policy) -> bool:
    """Whether a policy reads what it kept in `state.memory` at earlier steps; a policy that does not say so may."""
    return bool(getattr(policy, "remembers", True))


def policy_score(policy: Policy, state: UnmaskingState) -> Tensor:
    """What a fallback ranks by: the policy's own score or inclusion probabilities, else confidence; float [*, L]."""
    score = getattr(policy, "score", None)
    if callable(score):
        return score(state)
    if isinstance(policy, StochasticPolicy):
        return policy.distribution(state).probs
    return confidence(state)
