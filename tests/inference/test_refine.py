"""The local search on a plan against all plans of a short chain, alone and behind or between what is given."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from orderppl import Batch, UserError, follow
from orderppl.data import Chains, Trees
from orderppl.inference.refine import refine_plan
from orderppl.models.denoisers import MarkovChainDenoiser, TreeFieldDenoiser
from orderppl.policies import FixedOrder
from orderppl.unmasking import Denoiser

LENGTH, STEPS = 5, 3  # places of the plan


def log_likelihood(denoiser: Denoiser, batch: Batch, plan: Tensor) -> float:
    """Mean path log-likelihood of a fixed order, by the decoder."""
    return -float(follow(FixedOrder(plan.tolist()), denoiser, batch, STEPS).nats.double().mean())


def best_of_all(denoiser: Denoiser, batch: Batch, places: int) -> float:
    plans = torch.tensor(list(itertools.product(range(STEPS), repeat=places)))
    return max(log_likelihood(denoiser, batch, plan) for plan in plans)


def chains(length: int, given: list[int] | None = None) -> tuple[MarkovChainDenoiser, Batch]:
    """Rows of a chain of which some positions are given."""
    tokens = torch.from_numpy(Chains(length=length).sample(200, seed=0))
    known = torch.isin(torch.arange(length), torch.tensor(given or []))
    return MarkovChainDenoiser(4, 0.85, length), Batch(tokens, given=known.expand_as(tokens) if given else None)


CANVASES = {
    "alone": (LENGTH, None),
    "prompted": (LENGTH + 2, [0, 1]),
    "between": (LENGTH + 3, [0, 3, 4]),  # two stretches that know nothing of each other
    "far_apart": (LENGTH + 2, [2, 6]),
}


@pytest.mark.parametrize("canvas", CANVASES)
def test_reaches_the_best_of_all_plans(canvas: str) -> None:
    """Places are counted over the positions to reveal."""
    denoiser, batch = chains(*CANVASES[canvas])
    best = best_of_all(denoiser, batch, LENGTH)
    for start in (torch.zeros(LENGTH, dtype=torch.long), torch.tensor([0, 0, 1, 1, 2])):
        found = refine_plan(denoiser, batch, start, STEPS, screen=50, block=16)
        assert found.finished and torch.equal(found.start, start)
        assert found.before == pytest.approx(log_likelihood(denoiser, batch, start), abs=1e-4)
        assert found.after == pytest.approx(log_likelihood(denoiser, batch, found.steps), abs=1e-4)
        assert found.after == pytest.approx(best, abs=1e-4)
        assert (found.accepted == 0) == torch.equal(found.steps, start)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_say(side: str) -> None:
    """Rows of 3 in a canvas of 5: the likelihood is that of the 3, whatever stands in the padding."""
    denoiser, batch = chains(LENGTH)
    kept = slice(2, None) if side == "left" else slice(3)
    mask = torch.zeros(LENGTH, dtype=torch.bool)
    mask[kept] = True
    garbled = Batch(torch.where(mask, batch.tokens, 99), mask.expand_as(batch.tokens))
    start = torch.tensor([0, 1, 2, 0, 0])
    found = refine_plan(denoiser, garbled, start, STEPS)
    short = Batch(batch.tokens[:, kept])
    assert found.before == pytest.approx(log_likelihood(denoiser, short, start[:3]), abs=1e-4)
    assert found.after == pytest.approx(best_of_all(denoiser, short, 3), abs=1e-4)


def test_rows_of_different_lengths_share_a_plan() -> None:
    """Prompts of 0, 1 and 2 tokens, and given positions that differ from row to row."""
    denoiser, batch = chains(LENGTH + 2)
    generator = torch.Generator().manual_seed(1)
    prompt = torch.arange(LENGTH + 2) < torch.randint(3, (200, 1), generator=generator)
    batch = replace(batch, given=prompt | (torch.rand(prompt.shape, generator=generator) < 0.2))
    places = int(batch.latent.sum(-1).max())
    start = torch.arange(places) % STEPS
    found = refine_plan(denoiser, batch, start, STEPS)
    assert found.before == pytest.approx(log_likelihood(denoiser, batch, start), abs=1e-4)
    assert found.after == pytest.approx(log_likelihood(denoiser, batch, found.steps), abs=1e-4)
    assert found.finished and found.after > found.before


def test_an_index_says_which_place_a_position_looks_up() -> None:
    """The second half of every row shares the places of the first."""
    denoiser, batch = chains(6)
    index = torch.tensor([0, 1, 2, 2, 1, 0]).expand_as(batch.tokens)
    found = refine_plan(denoiser, batch, torch.zeros(3, dtype=torch.long), STEPS, index=index)
    plans = torch.tensor(list(itertools.product(range(STEPS), repeat=3)))
    values = [log_likelihood(denoiser, batch, plan[index[0]]) for plan in plans]
    assert found.after == pytest.approx(max(values), abs=1e-4)
    assert log_likelihood(denoiser, batch, found.steps[index[0]]) == pytest.approx(found.after, abs=1e-4)


@pytest.mark.parametrize("given", [None, [0, 8]])
def test_restarts_lead_out_of_a_local_optimum(given: list[int] | None) -> None:
    """The positions of a tree do not hang together in sequence: a climb alone ends at a gap of 0.378."""
    denoiser = TreeFieldDenoiser(4, 0.85, depth=4)
    tokens = torch.from_numpy(Trees(depth=4).sample(300, seed=11))
    known = torch.isin(torch.arange(15), torch.tensor(given or []))
    batch = Batch(tokens, given=known.expand_as(tokens))
    start = torch.randint(3, (15,), generator=torch.Generator().manual_seed(0))[: int((~known).sum())]
    alone = refine_plan(denoiser, batch, start, 3, screen=64)
    restarted = refine_plan(denoiser, batch, start, 3, screen=64, restarts=12)
    assert alone.finished and restarted.finished
    assert restarted.evaluations > alone.evaluations
    if given is None:
        assert restarted.after > alone.after
        assert denoiser.expected_cost(alone.steps) > 0.37
        assert denoiser.expected_cost(restarted.steps) == pytest.approx(0.2711, abs=1e-4)  # `best_order`
    assert restarted.after >= alone.after
    stopped = refine_plan(denoiser, batch, start, 3, screen=64, restarts=12, max_evaluations=alone.evaluations)
    assert not stopped.finished and stopped.after == alone.after
    assert stopped.evaluations <= alone.evaluations + 1


def test_stops_when_told() -> None:
    denoiser, batch = chains(LENGTH)
    start = torch.zeros(LENGTH, dtype=torch.long)
    found = refine_plan(denoiser, batch, start, STEPS, block=4, max_evaluations=5)
    assert not found.finished and found.evaluations < 12
    assert found.after >= found.before


def test_the_seed_is_all_that_chance_has_a_say_in() -> None:
    denoiser, batch = chains(LENGTH)
    start = torch.zeros(LENGTH, dtype=torch.long)
    plans = []
    for seed in (3, 3, 0, 1, 2):
        torch.manual_seed(len(plans))
        found = refine_plan(denoiser, batch, start, STEPS, block=4, max_evaluations=20, seed=seed)
        plans.append((tuple(found.steps.tolist()), found.evaluations))
    assert plans[0] == plans[1]
    assert len(set(plans)) > 1


def test_bad_input_is_named() -> None:
    denoiser, batch = chains(LENGTH)
    zeros = torch.zeros(LENGTH, dtype=torch.long)
    with pytest.raises(UserError, match="^steps: "):
        refine_plan(denoiser, batch, torch.full((LENGTH,), STEPS), STEPS)
    with pytest.raises(UserError, match="^steps: "):
        refine_plan(denoiser, batch, torch.full((LENGTH,), -1), STEPS)
    with pytest.raises(UserError, match="^batch: "):
        refine_plan(denoiser, batch.rows(slice(0)), zeros, STEPS)
    with pytest.raises(UserError, match=r"^steps: 3 places for rows of up to 5 positions to reveal"):
        refine_plan(denoiser, batch, zeros[:3], STEPS)
