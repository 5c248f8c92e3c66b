"""A denoiser and a grade of one's own, in a file of their own: see bring_your_own_data_and_model.py."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class BagOfWords(nn.Module):
    """Predicts every hidden token from the mean of the visible ones and from its place.

    Args:
        vocab_size: number of token ids.
        mask_index: id of MASK, one of them.
        max_length: longest canvas.
        width: size of the hidden vectors.
    """

    def __init__(self, vocab_size: int, mask_index: int, max_length: int, width: int = 32) -> None:
        super().__init__()
        self.vocab_size, self.mask_index, self.max_length = vocab_size, mask_index, max_length
        self.embed, self.place = nn.Embedding(vocab_size, width), nn.Embedding(max_length, width)
        self.head = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, vocab_size))

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits, float [N, S, V], from states int64 [N, S] with MASK where hidden, and bool [N, S]."""
        visible = (attention_mask & (state != self.mask_index))[..., None]
        mean = (self.embed(state) * visible).sum(1, keepdim=True) / visible.sum(1, keepdim=True).clamp(min=1)
        place = self.place((attention_mask.cumsum(-1) - 1).clamp(min=0))  # padding does not count
        return self.head(torch.cat([mean.expand_as(place), place], -1))


def same_number(texts: Sequence[str], references: Sequence[str]) -> Tensor:
    """1 where the last word is right: float64 [N]."""
    last = [[text.split()[-1:] for text in side] for side in (texts, references)]
    return torch.tensor([a == b for a, b in zip(*last, strict=True)], dtype=torch.float64)
