"""A guide that is blind to the tokens, as the policy that it can be deployed as."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from orderppl.distributions import OrderDistribution, SetDistribution
from orderppl.guides.guide import Guide
from orderppl.policies import Policy
from orderppl.policies.plans import next_set
from orderppl.unmasking import Batch, Denoiser, State


class GuidePlan(Policy):
    """policy(s_t) = q(z_t | M_t), for a guide whose order does not depend on what is to be revealed.

    Args:
        guide: one with `sees_tokens = False`; whatever it is, it is shown batches without their hidden tokens.
    """

    looks_back = True

    def __init__(self, guide: Guide) -> None:
        super().__init__()
        self.guide = guide

    def order(self, batch: Batch, denoiser: Denoiser, num_steps: int) -> OrderDistribution:
        """The guide's distribution over whole orders."""
        return self.guide.order(batch.hidden())

    def look_back(self, state: State) -> tuple[Tensor | None]:
        """The order that is followed, int64 [*, S]; none where the guide knows its sets one by one."""
        if state.carry is not None:
            kept: tuple[Tensor | None] = state.carry
            return kept
        order = self.guide.order(state.batch.hidden())
        if order.has_steps:
            return (None,)
        return (order.mode if state.takes_mode else order.draw(state.noise),)

    def forward(self, state: State) -> SetDistribution:
        """The guide's set, or the next one of the order that is followed."""
        followed: Any = None if state.carry is None else state.carry[0]
        if followed is None:
            return self.guide.order(state.batch.hidden()).set_at(state.masked, state.step)
        return next_set(followed, state.masked)
