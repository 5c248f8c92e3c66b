"""Start and end tokens put around the attended tokens of every row, for denoisers that were pretrained with them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Framed(NamedTuple):
    """Rows without gaps between two frame tokens.

    Attributes:
        tokens: int64 [N, F]: start, the attended tokens, end, padding. F is S + 2, on a CPU that of the longest row.
        keys: bool [N, F], False at padding.
        column: int64 [N, S], where each token of the canvas went; F - 1 for padding, whose value means nothing.
    """

    tokens: Tensor
    keys: Tensor
    column: Tensor

    def unframe(self, hidden: Tensor) -> Tensor:
        """Vectors of the canvas, float [N, S, W], from those of the framed rows, float [N, F, W]."""
        return hidden.gather(1, self.column[..., None].expand(-1, -1, hidden.shape[-1]))


def frame(state: Tensor, attention_mask: Tensor, start: int, end: int, padding: int) -> Framed:
    """Move the attended tokens of every row together and frame them.

    Args:
        state: int64 [N, S].
        attention_mask: bool [N, S]; padding may stand anywhere.
        start: id of the start token.
        end: id of the end token.
        padding: id of padding.
    """
    n, size = state.shape
    attended = attention_mask.bool()
    count = attended.sum(-1, keepdim=True)  # [N, 1]
    # padding goes to a spare column that is cut off again
    column = torch.where(attended, attended.long().cumsum(-1), size + 2)  # [N, S]
    tokens = torch.full((n, size + 3), padding, dtype=state.dtype, device=state.device)
    tokens = tokens.scatter(1, column, state).scatter(1, count + 1, end)
    tokens = torch.cat([torch.full_like(tokens[:, :1], start), tokens[:, 1:]], 1)
    # padding between prompt and response has gone to the end; looking at the values would make another device wait
    width = (int(count.max()) if state.device.type == "cpu" and n else size) + 2
    keys = torch.arange(width, device=state.device) < count + 2
    return Framed(tokens[:, :width], keys, column.clamp(max=width - 1))
