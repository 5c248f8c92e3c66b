"""Independent reveal steps per position: the mean-field family."""

from __future__ import annotations

from typing import Any

import torch
from pyro.ops.provenance import detach_provenance
from torch import Tensor
from torch.distributions.kl import register_kl

from orderppl.distributions.ordered_partition import OrderedPartition
from orderppl.distributions.reveal_set import RevealSet, _weighted
from orderppl.randomness import sample_categorical, uniform
from orderppl.states import VISIBLE, masked_before, stacked_steps


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
        self._compact = logits.log_softmax(-1)  # without what is repeated
        self._hazards: tuple[Tensor, Tensor, Tensor] | None = None
        super().__init__(masked.expand(shape), logits.shape[-1], validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> StepwiseReveal:
        """Return the same distribution at a broader batch shape."""
        shape = torch.Size(batch_shape) + self.event_shape
        new = self._get_checked_instance(StepwiseReveal, _instance)
        new._compact, new._hazards = self._compact, None
        OrderedPartition.__init__(new, self.masked.expand(shape), self.num_steps, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def logits(self) -> Tensor:
        """log P(r_i = t), float [*, L, T]."""
        return self._compact.expand(self.batch_shape + self.event_shape + self._compact.shape[-1:])

    @property
    def probs(self) -> Tensor:
        """P(r_i = t), float [*, L, T]."""
        return self.logits.exp()

    def hazard_logs(self) -> tuple[Tensor, Tensor]:
        """log h and log(1 - h) of h_it = P(r_i = t | r_i >= t), both float [*, L, T]; the last hazard is 1."""
        shape = self.batch_shape + self.event_shape + self._compact.shape[-1:]
        reveal, keep, _ = self._compact_hazards()
        return reveal.expand(shape), keep.expand(shape)

    def _compact_hazards(self) -> tuple[Tensor, Tensor, Tensor]:
        """log h, log(1 - h) and log P(r_i >= t) of the compact logits, float [.., T] each."""
        wants_gradient = torch.is_grad_enabled() and self._compact.requires_grad
        if self._hazards is None or (wants_gradient and not self._hazards[0].requires_grad):
            remaining = self._compact.flip(-1).logcumsumexp(-1).flip(-1)
            later = torch.cat([remaining[..., 1:], torch.full_like(remaining[..., :1], -torch.inf)], -1)
            self._hazards = (self._compact - remaining).clamp_max(0.0), (later - remaining).clamp_max(0.0), remaining
        return self._hazards

    def set_at(self, masked: Tensor, step: Tensor) -> RevealSet:
        """Reveal by hazard."""
        shape = torch.broadcast_shapes(masked.shape, self.masked.shape)
        reveal, keep = (_at(x, step, shape) for x in self._compact_hazards()[:2])
        return RevealSet(reveal, keep, masked.expand(shape))

    def _sets_along(self, reveal_step: Tensor, steps: Tensor | None) -> RevealSet:
        if steps is not None:
            return super()._sets_along(reveal_step, steps)
        # All steps are the hazards as they stand, the last one certain: no look-up, and no gradient of its size.
        masked = masked_before(reveal_step, stacked_steps(self.num_steps, reveal_step))  # [T, *, L]
        lift = (self.num_steps,) + (1,) * (masked.dim() - self._compact.dim())
        reveal, keep = (x.movedim(-1, 0) for x in self._compact_hazards()[:2])
        return RevealSet(reveal.reshape(lift + reveal.shape[1:]), keep.reshape(lift + keep.shape[1:]), masked)

    def looked_at(self, reveal_step: Tensor, steps: Tensor) -> tuple[RevealSet, Tensor]:
        """See `OrderedPartition.looked_at`; a position was revealed at r_i < t or is known to come later."""
        reveal_step = detach_provenance(reveal_step)
        shape = torch.broadcast_shapes(steps.shape + (1,), reveal_step.shape)  # [S, *, L]
        come = _at(self._compact_hazards()[2], steps, shape)
        at_order = self.logits.gather(-1, reveal_step.clamp_min(0).unsqueeze(-1)).squeeze(-1)  # [*, L]
        by_position = torch.where(masked_before(reveal_step, steps.unsqueeze(-1)), come, at_order)
        return self.reveal_sets(reveal_step, steps), by_position.masked_fill(~self.masked, 0.0).sum(-1)

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
            shape = torch.Size(sample_shape) + self.masked.shape
            draw = sample_categorical(self.logits, uniform(shape, self.masked.device))
            return draw.masked_fill(~self.masked, VISIBLE)

    def entropy(self) -> Tensor:
        """Entropy in nats, float [*]: the masked positions' entropies added up."""
        by_position = -_weighted(self.probs, self.logits).sum(-1)
        return by_position.masked_fill(~self.masked, 0.0).sum(-1)


def _at(by_step: Tensor, step: Tensor, shape: torch.Size) -> Tensor:
    """Pick from the last dimension (float [.., L, T]) at `step` (int64 [*]): float [*, L], of `shape`."""
    once = step[tuple(slice(1 if stride == 0 else None) for stride in step.stride())]  # a step that many rows share
    small = torch.broadcast_shapes(by_step.shape[:-1], once.shape + (1,))
    index = once.unsqueeze(-1).expand(small).unsqueeze(-1)
    return by_step.expand(small + by_step.shape[-1:]).gather(-1, index).squeeze(-1).expand(shape)


@register_kl(StepwiseReveal, StepwiseReveal)
def _kl_stepwise_reveal(q: StepwiseReveal, p: StepwiseReveal) -> Tensor:
    """KL(q || p) in nats, float [*], over the masked positions of q."""
    log_q, log_p = q._compact, p._compact  # the same for all particles
    probs = log_q.exp()
    by_position = (_weighted(probs, log_q) - _weighted(probs, log_p)).sum(-1)
    return by_position.expand(q.masked.shape).masked_fill(~q.masked, 0.0).sum(-1)
