"""Orders, the sets and states they lead through, and what a policy sees of them, by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orderppl.denoising import Canvas
from orderppl.states import (
    VISIBLE,
    UnmaskingState,
    enumerate_partitions,
    masked_before,
    partial_state,
    reveal_set,
    stacked_steps,
    steps_used,
)

from programs import TableDenoiser

ORDER = torch.tensor([[1, 0, 2], [0, 2, VISIBLE]])
TOKENS = torch.tensor([[5, 6, 7], [8, 9, 0]])


def test_sets_and_states_by_hand():
    assert masked_before(ORDER, 1).tolist() == [[True, False, True], [False, True, False]]
    assert reveal_set(ORDER, 1).tolist() == [[True, False, False], [False, False, False]]
    assert partial_state(TOKENS, masked_before(ORDER, 1), 99).tolist() == [[99, 6, 99], [8, 99, 0]]
    assert partial_state(TOKENS, masked_before(ORDER, 0), 99).tolist() == [[99, 99, 99], [99, 99, 0]]
    assert steps_used(ORDER).tolist() == [3, 3]
    assert steps_used(torch.tensor([[0, 1, 0], [VISIBLE] * 3])).tolist() == [2, 0]  # nothing to reveal, no step


def test_stacked_steps_broadcast_from_the_left():
    step = stacked_steps(4, ORDER)
    assert step.shape == (4, 1, 1)
    assert step.flatten().tolist() == [0, 1, 2, 3]
    assert masked_before(ORDER, step).shape == (4, 2, 3)
    assert masked_before(ORDER, torch.tensor([[0], [2]])).tolist() == [[True, True, True], [False, True, False]]


@given(st.integers(1, 6), st.data())
@settings(max_examples=50, deadline=None)
def test_reveal_sets_partition_what_is_masked(num_steps: int, data: st.DataObject):
    """For any order: the sets are disjoint, together everything masked, and M_{t+1} = M_t without z_t."""
    row = data.draw(st.lists(st.integers(-1, num_steps - 1), min_size=1, max_size=8))
    order = torch.tensor(row)
    step = stacked_steps(num_steps, order)
    sets, masked = reveal_set(order, step), masked_before(order, step)
    assert torch.equal(sets.sum(0), (order >= 0).long())
    assert torch.equal(masked[1:], masked[:-1] & ~sets[:-1])
    assert torch.equal(masked[-1], sets[-1])
    assert steps_used(order).item() == max(row) + 1


@pytest.mark.parametrize(("length", "steps"), [(1, 1), (1, 3), (3, 1), (3, 2), (4, 3)])
def test_enumerate_partitions(length: int, steps: int):
    orders = enumerate_partitions(length, steps)
    assert orders.shape == (steps**length, length)
    assert len(orders.unique(dim=0)) == steps**length
    assert orders.min() == 0
    assert orders.max() == steps - 1


def test_unmasking_state():
    denoiser = TableDenoiser()
    calls = []
    denoiser.register_forward_hook(lambda *_: calls.append(1))
    canvas = Canvas(denoiser, torch.tensor([[True, True, True], [True, True, False]]))
    masked = torch.tensor([[True, False, True], [False, True, False]]).expand(2, 2, 3)
    tokens = torch.where(masked, denoiser.mask_index, 1)
    state = UnmaskingState(tokens, masked, torch.tensor([[0, 0], [2, 2]]), 3, canvas)
    assert not calls  # lazy
    assert state.steps_left.tolist() == [[3, 3], [1, 1]]
    assert state.attention_mask.shape == masked.shape
    assert not state.attention_mask[:, 1, 2].any()
    assert torch.allclose(state.log_probs.exp().sum(-1), torch.ones(2, 2, 3), atol=1e-5)
    assert torch.allclose(state.log_probs, state.logits.log_softmax(-1))
    assert len(calls) == 1
