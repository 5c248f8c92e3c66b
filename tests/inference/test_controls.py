"""The controls of a learned order, each by the loop a user calls: tied, random and frozen against trained."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from orderppl.guides import MeanFieldGuide, PolicyGuide, RandomGuide
from orderppl.inference import BatchStream, FitResult, RevealTraceGraph_ELBO, fit
from orderppl.inference.objective import Objective
from orderppl.models import LearnedPolicy, LearnedSteps, UniformSteps, UnmaskingModel

from programs import LENGTH, VOCAB, StateTable, TableDenoiser, TokenTable

STEPS = 3


def stream() -> BatchStream:
    tokens = torch.randint(0, VOCAB, (32, LENGTH))
    return BatchStream({"tokens": tokens, "attention_mask": torch.ones_like(tokens, dtype=torch.bool)}, 32, seed=0)


def frozen_denoiser() -> nn.Module:
    """A denoiser whose likelihood depends strongly on the order."""
    denoiser = TableDenoiser().requires_grad_(False)
    denoiser.table.mul_(2)
    return denoiser


def trained(model: nn.Module, guide: nn.Module, rate: float = 0.1, updates: int = 40) -> FitResult:
    optimizer = partial(torch.optim.Adam, lr=rate)
    elbo: Objective = RevealTraceGraph_ELBO(4)
    return fit(model, guide, stream(), elbo=elbo, updates=updates, optimizer=optimizer, progress=False)


def mean(result: FitResult, name: str, part: slice) -> float:
    values = [record[name] for record in result.trace[part]]
    return sum(values) / len(values)


FIRST, LAST = slice(None, 3), slice(-10, None)


def parameters_of(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def test_without_a_posterior_the_policy_is_learned_at_kl_0() -> None:
    denoiser, policy = frozen_denoiser(), LearnedPolicy(StateTable())
    model, guide = UnmaskingModel(denoiser, policy, STEPS), PolicyGuide(policy, denoiser, STEPS)
    result = trained(model, guide)
    assert all(record["kl"] == pytest.approx(0.0, abs=1e-5) for record in result.trace)
    assert mean(result, "elbo", LAST) > mean(result, "elbo", FIRST) + 0.3


def test_with_a_random_posterior_the_prior_goes_to_it() -> None:
    """The guide has nothing to learn and the denoiser is frozen: all that can rise is -KL(q || p), up to 0."""
    prior = LearnedSteps(TokenTable(STEPS))
    model, guide = UnmaskingModel(frozen_denoiser(), prior, STEPS), RandomGuide(STEPS)
    assert not list(guide.parameters())
    result = trained(model, guide)
    assert mean(result, "kl", FIRST) > 0.3
    assert 0 <= mean(result, "kl", LAST) < 0.1 * mean(result, "kl", FIRST)
    assert mean(result, "elbo", LAST) > mean(result, "elbo", FIRST) + 0.3


@pytest.mark.parametrize("posterior", [True, False])
def test_a_frozen_denoiser_stays_and_has_no_gradient(posterior: bool) -> None:
    denoiser = frozen_denoiser()
    model, guide = order_pair(denoiser, posterior)
    before, order_before = parameters_of(denoiser), parameters_of(guide)
    trained(model, guide, updates=5)
    assert all(parameter.grad is None for parameter in denoiser.parameters())
    assert all(torch.equal(*both) for both in zip(denoiser.parameters(), before, strict=True))
    learned = [p for p in guide.parameters() if p.requires_grad]
    assert learned and all(p.grad is not None for p in learned)
    assert any(not torch.equal(*both) for both in zip(guide.parameters(), order_before, strict=True))


@pytest.mark.parametrize("posterior", [True, False])
def test_denoiser_and_order_are_learned_together(posterior: bool) -> None:
    """Joint training moves both, and beats the same order learned with the denoiser it starts from."""
    results = {}
    for joint in (True, False):
        torch.manual_seed(0)
        denoiser = TableDenoiser().requires_grad_(joint)
        model, guide = order_pair(denoiser, posterior)
        before, order_before = parameters_of(denoiser), parameters_of(guide)
        results[joint] = trained(model, guide)
        moved = [not torch.equal(*both) for both in zip(denoiser.parameters(), before, strict=True)]
        assert all(moved) == any(moved) == joint
        assert any(not torch.equal(*both) for both in zip(guide.parameters(), order_before, strict=True))
    assert mean(results[True], "elbo", LAST) > mean(results[True], "elbo", FIRST) + 0.5
    assert mean(results[True], "elbo", LAST) > mean(results[False], "elbo", LAST) + 0.3


def order_pair(denoiser: nn.Module, posterior: bool) -> tuple[UnmaskingModel, nn.Module]:
    """A guide of its own against a fixed prior, or the policy as its own guide."""
    if posterior:
        return UnmaskingModel(denoiser, UniformSteps(), STEPS), MeanFieldGuide(TokenTable(STEPS), STEPS)
    policy = LearnedPolicy(StateTable())
    return UnmaskingModel(denoiser, policy, STEPS), PolicyGuide(policy, denoiser, STEPS)
