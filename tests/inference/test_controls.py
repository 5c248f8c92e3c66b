"""The controls of a learned order, each by the loop a user calls: tied, random and frozen against trained."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orderppl import Batch, fit
from orderppl.guides import Guide, MeanFieldGuide, PolicyGuide
from orderppl.inference import RevealTraceGraph_ELBO
from orderppl.inference.trainer import FitResult
from orderppl.models import LearnedPolicy, UnmaskingModel
from orderppl.policies import Plan, RandomSteps, Smoothed, Threshold

from programs import LENGTH, VOCAB, PlaceTable, StateTable, TableDenoiser, TokenTable, TruthTable

STEPS, PROMPT = 3, 2
every_canvas = pytest.mark.parametrize("canvas", ["alone", "prompted", "between"])


def data(canvas: str) -> Batch:
    """Rows with three positions to reveal: alone, behind prompts of one or two tokens, or with one given between."""
    generator = torch.Generator().manual_seed(0)
    width = LENGTH + {"alone": 0, "prompted": PROMPT, "between": 1}[canvas]
    tokens = torch.randint(0, VOCAB, (32, width), generator=generator)
    column = torch.arange(width)
    if canvas == "alone":
        return Batch(tokens)
    if canvas == "between":
        return Batch(tokens, given=(column == torch.arange(32)[:, None] % 3))
    attended = column >= torch.arange(32)[:, None] % 2  # every second prompt has one token
    return Batch(tokens, attended, (column < PROMPT) & attended)


def strong_denoiser() -> TableDenoiser:
    """A denoiser whose likelihood depends strongly on the order."""
    denoiser = TableDenoiser()
    with torch.no_grad():
        denoiser.table.mul_(2)
    return denoiser


def trained(
    model: nn.Module, guide: nn.Module, canvas: str, rate: float = 0.1, updates: int = 40, **changes: Any
) -> FitResult:
    settings = {"optimizer": partial(torch.optim.Adam, lr=rate), "batch_size": 32, "seed": 0, "progress": False}
    objective = RevealTraceGraph_ELBO(4)
    return fit(model, guide, data(canvas), objective=objective, updates=updates, **(settings | changes))


def mean(result: FitResult, name: str, part: slice) -> float:
    values = [record[name] for record in result.trace[part]]
    return sum(values) / len(values)


FIRST, LAST = slice(None, 3), slice(-10, None)


def parameters_of(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


class Watching(torch.optim.Adam):
    """Notes at every update which of some parameters have a gradient."""

    def __init__(self, params: Any, watched: dict[str, nn.Parameter], notes: list[set[str]], lr: float) -> None:
        super().__init__(params, lr=lr)
        self.watched, self.notes = watched, notes

    def step(self, closure: Any = None) -> Any:
        self.notes.append({name for name, p in self.watched.items() if p.grad is not None})
        return super().step(closure)


def own_parameters(guide: Guide) -> dict[str, nn.Parameter]:
    """Of the order, not of the denoiser that a guide may read."""
    return {name: p for name, p in guide.named_parameters() if not name.startswith("denoiser.")}


@every_canvas
@pytest.mark.parametrize("kind", ["policy", "plan"])
def test_without_a_posterior_the_policy_is_learned_at_kl_0(kind: str, canvas: str) -> None:
    denoiser = strong_denoiser()
    policy = LearnedPolicy(StateTable()) if kind == "policy" else Plan(PlaceTable(STEPS))
    model, guide = UnmaskingModel(denoiser, policy, STEPS), PolicyGuide(policy, denoiser, STEPS)
    result = trained(model, guide, canvas, updates=40 if canvas == "alone" else 100)  # given tokens differ by row
    assert all(record["kl"] == pytest.approx(0.0, abs=1e-5) for record in result.trace)
    assert mean(result, "elbo", LAST) > mean(result, "elbo", FIRST) + 0.3


@every_canvas
def test_with_a_random_posterior_the_prior_goes_to_it(canvas: str) -> None:
    """The guide has nothing to learn and the denoiser is frozen: all that can rise is -KL(q || p), up to 0."""
    denoiser, network = strong_denoiser(), PlaceTable(STEPS)
    with torch.no_grad():
        network.table.mul_(2)  # far from where it has to go
    model = UnmaskingModel(denoiser, Plan(network), STEPS)
    guide = PolicyGuide(RandomSteps(), denoiser, STEPS)
    assert not own_parameters(guide)
    result = trained(model, guide, canvas)
    assert mean(result, "kl", FIRST) > 0.3
    assert 0 <= mean(result, "kl", LAST) < 0.1 * mean(result, "kl", FIRST)
    assert mean(result, "elbo", LAST) > mean(result, "elbo", FIRST) + 0.3


@every_canvas
def test_with_a_heuristic_posterior_the_prior_goes_to_it(canvas: str) -> None:
    """A policy that reads the same certainty can come close to a smoothed threshold; the likelihood stays."""
    denoiser = strong_denoiser()
    model = UnmaskingModel(denoiser, LearnedPolicy(StateTable(), non_empty=False), STEPS)
    guide = PolicyGuide(Smoothed(Threshold(0.5), 0.2, non_empty=False), denoiser, STEPS)
    assert not own_parameters(guide)
    result = trained(model, guide, canvas, updates=100)
    assert mean(result, "kl", LAST) < 0.3 * mean(result, "kl", FIRST)
    assert mean(result, "log_likelihood", LAST) == pytest.approx(mean(result, "log_likelihood", FIRST), abs=0.2)


@every_canvas
@pytest.mark.parametrize("posterior", ["mean_field", "none", "sees_truth"])
def test_a_frozen_denoiser_stays_and_has_no_gradient(posterior: str, canvas: str) -> None:
    denoiser = strong_denoiser()
    model, guide = order_pair(denoiser, posterior)
    own = own_parameters(guide)
    before, order_before = parameters_of(denoiser), {name: p.detach().clone() for name, p in own.items()}
    notes: list[set[str]] = []
    watched = own | {f"denoiser.{name}": p for name, p in denoiser.named_parameters()}
    trained(model, guide, canvas, updates=5, optimizer=partial(Watching, watched=watched, notes=notes, lr=0.1))
    assert notes == [set(own)] * 5 and own
    assert all(torch.equal(*both) for both in zip(denoiser.parameters(), before, strict=True))
    assert any(not torch.equal(p, order_before[name]) for name, p in own.items())


@every_canvas
@pytest.mark.parametrize("posterior", ["mean_field", "none"])
def test_denoiser_and_order_are_learned_together(posterior: str, canvas: str) -> None:
    """Joint training moves both, and beats the same order learned with the denoiser it starts from."""
    results = {}
    for joint in (True, False):
        torch.manual_seed(0)
        denoiser = TableDenoiser()
        model, guide = order_pair(denoiser, posterior)
        own = own_parameters(guide)
        before, order_before = parameters_of(denoiser), {name: p.detach().clone() for name, p in own.items()}
        results[joint] = trained(model, guide, canvas, train_denoiser=joint)
        moved = [not torch.equal(*both) for both in zip(denoiser.parameters(), before, strict=True)]
        assert all(moved) == any(moved) == joint
        assert any(not torch.equal(p, order_before[name]) for name, p in own.items())
    assert mean(results[True], "elbo", LAST) > mean(results[True], "elbo", FIRST) + 0.5
    assert mean(results[True], "elbo", LAST) > mean(results[False], "elbo", LAST) + 0.3


def order_pair(denoiser: nn.Module, posterior: str) -> tuple[UnmaskingModel, Guide]:
    """A guide of its own against a fixed prior, one beside a learned prior, or the policy as its own guide."""
    if posterior == "mean_field":
        return UnmaskingModel(denoiser, RandomSteps(), STEPS), MeanFieldGuide(TokenTable(STEPS), STEPS)
    policy = LearnedPolicy(StateTable())
    own = policy if posterior == "none" else LearnedPolicy(TruthTable())
    return UnmaskingModel(denoiser, policy, STEPS), PolicyGuide(own, denoiser, STEPS)
