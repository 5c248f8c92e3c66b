"""Policies around others: blocks, ends predicted last, smoothed decisions, more eager ones, a price."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from orderppl.distributions import DecidedSet, IndependentSet, SetDistribution
from orderppl.errors import UserError
from orderppl.policies.policy import Policy, selected_set
from orderppl.policies.scores import confidence, predicted_tokens, reveal_rank
from orderppl.unmasking import State


class Wrapper(Policy):
    """A policy around another.

    Args:
        policy: the other one.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy
        self.non_empty = policy.non_empty

    @property
    def looks_back(self) -> bool:  # type: ignore[override]
        """Whether the other one does."""
        return self.policy.looks_back

    @property
    def forwards_per_step(self) -> int:  # type: ignore[override]
        """As many as of the other one."""
        return self.policy.forwards_per_step

    def look_back(self, state: State) -> Any:
        """What the other one keeps of the state that it sees."""
        return self.policy.look_back(self.view(state))

    def view(self, state: State) -> State:
        """The state as the other one sees it."""
        return state

    def forward(self, state: State) -> SetDistribution:
        """What the other one says."""
        sets: SetDistribution = self.policy(self.view(state))
        return sets


class Blocks(Wrapper):
    """Semi-autoregressive: the policy only sees the leftmost block that is not finished.

    A row of n blocks gives block b the steps up to floor((b + 1) T / n); steps a block does not use go to the next. The
    last step of a block reveals what is left of it. Blocks are counted over the row's own positions to reveal.

    Args:
        policy: any policy; set sizes, and the steps left that a learned policy sees, are those of the block.
        size: positions per block.

    Raises:
        UserError: a size below 1.
    """

    looks_back = True

    def __init__(self, policy: Policy, size: int) -> None:
        super().__init__(policy)
        if size < 1:
            raise UserError("block_size", f"{size} positions", "give 1 or more")
        self.size = size

    def _blocks(self, state: State) -> tuple[Tensor, Tensor]:
        """Block of every position, int64 [*, S], and the one that is being revealed, int64 [*]."""
        block = (state.latent.long().cumsum(-1) - 1).clamp(min=0) // self.size
        return block, torch.where(state.masked, block, state.shape[-1]).amin(-1)

    def look_back(self, state: State) -> tuple[Tensor, Tensor, Any]:
        """The current block and the step at which it began, int64 [*] each, and what the policy keeps."""
        _, current = self._blocks(state)
        began, inner = state.step, None
        if state.carry is not None:
            before, before_began, inner = state.carry
            began = torch.where(before == current, before_began, state.step)
        if self.policy.looks_back:
            inner = self.policy.look_back(self._view(state, current, began, inner))
        return current, began, inner

    def _view(self, state: State, current: Tensor, began: Tensor, inner: Any) -> State:
        block, _ = self._blocks(state)
        count = (state.num_latent + self.size - 1) // self.size
        end = (current + 1) * state.num_steps // count.clamp(min=1)
        num_steps = (end - began).clamp(min=1)
        step = (state.step - began).minimum(num_steps - 1)
        inside = state.latent & (block == current[..., None])
        return state.restricted(state.masked & inside, inside, carry=inner, step=step, num_steps=num_steps)

    def forward(self, state: State) -> SetDistribution:
        """The policy's set within the block."""
        view = self._view(state, *state.carry)
        sets: SetDistribution = self.policy(view)
        return sets.certain(view.is_last, view.masked)


class EosAware(Wrapper):
    """Keeps positions that are predicted to be end or padding tokens for last.

    The policy sees them when nothing else is masked.

    Args:
        policy: any policy.
        token_ids: the ids of end-of-sequence and padding tokens.

    Raises:
        UserError: no ids.
    """

    def __init__(self, policy: Policy, token_ids: Sequence[int]) -> None:
        super().__init__(policy)
        if not token_ids:
            raise UserError("token_ids", "no end or padding id", "give at least one")
        self.token_ids = list(token_ids)

    def view(self, state: State) -> State:
        """The state without the positions that come last."""
        predicted = predicted_tokens(state)
        other = state.masked
        for index in self.token_ids:
            other = other & (predicted != index)
        return state.restricted(torch.where(other.any(-1, keepdim=True), other, state.masked))


class EndStop(Wrapper):
    """Stops at the end: what stands behind an end token is revealed with it, and costs no further forward.

    An end is there once it has been revealed, and when the first hidden position is predicted to be one with more than
    a confidence. The texts that answers are read from end there anyway. It decodes only: no density is left.

    Args:
        policy: any policy.
        token_ids: ids of end tokens.
        sure: confidence at the first hidden position; 1 waits until an end has been revealed.

    Raises:
        UserError: no ids, or a confidence outside [0, 1].
    """

    def __init__(self, policy: Policy, token_ids: Sequence[int], sure: float = 0.9) -> None:
        super().__init__(policy)
        if not token_ids:
            raise UserError("token_ids", "no end id", "give at least one")
        if not 0 <= sure <= 1:
            raise UserError("sure", f"{sure} is no confidence", "give a number from 0 to 1")
        self.token_ids, self.sure = list(token_ids), sure

    def forward(self, state: State) -> DecidedSet:
        """The other one's set, and all that stands behind an end."""
        sets = super().forward(state)
        selected = selected_set(sets, state)
        predicted = predicted_tokens(state)  # the tokens where they are visible
        ends = torch.zeros_like(selected)
        for index in self.token_ids:
            ends = ends | (predicted == index)
        hidden_before = state.masked.long().cumsum(-1) - state.masked.long()
        surely = state.masked & (hidden_before == 0) & (confidence(state) > self.sure)
        there = ends & state.latent & (~state.masked | selected | surely)
        behind = there.long().cumsum(-1) > 0  # the end itself, and all after it
        return DecidedSet(selected | behind & state.masked, state.masked, sets.non_empty)


class Spaced(Wrapper):
    """What another policy selects, kept apart: the spacing filter of dilated schedules (DUS, arXiv 2506.19037).

    Of the selected positions, the most confident first, one is kept if it is at least

        gap = max(2, floor(spread |M_t| / n))

    away from all that are kept, of n positions to reveal in all; the others wait. What is revealed together then knows
    little of each other.

    Args:
        policy: any policy; of one that draws, what it draws. It decodes only: the draw leaves no density.
        spread: the gap at the start, positive.

    Raises:
        UserError: a spread that is not positive.
    """

    def __init__(self, policy: Policy, spread: float = 8.0) -> None:
        super().__init__(policy)
        if not spread > 0:
            raise UserError("spread", f"{spread} is not positive", "give a distance such as 8")
        self.spread = spread

    def forward(self, state: State) -> DecidedSet:
        """Keep what is far enough from what is surer."""
        sets = super().forward(state)
        selected = selected_set(sets, state)
        count = state.num_latent.clamp(min=1)
        gap = (self.spread * state.masked.sum(-1) / count).floor().clamp(min=2).unsqueeze(-1)  # [*, 1]
        ranked = reveal_rank(confidence(state), selected).argsort(-1)  # [*, S], most confident first
        place = state.attention_mask.long().cumsum(-1)  # padding takes no place
        column = torch.arange(state.shape[-1], device=selected.device)
        kept, near = torch.zeros_like(selected), torch.zeros_like(selected)
        for at in ranked.split(1, -1):  # [*, 1]
            keep = (selected & ~near).gather(-1, at)
            kept = kept | keep & (column == at)
            near = near | keep & ((place - place.gather(-1, at)).abs() < gap)
        return DecidedSet(kept, state.masked, sets.non_empty)


class Smoothed(Wrapper):
    """The most probable set of another policy, each position's decision flipped with a small probability.

        p(z_t | s_t) = prod_{i in M_t} (1 - smoothing)^[z_ti = d_ti] smoothing^[z_ti != d_ti],     d_t = mode(s_t)

    divided by Z when `non_empty`. The flips keep every KL finite; the fewer, the closer to the rule.

    Args:
        policy: the other one.
        smoothing: probability of a flip, above 0 and below 1/2.
        non_empty: condition every set on revealing something.

    Raises:
        UserError: smoothing outside (0, 1/2).
    """

    def __init__(self, policy: Policy, smoothing: float = 0.05, non_empty: bool = True) -> None:
        super().__init__(policy)
        if not 0 < smoothing < 0.5:
            raise UserError("smoothing", f"{smoothing} is not in (0, 0.5)", "give a number such as 0.05")
        self.smoothing, self.non_empty = smoothing, non_empty

    def forward(self, state: State) -> SetDistribution:
        """Flip what the other one decides."""
        return IndependentSet.smoothed(super().forward(state).mode, state.masked, self.smoothing, self.non_empty)


class Eager(Wrapper):
    """Another policy, each position `factor` times as likely to be revealed: {min(1, factor p_i)}.

    Args:
        policy: one with probabilities per position.
        factor: above 0; above 1 reveals more than was learned for.

    Raises:
        UserError: a factor that is not positive, or a policy without such probabilities.
    """

    def __init__(self, policy: Policy, factor: float = 2.0) -> None:
        super().__init__(policy)
        if not factor > 0:
            raise UserError("factor", f"{factor} is not positive", "give a number above 0")
        self.factor = factor

    def forward(self, state: State) -> SetDistribution:
        """The other one's sets, scaled."""
        try:
            return super().forward(state).scaled(self.factor)
        except NotImplementedError as error:
            raise UserError("policy", str(error), "use a policy that decides position by position") from error


class AtPrice(Wrapper):
    """A policy that was learned for a range of step prices, at one of them.

    Args:
        policy: one that reads the price (see `PriceRange`).
        price: nats per step, above 0.

    Raises:
        UserError: a price that is not positive.
    """

    def __init__(self, policy: Policy, price: float) -> None:
        super().__init__(policy)
        if not price > 0:
            raise UserError("price", f"{price} is not positive", "give nats per step above 0")
        self.price = price

    def view(self, state: State) -> State:
        """The state with its price."""
        return state.replace(price=self.price)
