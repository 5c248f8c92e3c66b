"""A reveal set that may be everything that is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributions.kl import register_kl
from torch.nn.functional import logsigmoid

from orderppl.distributions.set_law import SetLaw
from orderppl.randomness import uniform


class FinishingSet(SetLaw):
    """Everything that is masked with probability f, otherwise a set of another law.

        p(z) = f [z = M] + (1 - f) base(z),      f = sigmoid(logit)

    Single decisions per position cannot say "all or little": to finish, every one of them has to change at once. Where
    further steps are not worth their price, one decision ends the sequence.

    Args:
        base: the other law, batch shape [*], without a weight of its own.
        logit: float [*], log odds of finishing.
        log_weight: float [*]; see `SetLaw`.

    Raises:
        ValueError: a base with a weight.
    """

    def __init__(
        self, base: SetLaw, logit: Tensor, log_weight: Tensor | None = None, validate_args: bool | None = None
    ) -> None:
        if not base.is_normalised:
            raise ValueError("base: has a weight; put the weight on the set that finishes")
        self.base = base
        self.logit = logit.expand(base.batch_shape)
        self.non_empty, self.stacks = base.non_empty, base.stacks
        super().__init__(base.masked, log_weight, validate_args=validate_args)

    @classmethod
    def stack(cls, sets: Sequence[FinishingSet]) -> FinishingSet:
        """Sets of one batch shape [*] along a new first dimension."""
        weighted = any(one._log_weight is not None for one in sets)
        return FinishingSet(
            sets[0].base.stack([one.base for one in sets]),
            torch.stack([one.logit for one in sets]),
            torch.stack([one.log_weight for one in sets]) if weighted else None,
        )

    def _rebuild(self, positions: Callable[[Tensor], Tensor], rows: Callable[[Tensor], Tensor]) -> FinishingSet:
        log_weight = None if self._log_weight is None else rows(self._log_weight)
        return FinishingSet(self.base._rebuild(positions, rows), rows(self.logit), log_weight)

    def certain(self, where: Tensor, already: bool = False) -> FinishingSet:
        """Reveal everything that is masked in the rows `where` (bool [*]); see `SetLaw`."""
        return FinishingSet(self.base.certain(where, already), self.logit, self._log_weight)

    def everything(self, masked: Tensor) -> FinishingSet:
        """The set of all positions in `masked` (bool [*, L]), for sure."""
        return FinishingSet(self.base.everything(masked), self.logit)

    @property
    def probs(self) -> Tensor:
        """Inclusion probability of each position, float [*, L]."""
        finish = self.logit.sigmoid().unsqueeze(-1)
        return torch.where(self.masked, finish + (1 - finish) * self.base.probs, 0.0)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of a set, bool [*, L] -> float [*]; -inf for sets that leave M."""
        value = value.bool()
        everything = (value == self.masked).all(-1)
        other = logsigmoid(-self.logit) + self.base.log_prob(value)
        # no gradient may pass through log(0 + 0), that of a set that is impossible both ways
        either = torch.logaddexp(logsigmoid(self.logit), other.masked_fill(~everything, 0.0))
        log_prob = torch.where(everything, either, other)
        return log_prob if self._log_weight is None else log_prob + self._log_weight

    @property
    def mode(self) -> Tensor:
        """The most probable set, bool [*, L]."""
        other = self.base.mode
        finish = self.log_prob(self.masked) >= self.log_prob(other)
        return torch.where(finish.unsqueeze(-1), self.masked, other)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Draw sets, bool [*sample_shape, *, L]."""
        with torch.no_grad():
            other = self.base.sample(sample_shape)
            finish = uniform(other.shape[:-1], other.device) < self.logit.sigmoid()
            return torch.where(finish.unsqueeze(-1), self.masked, other)

    def draw(self, noise: Tensor, factor: float = 1.0) -> Tensor:
        """Draw one set from given noise, exactly: bool [*, L].

        The number u of the leftmost masked position decides to finish where u < min(1, factor f); what is left of it,
        stretched to the unit interval again, is as uniform as it was and serves the other law.
        """
        finish_prob = (factor * self.logit.double().sigmoid()).clamp(max=1.0).unsqueeze(-1)  # [*, 1]
        first = self.masked & (self.masked.long().cumsum(-1) == 1)
        finish = (first & (noise < finish_prob)).any(-1, keepdim=True)
        left = ((noise - finish_prob) / (1 - finish_prob).clamp(min=1e-12)).clamp(min=torch.finfo(noise.dtype).tiny)
        other = self.base.draw(torch.where(first & ~finish, left, noise), factor)
        return torch.where(finish, self.masked, other)

    def decide(self, factor: float = 1.0) -> Tensor:
        """Finish where that is likelier than not, or else what the other law decides: bool [*, L]."""
        finish = factor * self.logit.sigmoid() > 0.5
        return torch.where(finish.unsqueeze(-1), self.masked, self.base.decide(factor))


@register_kl(FinishingSet, FinishingSet)
def _kl_same(q: FinishingSet, p: FinishingSet) -> Tensor:
    """KL(q || p) in nats, float [*], of one policy as guide and prior; it has no closed form otherwise."""
    if q.base is not p.base or q.logit is not p.logit:
        raise NotImplementedError
    return -p.log_weight
