"""How learned policies decide: from a distribution over sets, or from a plan of the whole order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from orderppl.decoding.memory import ROW
from orderppl.decoding.policy import StochasticPolicy, remembers
from orderppl.decoding.scores import reveal_rank
from orderppl.denoising import Canvas
from orderppl.errors import UserError
from orderppl.randomness import sample_categorical, uniform
from orderppl.states import UnmaskingState


def _check_decision(decision: str, allowed: tuple[str, ...]) -> None:
    if decision not in allowed:
        raise UserError("decision", f"unknown decision {decision!r}", f"use one of {', '.join(allowed)}")


@dataclass(frozen=True)
class StochasticDecision:
    """Turns a distribution over reveal sets into a set.

    `mode` reveals {beta p > 0.5}, p the inclusion probability (`SetLaw.decide`); an empty set falls to the decoder's
    arg-max rule, as every set does with a beta of 1/2 or less.
    `sample` draws from the distribution (exactly, also when it is conditioned to be non-empty) with the noise of the
    state; see `RevealSet.draw`.

    Args:
        policy: a policy with a distribution.
        decision: "mode" or "sample".
        beta: factor on reveal probabilities, above 0; above 1 reveals more than was trained for.
    """

    policy: StochasticPolicy
    decision: str = "mode"
    beta: float = 1.0
    name = "stochastic"

    @property
    def needs_noise(self) -> bool:
        """Whether it samples."""
        return self.decision == "sample"

    @property
    def remembers(self) -> bool:
        """Whether the wrapped policy reads its memory."""
        return remembers(self.policy)

    def __post_init__(self) -> None:
        _check_decision(self.decision, ("mode", "sample"))
        if not self.beta > 0:
            raise UserError("beta", f"{self.beta} is not positive", "give a number above 0")

    def score(self, state: UnmaskingState) -> Tensor:
        """Return the inclusion probabilities."""
        return self.policy.distribution(state).probs

    def select(self, state: UnmaskingState) -> Tensor:
        """Return the reveal set: bool [*, L]."""
        distribution = self.policy.distribution(state)
        if self.decision == "mode":
            return distribution.decide(self.beta) & state.masked
        noise = state.noise
        if noise is None:
            noise = uniform(state.masked.shape, state.masked.device, torch.float64)
        return distribution.draw(noise, self.beta) & state.masked


@dataclass(frozen=True)
class NetworkPlan:
    """Reads a plan from a sequence network that does not see the tokens, such as that of a tied mean-field guide.

    Args:
        network: (None, attention_mask, context, context_mask) -> step logits, float [B, L, T].
    """

    network: nn.Module

    def __call__(self, canvas: Canvas) -> Tensor:
        """Step logits of the rows of the canvas: float [B, L, T]."""
        logits: Tensor = self.network(None, canvas.attention_mask, canvas.context, canvas.context_mask)
        return logits

    def of_opening(self, state: UnmaskingState) -> Tensor:
        """The same at the first state; a network with a `plan_from` reads the denoiser's forward there."""
        plan_from = getattr(self.network, "plan_from", None)
        if plan_from is None:
            return self(state.canvas)
        logits: Tensor = plan_from(state.log_probs, state.attention_mask)
        return logits


@dataclass(frozen=True)
class PlannedOrder:
    """Follows a plan of the whole order, made at the first step and kept in the memory of the decoding.

    A step at which nothing is planned is skipped and not charged: each forward reveals the next non-empty set.

    Args:
        plan: `reveal_step` int64 [B, L] or [L], or a callable from the canvas to logits float [B, L, T] of each
            position's step (`NetworkPlan` for a network); it is called once per decoding.
        decision: how logits become a plan. "sample": one draw per position. "mode": each position's most likely step,
            which for a flat plan puts everything into one step. "rank": sort positions by expected step and cut by the
            expected set sizes, rounded cumulatively.
    """

    plan: Tensor | Callable[[Canvas], Tensor]
    decision: str = "sample"
    name = "planned"
    remembers = True

    @property
    def needs_noise(self) -> bool:
        """Whether it samples its plan."""
        return self.decision == "sample" and not isinstance(self.plan, Tensor)

    def __post_init__(self) -> None:
        _check_decision(self.decision, ("sample", "mode", "rank"))

    def _make(self, state: UnmaskingState) -> Tensor:
        """Plan of the rows in the batch: int64 [B, L]."""
        if isinstance(self.plan, Tensor):
            plan = self.plan.to(state.tokens.device)
            return plan.expand(state.tokens.shape) if plan.dim() == 1 else plan[state.memory[ROW]]
        made = self.plan
        logits = made.of_opening(state) if isinstance(made, NetworkPlan) else made(state.canvas)  # [B, L, T]
        if logits.shape[-1] > state.num_steps:
            problem = f"{state.num_steps} steps for a plan of {logits.shape[-1]}"
            raise UserError("max_steps", problem, "allow as many steps as the plan has")
        if self.decision == "mode":
            return logits.argmax(-1)
        if self.decision == "sample":
            noise = state.noise
            if noise is None:
                noise = uniform(state.masked.shape, logits.device, torch.float64)
            return sample_categorical(logits, noise)
        probs = logits.double().softmax(-1)
        attended = state.attention_mask
        expected = (probs * torch.arange(logits.shape[-1], device=logits.device)).sum(-1)  # [B, L]
        sizes = torch.where(attended[..., None], probs, 0.0).sum(-2)  # [B, T], expected set sizes
        cuts = (sizes.cumsum(-1) + 0.5).floor()  # positions planned up to and including each step
        rank = reveal_rank(-expected, attended)
        return (cuts[..., None, :-1] <= rank[..., None]).sum(-1)  # [B, L]

    def select(self, state: UnmaskingState) -> Tensor:
        """Return the next set of the plan: bool [B, L]."""
        if "plan" not in state.memory:
            state.memory["plan"] = self._make(state)
        plan = state.memory["plan"]
        upcoming = plan.masked_fill(~state.masked, torch.iinfo(plan.dtype).max)
        return state.masked & (plan == upcoming.amin(-1, keepdim=True))

    def score(self, state: UnmaskingState) -> Tensor:
        """Return minus the planned step."""
        if "plan" not in state.memory:
            state.memory["plan"] = self._make(state)
        return -state.memory["plan"].double()
