"""The hand-written updates are the library's: one loss and one gradient for the same order."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pyro
import pytest
import torch
from pyro.ops.provenance import detach_provenance
from torch import Tensor, nn

from orderppl.experiments import handwritten
from orderppl.guides import MeanFieldGuide, PolicyGuide, SequentialGuide
from orderppl.inference import RevealTraceGraph_ELBO
from orderppl.models import (
    EasyFirst,
    LearnedPolicy,
    LogitPrior,
    ResidualPolicy,
    SequentialUnmaskingModel,
    UniformSteps,
    UnmaskingModel,
)
from orderppl.models.denoisers import TransformerDenoiser
from orderppl.models.networks import PolicyNetwork, SequenceEncoder

STEPS, PARTICLES, VOCAB, LENGTH = 3, 4, 8, 6


@pytest.fixture(autouse=True)
def local_double_precision() -> Iterator[None]:
    with pyro.settings.context(module_local_params=True):
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)


def ragged_batch() -> dict[str, Tensor]:
    """Five rows with prompts, padded at both."""
    sizes, prompts = torch.tensor([6, 4, 1, 5, 6]), torch.tensor([2, 3, 1, 3, 2])
    return {
        "tokens": torch.randint(0, VOCAB - 1, (5, LENGTH)),
        "attention_mask": torch.arange(LENGTH) < sizes[:, None],
        "context": torch.randint(0, VOCAB - 1, (5, 3)),
        "context_mask": torch.arange(3) < prompts[:, None],
    }


def make_denoiser(frozen: bool, behind: bool = False) -> TransformerDenoiser:
    """MASK inside the vocabulary, or just behind it."""
    mask_index = VOCAB if behind else VOCAB - 1
    return TransformerDenoiser(VOCAB, mask_index, width=16, layers=1, heads=2).requires_grad_(not frozen)


def make_encoder() -> SequenceEncoder:
    network = SequenceEncoder(VOCAB, STEPS, width=8, layers=1, heads=2)
    nn.init.normal_(network.head.weight)
    return network


def make_policy(kind: str) -> LogitPrior:
    network = PolicyNetwork(VOCAB, width=8, layers=1, heads=2)
    nn.init.normal_(network.head.weight)
    return LearnedPolicy(network) if kind == "learned" else ResidualPolicy(EasyFirst(0.5), network)


def recorded(guide: nn.Module) -> list[dict[str, Tensor]]:
    """What the guide draws from now on."""
    drawn: list[dict[str, Tensor]] = []
    guide.register_forward_hook(lambda module, inputs, output: drawn.append(detach_provenance(output)))
    return drawn


def assert_same(library: Tensor, by_hand: Tensor, modules: list[nn.Module]) -> None:
    over = [p for module in modules for p in module.parameters() if p.requires_grad]
    assert by_hand.item() == pytest.approx(library.item(), rel=1e-9)
    wanted = torch.autograd.grad(library, over, allow_unused=True)
    found = torch.autograd.grad(by_hand, over, allow_unused=True)
    size = 0.0
    for mine, theirs, parameter in zip(wanted, found, over, strict=True):
        zero = torch.zeros_like(parameter)
        mine, theirs = (zero if g is None else g for g in (mine, theirs))
        torch.testing.assert_close(theirs, mine, rtol=1e-6, atol=1e-9)
        size += float(mine.abs().sum())
    assert size > 0


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize("ragged", [True, False])
def test_stacked(frozen: bool, behind: bool, ragged: bool) -> None:
    denoiser, network = make_denoiser(frozen, behind), make_encoder()
    batch = ragged_batch()
    if not ragged:
        batch = {"tokens": batch["tokens"], "attention_mask": torch.ones_like(batch["attention_mask"])}
    guide = MeanFieldGuide(network, STEPS)
    drawn = recorded(guide)
    library = RevealTraceGraph_ELBO(PARTICLES)(UnmaskingModel(denoiser, UniformSteps(), STEPS), guide)
    loss = library(*batch.values()) / 5
    order = drawn[0]["reveal_step"]
    assert order.shape == (PARTICLES, 5, LENGTH)
    by_hand = handwritten.stacked_update(
        denoiser, network, **batch, num_steps=STEPS, num_particles=PARTICLES, order=order
    )
    assert_same(loss, by_hand, [denoiser, network])


@pytest.mark.parametrize("frozen", [True, False])
def test_one_step(frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is looked at by some row."""
    denoiser, network, batch = make_denoiser(frozen), make_encoder(), ragged_batch()
    step = torch.tensor([0, 2, 1, 1, 2])
    monkeypatch.setattr("orderppl.path._one_step_each", lambda *_: step.unsqueeze(0))
    guide = MeanFieldGuide(network, STEPS)
    drawn = recorded(guide)
    model = UnmaskingModel(denoiser, UniformSteps(), STEPS, one_step=True)
    loss = RevealTraceGraph_ELBO(PARTICLES)(model, guide)(*batch.values()) / 5
    settings = {"num_steps": STEPS, "num_particles": PARTICLES, "order": drawn[0]["reveal_step"], "step": step}
    by_hand = handwritten.one_step_update(denoiser, network, **batch, **settings)
    assert_same(loss, by_hand, [denoiser, network])


@pytest.mark.parametrize("frozen", [True, False])
def test_sequential(frozen: bool) -> None:
    denoiser, network, batch = make_denoiser(frozen), make_encoder(), ragged_batch()
    guide = SequentialGuide(MeanFieldGuide(network, STEPS))
    drawn = recorded(guide)
    model = SequentialUnmaskingModel(denoiser, UniformSteps(), STEPS)
    loss = RevealTraceGraph_ELBO(PARTICLES)(model, guide)(*batch.values()) / 5
    order = torch.full((PARTICLES, 5, LENGTH), STEPS - 1).masked_fill(~batch["attention_mask"], -1)
    for t in range(STEPS - 1):
        order = order.masked_fill(drawn[0][f"reveal_{t}"], t)
    settings = {"num_steps": STEPS, "num_particles": PARTICLES, "order": order}
    assert_same(loss, handwritten.sequential_update(denoiser, network, **batch, **settings), [denoiser, network])


@pytest.mark.parametrize("kind", ["learned", "residual"])
@pytest.mark.parametrize("frozen", [True, False])
def test_tied_policy(kind: str, frozen: bool) -> None:
    denoiser, policy, batch = make_denoiser(frozen), make_policy(kind), ragged_batch()
    guide = PolicyGuide(policy, denoiser, STEPS)
    drawn = recorded(guide)
    loss = RevealTraceGraph_ELBO(PARTICLES)(UnmaskingModel(denoiser, policy, STEPS), guide)(*batch.values()) / 5
    settings = {"num_steps": STEPS, "num_particles": PARTICLES, "order": drawn[0]["reveal_step"]}
    by_hand = handwritten.tied_policy_update(denoiser, policy.logits, **batch, **settings)
    assert_same(loss, by_hand, [denoiser, policy])


@pytest.mark.parametrize(
    ("update", "one_of"),
    [
        (handwritten.stacked_update, "network"),
        (handwritten.one_step_update, "network"),
        (handwritten.sequential_update, "network"),
        (handwritten.tied_policy_update, "policy"),
    ],
)
def test_own_draws_have_the_mean_of_the_library(update: Callable[..., Tensor], one_of: str) -> None:
    """Mean loss over 100 updates of 8 particles with the function's own draws; |z| < 5."""
    denoiser, batch = make_denoiser(True), ragged_batch()
    policy, network = make_policy("learned"), make_encoder()
    prior = policy if one_of == "policy" else UniformSteps()
    guide = PolicyGuide(policy, denoiser, STEPS) if one_of == "policy" else MeanFieldGuide(network, STEPS)
    elbo, model = RevealTraceGraph_ELBO(100), UnmaskingModel(denoiser, prior, STEPS)
    with torch.no_grad():
        reference = torch.tensor([elbo.loss(model, guide, *batch.values()) / 5 for _ in range(20)])
        settings = {"num_steps": STEPS, "num_particles": 8}
        learner = policy.logits if one_of == "policy" else network
        found = torch.stack([update(denoiser, learner, **batch, **settings) for _ in range(100)])
    error = (found.var() / 100 + reference.var() / 20).sqrt()
    assert abs(found.mean() - reference.mean()) < 5 * error
    assert error < 0.05 * reference.mean().abs()
