"""Distributions over orders against sums over all ordered partitions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import kl_divergence

from orderppl import Batch
from orderppl.distributions import OrderDistribution, StepwiseOrder
from orderppl.distributions.order_distribution import PolicyOrder, kl_by_step
from orderppl.distributions.ranked_order import RankedOrder, RenormalisedOrder
from orderppl.models import LearnedPolicy
from orderppl.policies import Blocks, EarlyCommit, EosAware, Policy
from orderppl.policies.schedules import make_sizes
from orderppl.unmasking.trajectory import Path

from programs import LENGTH, VOCAB, StateTable, TableDenoiser, scan

STEPS = 3
# Everything, padding or something given at one end, in the middle, one position, none.
MASKED = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 1], [0, 1, 0], [0, 0, 0]]).bool()
ROWS = len(MASKED)


def make_path(masked: Tensor, num_steps: int) -> Path:
    """Every second position that is not masked is given, the others are padding."""
    attended = masked | (torch.arange(masked.numel()).reshape(masked.shape) % 2 == 0)
    batch = Batch(torch.randint(0, VOCAB, masked.shape), attended, attended & ~masked)
    assert torch.equal(batch.latent, masked)
    return Path(batch, TableDenoiser(), num_steps)


def set_sizes(masked: Tensor, num_steps: int, sizes: float | str = "uniform") -> Tensor:
    return make_sizes(sizes).sizes(masked.sum(-1, keepdim=True), torch.arange(num_steps), num_steps)


def followed(make: Callable[[], Policy]) -> Callable[[Tensor, int], PolicyOrder]:
    return lambda m, steps: PolicyOrder(make(), make_path(m, steps))


ORDERS: dict[str, Callable[[Tensor, int], OrderDistribution]] = {
    "stepwise": lambda m, steps: StepwiseOrder(torch.randn(m.shape + (steps,)), m),
    "renormalised": lambda m, steps: RenormalisedOrder(torch.randn(m.shape), 3.0, steps, m),
    "ranked": lambda m, steps: RankedOrder(0.5 * torch.randn(m.shape), set_sizes(m, steps, 2.0), m),
    "one_a_step": lambda m, steps: RankedOrder(
        0.5 * torch.randn(m.shape), set_sizes(m, steps), m, single=steps >= m.shape[-1]
    ),
    "scan": lambda m, steps: scan(steps).plan(make_path(m, steps).opening()),
    "policy": followed(lambda: LearnedPolicy(StateTable(), non_empty=False)),
    "policy_non_empty": followed(lambda: LearnedPolicy(StateTable())),
    "blocks": followed(lambda: Blocks(LearnedPolicy(StateTable(), non_empty=False), 2)),
    "eos_aware": followed(lambda: EosAware(LearnedPolicy(StateTable(), non_empty=False), [0, 1])),
    "finishing": followed(lambda: EarlyCommit(LearnedPolicy(StateTable()), network=StateTable())),
    "finishing_blocks": followed(lambda: EarlyCommit(Blocks(LearnedPolicy(StateTable()), 2), network=StateTable())),
    "blocks_finishing": followed(lambda: Blocks(EarlyCommit(LearnedPolicy(StateTable()), network=StateTable()), 2)),
    "blocks_eos": followed(lambda: Blocks(EosAware(LearnedPolicy(StateTable()), [0, 1]), 2)),
}
LOOKS_BACK = {name for name in ORDERS if "blocks" in name}
every_order = pytest.mark.parametrize("name", ORDERS)


def make_order(name: str, masked: Tensor = MASKED, num_steps: int = STEPS) -> OrderDistribution:
    return ORDERS[name](masked, num_steps)


def probs_of_all(q: OrderDistribution) -> tuple[Tensor, Tensor]:
    values = q.enumerate_support()
    return values, q.log_prob(values).exp()


@pytest.mark.parametrize("num_steps", [1, 2, 3])
@every_order
def test_mass_is_one(name: str, num_steps: int):
    """Also with padding and given positions, whose repeats in the enumeration carry no mass."""
    q = make_order(name, num_steps=num_steps)
    values, probs = probs_of_all(q)
    assert values.shape == (num_steps**LENGTH, *MASKED.shape)
    assert torch.allclose(probs.sum(0), torch.ones(ROWS), atol=1e-5)
    proper = ((values >= 0) == MASKED).all(-1)
    assert (probs[~proper] == 0).all()
    assert proper.sum(0).tolist() == [num_steps ** int(m.sum()) for m in MASKED]  # every proper order once
    if name == "stepwise":
        assert (probs[proper] > 0).all()


@every_order
def test_enumeration_without_expansion_broadcasts(name: str):
    full = torch.ones(2, LENGTH, dtype=torch.bool)
    q = make_order(name, full)
    values = q.enumerate_support(expand=False)
    assert values.shape == (STEPS**LENGTH, 1, LENGTH)
    assert torch.allclose(q.log_prob(values), q.log_prob(q.enumerate_support()))


def assert_frequencies(draws: Tensor, q: OrderDistribution) -> None:
    """Of n draws int64 [n, B, S]: every order's frequency within |z| < 5 of its probability."""
    n, (values, probs) = len(draws), probs_of_all(q)
    assert draws.dtype == torch.int64 and draws.shape == (n, *MASKED.shape)
    assert torch.equal(draws >= 0, MASKED.expand_as(draws))  # -1 where nothing is masked, a step elsewhere
    assert draws.max() < STEPS
    code = (STEPS + 1) ** torch.arange(LENGTH)
    size = (STEPS + 1) ** LENGTH
    for row in range(ROWS):
        seen = torch.bincount(((draws[:, row] + 1) * code).sum(-1), minlength=size) / n
        expected = torch.zeros(size).index_add(0, ((values[:, row] + 1) * code).sum(-1), probs[:, row])
        error = (expected * (1 - expected) / n).clamp_min(1e-12).sqrt()
        likely = expected > 1e-6
        assert (((seen - expected) / error).abs()[likely & (expected < 1 - 1e-6)] < 5).all()
        assert seen[~likely].sum() < 1e-3


@every_order
def test_samples_follow_log_prob(name: str):
    """n = 20,000 draws per row."""
    q = make_order(name)
    with torch.no_grad():
        assert_frequencies(q.sample((20_000,)), q)


@every_order
def test_draws_follow_log_prob(name: str):
    """n = 20,000 draws per row from given noise, where one number per position is enough."""
    q = make_order(name)
    noise = torch.rand((20_000, *MASKED.shape), dtype=torch.float64)
    if name in ("stepwise", "ranked", "one_a_step", "scan"):
        assert_frequencies(q.draw(noise), q)
        assert q.mode.shape == MASKED.shape and torch.equal(q.mode >= 0, MASKED)
        assert (q.log_prob(q.mode) > -torch.inf).all()
    else:
        for ask in (lambda: q.draw(noise), lambda: q.mode):
            with pytest.raises(NotImplementedError):
                ask()


@every_order
def test_log_prob_is_the_chain_of_reveal_sets(name: str):
    q = make_order(name)
    assert q.has_steps == (name != "scan")
    if not q.has_steps:
        return  # whole orders only
    order = q.sample((6,)).detach()
    sets = q.sets(order)
    steps = torch.arange(STEPS).reshape(STEPS, 1, 1, 1)
    revealed, masked = order == steps, order >= steps
    by_step = sets.log_prob(revealed)
    assert by_step.shape == (STEPS, 6, ROWS)
    assert torch.equal(by_step, q.step_log_prob(order))
    assert torch.allclose(by_step.sum(0), q.log_prob(order), atol=1e-5)
    assert (by_step[-1] == 0).all()  # the last step completes
    for t in range(STEPS):
        one = sets.at(t)
        assert one.batch_shape == (6, ROWS)
        assert not (one.masked & ~masked[t]).any()  # never more than is masked
        assert torch.allclose(one.log_prob(revealed[t]), by_step[t], atol=1e-6)
    assert torch.equal(sets.at(STEPS - 1).masked, masked[-1])


@every_order
def test_set_at_one_step_is_that_of_the_stack(name: str):
    if name in LOOKS_BACK or name == "scan":
        return  # one set is no question for them
    q = make_order(name)
    order = q.sample().detach()
    stack = q.sets(order)
    for t in range(STEPS - 1):
        one = q.set_at(order >= t, torch.full((ROWS,), t))
        values = one.enumerate_support()
        assert torch.allclose(one.log_prob(values), stack.at(t).log_prob(values), atol=1e-5)


@every_order
def test_sets_met_while_drawing_are_those_of_the_order(name: str):
    """What the draw of a policy keeps is what scoring the order finds again."""
    q = make_order(name)
    wide = q.expand((5, ROWS))
    order = wide.sample()
    if not isinstance(q, PolicyOrder):
        assert q.met == []
        return
    assert q.met is wide.met and len(q.met) == STEPS
    met, again = wide.met_sets(), q.sets(order)
    steps = torch.arange(STEPS).reshape(STEPS, 1, 1, 1)
    torch.testing.assert_close(met.log_prob(order == steps), again.log_prob(order == steps))
    assert q.policy is wide.policy
    assert make_order(name).met_sets() is None


@every_order
def test_particles(name: str):
    q = make_order(name)
    wide = q.expand((5, ROWS))
    assert wide.batch_shape == (5, ROWS) and wide.event_shape == (LENGTH,)
    order = wide.sample()
    assert order.shape == (5, *MASKED.shape)
    assert len(q.expand((60, ROWS)).sample().unique(dim=0)) > 1  # each particle its own draw
    assert torch.allclose(wide.log_prob(order), q.log_prob(order))
    assert wide.sample((2,)).shape == (2, 5, *MASKED.shape)
    assert wide.expand((7, 5, ROWS)).sample().shape == (7, 5, *MASKED.shape)


@every_order
def test_orders_outside_the_support(name: str):
    q = make_order(name)
    good = q.sample().detach()
    for bad in (STEPS, -2):
        value = good.clone()
        value[0, 0] = bad
        with pytest.raises(ValueError, match="support"):
            q.log_prob(value)
    with pytest.raises(ValueError, match="shape"):
        q.log_prob(good[:, :2])
    reveals_padding, leaves_out = good.clone(), good.clone()
    reveals_padding[1, 2] = 0
    reveals_padding[2, 1] = 0
    leaves_out[0, 1] = -1
    assert torch.equal(q.log_prob(reveals_padding).isinf(), torch.tensor([False, True, True, False, False]))
    assert torch.equal(q.log_prob(leaves_out).isinf(), torch.tensor([True, False, False, False, False]))


def test_at_least_one_step():
    mask = torch.ones(1, LENGTH, dtype=torch.bool)
    for make in (
        lambda: RenormalisedOrder(torch.zeros(1, LENGTH), 0.1, 0, mask),
        lambda: StepwiseOrder(torch.zeros(1, LENGTH, 0), mask),
        lambda: PolicyOrder(LearnedPolicy(StateTable()), make_path(mask, 0)),
    ):
        with pytest.raises(ValueError, match="num_steps: 0 is below 1"):
            make()


def test_stepwise_hazard_is_the_conditional_probability():
    q = make_order("stepwise")
    probs = q.probs
    reached = probs.flip(-1).cumsum(-1).flip(-1)  # P(r >= t)
    survival = torch.ones(MASKED.shape)
    for t in range(STEPS):
        hazard = q.set_at(MASKED, torch.full((ROWS,), t))
        reveal, keep = hazard.log_reveal.exp(), hazard.log_keep.exp()
        assert torch.allclose(reveal[MASKED], (probs / reached)[..., t][MASKED], atol=1e-5)
        assert torch.allclose((reveal + keep)[MASKED], torch.ones(int(MASKED.sum())), atol=1e-5)
        assert torch.allclose((survival * reveal)[MASKED], probs[..., t][MASKED], atol=1e-5)
        survival = survival * keep
    assert (reveal[MASKED] == 1).all()


def test_stepwise_divergence_and_entropy():
    q, p = make_order("stepwise"), make_order("stepwise")
    values, probs = probs_of_all(q)
    log_q = q.log_prob(values).masked_fill(probs == 0, 0.0)
    log_p = p.log_prob(values).masked_fill(probs == 0, 0.0)
    assert torch.allclose(kl_divergence(q, p), (probs * (log_q - log_p)).sum(0), atol=1e-5)
    assert torch.allclose(q.entropy(), -(probs * log_q).sum(0), atol=1e-5)
    assert torch.allclose(kl_divergence(q, q), torch.zeros(ROWS), atol=1e-6)
    assert kl_divergence(q, p)[-1] == q.entropy()[-1] == 0  # nothing masked
    wide = kl_divergence(q.expand((5, ROWS)), p.expand((5, ROWS)))
    assert torch.allclose(wide, kl_divergence(q, p).expand(5, ROWS))


@every_order
def test_stepwise_divergences_add_up_along_the_chain(name: str):
    """KL(q || p) over orders is the expected sum of the KLs of the sets met, for every pair of families."""
    if name == "scan":
        return
    may_wait = name in ("stepwise", "policy")
    q, p = make_order(name), make_order("policy" if may_wait else "stepwise")
    values, probs = probs_of_all(q)
    try:
        by_step = kl_by_step(q.sets(values), p.sets(values), STEPS).sum(0)
    except NotImplementedError:
        assert name == "ranked" or "finishing" in name  # sets without a closed form
        return
    possible = probs > 0
    log_ratio = (q.log_prob(values) - p.log_prob(values)).masked_fill(~possible, 0.0)
    by_step = by_step.masked_fill(~possible, 0.0)
    assert torch.allclose((probs * by_step).sum(0), (probs * log_ratio).sum(0), atol=1e-4)


def test_a_tied_policy_has_no_divergence():
    path = make_path(MASKED, STEPS)
    policy, other = LearnedPolicy(StateTable()), LearnedPolicy(StateTable())
    q = PolicyOrder(policy, path)
    assert torch.equal(kl_divergence(q, q.as_prior()), torch.zeros(ROWS))
    with pytest.raises(NotImplementedError):
        kl_divergence(q, PolicyOrder(other, path))


def test_stepwise_with_an_impossible_step():
    """A step of probability 0 is never drawn, adds nothing to entropy and KL, and leaves the gradient finite."""
    logits = torch.tensor([[[0.0, -torch.inf, 0.0]]], requires_grad=True)
    q = StepwiseOrder(logits)
    p = StepwiseOrder(torch.zeros(1, 1, 3))
    assert set(q.sample((200,)).flatten().tolist()) == {0, 2}
    assert torch.allclose(q.entropy(), torch.tensor(2.0).log())
    assert torch.allclose(kl_divergence(q, p), torch.tensor(1.5).log())
    assert kl_divergence(p, q).isinf()
    kl_divergence(q, p).backward()
    assert torch.isfinite(logits.grad).all()
    late = StepwiseOrder(torch.tensor([[[0.0, 1.0, -torch.inf]]], requires_grad=True))  # nothing is left for the last
    values = late.enumerate_support()
    chain = late.sets(values).log_prob(values == torch.arange(3).reshape(3, 1, 1, 1)).sum(0)
    torch.testing.assert_close(chain, late.log_prob(values))
    assert late.set_at(torch.tensor([[True]]), torch.tensor([2])).log_prob(torch.tensor([[True]])) == 0


def test_stepwise_masks_everything_by_default():
    q = StepwiseOrder(torch.randn(2, 3, 4))
    assert q.masked.all() and q.batch_shape == (2,) and q.num_steps == 4


def test_renormalised_by_hand():
    """Scores 0 and -ln 2 at temperature 1: the first is revealed at once, the second with probability 1/2 each step."""
    scores = torch.tensor([[0.0, -0.6931471805599453]])
    q = RenormalisedOrder(scores, 1.0, 3, torch.ones(1, 2, dtype=torch.bool))
    for order, prob in (([0, 0], 0.5), ([0, 1], 0.5), ([0, 2], 0.0), ([1, 0], 0.0), ([1, 1], 0.0)):
        assert q.log_prob(torch.tensor([order])).exp().item() == pytest.approx(prob, abs=1e-6)


def test_a_prior_does_not_see_the_truth():
    """The same order as a guide's and as a prior: the one is told the hidden tokens, the other is not."""
    seen: list[bool] = []

    class Spy(LearnedPolicy):
        def logits(self, state):
            seen.append(state.truth is not None)
            return super().logits(state)

    order = PolicyOrder(Spy(StateTable()), make_path(MASKED, STEPS))
    drawn = order.sample().detach()
    order.log_prob(drawn)
    assert seen and all(seen)
    seen.clear()
    prior = order.as_prior().expand((2, ROWS))
    prior.log_prob(prior.sample().detach())
    prior.set_at(MASKED, torch.zeros(ROWS, dtype=torch.int64))
    assert seen and not any(seen)
