"""Agreement of scores with drawn reveal sets, by hand and against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from orderppl.diagnostics import to_inference_data
from orderppl.diagnostics.agreement import agreement, auroc, overlap
from orderppl.errors import UserError
from orderppl.guides import PolicyGuide
from orderppl.models import LearnedPolicy
from orderppl.policies import Ranked, Threshold
from orderppl.unmasking import Batch

from chain_programs import (
    chain_batch,
    chain_programs,
    fixed_guide,
    left_to_right,
    random_guide,
    with_holes,
)

nan = np.nan


@pytest.mark.parametrize(
    ("score", "revealed", "masked", "area", "shared"),
    [
        ([4, 3, 2, 1], [1, 1, 0, 0], [1, 1, 1, 1], 1, 1),
        ([1, 2, 3, 4], [1, 1, 0, 0], [1, 1, 1, 1], 0, 0),
        ([4, 1, 3, 2], [1, 1, 0, 0], [1, 1, 1, 1], 2 / 4, 1 / 2),
        ([5, 5, 5, 5], [1, 1, 0, 0], [1, 1, 1, 1], 1 / 2, 1 / 2),  # ties at random
        ([5, 2, 2, 2], [1, 1, 0, 0], [1, 1, 1, 1], 3 / 4, (1 + 1 / 3) / 2),
        ([9, 1, nan, 2], [0, 1, 0, 0], [0, 1, 0, 1], 0, 0),  # the highest score is not masked
        ([1, 2, 3, 4], [1, 1, 1, 1], [1, 1, 1, 1], nan, 1),
        ([1, 2, 3, 4], [0, 0, 0, 0], [1, 1, 1, 1], nan, nan),
    ],
)
def test_auroc_and_overlap_by_hand(score, revealed, masked, area, shared):
    arrays = np.array([score], float), np.array([revealed], bool), np.array([masked], bool)
    assert auroc(*arrays)[0] == pytest.approx(area, nan_ok=True)
    assert overlap(*arrays)[0] == pytest.approx(shared, nan_ok=True)


def test_auroc_is_the_share_of_pairs():
    generator = np.random.default_rng(0)
    score = generator.integers(0, 5, size=(50, 9)).astype(float)
    masked = generator.random((50, 9)) < 0.8
    revealed = masked & (generator.random((50, 9)) < 0.4)
    for row, area in enumerate(auroc(score, revealed, masked)):
        positive, negative = score[row][revealed[row]], score[row][masked[row] & ~revealed[row]]
        if len(positive) and len(negative):
            pairs = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
            assert area == pytest.approx(pairs.mean())


class Silent(nn.Module):
    """A network that corrects nothing."""

    def forward(self, state):
        return torch.zeros(state.shape)


def test_a_policy_agrees_with_itself_and_left_to_right_with_its_order():
    """Exact chain, L = 6, T = 3: a left-to-right policy ranks what its own guide reveals, and not the reverse.

    One row is padded, one has given positions in the middle.
    """
    policy = LearnedPolicy(Silent(), base=Ranked("left_to_right", temperature=0.25))
    model, _ = chain_programs(6, 3, policy)
    batch = with_holes(chain_batch(4, 6), given=[[2, 1], [2, 3]], padding=[[1, 4], [1, 5]])
    own = agreement(to_inference_data(model, PolicyGuide(policy, model.denoiser, 3), batch, num_samples=20))
    assert own["auroc"].sel(score="prior_prob").mean() > 0.95
    # Positions of one set tie while their scores do not: two sets of two have a rho of at most 0.894.
    assert own["correlation"].sel(score="prior_prob").mean() > 0.8
    assert own["auroc"].sel(step=2).isnull().all()  # the last step has no choice
    backwards = fixed_guide(left_to_right(6, 3).flip(0), 3, 20.0)
    other = agreement(to_inference_data(model, backwards, chain_batch(4, 6), num_samples=20))
    assert other["auroc"].sel(score="prior_prob").mean() < 0.05
    assert other["correlation"].sel(score="prior_prob").mean() < -0.8
    assert other["auroc"].sel(score="guide_prob").mean() == 1
    assert float(other["overlap_chance"].sel(step=0).mean()) == pytest.approx(1 / 3)


def test_a_random_guide_is_at_chance():
    """40 sequences, 50 draws: mean AUROC 0.5 and overlap at chance for every score, within 0.03."""
    model, _ = chain_programs(6, 3, num_states=4)
    data = to_inference_data(model, random_guide(3), chain_batch(40, 6, 4), num_samples=50, num_state_draws=50)
    found = agreement(data)
    assert (np.abs(found["auroc"].mean(("chain", "draw", "sequence", "step")) - 0.5) < 0.03).all()
    difference = (found["overlap"] - found["overlap_chance"]).mean(("chain", "draw", "sequence", "step"))
    assert (np.abs(difference) < 0.03).all()


@pytest.mark.parametrize("given", [False, True])
def test_scores_are_those_of_the_states(given):
    """First state of a chain is blind; in the last one the neighbours speak; the oracle sees the truth.

    Whether a neighbour was given or revealed at the first step makes no difference.
    """
    model, _ = chain_programs(4, 2)
    batch = with_holes(Batch(torch.tensor([[0, 0, 2, 0]])), given=[[0, 3]] if given else [], padding=[])
    guide = fixed_guide(torch.tensor([0, 1, 1, 0]), 2, 60.0)  # counts the positions to reveal
    states = to_inference_data(model, guide, batch, num_samples=2, num_state_draws=1)["states"]
    states = states.isel(chain=0, draw=0, sequence=0)
    assert states["masked"].values.tolist() == [[True, True, True, not given], [False, True, True, False]]
    if not given:
        assert states["top_prob"].sel(step=0).values == pytest.approx(np.full(4, 1 / 3), abs=1e-6)
        assert states["entropy"].sel(step=0).values == pytest.approx(np.full(4, -np.log(3)), abs=1e-5)
    assert np.isnan(states["top_prob"].sel(step=1).values[[0, 3]]).all()
    stay, move = 0.85, 0.075
    two = {0: stay**2 + 2 * move**2, 1: 2 * stay * move + move**2}  # two steps of the chain
    weight = np.array([stay * two[0], move * two[1], move * two[1]])  # between 0 and a 0 two steps away
    probs = weight / weight.sum()
    last = states.sel(step=1)
    assert last["top_prob"].values[1:3] == pytest.approx(np.full(2, probs[0]), abs=1e-5)
    assert last["margin"].values[1] == pytest.approx(probs[0] - probs[1], abs=1e-5)
    assert last["oracle_margin"].values[1:3] == pytest.approx([probs[0] - probs[1], probs[2] - probs[0]], abs=1e-5)


def test_faults_are_named():
    model, _ = chain_programs(4, 2, Threshold(0.5, temperature=1.0))
    guide = PolicyGuide(model.policy, model.denoiser, 2)
    data = to_inference_data(model, guide, chain_batch(2, 4), num_samples=3, num_state_draws=0)
    with pytest.raises(UserError, match="states: no such group"):
        agreement(data)
