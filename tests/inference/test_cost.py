"""Memory and operations of an update, counted on shapes, against what the update really takes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from orderppl.experiments.benchmark_speed import peak_bytes
from orderppl.guides import RenormalisedScoreGuide
from orderppl.inference import OrderLoss, RevealTraceGraph_ELBO
from orderppl.inference.cost import on_shapes, update_flops, update_memory
from orderppl.models import LearnedPolicy, UnmaskingModel
from orderppl.models.denoisers import MaskedDiffusionLoss, SmdmConfig, SmdmDenoiser
from orderppl.models.networks import PolicyNetwork, SequenceEncoder

V, T, B, L, C = 300, 3, 4, 12, 10
OPTIMIZER = partial(torch.optim.AdamW, lr=1e-4)


def batch() -> dict[str, Tensor]:
    tokens, context = torch.randint(V, (B, L)), torch.randint(V, (B, C))
    masks = {"attention_mask": torch.ones_like(tokens, dtype=torch.bool)}
    return {"tokens": tokens, "context": context, "context_mask": torch.ones_like(context, dtype=torch.bool), **masks}


def make_loss(kind: str) -> nn.Module:
    denoiser = SmdmDenoiser(SmdmConfig(n_layer=2, n_head=2, n_embd=32, intermediate_size=48, vocab_size=V))
    if kind == "denoiser":
        return MaskedDiffusionLoss(denoiser)
    denoiser.requires_grad_(kind == "joint")
    prior = LearnedPolicy(PolicyNetwork(V + 1, width=16, layers=1, heads=2))
    scores = SequenceEncoder(V + 1, 1, width=16, layers=1, heads=2)
    guide = RenormalisedScoreGuide(scores, T, temperature=0.1)
    return OrderLoss(UnmaskingModel(denoiser, prior, T), guide, RevealTraceGraph_ELBO(2))


@pytest.mark.parametrize("kind", ["denoiser", "frozen", "joint"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_memory_is_that_of_the_update(kind: str, dtype: torch.dtype | None) -> None:
    """Few enough rows that the CPU reads none of them once for several (`distinct_rows`), as a GPU never does."""
    loss, data = make_loss(kind), batch()
    found = update_memory(loss, data, OPTIMIZER, autocast_dtype=dtype)
    assert found.weights == sum(tensor.numel() * tensor.element_size() for tensor in loss.parameters())
    parameters = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZER(parameters)

    def update() -> None:
        with pyro.validation_enabled(False), torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            value = loss(**data)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    update()  # makes the optimiser's state, which the measurement then does not see
    state = [value for own in optimizer.state.values() for value in own.values()]
    assert found.optimizer == sum(value.numel() * value.element_size() for value in state)
    measured = peak_bytes(update, torch.device("cpu"))
    assert found.peak - found.optimizer == pytest.approx(measured, rel=0.02 if dtype is None else 0.1)


@pytest.mark.parametrize("kind", ["denoiser", "frozen", "joint"])
def test_operations_are_those_of_the_update(kind: str) -> None:
    loss, data = make_loss(kind), batch()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss(**data).backward()
    # an attention kernel computes its scores again in the backward pass, which the products by themselves do not
    assert update_flops(loss, [data]) == pytest.approx(counter.get_total_flops(), rel=0.05)
    two = {name: tensor[:2] for name, tensor in data.items()}
    assert update_flops(loss, [data, two]) == pytest.approx(0.75 * update_flops(loss, [data]), rel=0.01)


def test_pieces_save_memory_and_a_frozen_denoiser_holds_no_activations() -> None:
    data = batch()
    peak = {kind: update_memory(make_loss(kind), data, OPTIMIZER).peak for kind in ("frozen", "joint")}
    assert peak["frozen"] < 0.5 * peak["joint"]
    joint = make_loss("joint")
    pieces = update_memory(joint, data, OPTIMIZER, accumulate=4)
    assert pieces.peak < 0.5 * peak["joint"]


def test_nothing_is_computed_and_the_loss_is_left_as_it_is() -> None:
    loss = make_loss("frozen")
    before: dict[str, Any] = {name: tensor.clone() for name, tensor in loss.state_dict().items()}
    drawn = torch.get_rng_state()
    update_memory(loss, batch(), OPTIMIZER)
    shapes = on_shapes(loss)
    assert all(parameter.is_meta for parameter in shapes.parameters())
    assert [p.requires_grad for p in shapes.parameters()] == [p.requires_grad for p in loss.parameters()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in loss.state_dict().items())
    assert not any(parameter.is_meta or parameter.grad is not None for parameter in loss.parameters())
    torch.set_rng_state(drawn)
