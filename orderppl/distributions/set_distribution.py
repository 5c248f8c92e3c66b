"""What every distribution over one reveal set offers to orders, bounds and decoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions.kl import register_kl


class SetDistribution(dist.TorchDistribution):
    """A random subset z of the masked positions M; values are bool [*, S].

    A subclass defines `log_prob`, `sample`, `mode`, `draw`, `certain` and `_rebuild`. It may leave `probs` and
    `entropy` out where they have no closed form (they raise `NotImplementedError`, as an unregistered divergence does);
    a bound then takes what it has sampled in their place.

    Args:
        masked: bool [*, S], M.
        validate_args: check arguments and values, as in torch; None: as `torch.distributions` is set.

    Attributes:
        non_empty: whether at least one position is revealed for sure while any is masked.
        is_certain: whether it is a point mass, so that nothing has to be drawn.
    """

    arg_constraints: dict[str, Any] = {}
    has_enumerate_support = True
    non_empty = False
    is_certain = False

    def __init__(self, masked: Tensor, validate_args: bool | None = None) -> None:
        self.masked = masked
        super().__init__(masked.shape[:-1], masked.shape[-1:], validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Subsets of all positions; those that leave M have probability 0."""
        return constraints.independent(constraints.boolean, 1)

    def _rebuild(self, positions: Callable[[Tensor], Tensor], rows: Callable[[Tensor], Tensor]) -> Self:
        """The same distribution with every tensor [*, S] mapped by `positions` and every tensor [*] by `rows`."""
        raise NotImplementedError

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> Self:
        """Return the same distribution at a broader batch shape."""
        shape = torch.Size(batch_shape)
        if shape == self.batch_shape:
            return self
        return self._rebuild(lambda x: x.expand(shape + self.event_shape), lambda x: x.expand(shape))

    def at(self, step: int) -> Self:
        """One of a stack of sets along the first batch dimension."""
        return self._rebuild(lambda x: x[step], lambda x: x[step])

    def certain(self, where: Tensor, masked: Tensor) -> Self:
        """Reveal all of `masked` (bool [*, S]) in the rows `where` (bool [*]), as the last step does.

        What is left may be more than the M of the distribution: a policy may have been shown less.
        """
        raise NotImplementedError

    def scaled(self, factor: float) -> Self:
        """Reveal each position `factor` times as likely, up to 1, where the distribution has such a setting.

        Raises:
            NotImplementedError: it has none.
        """
        raise NotImplementedError(f"{type(self).__name__} has no probabilities to scale")

    @property
    def probs(self) -> Tensor:
        """Inclusion probability of each position, float [*, S]."""
        raise NotImplementedError

    @property
    def mean(self) -> Tensor:
        """Same as `probs`."""
        return self.probs

    @property
    def shown(self) -> Tensor:
        """The positions that are decided about one by one, bool [*, S]."""
        return self.masked

    @property
    def priority(self) -> Tensor | None:
        """What ranks the positions where a decoder finds the set empty, float [*, S]; None leaves that to it."""
        return self.probs

    def draw(self, noise: Tensor) -> Tensor:
        """Draw one set from given noise, so that a decoder's draws do not depend on the batch.

        Args:
            noise: float [*, S], independent uniform numbers in (0, 1).

        Returns:
            bool [*, S].
        """
        raise NotImplementedError

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All 2**S subsets, bool [2**S, *, S]; those that are impossible in a row have log-probability -inf."""
        length = self.event_shape[0]
        code = torch.arange(2**length, device=self.masked.device)
        bits = (code.unsqueeze(-1) >> torch.arange(length, device=code.device)) & 1
        values = bits.bool().reshape((-1,) + (1,) * len(self.batch_shape) + (length,))
        return values.expand((-1,) + self.batch_shape + self.event_shape) if expand else values


class DecidedSet(SetDistribution):
    """A point mass: the set of a rule that decides.

    Args:
        decided: bool [*, S], a subset of `masked`.
        masked: bool [*, S], M.
        non_empty: whether the rule always reveals something.
    """

    is_certain = True

    def __init__(
        self, decided: Tensor, masked: Tensor, non_empty: bool = False, validate_args: bool | None = None
    ) -> None:
        self.decided, self.non_empty = decided, non_empty
        super().__init__(masked, validate_args)

    def _rebuild(self, positions: Callable[[Tensor], Tensor], rows: Callable[[Tensor], Tensor]) -> DecidedSet:
        return DecidedSet(positions(self.decided), positions(self.masked), self.non_empty, self._validate_args)

    def certain(self, where: Tensor, masked: Tensor) -> DecidedSet:
        """See `SetDistribution`."""
        decided, masked = (torch.where(where.unsqueeze(-1), masked, own) for own in (self.decided, self.masked))
        return DecidedSet(decided, masked, self.non_empty, self._validate_args)

    def scaled(self, factor: float) -> DecidedSet:
        """Nothing is left to scale."""
        return self

    @property
    def probs(self) -> Tensor:
        """1 in the set, 0 elsewhere: float [*, S]."""
        return self.decided.to(torch.get_default_dtype())

    @property
    def priority(self) -> None:
        """A rule that has decided ranks no more."""
        return

    @property
    def mode(self) -> Tensor:
        """The set, bool [*, S]."""
        return self.decided

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """The set again and again, bool [*sample_shape, *, S]."""
        return self.decided.expand(torch.Size(sample_shape) + self.decided.shape)

    def draw(self, noise: Tensor) -> Tensor:
        """The set, whatever the noise."""
        return self.decided.expand(noise.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """0 for the set and -inf for any other: float [*]."""
        same = (value.bool() == self.decided).all(-1)
        return torch.zeros(same.shape, device=same.device).masked_fill(~same, -torch.inf)

    def entropy(self) -> Tensor:
        """0 nats, float [*]."""
        return torch.zeros(self.batch_shape, device=self.masked.device)


@register_kl(DecidedSet, SetDistribution)
def _kl_decided(q: DecidedSet, p: SetDistribution) -> Tensor:
    """KL(q || p) in nats, float [*]."""
    return -p.log_prob(q.decided)
