"""Plackett-Luce sets and orders against sums over permutations."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.distributions import kl_divergence

from orderppl.distributions import IndependentSet, RankedSet
from orderppl.distributions.ranked_order import RankedOrder
from orderppl.distributions.ranked_set import UniformSet, _LogFirst

MASKED = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
SIZES = torch.tensor([2, 2, 1, 0])


def by_permutations(scores: Tensor, chosen: list[int], rest: list[int]) -> Tensor:
    """log of the sum over the orders of `chosen` of prod_j w_j / (weights not yet taken), float64."""
    scores, order = scores.double(), torch.tensor(list(itertools.permutations(chosen)))  # [n, k]
    taken = torch.nn.functional.one_hot(order, len(scores)).cumsum(1).bool()  # [n, k, m], after each draw
    before = torch.cat([torch.zeros_like(taken[:, :1]), taken[:, :-1]], 1)
    present = torch.zeros(len(scores), dtype=torch.bool)
    present[[*chosen, *rest]] = True
    left = scores.masked_fill(before | ~present, -torch.inf).logsumexp(-1)  # [n, k]
    return (scores[order] - left).sum(-1).logsumexp(0)


def log_first(scores: Tensor, k: int) -> Tensor:
    """log P(the first k positions come first)."""
    chosen = torch.arange(scores.shape[-1]) < k
    return _LogFirst.apply(scores, chosen.expand(scores.shape), ~chosen.expand(scores.shape))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 3e-6)])
@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0, 30.0])
def test_probability_is_the_sum_over_permutations(spread: float, dtype: torch.dtype, tolerance: float):
    """Up to 6 of 8 positions; the tolerance is relative to 1 + |log p|."""
    for seed in range(3):
        scores = spread * torch.randn(8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for k in (1, 2, 4, 6, 7):
            wanted = by_permutations(scores.to(dtype), list(range(k)), list(range(k, 8)))
            value = log_first(scores.to(dtype), k)
            assert abs(value.double() - wanted) <= tolerance * (1 + abs(wanted)), (seed, k)


def test_large_sets_against_uniform_and_two_valued_scores():
    """Equal scores: 1 / C(m, k). One heavy rest position: k! prod w_i / W^k up to corrections of order w / W."""
    for m, k in ((200, 100), (500, 3), (500, 497), (129, 128)):
        wanted = math.lgamma(k + 1) + math.lgamma(m - k + 1) - math.lgamma(m + 1)
        assert log_first(torch.zeros(m, dtype=torch.float64), k).item() == pytest.approx(wanted, abs=1e-8)
        assert log_first(torch.full((m,), 1e4), k).item() == pytest.approx(wanted, rel=1e-4)
    heavy = torch.tensor([0.0] * 20 + [200.0])
    assert log_first(heavy, 20).item() == pytest.approx(math.lgamma(21) - 20 * 200, rel=1e-5)


@pytest.mark.parametrize("gap", [-1e3, -50.0, 50.0, 1e3])
def test_extreme_scores_stay_finite(gap: float):
    scores = torch.tensor([gap, gap / 2, 0.0, 0.1, -0.2], requires_grad=True)
    for k in (1, 2, 3, 4):
        value = log_first(scores, k)
        (gradient,) = torch.autograd.grad(value, scores)
        assert torch.isfinite(value)
        assert value <= 0
        assert torch.isfinite(gradient).all()
        assert abs(gradient.sum()) < 1e-4 * (1 + k)  # adding a constant to all scores changes nothing


@pytest.mark.parametrize("spread", [0.5, 4.0, 12.0])
def test_gradient_is_that_of_the_sum_over_permutations(spread: float):
    scores = (spread * torch.randn(6, dtype=torch.float64)).requires_grad_()
    for k in range(1, 6):
        ours = torch.autograd.grad(log_first(scores, k), scores)[0]
        theirs = torch.autograd.grad(by_permutations(scores, list(range(k)), list(range(k, 6))), scores)[0]
        assert torch.allclose(ours, theirs, atol=1e-9), k
    chosen = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 0]]).bool()
    rest = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 0, 0]]).bool()
    inputs = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: _LogFirst.apply(x, chosen, rest), inputs)


SETS = {
    "plackett_luce": lambda size: RankedSet(2 * torch.randn(MASKED.shape), size, MASKED),
    "single": lambda size: RankedSet(2 * torch.randn(MASKED.shape), size.clamp(max=1), MASKED, single=True),
    "uniform": lambda size: UniformSet(size, MASKED),
    "certain": lambda size: RankedSet(torch.randn(MASKED.shape), size, MASKED).certain(torch.ones(4).bool(), MASKED),
    "single_certain": lambda size: SETS["single"](size).certain(torch.tensor([1, 0, 1, 1]).bool(), MASKED),
    "stacked": lambda size: SETS["plackett_luce"](size).expand((3, 4)).at(2),
}
every_set = pytest.mark.parametrize("name", SETS)


@every_set
def test_mass_is_one_on_sets_of_the_right_size(name: str):
    q = SETS[name](SIZES)
    values = q.enumerate_support()
    log_probs = q.log_prob(values)
    assert torch.allclose(log_probs.logsumexp(0), torch.zeros(q.batch_shape), atol=1e-5)
    wrong = (values.sum(-1) != q.size) | (values & ~q.masked).any(-1)
    assert (log_probs[wrong] == -torch.inf).all()
    assert (log_probs[~wrong] > -torch.inf).all()
    assert torch.equal(q.log_prob(q.mode), log_probs.amax(0))


@every_set
def test_samples_and_draws_follow_log_prob(name: str):
    """n = 20,000 per row: every set's frequency within |z| < 5 of its probability."""
    n, q = 20_000, SETS[name](SIZES)
    values, probs = q.enumerate_support(), q.log_prob(q.enumerate_support()).exp()
    noise = torch.rand((n, *q.batch_shape, 5), dtype=torch.float64)
    for draws in (q.sample((n,)), q.draw(noise)):
        assert draws.dtype == torch.bool
        code = 2 ** torch.arange(5)
        for row in itertools.product(*map(range, q.batch_shape)):
            seen = torch.bincount((draws[(slice(None), *row)] * code).sum(-1), minlength=32) / n
            expected = torch.zeros(32).index_add(
                0, (values[(slice(None), *row)] * code).sum(-1), probs[(slice(None), *row)]
            )
            error = (expected * (1 - expected) / n).sqrt().clamp_min(1e-6)
            assert ((seen - expected).abs() / error).max() < 5


@pytest.mark.parametrize("name", ["single", "uniform", "single_certain"])
def test_closed_forms_are_sums_over_all_sets(name: str):
    q = SETS[name](SIZES)
    values = q.enumerate_support()
    log_probs = q.log_prob(values)
    probs = log_probs.exp()
    assert torch.allclose(q.probs, (probs[..., None] * values).sum(0), atol=1e-6)
    assert torch.allclose(q.entropy(), torch.special.entr(probs).sum(0), atol=1e-5)
    others = [IndependentSet.bernoulli(torch.randn(MASKED.shape), MASKED, non_empty=waits) for waits in (False, True)]
    others.append(UniformSet(q.size, MASKED))
    shown = MASKED & torch.tensor([1, 1, 1, 1, 0]).bool()  # less than all
    others += [IndependentSet.bernoulli(torch.randn(MASKED.shape), shown), UniformSet(q.size, shown)]
    if name != "uniform":
        others.append(SETS[name](SIZES))
    for other in others:
        by_hand = torch.where(probs > 0, probs * (log_probs - other.log_prob(values)), 0.0).sum(0)
        kl = kl_divergence(q, other)
        assert torch.equal(kl.isinf(), by_hand.isinf())
        assert torch.allclose(kl[kl.isfinite()], by_hand[kl.isfinite()], atol=1e-5)
    assert torch.isinf(kl_divergence(q, UniformSet(q.size + 1, MASKED))[1])


def test_without_a_closed_form_it_says_so():
    q = SETS["plackett_luce"](SIZES)
    for ask in (
        lambda: q.probs,
        lambda: q.entropy(),
        lambda: kl_divergence(q, UniformSet(SIZES, MASKED)),
        lambda: kl_divergence(q, IndependentSet.bernoulli(torch.zeros(MASKED.shape), MASKED)),
        lambda: kl_divergence(IndependentSet.bernoulli(torch.zeros(MASKED.shape), MASKED), q),
    ):
        with pytest.raises(NotImplementedError):
            ask()


def test_equal_scores_are_uniform():
    values = SETS["uniform"](SIZES).enumerate_support()
    plain = RankedSet(torch.full(MASKED.shape, 0.3), SIZES, MASKED)
    assert torch.allclose(plain.log_prob(values), UniformSet(SIZES, MASKED).log_prob(values), atol=1e-5)


def test_single_and_general_agree():
    scores = torch.randn(MASKED.shape, requires_grad=True)
    one = SIZES.clamp(max=1)
    values = []
    for single in (False, True):
        q = RankedSet(scores, one, MASKED, single=single)
        log_probs = q.log_prob(q.enumerate_support())
        finite = log_probs > -torch.inf
        values.append((log_probs, torch.autograd.grad(log_probs[finite].square().sum(), scores)[0]))
    for general, exact in zip(*values, strict=True):
        assert torch.allclose(general, exact, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype):
    q = RankedSet(torch.randn(MASKED.shape, dtype=dtype), SIZES, MASKED)
    log_prob = q.log_prob(q.sample())
    assert log_prob.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.isfinite(log_prob).all()


def test_order_probability_is_a_product_over_the_ranking():
    """Sets of 2, 1 and 2: the sum over all rankings that are cut into the order."""
    scores = torch.randn(1, 5)
    q = RankedOrder(scores, torch.tensor([[2, 1, 2]]), torch.ones(1, 5).bool())
    order = torch.tensor([[1, 0, 2, 0, 2]])
    total = torch.zeros((), dtype=torch.float64)
    for ranking in itertools.permutations(range(5)):
        cut = torch.tensor([0, 0, 1, 2, 2])
        if torch.equal(cut[torch.tensor(ranking).argsort()], order[0]):
            left, log_prob = list(range(5)), torch.zeros((), dtype=torch.float64)
            for i in ranking:
                log_prob = log_prob + scores[0, i] - scores[0, left].logsumexp(-1)
                left.remove(i)
            total = total + log_prob.exp()
    assert q.log_prob(order).exp().item() == pytest.approx(total.item(), rel=1e-5)
