"""What a policy finds in the memory of a state, besides what it puts there itself."""

from __future__ import annotations

import torch
from torch import Tensor

from orderppl.decoding.policy import Policy
from orderppl.states import UnmaskingState

WINDOW = "window"  # memory key: (positions, step, num_steps) of the block a row is in, int64 [B, 3]
TRUTH = "truth"  # memory key: the true tokens, for oracles in path evaluation only, int64 [B, L]
ROW = "row"  # memory key, set by the decoder: index of the row in the batch it was called with, int64 [B]


def first_memory(policy: Policy, rows: Tensor, truth: Tensor | None = None) -> dict[str, Tensor]:
    """What the memory of a policy holds before the first step.

    Args:
        policy: finds the truth only if it declares `needs_truth`.
        rows: int64 [B], index of each row in the batch that the policy's own tensors belong to.
        truth: int64 [B, L], true tokens that the denoiser has a class for.
    """
    memory = {ROW: rows}
    if truth is not None and getattr(policy, "needs_truth", False):
        memory[TRUTH] = truth
    return memory


def block_window(state: UnmaskingState) -> tuple[Tensor, Tensor, Tensor]:
    """Positions, step and step budget that set sizes refer to: those of the block inside `Block`, else of the row."""
    if WINDOW in state.memory:
        positions, step, num_steps = state.memory[WINDOW].unbind(-1)
        return positions, step, num_steps
    return state.attention_mask.sum(-1), state.step, torch.full_like(state.step, state.num_steps)
