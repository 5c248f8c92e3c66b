"""The states that a batch of sequences goes through under a reveal order."""

from __future__ import annotations

from typing import NamedTuple

import torch
from pyro.ops.provenance import detach_provenance
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from orderppl.denoising import Canvas
from orderppl.randomness import stratified_uniform
from orderppl.states import FollowedStates, StackedStates, UnmaskingState, masked_before, partial_state, stacked_steps


class _Followed(NamedTuple):
    """The states that a policy has met on its way."""

    tokens: Tensor
    states: StackedStates
    weights: list[int] | None  # versions of the denoiser's parameters where the states have a gradient to them


# Orders that a policy has just been followed along. The guide that drew an order and the model that scores it are two
# programs with a path each; through this they share the denoiser calls.
_FOLLOWED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class RevealPath:
    """True tokens on a canvas, ready to be revealed in any order.

    Calling it with an order builds the states of all its steps at once, with one (lazy) denoiser call on them, and
    remembers them: prior and likelihood of one program ask for the same states.

    Args:
        canvas: prompt, padding and denoiser.
        tokens: int64 [B, L], clean tokens x.
        num_steps: step budget T.
        one_step: look at one step per sequence only, drawn uniformly (stratified over the batch) and shared by the
            particles of a sequence.
    """

    def __init__(self, canvas: Canvas, tokens: Tensor, num_steps: int, one_step: bool = False) -> None:
        self.canvas = canvas
        self.tokens = tokens
        self.num_steps = num_steps
        self.steps = _one_step_each(len(tokens), num_steps, tokens.device) if one_step else None
        self._last: tuple[Tensor, UnmaskingState] | None = None

    @property
    def attention_mask(self) -> Tensor:
        """bool [B, L], False at padding; the positions masked before the first step."""
        return self.canvas.attention_mask

    def state_at(self, masked: Tensor, step: Tensor) -> UnmaskingState:
        """The state that hides `masked` (bool [*, B, L]) before `step` (int64 [*, B])."""
        state = partial_state(self.tokens, masked, self.canvas.mask_index)
        return UnmaskingState(state, masked, step, self.num_steps, self.canvas)

    def __call__(self, reveal_step: Tensor) -> UnmaskingState:
        """States before each step of an order (int64 [*, B, L]), stacked: [S, *, B, L]."""
        reveal_step = detach_provenance(reveal_step)
        if self._last is None or self._last[0] is not reveal_step:
            followed = self._followed(reveal_step)
            if followed is not None:
                self._last = reveal_step, followed
                return followed
            shape = torch.broadcast_shapes(reveal_step.shape, self.tokens.shape)  # enumerated orders lack the batch
            order = reveal_step.expand(shape)
            step = stacked_steps(self.num_steps, order).squeeze(-1) if self.steps is None else self.steps
            step = step.reshape(step.shape[:1] + (1,) * (len(shape) - step.dim()) + step.shape[1:])
            step = step.expand(step.shape[:1] + shape[:-1])  # [S, *, B]
            masked = masked_before(order, step.unsqueeze(-1))
            self._last = reveal_step, self._stack(masked, step) if self.steps is None else self.state_at(masked, step)
        return self._last[1]

    def _stack(self, masked: Tensor, step: Tensor) -> StackedStates:
        tokens = partial_state(self.tokens, masked, self.canvas.mask_index)
        return StackedStates(tokens, masked, step, self.num_steps, self.canvas)

    @property
    def is_frozen(self) -> bool:
        """Whether no gradient can reach the denoiser."""
        denoiser = self.canvas.denoiser
        return not (isinstance(denoiser, torch.nn.Module) and any(p.requires_grad for p in denoiser.parameters()))

    def _followed(self, reveal_step: Tensor) -> StackedStates | None:
        """What was met while this order was drawn, if this path would meet the same."""
        found = _FOLLOWED.get(reveal_step)
        if found is None or self.steps is not None or not self._shares(found.tokens, found.states):
            return None
        if found.weights is not None:
            del _FOLLOWED[reveal_step]  # a graph serves once
            if found.weights != self._weights():
                return None
        return found.states

    def _weights(self) -> list[int]:
        """Versions of the denoiser's parameters: an update changes them."""
        denoiser = self.canvas.denoiser
        return [p._version for p in denoiser.parameters()] if isinstance(denoiser, torch.nn.Module) else []

    def remember(self, reveal_step: Tensor, states: list[UnmaskingState]) -> None:
        """Keep the states met while an order was drawn, so that scoring it needs no further denoiser call.

        States that lack the gradient to a denoiser that can be trained are of no use.

        Args:
            reveal_step: int64 [*, B, L], the order.
            states: its T states; the first without particles, leading shape [B], the others [*, B].
        """
        if not (self.is_frozen or torch.is_grad_enabled()):
            return
        was_read = "logits" in states[0].__dict__
        if was_read:
            for state in states:
                state.token_log_prob(self.tokens)  # at the last step, which no policy looks at, too
                state.__dict__.pop("log_probs", None)  # as large as the logits, and made of them
        stacked: StackedStates = FollowedStates(states)
        if not was_read:  # a policy that ignores the logits has made no denoiser call worth keeping
            stacked = StackedStates(stacked.tokens, stacked.masked, stacked.step, self.num_steps, self.canvas)
        self._last = reveal_step, stacked
        weights = self._weights() if was_read and not self.is_frozen else None
        # What is kept must not hold the order, or neither would ever be freed.
        _FOLLOWED[reveal_step] = _Followed(self.tokens, stacked, weights)

    def adopt(self, reveal_step: Tensor, tokens: Tensor, states: UnmaskingState) -> bool:
        """Go on with the states of an order that a path of another program has built, if they are the same T states.

        Args:
            reveal_step: int64 [*, B, L], the order.
            tokens: int64 [B, L], the clean tokens of the other path.
            states: its stack.
        """
        if self.steps is not None or len(states.step) != self.num_steps or not self._shares(tokens, states):
            return False
        self._last = reveal_step, states
        return True

    def _shares(self, tokens: Tensor, state: UnmaskingState) -> bool:
        mine, theirs = self.canvas, state.canvas
        same_canvas = mine.denoiser is theirs.denoiser and mine.context is theirs.context
        return same_canvas and self.tokens is tokens and self.num_steps == state.num_steps


def _one_step_each(num_sequences: int, num_steps: int, device: torch.device) -> Tensor:
    """One uniform step per sequence, int64 [1, B]; the sequences of a batch spread evenly over the steps."""
    part = stratified_uniform(num_sequences, device)
    return (part * num_steps).long().clamp_max(num_steps - 1).unsqueeze(0)
