"""Plans of the whole order: how they are followed, and what they cost."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from written_denoisers import Table, masks, state_of

from orderppl import Batch, State, UserError, decode, follow
from orderppl.config import build, describe
from orderppl.distributions import StepwiseOrder
from orderppl.distributions.ranked_order import RankedOrder
from orderppl.models import PositionTable
from orderppl.models.networks import GroupedNetwork, ScanNetwork
from orderppl.policies import Dilated, FixedOrder, Plan, RandomSteps, ScanPlan, ScanPolicy
from orderppl.policies.plans import Planned

from programs import PlaceTable, TableDenoiser, make_batch

SAME = Table([[0.7, 0.3]] * 4)


class Written(nn.Module):
    """Step logits by hand, and who asked for them."""

    def __init__(self, probs: list[list[float]]) -> None:
        super().__init__()
        self.probs = torch.tensor(probs, dtype=torch.float64)
        self.openings: list[State] = []

    def forward(self, opening: State) -> Tensor:
        self.openings.append(opening)
        return self.probs.log().expand(*opening.shape, self.probs.shape[-1])


def test_a_fixed_order_skips_empty_steps():
    """A forward per set, not per step; positions behind the last one come at the end."""
    out = decode(SAME, FixedOrder([5, 0, 5, 2]), masks(SAME, 4, 3, 2), max_steps=4)
    assert out.reveal_step.tolist() == [[2, 0, 2, 1], [1, 0, 1, -1], [1, 0, -1, -1]]
    assert out.nfe.tolist() == [3, 2, 2]
    assert out.fallback.tolist() == [0, 0, 0]
    short = decode(SAME, FixedOrder([5, 0, 5, 2]), masks(SAME, 4), max_steps=2)
    assert short.reveal_step.tolist() == [[1, 0, 1, 1]]
    behind = decode(SAME, FixedOrder([1, 0]), masks(SAME, 4), max_steps=4)
    assert behind.reveal_step.tolist() == [[1, 0, 2, 2]]


def test_a_pattern_repeats_over_the_positions_to_reveal():
    denoiser = Table([[0.7, 0.3]] * 7)
    tokens = torch.tensor([[2, 2, 0, 2, 2, 1, 2]])  # two given in between
    out = decode(denoiser, FixedOrder([1, 0], periodic=True), tokens, max_steps=4)
    assert out.reveal_step.tolist() == [[1, 0, -1, 1, 0, -1, 1]]


def test_a_fixed_order_is_a_point_mass_over_orders():
    """Steps beyond the budget are its last one."""
    batch = make_batch("scattered")
    q = FixedOrder([0, 4, 1]).order(batch, TableDenoiser(), 3)
    values = q.enumerate_support()
    log_probs = q.log_prob(values)
    place = (batch.latent.cumsum(-1) - 1).clamp(min=0)
    wanted = torch.tensor([0, 2, 1])[place].masked_fill(~batch.latent, -1)
    assert torch.equal(log_probs == 0, (values == wanted).all(-1))
    assert torch.equal(q.sample(), wanted)
    assert torch.equal(q.mode, wanted)


def test_a_learned_plan_by_hand():
    network = Written([[0.4, 0.3, 0.3], [0.4, 0.1, 0.5], [0.4, 0.35, 0.25], [0.6, 0.3, 0.1]])
    mode = decode(SAME, Plan(network), masks(SAME, 4), max_steps=3, mode=True)
    assert mode.reveal_step.tolist() == [[0, 1, 0, 0]]  # nothing at step 1, which is skipped
    assert len(network.openings) == 1  # planned once, before the first step
    opening = network.openings[0]
    assert opening.masked.all() and opening.step.tolist() == [0]
    assert (opening.tokens == SAME.mask_index).all()
    with pytest.raises(UserError, match="^num_steps: 2 steps for a plan of 3"):
        decode(SAME, Plan(network), masks(SAME, 4), max_steps=2)
    longer = decode(SAME, Plan(network), masks(SAME, 4), max_steps=9, mode=True)
    assert torch.equal(longer.reveal_step, mode.reveal_step)


def test_draws_of_a_plan_have_its_frequencies():
    # n = 20,000 rows of 2 positions; |z| < 4. Position 1 is always at step 1, so that nothing is compressed at step 0.
    policy, n = Plan(Written([[0.3, 0.7], [1e-12, 1.0]])), 20_000
    out = decode(SAME, policy, masks(SAME, *[2] * n), max_steps=2)
    early = (out.reveal_step[:, 1] == 1).double().mean()  # position 0 stood alone at step 0
    assert abs(early - 0.3) / math.sqrt(0.21 / n) < 4


def test_a_plan_knows_what_is_given():
    """It is made from the canvas with its given tokens, and from nothing that is hidden."""
    network = Written([[0.5, 0.5]] * 4)
    tokens = torch.tensor([[1, 2, 0, 2]])
    decode(SAME, Plan(network), tokens, max_steps=2)
    follow(Plan(network), SAME, Batch(torch.tensor([[1, 1, 0, 1]]), given=tokens != 2), 2)
    for opening in network.openings:
        assert opening.tokens.tolist() == [[1, 2, 0, 2]]
        assert opening.latent.tolist() == [[False, True, False, True]]


def test_the_order_of_a_plan_is_its_closed_form():
    """Its hazards, and not a chain of states: as many steps as the plan has."""
    network, batch = PlaceTable(3), make_batch("scattered")
    q = Plan(network).order(batch, TableDenoiser(), 3)
    assert isinstance(q, StepwiseOrder)
    torch.testing.assert_close(q.probs, network(batch).softmax(-1))
    assert torch.equal(q.masked, batch.latent)
    for steps in (2, 4):
        with pytest.raises(UserError, match=f"^num_steps: {steps} steps for a plan of 3"):
            Plan(network).order(batch, TableDenoiser(), steps)
    with pytest.raises(UserError, match="^policy: a plan is played out from its first step on"):
        Plan(network)(state_of(SAME, [[1, 1, 1]]))


class Ranking(Planned):
    """A user's plan: scores of positions, two at a time."""

    def plan(self, opening: State) -> RankedOrder:
        scores = torch.arange(opening.shape[-1], dtype=torch.float64).sin().expand(opening.shape)
        count = opening.latent.sum(-1, keepdim=True)
        sizes = (count - 2 * torch.arange(opening.num_steps)).clamp(0, 2)
        sizes[..., -1] = count[..., 0] - sizes[..., :-1].sum(-1)
        return RankedOrder(5 * scores, sizes, opening.latent)


def test_a_plan_of_any_other_distribution():
    batch, denoiser = make_batch("scattered"), TableDenoiser()
    q = Ranking().order(batch, denoiser, 3)
    mass = q.log_prob(q.enumerate_support()).logsumexp(0)
    torch.testing.assert_close(mass, torch.zeros_like(mass), atol=1e-5, rtol=0)
    path = follow(Ranking(), denoiser, batch, 3, mode=True)
    assert torch.equal(path.reveal_step, q.mode)
    drawn = follow(Ranking(), denoiser, batch, 3)
    assert torch.equal(drawn.reveal_step >= 0, batch.latent)


def scan(noise: float = 2.0) -> ScanPlan:
    return ScanPlan(ScanNetwork(3, PositionTable(3, 2, noise=noise), width=4))


@pytest.mark.parametrize("canvas", ["padded", "scattered", "prompted"])
def test_a_scan_by_hand(canvas: str):
    """log p(r) = sum_i log softmax(network(r_1, .., r_{i-1}))_{r_i} over the positions to reveal, step by step."""
    policy, batch = scan(), make_batch(canvas)
    q = policy.order(batch, TableDenoiser(), 3)
    order = q.sample()
    context = policy.network.context(batch)
    for row in range(len(batch)):
        places, total = batch.latent[row].nonzero()[:, 0], torch.zeros(())
        for count in range(1, len(places) + 1):  # what stands behind a position has no part in its step
            steps = order[row, places[:count]]
            logits = policy.network(context[row, places[:count]][None], steps[None], torch.ones(1, count).bool())
            total = total + logits.log_softmax(-1)[0, -1, steps[-1]]
        torch.testing.assert_close(q.log_prob(order)[row], total)
    mass = q.log_prob(q.enumerate_support()).logsumexp(0)
    torch.testing.assert_close(mass, torch.zeros_like(mass), atol=1e-5, rtol=0)


def test_the_mode_of_a_scan_is_a_likely_order():
    policy, batch = scan(), make_batch("plain")
    q = policy.order(batch, TableDenoiser(), 3)
    assert torch.equal(q.mode, q.mode)
    likely = q.log_prob(q.mode)
    assert (likely >= q.log_prob(q.sample((200,))).median(0).values).all()
    assert torch.equal(
        follow(policy, TableDenoiser(), batch, 3, mode=True).reveal_step.amax(-1) < 3, torch.ones(4).bool()
    )


def test_random_steps_are_a_plan_blind_to_everything():
    batch = make_batch("scattered")
    q = RandomSteps().order(batch, TableDenoiser(), 3)
    values = q.enumerate_support()
    possible = q.log_prob(values) > -torch.inf
    assert possible.sum(0).tolist() == (3 ** batch.latent.sum(-1)).tolist()
    assert torch.allclose(
        q.log_prob(values).exp()[possible].log(),
        -(batch.latent.sum(-1) * math.log(3)).expand_as(q.log_prob(values))[possible],
        atol=1e-5,
    )


def test_a_pattern_lies_on_what_is_revealed_or_on_the_whole_row() -> None:
    """By hand: the third and fourth position are given, the last one is padding."""
    same = Table([[0.7, 0.3]] * 8)
    tokens = torch.full((1, 8), same.mask_index)
    tokens[:, 2:4] = 0
    there = torch.arange(8) < 7
    batch = Batch(tokens, attention_mask=there[None], given=tokens == 0)
    assert FixedOrder((0, 1, 2), periodic=True).order(batch, same, 3).mode.tolist() == [[0, 1, -1, -1, 2, 0, 1, -1]]
    whole = FixedOrder((0, 1, 2), periodic=True, counts_given=True)
    assert whole.order(batch, same, 3).mode.tolist() == [[0, 1, -1, -1, 1, 2, 0, -1]]
    assert build(describe(whole)).order(batch, same, 3).mode.equal(whole.order(batch, same, 3).mode)
    assert decode(same, whole, batch, max_steps=3).reveal_step.tolist() == [[0, 1, -1, -1, 1, 2, 0, -1]]


def test_a_dilated_order_halves_the_distances() -> None:
    """By hand: every eighth position first in four steps, the odd ones last; given positions take no place."""
    same = Table([[0.7, 0.3]] * 10)
    tokens = torch.full((2, 10), same.mask_index)
    tokens[1, 2] = 0
    batch = Batch(tokens, given=tokens == 0)
    order = Dilated().order(batch, same, 4).mode
    assert order[0].tolist() == [0, 3, 2, 3, 1, 3, 2, 3, 0, 3]
    assert order[1].tolist() == [0, 3, -1, 2, 3, 1, 3, 2, 3, 0]
    assert Dilated().order(batch, same, 1).mode[0].tolist() == [0] * 10
    assert Dilated().order(batch, same, 2).mode[0].tolist() == [0, 1] * 5
    assert build(describe(Dilated())).order(batch, same, 4).mode.equal(order)
    out = decode(same, Dilated(), batch, max_steps=4)
    assert out.reveal_step.equal(order) and out.nfe.tolist() == [4, 4]


def test_a_policy_that_scans_has_two_outcomes() -> None:
    with pytest.raises(UserError, match="^network: scans over 4 steps, where a set has two outcomes"):
        ScanPolicy(ScanNetwork(4, PositionTable(3, 2)))


def test_traces_hold_how_far_back_each_step_was_chosen() -> None:
    """By hand: what the scan reads at every position is the discounted sum of the steps before it."""
    network = ScanNetwork(2, PositionTable(4, 1), rates=(0.0, 0.5))
    read: list[Tensor] = []
    network.cell.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    steps = torch.tensor([[1, 0, 1, 1]])
    network(torch.zeros(1, 4, 1), steps, torch.ones(1, 4, dtype=torch.bool))
    start, zero, one = (F.one_hot(torch.tensor(i), 3).float() for i in range(3))
    last = torch.stack([start, one, zero, one])
    trace = torch.stack([start, start / 2 + one, start / 4 + one / 2 + zero, start / 8 + one / 4 + zero / 2 + one])
    assert read[0][0, :, :-1].equal(torch.cat([last, trace], -1))


def test_a_draw_follows_what_the_scan_with_traces_says() -> None:
    """Draws of 4,000 orders against the probabilities of all 16; |z| below 5."""
    torch.manual_seed(3)
    network = ScanNetwork(2, PositionTable(4, 1), width=4, rates=(0.0, 0.5, 0.9)).requires_grad_(False)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    orders = torch.cartesian_prod(*[torch.arange(2)] * 4)  # [16, 4]
    context, there = torch.randn(1, 4, 1), torch.ones(16, 4, dtype=torch.bool)
    logits = network(context.expand(16, -1, -1), orders, there)
    probs = logits.log_softmax(-1).gather(-1, orders[..., None]).sum((1, 2)).exp()
    assert probs.sum() == pytest.approx(1.0, abs=1e-5)
    count = 4000
    drawn = network.draw(context.expand(count, -1, -1), torch.rand(count, 4), there[:1].expand(count, -1))
    found = torch.bincount((drawn * torch.tensor([8, 4, 2, 1])).sum(-1), minlength=16)
    z = (found - count * probs) / (count * probs * (1 - probs)).sqrt()
    assert float(z.abs().max()) < 5


@pytest.mark.parametrize("rates", [(), (1.0,), (0.5, -0.1)])
def test_rates_of_traces_are_shares(rates: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="^rates: .* are not shares from 0 to below 1; give at least one"):
        ScanNetwork(3, PositionTable(3, 2), rates=rates)


@pytest.mark.parametrize("grouped", [False, True])
def test_a_wide_beam_finds_the_most_probable_order_of_all(grouped: bool) -> None:
    """Against all 81 orders of a row; given positions and padding have no step."""
    torch.manual_seed(5)
    table = PositionTable(6, 3, noise=2.0)
    network = GroupedNetwork(3, table, groups=2, width=6) if grouped else ScanNetwork(3, table, width=6, rates=(0, 0.5))
    for parameter in network.requires_grad_(False).parameters():
        torch.nn.init.normal_(parameter)
    attended = torch.tensor([[True] * 6, [True] * 5 + [False]])
    given = torch.tensor([[False, True, False, True, False, False], [True, False, True, False, False, False]])
    batch = Batch(torch.zeros((2, 6), dtype=torch.int64), attended, given)
    same = TableDenoiser()
    order = ScanPlan(network, beams=81).order(batch, same, 3)
    found = order.expand(torch.Size((2,))).mode
    for row in range(2):
        places = batch.latent[row].nonzero()[:, 0]
        every = torch.cartesian_prod(*[torch.arange(3)] * len(places))
        orders = torch.full((len(every), 6), -1)
        orders[:, places] = every
        one = ScanPlan(network).order(batch.rows(slice(row, row + 1)), same, 3)
        log_prob = one.log_prob(orders[:, None])[:, 0]
        assert log_prob.exp().sum() == pytest.approx(1.0, abs=1e-5)
        assert found[row].equal(orders[log_prob.argmax()])
    narrow = ScanPlan(network, beams=1).order(batch, same, 3)
    assert (narrow.log_prob(narrow.mode) <= order.log_prob(found) + 1e-6).all()


def test_a_beam_keeps_something() -> None:
    with pytest.raises(UserError, match="^beams: a search that keeps 0; keep at least 1"):
        ScanPlan(ScanNetwork(3, PositionTable(3, 2)), beams=0)
