"""What exact denoisers are told: the revealed tokens, place by place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def evidence_by_place(
    state: Tensor, attended: Tensor, mask_index: int, places: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """e_i(b) = 1 where x_i is hidden, or no position stands at the place, and [b = x_i] where it is revealed.

    Padding, wherever it stands, takes no place.

    Args:
        state: int64 [N, S], classes 0..K-1 below MASK.
        attended: bool [N, S].
        mask_index: id of MASK, which is K.
        places: L, at least the number of attended positions of any row.
        dtype: of the evidence.

    Returns:
        Evidence, float [N, L, K], and the place of every position for `gather`, int64 [N, S, K]; L at padding.
    """
    place = torch.where(attended, attended.long().cumsum(-1) - 1, places)  # padding goes behind, and is dropped
    place = place.unsqueeze(-1).expand(*state.shape, mask_index)
    hidden = (~attended | (state == mask_index)).unsqueeze(-1)
    told = F.one_hot(state.clamp(0, mask_index - 1), mask_index).to(dtype)
    evidence = told.new_ones(len(state), places + 1, mask_index).scatter(1, place, torch.where(hidden, 1.0, told))
    return evidence[:, :-1], place
