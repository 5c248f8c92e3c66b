"""The states along an order: how many denoiser calls they take, who shares them, when they are freed."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from pyro.ops.provenance import get_provenance, track_provenance
from torch import Tensor

from orderppl import path as path_module
from orderppl.denoising import Canvas
from orderppl.distributions import SequentialReveal, StepwiseReveal
from orderppl.models import EasyFirst, LearnedPolicy, UniformSteps
from orderppl.path import RevealPath
from orderppl.states import masked_before, partial_state

from programs import LENGTH, StateTable, TableDenoiser, make_batch

STEPS = 3


class CountingDenoiser(TableDenoiser):
    """Counts its calls and the rows it has scored."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        self.calls.append(len(state))
        return super().forward(state, attention_mask)


def make_path(frozen: bool = True, one_step: bool = False, num_steps: int = STEPS) -> RevealPath:
    batch = make_batch()
    denoiser = CountingDenoiser().requires_grad_(not frozen)
    return RevealPath(Canvas(denoiser, batch["attention_mask"]), batch["tokens"], num_steps, one_step)


def draw_order(path: RevealPath, *lead: int) -> Tensor:
    logits = torch.zeros(path.tokens.shape + (path.num_steps,))
    return StepwiseReveal(logits, path.attention_mask).sample(lead)


@pytest.mark.parametrize("lead", [(), (5,), (2, 5)])
def test_states_of_an_order(lead: tuple[int, ...]):
    path = make_path()
    order = draw_order(path, *lead)
    state = path(order)
    assert state.tokens.shape == (STEPS, *order.shape)
    assert state.step.shape == (STEPS, *order.shape[:-1])
    for t in range(STEPS):
        masked = masked_before(order, t)
        assert torch.equal(state.masked[t], masked)
        assert torch.equal(state.tokens[t], partial_state(path.tokens.expand_as(order), masked, 4))
        assert (state.step[t] == t).all()
    assert not state.masked[..., ~path.attention_mask].any()
    assert path.canvas.denoiser.calls == []  # no call before someone asks
    assert state.logits.shape == (STEPS, *order.shape, 4)
    # All steps and particles in one call, in which the first state of a sequence, fully masked, comes only once.
    sequences, particles = len(path.tokens), order[..., 0].numel() // len(path.tokens)
    assert path.canvas.denoiser.calls == [sequences * (1 + (STEPS - 1) * particles)]
    assert torch.equal(state.logits, path.canvas.logits(state.tokens))
    assert torch.equal(state.log_probs, state.logits.log_softmax(-1))


def test_same_order_same_states():
    path = make_path()
    order = draw_order(path)
    state = path(order)
    assert path(order) is state
    assert path(track_provenance(order, frozenset({"reveal_step"}))) is state  # the plain tensor behind is the same
    assert path(order.clone()) is not state
    assert not get_provenance(state.tokens)


def test_an_order_without_the_batch_is_broadcast():
    path = make_path()
    orders = torch.cartesian_prod(*[torch.arange(STEPS)] * LENGTH).unsqueeze(1)  # [N, 1, L], as enumeration gives
    assert path(orders).tokens.shape == (STEPS, STEPS**LENGTH, 4, LENGTH)


def test_one_step_looks_at_one_state_per_sequence():
    path = make_path(one_step=True)
    order = draw_order(path, 5)
    state = path(order)
    assert state.tokens.shape == (1, 5, 4, LENGTH)
    assert torch.equal(state.step, path.steps.expand(1, 5, 4).reshape(1, 5, 4))  # shared by the particles
    assert torch.equal(state.masked[0], order >= path.steps[0].unsqueeze(-1))


def test_one_step_is_uniform_and_spread_over_the_batch():
    """n = 4,000 batches of 6 sequences over 3 steps: every row uniform, |z| < 5; each batch has every step twice."""
    n = 4000
    steps = torch.cat([path_module._one_step_each(6, STEPS, torch.device("cpu")) for _ in range(n)])  # [n, 6]
    error = (n * (1 / 3) * (2 / 3)) ** 0.5
    for t in range(STEPS):
        assert (((steps == t).sum(0) - n / 3) / error).abs().max() < 5
        assert ((steps == t).sum(1) == 2).all()
    assert steps.min() == 0
    assert steps.max() == STEPS - 1


def test_states_met_while_drawing_are_kept():
    """T calls draw the order; scoring it, on this path or on another of the same batch, takes no further one."""
    path = make_path()
    policy = LearnedPolicy(StateTable())
    order = SequentialReveal(path, policy.distribution).sample()
    calls = path.canvas.denoiser.calls
    assert calls == [4] * STEPS
    logits = path(order).logits
    other = RevealPath(path.canvas, path.tokens, STEPS)
    assert other(order) is path(order)
    assert other(order).logits is logits
    assert calls == [4] * STEPS
    fresh = RevealPath(path.canvas, path.tokens, STEPS)
    assert torch.allclose(logits, fresh(order.clone()).logits)
    assert calls == [4] * STEPS + [4 * STEPS]


def test_a_policy_that_ignores_the_logits_makes_no_call():
    path = make_path()
    order = SequentialReveal(path, UniformSteps().distribution).sample()
    assert path.canvas.denoiser.calls == []
    assert path(order).logits.shape == (STEPS, 4, LENGTH, 4)
    assert path.canvas.denoiser.calls == [4 * STEPS]


def test_states_of_a_trainable_denoiser_are_kept_with_their_gradient():
    """T calls draw the order, and scoring it elsewhere gives the gradient of a fresh stack; a graph serves once."""
    path = make_path(frozen=False)
    denoiser = path.canvas.denoiser
    order = SequentialReveal(path, EasyFirst(0.5).distribution).sample()
    assert denoiser.calls == [4] * STEPS
    slopes = []
    for _ in range(2):
        states = RevealPath(path.canvas, path.tokens, STEPS)(order)
        states.token_log_prob(path.tokens).square().sum().backward()
        slopes.append(denoiser.table.grad)
        denoiser.table.grad = None
    assert denoiser.calls == [4] * STEPS + [4 * STEPS]
    assert slopes[0].abs().sum() > 0
    torch.testing.assert_close(slopes[0], slopes[1])


def test_states_met_without_a_gradient_are_not_kept_for_one():
    path = make_path(frozen=False)
    with torch.no_grad():
        order = SequentialReveal(path, EasyFirst(0.5).distribution).sample()
    assert path(order).logits.requires_grad
    # The last step reveals everything unasked; the order is scored anew.
    assert path.canvas.denoiser.calls == [4] * (STEPS - 1) + [4 * STEPS]


def test_states_are_not_kept_across_an_update_of_the_denoiser():
    path = make_path(frozen=False)
    order = SequentialReveal(path, EasyFirst(0.5).distribution).sample()
    with torch.no_grad():
        path.canvas.denoiser.table.add_(torch.randn_like(path.canvas.denoiser.table))
    found = RevealPath(path.canvas, path.tokens, STEPS)(order).logits
    torch.testing.assert_close(found, RevealPath(path.canvas, path.tokens, STEPS)(order.clone()).logits)


def test_states_are_not_shared_with_another_batch_or_budget():
    path = make_path()
    order = SequentialReveal(path, EasyFirst(0.5).distribution).sample()
    kept = path(order)
    longer = RevealPath(path.canvas, path.tokens, STEPS + 1)
    other_tokens = RevealPath(path.canvas, path.tokens.clone(), STEPS)
    other_denoiser = RevealPath(Canvas(CountingDenoiser(), path.attention_mask), path.tokens, STEPS)
    one_step = RevealPath(path.canvas, path.tokens, STEPS, one_step=True)
    context = torch.zeros(4, 0, dtype=torch.int64)
    prompted = RevealPath(Canvas(path.canvas.denoiser, path.attention_mask, context), path.tokens, STEPS)
    for stranger in (longer, other_tokens, other_denoiser, one_step, prompted):
        assert stranger(order) is not kept
    assert torch.equal(other_tokens(order).tokens, kept.tokens)


def test_kept_states_are_freed_with_their_order():
    """No reference cycle: with the collector off, everything goes as the last name of the order does."""
    gc.collect()
    before = len(path_module._FOLLOWED)
    gc.disable()
    try:
        path = make_path()
        order = SequentialReveal(path, EasyFirst(0.5).distribution).sample()
        logits = weakref.ref(path(order).logits)
        assert len(path_module._FOLLOWED) == before + 1
        other = RevealPath(path.canvas, path.tokens, STEPS)
        other(order)
        del path, other
        assert logits() is not None
        assert len(path_module._FOLLOWED) == before + 1  # still alive: so is the order
        del order
        assert logits() is None
        assert len(path_module._FOLLOWED) == before
    finally:
        gc.enable()


def test_rows_that_agree_are_read_once():
    """The denoiser gets each partially revealed sequence once per prompt, and every particle its logits."""
    seen = []

    class Recorder(torch.nn.Module):
        mask_index, vocab_size = 3, 3

        def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
            seen.append(len(state))
            return (state * torch.arange(1, state.shape[1] + 1)).double().unsqueeze(-1) + torch.arange(3.0)

    context = torch.tensor([[0], [1]])
    canvas = Canvas(Recorder(), torch.ones(2, 3, dtype=torch.bool), context)
    states = torch.tensor([[[3, 3, 3], [3, 3, 3]], [[0, 3, 3], [3, 3, 3]]]).repeat(30, 1, 1)  # [K, B, L]
    logits = canvas.logits(states)
    assert seen == [3]  # both prompts with everything hidden, and the first one with a token
    for index in (0, 1, 2, 59):
        assert torch.equal(logits[index], canvas.logits(states[index]))
    different = torch.cartesian_prod(*[torch.arange(4)] * 3)[:, None].expand(-1, 2, -1)  # [64, B, L]
    seen.clear()
    canvas.logits(different)
    assert seen == [128]  # nothing to gain
