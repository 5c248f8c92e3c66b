"""Scores of positions and rankings by them, row by row.

Conventions: a score is high where a position should be revealed first; ties go to the leftmost position; every rule is
applied to each row by itself and to masked positions only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from orderppl.unmasking import State


def confidence(state: State) -> Tensor:
    """Largest token probability c at every position: float [*, S]."""
    return state.per_position(lambda log_probs: log_probs.amax(-1)).exp()


def log_odds(state: State) -> Tensor:
    """log c - log(1 - c) from the logits of the other tokens: float [*, S]. Where c rounds to 1 it still ranks."""

    def odds(log_probs: Tensor) -> Tensor:
        top, best = log_probs.max(-1, keepdim=True)
        return top[..., 0] - log_probs.scatter(-1, best, -torch.inf).logsumexp(-1)

    return state.per_position(odds)


def margin(state: State) -> Tensor:
    """p1 - p2, the two largest token probabilities (Kim et al., arXiv 2502.06768): float [*, S]."""
    return state.per_position(lambda log_probs: -log_probs.topk(2, -1).values.exp().diff(dim=-1)[..., 0])


def prediction_entropy(state: State) -> Tensor:
    """Entropy H of the token distribution at every position, nats: float [*, S]."""
    return state.per_position(entropy)


def leftmost(state: State) -> Tensor:
    """Minus the position: float64 [*, S]."""
    size = state.shape[-1]
    return -torch.arange(size, dtype=torch.float64, device=state.masked.device).expand(state.shape)


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy of distributions, nats: float [*] from log-probabilities float [*, V]."""
    finite = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)  # 0 log 0 = 0
    return -(log_probs.exp() * finite).sum(-1)


def predicted_tokens(state: State) -> Tensor:
    """The state with the most likely token at every masked position, -1 at padding: int64 [*, S]."""
    predicted = state.per_position(lambda log_probs: log_probs.argmax(-1))
    return torch.where(state.masked, predicted, state.tokens).masked_fill(~state.attention_mask, -1)


def entropy_before(nats: Tensor, masked: Tensor) -> Tensor:
    """Sum of the entropies of the masked positions that are more certain than this one, nats: float [*, S].

    Args:
        nats: float [*, S], the entropies.
        masked: bool [*, S].
    """
    rank = reveal_rank(-nats, masked)
    ordered = nats.masked_fill(~masked, 0.0).gather(-1, rank.argsort(-1))  # [*, S], ascending
    return (ordered.cumsum(-1) - ordered).gather(-1, rank)


def reveal_rank(score: Tensor, masked: Tensor) -> Tensor:
    """Rank positions for revealing: 0 is first.

    Args:
        score: float [*, S], high = first; the leftmost of equal ones.
        masked: bool [*, S]; all other positions rank behind the masked ones.

    Returns:
        int64 [*, S], a permutation of 0..S-1 per row.
    """
    order = _reveal_order(score, masked)
    place = torch.arange(order.shape[-1], device=order.device).expand(order.shape)
    return torch.empty_like(order).scatter_(-1, order, place)


def first_of(score: Tensor, masked: Tensor, count: Tensor) -> Tensor:
    """The first so many (int64 [*]) masked positions of `reveal_rank`, or all: bool [*, S]."""
    order = _reveal_order(score, masked)
    is_first = torch.arange(order.shape[-1], device=order.device) < count.unsqueeze(-1)  # [*, S]
    return masked.scatter(-1, order, is_first) & masked


def _masked_first(score: Tensor, masked: Tensor) -> Tensor:
    """Scores by which masked positions stay before the others even where theirs is -inf: float [*, S]."""
    return torch.where(masked, score.clamp(min=torch.finfo(score.dtype).min), -torch.inf)


def _reveal_order(score: Tensor, masked: Tensor) -> Tensor:
    """Positions, first to last: int64 [*, S]; arguments as for `reveal_rank`."""
    return _masked_first(score, masked).argsort(dim=-1, descending=True, stable=True)


def best_of(score: Tensor, masked: Tensor) -> Tensor:
    """The masked position of highest score, the leftmost of equal ones: bool [*, S], all False where none is masked."""
    best = _masked_first(score, masked).argmax(-1, keepdim=True)
    return torch.zeros_like(masked).scatter(-1, best, True) & masked


def longest_prefix(sorted_values_ok: Tensor, count: Tensor) -> Tensor:
    """Largest k in 1..count whose k-th entry holds, at least 1: int64 [*] from bool [*, S]."""
    k = torch.arange(1, sorted_values_ok.shape[-1] + 1, device=count.device)
    return torch.where(sorted_values_ok & (k <= count[..., None]), k, 0).amax(-1).clamp(min=1)


SCORES: dict[str, Callable[[State], Tensor]] = {
    "top_prob": confidence,
    "log_odds": log_odds,
    "margin": margin,
    "entropy": lambda state: -prediction_entropy(state),
    "left_to_right": leftmost,
}
