"""Policies that rank the masked positions and reveal as many as a schedule says."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from orderppl.decoding.heuristic import Heuristic
from orderppl.decoding.memory import block_window
from orderppl.decoding.schedules import SetSizes, UniformSizes
from orderppl.decoding.scores import confidence, prediction_entropy, reveal_rank
from orderppl.errors import UserError
from orderppl.randomness import uniform
from orderppl.states import UnmaskingState


def due_count(sizes: SetSizes, state: UnmaskingState) -> Tensor:
    """Positions to reveal now: int64 [*], at least 1; a row ahead of or behind its schedule returns to it."""
    positions, step, num_steps = block_window(state)
    revealed = positions - state.masked.sum(-1)
    return (sizes.cumulative(positions, step + 1, num_steps) - revealed).clamp(min=1)


@dataclass(frozen=True)
class RankPolicy(Heuristic):
    """Reveals the K positions of highest score, K from a schedule.

    Args:
        sizes: set sizes; uniform when left out.
        ties: which of equally scored positions comes first: the "leftmost", or a "random" one by the state's noise.
            Where a denoiser is exactly symmetric, leftmost turns a confidence rule into left-to-right.
    """

    sizes: SetSizes = field(default_factory=UniformSizes)
    ties: str = "leftmost"

    def __post_init__(self) -> None:
        if self.ties not in ("leftmost", "random"):
            raise UserError("ties", f"unknown rule {self.ties!r}", "use leftmost or random")

    @property
    def needs_noise(self) -> bool:  # type: ignore[override]
        """Whether ties are broken at random."""
        return self.ties == "random"

    def choose(self, state: UnmaskingState, last: Tensor | None = None) -> Tensor:
        """Return the K first masked positions, K as `due_count` says."""
        count = due_count(self.sizes, state)
        tie_break = state.noise if self.ties == "random" else None
        return (reveal_rank(self.score(state), state.masked, last, tie_break) < count[..., None]) & state.masked


@dataclass(frozen=True)
class Random(RankPolicy):
    """K masked positions drawn uniformly without replacement: score = uniform noise."""

    name = "random"
    needs_noise = True

    def score(self, state: UnmaskingState) -> Tensor:
        """Return the noise of the state, or torch's when it has none."""
        if state.noise is not None:
            return state.noise
        return uniform(state.masked.shape, state.masked.device, torch.float64)


@dataclass(frozen=True)
class TopProb(RankPolicy):
    """K largest c = max_v p(v)."""

    name = "top_prob"

    def score(self, state: UnmaskingState) -> Tensor:
        """Return c."""
        return confidence(state)


@dataclass(frozen=True)
class Margin(RankPolicy):
    """K largest p1 - p2, the two largest token probabilities (Kim et al., arXiv 2502.06768)."""

    name = "margin"

    def score(self, state: UnmaskingState) -> Tensor:
        """Return p1 - p2."""
        return state.per_position(lambda log_probs: -log_probs.topk(2, -1).values.exp().diff(dim=-1)[..., 0])


@dataclass(frozen=True)
class Entropy(RankPolicy):
    """K smallest entropies: score = -H."""

    name = "entropy"

    def score(self, state: UnmaskingState) -> Tensor:
        """Return -H, nats."""
        return -prediction_entropy(state)


@dataclass(frozen=True)
class LeftToRight(RankPolicy):
    """K leftmost masked positions: score = -position."""

    name = "left_to_right"

    def score(self, state: UnmaskingState) -> Tensor:
        """Return -position."""
        size = state.masked.shape[-1]
        return -torch.arange(size, dtype=torch.float64, device=state.masked.device).expand(state.masked.shape)
