"""Imitation of a teacher against sums over all orders."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pyro
import pytest
import torch
from torch import Tensor, nn

from orderppl import Batch, UserError
from orderppl.inference import Imitation
from orderppl.inference.exact import all_orders, exact_terms

from programs import copies, flat_gradient, largest_z, learned, make_batch, make_guide, make_pair

TIED = {("learned", "policy"), ("plan", "plan"), ("priced", "policy"), ("blocks", "policy")}
PAIRS = [
    ("learned", "policy", "scattered"),
    ("plan", "plan", "padded"),
    ("priced", "policy", "prompted"),
    ("learned", "posterior", "scattered"),
    ("priced", "other_policy", "padded"),
    ("residual", "mean_field", "scattered"),
    ("uniform", "mean_field", "prompted"),
    ("learned", "random", "scattered"),
    ("blocks", "policy", "padded"),
]


@pytest.fixture(autouse=True)
def local_parameters() -> Iterator[None]:
    with pyro.settings.context(module_local_params=True):
        yield


def expected(teacher: nn.Module, model: nn.Module, guide: nn.Module, batch: Batch, programs: str) -> Tensor:
    """E_teacher[ log p(r) + log q(r | x) ] summed over the batch, over all orders."""
    orders = all_orders(teacher, batch)
    shown = exact_terms(model, teacher, orders, batch).log_guide.detach()
    terms = exact_terms(model, guide, orders, batch)
    densities = {"p": [terms.log_prior], "q": [terms.log_guide], "both": [terms.log_prior, terms.log_guide]}[programs]
    possible = shown > -math.inf
    return sum((shown.exp() * density.masked_fill(~possible, 0.0)).sum() for density in densities)


@pytest.mark.parametrize(("model", "guide", "canvas"), PAIRS)
def test_value_and_gradient_are_those_of_the_exact_sum(model: str, guide: str, canvas: str):
    """40 calls of two orders on 40 copies of the batch, |z| < 5 in every coordinate; a tied pair counts once."""
    program, student = make_pair(model, guide, num_steps=2)
    teacher = make_guide("smoothed" if model != "blocks" else "policy", program.policy, program.denoiser, 2)
    batch, count, over = make_batch(canvas), 40, learned(program, student)
    programs = "q" if model == "uniform" or (model, guide) in TIED else "p" if guide == "random" else "both"
    exact = expected(teacher, program, student, batch, programs)
    many = copies(batch, count)
    imitation = Imitation(teacher, num_particles=2)
    losses = [imitation.differentiable_loss(program, student, many) / count for _ in range(40)]
    draws = torch.stack([flat_gradient(-loss, over) for loss in losses])
    assert largest_z(draws, flat_gradient(exact, over)) < 5
    values = -torch.stack(losses).detach()
    assert abs(values.mean() - exact.detach()) < 5 * values.std() / len(values) ** 0.5 + 1e-3
    names = {"p": {"log_prior"}, "q": {"log_guide"}, "both": {"log_prior", "log_guide"}}[programs]
    assert set(imitation.metrics) == names | {"steps"}


@pytest.mark.parametrize("canvas", ["padded", "scattered", "prompted"])
@pytest.mark.parametrize("shown", ["point", "oracle", "fixed"])
def test_a_point_mass_is_imitated_without_noise(shown: str, canvas: str):
    """The orders of a heuristic are the same at every call, and so are loss and gradient: those of the exact sum."""
    model, student = make_pair("learned", "posterior", num_steps=2)
    teacher, batch, over = (
        make_guide(shown, model.policy, model.denoiser, 2),
        make_batch(canvas),
        learned(model, student),
    )
    exact = expected(teacher, model, student, batch, "both")
    loss = Imitation(teacher)(model, student)(batch)
    assert -loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert torch.allclose(flat_gradient(-loss, over), flat_gradient(exact, over), atol=1e-4)


@pytest.mark.parametrize(
    ("model", "guide", "shown", "problem"),
    [
        ("learned", "other_policy", "random", "the prior gives orders that the teacher draws probability 0"),
        ("uniform", "plackett_luce", "random", "the guide gives orders that the teacher draws probability 0"),
        ("uniform", "random", "random", "neither prior nor guide has parameters to learn"),
    ],
)
def test_what_cannot_be_imitated_is_named(model: str, guide: str, shown: str, problem: str):
    program, student = make_pair(model, guide, num_steps=2)
    teacher = make_guide(shown, program.policy, program.denoiser, 2)
    with pytest.raises(UserError, match=f"teacher: {problem}"):
        Imitation(teacher).loss(program, student, copies(make_batch(), 20))


def test_a_teacher_draws_orders():
    model, student = make_pair("learned", "policy", num_steps=2)
    with pytest.raises(UserError, match="teacher: draws no order"):
        Imitation(lambda *_, **__: None).loss(model, student, make_batch())
