"""A small real denoiser, denoisers whose logits are written by hand, and states and canvases for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from orderppl import Batch, Policy, State
from orderppl.policies.policy import selected_set
from orderppl.unmasking.denoiser import Reader
from orderppl.unmasking.predictions import Window

VOCAB, MASK = 7, 6  # the head has a MASK class, which must never be emitted


class RandomTransformer(nn.Module):
    """Two bidirectional layers with random weights, float64; positions are counted over attended tokens."""

    mask_index, vocab_size = MASK, VOCAB

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = heads
        self.embed = nn.Embedding(VOCAB, width)
        self.position = nn.Embedding(64, width)
        self.mix = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.feed = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(width, VOCAB)
        self.calls: list[int] = []
        self.double()

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        self.calls.append(len(state))
        positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        hidden = self.embed(state) + self.position(positions)
        for mix, feed in zip(self.mix, self.feed, strict=True):
            parts = mix(hidden).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [3, N, H, S, D]
            mixed = scaled_dot_product_attention(*(2 * parts).unbind(0), attn_mask=attention_mask[:, None, None])
            hidden = hidden + mixed.transpose(1, 2).flatten(-2)
            hidden = hidden + self.dropout(torch.tanh(feed(hidden)))
        return 4 * self.head(hidden)


class Table:
    """Returns the same written probabilities at every call, float64 [S, V], cut to the canvas."""

    def __init__(self, probs: Sequence[Sequence[float]] | Tensor) -> None:
        self.probs = torch.as_tensor(probs, dtype=torch.float64)
        self.vocab_size = self.probs.shape[-1]
        self.mask_index = self.vocab_size  # no MASK class in the head

    def __call__(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        return self.probs[: state.shape[-1]].log().expand(*state.shape, -1)


class Confident(Table):
    """Denoiser of two classes with the given confidences: c = max(p, 1 - p)."""

    def __init__(self, confidences: Sequence[float]) -> None:
        super().__init__([[c, 1 - c] for c in confidences])


def masks(denoiser: Any, *lengths: int) -> Batch:
    """A canvas on which everything is to be revealed: one row per length, padded on the right."""
    attended = torch.arange(max(lengths, default=0)) < torch.tensor(lengths, dtype=torch.int64)[:, None]
    return Batch(torch.where(attended, denoiser.mask_index, 0), attended, torch.zeros_like(attended))


def state_of(
    denoiser: Any,
    masked: Any,
    latent: Any = None,
    step: int = 0,
    num_steps: Any = 4,
    noise: Any = None,
    **others: Any,
) -> State:
    """A state by hand; what is latent and not masked has been revealed, the rest of the canvas is padding."""
    masked = torch.as_tensor(masked).bool()
    latent = torch.ones(masked.shape[-2:]).bool() if latent is None else torch.as_tensor(latent).bool()
    tokens = torch.where(masked, denoiser.mask_index, 0)
    batch = Batch(torch.zeros(latent.shape, dtype=torch.int64), latent)
    now = torch.full(masked.shape[:-1], step)
    draw = None if noise is None else lambda: torch.as_tensor(noise, dtype=torch.float64)
    predictions = Window(Reader(denoiser, batch), tokens)
    return State(tokens, masked, now, num_steps, batch, denoiser, predictions, draw, **others)


def chosen(policy: Policy, state: State) -> list[list[int]]:
    """Positions a policy selects, row by row: a draw where the state has noise, otherwise the mode."""
    return chosen_and_kept(policy, state)[0]


def chosen_and_kept(policy: Policy, state: State) -> tuple[list[list[int]], Any]:
    """The same, and what the policy keeps for the next step."""
    sets, carry = policy.at_step(state)
    selected = selected_set(sets, state)
    assert selected.dtype == torch.bool
    assert not (selected & ~state.masked).any()
    return [row.nonzero()[:, 0].tolist() for row in selected], carry
