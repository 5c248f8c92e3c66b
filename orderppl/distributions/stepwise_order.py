"""Independent reveal steps per position: the mean-field family."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributions.kl import register_kl

from orderppl.distributions.independent_set import IndependentSet, weighted
from orderppl.distributions.order_distribution import OrderDistribution
from orderppl.randomness import sample_categorical
from orderppl.unmasking.trajectory import VISIBLE, Trajectory


class StepwiseOrder(OrderDistribution):
    """r_i ~ Categorical(softmax(logits_i)) over the T steps, independently over the masked positions.

    As a chain of sets its hazard p(r_i = t | r_i >= t) is the reveal probability of position i at step t.

    Args:
        logits: float [*, S, T], unnormalised.
        masked: bool [*, S]; all positions when left out.
    """

    def __init__(self, logits: Tensor, masked: Tensor | None = None, validate_args: bool | None = None) -> None:
        if masked is None:
            masked = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
        shape = torch.broadcast_shapes(logits.shape[:-1], masked.shape)
        self._compact = logits.log_softmax(-1)  # without what is repeated
        super().__init__(masked.expand(shape), logits.shape[-1], validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> StepwiseOrder:
        """Return the same distribution at a broader batch shape."""
        shape = torch.Size(batch_shape) + self.event_shape
        new = self._get_checked_instance(StepwiseOrder, _instance)
        new._compact = self._compact
        OrderDistribution.__init__(new, self.masked.expand(shape), self.num_steps, validate_args=False)
        new._validate_args = self._validate_args
        return new._sharing_like(self)

    @property
    def logits(self) -> Tensor:
        """log P(r_i = t), float [*, S, T]."""
        return self._compact.expand(self.batch_shape + self.event_shape + self._compact.shape[-1:])

    @property
    def probs(self) -> Tensor:
        """P(r_i = t), float [*, S, T]."""
        return self.logits.exp()

    @property
    def mode(self) -> Tensor:
        """Each position's most likely step, int64 [*, S]; a flat plan puts everything into one step."""
        return self.logits.argmax(-1).masked_fill(~self.masked, VISIBLE)

    @cached_property
    def _hazards(self) -> tuple[Tensor, Tensor]:
        """log h and log(1 - h) of h_it = P(r_i = t | r_i >= t), float [.., S, T] each.

        The last hazard is 1, and so is that of a step that no position can be left for.
        """
        remaining = self._compact.flip(-1).logcumsumexp(-1).flip(-1)
        later = torch.cat([remaining[..., 1:], torch.full_like(remaining[..., :1], -torch.inf)], -1)
        never = remaining.isneginf()
        remaining = remaining.masked_fill(never, 0.0)  # no -inf less -inf
        reveal, keep = (self._compact - remaining).clamp_max(0.0), (later - remaining).clamp_max(0.0)
        return reveal.masked_fill(never, 0.0), keep

    def set_at(self, masked: Tensor, step: Tensor) -> IndependentSet:
        """Reveal by hazard."""
        shape = torch.broadcast_shapes(masked.shape, self.masked.shape)
        index = step.unsqueeze(-1).expand(shape).unsqueeze(-1)
        reveal, keep = (x.expand(shape + x.shape[-1:]).gather(-1, index).squeeze(-1) for x in self._hazards)
        return IndependentSet(reveal, keep, masked.expand(shape))

    def sets(self, order: Tensor, trajectory: Trajectory | None = None) -> IndependentSet:
        """See `OrderDistribution`: the hazards as they stand, the last one certain."""
        steps = torch.arange(self.num_steps, device=order.device).reshape((-1,) + (1,) * order.dim())
        masked = order >= steps  # [T, *, S]
        lift = (self.num_steps,) + (1,) * (masked.dim() - self._compact.dim())
        reveal, keep = (x.movedim(-1, 0) for x in self._hazards)
        return IndependentSet(reveal.reshape(lift + reveal.shape[1:]), keep.reshape(lift + keep.shape[1:]), masked)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of an order, int64 [*, S] -> float [*]."""
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape, self.logits.shape[:-1])  # enumerated values lack the batch
        value, masked = value.expand(shape), self.masked.expand(shape)
        index = value.clamp_min(0).unsqueeze(-1)
        log_prob = self.logits.expand(shape + self.logits.shape[-1:]).gather(-1, index).squeeze(-1)  # [*, S]
        total = log_prob.masked_fill(~masked, 0.0).sum(-1)
        return total.masked_fill(((value >= 0) != masked).any(-1), -torch.inf)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Draw orders, int64 [*sample_shape, *, S]."""
        with torch.no_grad():
            return self.draw(self._noise(sample_shape))

    def draw(self, noise: Tensor) -> Tensor:
        """See `OrderDistribution`."""
        return sample_categorical(self.logits, noise).masked_fill(~self.masked, VISIBLE)

    def entropy(self) -> Tensor:
        """Entropy in nats, float [*]: the masked positions' entropies added up."""
        by_position = -weighted(self.probs, self.logits).sum(-1)
        return by_position.masked_fill(~self.masked, 0.0).sum(-1)


@register_kl(StepwiseOrder, StepwiseOrder)
def _kl_stepwise(q: StepwiseOrder, p: StepwiseOrder) -> Tensor:
    """KL(q || p) in nats, float [*], over the masked positions of q."""
    log_q, log_p = q._compact, p._compact  # the same for all particles
    probs = log_q.exp()
    by_position = (weighted(probs, log_q) - weighted(probs, log_p)).sum(-1)
    return by_position.expand(q.masked.shape).masked_fill(~q.masked, 0.0).sum(-1)
