"""The local search on a plan against all plans of a short chain."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from orderppl.data.chains import sample_chains
from orderppl.data.collate import tensors
from orderppl.data.trees import sample_trees
from orderppl.decoding import PlannedOrder, follow
from orderppl.denoising import Canvas
from orderppl.errors import UserError
from orderppl.inference import refine_plan
from orderppl.models.denoisers import MarkovChainDenoiser, TreeFieldDenoiser
from orderppl.states import enumerate_partitions

LENGTH, STEPS = 5, 3


def log_likelihood(denoiser: MarkovChainDenoiser, tokens: Tensor, plan: Tensor, attention_mask: Tensor) -> float:
    """Mean path log-likelihood of a fixed order, by the decoder."""
    path = follow(PlannedOrder(plan), Canvas(denoiser, attention_mask), tokens, STEPS)
    return -float(path.nats.double().mean())


@pytest.fixture
def chain() -> tuple[MarkovChainDenoiser, Tensor, Tensor]:
    tokens = tensors(sample_chains(200, length=LENGTH, seed=0))["tokens"]
    return MarkovChainDenoiser(4, 0.85, LENGTH), tokens, torch.ones_like(tokens, dtype=torch.bool)


def test_reaches_the_best_of_all_plans(chain: tuple[MarkovChainDenoiser, Tensor, Tensor]) -> None:
    denoiser, tokens, mask = chain
    every = [log_likelihood(denoiser, tokens, plan, mask) for plan in enumerate_partitions(LENGTH, STEPS)]
    for start in (torch.zeros(LENGTH, dtype=torch.long), torch.tensor([0, 0, 1, 1, 2])):
        found = refine_plan(denoiser, {"tokens": tokens}, start, STEPS, screen=50, block=16)
        assert found.finished and torch.equal(found.start, start)
        assert found.before == pytest.approx(log_likelihood(denoiser, tokens, start, mask), abs=1e-4)
        assert found.after == pytest.approx(log_likelihood(denoiser, tokens, found.steps, mask), abs=1e-4)
        assert found.after == pytest.approx(max(every), abs=1e-4)


def test_padding_has_no_say(chain: tuple[MarkovChainDenoiser, Tensor, Tensor]) -> None:
    """Rows of 3 in a canvas of 5: the likelihood is that of the 3, whatever stands in the padding."""
    denoiser, tokens, mask = chain
    short = mask & (torch.arange(LENGTH) < 3)
    start = torch.tensor([0, 1, 2, 0, 0])
    garbled = torch.where(short, tokens, 99)
    found = refine_plan(denoiser, {"tokens": garbled, "attention_mask": short}, start, STEPS)
    assert found.before == pytest.approx(log_likelihood(denoiser, tokens[:, :3], start[:3], mask[:, :3]), abs=1e-4)


def test_kicks_lead_out_of_a_local_optimum() -> None:
    """The positions of a tree do not hang together in sequence: a climb alone ends at a gap of 0.378."""
    denoiser = TreeFieldDenoiser(4, 0.85, depth=4)
    batch = tensors(sample_trees(300, seed=11))
    start = torch.randint(3, (15,), generator=torch.Generator().manual_seed(0))
    alone = refine_plan(denoiser, batch, start, 3, screen=64)
    kicked = refine_plan(denoiser, batch, start, 3, screen=64, kicks=12)
    assert alone.finished and kicked.finished
    assert kicked.after > alone.after and kicked.evaluations > alone.evaluations
    assert denoiser.expected_cost(alone.steps) > 0.37
    assert denoiser.expected_cost(kicked.steps) == pytest.approx(0.2711, abs=1e-4)  # `best_order`
    stopped = refine_plan(denoiser, batch, start, 3, screen=64, kicks=12, max_evaluations=alone.evaluations)
    assert not stopped.finished and stopped.after == alone.after
    assert stopped.evaluations <= alone.evaluations + 1


def test_stops_when_told(chain: tuple[MarkovChainDenoiser, Tensor, Tensor]) -> None:
    denoiser, tokens, _ = chain
    start = torch.zeros(LENGTH, dtype=torch.long)
    found = refine_plan(denoiser, {"tokens": tokens}, start, STEPS, block=4, max_evaluations=5)
    assert not found.finished and found.evaluations < 12
    assert found.after >= found.before


def test_bad_input_is_named(chain: tuple[MarkovChainDenoiser, Tensor, Tensor]) -> None:
    denoiser, tokens, _ = chain
    with pytest.raises(UserError, match="steps"):
        refine_plan(denoiser, {"tokens": tokens}, torch.full((LENGTH,), STEPS), STEPS)
    with pytest.raises(UserError, match="batch"):
        refine_plan(denoiser, {"tokens": tokens[:0]}, torch.zeros(LENGTH, dtype=torch.long), STEPS)
