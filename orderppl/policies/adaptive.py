"""Policies whose set sizes depend on what the denoiser is sure of.

c is the largest token probability at a position.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from orderppl.distributions import DecidedSet, SetDistribution
from orderppl.errors import UserError
from orderppl.policies.policy import LOGIT_LIMIT, LogitPolicy, Policy, check_temperature, need_temperature
from orderppl.policies.scores import (
    best_of,
    confidence,
    entropy_before,
    longest_prefix,
    prediction_entropy,
    reveal_rank,
)
from orderppl.unmasking import State


class Threshold(LogitPolicy):
    """All masked positions with c >= tau, at least the arg-max of c (Fast-dLLM, arXiv 2505.22618).

        temperature 0:  {c_i >= tau} and the arg-max
        above 0:        logit p_i = (logit c_i - logit tau) / temperature

    Args:
        tau: confidence in [0, 1]; inside, where the temperature is above 0.
        temperature: at least 0.

    Raises:
        UserError: no confidence, or a negative temperature.
    """

    def __init__(self, tau: float = 0.9, temperature: float = 0.0) -> None:
        super().__init__()
        if not 0 <= tau <= 1 or (temperature > 0 and tau in (0, 1)):
            raise UserError("tau", f"{tau} is no probability to compare with", "give a number such as 0.9")
        check_temperature(temperature)
        self.tau, self.temperature = tau, temperature

    def logits(self, state: State) -> Tensor:
        """Log-odds of revealing each position, float [*, S]; see `Ranked.logits`."""
        need_temperature(self, self.temperature)
        odds = torch.logit(confidence(state), eps=1e-6) - math.log(self.tau / (1 - self.tau))
        return (odds / self.temperature).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)

    def forward(self, state: State) -> SetDistribution:
        """The sets above."""
        if self.temperature > 0:
            return super().forward(state)
        c = confidence(state)
        return DecidedSet(((c >= self.tau) & state.masked) | best_of(c, state.masked), state.masked, non_empty=True)


class EntropyBound(LogitPolicy):
    """The k lowest-entropy positions, k the largest with sum H - max H <= gamma (Ben-Hamu et al., arXiv 2505.24857).

        temperature 0:  {i : sum_{j : H_j < H_i} H_j <= gamma}
        above 0:        logit p_i = (gamma - sum_{j : H_j < H_i} H_j) / temperature

    Unlike a confidence, the sum tells equally uncertain positions apart (ties go to the left), so that one of two cells
    that depend on each other can be revealed without the other.

    Args:
        gamma: bound in nats, at least 0.
        temperature: nats, at least 0.

    Raises:
        UserError: a negative number.
    """

    def __init__(self, gamma: float = 0.1, temperature: float = 0.0) -> None:
        super().__init__()
        if not gamma >= 0:
            raise UserError("gamma", f"{gamma} is negative", "give a bound in nats, 0 or more")
        check_temperature(temperature)
        self.gamma, self.temperature = gamma, temperature

    def logits(self, state: State) -> Tensor:
        """Log-odds of revealing each position, float [*, S]; see `Ranked.logits`."""
        need_temperature(self, self.temperature)
        before = entropy_before(prediction_entropy(state), state.masked)
        return ((self.gamma - before) / self.temperature).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)

    def forward(self, state: State) -> SetDistribution:
        """The sets above."""
        if self.temperature > 0:
            return super().forward(state)
        others = entropy_before(prediction_entropy(state).double(), state.masked)  # the largest of k is the k-th
        return DecidedSet((others <= self.gamma) & state.masked, state.masked, non_empty=True)


class Factor(Policy):
    """The k most confident positions, k the largest with (k + 1)(1 - c_(k)) < f (Fast-dLLM, arXiv 2505.22618).

    c_(1) >= c_(2) >= ... are the sorted confidences; at least the arg-max is revealed.

    Args:
        factor: f > 0.

    Raises:
        UserError: a factor that is not positive.
    """

    non_empty = True

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        if not factor > 0:
            raise UserError("factor", f"{factor} is not positive", "give a number above 0")
        self.factor = factor

    def forward(self, state: State) -> SetDistribution:
        """The k most confident positions."""
        c = confidence(state)
        rank = reveal_rank(c, state.masked)
        ordered = c.gather(-1, rank.argsort(-1))  # [*, S], c_(1), c_(2), ...
        k = torch.arange(1, ordered.shape[-1] + 1, device=ordered.device)
        count = longest_prefix((k + 1) * (1 - ordered) < self.factor, state.masked.sum(-1))
        return DecidedSet((rank < count[..., None]) & state.masked, state.masked, non_empty=True)


class Klass(Policy):
    """c > tau where the last n predictions each moved by KL < eps, at least the arg-max (KLASS, arXiv 2511.05664).

    KL is KL(p now, p one step before) of the token distribution, nats.

    Args:
        tau: confidence in [0, 1].
        eps: bound of the KL, above 0.
        stable_steps: n >= 1.

    Raises:
        UserError: a number outside these bounds.
    """

    non_empty = True
    looks_back = True

    def __init__(self, tau: float = 0.9, eps: float = 0.01, stable_steps: int = 1) -> None:
        super().__init__()
        if not 0 <= tau <= 1:
            raise UserError("tau", f"{tau} is no probability", "give a number from 0 to 1")
        if not eps > 0:
            raise UserError("eps", f"{eps} is not positive", "give a KL in nats above 0")
        if stable_steps < 1:
            raise UserError("stable_steps", f"{stable_steps} steps", "give 1 or more")
        self.tau, self.eps, self.stable_steps = tau, eps, stable_steps

    def look_back(self, state: State) -> tuple[Tensor, Tensor]:
        """Log-probabilities float [*, S, V] now, and for how many steps they have been stable, int64 [*, S]."""
        now = state.per_position(lambda log_probs: log_probs)
        if state.carry is None:
            return now, torch.zeros_like(state.tokens)
        before, stable = state.carry
        moved = torch.where(now.isneginf(), 0.0, now.exp() * (now - before)).sum(-1)
        return now, torch.where(moved < self.eps, stable + 1, 0)

    def forward(self, state: State) -> SetDistribution:
        """The confident and stable positions, and the arg-max."""
        c, (_, stable) = confidence(state), state.carry
        settled = (c > self.tau) & (stable >= self.stable_steps) & state.masked
        return DecidedSet(settled | best_of(c, state.masked), state.masked, non_empty=True)
