"""Every objective against sums over all orders: what its value and its gradient are unbiased for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO
from torch import Tensor, nn

from orderppl import Batch, UserError
from orderppl.guides import PolicyGuide
from orderppl.inference import EnumeratedELBO, ImportanceWeightedELBO, RevealTraceGraph_ELBO, SequenceWakeSleep
from orderppl.inference.exact import all_orders, exact_elbo, exact_terms
from orderppl.inference.importance_weighted import importance_bound
from orderppl.inference.objective import as_objective
from orderppl.models import UnmaskingModel
from orderppl.models.denoisers import MarkovChainDenoiser
from orderppl.policies import Threshold
from orderppl.unmasking.trajectory import steps_used

from programs import copies, flat_gradient, largest_z, learned, make_batch, make_pair

PAIRS = [
    ("uniform", "mean_field", "padded"),
    ("plan", "plan", "scattered"),
    ("learned", "renormalised", "prompted"),
    ("priced", "other_policy", "padded"),
    ("residual", "policy", "scattered"),
    ("price_range_commit", "policy", "prompted"),
    ("random_sizes", "plackett_luce", "scattered"),
]
ONE_PER_CANVAS = [PAIRS[0], ("uniform", "mean_field", "scattered"), ("uniform", "mean_field", "prompted"), PAIRS[2]]


@pytest.fixture(autouse=True)
def local_parameters() -> Iterator[None]:
    with pyro.settings.context(module_local_params=True):
        yield


def gradients(elbo: Any, model: nn.Module, guide: nn.Module, batch: Batch, replicates: int) -> Tensor:
    """Independent gradients of what is maximised, float [R, P]."""
    over = learned(model, guide)
    losses = (elbo.differentiable_loss(model, guide, batch) for _ in range(replicates))
    return torch.stack([flat_gradient(-loss, over) for loss in losses])


def expected_bound(model: nn.Module, guide: nn.Module, batch: Batch, particles: int, kl_weight: float = 1.0) -> Tensor:
    """E[L_K] summed over the batch, by enumeration of all K-tuples of orders."""
    total = torch.zeros(())
    terms = exact_terms(model, guide, all_orders(guide, batch), batch)
    for row in range(len(batch)):  # in each row its own orders, those of probability 0 left out
        possible = terms.log_guide[:, row] > -math.inf
        log_q, log_p, fit = (
            density[possible, row] for density in (terms.log_guide, terms.log_prior, terms.log_likelihood)
        )
        log_w = fit + kl_weight * (log_p - log_q)  # [N]
        bound, probability = log_w.new_zeros(1) - math.inf, log_w.new_zeros(1)
        for _ in range(particles):  # grows [N^k]
            bound = torch.logaddexp(bound.unsqueeze(1), log_w.unsqueeze(0)).flatten()
            probability = (probability.unsqueeze(1) + log_q.unsqueeze(0)).flatten()
        total = total + (probability.exp() * (bound - math.log(particles))).sum()
    return total


@pytest.mark.parametrize(
    ("model", "guide", "canvas", "particles", "kl_weight"),
    [
        pytest.param(*pair, particles, 1.0, marks=pytest.mark.slow if number >= 5 and particles == 1 else [])
        for number, pair in enumerate(PAIRS)
        for particles in (1, 2)
    ]
    + [(*PAIRS[0], 2, 0.4), (*PAIRS[2], 2, 0.4)],
)
def test_importance_weighted_gradient_is_unbiased(
    model: str, guide: str, canvas: str, particles: int, kl_weight: float
):
    """For E[L_K], K = 1 and 2, all pairs of orders: 60 calls on 40 copies of the batch, |z| < 5; the value likewise."""
    program, guide_program = make_pair(model, guide, num_steps=2)
    batch, count = make_batch(canvas), 40
    if model.startswith("price_range"):  # which prices are met depends on the batch: the same ones many times
        batch, count = copies(batch, count), 1
    exact = expected_bound(program, guide_program, batch, particles, kl_weight)
    wanted = flat_gradient(exact, learned(program, guide_program))
    many = copies(batch, count)
    elbo = ImportanceWeightedELBO(particles, kl_weight=kl_weight)
    assert largest_z(gradients(elbo, program, guide_program, many, 60) / count, wanted) < 5
    values = torch.tensor([-elbo.loss(program, guide_program, many) / count for _ in range(60)])
    assert abs(values.mean() - exact.detach()) < 5 * values.std() / 60**0.5 + 1e-3


def test_the_check_notices_a_baseline_that_looks_at_its_own_particle(monkeypatch):
    """The mean weight over all particles as a baseline is biased, and seen to be."""
    from orderppl.inference import importance_weighted

    model, guide = make_pair("uniform", "mean_field", num_steps=2)
    batch, count = make_batch(), 40
    wanted = flat_gradient(expected_bound(model, guide, batch, 2), learned(model, guide))
    monkeypatch.setattr(importance_weighted, "_bound_without", lambda w: w.mean(0, keepdim=True).expand_as(w))
    assert largest_z(gradients(ImportanceWeightedELBO(2), model, guide, copies(batch, count), 60) / count, wanted) > 5


@pytest.mark.parametrize(("model", "guide", "canvas"), ONE_PER_CANVAS)
def test_importance_bound_grows_to_the_evidence(model: str, guide: str, canvas: str):
    """E[L_K] by enumeration grows with K; of 20,000 orders it is the log of the part of p(x) that the guide reaches."""
    program, guide_program = make_pair(model, guide, num_steps=2)
    batch = make_batch(canvas)
    terms = exact_terms(program, guide_program, all_orders(guide_program, batch), batch)
    reached = terms.log_joint().masked_fill(terms.log_guide == -math.inf, -math.inf).logsumexp(0).detach()  # [B]
    exact = [expected_bound(program, guide_program, batch, k).item() for k in (1, 2, 3)]
    assert exact[0] < exact[1] < exact[2] < reached.sum()
    assert exact[0] == pytest.approx(terms.elbo().sum().item(), abs=1e-3)
    log_w = (terms.log_joint() - terms.log_guide).detach()  # [N, B]
    drawn = torch.multinomial(terms.log_guide.detach().exp().T, 20_000, replacement=True).T  # [20,000, B]
    log_weights = log_w.gather(0, drawn)
    for particles, wanted in zip((1, 2, 3), exact, strict=True):
        assert importance_bound(log_weights, particles).sum().item() == pytest.approx(wanted, abs=0.15)
    assert (importance_bound(log_weights) - reached).abs().max() < 0.05
    evidence = terms.log_joint().logsumexp(0).detach()
    assert torch.allclose(reached, evidence, atol=1e-4) == (guide == "mean_field")


@pytest.mark.parametrize("canvas", ["padded", "scattered", "long_prompt"])
def test_many_particles_come_close_to_the_evidence(canvas: str):
    """L_K of 2,000 orders per sequence, three calls: within 0.1 nats of log p(x), and never far above."""
    model, guide = make_pair("may_wait", "mean_field", num_steps=3)
    batch = make_batch(canvas)
    evidence = exact_terms(model, guide, all_orders(guide, batch), batch).log_joint().logsumexp(0).detach()
    for _ in range(3):
        elbo = ImportanceWeightedELBO(2000)
        elbo.loss(model, guide, batch)
        assert elbo.metrics["bound"].item() == pytest.approx(evidence.mean().item(), abs=0.1)


def test_more_particles_than_were_drawn_are_refused():
    with pytest.raises(UserError, match=r"num_particles: 7 is not within 1..6"):
        importance_bound(torch.zeros(6, 2), 7)


@pytest.mark.parametrize(
    ("model", "guide", "canvas"),
    [*PAIRS[:3], pytest.param("learned", "posterior", "scattered", marks=pytest.mark.slow)],
)
def test_wake_sleep_is_consistent(model: str, guide: str, canvas: str):
    """Of 8192 particles, the guide's direction is the gradient of -KL(p(r|x) || q), the model's that of log p(x)."""
    program, guide_program = make_pair(model, guide, num_steps=2)
    batch, over = make_batch(canvas), learned(program, guide_program)
    terms = exact_terms(program, guide_program, all_orders(guide_program, batch), batch)
    possible = terms.log_guide > -math.inf
    reached = terms.log_joint().masked_fill(~possible, -math.inf)  # [N, B]
    posterior = reached.detach().softmax(0)
    cross = (posterior * terms.log_guide.masked_fill(~possible, 0.0)).sum()  # -KL up to a constant
    wanted = flat_gradient(cross + reached.logsumexp(0).sum(), over)  # a tied prior is moved by both phases
    many = gradients(SequenceWakeSleep(8192), program, guide_program, batch, 10)
    assert (many.mean(0) - wanted).norm() < 0.05 * wanted.norm()


def test_wake_sleep_is_biased_at_two_particles():
    """And the enumeration check sees it: 60 calls of two particles on 40 copies of the batch, |z| > 5."""
    model, guide = make_pair("uniform", "mean_field", num_steps=2, frozen=True)
    batch, over, count = make_batch("plain"), learned(guide), 40
    terms = exact_terms(model, guide, all_orders(guide, batch), batch)
    wanted = flat_gradient((terms.posterior().detach() * terms.log_guide).sum(), over)
    assert largest_z(gradients(SequenceWakeSleep(2), model, guide, copies(batch, count), 60) / count, wanted) > 5


@pytest.mark.parametrize("canvas", ["padded", "scattered", "long_prompt"])
@pytest.mark.parametrize(
    ("model", "guide"), [pair[:2] for pair in PAIRS] + [("blocks", "policy"), ("smoothed", "klass")]
)
def test_enumerated_value_and_gradient_are_exact(model: str, guide: str, canvas: str):
    program, guide_program = make_pair(model, guide, num_steps=3)
    batch, over = make_batch(canvas), learned(program, guide_program)
    orders = all_orders(guide_program, batch)
    exact = exact_elbo(program, guide_program, orders, batch, 0.7).sum()
    elbo = EnumeratedELBO(kl_weight=0.7)
    loss = elbo(program, guide_program)(batch)
    assert -loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert torch.allclose(flat_gradient(-loss, over), flat_gradient(exact, over), atol=1e-4)
    terms = exact_terms(program, guide_program, orders, batch)
    whole, fit = terms.elbo().mean().item(), terms.elbo(0.0).mean().item()
    steps = (terms.log_guide.exp() * steps_used(orders)).sum(0).mean().item()
    found = {name: value.item() for name, value in elbo.metrics.items()}
    assert found == pytest.approx({"elbo": whole, "log_likelihood": fit, "kl": fit - whole, "steps": steps}, abs=1e-3)


def test_too_many_orders_are_refused_with_their_number():
    model, guide = make_pair("uniform", "mean_field", num_steps=3)
    with pytest.raises(UserError, match=r"max_orders: 3\^3 = 27 orders of 3 positions in 3 steps, more than 26"):
        EnumeratedELBO(26).loss(model, guide, make_batch())
    EnumeratedELBO(27).loss(model, guide, make_batch())


def test_what_is_given_is_not_enumerated():
    """Three holes in a canvas of 20: 27 orders, and the bound of 20 calls of 200 orders agrees, |z| < 5."""
    denoiser = MarkovChainDenoiser(4, 0.8, 20)
    tokens = torch.randint(0, 4, (5, 20))
    given = ~torch.isin(torch.arange(20), torch.tensor([6, 7, 13])).expand(5, 20)
    batch, policy = Batch(tokens, given=given), Threshold(0.6, temperature=1.0)
    model, guide = UnmaskingModel(denoiser, policy, 3), PolicyGuide(policy, denoiser, 3)
    assert len(all_orders(guide, batch)) == 27
    exact = EnumeratedELBO(27)
    exact.loss(model, guide, batch)
    elbo = RevealTraceGraph_ELBO(200)
    values = []
    for _ in range(20):
        elbo.loss(model, guide, batch)
        values.append(elbo.metrics["elbo"])
    found = torch.stack(values)
    assert abs(found.mean() - exact.metrics["elbo"]) < 5 * found.std() / 20**0.5 + 1e-5


STOCK = {
    "trace": lambda k: Trace_ELBO(k, max_plate_nesting=1, vectorize_particles=True),
    "trace_graph": lambda k: TraceGraph_ELBO(k, max_plate_nesting=1, vectorize_particles=True),
}


@pytest.mark.parametrize(
    ("model", "guide", "canvas"),
    [
        ("learned", "renormalised", "padded"),
        ("learned", "renormalised", "scattered"),
        ("learned", "policy", "prompted"),
        ("price_range_commit", "blocks", "scattered"),
        ("plan", "posterior", "scattered"),
    ],
)
@pytest.mark.parametrize("kind", sorted(STOCK))
def test_stock_bounds_are_unbiased_through_the_adapter(kind: str, model: str, guide: str, canvas: str):
    """50 calls of 64 particles; |z| < 5 in every coordinate."""
    program, guide_program = make_pair(model, guide, num_steps=2)
    batch = make_batch(canvas)
    exact = exact_elbo(program, guide_program, all_orders(guide_program, batch), batch).sum()
    wanted = flat_gradient(exact, learned(program, guide_program))
    assert largest_z(gradients(as_objective(STOCK[kind](64)), program, guide_program, batch, 50), wanted) < 5


@pytest.mark.parametrize("canvas", ["padded", "scattered"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_the_adapter_gives_the_gradient_that_a_stock_bound_leaves(alpha: float, canvas: str):
    """RenyiELBO back-propagates by itself: same draws, same loss, same gradient; what was there is kept."""
    model, guide = make_pair("learned", "renormalised", num_steps=2)
    batch, over = make_batch(canvas), learned(model, guide)
    stock = RenyiELBO(alpha, 8, max_plate_nesting=1, vectorize_particles=True)
    pyro.set_rng_seed(1)
    value = stock.loss_and_grads(model, guide, batch)
    left = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in over])
    for p in over:
        p.grad = torch.ones_like(p)
    pyro.set_rng_seed(1)
    loss = as_objective(stock).differentiable_loss(model, guide, batch)
    assert loss.item() == pytest.approx(value, rel=1e-6)
    assert torch.allclose(flat_gradient(loss, over), left, atol=1e-6)
    assert all((p.grad == 1).all() for p in over)
    if alpha == 0:  # same value as ours; the guide of a discrete latent learns nothing from it
        pyro.set_rng_seed(1)
        assert ImportanceWeightedELBO(8).loss(model, guide, batch) == pytest.approx(value, rel=1e-5)
        pyro.set_rng_seed(1)
        assert flat_gradient(as_objective(stock).differentiable_loss(model, guide, batch), learned(guide)).norm() == 0
