"""Learned opponents: their parts by hand, and the whole comparison at a size at which the numbers mean nothing."""

from __future__ import annotations

import math
from pathlib import Path

import learned_opponents
import peers
import pytest
import torch
from torch import Tensor, nn

from orderppl import Batch, State, fit
from orderppl.data import Sudoku
from orderppl.evaluation.results import read_results
from orderppl.guides import PolicyGuide
from orderppl.models import LearnedPolicy, PolicyNetwork, UnmaskingModel
from orderppl.models.denoisers import load_denoiser
from orderppl.policies import PriceRange
from orderppl.policies.policy import LOGIT_LIMIT
from orderppl.unmasking.trajectory import Path as Sequences

DENOISER = Path(__file__).parents[2] / "docs" / "results" / "sudoku" / "denoiser"


class Rows(nn.Module):
    """Two classes, position i is sure of the first by sigmoid(i)."""

    vocab_size, mask_index = 2, 2

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        place = torch.arange(tokens.shape[-1], dtype=torch.get_default_dtype())
        return torch.stack([place, torch.zeros_like(place)], -1).expand(*tokens.shape, -1)


class Given(nn.Module):
    """Log-odds that are given."""

    def __init__(self, probs: list[float]) -> None:
        super().__init__()
        self.logits = torch.tensor(probs).logit()

    def forward(self, state: State) -> Tensor:
        return self.logits.expand(state.shape)


def opening(prompt: int, size: int) -> State:
    """Everything hidden behind a prompt."""
    given = torch.arange(size)[None] < prompt
    return Sequences(Batch(torch.zeros(1, size, dtype=torch.int64), None, given), Rows(), 4).opening()


@pytest.mark.parametrize(
    ("factor", "expected"), [(1.0, [[False, True, True, False]]), (0.4, [[False, True, False, False]])]
)
def test_as_many_as_are_expected(factor: float, expected: list[list[bool]]) -> None:
    """0.3 + 0.9 + 0.8 + 0.1 = 2.1 positions, the two most probable; at least one."""
    policy = peers.ExpectedCount(LearnedPolicy(Given([0.3, 0.9, 0.8, 0.1])), factor)
    assert policy(opening(0, 4)).mode.tolist() == expected


def test_the_filter_reads_confidences_and_lets_the_surest_pass() -> None:
    """Behind a prompt of two positions, on a canvas that is longer than the row."""
    torch.manual_seed(0)
    network, state = peers.ConfidenceFilter(5), opening(2, 5)
    seen = torch.tensor([1 / (1 + math.exp(-place)) for place in (2, 3, 4)])
    expected = network.layers(nn.functional.pad(seen, (0, 2)))
    found = network(state)[0]
    torch.testing.assert_close(found[2:4], expected[:2])
    assert found[4] == LOGIT_LIMIT


def test_every_opponent_is_fitted_and_compared(tmp_path: Path) -> None:
    data, denoiser = Sudoku(train=40, validation=20, test=20, min_clues=2, max_clues=4), load_denoiser(DENOISER)
    prices = PriceRange(0.2, 2.0)
    policy = LearnedPolicy(PolicyNetwork(data.vocab_size, width=16, layers=1, features=("price",), prices=prices))
    model = UnmaskingModel(denoiser, policy, 4, step_price=prices)
    run = tmp_path / "run"
    fit(model, PolicyGuide(policy, denoiser, 4), data, updates=6, batch_size=8, seed=0, out=run, progress=False)
    learned_opponents.main([run], rows=8, targets=[4.0], out=tmp_path / "out")
    found = read_results(tmp_path / "out")
    names = {"learn2pd", "policy_gradient", "policy_gradient sas", "dultra"}
    assert names | {"learned"} == set(found["config"]["spent"])
    budget = found["config"]["spent"]["learned"]
    assert budget == 6 * 8 * (1 + 3 * 8)
    assert all(0 < spent <= budget for spent in found["config"]["spent"].values())
    families = {record["family"] for record in found["records"] if record["metric"] == "accuracy"}
    assert families == names | {"learned"}
    against = {r["of"].rpartition(" #")[0] for r in found["records"] if r["metric"] == "advantage"}
    assert against and against <= names
    learned_opponents.main([run], rows=8, targets=[0.5], out=tmp_path / "out")  # where nobody is that fast
    assert {record["metric"] for record in read_results(tmp_path / "out")["records"]} >= {"accuracy", "path_nats"}
