"""What every denoiser offers, and the canvas that puts sequences before it."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from torch import Tensor


@runtime_checkable
class Denoiser(Protocol):
    """A masked model: partially revealed sequences -> logits of the clean tokens.

    Attributes:
        mask_index: id of the MASK token. When it is below `vocab_size`, the canvas gives it zero probability.
        vocab_size: number of token classes V of the output head.
    """

    mask_index: int
    vocab_size: int

    def __call__(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """Score every position of whole sequences.

        Args:
            state: int64 [N, S], MASK at hidden positions.
            attention_mask: bool [N, S], False at padding. Padding may stand anywhere; it must not change other rows
                or positions, and position indices count attended tokens only.

        Returns:
            float [N, S, V]: unnormalised log-probabilities of the token at each position (no shift).
        """
        ...


class Canvas:
    """The prompt and the padding of a batch, bound to the denoiser that reads it.

    Maps partially revealed responses to token logits; prompts are always visible. The network runs on plain tensors
    and its output carries the provenance of its input, so that a tracing ELBO can follow the dependence through
    compiled or custom kernels.

    Args:
        denoiser: see `Denoiser`.
        attention_mask: bool [B, L], False at padding of the response.
        context: int64 [B, C], prompt tokens.
        context_mask: bool [B, C], False at padding of the prompt (left or right); all True when left out.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        attention_mask: Tensor,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> None:
        if context is not None and context_mask is None:
            context_mask = torch.ones_like(context, dtype=torch.bool)
        self.denoiser = denoiser
        self.attention_mask = attention_mask.bool()
        self.context = context
        self.context_mask = None if context_mask is None else context_mask.bool()

    @property
    def mask_index(self) -> int:
        """Id of the MASK token."""
        return self.denoiser.mask_index

    def rows(self, index: Tensor) -> Canvas:
        """Keep the rows in `index` (int64 or bool [B])."""
        if self.context is None or self.context_mask is None:
            return Canvas(self.denoiser, self.attention_mask[index])
        return Canvas(self.denoiser, self.attention_mask[index], self.context[index], self.context_mask[index])

    def logits(self, state: Tensor) -> Tensor:
        """Token logits of the response positions, in one denoiser call.

        Args:
            state: int64 [*, B, L], MASK at hidden positions.

        Returns:
            float [*, B, L, V], at least float32: -inf at MASK when the output head has that class.
        """
        provenance = get_provenance(state)
        state = detach_provenance(state)
        lead = state.shape[:-1]  # [*, B]
        attention = self.attention_mask.expand(state.shape)
        if self.context is not None and self.context_mask is not None:
            width = self.context.shape[-1]
            state = torch.cat([self.context.expand(*lead, width), state], -1)  # [*, B, C + L]
            attention = torch.cat([self.context_mask.expand(*lead, width), attention], -1)
        size = state.shape[-1]
        logits = self.denoiser(state.reshape(-1, size), attention.reshape(-1, size))  # [N, C + L, V]
        logits = logits[:, size - self.attention_mask.shape[-1] :]
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()  # log-probabilities are summed over positions and steps: eight bits are too few
        if self.mask_index < logits.shape[-1]:
            hidden = torch.arange(logits.shape[-1], device=logits.device) == self.mask_index
            logits = logits.masked_fill(hidden, -torch.inf)
        return track_provenance(logits.reshape(*lead, -1, logits.shape[-1]), provenance)
