"""One step of unmasking: what is revealed now, and what is written there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from orderppl.distributions import SetDistribution
from orderppl.errors import UserError
from orderppl.policies import Policy
from orderppl.policies.policy import selected_set
from orderppl.policies.scores import best_of, confidence
from orderppl.randomness import TOKENS, row_noise, sample_categorical
from orderppl.unmasking import State
from orderppl.unmasking.predictions import MaskedOnly

Write = Callable[[Tensor, State, Tensor], Tensor]
"""Tokens int64 [R] for places int64 [R] of a state, numbered through the batch, given their logits float [R, V]."""


@dataclass
class Step:
    """What a step did.

    Attributes:
        tokens: int64 [B, S], after the step.
        masked: bool [B, S], after the step.
        reveal: bool [B, S], the reveal set z_t.
        carry: what the policy keeps for the next step.
        fallback: bool [B], rows whose policy selected nothing; None when there is none.
        places: int64 [R], where `reveal` is true, numbered through the batch.
        log_prob: float64 [R], of the tokens written there, at temperature 1.
        left: masks of every row after the step.
    """

    tokens: Tensor
    masked: Tensor
    reveal: Tensor
    carry: Any
    fallback: Tensor | None
    places: Tensor
    log_prob: Tensor
    left: list[int]


def or_best(sets: SetDistribution, state: State, selected: Tensor) -> Tensor:
    """What was selected (bool [*, S]); in rows where that is nothing, the first of what the policy was shown."""
    priority = confidence(state) if sets.priority is None else sets.priority
    shown = sets.shown & state.masked
    shown = torch.where(shown.any(-1, keepdim=True), shown, state.masked)
    if bool((priority.isnan() & shown).any()):
        raise UserError("policy", "gives NaN", "check the weights of its network")
    return torch.where(selected.any(-1, keepdim=True), selected, best_of(priority, shown))


def unmask(policy: Policy, state: State, hidden: Sequence[int], write: Write, is_last: bool) -> Step:
    """Reveal what the policy selects, at least one position of each row, and everything that is left at the last step.

    Waits for the device once, to learn how much is revealed; a second time where that is nothing in some row.

    Args:
        policy: decides the reveal set.
        state: every row has a mask; its predictions are `MaskedOnly`.
        hidden: masks of every row.
        write: decides the tokens.
        is_last: whether this is the last step of the budget.
    """
    masked, predictions = state.masked, state.predictions
    assert isinstance(predictions, MaskedOnly)
    fallback, carry = None, None
    if is_last:
        reveal, revealed = masked, list(hidden)
    else:
        sets, carry = policy.at_step(state)
        reveal = selected_set(sets, state)
        revealed = reveal.sum(-1).tolist()
        if 0 in revealed:
            fallback = ~reveal.any(-1)
            reveal = or_best(sets, state, reveal)
            revealed = [count or 1 for count in revealed]
    places, logits = predictions.logits_of(reveal, sum(revealed))  # [R], [R, V]
    written = write(logits, state, places)
    log_prob = -F.cross_entropy(logits, written, reduction="none").double()
    tokens = state.tokens.flatten().index_copy(0, places, written).view_as(masked)
    left = [before - count for before, count in zip(hidden, revealed, strict=True)]
    return Step(tokens, masked ^ reveal, reveal, carry, fallback, places, log_prob, left)


def token_writer(temperature: float, seed: int, row_ids: Tensor, index: Tensor) -> Write:
    """Write what the denoiser says: the most likely token at temperature 0, else a sample by the noise of the place.

    Args:
        temperature: of the token distribution.
        seed: of the noise.
        row_ids: int64 [N], identities of all rows.
        index: int64 [B], which of them the state has.
    """

    def write(logits: Tensor, state: State, places: Tensor) -> Tensor:
        if temperature == 0:
            return logits.argmax(-1)
        noise = row_noise(seed, row_ids[index], state.step, state.latent, TOKENS)  # [B, S]
        return sample_categorical(logits.double() / temperature, noise.flatten()[places])

    return write


def keep_rows(carry: Any, keep: Tensor) -> Any:
    """What a policy keeps, of the rows in `keep` (int64 [b]) only."""
    if isinstance(carry, tuple):
        return tuple(keep_rows(part, keep) for part in carry)
    return carry[keep] if isinstance(carry, Tensor) else carry
