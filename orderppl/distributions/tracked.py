"""Provenance at the border of a distribution instead of through each of its operations."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from torch import Tensor
from torch.distributions import Distribution, kl_divergence
from torch.distributions.constraints import Constraint
from torch.distributions.kl import register_kl


class Tracked(dist.TorchDistribution):
    """A distribution whose parameters depend on earlier draws.

    Its own parameters are plain tensors, on which operations cost a tenth; what comes out, log-densities and
    divergences, carries the dependence, so that a tracing ELBO can follow it.

    Args:
        base: the distribution of plain tensors.
        provenance: names of the sites that its parameters depend on.
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(self, base: dist.TorchDistribution, provenance: frozenset[str]) -> None:
        self.base, self.provenance = base, provenance
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @property
    def has_enumerate_support(self) -> bool:
        """As the base."""
        return bool(self.base.has_enumerate_support)

    @property
    def support(self) -> Constraint:
        """As the base."""
        return self.base.support

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> Tracked:
        """Return the same distribution at a broader batch shape."""
        return Tracked(self.base.expand(batch_shape), self.provenance)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Draw from the base."""
        drawn: Tensor = self.base.sample(sample_shape)
        return track_provenance(drawn, self.provenance)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, which depends on the value and on whatever the parameters depend on."""
        return track_provenance(self.base.log_prob(detach_provenance(value)), self.provenance | get_provenance(value))

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All values of the base."""
        values: Tensor = self.base.enumerate_support(expand)
        return values


def _divergence(q: Distribution, p: Distribution) -> Tensor:
    provenance: frozenset[str] = frozenset()
    for one in (q, p):
        provenance |= one.provenance if isinstance(one, Tracked) else frozenset()
    plain = (one.base if isinstance(one, Tracked) else one for one in (q, p))
    divergence = kl_divergence(*plain)
    return track_provenance(detach_provenance(divergence), provenance | get_provenance(divergence))


register_kl(Tracked, Tracked)(_divergence)
register_kl(Tracked, Distribution)(_divergence)
register_kl(Distribution, Tracked)(_divergence)
