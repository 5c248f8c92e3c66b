"""What every distribution over one reveal set promises, against sums over all subsets."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import kl_divergence

from orderppl.distributions import AutoregressiveSet, DecidedSet, IndependentSet, RankedSet, SetDistribution
from orderppl.distributions.finishing_set import FinishingSet
from orderppl.distributions.ranked_set import UniformSet
from orderppl.models import GroupedNetwork, PositionTable, ScanNetwork

LENGTH = 4
# Everything masked, some of it, one position (not the first), nothing.
MASKED = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()
ROWS = len(MASKED)
SIZES = torch.tensor([2, 2, 1, 0])
DECIDED = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()


def randn(masked: Tensor) -> Tensor:
    return torch.randn(masked.shape)


def scanned(masked: Tensor, grouped: bool = False, non_empty: bool = True) -> AutoregressiveSet:
    """Decisions that depend on each other strongly."""
    table = PositionTable(LENGTH, 2)
    network = GroupedNetwork(2, table, groups=2, width=4) if grouped else ScanNetwork(2, table, width=4, bias=-1.0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    return AutoregressiveSet(network.requires_grad_(False), torch.randn((*masked.shape, 2)), masked, non_empty)


SETS: dict[str, Callable[[Tensor], SetDistribution]] = {
    "bernoulli": lambda m: IndependentSet.bernoulli(randn(m), m),
    "non_empty": lambda m: IndependentSet.bernoulli(randn(m), m, non_empty=True),
    "renormalised": lambda m: IndependentSet.renormalised(randn(m), 0.8, m),
    "smoothed": lambda m: IndependentSet.smoothed(DECIDED & m, m, 0.2),
    "smoothed_non_empty": lambda m: IndependentSet.smoothed(DECIDED & m, m, 0.2, non_empty=True),
    "scaled": lambda m: IndependentSet.bernoulli(randn(m) - 1, m).scaled(1.5),
    "scaled_non_empty": lambda m: IndependentSet.bernoulli(randn(m) - 1, m, non_empty=True).scaled(0.6),
    "decided": lambda m: DecidedSet(DECIDED & m, m, non_empty=True),
    "decides_nothing": lambda m: DecidedSet(torch.zeros_like(m), m),
    "ranked": lambda m: RankedSet(2 * randn(m), SIZES, m),
    "single": lambda m: RankedSet(2 * randn(m), SIZES.clamp(max=1), m, single=True),
    "uniform": lambda m: UniformSet(SIZES, m),
    "finishing": lambda m: FinishingSet(IndependentSet.bernoulli(randn(m), m), torch.randn(ROWS)),
    "finishing_non_empty": lambda m: FinishingSet(IndependentSet.bernoulli(randn(m), m, True), torch.randn(ROWS)),
    "finishing_ranked": lambda m: FinishingSet(RankedSet(randn(m), SIZES, m), torch.randn(ROWS)),
    "finishing_decided": lambda m: FinishingSet(
        DecidedSet(DECIDED & m, m), torch.tensor([-1.0, torch.inf, 2, -torch.inf])
    ),
    "finishing_scaled": lambda m: FinishingSet(IndependentSet.bernoulli(randn(m) - 2, m), torch.randn(ROWS) - 2).scaled(
        2.0
    ),
    "finishing_part": lambda m: FinishingSet(
        IndependentSet.bernoulli(randn(m), m & DECIDED, True), torch.randn(ROWS), m
    ),
    "part": lambda m: IndependentSet.bernoulli(randn(m), m & DECIDED),
    "scanned": scanned,
    "scanned_may_wait": lambda m: scanned(m, non_empty=False),
    "grouped": lambda m: scanned(m, grouped=True),
}
# without a closed form of entropy and inclusion probabilities
OPEN = {"ranked", "scanned", "scanned_may_wait", "grouped", *(name for name in SETS if name.startswith("finishing"))}
every_set = pytest.mark.parametrize("name", SETS)
# Restricted, certain in some rows, and with more to reveal there than the distribution was shown.
LAST = torch.tensor([True, False, True, True])


def make(name: str) -> SetDistribution:
    return SETS[name](MASKED)


def subsets(q: SetDistribution) -> tuple[Tensor, Tensor]:
    """All subsets, bool [2**S, *, S], and their probabilities, [2**S, *]."""
    values = q.enumerate_support()
    return values, q.log_prob(values).exp()


@every_set
def test_mass_is_one_and_stays_inside_the_masked_positions(name: str):
    q = make(name)
    values, probs = subsets(q)
    assert values.shape == (2**LENGTH, *MASKED.shape)
    assert len(values[:, 0].unique(dim=0)) == 2**LENGTH
    assert torch.allclose(probs.sum(0), torch.ones(ROWS), atol=1e-5)
    assert (probs[(values & ~q.masked).any(-1)] == 0).all()
    assert not values[0].any()
    empty = probs[0]  # [B]
    assert empty[3].item() == pytest.approx(1)  # nothing masked: the empty set for sure
    if q.non_empty:
        assert (empty[:3] == 0).all()
    if name in ("bernoulli", "smoothed", "scaled", "decides_nothing", "scanned_may_wait"):
        assert (empty > 0).all()
    assert q.batch_shape == (ROWS,) and q.event_shape == (LENGTH,)


@every_set
def test_enumeration_without_expansion_broadcasts(name: str):
    q = make(name)
    values = q.enumerate_support(expand=False)
    assert values.shape == (2**LENGTH, 1, LENGTH)
    assert torch.equal(q.log_prob(values), q.log_prob(q.enumerate_support()))


@pytest.mark.parametrize("name", ["scanned", "scanned_may_wait", "grouped"])
def test_gradients_of_a_scan(name: str):
    """Of the log-probability by every parameter, against differences; rows without a choice have none."""
    q = make(name)
    network = q.scan.double().requires_grad_(True)  # type: ignore[attr-defined]
    q = AutoregressiveSet(network, q.context.double(), MASKED, q.non_empty)  # type: ignore[attr-defined]
    values = q.sample()
    parameters = [own for key, own in network.named_parameters() if not key.startswith("context")]
    found = torch.autograd.grad(q.log_prob(values).sum(), parameters)
    assert all(torch.isfinite(one).all() for one in found)
    for parameter, gradient in zip(parameters, found, strict=True):
        moved = torch.randn_like(parameter)
        sums = []
        for size in (1e-6, -2e-6):
            with torch.no_grad():
                parameter.add_(size * moved)
                sums.append(q.log_prob(values).sum())
        with torch.no_grad():
            parameter.add_(1e-6 * moved)
        assert (sums[0] - sums[1]) / 2e-6 == pytest.approx(float((gradient * moved).sum()), rel=1e-4, abs=1e-6)


def assert_frequencies(draws: Tensor, q: SetDistribution) -> None:
    """Of n draws bool [n, *, S]: every subset's frequency within |z| < 5 of its probability."""
    n, (values, probs) = len(draws), subsets(q)
    assert draws.dtype == torch.bool and draws.shape == (n, *q.masked.shape)
    assert not (draws & ~q.masked).any()
    code = 2 ** torch.arange(LENGTH)
    for row in itertools.product(*map(range, q.batch_shape)):
        place = (slice(None), *row)
        seen = torch.bincount((draws[place] * code).sum(-1), minlength=2**LENGTH) / n
        expected = torch.zeros(2**LENGTH).index_add(0, (values[place] * code).sum(-1), probs[place])
        error = (expected * (1 - expected) / n).sqrt().clamp_min(1e-6)
        assert ((seen - expected).abs() / error).max() < 5
        assert (seen[expected == 0] == 0).all()


@every_set
def test_samples_and_draws_follow_log_prob(name: str):
    """n = 20,000 per row, by the sampler and from given noise."""
    q = make(name)
    assert_frequencies(q.sample((20_000,)), q)
    assert_frequencies(q.draw(torch.rand((20_000, *MASKED.shape), dtype=torch.float64).clamp(min=1e-12)), q)


@every_set
def test_inclusion_probability_and_entropy(name: str):
    """Sums over subsets, or no closed form: then a bound takes samples."""
    q = make(name)
    values, probs = subsets(q)
    for ask, wanted in (
        (lambda: q.probs, (values * probs.unsqueeze(-1)).sum(0)),
        (lambda: q.mean, (values * probs.unsqueeze(-1)).sum(0)),
        (lambda: q.entropy(), -torch.special.xlogy(probs, probs).sum(0)),
    ):
        try:
            found = ask()
        except NotImplementedError:
            assert name in OPEN
        else:
            assert torch.allclose(found, wanted, atol=1e-5)


@every_set
def test_mode_is_likely(name: str):
    """The most probable set; of one that may finish, decided by the finishing first."""
    q = make(name)
    mode, best = q.mode, subsets(q)[1].amax(0)
    assert not (mode & ~q.masked).any()
    if isinstance(q, AutoregressiveSet):  # the best of a few draws
        assert (q.log_prob(mode).exp() >= 0.3 * best).all()
        assert torch.equal(mode, q.mode)
    elif isinstance(q, FinishingSet):
        assert torch.equal(mode, torch.where(q.logit[:, None] > 0, q.masked, q.base.mode))
    else:
        assert torch.allclose(q.log_prob(mode).exp(), best, atol=1e-6)


@pytest.mark.parametrize("name", ["bernoulli", "non_empty"])
def test_mode_where_no_position_is_likely(name: str):
    q = SETS[name](MASKED)
    logits = q.log_reveal - q.log_keep - 6.0
    q = IndependentSet.bernoulli(logits.masked_fill(~MASKED, 0.0), MASKED, non_empty=q.non_empty)
    assert torch.allclose(q.log_prob(q.mode).exp(), subsets(q)[1].amax(0), atol=1e-6)
    assert torch.equal(q.mode.sum(-1), torch.tensor([1, 1, 1, 0]) * q.non_empty)


def by_enumeration(q: SetDistribution, p: SetDistribution) -> Tensor:
    """KL(q || p) summed over subsets."""
    values = q.enumerate_support()
    log_q, log_p = q.log_prob(values), p.log_prob(values)
    possible = log_q > -torch.inf
    terms = log_q.exp() * (log_q - log_p.masked_fill(~possible, 0.0)).masked_fill(~possible, 0.0)
    return terms.sum(0)


CLOSED = {  # where a closed form has to be, so that the bound does not sample
    *itertools.product(["bernoulli", "non_empty", "renormalised", "smoothed"], ["bernoulli", "non_empty", "part"]),
    *itertools.product(["single", "uniform"], ["bernoulli", "non_empty", "uniform"]),
    *itertools.product(["decided", "decides_nothing"], SETS),
    ("single", "single"),
}


@pytest.mark.parametrize("p_name", SETS)
@every_set
def test_divergence(name: str, p_name: str):
    """The registered KL is the sum over subsets, infinite exactly where p misses subsets of q, or there is none."""
    q, p = make(name), make(p_name)
    try:
        kl = kl_divergence(q, p)
    except NotImplementedError:
        assert (name, p_name) not in CLOSED
        return
    enumerated = by_enumeration(q, p)
    assert torch.equal(kl.isinf(), enumerated.isinf())
    finite = ~kl.isinf()
    assert torch.allclose(kl[finite], enumerated[finite], atol=1e-5)
    assert (kl[finite] > -1e-6).all()
    assert kl[3].abs() < 1e-6  # nothing masked


@every_set
def test_divergence_from_itself_is_zero(name: str):
    q = make(name)
    try:
        kl = kl_divergence(q, q)
    except NotImplementedError:
        assert name in OPEN
        return
    assert torch.allclose(kl, torch.zeros(ROWS), atol=1e-6)


@every_set
def test_expand(name: str):
    q = make(name)
    wide = q.expand((5, *q.batch_shape))
    values = q.enumerate_support()[3]
    assert type(wide) is type(q) and wide.non_empty == q.non_empty
    assert wide.batch_shape == (5, ROWS) and wide.event_shape == (LENGTH,)
    assert torch.equal(wide.log_prob(values), q.log_prob(values).expand(5, -1))
    assert wide.sample((2,)).shape == (2, 5, ROWS, LENGTH)
    assert torch.equal(wide.mode, q.mode.expand(5, -1, -1))
    assert torch.equal(wide.shown, q.shown.expand(5, -1, -1))
    if q.priority is None:
        assert wide.priority is None
    else:
        assert torch.equal(wide.priority, q.priority.expand(5, -1, -1))
    assert q.expand(q.batch_shape) is q


@every_set
def test_at_picks_a_step_of_a_stack(name: str):
    stack = make(name).expand((3, ROWS))  # [T, B]
    picked = stack.at(2)
    assert picked.batch_shape == (ROWS,)
    values = picked.enumerate_support()
    assert torch.equal(picked.log_prob(values), stack.log_prob(values.unsqueeze(1).expand(-1, 3, -1, -1))[:, 2])


@every_set
def test_certain_reveals_all_that_is_left(name: str):
    """In the rows asked for, also what the distribution has not been shown; other rows are as they were."""
    q = make(name)
    last = q.certain(LAST, MASKED)
    values, probs = subsets(last)
    for row in (0, 2, 3):
        assert last.log_prob(MASKED)[row] == pytest.approx(0, abs=1e-6)
        assert torch.equal(last.masked[row], MASKED[row])
        assert torch.equal(last.mode[row], MASKED[row])
        assert (last.sample((100,))[:, row] == MASKED[row]).all()
        assert (last.draw(torch.rand(MASKED.shape, dtype=torch.float64))[row] == MASKED[row]).all()
    assert torch.equal(last.log_prob(values)[:, 1], q.log_prob(values)[:, 1])
    assert torch.allclose(probs.sum(0), torch.ones(ROWS), atol=1e-5)
    if name not in OPEN:
        assert torch.allclose(last.probs[LAST], MASKED[LAST].float())
        assert torch.allclose(last.entropy()[LAST], torch.zeros(3), atol=1e-6)
    nowhere = q.certain(torch.zeros(ROWS, dtype=torch.bool), MASKED)
    assert torch.equal(nowhere.log_prob(values), q.log_prob(values))


@every_set
def test_scaled_makes_each_position_more_likely(name: str):
    """min(1, factor p) where positions are decided one by one; others say that they have no such setting."""
    q = make(name)
    if name in ("ranked", "single", "uniform", "finishing_ranked", "scanned", "scanned_may_wait", "grouped"):
        with pytest.raises(NotImplementedError, match=r"RankedSet|UniformSet|AutoregressiveSet"):
            q.scaled(2.0)
        return
    twice = q.scaled(2.0)
    assert torch.allclose(subsets(twice)[1].sum(0), torch.ones(ROWS), atol=1e-5)
    if isinstance(q, IndependentSet):
        assert torch.allclose(twice.log_reveal.exp(), (2 * q.log_reveal.exp()).clamp(max=1), atol=1e-6)
        assert twice.non_empty == q.non_empty
    if isinstance(q, FinishingSet):
        assert torch.allclose(twice.logit.sigmoid(), (2 * q.logit.sigmoid()).clamp(max=1), atol=1e-6)


@every_set
def test_gradients_are_finite(name: str):
    """Of the log-probability, moments and divergences, also in rows without a choice."""
    for trial in range(3):
        torch.manual_seed(trial)
        scores = torch.randn(MASKED.shape, requires_grad=True)
        original = torch.randn
        q = _with_gradient(name, scores)
        if q is None:
            assert name.startswith(("smoothed", "deci", "uniform", "finishing_decided", "scanned", "grouped"))
            return
        assert torch.randn is original
        for value in _values(q):
            if value.requires_grad:
                (gradient,) = torch.autograd.grad(value, scores, retain_graph=True, allow_unused=True)
                assert gradient is None or torch.isfinite(gradient).all()


def _with_gradient(name: str, scores: Tensor) -> SetDistribution | None:
    """The set of a name with these scores in the place of random numbers."""
    wanted = {
        "bernoulli": lambda: IndependentSet.bernoulli(scores, MASKED),
        "non_empty": lambda: IndependentSet.bernoulli(scores, MASKED, non_empty=True),
        "renormalised": lambda: IndependentSet.renormalised(scores, 0.8, MASKED),
        "scaled": lambda: IndependentSet.bernoulli(scores, MASKED).scaled(1.5),
        "scaled_non_empty": lambda: IndependentSet.bernoulli(scores, MASKED, non_empty=True).scaled(0.6),
        "ranked": lambda: RankedSet(scores, SIZES, MASKED),
        "single": lambda: RankedSet(scores, SIZES.clamp(max=1), MASKED, single=True),
        "finishing": lambda: FinishingSet(IndependentSet.bernoulli(scores, MASKED), scores.sum(-1)),
        "finishing_non_empty": lambda: FinishingSet(IndependentSet.bernoulli(scores, MASKED, True), scores.sum(-1)),
        "finishing_ranked": lambda: FinishingSet(RankedSet(scores, SIZES, MASKED), scores.sum(-1)),
        "finishing_scaled": lambda: FinishingSet(IndependentSet.bernoulli(scores, MASKED), scores.sum(-1)).scaled(0.7),
        "finishing_part": lambda: FinishingSet(
            IndependentSet.bernoulli(scores, MASKED & DECIDED, True), scores.sum(-1), MASKED
        ),
        "part": lambda: IndependentSet.bernoulli(scores, MASKED & DECIDED),
    }
    return wanted[name]() if name in wanted else None


def _values(q: SetDistribution) -> list[Tensor]:
    values = [q.log_prob(q.sample()).sum(), q.certain(LAST, MASKED).log_prob(MASKED).masked_fill(~LAST, 0.0).sum()]
    other = IndependentSet.bernoulli(torch.zeros(MASKED.shape), MASKED)
    for ask in (lambda: q.probs, q.entropy, lambda: kl_divergence(q, other)):
        try:
            found = ask()
        except NotImplementedError:
            continue
        values.append(found[found.isfinite()].sum())
    return values


@every_set
def test_bad_values_are_refused(name: str):
    q = make(name)
    if isinstance(q, (DecidedSet, FinishingSet)):
        return  # compare whole sets
    with pytest.raises(ValueError, match="support"):
        q.log_prob(torch.full(MASKED.shape, 2))
    with pytest.raises(ValueError, match="shape"):
        q.log_prob(torch.zeros(ROWS, LENGTH + 1, dtype=torch.bool))
