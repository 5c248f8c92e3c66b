"""Wrappers around any policy: semi-autoregressive blocks, ends predicted last, an end once the answer is known."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orderppl.data.answer_tokens import is_any_of
from orderppl.decoding.heuristic import Heuristic
from orderppl.decoding.memory import WINDOW
from orderppl.decoding.policy import Policy, needs_noise, policy_score, remembers
from orderppl.decoding.scores import answer_confidence, predicted_token, preferred, reveal_rank
from orderppl.errors import UserError
from orderppl.states import UnmaskingState


def restricted(state: UnmaskingState, masked: Tensor, step: Tensor | None = None) -> UnmaskingState:
    """The same state with fewer positions to choose from; shares the logits and the memory."""
    view = copy.copy(state)
    view.masked = masked
    if step is not None:
        view.step = step
    return view


def choose_with_last(policy: Policy, state: UnmaskingState, last: Tensor | None) -> Tensor:
    """Ask a policy for its set with some positions ranked last."""
    if last is None:
        return policy.select(state)
    choose = getattr(policy, "choose", None)
    if callable(choose):
        return choose(state, last)
    return policy.select(restricted(state, preferred(state.masked, last)))


@dataclass(frozen=True)
class Wrapper(Heuristic):
    """A policy around another, which needs what that one needs.

    Args:
        policy: any policy.
    """

    policy: Policy

    @property
    def needs_truth(self) -> bool:  # type: ignore[override]
        """Whether the wrapped policy reads the true tokens."""
        return bool(getattr(self.policy, "needs_truth", False))

    @property
    def needs_noise(self) -> bool:  # type: ignore[override]
        """Whether the wrapped policy reads the noise."""
        return needs_noise(self.policy)

    @property
    def remembers(self) -> bool:  # type: ignore[override]
        """Whether the wrapped policy reads its memory."""
        return remembers(self.policy)


@dataclass(frozen=True)
class Block(Wrapper):
    """Semi-autoregressive: the policy only sees the leftmost block that is not finished.

    A row of n blocks gives block b the steps up to floor((b + 1) T / n); steps a block does not use go to the next. The
    last step of a block reveals what is left of it. Blocks are counted from the row's own start and with the row's own
    length.

    Args:
        policy: any policy. Set sizes, and the steps left that a learned policy sees, are those of the block.
        size: positions per block.
    """

    size: int
    name = "block"
    remembers = True

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError("block_size", f"{self.size} positions", "give 1 or more")

    def _enter(self, state: UnmaskingState) -> tuple[UnmaskingState, Tensor]:
        """State of the current block, and whether this is its last step (bool [B])."""
        attention = state.attention_mask
        block = (attention.long().cumsum(-1) - 1).clamp(min=0) // self.size  # [B, L]
        length = attention.sum(-1)
        blocks = (length + self.size - 1) // self.size
        current = torch.where(state.masked, block, state.masked.shape[-1]).amin(-1)
        began = state.step
        if "block" in state.memory:
            before, before_began = state.memory["block"].unbind(-1)
            began = torch.where(before == current, before_began, state.step)
        state.memory["block"] = torch.stack([current, began], -1)
        end = (current + 1) * state.num_steps // blocks.clamp(min=1)
        num_steps = (end - began).clamp(min=1)
        step = (state.step - began).minimum(num_steps - 1)
        inside = attention & (block == current[..., None])
        state.memory[WINDOW] = torch.stack([inside.sum(-1), step, num_steps], -1)
        view = restricted(state, state.masked & inside, state.num_steps - (num_steps - step))
        return view, step == num_steps - 1

    def score(self, state: UnmaskingState) -> Tensor:
        """Return the wrapped policy's score, -inf outside the block."""
        view, _ = self._enter(state)
        return policy_score(self.policy, view).masked_fill(~view.masked, -torch.inf)

    def choose(self, state: UnmaskingState, last: Tensor | None = None) -> Tensor:
        """Return the wrapped policy's set within the block."""
        view, final = self._enter(state)
        chosen = choose_with_last(self.policy, view, last) & view.masked
        return torch.where(final[..., None], view.masked, chosen)


@dataclass(frozen=True)
class EosAware(Wrapper):
    """Ranks positions that are predicted to be end or padding tokens behind all others.

    With a policy that ranks or cuts scores this changes the ranking only; any other policy sees those positions when
    nothing else is masked.

    Args:
        policy: any policy.
        token_ids: the ids of end-of-sequence and padding tokens.
    """

    token_ids: Sequence[int]
    name = "eos_aware"

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise UserError("token_ids", "no end or padding id", "give at least one")

    def _last(self, state: UnmaskingState) -> Tensor:
        return is_any_of(predicted_token(state), self.token_ids)

    def score(self, state: UnmaskingState) -> Tensor:
        """Return minus the rank, so that the order of the wrapped policy holds within both groups."""
        return -reveal_rank(policy_score(self.policy, state), state.masked, self._last(state)).double()

    def choose(self, state: UnmaskingState, last: Tensor | None = None) -> Tensor:
        """Return the wrapped policy's set with end and padding predictions last."""
        mine = self._last(state)
        return choose_with_last(self.policy, state, mine if last is None else mine | last)


@dataclass(frozen=True)
class AnswerReady(Wrapper):
    """Ends a row once the answer is known: early commit, as of Prophet (arXiv 2508.19982), by confidence.

        z_t = M_t  if  min_{i in A and M_t} c_i >= sure,  otherwise the policy's set

    A is where the answer stands if every hidden token is the most likely one.

    Args:
        policy: any policy.
        answer: tokens int64 [B, L], `NO_TOKEN` at padding -> bool [B, L], which of them are the answer, such as
            `AnswerTokens`.
        sure: confidence in [0, 1].
    """

    answer: Callable[[Tensor], Tensor]
    sure: float = 0.9
    name = "answer_ready"

    def __post_init__(self) -> None:
        if not 0 <= self.sure <= 1:
            raise UserError("sure", f"{self.sure} is no probability", "give a number from 0 to 1")

    def score(self, state: UnmaskingState) -> Tensor:
        """Return the wrapped policy's score."""
        return policy_score(self.policy, state)

    def choose(self, state: UnmaskingState, last: Tensor | None = None) -> Tensor:
        """Return everything, or the wrapped policy's set."""
        ready = answer_confidence(state, self.answer).unsqueeze(-1) >= self.sure
        return torch.where(ready, state.masked, choose_with_last(self.policy, state, last))
