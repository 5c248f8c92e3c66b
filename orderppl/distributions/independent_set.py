"""Reveal sets in which every position is decided on its own."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions.kl import register_kl
from torch.nn.functional import logsigmoid

from orderppl.distributions.set_distribution import DecidedSet, SetDistribution
from orderppl.randomness import sample_categorical, uniform


def log1mexp(log_p: Tensor) -> Tensor:
    """log(1 - exp(log_p)) for log_p <= 0 without cancellation; -inf at 0 with a zero gradient there."""
    certain = log_p >= 0
    safe = log_p.masked_fill(certain, -1.0)
    near = safe > -0.6931471805599453  # switch at p = 1/2 (Maechler 2012)
    small = torch.log(-torch.expm1(torch.where(near, safe, -1.0)))
    large = torch.log1p(-torch.exp(torch.where(near, -1.0, safe)))
    return torch.where(near, small, large).masked_fill(certain, -torch.inf)


def weighted(weight: Tensor, log_value: Tensor) -> Tensor:
    """weight * log_value with 0 * inf = 0, in value and gradient."""
    return weight * log_value.masked_fill(weight == 0, 0.0)


class IndependentSet(SetDistribution):
    """A random subset z of the masked positions, each position on its own, optionally given that z is not empty.

        log p(z) = sum_{i in M} [ z_i log q_i + (1 - z_i) log(1 - q_i) ]  -  log Z
        Z        = 1 - prod_{i in M} (1 - q_i)   if `non_empty` and M is not empty, else 1

    Values are bool [*, S]; positions outside M are never in z. A row with nothing masked has the empty set for sure.

    Args:
        log_reveal: float [*, S], log q_i.
        log_keep: float [*, S], log(1 - q_i).
        masked: bool [*, S], M.
        non_empty: condition on at least one revealed position (exact normaliser).
    """

    def __init__(
        self,
        log_reveal: Tensor,
        log_keep: Tensor,
        masked: Tensor,
        non_empty: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        masked = masked.expand(torch.broadcast_shapes(log_reveal.shape, log_keep.shape, masked.shape))
        self.log_reveal = log_reveal.masked_fill(~masked, -torch.inf)
        self.log_keep = log_keep.masked_fill(~masked, 0.0)
        self.non_empty = non_empty
        super().__init__(masked, validate_args=validate_args)

    @classmethod
    def bernoulli(cls, logits: Tensor, masked: Tensor, non_empty: bool = False) -> IndependentSet:
        """Each masked position is revealed with probability sigmoid(logit_i).

        Args:
            logits: float [*, S]; finite logits keep every divergence finite.
            masked: bool [*, S].
            non_empty: condition on at least one revealed position.
        """
        return cls(logsigmoid(logits), logsigmoid(-logits), masked, non_empty)

    @classmethod
    def smoothed(cls, decided: Tensor, masked: Tensor, smoothing: float, non_empty: bool = False) -> IndependentSet:
        """A decided set with each position's decision flipped with probability `smoothing`.

        Args:
            decided: bool [*, S].
            masked: bool [*, S].
            smoothing: above 0 and below 1/2.
            non_empty: condition on at least one revealed position.
        """
        stay = torch.full(decided.shape, math.log1p(-smoothing), device=decided.device)
        flip = math.log(smoothing)
        return cls(stay.masked_fill(~decided, flip), stay.masked_fill(decided, flip), masked, non_empty)

    @classmethod
    def renormalised(cls, scores: Tensor, temperature: float, masked: Tensor) -> IndependentSet:
        """The paper's posterior over one reveal set: scores renormalised by the largest one that is still masked.

            q_i = exp((s_i - max_{j in M} s_j) / temperature)

        The arg-max is revealed for sure, so the set is never empty (arXiv 2602.23968; the formula is our
        reconstruction).

        Args:
            scores: float [*, S].
            temperature: positive; small values reveal few positions.
            masked: bool [*, S].
        """
        scores, masked = torch.broadcast_tensors(scores, masked)
        hidden = scores.masked_fill(~masked, -torch.inf)
        largest = hidden.amax(-1, keepdim=True)
        largest = largest.masked_fill(~masked.any(-1, keepdim=True), 0.0)  # no masked position, no maximum
        log_reveal = ((scores - largest) / temperature).masked_fill(~masked, -1.0)
        return cls(log_reveal, log1mexp(log_reveal), masked)

    def _copy(self, log_reveal: Tensor, log_keep: Tensor, masked: Tensor) -> IndependentSet:
        new = IndependentSet.__new__(IndependentSet)  # its tensors are already those of masked positions only
        new.log_reveal, new.log_keep, new.non_empty = log_reveal, log_keep, self.non_empty
        SetDistribution.__init__(new, masked, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _rebuild(self, positions: Callable[[Tensor], Tensor], rows: Callable[[Tensor], Tensor]) -> IndependentSet:
        return self._copy(positions(self.log_reveal), positions(self.log_keep), positions(self.masked))

    def certain(self, where: Tensor, masked: Tensor) -> IndependentSet:
        """See `SetDistribution`."""
        there = where.unsqueeze(-1) & masked
        log_reveal, log_keep = self.log_reveal.masked_fill(there, 0.0), self.log_keep.masked_fill(there, -torch.inf)
        return self._copy(log_reveal, log_keep, self.masked | there)

    def scaled(self, factor: float) -> IndependentSet:
        """q_i becomes min(1, factor q_i); see `SetDistribution`."""
        log_reveal = (self.log_reveal + math.log(factor)).clamp(max=0.0)
        return IndependentSet(log_reveal, log1mexp(log_reveal), self.masked, self.non_empty)

    @property
    def log_empty(self) -> Tensor:
        """Log-probability of the empty set before conditioning, float [*]."""
        return self.log_keep.sum(-1)

    @property
    def log_normaliser(self) -> Tensor:
        """log Z, float [*]; 0 without conditioning."""
        if not self.non_empty:
            return torch.zeros(self.batch_shape, device=self.masked.device, dtype=self.log_keep.dtype)
        return log1mexp(self.log_empty.masked_fill(~self.masked.any(-1), -torch.inf))

    @property
    def probs(self) -> Tensor:
        """Inclusion probability of each position, float [*, S]; given non-emptiness when conditioned."""
        return (self.log_reveal - self.log_normaliser.unsqueeze(-1)).exp()

    @property
    def priority(self) -> Tensor:
        """Log-odds, float [*, S]."""
        return self.log_reveal - self.log_keep

    @property
    def mode(self) -> Tensor:
        """The most probable set, bool [*, S]; when conditioned and empty, the most probable single position."""
        likely = self.masked & (self.log_reveal > self.log_keep)
        if not self.non_empty:
            return likely
        best = torch.nn.functional.one_hot(self.priority.argmax(-1), self.event_shape[0]).bool()
        return torch.where(likely.any(-1, keepdim=True), likely, best & self.masked)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Draw sets, bool [*sample_shape, *, S]; exact under conditioning, without rejection."""
        with torch.no_grad():
            shape = torch.Size(sample_shape) + self.masked.shape
            reveal = uniform(shape, self.masked.device) < self.log_reveal.exp()
            if not self.non_empty:
                return reveal
            # The first revealed position f has p(f) = q_f prod_{i<f} (1 - q_i) / Z; later positions stay independent.
            log_before = torch.nn.functional.pad(self.log_keep[..., :-1], (1, 0)).cumsum(-1)  # may reach -inf
            first_log_prob = self.log_reveal + log_before
            first_log_prob = first_log_prob.masked_fill(~self.masked.any(-1, keepdim=True), 0.0)
            noise = uniform(shape[:-1] + (1,), self.masked.device).squeeze(-1)
            first = sample_categorical(first_log_prob, noise).unsqueeze(-1)
            position = torch.arange(shape[-1], device=first.device)
            return ((position == first) | (reveal & (position > first))) & self.masked

    def draw(self, noise: Tensor) -> Tensor:
        """Draw one set from given noise, exactly: bool [*, S].

        Position i is revealed where noise < q_i. Under conditioning, while nothing is revealed further left, q_i is
        divided by 1 - prod_{j >= i} (1 - q_j).
        """
        reveal_probs = self.log_reveal.double().exp()  # [*, S]
        revealed = noise < reveal_probs
        if not self.non_empty:
            return revealed
        none_from_here = (1 - reveal_probs).flip(-1).cumprod(-1).flip(-1)
        first = noise < reveal_probs / (1 - none_from_here)  # 0 / 0 where nothing is masked: never revealed
        return torch.where(first.long().cumsum(-1) - first.long() > 0, revealed, first)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of a set, bool [*, S] -> float [*]; -inf for sets that leave M."""
        if self._validate_args:
            self._validate_sample(value)
        value = value.bool()
        log_prob = torch.where(value, self.log_reveal, self.log_keep).sum(-1)
        if not self.non_empty:
            return log_prob
        impossible = ~value.any(-1) & self.masked.any(-1)
        return (log_prob - self.log_normaliser).masked_fill(impossible, -torch.inf)

    def entropy(self) -> Tensor:
        """Entropy of the set distribution in nats, float [*]."""
        return self.log_normaliser - self._cross(self)

    def _cross(self, other: IndependentSet) -> Tensor:
        """E_self[ sum_i z_i log q_i + (1 - z_i) log(1 - q_i) ] with the log-probabilities of `other`."""
        probs = self.probs
        keep = torch.where(self.masked, self._exclusion_probs(), torch.ones_like(probs))
        return (weighted(probs, other.log_reveal) + weighted(keep, other.log_keep)).sum(-1)

    def _exclusion_probs(self) -> Tensor:
        """1 - probs without cancellation: exactly 0 for the only masked position of a set that is not empty."""
        if not self.non_empty:
            return self.log_keep.exp()
        # (1 - q_i) (1 - prod_{j != i} (1 - q_j)) / Z
        certain = torch.isneginf(self.log_keep)
        log_keep = self.log_keep.masked_fill(certain, 0.0)
        log_empty_others = (self.log_empty.unsqueeze(-1) - log_keep).masked_fill(certain, -1.0)
        log_exclusion = log_keep + log1mexp(log_empty_others) - self.log_normaliser.unsqueeze(-1)
        return log_exclusion.exp().masked_fill(certain, 0.0)


@register_kl(IndependentSet, IndependentSet)
def _kl_independent(q: IndependentSet, p: IndependentSet) -> Tensor:
    """KL(q || p) in nats, float [*]; infinite where p misses sets of q."""
    kl = q._cross(q) - q._cross(p) - q.log_normaliser + p.log_normaliser
    if p.non_empty and not q.non_empty:
        may_be_empty = q.masked.any(-1) & ~torch.isneginf(q.log_empty)
        kl = kl.masked_fill(may_be_empty, torch.inf)
    return kl


def decided_set(decided: Tensor, masked: Tensor, smoothing: float = 0.0, non_empty: bool = True) -> SetDistribution:
    """The set of a rule: a point mass, or with each decision flipped with a small probability."""
    if smoothing == 0:
        return DecidedSet(decided, masked, non_empty)
    return IndependentSet.smoothed(decided, masked, smoothing, non_empty)
