"""The relaxed estimator against sums over all orders: a value like any other, and a gradient that is biased."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from torch import Tensor, nn

from orderppl.data.chains import sample_chains
from orderppl.data.collate import tensors
from orderppl.errors import UserError
from orderppl.guides import MeanFieldGuide
from orderppl.inference import RelaxedELBO, RevealTraceGraph_ELBO, all_orders, exact_elbo
from orderppl.inference.relaxed import relaxed_steps
from orderppl.models import EasyFirst, UniformSteps, UnmaskingModel
from orderppl.models.denoisers import MarkovChainDenoiser, TransformerDenoiser
from orderppl.models.networks import PositionTable

from programs import flat_gradient, largest_z, learned, make_batch, make_pair

STATES, LENGTH, STEPS = 3, 4, 3


@pytest.fixture(autouse=True)
def local_parameters():
    with pyro.settings.context(module_local_params=True):
        yield


def chain_batch(rows: int = 8) -> dict[str, Tensor]:
    return tensors(sample_chains(rows, num_states=STATES, stay=0.85, length=LENGTH, seed=0))


def pair(denoiser: nn.Module) -> tuple[UnmaskingModel, MeanFieldGuide]:
    table = PositionTable(LENGTH, STEPS, noise=1.0)
    return UnmaskingModel(denoiser, UniformSteps(), STEPS), MeanFieldGuide(table, STEPS, sees_tokens=False)


def chain_pair() -> tuple[UnmaskingModel, MeanFieldGuide]:
    return pair(MarkovChainDenoiser(STATES, 0.85, LENGTH))


def gradients(elbo, model, guide, batch, over: list[Tensor], calls: int = 40) -> Tensor:
    losses = (elbo.differentiable_loss(model, guide, **batch) for _ in range(calls))
    return torch.stack([flat_gradient(-loss, over) for loss in losses])


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_the_gradient_points_uphill_but_is_biased(temperature: float):
    """40 calls of 64 orders on a chain of 4 positions: cosine > 0.3, |z| > 8; of the unbiased estimator |z| < 5."""
    pyro.set_rng_seed(0)
    model, guide = chain_pair()
    batch, over = chain_batch(), learned(guide)
    exact = exact_elbo(model, guide, all_orders(guide, **batch), 0.0, **batch).sum()
    wanted = flat_gradient(exact, over)
    relaxed = RelaxedELBO(64, temperature=temperature, kl_weight=0.0)
    found = gradients(relaxed, model, guide, batch, over)
    assert torch.cosine_similarity(found.mean(0), wanted, dim=0) > 0.3
    assert largest_z(found, wanted) > 8
    unbiased = gradients(RevealTraceGraph_ELBO(64, kl_weight=0.0), model, guide, batch, over)
    assert largest_z(unbiased, wanted) < 5


@pytest.mark.parametrize("particles", [1, 5])
@pytest.mark.parametrize("prior", [UniformSteps(), EasyFirst(0.9, temperature=5.0)])
@pytest.mark.parametrize("reads", ["chain", "transformer"])
def test_the_value_is_that_of_the_bound(reads: str, prior: nn.Module, particles: int):
    """The same orders are drawn, and they are worth the same; padding does not count."""
    denoiser = MarkovChainDenoiser(STATES, 0.85, LENGTH)
    if reads == "transformer":
        denoiser = TransformerDenoiser(STATES, STATES, width=16, layers=1, heads=2, max_length=LENGTH)
    model, guide = pair(denoiser)
    model.prior = prior
    prior.non_empty = False
    batch = chain_batch()
    batch["attention_mask"][0, -2:] = False
    values, metrics = [], []
    for elbo in (RelaxedELBO(particles, kl_weight=0.3), RevealTraceGraph_ELBO(particles, kl_weight=0.3)):
        pyro.set_rng_seed(1)
        values.append(elbo.loss(model, guide, **batch))
        metrics.append({name: value.item() for name, value in elbo.metrics.items()})
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4)
    assert math.isfinite(values[0])


def test_a_trained_denoiser_gets_an_unbiased_gradient():
    """40 calls of 8 orders; |z| < 5 in every coordinate of the denoiser, whatever is biased for the guide."""
    model, guide = pair(TransformerDenoiser(STATES, STATES, width=8, layers=1, heads=1, max_length=LENGTH))
    batch, over = chain_batch(), learned(model.denoiser)
    wanted = flat_gradient(exact_elbo(model, guide, all_orders(guide, **batch), **batch).sum(), over)
    assert largest_z(gradients(RelaxedELBO(8), model, guide, batch, over), wanted) < 5
    assert flat_gradient(RelaxedELBO(4).differentiable_loss(model, guide, **batch), learned(guide)).norm() > 0


def test_noise_given_the_order_is_gumbel_noise():
    """50,000 draws: the arg-max is the order; mean and variance of the noise of every step, |z| < 5."""
    log_q, count = torch.tensor([0.1, 0.6, 0.3], dtype=torch.float64).log().requires_grad_(), 50_000
    order = torch.multinomial(log_q.detach().exp(), count, replacement=True)[:, None]  # [N, 1]
    hard, soft = relaxed_steps(log_q.expand(count, 1, 3), order, 1.0)  # [3, N, 1]
    assert (soft.argmax(0) == order).all()
    assert (hard.argmax(0) == order).all()
    ratio = soft.detach().log()[..., 0] - log_q.detach()[:, None]  # the noise up to a number per draw
    difference = ratio[0] - ratio[1]  # of two Gumbel draws: logistic, mean 0, variance pi^2 / 3
    assert abs(difference.mean()) < 5 * difference.std() / count**0.5
    square = difference.square()
    assert abs(square.mean() - math.pi**2 / 3) < 5 * square.std() / count**0.5
    slope = torch.autograd.grad(soft[0, 0, 0], log_q)[0]
    row = soft[:, 0, 0].detach()
    torch.testing.assert_close(slope, row[0] * (torch.tensor([1.0, 0.0, 0.0]) - row))  # of the softmax


def test_what_has_no_relaxation_is_named():
    batch = make_batch()
    model, guide = make_pair("uniform", "mean_field", num_steps=2)
    with pytest.raises(UserError, match="denoiser: TableDenoiser cannot read tokens that are visible in part"):
        RelaxedELBO(2).loss(model, guide, **batch)
    with pytest.raises(UserError, match="guide: draws its order from a SequentialReveal, which has no relaxation"):
        RelaxedELBO(2).loss(*make_pair("learned_policy", "policy", num_steps=2), **batch)
    with pytest.raises(UserError, match="temperature: 0 is not positive"):
        RelaxedELBO(2, temperature=0)
    model, guide = chain_pair()
    model.one_step = True
    with pytest.raises(UserError, match="one_step: a relaxed bound needs"):
        RelaxedELBO(2).loss(model, guide, **chain_batch())
    with pytest.raises(UserError, match="model: is no stacked unmasking program"):
        RelaxedELBO(2).loss(lambda: None, lambda: None)
