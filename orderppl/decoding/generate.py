"""Decoding behind the interface of `generate` functions: prompts in, prompts with their responses out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orderppl.decoding.decode import DecodeOutput, decode
from orderppl.errors import UserError
from orderppl.policies import Policy, Ranked
from orderppl.unmasking import Batch, Denoiser


@dataclass
class GenerateOutput:
    """Result of `generate`.

    Attributes:
        sequences: int64 [B, C + L], prompts and responses.
        attention_mask: bool [B, C + L], False at padding.
        decoded: their NFE, reveal steps, likelihood, ...
    """

    sequences: Tensor
    attention_mask: Tensor
    decoded: DecodeOutput


def with_response(
    prompt: Tensor, attention_mask: Tensor | None, length: int | Tensor, mask_index: int, pad_token_id: int = 0
) -> Batch:
    """The canvas of prompts with responses to be written behind them.

    Args:
        prompt: int64 [B, C], padded left or right; holes (MASK) are filled as well.
        attention_mask: bool [B, C], False at padding of the prompt; all True when left out.
        length: of the responses, one number or int64 [B].
        mask_index: id of MASK.
        pad_token_id: put behind the end of shorter responses.

    Raises:
        UserError: a negative length, or not one per row.
    """
    seen = torch.ones_like(prompt, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    lengths = torch.as_tensor(length, dtype=torch.int64, device=prompt.device)
    if lengths.dim() and lengths.shape != prompt.shape[:1]:
        problem = f"shape {tuple(lengths.shape)} for {len(prompt)} prompts"
        raise UserError("length", problem, "give one number, or one per prompt")
    lengths = lengths.expand(len(prompt))
    if lengths.numel() and int(lengths.min()) < 0:
        raise UserError("length", f"a response of {int(lengths.min())} tokens", "give 0 or more")
    longest = int(lengths.max()) if lengths.numel() else 0
    attended = torch.arange(longest, device=prompt.device) < lengths[:, None]  # [B, L]
    response = torch.where(attended, mask_index, pad_token_id)
    given = torch.cat([prompt != mask_index, ~attended], -1)
    return Batch(torch.cat([prompt, response], -1), torch.cat([seen, attended], -1), given)


def generate(
    denoiser: Denoiser,
    prompt: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int | Tensor = 128,
    steps: int = 128,
    policy: Policy | str = "top_prob",
    pad_token_id: int = 0,
    **options: Any,
) -> GenerateOutput:
    """Write responses behind prompts; see `decode`.

    LLaDA's `gen_length`, `block_length` and `remasking="low_confidence"`, and Dream's `alg`, are `max_new_tokens`,
    `block_size` and `policy="top_prob"` here. `steps` counts all blocks together.

    Args:
        denoiser: see `Denoiser`.
        prompt: int64 [B, C], padded left or right; holes (MASK) in it are filled as well.
        attention_mask: bool [B, C], False at padding of the prompt; all True when left out.
        max_new_tokens: response length L, one number or int64 [B].
        steps: step budget per row.
        policy: decides the reveal sets; a policy, or the score of a `Ranked` one.
        pad_token_id: written behind the end of shorter responses.
        options: of `decode`: `block_size`, `temperature`, `mode`, `generator`, `row_ids`, `record_history`.

    Raises:
        UserError: as `decode` does.
    """
    chosen = Ranked(policy) if isinstance(policy, str) else policy  # type: ignore[arg-type]
    batch = with_response(prompt, attention_mask, max_new_tokens, denoiser.mask_index, pad_token_id)
    decoded = decode(denoiser, chosen, batch, max_steps=steps, **options)
    return GenerateOutput(decoded.sequences, batch.attention_mask, decoded)
