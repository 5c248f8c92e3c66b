"""What every law of one reveal set offers to orders, bounds and decoders."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Self

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor


class SetLaw(dist.TorchDistribution):
    """A random subset z of the masked positions M; values are bool [*, L].

    A subclass defines `log_prob`, `sample`, `mode`, `draw`, `certain` and `_rebuild`. It may leave `probs` and
    `entropy` out where they have no closed form (they raise `NotImplementedError`, as an unregistered divergence does);
    a bound then takes what it has sampled in their place.

    Args:
        masked: bool [*, L], M.
        log_weight: float [*], log of an unnormalised factor such as the price of a step; 0 when left out.

    Attributes:
        non_empty: whether at least one position is revealed for sure while any is masked.
        stacks: whether sets met one after another can be put together again by `stack`.
    """

    arg_constraints: dict[str, Any] = {}
    has_enumerate_support = True
    non_empty = False
    stacks = False

    def __init__(self, masked: Tensor, log_weight: Tensor | None = None, validate_args: bool | None = None) -> None:
        self.masked = masked
        self._log_weight = log_weight
        super().__init__(masked.shape[:-1], masked.shape[-1:], validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Subsets of all positions; those that leave M have probability 0."""
        return constraints.independent(constraints.boolean, 1)

    @property
    def is_normalised(self) -> bool:
        """Whether there is no unnormalised factor."""
        return self._log_weight is None

    @property
    def log_weight(self) -> Tensor:
        """Log of the unnormalised factor, float [*]."""
        if self._log_weight is None:
            return torch.zeros(self.batch_shape, device=self.masked.device)
        return self._log_weight

    def _rebuild(self, positions: Callable[[Tensor], Tensor], rows: Callable[[Tensor], Tensor]) -> Self:
        """The same law with every tensor [*, L] mapped by `positions` and every tensor [*] by `rows`."""
        raise NotImplementedError

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> Self:
        """Return the same law at a broader batch shape."""
        shape = torch.Size(batch_shape)
        return self._rebuild(lambda x: x.expand(shape + self.event_shape), lambda x: x.expand(shape))

    def at(self, steps: Tensor) -> Self:
        """Pick steps out of a stack of sets along the first batch dimension.

        Args:
            steps: int64 [S, *], indices into that dimension, broadcast to the other batch dimensions.
        """
        index = steps.expand((steps.shape[0],) + tuple(self.batch_shape[1:]))
        positions = index.unsqueeze(-1).expand(index.shape + self.event_shape)
        return self._rebuild(lambda x: x.gather(0, positions), lambda x: x.gather(0, index))

    def weighted(self, log_weight: Tensor) -> Self:
        """Multiply the density by exp(log_weight), float [*]."""
        new = copy.copy(self)
        total = log_weight if self._log_weight is None else self._log_weight + log_weight
        new._log_weight = total.expand(self.batch_shape)
        return new

    def certain(self, where: Tensor, already: bool = False) -> Self:
        """Reveal everything that is masked in the rows `where` (bool [*]), as the last step does.

        Args:
            where: bool [*].
            already: the sets are known to do so.
        """
        raise NotImplementedError

    def everything(self, masked: Tensor) -> Self:
        """The set of all positions in `masked` (bool [*, L]), for sure; needed where `stacks`."""
        raise NotImplementedError

    @classmethod
    def stack(cls, sets: Sequence[Any]) -> Self:
        """Sets of this kind, of one batch shape [*], along a new first dimension; needed where `stacks`."""
        raise NotImplementedError

    @property
    def probs(self) -> Tensor:
        """Inclusion probability of each position, float [*, L]."""
        raise NotImplementedError

    @property
    def mean(self) -> Tensor:
        """Same as `probs`."""
        return self.probs

    def draw(self, noise: Tensor, factor: float = 1.0) -> Tensor:
        """Draw one set from given noise, so that a decoder's draws do not depend on the batch.

        Args:
            noise: float [*, L], independent uniform numbers in (0, 1).
            factor: above 1 reveals more than the law says, where the law has a dial for that.

        Returns:
            bool [*, L].
        """
        raise NotImplementedError

    def decide(self, factor: float = 1.0) -> Tensor:
        """What a decoder reveals without noise: {factor p > 0.5}, p the inclusion probability; may be empty.

        Args:
            factor: above 1 reveals more than the law says.

        Returns:
            bool [*, L].
        """
        return (factor * self.probs > 0.5) & self.masked

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All 2**L subsets, bool [2**L, *, L]; those that are impossible in a row have log-probability -inf."""
        length = self.event_shape[0]
        code = torch.arange(2**length, device=self.masked.device)
        bits = (code.unsqueeze(-1) >> torch.arange(length, device=code.device)) & 1
        values = bits.bool().reshape((-1,) + (1,) * len(self.batch_shape) + (length,))
        return values.expand((-1,) + self.batch_shape + self.event_shape) if expand else values
