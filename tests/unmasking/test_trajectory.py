"""The states along an order: how many denoiser calls they take, who shares them, when they are freed."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.ops.provenance import get_provenance, track_provenance
from torch import Tensor

from orderppl import Batch
from orderppl.distributions import StepwiseOrder
from orderppl.distributions.order_distribution import PolicyOrder
from orderppl.models import LearnedPolicy
from orderppl.policies import RandomSteps, Threshold
from orderppl.unmasking.denoiser import Reader
from orderppl.unmasking.trajectory import VISIBLE, Path, Trajectory, same_step, steps_used

from programs import StateTable, TableDenoiser, make_batch

STEPS = 3
ORDER = torch.tensor([[1, 0, 2], [0, 2, VISIBLE], [VISIBLE, 1, 1]])
HARD = ["padded", "scattered", "prompted", "long_prompt"]


class CountingDenoiser(TableDenoiser):
    """Counts its calls and the rows it has scored."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        self.calls.append(len(state))
        return super().forward(state, attention_mask)


def make_path(canvas: str = "scattered", frozen: bool = True, num_steps: int = STEPS) -> Path:
    return Path(make_batch(canvas), CountingDenoiser().requires_grad_(not frozen), num_steps)


def draw_order(path: Path, *lead: int) -> Tensor:
    latent = path.batch.latent
    return StepwiseOrder(torch.zeros(latent.shape + (path.num_steps,)), latent).sample(lead)


def test_sets_and_states_by_hand():
    tokens, attended = torch.tensor([[3, 2, 1], [1, 0, 99], [2, 2, 3]]), torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]])
    path = Path(Batch(tokens, attended, torch.tensor([[0, 0, 0], [0, 0, 0], [1, 0, 0]])), TableDenoiser(), STEPS)
    trajectory = Trajectory(path, ORDER)
    assert trajectory.masked[1].long().tolist() == [[1, 0, 1], [0, 1, 0], [0, 1, 1]]
    assert trajectory.revealed[1].long().tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 1]]
    assert trajectory.states.tokens[1].tolist() == [[4, 2, 4], [1, 4, 0], [2, 4, 4]]
    assert trajectory.states.tokens[0].tolist() == [[4, 4, 4], [4, 4, 0], [2, 4, 4]]
    assert steps_used(ORDER).tolist() == [3, 3, 2]
    assert steps_used(torch.tensor([[0, 1, 0], [VISIBLE] * 3])).tolist() == [2, 0]  # nothing to reveal, no step
    assert same_step(2, ORDER).tolist() == [2, 2, 2]


@given(st.integers(1, 6), st.data())
@settings(max_examples=50, deadline=None, derandomize=True)
def test_reveal_sets_partition_what_is_masked(num_steps: int, data: st.DataObject):
    """For any order: the sets are disjoint, together everything masked, and M_{t+1} = M_t without z_t."""
    row = data.draw(st.lists(st.integers(-1, num_steps - 1), min_size=1, max_size=5))
    order = torch.tensor([row])
    path = Path(Batch(torch.zeros_like(order), given=order < 0), TableDenoiser(), num_steps)
    trajectory = Trajectory(path, order)
    sets, masked = trajectory.revealed, trajectory.masked
    assert torch.equal(sets.sum(0), (order >= 0).long())
    assert torch.equal(masked[1:], masked[:-1] & ~sets[:-1])
    assert torch.equal(masked[-1], sets[-1])
    assert steps_used(order).item() == max(row) + 1


@pytest.mark.parametrize("canvas", HARD)
@pytest.mark.parametrize("lead", [(), (5,), (2, 5)])
def test_states_of_an_order(lead: tuple[int, ...], canvas: str):
    path = make_path(canvas)
    order = draw_order(path, *lead)
    state = Trajectory(path, order).states
    assert state.tokens.shape == (STEPS, *order.shape)
    assert state.step.shape == (STEPS, *order.shape[:-1])
    for t in range(STEPS):
        masked = order >= t
        assert torch.equal(state.masked[t], masked)
        assert torch.equal(state.tokens[t], torch.where(masked, 4, path.batch.readable))
        assert (state.step[t] == t).all()
    assert not state.masked[..., ~path.batch.latent].any()
    assert path.denoiser.calls == []  # no call before someone asks
    found = state.per_position(lambda log_probs: log_probs)
    assert found.shape == (STEPS, *order.shape, 4)
    # All steps and particles in one call, in which the first state of a sequence, fully masked, comes only once.
    sequences, particles = len(path.batch), order[..., 0].numel() // len(path.batch)
    rows = sequences * (1 + (STEPS - 1) * particles)
    (read,) = path.denoiser.calls
    assert read == rows if rows < 100 else read <= rows  # of many, only those that differ
    whole = Reader(path.denoiser, Batch(path.batch.tokens, path.batch.attention_mask))  # from the first column on
    by_hand = whole.logits(whole.read(state.tokens)).log_softmax(-1)
    torch.testing.assert_close(found, by_hand.masked_fill(~state.masked[..., None], 0.0))
    tokens = path.batch.readable
    torch.testing.assert_close(
        Trajectory(path, order).token_log_prob(),
        by_hand.gather(-1, tokens.expand(order.shape).expand(state.tokens.shape)[..., None])[..., 0]
        .masked_fill(~state.masked, 0.0),
    )  # fmt: skip


def test_tokens_of_other_sequences():
    """Per particle tokens of its own, as a posterior predictive check scores them."""
    path = make_path()
    order, tokens = draw_order(path, 5), torch.randint(0, 4, (5, *path.batch.tokens.shape))
    found = Trajectory(path, order).token_log_prob(tokens, temperature=0.7)
    one_by_one = [Trajectory(path, order[k]).token_log_prob(tokens[k], 0.7) for k in range(5)]
    torch.testing.assert_close(found, torch.stack(one_by_one, 1))


def test_no_provenance_gets_into_the_states():
    path = make_path()
    order = track_provenance(draw_order(path), frozenset({"reveal_step"}))
    trajectory = Trajectory(path, order)
    for values in (trajectory.order, trajectory.states.tokens, trajectory.token_log_prob()):
        assert not get_provenance(values)


def test_an_order_without_the_batch_is_broadcast():
    path = make_path("plain")
    orders = torch.cartesian_prod(*[torch.arange(STEPS)] * 3).unsqueeze(1)  # [N, 1, S], as enumeration gives
    assert Trajectory(path, orders).states.tokens.shape == (STEPS, STEPS**3, 4, 3)


@pytest.mark.parametrize("canvas", HARD)
@pytest.mark.parametrize("lead", [(), (5,)])
def test_states_met_while_drawing_are_kept(canvas: str, lead: tuple[int, ...]):
    """T - 1 calls draw the order; its likelihood takes one more, for the last state, instead of one on all."""
    path = make_path(canvas)
    rows, particles = len(path.batch), 5 if lead else 1
    q = PolicyOrder(LearnedPolicy(StateTable()), path).expand((*lead, rows))
    order = q.sample()
    calls = path.denoiser.calls
    assert calls == [rows] + [rows * particles] * (STEPS - 2)
    found = Trajectory(path, order, q.met).token_log_prob()
    assert calls == [rows] + [rows * particles] * (STEPS - 1)
    again = Trajectory(path, order).token_log_prob()
    torch.testing.assert_close(found, again)
    assert calls[STEPS:] == [rows * (1 + (STEPS - 1) * particles)]


def test_a_policy_that_ignores_the_denoiser_makes_no_call():
    path = make_path()
    q = PolicyOrder(RandomSteps(), path)
    order = q.sample()
    assert path.denoiser.calls == []
    assert Trajectory(path, order, q.met).token_log_prob().shape == (STEPS, *order.shape)
    assert path.denoiser.calls == [len(path.batch) * STEPS]  # then all states at once


@pytest.mark.parametrize("canvas", HARD)
def test_states_of_a_trainable_denoiser_keep_their_gradient(canvas: str):
    """What was met gives the gradient of a fresh stack."""
    path = make_path(canvas, frozen=False)
    q = PolicyOrder(Threshold(0.5, temperature=1.0), path)
    order, slopes = q.sample(), []
    for met in (q.met, None):
        path.denoiser.table.grad = None
        Trajectory(path, order, met).token_log_prob().square().sum().backward()
        slopes.append(path.denoiser.table.grad)
    assert slopes[0].abs().sum() > 0
    torch.testing.assert_close(slopes[0], slopes[1])


def test_nothing_is_kept_beyond_its_order():
    """No cache and no reference cycle: with the collector off, everything goes as its last name does."""
    gc.collect()
    gc.disable()
    try:
        path = make_path()
        q = PolicyOrder(Threshold(0.5, temperature=1.0), path)
        trajectory = Trajectory(path, q.sample(), q.met)
        states = weakref.ref(q.met[0].state.predictions.states)
        trajectory.token_log_prob()
        assert states() is not None
        del trajectory
        assert states() is not None  # still met
        del q
        assert states() is None
    finally:
        gc.enable()


def test_a_second_draw_forgets_the_first():
    path = make_path()
    q = PolicyOrder(LearnedPolicy(StateTable()), path)
    first = q.sample()
    order = q.sample()
    assert len(q.met) == STEPS
    torch.testing.assert_close(
        Trajectory(path, order, q.met).token_log_prob(), Trajectory(path, order).token_log_prob()
    )
    assert first.shape == order.shape


def test_rows_that_agree_are_read_once():
    """The denoiser gets each partially revealed sequence once per row of the batch, and every particle its logits."""
    seen = []

    class Recorder(torch.nn.Module):
        mask_index, vocab_size = 3, 3

        def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
            seen.append(len(state))
            return (state * torch.arange(1, state.shape[1] + 1)).double().unsqueeze(-1) + torch.arange(3.0)

    batch = Batch(torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0]]), given=torch.tensor([[True, False, False, False]] * 2))
    reader = Reader(Recorder(), batch)
    assert reader.start == 1
    states = torch.tensor([[[0, 3, 3, 3], [1, 3, 3, 3]], [[0, 0, 3, 3], [1, 3, 3, 3]]]).repeat(30, 1, 1)  # [K, B, S]
    logits = reader.read(states)
    assert logits.shape == (60, 2, 3, 3)
    assert seen == [3]  # both rows with everything hidden, and the first one with a token
    for index in (0, 1, 2, 59):
        assert torch.equal(logits[index], reader.read(states[index]))
    different = torch.cartesian_prod(torch.zeros(1).long(), *[torch.arange(4)] * 3)[:, None].expand(-1, 2, -1)
    seen.clear()
    reader.read(different)
    assert seen == [128]  # nothing to gain
