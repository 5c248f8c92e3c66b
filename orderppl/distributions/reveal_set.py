"""One reveal set: which of the masked positions are revealed at a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributions.kl import register_kl
from torch.nn.functional import logsigmoid

from orderppl.distributions.set_law import SetLaw
from orderppl.randomness import sample_categorical, uniform


def log1mexp(log_p: Tensor) -> Tensor:
    """log(1 - exp(log_p)) for log_p <= 0 without cancellation; -inf at 0 with a zero gradient there."""
    certain = log_p >= 0
    safe = log_p.masked_fill(certain, -1.0)
    near = safe > -0.6931471805599453  # switch at p = 1/2 (Maechler 2012)
    small = torch.log(-torch.expm1(torch.where(near, safe, -1.0)))
    large = torch.log1p(-torch.exp(torch.where(near, -1.0, safe)))
    return torch.where(near, small, large).masked_fill(certain, -torch.inf)


def _weighted(weight: Tensor, log_value: Tensor) -> Tensor:
    """weight * log_value with 0 * inf = 0, in value and gradient."""
    return weight * log_value.masked_fill(weight == 0, 0.0)


class RevealSet(SetLaw):
    """A random subset z of the masked positions, each position on its own, optionally given that z is not empty.

        log p(z) = sum_{i in M} [ z_i log q_i + (1 - z_i) log(1 - q_i) ]  -  log Z  +  log_weight
        Z        = 1 - prod_{i in M} (1 - q_i)   if `non_empty` and M is not empty, else 1

    Values are bool [*, L]; positions outside M are never in z. A row with nothing masked has the empty set for sure.

    Args:
        log_reveal: float [*, L], log q_i.
        log_keep: float [*, L], log(1 - q_i).
        masked: bool [*, L], M.
        non_empty: condition on at least one revealed position (exact normaliser).
        log_weight: float [*], log of an unnormalised factor such as the price of a step; 0 when left out.
    """

    stacks = True

    def __init__(
        self,
        log_reveal: Tensor,
        log_keep: Tensor,
        masked: Tensor,
        non_empty: bool = False,
        log_weight: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        masked = masked.expand(torch.broadcast_shapes(log_reveal.shape, log_keep.shape, masked.shape))
        self.log_reveal = log_reveal.masked_fill(~masked, -torch.inf)
        self.log_keep = log_keep.masked_fill(~masked, 0.0)
        self.non_empty = non_empty
        self._certain_in: Tensor | None = None
        self._kept: dict[str, Tensor] = {}
        super().__init__(masked, log_weight, validate_args=validate_args)

    def _copy(self, log_reveal: Tensor, log_keep: Tensor, masked: Tensor, log_weight: Tensor | None) -> RevealSet:
        new = RevealSet.__new__(RevealSet)  # its tensors are already those of masked positions only
        new.log_reveal, new.log_keep, new.non_empty = log_reveal, log_keep, self.non_empty
        new._certain_in, new._kept = None, {}
        SetLaw.__init__(new, masked, log_weight, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _keep(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """A value that is asked for more than once, unless it was made without the gradient it can have."""
        found = self._kept.get(name)
        if found is None:
            found = make()
            if torch.is_grad_enabled() or not self.log_keep.requires_grad:
                self._kept[name] = found
        return found

    @classmethod
    def stack(cls, sets: Sequence[RevealSet]) -> RevealSet:
        """Sets of one batch shape [*] along a new first dimension."""
        first, weighted = sets[0], any(one._log_weight is not None for one in sets)
        return first._copy(
            torch.stack([one.log_reveal for one in sets]),
            torch.stack([one.log_keep for one in sets]),
            torch.stack([one.masked for one in sets]),
            torch.stack([one.log_weight for one in sets]) if weighted else None,
        )

    def _rebuild(self, positions: Callable[[Tensor], Tensor], rows: Callable[[Tensor], Tensor]) -> RevealSet:
        log_weight = None if self._log_weight is None else rows(self._log_weight)
        return self._copy(positions(self.log_reveal), positions(self.log_keep), positions(self.masked), log_weight)

    def certain(self, where: Tensor, already: bool = False) -> RevealSet:
        """Reveal everything that is masked in the rows `where` (bool [*]), as the last step does.

        Args:
            where: bool [*]; asked again with the same tensor, the sets are returned as they are.
            already: they are such sets.
        """
        if already:
            self._certain_in = where
        if self._certain_in is where:
            return self
        there = where.unsqueeze(-1) & self.masked
        log_reveal, log_keep = self.log_reveal.masked_fill(there, 0.0), self.log_keep.masked_fill(there, -torch.inf)
        new = self._copy(log_reveal, log_keep, self.masked, self._log_weight)
        new._certain_in = where
        return new

    def everything(self, masked: Tensor) -> RevealSet:
        """The set of all positions in `masked` (bool [*, L]), for sure."""
        log_reveal = torch.zeros_like(masked, dtype=self.log_reveal.dtype).masked_fill(~masked, -torch.inf)
        return self._copy(log_reveal, torch.zeros_like(log_reveal).masked_fill(masked, -torch.inf), masked, None)

    @property
    def log_empty(self) -> Tensor:
        """Log-probability of the empty set before conditioning, float [*]."""
        return self._keep("log_empty", lambda: self.log_keep.sum(-1))

    @property
    def log_normaliser(self) -> Tensor:
        """log Z, float [*]; 0 without conditioning."""
        if not self.non_empty:
            return torch.zeros_like(self.log_empty)
        return self._keep(
            "log_normaliser", lambda: log1mexp(self.log_empty.masked_fill(~self.masked.any(-1), -torch.inf))
        )

    @property
    def probs(self) -> Tensor:
        """Inclusion probability of each position, float [*, L]; given non-emptiness when conditioned."""
        return (self.log_reveal - self.log_normaliser.unsqueeze(-1)).exp()

    @property
    def mode(self) -> Tensor:
        """The most probable set, bool [*, L]; when conditioned and empty, the most probable single position."""
        likely = self.masked & (self.log_reveal > self.log_keep)
        if not self.non_empty:
            return likely
        best = torch.nn.functional.one_hot((self.log_reveal - self.log_keep).argmax(-1), self.event_shape[0]).bool()
        return torch.where(likely.any(-1, keepdim=True), likely, best & self.masked)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Draw sets, bool [*sample_shape, *, L]; exact under conditioning, without rejection."""
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

    def draw(self, noise: Tensor, factor: float = 1.0) -> Tensor:
        """Draw one set from given noise, exactly: bool [*, L].

        Position i is revealed where noise < min(1, factor q_i). Under conditioning, while nothing is revealed further
        left, q_i is divided by 1 - prod_{j >= i} (1 - q_j).
        """
        reveal_probs = (factor * self.log_reveal.double().exp()).clamp(max=1.0)  # [*, L]
        revealed = noise < reveal_probs
        if not self.non_empty:
            return revealed
        none_from_here = (1 - reveal_probs).flip(-1).cumprod(-1).flip(-1)
        first = noise < reveal_probs / (1 - none_from_here)  # 0 / 0 where nothing is masked: never revealed
        return torch.where(first.long().cumsum(-1) - first.long() > 0, revealed, first)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of a set, bool [*, L] -> float [*]; -inf for sets that leave M."""
        if self._validate_args:
            self._validate_sample(value)
        value = value.bool()
        log_prob = torch.where(value, self.log_reveal, self.log_keep).sum(-1)
        if self.non_empty:
            impossible = ~value.any(-1) & self.masked.any(-1)
            log_prob = (log_prob - self.log_normaliser).masked_fill(impossible, -torch.inf)
        return log_prob if self._log_weight is None else log_prob + self._log_weight

    def entropy(self) -> Tensor:
        """Entropy of the normalised set distribution in nats, float [*]."""
        return self.log_normaliser - self._cross(self)

    def _cross(self, other: RevealSet) -> Tensor:
        """E_self[ sum_i z_i log q_i + (1 - z_i) log(1 - q_i) ] with the log-probabilities of `other`."""
        probs = self.probs
        keep = torch.where(self.masked, self._exclusion_probs(), torch.zeros_like(probs))
        return (_weighted(probs, other.log_reveal) + _weighted(keep, other.log_keep)).sum(-1)

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


class BernoulliSet(RevealSet):
    """Each masked position is revealed with probability sigmoid(logit_i), optionally given that the set is not empty.

    Args:
        logits: float [*, L]; finite logits keep every divergence finite.
        masked: bool [*, L].
        non_empty: condition on at least one revealed position.
    """

    def __init__(
        self, logits: Tensor, masked: Tensor, non_empty: bool = False, validate_args: bool | None = None
    ) -> None:
        super().__init__(logsigmoid(logits), logsigmoid(-logits), masked, non_empty, validate_args=validate_args)


class SmoothedSet(RevealSet):
    """A decided set with each position's decision flipped with probability `smoothing`; a point mass at 0.

        q_i = 1 - smoothing if i is in the decided set, else smoothing

    Args:
        decided: bool [*, L], the set of a deterministic policy.
        masked: bool [*, L].
        smoothing: probability of a flip, at least 0 and below 1/2.
        non_empty: condition on at least one revealed position.
    """

    def __init__(
        self,
        decided: Tensor,
        masked: Tensor,
        smoothing: float,
        non_empty: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        flip = math.log(smoothing) if smoothing > 0 else -math.inf
        stay = torch.full(decided.shape, math.log1p(-smoothing), device=decided.device)
        log_reveal, log_keep = stay.masked_fill(~decided, flip), stay.masked_fill(decided, flip)
        super().__init__(log_reveal, log_keep, masked, non_empty, validate_args=validate_args)


class RenormalisedSet(RevealSet):
    """The paper's posterior over one reveal set: scores renormalised by the largest one that is still masked.

        q_i = exp((s_i - max_{j in M} s_j) / temperature)

    The arg-max is revealed for sure, so the set is never empty (arXiv 2602.23968; the formula is our reconstruction).

    Args:
        scores: float [*, L].
        temperature: positive; small values reveal few positions.
        masked: bool [*, L].

    Raises:
        ValueError: if the temperature is not positive.
    """

    def __init__(self, scores: Tensor, temperature: float, masked: Tensor, validate_args: bool | None = None) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature: {temperature} is not positive; use a value such as 0.1")
        scores, masked = torch.broadcast_tensors(scores, masked)
        hidden = scores.masked_fill(~masked, -torch.inf)
        largest = hidden.amax(-1, keepdim=True)
        largest = largest.masked_fill(~masked.any(-1, keepdim=True), 0.0)  # no masked position, no maximum
        log_reveal = ((scores - largest) / temperature).masked_fill(~masked, -1.0)
        super().__init__(log_reveal, log1mexp(log_reveal), masked, validate_args=validate_args)


@register_kl(RevealSet, RevealSet)
def _kl_reveal_set(q: RevealSet, p: RevealSet) -> Tensor:
    """KL(q || p) in nats, float [*], of q against the possibly unnormalised p; infinite where p misses sets of q."""
    if q.log_reveal is p.log_reveal and q.log_keep is p.log_keep and q.non_empty == p.non_empty:
        return -p.log_weight  # one policy as guide and prior
    kl = q._cross(q) - q._cross(p) - q.log_normaliser + p.log_normaliser - p.log_weight
    if p.non_empty and not q.non_empty:
        may_be_empty = q.masked.any(-1) & ~torch.isneginf(q.log_empty)
        kl = kl.masked_fill(may_be_empty, torch.inf)
    return kl
