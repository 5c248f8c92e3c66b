"""One step of unmasking: what is revealed now, and what is written there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from orderppl.decoding.policy import Policy, policy_score
from orderppl.decoding.predictions import DecodingState, true_places
from orderppl.decoding.scores import reveal_rank
from orderppl.randomness import TOKENS, sample_categorical, uniform_noise
from orderppl.states import UnmaskingState

Write = Callable[[Tensor, DecodingState, Tensor], Tensor]
"""Tokens int64 [R] for places int64 [R] of a state, numbered through the batch, given their logits float [R, V]."""


@dataclass
class Step:
    """What a step did.

    Attributes:
        tokens: int64 [B, L], after the step.
        masked: bool [B, L], after the step.
        reveal: bool [B, L], the reveal set z_t.
        fallback: bool [B], rows whose policy selected nothing; None when there is none.
        places: int64 [R], where `reveal` is true, numbered through the batch.
        log_prob: float64 [R], of the tokens written there, at temperature 1.
        rows_left: rows with a mask after the step.
        masks_left: masks after the step.
    """

    tokens: Tensor
    masked: Tensor
    reveal: Tensor
    fallback: Tensor | None
    places: Tensor
    log_prob: Tensor
    rows_left: int
    masks_left: int


def or_best(policy: Policy, state: UnmaskingState, selected: Tensor) -> Tensor:
    """What a policy selected (bool [B, L]); in rows where that is nothing, the masked position it scores highest."""
    selected = selected & state.masked
    best = (reveal_rank(policy_score(policy, state), state.masked) == 0) & state.masked
    return torch.where(selected.any(-1, keepdim=True), selected, best)


def unmask(policy: Policy, state: DecodingState, write: Write, is_last: bool) -> Step:
    """Reveal what the policy selects, at least one position of each row, and everything that is left at the last step.

    Waits for the device once, to learn what is left; a second time where the policy selected nothing in some row.

    Args:
        policy: decides the reveal set.
        state: every row has a mask.
        write: decides the tokens.
        is_last: whether this is the last step of the budget.
    """
    masked, masks = state.masked, state.predictions.count
    fallback = None
    if is_last:
        reveal, rows_left, masks_left = masked, 0, 0
    else:
        reveal = policy.select(state) & masked
        rows_left, masks_left, empty_rows = _remaining(masked, reveal)
        if empty_rows:
            fallback = ~reveal.any(-1)
            reveal = or_best(policy, state, reveal)
            rows_left, masks_left, _ = _remaining(masked, reveal)
    places = true_places(reveal.flatten(), masks - masks_left)
    logits = state.predictions.at(places)  # [R, V]
    written = write(logits, state, places)
    log_prob = logits.log_softmax(-1).gather(-1, written[:, None])[:, 0].double()
    tokens = state.tokens.flatten().index_copy(0, places, written).view_as(masked)
    return Step(tokens, masked & ~reveal, reveal, fallback, places, log_prob, rows_left, masks_left)


def _remaining(masked: Tensor, reveal: Tensor) -> tuple[int, int, int]:
    """Rows and positions that stay masked, and rows without anything to reveal; one synchronisation."""
    left = masked & ~reveal
    counts = torch.stack([left.any(-1).sum(), left.sum(), (~reveal.any(-1)).sum()])
    rows, positions, empty = counts.tolist()
    return rows, positions, empty


def token_writer(temperature: float, seed: int, row_ids: Tensor) -> Write:
    """Write what the denoiser says: the most likely token at temperature 0, else a sample by the noise of the place.

    Args:
        temperature: of the token distribution.
        seed: of the noise.
        row_ids: int64 [B], identities of the rows.
    """

    def write(logits: Tensor, state: DecodingState, places: Tensor) -> Tensor:
        if temperature == 0:
            return logits.argmax(-1)
        noise = uniform_noise(seed, row_ids, state.step, state.masked.shape[-1], TOKENS)  # [B, L]
        return sample_categorical(logits.double() / temperature, noise.flatten()[places])

    return write
