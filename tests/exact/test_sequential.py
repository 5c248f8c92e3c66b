"""The programs that go step by step, under Pyro's own bounds: against sums over all orders of the stacked pair."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceGraph_ELBO

from orderppl.guides import SequentialGuide
from orderppl.inference import ImportanceWeightedELBO, RevealTraceGraph_ELBO
from orderppl.inference.exact import all_orders, exact_elbo, exact_evidence, exact_terms
from orderppl.models import SequentialUnmaskingModel

from programs import copies, flat_gradient, largest_z, learned, make_batch, make_pair

STEPS = 3
PAIRS = [
    ("uniform", "mean_field", "padded"),
    ("learned", "renormalised", "scattered"),
    ("learned", "policy", "prompted"),
    ("residual", "posterior", "scattered"),
    ("early_commit", "blocks", "padded"),
    ("random_sizes", "plackett_luce", "scattered"),
    ("looking_back", "klass", "prompted"),
    ("blocks", "policy", "scattered"),
    ("eos_aware", "policy", "long_prompt"),
]
ELBOS: dict[str, Any] = {
    "trace_graph": lambda: TraceGraph_ELBO(32, max_plate_nesting=1, vectorize_particles=True),
    "reveal": lambda: RevealTraceGraph_ELBO(32),
}


@pytest.fixture
def local_parameters() -> Iterator[None]:
    with pyro.settings.context(module_local_params=True):
        yield


@pytest.mark.usefixtures("local_parameters")
@pytest.mark.parametrize("kind", ELBOS)
@pytest.mark.parametrize(("model", "guide", "canvas"), PAIRS)
def test_value_and_gradient_are_those_of_the_stacked_pair(model: str, guide: str, canvas: str, kind: str):
    """40 calls of 32 particles, |z| < 5 in every coordinate against the enumeration of the stacked programs."""
    stacked, stacked_guide = make_pair(model, guide, STEPS)
    program = SequentialUnmaskingModel(stacked.denoiser, stacked.policy, STEPS)
    batch, over, elbo = make_batch(canvas), learned(stacked, stacked_guide), ELBOS[kind]()
    exact = exact_elbo(stacked, stacked_guide, all_orders(stacked_guide, batch), batch).sum()
    wanted = torch.cat([exact.detach()[None], flat_gradient(exact, over)])
    draws = []
    for _ in range(40):
        for p in over:
            p.grad = None
        value = -elbo.loss_and_grads(program, SequentialGuide(stacked_guide), batch)
        slopes = (torch.zeros_like(p).flatten() if p.grad is None else -p.grad.flatten() for p in over)
        draws.append(torch.cat([torch.tensor([float(value)]), *slopes]))
    assert largest_z(torch.stack(draws), wanted) < 5


@pytest.mark.usefixtures("local_parameters")
@pytest.mark.parametrize("canvas", ["padded", "scattered", "prompted"])
def test_importance_weights_of_steps_multiply(canvas: str):
    """L_K of 2,000 particles per sequence comes within 0.1 nats of the evidence, site by site as in one piece."""
    stacked, guide = make_pair("may_wait", "mean_field", STEPS)
    program, batch = SequentialUnmaskingModel(stacked.denoiser, stacked.policy, STEPS), make_batch(canvas)
    evidence = exact_evidence(stacked, all_orders(guide, batch), batch).sum().item()
    for elbo in (ImportanceWeightedELBO(2000), RenyiELBO(0, 2000, max_plate_nesting=1, vectorize_particles=True)):
        with torch.no_grad():
            found = -elbo.loss(program, SequentialGuide(guide), batch)
        assert found == pytest.approx(evidence, abs=0.1 * len(batch))


@pytest.mark.usefixtures("local_parameters")
@pytest.mark.parametrize("canvas", ["scattered", "prompted"])
@pytest.mark.parametrize("stock", [Trace_ELBO, TraceGraph_ELBO])
def test_stock_bounds_of_both_forms_agree_in_value(stock: Any, canvas: str):
    """10 calls on 20 copies of the batch each; |z| < 5 of either against the enumeration."""
    stacked, guide = make_pair("learned", "blocks", STEPS)
    program, batch = SequentialUnmaskingModel(stacked.denoiser, stacked.policy, STEPS), make_batch(canvas)
    exact = exact_terms(stacked, guide, all_orders(guide, batch), batch).elbo().sum().item()
    many = copies(batch, 20)
    for pair in ((stacked, guide), (program, SequentialGuide(guide))):
        elbo = stock(8, max_plate_nesting=1, vectorize_particles=True)
        values = torch.tensor([-elbo.loss(*pair, many) / 20 for _ in range(10)])
        assert abs(values.mean().item() - exact) < 5 * values.std().item() / 10**0.5 + 1e-3


@pytest.mark.parametrize("form", ["stacked", "sequential"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Trace_ELBO(8, max_plate_nesting=1, vectorize_particles=True),
        lambda: TraceGraph_ELBO(8, max_plate_nesting=1, vectorize_particles=True),
        lambda: RenyiELBO(0.5, 8, max_plate_nesting=1, vectorize_particles=True),
        lambda: RevealTraceGraph_ELBO(8),
        lambda: ImportanceWeightedELBO(8),
    ],
    ids=["trace", "trace_graph", "renyi", "reveal", "importance"],
)
def test_plain_svi_moves_every_program(make: Any, form: str):
    """Pyro's loop, store and optimiser as they come: all that can learn moves, the frozen denoiser does not."""
    model, guide = make_pair("learned", "other_policy", STEPS, frozen=True)
    batch = make_batch("scattered")
    pair: tuple[Any, Any] = (model, guide)
    if form == "sequential":
        pair = SequentialUnmaskingModel(model.denoiser, model.policy, STEPS), SequentialGuide(guide)
    before = [p.detach().clone() for p in learned(*pair)]
    table = model.denoiser.table.detach().clone()
    elbo = make()
    svi = SVI(*pair, pyro.optim.Adam({"lr": 0.05}), elbo)
    for _ in range(3):
        assert torch.isfinite(torch.tensor(svi.step(batch)))
    moved = [not torch.equal(*both) for both in zip(learned(*pair), before, strict=True)]
    if isinstance(elbo, RenyiELBO):  # the guide of a discrete latent learns nothing from it
        assert any(moved)
    else:
        assert all(moved)
    assert torch.equal(model.denoiser.table, table)
