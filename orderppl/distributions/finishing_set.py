"""A reveal set that may be everything that is left."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from orderppl.distributions.set_distribution import SetDistribution
from orderppl.randomness import uniform


class FinishingSet(SetDistribution):
    """Everything that is masked with probability f, otherwise a set of another distribution.

        p(z) = f [z = M] + (1 - f) base(z),      f = sigmoid(logit)

    Single decisions per position cannot say "all or little": to finish, every one of them has to change at once. Where
    further steps are not worth their price, one decision ends the sequence.

    Args:
        base: the other distribution, batch shape [*].
        logit: float [*], log odds of finishing; infinite ones are a decision.
        masked: bool [*, S], M; it may be more than the base was shown. That of the base when left out.
    """

    def __init__(
        self,
        base: SetDistribution,
        logit: Tensor,
        masked: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.base = base
        self.logit = logit.expand(base.batch_shape)
        self.non_empty = base.non_empty
        super().__init__(base.masked if masked is None else masked, validate_args=validate_args)

    def _rebuild(self, positions: Callable[[Tensor], Tensor], rows: Callable[[Tensor], Tensor]) -> FinishingSet:
        return FinishingSet(self.base._rebuild(positions, rows), rows(self.logit), positions(self.masked))

    def certain(self, where: Tensor, masked: Tensor) -> FinishingSet:
        """See `SetDistribution`."""
        all_masked = torch.where(where.unsqueeze(-1), masked, self.masked)
        return FinishingSet(self.base.certain(where, masked), self.logit, all_masked)

    def scaled(self, factor: float) -> FinishingSet:
        """f becomes min(1, factor f), and the base is scaled alike; see `SetDistribution`."""
        log_finish = (logsigmoid(self.logit) + math.log(factor)).clamp(max=0.0)
        logit = log_finish - torch.log1p(-log_finish.exp())
        return FinishingSet(self.base.scaled(factor), logit, self.masked)

    @property
    def probs(self) -> Tensor:
        """Inclusion probability of each position, float [*, S]."""
        finish = self.logit.sigmoid().unsqueeze(-1)
        return torch.where(self.masked, finish + (1 - finish) * self.base.probs, 0.0)

    @property
    def shown(self) -> Tensor:
        """Those of the base, bool [*, S]."""
        return self.base.shown

    @property
    def priority(self) -> Tensor | None:
        """That of the base."""
        return self.base.priority

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of a set, bool [*, S] -> float [*]; -inf for sets that leave M."""
        value = value.bool()
        everything = (value == self.masked).all(-1)
        other = logsigmoid(-self.logit) + self.base.log_prob(value)
        # no gradient may pass through log(0 + 0), that of a set that is impossible both ways
        either = torch.logaddexp(logsigmoid(self.logit), other.masked_fill(~everything, 0.0))
        return torch.where(everything, either, other)

    @property
    def mode(self) -> Tensor:
        """Everything where finishing is likelier than not, or else the most probable set of the base: bool [*, S]."""
        return torch.where((self.logit > 0).unsqueeze(-1), self.masked, self.base.mode)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Draw sets, bool [*sample_shape, *, S]."""
        with torch.no_grad():
            other = self.base.sample(sample_shape)
            finish = uniform(other.shape[:-1], other.device) < self.logit.sigmoid()
            return torch.where(finish.unsqueeze(-1), self.masked, other)

    def draw(self, noise: Tensor) -> Tensor:
        """Draw one set from given noise, exactly: bool [*, S].

        The number u of the leftmost masked position decides to finish where u < f; what is left of it, stretched to the
        unit interval again, is as uniform as it was and serves the base.
        """
        finish_prob = self.logit.double().sigmoid().unsqueeze(-1)  # [*, 1]
        first = self.masked & (self.masked.long().cumsum(-1) == 1)
        finish = (first & (noise < finish_prob)).any(-1, keepdim=True)
        left = ((noise - finish_prob) / (1 - finish_prob).clamp(min=1e-12)).clamp(min=torch.finfo(noise.dtype).tiny)
        other = self.base.draw(torch.where(first & ~finish, left, noise))
        return torch.where(finish, self.masked, other)
