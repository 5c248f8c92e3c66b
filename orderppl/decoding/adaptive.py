"""Policies whose set sizes depend on what the denoiser is sure of.

c is the largest token probability at a position.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from orderppl.decoding.heuristic import Heuristic
from orderppl.decoding.scores import (
    confidence,
    entropy_before,
    longest_prefix,
    prediction_entropy,
    preferred,
    reveal_rank,
)
from orderppl.errors import UserError
from orderppl.states import UnmaskingState


@dataclass(frozen=True)
class Threshold(Heuristic):
    """All masked positions with c >= tau, at least the arg-max of c (Fast-dLLM, arXiv 2505.22618).

    Args:
        tau: confidence in [0, 1].
    """

    tau: float = 0.9
    name = "threshold"

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 1:
            raise UserError("tau", f"{self.tau} is no probability", "give a number from 0 to 1")

    def score(self, state: UnmaskingState) -> Tensor:
        """Return c."""
        return confidence(state)

    def choose(self, state: UnmaskingState, last: Tensor | None = None) -> Tensor:
        """Return {c >= tau} and the arg-max."""
        score, allowed = self.score(state), preferred(state.masked, last)
        return ((score >= self.tau) | (reveal_rank(score, allowed) == 0)) & allowed


@dataclass(frozen=True)
class Factor(Heuristic):
    """The k most confident positions, k the largest with (k + 1)(1 - c_(k)) < f (Fast-dLLM, arXiv 2505.22618).

    c_(1) >= c_(2) >= ... are the sorted confidences; at least the arg-max is revealed.

    Args:
        factor: f > 0.
    """

    factor: float = 1.0
    name = "factor"

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise UserError("factor", f"{self.factor} is not positive", "give a number above 0")

    def score(self, state: UnmaskingState) -> Tensor:
        """Return c."""
        return confidence(state)

    def choose(self, state: UnmaskingState, last: Tensor | None = None) -> Tensor:
        """Return the k most confident positions."""
        score, allowed = self.score(state), preferred(state.masked, last)
        rank = reveal_rank(score, allowed)
        ordered = score.gather(-1, rank.argsort(-1))  # [*, L], c_(1), c_(2), ...
        k = torch.arange(1, ordered.shape[-1] + 1, device=ordered.device)
        count = longest_prefix((k + 1) * (1 - ordered) < self.factor, allowed.sum(-1))
        return (rank < count[..., None]) & allowed


@dataclass(frozen=True)
class EntropyBound(Heuristic):
    """The k lowest-entropy positions, k the largest with sum H - max H <= gamma (Ben-Hamu et al., arXiv 2505.24857).

    Args:
        gamma: bound in nats, at least 0.
    """

    gamma: float = 0.1
    name = "entropy_bound"

    def __post_init__(self) -> None:
        if not self.gamma >= 0:
            raise UserError("gamma", f"{self.gamma} is negative", "give a bound in nats, 0 or more")

    def score(self, state: UnmaskingState) -> Tensor:
        """Return -H, nats."""
        return -prediction_entropy(state)

    def choose(self, state: UnmaskingState, last: Tensor | None = None) -> Tensor:
        """Return the k lowest-entropy positions."""
        allowed = preferred(state.masked, last)
        others = entropy_before(-self.score(state).double(), allowed)  # the largest of the first k is the k-th
        return (others <= self.gamma) & allowed


@dataclass(frozen=True)
class Klass(Heuristic):
    """c > tau where the last n predictions each moved by KL < eps, at least the arg-max (KLASS, arXiv 2511.05664).

    KL is KL(p now, p one step before) of the token distribution, nats.

    Args:
        tau: confidence in [0, 1].
        eps: bound of the KL, above 0.
        stable_steps: n >= 1.
    """

    tau: float = 0.9
    eps: float = 0.01
    stable_steps: int = 1
    name = "klass"
    remembers = True

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 1:
            raise UserError("tau", f"{self.tau} is no probability", "give a number from 0 to 1")
        if not self.eps > 0:
            raise UserError("eps", f"{self.eps} is not positive", "give a KL in nats above 0")
        if self.stable_steps < 1:
            raise UserError("stable_steps", f"{self.stable_steps} steps", "give 1 or more")

    def score(self, state: UnmaskingState) -> Tensor:
        """Return c."""
        return confidence(state)

    def choose(self, state: UnmaskingState, last: Tensor | None = None) -> Tensor:
        """Return the confident and stable positions and the arg-max."""
        now, memory = state.packed_log_probs, state.memory
        if "klass_log_probs" in memory:
            before = state.pack(memory["klass_log_probs"])
            moved = state.unpack(torch.where(now.isneginf(), 0.0, now.exp() * (now - before)).sum(-1))
            memory["klass_stable"] = torch.where(moved < self.eps, memory["klass_stable"] + 1, 0)
        else:
            memory["klass_stable"] = torch.zeros_like(state.tokens)
        memory["klass_log_probs"] = state.unpack(now)
        score, allowed = self.score(state), preferred(state.masked, last)
        settled = (score > self.tau) & (memory["klass_stable"] >= self.stable_steps)
        return (settled | (reveal_rank(score, allowed) == 0)) & allowed
