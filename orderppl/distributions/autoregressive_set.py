"""Reveal sets whose positions depend on each other: a scan over the masked positions."""

from __future__ import annotations

import torch
from torch import Tensor

from orderppl.distributions.autoregressive_order import Packed, Scan, best_drawn, fixed_noise
from orderppl.distributions.independent_set import log1mexp
from orderppl.distributions.set_distribution import SetDistribution
from orderppl.randomness import uniform

WAIT, REVEAL = 0, 1
ALMOST_ONE = 1 - 2**-40


class AutoregressiveSet(SetDistribution):
    """Each position's decision depends on those of the positions decided before it.

        log p(z) = sum_{i in M} log Bernoulli(z_i; sigmoid(scan(context_i, z_{before i})))  -  log Z
        Z        = 1 - P(nobody is revealed)   if `non_empty` and M is not empty, else 1

    Independent decisions cannot say "one of these two neighbours": here the second one knows what the first one does.
    The log-probability takes one call of the scan, or two with Z, since nobody is revealed along one path only; a draw
    takes as many passes as the scan has turns. Inclusion probabilities and the entropy have no closed form.

    Args:
        scan: see `Scan`, of two outcomes per position: wait and reveal.
        context: float [*, S, W], what is known of every position.
        masked: bool [*, S], M.
        non_empty: condition on at least one revealed position (exact normaliser).
        finished: bool [*], rows in which all of M is revealed for sure; None: nowhere.
    """

    priority = None  # nothing ranks the positions one by one

    def __init__(
        self,
        scan: Scan,
        context: Tensor,
        masked: Tensor,
        non_empty: bool = False,
        finished: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.scan, self.context, self.non_empty = scan, context, non_empty
        self.finished = torch.zeros_like(masked[..., 0]) if finished is None else finished
        super().__init__(masked, validate_args)

    def _with(self, context: Tensor, masked: Tensor, finished: Tensor) -> AutoregressiveSet:
        return AutoregressiveSet(self.scan, context, masked, self.non_empty, finished, self._validate_args)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> AutoregressiveSet:
        """Return the same distribution at a broader batch shape."""
        shape = torch.Size(batch_shape)
        if shape == self.batch_shape:
            return self
        context = self.context.expand(shape + self.context.shape[-2:])
        return self._with(context, self.masked.expand(shape + self.event_shape), self.finished.expand(shape))

    def at(self, step: int) -> AutoregressiveSet:
        """See `SetDistribution`."""
        return self._with(self.context[step], self.masked[step], self.finished[step])

    def certain(self, where: Tensor, masked: Tensor) -> AutoregressiveSet:
        """See `SetDistribution`."""
        return self._with(self.context, torch.where(where[..., None], masked, self.masked), self.finished | where)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of a set, bool [*, S] -> float [*]; -inf for sets that leave M."""
        if self._validate_args:
            self._validate_sample(value)
        value = value.bool()
        lead = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        value, masked = value.expand(lead + self.event_shape), self.masked.expand(lead + self.event_shape)
        packed = Packed.of(self.context, self.masked, lead)
        total = packed.log_probs(self.scan, packed.take(value).long()).sum(-1).reshape(lead)
        impossible = (value & ~masked).any(-1)
        if self.non_empty:
            some = masked.any(-1)
            log_empty = self._log_waits(packed).sum(-1).reshape(lead)
            total = total - log1mexp(log_empty.masked_fill(~some, -torch.inf))
            impossible = impossible | some & ~value.any(-1)
        total = total.masked_fill(impossible, -torch.inf)
        surely = torch.zeros_like(total).masked_fill((value != masked).any(-1), -torch.inf)
        return torch.where(self.finished, surely, total)

    def _log_waits(self, packed: Packed) -> Tensor:
        """Log-probability that a position waits where all before it do, float [N, L]."""
        return packed.log_probs(self.scan, torch.full_like(packed.columns, WAIT))

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Draw sets, bool [*sample_shape, *, S]; exact under conditioning, without rejection."""
        return self.draw(uniform(torch.Size(sample_shape) + self.masked.shape, self.masked.device))

    @torch.no_grad()
    def draw(self, noise: Tensor) -> Tensor:
        """Draw one set from given noise, exactly: bool [*, S].

        Under conditioning the first position that is revealed is drawn first: until then all wait.
        """
        lead = noise.shape[:-1]
        packed = Packed.of(self.context, self.masked, lead)
        numbers = packed.take(noise).double()  # [N, L]
        if self.non_empty:
            numbers = self._with_one(packed, numbers)
        drawn = packed.put(self.scan.draw(packed.context, numbers, packed.there), self.event_shape[0])
        revealed = drawn.reshape(lead + self.event_shape) == REVEAL
        return torch.where(self.finished[..., None], self.masked, revealed).expand(noise.shape)

    def _with_one(self, packed: Packed, noise: Tensor) -> Tensor:
        """Noise float [N, L] with which at least one position is revealed.

        Of the positions in the order of their turns, the first revealed one is i with the hazard
        q_i / (1 - prod_{j from i on} (1 - q_j)), where q is given that all so far wait.
        """
        turns = self.scan.turns(noise.shape[-1]).to(noise.device)
        ranked = torch.where(packed.there, turns, turns.max() + 1).argsort(dim=-1, stable=True)  # [N, L]
        log_wait = self._log_waits(packed).double().gather(-1, ranked)
        log_none_from_here = log_wait.flip(-1).cumsum(-1).flip(-1)
        hazard = torch.expm1(log_wait) / torch.expm1(log_none_from_here)  # 0 / 0 where nothing is left
        reveals = (noise.gather(-1, ranked) < hazard) & packed.there.gather(-1, ranked)
        count = reveals.long().cumsum(-1)
        forced = noise.gather(-1, ranked).masked_fill(count == 0, 0.0).masked_fill(reveals & (count == 1), ALMOST_ONE)
        return torch.empty_like(noise).scatter(-1, ranked, forced)

    @property
    def mode(self) -> Tensor:
        """The most probable of some draws, always the same ones, bool [*, S]."""
        with torch.no_grad():
            drawn = self.draw(fixed_noise(self.masked))
            return best_drawn(drawn, self.log_prob(drawn))
