"""A small real denoiser, and denoisers whose logits are written by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

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

    def __init__(self, probs: list[list[float]] | Tensor) -> None:
        self.probs = torch.as_tensor(probs, dtype=torch.float64)
        self.vocab_size = self.probs.shape[-1]
        self.mask_index = self.vocab_size  # no MASK class in the head

    def __call__(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        return self.probs[: state.shape[-1]].log().expand(*state.shape, -1)


@pytest.fixture(scope="session")
def denoiser() -> RandomTransformer:
    return RandomTransformer()


@pytest.fixture(scope="session")
def table() -> type[Table]:
    return Table


@pytest.fixture(scope="session")
def confident() -> type[Table]:
    """Denoiser of two classes with the given confidences: c = max(p, 1 - p)."""

    class Confident(Table):
        def __init__(self, confidences: list[float]) -> None:
            super().__init__([[c, 1 - c] for c in confidences])

    return Confident  # type: ignore[return-value]
