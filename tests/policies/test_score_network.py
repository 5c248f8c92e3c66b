"""The network of a Plackett-Luce guide is no plan of steps."""

from __future__ import annotations

import pytest
import torch

from orderppl import UserError, decode
from orderppl.guides import PlackettLuceGuide
from orderppl.models import PositionTable
from orderppl.models.denoisers import MarkovChainDenoiser
from orderppl.policies import Plan


def test_scores_of_a_ranking_are_refused_as_a_plan() -> None:
    """One class of steps would be step 0 for all positions."""
    guide = PlackettLuceGuide(PositionTable(6, 1), 3)
    hidden = torch.full((2, 6), 4)
    with pytest.raises(UserError, match="network: gives one number per position, as for a ranking"):
        decode(MarkovChainDenoiser(4, 0.85, 6), Plan(guide.network), hidden, max_steps=3)
    one = decode(MarkovChainDenoiser(4, 0.85, 6), Plan(guide.network), hidden, max_steps=1)
    assert (one.reveal_step == 0).all()  # of a single step it is one
