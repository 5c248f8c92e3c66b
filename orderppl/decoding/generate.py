"""Decoding behind the interface of `generate` functions: prompts in, prompts with their responses out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from orderppl.decoding.decode import DecodeOutput, decode
from orderppl.decoding.policy import Policy
from orderppl.decoding.registry import make_policy
from orderppl.denoising import Denoiser


@dataclass
class GenerateOutput:
    """Result of `generate`.

    Attributes:
        sequences: int64 [B, C + L], prompts and responses.
        attention_mask: bool [B, C + L], False at padding.
        decoded: of the responses: their NFE, reveal steps, likelihood, ...
    """

    sequences: Tensor
    attention_mask: Tensor
    decoded: DecodeOutput


def generate(
    denoiser: Denoiser,
    prompt: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int | Tensor = 128,
    steps: int = 128,
    block_size: int | None = None,
    temperature: float = 0.0,
    policy: Policy | str = "top_prob",
    generator: torch.Generator | None = None,
    row_ids: Tensor | None = None,
    pad_token_id: int = 0,
    record_history: bool = False,
) -> GenerateOutput:
    """Write responses behind prompts; see `decode`.

    LLaDA's `gen_length`, `block_length` and `remasking="low_confidence"`, and Dream's `alg`, are `max_new_tokens`,
    `block_size` and `policy="top_prob"` here. `steps` counts all blocks together.

    Args:
        denoiser: see `Denoiser`.
        prompt: int64 [B, C], padded left or right.
        attention_mask: bool [B, C], False at padding of the prompt; all True when left out.
        max_new_tokens: response length L, one number or int64 [B].
        steps: step budget per row.
        block_size: semi-autoregressive blocks of so many positions.
        temperature: of token sampling; 0 takes the most likely token.
        policy: decides the reveal sets; a policy or the name of one without further options.
        generator: only its seed is used.
        row_ids: int64 [B], identity of each row for the noise; 0..B-1 when left out.
        pad_token_id: written behind the end of shorter responses.
        record_history: keep all intermediate states in `decoded`.

    Raises:
        UserError: as `decode` and `make_policy` do.
    """
    decoded = decode(
        denoiser,
        make_policy(policy) if isinstance(policy, str) else policy,
        prompt,
        attention_mask,
        length=max_new_tokens,
        max_steps=steps,
        block_size=block_size,
        temperature=temperature,
        generator=generator,
        row_ids=row_ids,
        record_history=record_history,
        pad_token_id=pad_token_id,
    )
    seen = torch.ones_like(prompt, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    whole = torch.cat([prompt, decoded.sequences], -1)
    return GenerateOutput(whole, torch.cat([seen, decoded.attention_mask], -1), decoded)
