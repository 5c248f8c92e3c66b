"""Every objective against sums over all orders: what its value and its gradient are unbiased for."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO
from torch import Tensor

from orderppl.diagnostics import draw_orders
from orderppl.errors import UserError
from orderppl.inference import (
    EnumeratedELBO,
    ImportanceWeightedELBO,
    SequenceWakeSleep,
    all_orders,
    exact_elbo,
    exact_terms,
    importance_bound,
)
from orderppl.inference.objective import as_objective

from programs import flat_gradient, largest_z, learned, make_batch, make_pair

PAIRS = [
    ("uniform", "mean_field"),
    ("learned_steps", "plan"),
    ("learned_policy", "renormalised"),
    ("priced_policy", "other_policy"),
    ("residual_policy", "policy"),
]


@pytest.fixture(autouse=True)
def local_parameters():
    with pyro.settings.context(module_local_params=True):
        yield


def gradients(elbo, model, guide, batch, replicates: int) -> Tensor:
    """Independent gradients of what is maximised, float [R, P]."""
    over = learned(model, guide)
    losses = (elbo.differentiable_loss(model, guide, **batch) for _ in range(replicates))
    return torch.stack([flat_gradient(-loss, over) for loss in losses])


def expected_bound(model, guide, batch, particles: int, kl_weight: float = 1.0) -> Tensor:
    """E[L_K] summed over the batch, by enumeration of all K-tuples of orders."""
    terms = exact_terms(model, guide, all_orders(guide, **batch), **batch)
    possible = terms.log_guide > -math.inf
    log_q = terms.log_guide.masked_fill(~possible, 0.0)
    log_w = terms.log_likelihood + kl_weight * (terms.log_prior.masked_fill(~possible, 0.0) - log_q)  # [N, B]
    log_q = torch.where(possible, log_q, -math.inf)
    count, rows = log_w.shape
    bound, probability = log_w.new_zeros((1, rows)) - math.inf, log_w.new_zeros((1, rows))
    for _ in range(particles):  # grows [N^k, B]
        bound = torch.logaddexp(bound.unsqueeze(1), log_w.unsqueeze(0)).reshape(-1, rows)
        probability = (probability.unsqueeze(1) + log_q.unsqueeze(0)).reshape(-1, rows)
    assert len(bound) == count**particles
    return (probability.exp() * (bound - math.log(particles))).sum()


@pytest.mark.parametrize(
    ("prior", "guide", "particles", "kl_weight"),
    [(*pair, particles, 1.0) for pair in PAIRS for particles in (1, 2)] + [(*PAIRS[0], 2, 0.4), (*PAIRS[2], 2, 0.4)],
)
def test_importance_weighted_gradient_is_unbiased(prior: str, guide: str, particles: int, kl_weight: float):
    """For E[L_K], K = 1 and 2, all pairs of orders: 60 calls on 40 copies of the batch, |z| < 5; the value likewise."""
    model, guide_program = make_pair(prior, guide, num_steps=2)
    batch, copies = make_batch(), 40
    exact = expected_bound(model, guide_program, batch, particles, kl_weight)
    wanted = flat_gradient(exact, learned(model, guide_program))
    many = {name: rows.repeat(copies, 1) for name, rows in batch.items()}
    elbo = ImportanceWeightedELBO(particles, kl_weight=kl_weight)
    assert largest_z(gradients(elbo, model, guide_program, many, 60) / copies, wanted) < 5
    values = torch.tensor([-elbo.loss(model, guide_program, **many) / copies for _ in range(60)])
    assert abs(values.mean() - exact.detach()) < 5 * values.std() / 60**0.5 + 1e-3


def test_the_check_notices_a_baseline_that_looks_at_its_own_particle(monkeypatch):
    """The mean weight over all particles as a baseline is biased, and seen to be."""
    from orderppl.inference import importance_weighted

    model, guide = make_pair("uniform", "mean_field", num_steps=2)
    batch, copies = make_batch(), 40
    wanted = flat_gradient(expected_bound(model, guide, batch, 2), learned(model, guide))
    many = {name: rows.repeat(copies, 1) for name, rows in batch.items()}
    monkeypatch.setattr(importance_weighted, "_bound_without", lambda w: w.mean(0, keepdim=True).expand_as(w))
    assert largest_z(gradients(ImportanceWeightedELBO(2), model, guide, many, 60) / copies, wanted) > 5


@pytest.mark.parametrize(("prior", "guide"), [("uniform", "mean_field"), ("learned_policy", "renormalised")])
def test_importance_bound_grows_to_the_evidence(prior: str, guide: str):
    """E[L_K] by enumeration grows with K; of 20,000 orders it is the log of the part of p(x) that the guide reaches."""
    model, guide_program = make_pair(prior, guide, num_steps=2)
    batch = make_batch()
    terms = exact_terms(model, guide_program, all_orders(guide_program, **batch), **batch)
    reached = terms.log_joint().masked_fill(terms.log_guide == -math.inf, -math.inf).logsumexp(0).detach()  # [B]
    exact = [expected_bound(model, guide_program, batch, k).item() for k in (1, 2, 3, 4)]
    assert exact[0] < exact[1] < exact[2] < exact[3] < reached.sum()
    assert exact[0] == pytest.approx(terms.elbo().sum().item(), abs=1e-3)
    log_weights = draw_orders(model, guide_program, batch, 20_000, max_states=20_000).log_weight
    assert log_weights.shape == (20_000, 4)
    for particles, wanted in zip((1, 2, 3, 4), exact, strict=True):
        assert importance_bound(log_weights, particles).sum().item() == pytest.approx(wanted, abs=0.15)
    assert (importance_bound(log_weights) - reached).abs().max() < 0.05
    evidence = terms.log_joint().logsumexp(0).detach()
    assert torch.allclose(reached, evidence, atol=1e-4) == (guide == "mean_field")


def test_more_particles_than_were_drawn_are_refused():
    with pytest.raises(UserError, match=r"num_particles: 7 is not within 1..6"):
        importance_bound(torch.zeros(6, 2), 7)


@pytest.mark.parametrize(("prior", "guide"), PAIRS[:3])
def test_wake_sleep_is_consistent(prior: str, guide: str):
    """Of 8192 particles, the guide's direction is the gradient of -KL(p(r|x) || q), the model's that of log p(x)."""
    model, guide_program = make_pair(prior, guide, num_steps=2)
    batch, over = make_batch(), learned(model, guide_program)
    terms = exact_terms(model, guide_program, all_orders(guide_program, **batch), **batch)
    possible = terms.log_guide > -math.inf
    reached = terms.log_joint().masked_fill(~possible, -math.inf)  # [N, B]
    posterior = reached.detach().softmax(0)
    cross = (posterior * terms.log_guide.masked_fill(~possible, 0.0)).sum()  # -KL up to a constant
    wanted = flat_gradient(cross + reached.logsumexp(0).sum(), over)  # a tied prior is moved by both phases
    many = gradients(SequenceWakeSleep(8192), model, guide_program, batch, 10)
    assert (many.mean(0) - wanted).norm() < 0.05 * wanted.norm()


def test_wake_sleep_is_biased_at_two_particles():
    """And the enumeration check sees it: 60 calls of two particles on 40 copies of the batch, |z| > 5."""
    model, guide = make_pair("uniform", "mean_field", num_steps=2, frozen=True)
    batch, over, copies = make_batch(padded=False), learned(guide), 40
    terms = exact_terms(model, guide, all_orders(guide, **batch), **batch)
    wanted = flat_gradient((terms.posterior().detach() * terms.log_guide).sum(), over)
    many = {name: rows.repeat(copies, 1) for name, rows in batch.items()}
    assert largest_z(gradients(SequenceWakeSleep(2), model, guide, many, 60) / copies, wanted) > 5


@pytest.mark.parametrize(("prior", "guide"), PAIRS)
def test_enumerated_value_and_gradient_are_exact(prior: str, guide: str):
    model, guide_program = make_pair(prior, guide, num_steps=3)
    batch, over = make_batch(), learned(model, guide_program)
    exact = exact_elbo(model, guide_program, all_orders(guide_program, **batch), 0.7, **batch).sum()
    elbo = EnumeratedELBO(kl_weight=0.7)
    loss = elbo(model, guide_program)(*batch.values())
    assert -loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert torch.allclose(flat_gradient(-loss, over), flat_gradient(exact, over), atol=1e-4)
    whole = exact_elbo(model, guide_program, all_orders(guide_program, **batch), **batch).mean()
    assert elbo.metrics["elbo"].item() == pytest.approx(whole.item(), abs=1e-4)
    assert set(elbo.metrics) == {"elbo", "log_likelihood", "kl", "steps"}


def test_too_many_orders_are_refused_with_their_number():
    model, guide = make_pair("uniform", "mean_field", num_steps=3)
    with pytest.raises(UserError, match=r"max_orders: 3\^3 = 27 orders of 3 positions in 3 steps, more than 26"):
        EnumeratedELBO(26).loss(model, guide, **make_batch())
    EnumeratedELBO(27).loss(model, guide, **make_batch())


STOCK = {
    "trace": lambda k: Trace_ELBO(k, max_plate_nesting=1, vectorize_particles=True),
    "trace_graph": lambda k: TraceGraph_ELBO(k, max_plate_nesting=1, vectorize_particles=True),
}


@pytest.mark.parametrize("one_step", [False, True])
@pytest.mark.parametrize("kind", sorted(STOCK))
def test_stock_bounds_are_unbiased_through_the_adapter(kind: str, one_step: bool):
    """50 calls of 64 particles; |z| < 5 in every coordinate."""
    model, guide = make_pair("learned_policy", "renormalised", num_steps=2)
    batch = make_batch()
    wanted = flat_gradient(exact_elbo(model, guide, all_orders(guide, **batch), **batch).sum(), learned(model, guide))
    model.one_step = one_step
    assert largest_z(gradients(as_objective(STOCK[kind](64)), model, guide, batch, 50), wanted) < 5


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_the_adapter_gives_the_gradient_that_a_stock_bound_leaves(alpha: float):
    """RenyiELBO back-propagates by itself: same draws, same loss, same gradient; what was there is kept."""
    model, guide = make_pair("learned_policy", "renormalised", num_steps=2)
    batch, over = make_batch(), learned(model, guide)
    stock = RenyiELBO(alpha, 8, max_plate_nesting=1, vectorize_particles=True)
    pyro.set_rng_seed(1)
    value = stock.loss_and_grads(model, guide, **batch)
    left = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in over])
    for p in over:
        p.grad = torch.ones_like(p)
    pyro.set_rng_seed(1)
    loss = as_objective(stock).differentiable_loss(model, guide, **batch)
    assert loss.item() == pytest.approx(value, rel=1e-6)
    assert torch.allclose(flat_gradient(loss, over), left, atol=1e-6)
    assert all((p.grad == 1).all() for p in over)
    if alpha == 0:  # same value as ours; the guide of a discrete latent learns nothing from it
        pyro.set_rng_seed(1)
        assert ImportanceWeightedELBO(8).loss(model, guide, **batch) == pytest.approx(value, rel=1e-5)
        pyro.set_rng_seed(1)
        assert flat_gradient(as_objective(stock).differentiable_loss(model, guide, **batch), learned(guide)).norm() == 0
