"""Ordered partitions of the response positions, and the partially revealed states they lead through.

Everywhere, `reveal_step` is int64 [*, L]: the 0-based step at which a position is revealed, and -1 where a position
is visible from the start (padding). So `reveal_step >= t` is the set M_t still masked before step t.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from orderppl.denoising import Canvas

VISIBLE = -1  # reveal_step of a position that is never masked


def stacked_steps(num_steps: int, like: Tensor) -> Tensor:
    """All step indices, ready to broadcast against `like` [*, L] from a new leading dimension: int64 [T, 1.., 1]."""
    return torch.arange(num_steps, device=like.device).reshape((-1,) + (1,) * like.dim())


def masked_before(reveal_step: Tensor, step: Tensor | int) -> Tensor:
    """M_t: positions still hidden before `step`; bool, broadcast of [*, L] and `step`."""
    return reveal_step >= step


def reveal_set(reveal_step: Tensor, step: Tensor | int) -> Tensor:
    """z_t: positions revealed at `step`; bool, broadcast of [*, L] and `step`."""
    return reveal_step == step


def partial_state(tokens: Tensor, masked: Tensor, mask_index: int) -> Tensor:
    """s_t: `tokens` int64 [*, L] with MASK where `masked` bool [*, L] is set."""
    return torch.where(masked, mask_index, tokens)


def steps_used(reveal_step: Tensor) -> Tensor:
    """Number of denoiser forwards an order needs, empty steps before the last one included: int64 [*]."""
    return reveal_step.amax(-1) + 1


def enumerate_partitions(num_positions: int, num_steps: int) -> Tensor:
    """Every ordered partition of `num_positions` positions into at most `num_steps` steps: int64 [T**L, L]."""
    grid = torch.cartesian_prod(*[torch.arange(num_steps)] * num_positions)
    return grid.reshape(-1, num_positions)


@dataclass
class UnmaskingState:
    """What a policy may see at one step: everything but the hidden tokens.

    All leading shapes `*` are the same; they may stack steps and particles, e.g. [T, K, B].

    Attributes:
        tokens: int64 [*, L], the partially revealed sequence s_t, MASK where hidden.
        masked: bool [*, L], M_t. Padding is never masked.
        step: int64 [*], 0-based step index t.
        num_steps: the step budget T.
        canvas: prompt, padding and denoiser of the batch; its rows are the last leading dimension.
        noise: float64 [*, L] in (0, 1), one uniform draw per position for stochastic policies when decoding;
            it depends on the seed, the row and the step only, never on the batch. None when a caller samples by torch.
        memory: tensors with the batch as first dimension that a policy keeps between the steps of one decoding;
            rows leave it as they leave the batch.
    """

    tokens: Tensor
    masked: Tensor
    step: Tensor
    num_steps: int
    canvas: Canvas
    noise: Tensor | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def logits(self) -> Tensor:
        """Denoiser logits at every position, float [*, L, V]; one denoiser call, made when first asked for."""
        return self.canvas.logits(self.tokens)

    @cached_property
    def log_probs(self) -> Tensor:
        """Normalised `logits`, float [*, L, V]."""
        return self.logits.log_softmax(-1)

    @property
    def attention_mask(self) -> Tensor:
        """bool [*, L], False at padding."""
        return self.canvas.attention_mask.expand(self.masked.shape)

    @property
    def steps_left(self) -> Tensor:
        """Steps still to go, this one included: int64 [*], 1 at the last step."""
        return self.num_steps - self.step
