"""Imitation of a teacher against sums over all orders."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from torch import Tensor

from orderppl.errors import UserError
from orderppl.inference import Imitation, all_orders, exact_terms

from programs import flat_gradient, largest_z, learned, make_batch, make_guide, make_pair

TIED = {("learned_policy", "policy"), ("learned_steps", "plan"), ("priced_policy", "policy")}
PAIRS = [
    *sorted(TIED),
    ("learned_policy", "posterior"),
    ("priced_policy", "other_policy"),
    ("residual_policy", "mean_field"),
    ("uniform", "mean_field"),
    ("learned_policy", "random"),
]


@pytest.fixture(autouse=True)
def local_parameters():
    with pyro.settings.context(module_local_params=True):
        yield


def expected(teacher, model, guide, batch, programs: str) -> Tensor:
    """E_teacher[ log p(r) + log q(r | x) ] summed over the batch, over all orders."""
    orders = all_orders(teacher, **batch)
    shown = exact_terms(model, teacher, orders, **batch).log_guide.detach()
    terms = exact_terms(model, guide, orders, **batch)
    densities = {"p": [terms.log_prior], "q": [terms.log_guide], "both": [terms.log_prior, terms.log_guide]}[programs]
    possible = shown > -math.inf
    return sum((shown.exp() * density.masked_fill(~possible, 0.0)).sum() for density in densities)


@pytest.mark.parametrize(("prior", "guide"), PAIRS)
def test_value_and_gradient_are_those_of_the_exact_sum(prior: str, guide: str):
    """40 calls of two orders on 40 copies of the batch, |z| < 5 in every coordinate; a tied pair counts once."""
    model, student = make_pair(prior, guide, num_steps=2)
    teacher = make_guide("smoothed", model.prior, model.denoiser, 2)
    batch, copies, over = make_batch(), 40, learned(model, student)
    programs = "q" if prior == "uniform" or (prior, guide) in TIED else "p" if guide == "random" else "both"
    exact = expected(teacher, model, student, batch, programs)
    many = {name: rows.repeat(copies, 1) for name, rows in batch.items()}
    imitation = Imitation(teacher, num_particles=2)
    losses = [imitation.differentiable_loss(model, student, **many) / copies for _ in range(40)]
    draws = torch.stack([flat_gradient(-loss, over) for loss in losses])
    assert largest_z(draws, flat_gradient(exact, over)) < 5
    values = -torch.stack(losses).detach()
    assert abs(values.mean() - exact.detach()) < 5 * values.std() / len(values) ** 0.5 + 1e-3
    names = {"p": {"log_prior"}, "q": {"log_guide"}, "both": {"log_prior", "log_guide"}}[programs]
    assert set(imitation.metrics) == names | {"steps"}


def test_a_point_mass_is_imitated_without_noise():
    """The orders of a heuristic are the same at every call, and so are loss and gradient: those of the exact sum."""
    model, student = make_pair("learned_policy", "posterior", num_steps=2)
    teacher, batch, over = make_guide("point", model.prior, model.denoiser, 2), make_batch(), learned(model, student)
    exact = expected(teacher, model, student, batch, "both")
    loss = Imitation(teacher)(model, student)(*batch.values())
    assert -loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert torch.allclose(flat_gradient(-loss, over), flat_gradient(exact, over), atol=1e-4)


@pytest.mark.parametrize(
    ("prior", "guide", "shown", "problem"),
    [
        ("learned_policy", "other_policy", "random", "the prior gives orders that the teacher draws probability 0"),
        ("uniform", "plackett_luce", "random", "the guide gives orders that the teacher draws probability 0"),
        ("uniform", "random", "random", "neither prior nor guide has parameters to learn"),
    ],
)
def test_what_cannot_be_imitated_is_named(prior: str, guide: str, shown: str, problem: str):
    model, student = make_pair(prior, guide, num_steps=2)
    teacher = make_guide(shown, model.prior, model.denoiser, 2)
    many = {name: rows.repeat(20, 1) for name, rows in make_batch().items()}
    with pytest.raises(UserError, match=f"teacher: {problem}"):
        Imitation(teacher).loss(model, student, **many)


def test_a_teacher_draws_orders():
    model, student = make_pair("learned_policy", "policy", num_steps=2)
    with pytest.raises(UserError, match="teacher: draws no order"):
        Imitation(lambda *_, **__: None).loss(model, student, **make_batch())
