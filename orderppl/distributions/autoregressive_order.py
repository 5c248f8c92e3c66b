"""Orders whose steps depend on each other: a scan along the positions, or along groups of them."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributions.kl import register_kl

from orderppl.distributions.order_distribution import OrderDistribution
from orderppl.randomness import SELECTION, row_noise
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

    def turns(self, length: int) -> Tensor:
        """When each of so many positions is drawn, int64 [L]: it reads those of earlier turns only."""
        ...


class Packed(NamedTuple):
    """The masked positions of rows, moved to their left ends.

    Attributes:
        context: float [N, L, W], what is known of them.
        columns: int64 [N, L], where they came from.
        there: bool [N, L], whether there is one.
    """

    context: Tensor
    columns: Tensor
    there: Tensor

    @classmethod
    def of(cls, context: Tensor, masked: Tensor, lead: torch.Size) -> Packed:
        """From float [*, S, W] and bool [*, S], spread to the leading shape [lead]."""
        masked = masked.expand(lead + masked.shape[-1:])
        columns = masked.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
        count = masked.sum(-1, keepdim=True)
        # On a device, nobody waits to learn how long the longest row is.
        longest = max(int(count.max()), 1) if count.numel() and count.device.type == "cpu" else masked.shape[-1]
        columns = columns[..., :longest]
        there = torch.arange(longest, device=masked.device) < count
        context = context.expand(lead + context.shape[-2:])
        context = context.gather(-2, columns.unsqueeze(-1).expand(columns.shape + context.shape[-1:]))
        return cls(context.reshape(-1, *context.shape[-2:]), columns.reshape(-1, longest), there.reshape(-1, longest))

    def log_probs(self, scan: Scan, steps: Tensor) -> Tensor:
        """Log-probability of every step, int64 [N, L], given those drawn before it: float [N, L]; 0 where none is."""
        logits = scan(self.context, steps, self.there)  # [N, L, T]
        by_position = logits.log_softmax(-1).gather(-1, steps.unsqueeze(-1)).squeeze(-1)
        return by_position.masked_fill(~self.there, 0.0)

    def likeliest(self, scan: Scan, beams: int) -> Tensor:
        """The most probable steps that a beam search finds, int64 [N, L]: it keeps so many beginnings of a row."""
        rows, length = self.there.shape
        found = torch.zeros((rows, 1, length), dtype=torch.int64, device=self.there.device)
        score = torch.zeros((rows, 1), device=self.there.device)
        for place in scan.turns(length).argsort(stable=True).tolist():
            width = found.shape[1]
            context, there = (x.repeat_interleave(width, 0) for x in (self.context, self.there))
            logits = scan(context, found.flatten(0, 1), there)[:, place].unflatten(0, (rows, width))  # [N, W, T]
            log_p = logits.log_softmax(-1).float()
            nothing = torch.full_like(log_p, -torch.inf)
            nothing[..., 0] = 0.0  # where no position is, step 0 stands
            total = score.unsqueeze(-1) + torch.where(self.there[:, place, None, None], log_p, nothing)
            steps = total.shape[-1]
            score, kept = total.flatten(1).topk(min(beams, width * steps), -1)  # [N, W]
            found = found.gather(1, (kept // steps).unsqueeze(-1).expand(-1, -1, length))
            found[..., place] = kept % steps
        return found[:, 0]

    def take(self, values: Tensor) -> Tensor:
        """Their values, [lead, S] -> [N, L]."""
        return values.reshape(-1, values.shape[-1]).gather(-1, self.columns)

    def put(self, steps: Tensor, size: int) -> Tensor:
        """Their steps, int64 [N, L] -> [N, size]; -1 elsewhere."""
        order = torch.full((len(steps), size), VISIBLE, device=steps.device)
        return order.scatter(-1, self.columns, steps.masked_fill(~self.there, VISIBLE))


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
        beams: width of the beam search for the mode; when left out the most probable of some draws stands for it.
    """

    has_steps = False

    def __init__(
        self,
        scan: Scan,
        context: Tensor,
        masked: Tensor,
        num_steps: int,
        source: object = None,
        beams: int | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.scan, self.context, self.source, self.beams = scan, context, source, beams
        super().__init__(masked, num_steps, validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> AutoregressiveOrder:
        """Return the same distribution at a broader batch shape."""
        masked = self.masked.expand(torch.Size(batch_shape) + self.event_shape)
        made = self.num_steps, self.source, self.beams, self._validate_args
        return AutoregressiveOrder(self.scan, self.context, masked, *made)._sharing_like(self)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of an order, int64 [*, S] -> float [*]."""
        if self._validate_args:
            self._validate_sample(value)
        lead = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        value = value.expand(lead + self.event_shape)
        packed = Packed.of(self.context, self.masked, lead)
        total = packed.log_probs(self.scan, packed.take(value).clamp(min=0)).sum(-1).reshape(lead)
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
        packed = Packed.of(self.context, self.masked, lead)
        steps = self.scan.draw(packed.context, packed.take(noise), packed.there)
        return packed.put(steps, self.event_shape[0]).reshape(lead + self.event_shape)

    @property
    def mode(self) -> Tensor:
        """The most probable order that the beam search finds, or of some draws, always the same ones: int64 [*, S]."""
        with torch.no_grad():
            if self.beams is not None:
                packed = Packed.of(self.context, self.masked, self.batch_shape)
                found = packed.put(packed.likeliest(self.scan, self.beams), self.event_shape[0])
                return found.reshape(self.masked.shape)
            drawn = self._drawn(fixed_noise(self.masked))
            return best_drawn(drawn, self.log_prob(drawn))

    def entropy_estimate(self, draws: int = 64) -> Tensor:
        """Entropy in nats by sampling, float [*]: unbiased."""
        with torch.no_grad():
            drawn = self.sample(torch.Size((draws,)))
            return -self.log_prob(drawn).mean(0)


def fixed_noise(masked: Tensor) -> Tensor:
    """Uniform numbers for DRAWS draws, always the same, whatever stands before a position: float [DRAWS, *, S]."""
    rows = masked.reshape(-1, masked.shape[-1])
    first = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)  # the same numbers in every row
    noise = [row_noise(0, first, first + draw, rows, SELECTION) for draw in range(DRAWS)]
    return torch.stack(noise).reshape((DRAWS,) + masked.shape)


def best_drawn(drawn: Tensor, log_prob: Tensor) -> Tensor:
    """The most probable of some draws, [DRAWS, *, S] and float [DRAWS, *] -> [*, S]."""
    index = log_prob.argmax(0)[None, ..., None].expand((1,) + drawn.shape[1:])
    return drawn.gather(0, index).squeeze(0)


@register_kl(AutoregressiveOrder, AutoregressiveOrder)
def _kl_tied(q: AutoregressiveOrder, p: AutoregressiveOrder) -> Tensor:
    """KL(q || p) in nats, float [*]: 0 for one plan as guide and prior; no closed form otherwise."""
    if q.source is None or q.source is not p.source:
        raise NotImplementedError
    return torch.zeros(q.batch_shape, device=q.masked.device)
