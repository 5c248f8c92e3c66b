"""Independent reveal steps per position: the mean-field family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions.kl import register_kl

from orderppl.distributions.ordered_partition import OrderedPartition
from orderppl.distributions.reveal_set import RevealSet, _weighted
from orderppl.states import VISIBLE


class StepwiseReveal(OrderedPartition):
    """r_i ~ Categorical(softmax(logits_i)) over the T steps, independently over the masked positions.

    As a chain of sets its hazard p(r_i = t | r_i >= t) is the reveal probability of position i at step t.

    Args:
        logits: float [*, L, T], unnormalised.
        masked: bool [*, L]; all positions when left out.
    """

    def __init__(self, logits: Tensor, masked: Tensor | None = None, validate_args: bool | None = None) -> None:
        if masked is None:
            masked = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
        shape = torch.broadcast_shapes(logits.shape[:-1], masked.shape)
        self.logits = logits.log_softmax(-1).expand(shape + logits.shape[-1:])
        super().__init__(masked.expand(shape), logits.shape[-1], validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> StepwiseReveal:
        """Return the same distribution at a broader batch shape."""
        shape = torch.Size(batch_shape) + self.event_shape
        new = self._get_checked_instance(StepwiseReveal, _instance)
        new.logits = self.logits.expand(shape + self.logits.shape[-1:])
        OrderedPartition.__init__(new, self.masked.expand(shape), self.num_steps, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def probs(self) -> Tensor:
        """P(r_i = t), float [*, L, T]."""
        return self.logits.exp()

    def hazard_logs(self) -> tuple[Tensor, Tensor]:
        """log h and log(1 - h) of h_it = P(r_i = t | r_i >= t), both float [*, L, T]; the last hazard is 1."""
        remaining = self.logits.flip(-1).logcumsumexp(-1).flip(-1)  # log P(r >= t)
        later = torch.cat([remaining[..., 1:], torch.full_like(remaining[..., :1], -torch.inf)], -1)
        return (self.logits - remaining).clamp_max(0.0), (later - remaining).clamp_max(0.0)

    def set_at(self, masked: Tensor, step: Tensor) -> RevealSet:
        """Reveal by hazard."""
        shape = torch.broadcast_shapes(masked.shape, self.masked.shape)
        index = step.unsqueeze(-1).expand(shape).unsqueeze(-1)
        reveal, keep = (x.expand(shape + x.shape[-1:]).gather(-1, index).squeeze(-1) for x in self.hazard_logs())
        return RevealSet(reveal, keep, masked.expand(shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of an order, int64 [*, L] -> float [*]."""
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape, self.logits.shape[:-1])  # enumerated values lack the batch
        value, masked = value.expand(shape), self.masked.expand(shape)
        index = value.clamp_min(0).unsqueeze(-1)
        log_prob = self.logits.expand(shape + self.logits.shape[-1:]).gather(-1, index).squeeze(-1)  # [*, L]
        total = log_prob.masked_fill(~masked, 0.0).sum(-1)
        return total.masked_fill(((value >= 0) != masked).any(-1), -torch.inf)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Draw orders, int64 [*sample_shape, *, L]."""
        with torch.no_grad():
            draw = torch.distributions.Categorical(logits=self.logits, validate_args=False).sample(sample_shape)
            return draw.masked_fill(~self.masked, VISIBLE)

    def entropy(self) -> Tensor:
        """Entropy in nats, float [*]: the masked positions' entropies added up."""
        by_position = -_weighted(self.probs, self.logits).sum(-1)
        return by_position.masked_fill(~self.masked, 0.0).sum(-1)


@register_kl(StepwiseReveal, StepwiseReveal)
def _kl_stepwise_reveal(q: StepwiseReveal, p: StepwiseReveal) -> Tensor:
    """KL(q || p) in nats, float [*], over the masked positions of q."""
    by_position = (_weighted(q.probs, q.logits) - _weighted(q.probs, p.logits)).sum(-1)
    return by_position.masked_fill(~q.masked, 0.0).sum(-1)
