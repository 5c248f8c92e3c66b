"""Plans whose steps are played in two."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import kl_divergence

from orderppl import Batch, UserError, decode, follow
from orderppl.config import build, describe
from orderppl.distributions import StepwiseOrder
from orderppl.distributions.halved_order import HalvedOrder, halved
from orderppl.models import PositionTable
from orderppl.policies import FixedOrder, Halved, Plan, Ranked

from programs import TableDenoiser, make_batch, scan


def test_every_other_position_of_a_step_comes_first() -> None:
    """By hand; given positions and padding stay -1."""
    order = torch.tensor([[0, 1, 0, 0, -1, 1, 1, 0], [-1, 0, -1, 1, 1, -1, 1, 1]])
    assert halved(order, 4).tolist() == [[0, 2, 1, 0, -1, 3, 2, 1], [-1, 0, -1, 2, 3, -1, 2, 3]]
    assert halved(order[0], 3).tolist() == [0, 2, 1, 0, -1, 2, 2, 1]  # the last of three steps at once


@pytest.mark.parametrize("num_steps", [3, 4])
@pytest.mark.parametrize("canvas", ["plain", "scattered"])
def test_halved_orders_are_as_probable_as_what_they_come_from(canvas: str, num_steps: int) -> None:
    """All orders of 3 or 4 steps: the mass is 1, that of an order the one of its coarse order, and none elsewhere."""
    batch, plan = make_batch(canvas), scan(2)
    q = Halved(plan).order(batch, TableDenoiser(), num_steps)
    values = q.enumerate_support()
    log_prob = q.log_prob(values)
    torch.testing.assert_close(log_prob.logsumexp(0), torch.zeros(len(batch)), atol=1e-5, rtol=0)
    possible = log_prob > -torch.inf
    assert possible.sum(0).tolist() == (2 ** batch.latent.sum(-1)).tolist()
    coarse = plan.order(batch, TableDenoiser(), 2).log_prob(values.div(2, rounding_mode="floor"))
    torch.testing.assert_close(log_prob[possible], coarse[possible])


def test_draws_have_their_probabilities() -> None:
    """4,000 draws, each order's share within 5 standard deviations."""
    torch.manual_seed(0)
    q = Halved(scan(2)).order(make_batch("plain").rows(torch.tensor([0])), TableDenoiser(), 4)
    drawn = q.sample(torch.Size((4000,)))[:, 0]
    found, counts = drawn.unique(dim=0, return_counts=True)
    p = q.log_prob(found[:, None]).exp()[:, 0]
    assert ((counts - 4000 * p).abs() <= 5 * (4000 * p * (1 - p)).sqrt() + 1).all()
    assert p.sum() > 0.9


def test_shapes_and_draws_that_rows_share() -> None:
    order = StepwiseOrder(torch.zeros(5, 2), torch.ones(3, 5).bool())
    q = HalvedOrder(order, 4)
    wide = q.expand(torch.Size((4, 3)))
    assert (q.num_steps, wide.batch_shape, wide.event_shape) == (4, (4, 3), (5,))
    assert wide.sample((2,)).shape == (2, 4, 3, 5)
    shared = q.sharing_draws().sample((6,))
    assert shared.eq(shared[:, :1]).all() and not shared.eq(shared[:1]).all()
    assert q.mode.eq(halved(order.mode, 4)).all()


def test_divergence_is_that_of_the_coarse_orders() -> None:
    left, right = (StepwiseOrder(torch.randn(5, 2), torch.ones(3, 5).bool()) for _ in range(2))
    torch.testing.assert_close(kl_divergence(HalvedOrder(left, 4), HalvedOrder(right, 4)), kl_divergence(left, right))


def test_plays_twice_as_many_steps() -> None:
    """Halving the order of one step alternates; empty halves are skipped and not charged."""
    batch, denoiser = make_batch("plain"), TableDenoiser()
    path = follow(Halved(FixedOrder((0,), periodic=True)), denoiser, batch, 2)
    alternating = follow(FixedOrder((0, 1), periodic=True), denoiser, batch, 2)
    assert path.reveal_step.equal(alternating.reveal_step) and path.token_log_prob.equal(alternating.token_log_prob)
    canvas = Batch(batch.tokens.masked_fill(batch.latent, denoiser.mask_index), batch.attention_mask)
    out = decode(denoiser, Halved(FixedOrder((0, 1, 2, 3, 4, 5, 6))), canvas, max_steps=14)
    assert out.nfe.equal(out.latent.sum(-1))
    four = Halved(Halved(FixedOrder((0,), periodic=True)))
    assert four.order(batch, denoiser, 4).mode.tolist() == [[0, 2, 1]] * len(batch)


def test_is_written_and_corrected() -> None:
    policy = Halved(Plan(PositionTable(8, 2, noise=1.0)))
    batch, denoiser = make_batch("plain"), TableDenoiser()
    again = build(describe(policy))
    again.load_state_dict(policy.state_dict())
    assert again.order(batch, denoiser, 4).mode.equal(policy.order(batch, denoiser, 4).mode)
    zero = policy.corrected(PositionTable(8, 2))
    assert zero.order(batch, denoiser, 4).mode.equal(policy.order(batch, denoiser, 4).mode)


def test_what_it_refuses() -> None:
    with pytest.raises(UserError, match="coarse: Ranked is no plan"):
        Halved(Ranked("random"))
    with pytest.raises(UserError, match="num_steps: .* steps for a plan of"):
        Halved(Plan(PositionTable(8, 2))).order(make_batch("plain"), TableDenoiser(), 6)
    with pytest.raises(UserError, match="num_steps: 2 steps for a plan of 3"):
        Halved(scan(3)).order(make_batch("plain"), TableDenoiser(), 4)
