"""Memory and operations of an update, counted on shapes, against what the update really takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from orderppl.guides import PolicyGuide, RenormalisedScoreGuide
from orderppl.inference.cost import on_shapes, update_cost
from orderppl.inference.fitting import PairLoss
from orderppl.inference.reveal_elbo import RevealTraceGraph_ELBO
from orderppl.models import LearnedPolicy, PolicyNetwork, PositionTable, SequenceEncoder, UnmaskingModel
from orderppl.models.denoisers import load_denoiser
from orderppl.models.denoisers.smdm import SmdmDenoiser
from orderppl.models.denoisers.training import MaskedDiffusionLoss
from orderppl.policies import Plan, RandomSteps
from orderppl.unmasking import Batch

from tiny_models import KINDS, write_model

V, T, B, L, C = 300, 3, 4, 12, 10
OPTIMIZER = partial(torch.optim.AdamW, lr=1e-4)


def batch() -> Batch:
    """Responses of 12 tokens after prompts of 10."""
    return Batch(torch.randint(V, (B, C + L)), given=(torch.arange(C + L) < C).expand(B, C + L))


def make_loss(kind: str) -> nn.Module:
    denoiser = SmdmDenoiser(n_layer=2, n_head=2, n_embd=32, intermediate_size=48, vocab_size=V)
    if kind == "denoiser":
        return MaskedDiffusionLoss(denoiser)
    denoiser.requires_grad_(kind == "joint")
    policy = LearnedPolicy(PolicyNetwork(V + 1, width=16, layers=1, heads=2))
    scores = SequenceEncoder(V + 1, 1, width=16, layers=1, heads=2)
    guide = RenormalisedScoreGuide(scores, T, temperature=0.1)
    return PairLoss(UnmaskingModel(denoiser, policy, T), guide, RevealTraceGraph_ELBO(2))


def peak_bytes(update: Callable[[], None]) -> int:
    """Most memory that one update on the CPU holds at a time, on top of what is held before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        update()
    held = peak = 0
    assert profiled.profiler is not None
    events = (event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("kind", ["denoiser", "frozen", "joint"])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_memory_is_that_of_the_update(kind: str, bfloat16: bool) -> None:
    """Few enough rows that the CPU reads none of them once for several (`distinct_rows`), as a GPU never does."""
    loss, data = make_loss(kind), batch()
    found = update_cost(loss, data, OPTIMIZER, bfloat16=bfloat16)
    assert found.weights == sum(tensor.numel() * tensor.element_size() for tensor in loss.parameters())
    optimizer = OPTIMIZER([parameter for parameter in loss.parameters() if parameter.requires_grad])

    def update() -> None:
        with pyro.validation_enabled(False), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            value = loss(data)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    update()  # makes the optimiser's state, which the measurement then does not see
    state = [value for own in optimizer.state.values() for value in own.values()]
    assert found.optimizer == sum(value.numel() * value.element_size() for value in state)
    assert found.peak - found.optimizer == pytest.approx(peak_bytes(update), rel=0.1 if bfloat16 else 0.02)


@pytest.mark.parametrize("kind", ["denoiser", "frozen", "joint"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_operations_are_those_of_the_update(kind: str, accumulate: int) -> None:
    loss, data = make_loss(kind), batch()
    with pyro.validation_enabled(False), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss(data).backward()
    # an attention kernel computes its scores again in the backward pass, which the products by themselves do not
    found = update_cost(loss, data, OPTIMIZER, accumulate=accumulate).flops
    assert found == pytest.approx(counter.get_total_flops(), rel=0.05)
    assert update_cost(loss, data.rows(slice(2)), OPTIMIZER).flops == pytest.approx(0.5 * found, rel=0.01)


@pytest.mark.parametrize("kind", [*KINDS, "bert in parts"])
def test_public_models_are_counted_on_shapes(kind: str, tmp_path: Path) -> None:
    """Also those that look at their masks, and one whose parts lie on the disk."""
    torch.manual_seed(0)
    folder, parts = write_model(tmp_path / "model", kind.split()[0]), {}
    if kind.endswith("parts"):
        places = {"bert.embeddings": "cpu", "bert.encoder": "disk", "cls": "cpu"}
        parts = {"device_map": places, "offload_folder": tmp_path / "offloaded"}
    denoiser: Any = load_denoiser(folder, trust_remote_code=True, **parts)
    plan = Plan(PositionTable(L, T))
    model, guide = UnmaskingModel(denoiser, RandomSteps(), T), PolicyGuide(plan, denoiser, T)
    loss = PairLoss(model, guide, RevealTraceGraph_ELBO(2, scored_steps=2))
    data = Batch(torch.randint(5, 40, (B, L)), given=(torch.arange(L) % (L - 1) == 0).expand(B, L))
    with pyro.validation_enabled(False), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss(data).backward()
    found = update_cost(loss, data, OPTIMIZER)
    assert found.flops == pytest.approx(counter.get_total_flops(), rel=0.05)
    assert found.weights >= sum(weight.numel() * weight.element_size() for weight in loss.parameters())


def test_pieces_save_memory_and_a_frozen_denoiser_holds_no_activations() -> None:
    data = batch()
    peak = {kind: update_cost(make_loss(kind), data, OPTIMIZER).peak for kind in ("frozen", "joint")}
    assert peak["frozen"] < 0.5 * peak["joint"]
    assert update_cost(make_loss("joint"), data, OPTIMIZER, accumulate=4).peak < 0.5 * peak["joint"]


def test_nothing_is_computed_and_the_loss_is_left_as_it_is() -> None:
    loss = make_loss("frozen")
    before: dict[str, Any] = {name: tensor.clone() for name, tensor in loss.state_dict().items()}
    drawn = torch.get_rng_state()
    update_cost(loss, batch(), OPTIMIZER)
    shapes = on_shapes(loss)
    assert all(parameter.is_meta for parameter in shapes.parameters())
    assert [p.requires_grad for p in shapes.parameters()] == [p.requires_grad for p in loss.parameters()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in loss.state_dict().items())
    assert not any(parameter.is_meta or parameter.grad is not None for parameter in loss.parameters())
    torch.set_rng_state(drawn)
