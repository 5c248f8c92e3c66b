"""What the denoiser would have written at the moment each position was revealed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from orderppl.decoding.decode import evaluation_mode
from orderppl.denoising import Canvas
from orderppl.errors import UserError
from orderppl.path import RevealPath
from orderppl.states import masked_before


@dataclass
class Alternatives:
    """The token distribution of every position at the state that revealed it; padding holds zeros.

    Attributes:
        log_prob: float [B, L], of the revealed token, nats.
        tokens: int64 [B, L, k], the k most probable tokens, most probable first.
        token_log_prob: float [B, L, k], of these, nats.
    """

    log_prob: Tensor
    tokens: Tensor
    token_log_prob: Tensor


@torch.no_grad()
def alternatives_at_reveal(canvas: Canvas, tokens: Tensor, reveal_step: Tensor, count: int = 5) -> Alternatives:
    """Visit the states of finished orders again; one denoiser call per step.

    Args:
        canvas: prompt, padding and denoiser, as the orders were made with.
        tokens: int64 [B, L], the revealed tokens.
        reveal_step: int64 [B, L], of `DecodeOutput` or `PathOutput`; -1 at padding.
        count: alternatives k per position; no more than the denoiser has classes.

    Raises:
        UserError: for tokens or orders of another shape than the canvas, or no alternatives.
    """
    shape = canvas.attention_mask.shape
    if tokens.shape != shape or reveal_step.shape != shape:
        problem = f"tokens {tuple(tokens.shape)}, order {tuple(reveal_step.shape)}, canvas {tuple(shape)}"
        raise UserError("reveal_step", problem, "give one token and one step per response position")
    if count < 1:
        raise UserError("count", f"{count} alternatives", "ask for at least 1")
    tokens = tokens.masked_fill(~canvas.attention_mask, 0)  # padding may hold any id
    num_steps = int(reveal_step.max()) + 1 if reveal_step.numel() else 0
    path = RevealPath(canvas, tokens, num_steps)
    count = min(count, canvas.denoiser.vocab_size)
    log_prob = torch.zeros(shape, device=tokens.device)
    found = Alternatives(log_prob, tokens.new_zeros(*shape, count), log_prob.new_zeros(*shape, count))
    with evaluation_mode(canvas.denoiser):
        for step in range(num_steps):
            now = torch.full(shape[:1], step, device=tokens.device)
            log_probs = path.state_at(masked_before(reveal_step, step), now).log_probs  # [B, L, V]
            revealed = reveal_step == step
            top = log_probs.topk(count, -1)
            own = log_probs.gather(-1, tokens[..., None])[..., 0]
            found.log_prob = torch.where(revealed, own, found.log_prob)
            found.tokens = torch.where(revealed[..., None], top.indices, found.tokens)
            found.token_log_prob = torch.where(revealed[..., None], top.values, found.token_log_prob)
    return found
