"""What users of Pyro do with any model and guide: the parameter store, its optimisers, plates, Predictive."""

from __future__ import annotations

from pathlib import Path

import pyro
import pytest
import torch
from pyro.infer import SVI, Predictive, config_enumerate, infer_discrete

from orderppl import Batch, RevealTraceGraph_ELBO, UserError, fit
from orderppl.data import Chains
from orderppl.guides import Guide, PolicyGuide
from orderppl.models import PositionTable, UnmaskingModel
from orderppl.models.denoisers import MarkovChainDenoiser
from orderppl.policies import Plan, RandomSteps

BATCH: Batch = Chains(length=6, train=16, validation=8, test=8).splits()["train"].batch


def make_pair(length: int = 6) -> tuple[UnmaskingModel, Guide]:
    denoiser = MarkovChainDenoiser(4, 0.85, length)
    guide = PolicyGuide(Plan(PositionTable(length, 3, noise=0.5)), denoiser, 3)
    return UnmaskingModel(denoiser, RandomSteps(), 3), guide


def make_svi(model: object, guide: object, particles: int = 2) -> SVI:
    return SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.1}), RevealTraceGraph_ELBO(particles))


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_parameter_store_is_loaded_into_a_fresh_pair(tmp_path: Path) -> None:
    model, guide = make_pair()
    make_svi(model, guide).step(BATCH)
    pyro.get_param_store().save(str(tmp_path / "store"))
    pyro.clear_param_store()
    pyro.get_param_store().load(str(tmp_path / "store"))
    fresh_model, fresh = make_pair()
    assert not same(fresh, guide)
    svi = make_svi(fresh_model, fresh)
    svi.evaluate_loss(BATCH)
    assert same(fresh, guide)
    svi.step(BATCH)
    assert not same(fresh, guide)  # what is trained is the fresh pair


def test_a_second_pair_in_one_process_is_trained_itself() -> None:
    first, second = make_pair(), make_pair()
    make_svi(*first).step(BATCH)
    before = [parameter.detach().clone() for parameter in second[1].parameters()]
    left = [parameter.detach().clone() for parameter in first[1].parameters()]
    make_svi(*second).step(BATCH)
    assert not any(torch.equal(a, b) for a, b in zip(before, second[1].parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(left, first[1].parameters(), strict=True))


def test_a_store_of_other_shapes_is_refused() -> None:
    model, guide = make_pair()
    make_svi(model, guide).step(BATCH)
    store = pyro.get_param_store()
    (name,) = store.keys()
    store[name] = torch.zeros(2, 2)
    with pytest.raises(UserError, match="clear it"):
        make_svi(*make_pair()).step(BATCH)


def test_optimisers_of_pyro_fit() -> None:
    model, guide = make_pair()
    fit(model, guide, BATCH, optimizer=pyro.optim.ClippedAdam({"lr": 0.1}), updates=2, batch_size=4, progress=False)
    assert not same(guide, make_pair()[1])


def test_a_subsampled_plate_around_the_pair_gives_the_bound_of_all_rows() -> None:
    model, guide = make_pair()

    def some(program: torch.nn.Module, batch: Batch) -> object:
        with pyro.plate("rows", len(batch), subsample_size=4) as rows:
            return program(batch.rows(rows))

    torch.manual_seed(0)
    thinned = make_svi(lambda batch: some(model, batch), lambda batch: some(guide, batch), 64)
    losses = torch.tensor([thinned.evaluate_loss(BATCH) for _ in range(60)])
    whole = make_svi(model, guide, 1000).evaluate_loss(BATCH)
    assert abs(losses.mean() - whole) < 5 * losses.std() / len(losses) ** 0.5
    with pytest.raises(ValueError, match="give the rows that the plate has drawn"), pyro.plate("rows", 3):
        model(BATCH)


def test_predictive_draws_from_guide_and_model() -> None:
    model, guide = make_pair()
    for parallel in (False, True):
        found = Predictive(model, guide=guide, num_samples=3, parallel=parallel)(BATCH)
        assert found["reveal_step"].shape == found["tokens"].shape == (3, *BATCH.tokens.shape)


def test_infer_discrete_is_refused_by_pyro() -> None:
    """Its values are single numbers there; an order is one value per position. Use EnumeratedELBO."""
    with pytest.raises(ValueError, match="Invalid tensor shape"):
        infer_discrete(config_enumerate(make_pair()[0]), first_available_dim=-2)(BATCH)
