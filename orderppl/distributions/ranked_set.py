"""Sets and orders of given sizes: the best scores after Gumbel noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions.kl import register_kl

from orderppl.distributions.independent_set import IndependentSet, weighted
from orderppl.distributions.set_distribution import SetDistribution
from orderppl.randomness import uniform


def perturbed(scores: Tensor, noise: Tensor) -> Tensor:
    """Scores plus the standard Gumbel noise that uniform noise in (0, 1) stands for: float [*, S]."""
    return scores - torch.log(-torch.log(noise))


def open_uniform(shape: torch.Size, like: Tensor) -> Tensor:
    """Uniform noise in (0, 1), 0 left out."""
    tiny = torch.finfo(torch.float32).tiny
    return uniform(shape, like.device, torch.promote_types(like.dtype, torch.float32)).clamp(min=tiny)


def rank_masked(keys: Tensor, masked: Tensor) -> Tensor:
    """Rank the masked positions by descending key, the leftmost first among equal ones: int64 [*, S]."""
    keys = keys.masked_fill(~masked, -torch.inf)
    return keys.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


class _LogFirst(torch.autograd.Function):
    """log P(the clocks of `chosen` all ring before those of `rest`), clock i exponential with rate w_i = exp(score_i).

    Given that the first clock of the rest rings at t, of density W exp(-W t) with W = sum_rest w,

        P = int_0^inf prod_chosen (1 - exp(-w_i t)) W exp(-W t) dt  =  int exp(f(y)) dy,      t = exp(y) / W
        f(y) = y - exp(y) + sum_chosen log(1 - exp(-exp(y + score_i - log W)))

    which is int_0^1 prod_chosen (1 - u^(w_i / W)) du at u = exp(-W t) (Kool, van Hoof and Welling 2020, appendix B).
    In y the integrand is log-concave and entire and falls off on both sides, so that the trapezoidal rule converges
    exponentially, whatever the scores. Left and right of its mode f falls at least by c (d - 1 + exp(-d)) and by
    c (exp(d) - 1 - d) at distance d, with c = exp(mode) in [1, 1 + k]: this bounds the window. With E the mean under
    exp(f) and g(a) = a / (exp(a) - 1), the gradient by the scores is E g(exp(y + score_i - log W)) for a chosen
    position and (w_j / W) (1 - E exp(y)) for one of the rest; nothing of size nodes x L is kept for it.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, chosen: Tensor, rest: Tensor) -> Tensor:
        """Scores float [*, S], disjoint bool [*, S] -> float [*]; 0 where either of the two is empty."""
        double = scores.dtype == torch.float64
        nodes, tail = (192, 38.0) if double else (64, 18.0)  # tail: nats below the mode at which the window ends
        certain = ~(chosen.any(-1) & rest.any(-1))  # [*]
        largest = scores.masked_fill(~(chosen | rest), -torch.inf).amax(-1, keepdim=True).clamp(min=-1e30)
        scores = scores - largest  # only differences count: keep their digits
        hidden = scores.masked_fill(~rest, -torch.inf)
        log_rest = hidden.logsumexp(-1).masked_fill(certain, 0.0)  # log W, [*]
        share = (hidden - log_rest[..., None]).exp()  # w_j / W, [*, S]
        rate = (scores - log_rest[..., None]).masked_fill(~chosen, 0.0)  # log(w_i / W), [*, S]

        low = torch.zeros_like(log_rest)
        high = chosen.sum(-1).to(scores.dtype).log1p()
        for _ in range(12):  # f'(y) = 1 - exp(y) + sum g falls from y = 0 to y = log(1 + k)
            middle = (low + high) / 2
            rising = 1 - middle.exp() + (_ratio((rate + middle[..., None]).exp()) * chosen).sum(-1) > 0
            low, high = torch.where(rising, middle, low), torch.where(rising, high, middle)
        mode = (low + high) / 2
        width = (2 * tail * (-mode).exp()).sqrt()
        left = width + width.square() / 2
        right = left.log1p()
        fraction = torch.linspace(0, 1, nodes, dtype=scores.dtype, device=scores.device)
        y = (mode - left)[..., None] + (left + right)[..., None] * fraction  # [*, N]
        spacing = (left + right) / (nodes - 1)

        log_clock = rate[..., None] + y[..., None, :]  # [*, S, N]
        clock = log_clock.exp()
        small = log_clock < -15
        rung = torch.where(small, log_clock - clock / 2, torch.log(-torch.expm1(-clock.masked_fill(small, 1.0))))
        f = y - y.exp() + (rung * chosen[..., None]).sum(-2)  # [*, N]
        log_prob = (f.logsumexp(-1) + spacing.log()).clamp(max=0.0)
        weight = f.softmax(-1)
        of_chosen = (_ratio(clock) * weight[..., None, :]).sum(-1)  # [*, S]
        of_rest = share * (1 - (weight * y.exp()).sum(-1, keepdim=True))

        # One clock against the rest needs no integral: w_i / (w_i + W).
        single = chosen.sum(-1) == 1
        alone = (rate * chosen).sum(-1)  # log(w_i / W), [*]
        log_prob = torch.where(single, -torch.nn.functional.softplus(-alone), log_prob).masked_fill(certain, 0.0)
        lost = torch.sigmoid(-alone)[..., None]  # W / (w_i + W)
        of_chosen = torch.where(single[..., None], lost, of_chosen)
        of_rest = torch.where(single[..., None], -share * lost, of_rest)
        gradient = torch.where(chosen, of_chosen, of_rest * rest).masked_fill(certain[..., None], 0.0)
        ctx.save_for_backward(gradient)
        return log_prob

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Scale the gradient that came with the value."""
        (gradient,) = ctx.saved_tensors
        return grad[..., None] * gradient, None, None


def _ratio(a: Tensor) -> Tensor:
    """a / (exp(a) - 1) for a >= 0: 1 at 0, 0 at infinity."""
    a = a.clamp(1e-30, 80.0)
    return a * (-a).exp() / -torch.expm1(-a)


class RankedSet(SetDistribution):
    """The k positions of M that come first in a Plackett-Luce ranking: the k largest of score + Gumbel noise.

        p(z) = int_0^1 prod_{i in z} (1 - u^(w_i / W)) du,     w = exp(scores), W = sum_{j in M - z} w_j,  |z| = k

    Exact for k = 1, where it is w_i / sum_M w, and for k = |M|; otherwise by a quadrature good to the dtype. Inclusion
    probabilities, entropy and divergences have closed forms for k <= 1 only.

    Args:
        scores: float [*, S], log w.
        size: int64 [*], k; never below 1 while anything is masked, nor above |M|.
        masked: bool [*, S], M.
        single: whether every size is known to be at most 1, so that the closed forms are used. Rows in which all that
            is masked is revealed for sure (`certain`) have closed forms too.
    """

    non_empty = True

    def __init__(
        self,
        scores: Tensor,
        size: Tensor,
        masked: Tensor,
        single: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        scores, masked = torch.broadcast_tensors(scores, masked)
        self.scores = scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores
        self.single = single
        count = masked.sum(-1)
        self.size = torch.minimum(size.clamp(min=1).expand(count.shape), count)
        super().__init__(masked, validate_args=validate_args)

    def _like(self, scores: Tensor, size: Tensor, masked: Tensor) -> RankedSet:
        return RankedSet(scores, size, masked, self.single, validate_args=self._validate_args)

    def _rebuild(self, positions: Callable[[Tensor], Tensor], rows: Callable[[Tensor], Tensor]) -> RankedSet:
        return self._like(positions(self.scores), rows(self.size), positions(self.masked))

    def certain(self, where: Tensor, masked: Tensor) -> RankedSet:
        """See `SetDistribution`."""
        masked = torch.where(where.unsqueeze(-1), masked, self.masked)
        return self._like(self.scores, torch.where(where, masked.sum(-1), self.size), masked)

    @property
    def log_singles(self) -> Tensor:
        """log p({i}) for k = 1: float [*, S], -inf outside M."""
        hidden = self.scores.masked_fill(~self.masked, -torch.inf)
        hidden = hidden.masked_fill(~self.masked.any(-1, keepdim=True), 0.0)  # nothing masked: no softmax over nothing
        return hidden.log_softmax(-1).masked_fill(~self.masked, -torch.inf)

    @property
    def _complete(self) -> Tensor:
        """Rows that reveal all that is masked: bool [*]."""
        return self.size == self.masked.sum(-1)

    @property
    def probs(self) -> Tensor:
        """Inclusion probability of each position, float [*, S].

        Raises:
            NotImplementedError: for sets of several positions, unless all are revealed.
        """
        if not self.single:
            raise NotImplementedError("inclusion probabilities of Plackett-Luce sets of several positions")
        return torch.where(self._complete[..., None], self.masked.to(self.scores.dtype), self.log_singles.exp())

    def entropy(self) -> Tensor:
        """Entropy in nats, float [*].

        Raises:
            NotImplementedError: for sets of several positions, unless all are revealed.
        """
        if not self.single:
            raise NotImplementedError("entropy of Plackett-Luce sets of several positions")
        by_position = -weighted(self.log_singles.exp(), self.log_singles)
        return by_position.sum(-1).masked_fill(self._complete, 0.0)

    @property
    def priority(self) -> Tensor:
        """The scores, float [*, S]."""
        return self.scores

    def _first(self, keys: Tensor) -> Tensor:
        """The first `size` masked positions by descending key."""
        return (rank_masked(keys, self.masked) < self.size[..., None]) & self.masked

    @property
    def mode(self) -> Tensor:
        """The most probable set: the k largest scores, bool [*, S]."""
        return self._first(self.scores)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Draw sets by Gumbel top-k, bool [*sample_shape, *, S]."""
        with torch.no_grad():
            return self.draw(open_uniform(torch.Size(sample_shape) + self.masked.shape, self.scores))

    def draw(self, noise: Tensor) -> Tensor:
        """Draw one set from given noise: bool [*, S]."""
        return self._first(perturbed(self.scores, noise))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of a set, bool [*, S] -> float [*]; -inf for sets of another size or outside M."""
        if self._validate_args:
            self._validate_sample(value)
        value, scores, masked = torch.broadcast_tensors(value.bool(), self.scores, self.masked)
        possible = (value.sum(-1) == self.size) & ~(value & ~masked).any(-1)
        chosen, rest = value & masked, masked & ~value
        if self.single:  # exact, without the quadrature; a certain row may reveal several
            log_prob = self.log_singles.masked_fill(~chosen, 0.0).sum(-1).masked_fill(self._complete, 0.0)
        else:
            log_prob = _LogFirst.apply(scores, chosen, rest)
        return log_prob.masked_fill(~possible, -torch.inf)


class UniformSet(RankedSet):
    """Every set of k of the masked positions alike: p(z) = 1 / C(|M|, k), a `RankedSet` with equal scores.

    Args:
        size: int64 [*], k; never below 1 while anything is masked, nor above |M|.
        masked: bool [*, S], M.
    """

    def __init__(self, size: Tensor, masked: Tensor, validate_args: bool | None = None) -> None:
        scores = torch.zeros((), device=masked.device).expand(masked.shape)
        super().__init__(scores, size, masked, validate_args=validate_args)

    def _like(self, scores: Tensor, size: Tensor, masked: Tensor) -> UniformSet:
        return UniformSet(size, masked, self._validate_args)

    @property
    def probs(self) -> Tensor:
        """k / |M| at every masked position, float [*, S]."""
        share = self.size / self.masked.sum(-1).clamp(min=1)
        return share.to(self.scores.dtype)[..., None] * self.masked

    def entropy(self) -> Tensor:
        """log C(|M|, k) in nats, float [*]."""
        total, size = self.masked.sum(-1), self.size
        return (torch.lgamma(total + 1.0) - torch.lgamma(size + 1.0) - torch.lgamma((total - size) + 1.0)).to(
            self.scores.dtype
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of a set, bool [*, S] -> float [*]; -inf for sets of another size or outside M."""
        if self._validate_args:
            self._validate_sample(value)
        possible = (value.sum(-1) == self.size) & ~(value & ~self.masked).any(-1)
        return torch.where(possible, -self.entropy(), -torch.inf)


@register_kl(RankedSet, IndependentSet)
def _kl_ranked_independent(q: RankedSet, p: IndependentSet) -> Tensor:
    """KL(q || p) in nats, float [*]: log p is linear in the set, so q's inclusion probabilities are enough."""
    probs = q.probs
    keep = 1 - probs
    log_p = (weighted(probs, p.log_reveal) + weighted(keep, p.log_keep)).sum(-1) - p.log_normaliser
    return -q.entropy() - log_p


@register_kl(RankedSet, RankedSet)
def _kl_ranked(q: RankedSet, p: RankedSet) -> Tensor:
    """KL(q || p) in nats, float [*], where both have closed forms; infinite where the sizes differ."""
    if isinstance(p, UniformSet):
        log_p = -p.entropy()
    elif p.single and not isinstance(q, UniformSet):
        log_p = weighted(q.probs, p.log_singles).sum(-1).masked_fill(p._complete, 0.0)
    else:
        raise NotImplementedError
    impossible = (q.size != p.size) | ((q.probs > 0) & ~p.masked).any(-1)
    return (-q.entropy() - log_p).masked_fill(impossible, torch.inf)
