"""Scores of positions and rankings by them, row by row.

Conventions: a score is high where a position should be revealed first; ties go to the leftmost position; every rule is
applied to each row by itself and to masked positions only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from orderppl.data.answer_tokens import NO_TOKEN
from orderppl.states import UnmaskingState


def confidence(state: UnmaskingState) -> Tensor:
    """Largest token probability c at every position: float [*, L]."""
    return state.per_position(lambda log_probs: log_probs.amax(-1)).exp()


def prediction_entropy(state: UnmaskingState) -> Tensor:
    """Entropy H of the token distribution at every position, nats: float [*, L]."""
    return state.per_position(entropy)


def predicted_token(state: UnmaskingState) -> Tensor:
    """Most likely token at every position: int64 [*, L]."""
    return state.per_position(lambda log_probs: log_probs.argmax(-1))


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy of distributions, nats: float [*] from log-probabilities float [*, V]."""
    finite = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)  # 0 log 0 = 0
    return -(log_probs.exp() * finite).sum(-1)


def answer_confidence(state: UnmaskingState, answer: Callable[[Tensor], Tensor]) -> Tensor:
    """How sure the answer is: the smallest c of its hidden tokens, 1 where none is hidden; float [*].

    Args:
        state: a state; the answer is where it would be if every hidden token were the most likely one.
        answer: tokens int64 [*, L], `NO_TOKEN` at padding -> bool [*, L], which of them are the answer.
    """
    tokens = torch.where(state.masked, predicted_token(state), state.tokens)  # [*, L]
    asked = answer(tokens.masked_fill(~state.attention_mask, NO_TOKEN)) & state.masked
    return confidence(state).masked_fill(~asked, 1.0).amin(-1)


def entropy_before(nats: Tensor, masked: Tensor) -> Tensor:
    """Sum of the entropies of the masked positions that are more certain than this one, nats: float [*, L].

    Args:
        nats: float [*, L], the entropies.
        masked: bool [*, L].
    """
    rank = reveal_rank(-nats, masked)
    ordered = nats.masked_fill(~masked, 0.0).gather(-1, rank.argsort(-1))  # [*, L], ascending
    return (ordered.cumsum(-1) - ordered).gather(-1, rank)


def reveal_rank(score: Tensor, masked: Tensor, last: Tensor | None = None, tie_break: Tensor | None = None) -> Tensor:
    """Rank positions for revealing: 0 is first.

    Args:
        score: float [*, L], high = first.
        masked: bool [*, L]; all other positions rank behind the masked ones.
        last: bool [*, L], positions ranked behind the other masked ones whatever their score.
        tie_break: float [*, L], high = first among equal scores; the leftmost position when left out.

    Returns:
        int64 [*, L], a permutation of 0..L-1 per row.
    """
    # Masked positions stay before the others even where their score is -inf.
    score = score.clamp(min=torch.finfo(score.dtype).min).masked_fill(~masked, -torch.inf)
    if tie_break is None:
        order = score.argsort(dim=-1, descending=True, stable=True)  # positions, first to last
    else:
        by_tie = tie_break.argsort(dim=-1, descending=True)
        order = by_tie.gather(-1, score.gather(-1, by_tie).argsort(dim=-1, descending=True, stable=True))
    if last is not None:
        group = torch.where(masked, last.long(), 2)
        order = order.gather(-1, group.gather(-1, order).argsort(dim=-1, stable=True))
    place = torch.arange(order.shape[-1], device=order.device).expand(order.shape)
    return torch.empty_like(order).scatter_(-1, order, place)


def preferred(masked: Tensor, last: Tensor | None) -> Tensor:
    """Masked positions that are not to come last; all masked ones in rows that have no other."""
    if last is None:
        return masked
    preferred = masked & ~last
    return torch.where(preferred.any(-1, keepdim=True), preferred, masked)


def longest_prefix(sorted_values_ok: Tensor, count: Tensor) -> Tensor:
    """Largest k in 1..count whose k-th entry holds, at least 1: int64 [*] from bool [*, L]."""
    k = torch.arange(1, sorted_values_ok.shape[-1] + 1, device=count.device)
    return torch.where(sorted_values_ok & (k <= count[..., None]), k, 0).amax(-1).clamp(min=1)
