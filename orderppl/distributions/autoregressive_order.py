"""Orders whose steps depend on each other: a scan along the positions, or along groups of them."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributions.kl import register_kl

from orderppl.distributions.order_distribution import OrderDistribution
from orderppl.randomness import uniform_noise
from orderppl.unmasking.trajectory import VISIBLE

DRAWS = 16  # of which the most probable one stands for the distribution


class Scan(Protocol):
    """A network that gives the steps of positions one after another, or of groups of positions."""

    def __call__(self, context: Tensor, steps: Tensor, there: Tensor) -> Tensor:
        """Step logits of all positions at once, float [N, L, T].

        Args:
            context: float [N, L, W], what is known of every position.
            steps: int64 [N, L], the steps; a position reads those only that are drawn before it.
            there: bool [N, L], whether there is a position; False behind the end of a row.
        """
        ...

    def draw(self, context: Tensor, noise: Tensor, there: Tensor) -> Tensor:
        """Draw the steps, int64 [N, L], from uniform numbers, float [N, L]; other arguments as above."""
        ...


class AutoregressiveOrder(OrderDistribution):
    """Each position's step depends on those of the positions drawn before it.

        p(r) = prod_i Categorical(r_i; softmax(scan(context_i, r_{before i})))       over the masked positions i

    Independent steps cannot say "this one or that one, but not both": two halves of a sequence freeze into patterns
    that do not fit each other. What is drawn before a position is the scan's business: all positions on its left, or
    those of a few earlier groups. The log-probability takes one call; a draw takes as many passes as there are groups.

    Args:
        scan: see `Scan`.
        context: float [*, S, W].
        masked: bool [*, S].
        num_steps: T.
        source: what made it, such as a policy: orders of one source are the same distribution, whose KL is 0.
    """

    has_steps = False

    def __init__(
        self,
        scan: Scan,
        context: Tensor,
        masked: Tensor,
        num_steps: int,
        source: object = None,
        validate_args: bool | None = None,
    ) -> None:
        self.scan, self.context, self.source = scan, context, source
        super().__init__(masked, num_steps, validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> AutoregressiveOrder:
        """Return the same distribution at a broader batch shape."""
        masked = self.masked.expand(torch.Size(batch_shape) + self.event_shape)
        made = self.num_steps, self.source, self._validate_args
        return AutoregressiveOrder(self.scan, self.context, masked, *made)._sharing_like(self)

    def _packed(self, lead: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        """Masked positions first: context [N, L, W], their columns and whether there is one, int64 and bool [N, L]."""
        masked = self.masked.expand(lead + self.event_shape)
        columns = masked.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
        count = masked.sum(-1, keepdim=True)
        # On a device, nobody waits to learn how long the longest row is.
        longest = max(int(count.max()), 1) if count.numel() and count.device.type == "cpu" else masked.shape[-1]
        columns = columns[..., :longest]
        there = torch.arange(longest, device=masked.device) < count
        context = self.context.expand(lead + self.context.shape[-2:])
        context = context.gather(-2, columns.unsqueeze(-1).expand(columns.shape + context.shape[-1:]))
        return context.reshape(-1, *context.shape[-2:]), columns.reshape(-1, longest), there.reshape(-1, longest)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of an order, int64 [*, S] -> float [*]."""
        if self._validate_args:
            self._validate_sample(value)
        lead = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        value = value.expand(lead + self.event_shape)
        context, columns, there = self._packed(lead)
        steps = value.reshape(-1, value.shape[-1]).gather(-1, columns).clamp(min=0)
        logits = self.scan(context, steps, there)  # [N, L, T]
        by_position = logits.log_softmax(-1).gather(-1, steps.unsqueeze(-1)).squeeze(-1)
        total = by_position.masked_fill(~there, 0.0).sum(-1).reshape(lead)
        wrong = (value >= 0) != self.masked.expand(value.shape)
        return total.masked_fill(wrong.any(-1), -torch.inf)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Draw orders, int64 [*sample_shape, *, S]."""
        with torch.no_grad():
            return self._drawn(self._noise(sample_shape))

    @torch.no_grad()
    def draw(self, noise: Tensor) -> Tensor:
        """See `OrderDistribution`."""
        return self._drawn(noise)

    def _drawn(self, noise: Tensor) -> Tensor:
        lead = noise.shape[:-1]
        context, columns, there = self._packed(lead)
        noise = noise.reshape(-1, noise.shape[-1]).gather(-1, columns)  # [N, L]
        steps = self.scan.draw(context, noise, there).masked_fill(~there, VISIBLE)
        order = torch.full((len(steps), self.event_shape[0]), VISIBLE, device=steps.device)
        return order.scatter(-1, columns, steps).reshape(lead + self.event_shape)

    @property
    def mode(self) -> Tensor:
        """The most probable of some draws, always the same ones, int64 [*, S].

        Not what is likeliest position by position: until draws have settled, that is no good order.
        """
        rows = torch.zeros(self.batch_shape.numel(), dtype=torch.int64, device=self.masked.device)
        places = (self.masked.long().cumsum(-1) - 1).clamp(min=0)  # the same noise whatever stands before a position
        noise = torch.stack([uniform_noise(0, rows, draw, self.event_shape[0]) for draw in range(DRAWS)])
        noise = noise.reshape((DRAWS,) + self.masked.shape).gather(-1, places.expand((DRAWS,) + places.shape))
        with torch.no_grad():
            drawn = self._drawn(noise)
            best = self.log_prob(drawn).argmax(0)  # [*]
        index = best[None, ..., None].expand((1,) + self.masked.shape)
        return drawn.gather(0, index).squeeze(0)

    def entropy_estimate(self, draws: int = 64) -> Tensor:
        """Entropy in nats by sampling, float [*]: unbiased."""
        with torch.no_grad():
            drawn = self.sample(torch.Size((draws,)))
            return -self.log_prob(drawn).mean(0)


@register_kl(AutoregressiveOrder, AutoregressiveOrder)
def _kl_tied(q: AutoregressiveOrder, p: AutoregressiveOrder) -> Tensor:
    """KL(q || p) in nats, float [*]: 0 for one plan as guide and prior; no closed form otherwise."""
    if q.source is None or q.source is not p.source:
        raise NotImplementedError
    return torch.zeros(q.batch_shape, device=q.masked.device)
