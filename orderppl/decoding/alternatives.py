"""What the denoiser would have written at the moment each position was revealed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from orderppl.decoding.decode import evaluation_mode
from orderppl.errors import UserError
from orderppl.unmasking import Batch, Denoiser
from orderppl.unmasking.trajectory import Path, same_step


@dataclass
class Alternatives:
    """The token distribution of every position at the state that revealed it; zeros where nothing was revealed.

    Attributes:
        log_prob: float [B, S], of the revealed token, nats.
        tokens: int64 [B, S, k], the k most probable tokens, most probable first.
        token_log_prob: float [B, S, k], of these, nats.
    """

    log_prob: Tensor
    tokens: Tensor
    token_log_prob: Tensor


@torch.no_grad()
def alternatives_at_reveal(denoiser: Denoiser, batch: Batch, reveal_step: Tensor, count: int = 5) -> Alternatives:
    """Visit the states of finished orders again; one denoiser call per step.

    Args:
        denoiser: see `Denoiser`.
        batch: the finished sequences, with what was given.
        reveal_step: int64 [B, S], of `DecodeOutput` or `PathOutput`.
        count: alternatives k per position; no more than the denoiser has classes.

    Raises:
        UserError: for orders of another shape than the batch, or no alternatives.
    """
    shape = batch.tokens.shape
    if reveal_step.shape != shape:
        problem = f"{tuple(reveal_step.shape)} for sequences of {tuple(shape)}"
        raise UserError("reveal_step", problem, "give one step per position")
    if count < 1:
        raise UserError("count", f"{count} alternatives", "ask for at least 1")
    num_steps = int(reveal_step.max()) + 1 if reveal_step.numel() else 0
    path = Path(batch, denoiser, num_steps)
    count = min(count, denoiser.vocab_size)
    log_prob = torch.zeros(shape, device=batch.device)
    found = Alternatives(log_prob, batch.tokens.new_zeros(*shape, count), log_prob.new_zeros(*shape, count))
    with evaluation_mode(denoiser):
        for step in range(num_steps):
            masked = reveal_step >= step
            state = path.state(masked, same_step(step, masked))
            revealed = reveal_step == step
            top = state.per_position(lambda log_probs: log_probs).topk(count, -1)
            found.log_prob = torch.where(revealed, state.token_log_prob(batch.readable), found.log_prob)
            found.tokens = torch.where(revealed[..., None], top.indices, found.tokens)
            found.token_log_prob = torch.where(revealed[..., None], top.values, found.token_log_prob)
    return found
