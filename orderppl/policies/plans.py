"""Plans of the whole order: decided before the first token is known, or fixed for good."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from orderppl.distributions import (
    AutoregressiveOrder,
    DecidedSet,
    IndependentSet,
    OrderDistribution,
    SetDistribution,
    StepwiseOrder,
)
from orderppl.distributions.halved_order import HalvedOrder
from orderppl.errors import UserError
from orderppl.policies.policy import Corrected, Policy
from orderppl.unmasking import Batch, Denoiser, State
from orderppl.unmasking.trajectory import VISIBLE, Path


def next_set(order: Tensor, masked: Tensor) -> DecidedSet:
    """The next non-empty set of an order (int64 [*, S]) among the masked positions (bool [*, S])."""
    upcoming = order.masked_fill(~masked, torch.iinfo(torch.int64).max)
    return DecidedSet(masked & (upcoming == upcoming.amin(-1, keepdim=True)), masked, non_empty=True)


class Planned(Policy):
    """Base of plans: a distribution over whole orders that is known at the opening, when nothing has been revealed.

    A subclass defines `plan`. When decoding, one order is drawn (or its mode taken) at the first step and followed; a
    step at which nothing is planned is skipped and not charged: each forward reveals the next non-empty set. Inside
    blocks and other wrappers it is the plan of the whole row, as far as they let it be followed.
    """

    looks_back = True

    def plan(self, opening: State) -> OrderDistribution:
        """The distribution over whole orders, batch shape [B], event [S].

        Args:
            opening: the state before the first step.
        """
        raise NotImplementedError

    def order(self, batch: Batch, denoiser: Denoiser, num_steps: int) -> OrderDistribution:
        """The plan itself: nothing on the way changes it.

        Raises:
            UserError: a plan of another number of steps.
        """
        plan = self.plan(Path(batch, denoiser, num_steps).opening())
        if plan.num_steps != num_steps:
            problem = f"{num_steps} steps for a plan of {plan.num_steps}"
            raise UserError("num_steps", problem, "give model and guide as many steps as the plan has")
        return plan

    def look_back(self, state: State) -> Tensor:
        """The order that is followed, int64 [*, S]."""
        if state.carry is not None:
            followed: Tensor = state.carry
            return followed
        plan = self.plan(state.whole)
        return plan.mode if state.takes_mode else plan.draw(state.noise)

    def forward(self, state: State) -> SetDistribution:
        """The next set of the order that is followed."""
        if state.carry is None:
            raise UserError("policy", "a plan is played out from its first step on", "ask for its `order`, or decode")
        return next_set(state.carry, state.masked)


def _check_room(opening: State, steps: int) -> None:
    """Whether there are as many steps as a plan has."""
    if steps > opening.num_steps:
        problem = f"{opening.num_steps} steps for a plan of {steps}"
        raise UserError("num_steps", problem, "allow as many steps as the plan has")


class Plan(Planned):
    """A learned plan: independent steps per position, from a network that sees the opening.

        r_i ~ Categorical(softmax(network(s_1)_i)),     independently

    As its own guide (`PolicyGuide`) it is a mean-field guide that is deployable as it is.

    Args:
        network: opening state -> step logits, float [B, S, T]; it may read given tokens, and what the denoiser expects.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def corrected(self, correction: nn.Module) -> Plan:
        """See `Policy`: step logits are corrected, float [B, S, T]."""
        return Plan(Corrected(self.network, correction))

    def plan(self, opening: State) -> StepwiseOrder:
        """See `Planned`.

        Raises:
            UserError: a plan of more steps than there are, or a network of scores, one per position.
        """
        logits = self.network(opening)  # [B, S, T]
        if logits.shape[-1] == 1 < opening.num_steps:  # it would reveal everything at once
            problem = f"gives one number per position, as for a ranking, where {opening.num_steps} steps are planned"
            raise UserError("network", problem, f"set its output size to {opening.num_steps}")
        _check_room(opening, logits.shape[-1])
        return StepwiseOrder(logits, opening.latent)


class ScanPlan(Planned):
    """A learned plan whose steps depend on each other: a scan along the positions, or along groups of them.

        r_i ~ Categorical(softmax(network(context_i, r_{before i})))

    Deploy its mode, or its draws. Without a beam search the most probable of a few draws stands for the mode, which is
    enough for a plan that has settled on one order.

    Args:
        network: a scan (see `orderppl.distributions.autoregressive_order.Scan`): `ScanNetwork` goes from position to
            position, `GroupedNetwork` from group to group.
        context: opening state -> float [B, S, W], what is known of every position; the network's own `context` when
            left out.
        beams: beginnings of an order that the search for the mode keeps, such as 64; None looks at draws only.

    Raises:
        UserError: less than one of these.
    """

    def __init__(self, network: nn.Module, context: nn.Module | None = None, beams: int | None = None) -> None:
        super().__init__()
        if beams is not None and beams < 1:
            raise UserError("beams", f"a search that keeps {beams}", "keep at least 1, or leave it out")
        self.network, self.context, self.beams = network, context, beams

    def plan(self, opening: State) -> AutoregressiveOrder:
        """See `Planned`.

        Raises:
            UserError: a plan of more steps than there are.
        """
        assert isinstance(opening.num_steps, int)
        network: Any = self.network
        _check_room(opening, getattr(network, "num_steps", 0))
        context = (network.context if self.context is None else self.context)(opening)
        return AutoregressiveOrder(network, context, opening.latent, opening.num_steps, self, self.beams)

    def corrected(self, correction: nn.Module) -> ScanPlan:
        """See `Policy`: what is known of the positions is corrected, float [B, S, W]."""
        context: Any = self.network.context if self.context is None else self.context
        return ScanPlan(self.network, Corrected(context, correction), self.beams)


class Halved(Planned):
    """A plan with every step played in two: every other position of a set first, the ones between them after it.

    From coarse to fine: few steps are learned more easily than many, and what was apart stays apart.

    Args:
        coarse: a plan of half as many steps, rounded up; of an odd number the last one is played at once.

    Raises:
        UserError: no plan.
    """

    def __init__(self, coarse: Policy) -> None:
        super().__init__()
        if not isinstance(coarse, Planned):
            raise UserError(
                "coarse", f"{type(coarse).__name__} is no plan", "use e.g. a ScanPlan of half as many steps"
            )
        self.coarse = coarse

    def plan(self, opening: State) -> HalvedOrder:
        """See `Planned`."""
        assert isinstance(opening.num_steps, int)
        coarse = self.coarse.plan(opening.replace(num_steps=(opening.num_steps + 1) // 2))
        return HalvedOrder(coarse, min(opening.num_steps, 2 * coarse.num_steps))

    def corrected(self, correction: nn.Module) -> Halved:
        """See `Policy`: the coarse plan is corrected."""
        return Halved(self.coarse.corrected(correction))


class RandomSteps(Policy):
    """r_i independent over the steps with the probabilities of a schedule, whatever the tokens.

        P(r_i = t) = alpha(t / T) - alpha((t + 1) / T)

    where alpha(u) is the fraction still masked at time u: 1 - u, the usual masked diffusion schedule discretised
    ("uniform"), or cos(pi u / 2), few positions early and many late ("cosine", MaskGIT, arXiv 2202.04200).

    Args:
        schedule: "uniform" or "cosine".

    Raises:
        UserError: another schedule.
    """

    def __init__(self, schedule: Literal["uniform", "cosine"] = "uniform") -> None:
        super().__init__()
        if schedule not in ("uniform", "cosine"):
            raise UserError("schedule", f"unknown schedule {schedule!r}", "use uniform or cosine")
        self.schedule = schedule

    def _steps(self, masked: Tensor, num_steps: int) -> StepwiseOrder:
        time = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64, device=masked.device)
        alpha = 1 - time if self.schedule == "uniform" else torch.cos(time * math.pi / 2)
        logits = (alpha[:-1] - alpha[1:]).log().to(torch.get_default_dtype())  # [T]
        return StepwiseOrder(logits[None], masked)

    def order(self, batch: Batch, denoiser: Denoiser, num_steps: int) -> StepwiseOrder:
        """Closed form over orders."""
        return self._steps(batch.latent, num_steps)

    def forward(self, state: State) -> IndependentSet:
        """Reveal by hazard P(r_i = t | r_i >= t)."""
        if isinstance(state.num_steps, Tensor):
            raise UserError("policy", "random steps know no blocks", "use Ranked(score='random') inside blocks")
        return self._steps(state.masked, state.num_steps).set_at(state.masked, state.step)


class PlacedOrder(Planned):
    """Base of orders without chance: the step of a position follows from its place.

    A subclass defines `steps_of`; with `counts_given`, given positions have places too.
    """

    counts_given = False

    def steps_of(self, place: Tensor, num_steps: int) -> Tensor:
        """Step of every position, int64 [*, S], at least 0; steps behind the last one are cut to it.

        Args:
            place: int64 [*, S], 0-based, counted from the left over the positions to reveal, or over all of the row.
            num_steps: T.
        """
        raise NotImplementedError

    def look_back(self, state: State) -> Any:
        """See `Planned`."""
        return self._order(state.whole) if state.carry is None else state.carry

    def _order(self, state: State) -> Tensor:
        assert isinstance(state.num_steps, int)
        counted = state.attention_mask.bool().expand_as(state.latent) if self.counts_given else state.latent
        place = (counted.long().cumsum(-1) - 1).clamp(min=0)
        return self.steps_of(place, state.num_steps).masked_fill(~state.latent, VISIBLE)

    def plan(self, opening: State) -> StepwiseOrder:
        """See `Planned`: nothing is left to chance."""
        assert isinstance(opening.num_steps, int)
        order = self._order(opening).clamp(max=opening.num_steps - 1)
        certain = torch.nn.functional.one_hot(order.clamp(min=0), opening.num_steps)
        return StepwiseOrder(certain.to(torch.get_default_dtype()).log(), opening.latent)


class FixedOrder(PlacedOrder):
    """One order for all sequences, or a pattern that repeats: the positions to reveal are counted from the left.

    Args:
        steps: step of every position, from 0; positions behind the last one are revealed at the end.
        periodic: repeat the steps as a pattern, for rows of any length.
        counts_given: lay the steps on the whole row: given positions are counted too.

    Raises:
        UserError: no steps, or negative ones.
    """

    def __init__(self, steps: Sequence[int], periodic: bool = False, counts_given: bool = False) -> None:
        super().__init__()
        if not len(steps) or min(steps) < 0:
            raise UserError("steps", f"{list(steps)} is no order", "give one step of 0 or more per position")
        self.periodic, self.counts_given = periodic, counts_given
        self.register_buffer("steps", torch.as_tensor(list(steps), dtype=torch.int64), persistent=False)
        self.steps: Tensor

    def steps_of(self, place: Tensor, num_steps: int) -> Tensor:
        """See `PlacedOrder`."""
        steps = self.steps
        if self.periodic:
            return steps[place % len(steps)]
        return torch.where(place < len(steps), steps[place.clamp(max=len(steps) - 1)], int(1e9))


class Dilated(PlacedOrder):
    """Spread out first, then halfway between: the dilated schedule (arXiv 2506.19037), untrained.

        r_i = 0 where 2^(T-1) divides i,      otherwise T - 1 - (the largest k with 2^k dividing i)

    In three steps 0 2 1 2 0 2 1 2 ..: what a step reveals together is as far apart as it can be. The positions to
    reveal are counted from the left.
    """

    def steps_of(self, place: Tensor, num_steps: int) -> Tensor:
        """See `PlacedOrder`."""
        steps = torch.full_like(place, num_steps - 1)
        for k in range(1, num_steps):
            steps = steps - (place % 2**k == 0).long()
        return steps
