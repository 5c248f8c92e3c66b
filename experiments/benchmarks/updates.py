"""An SVI update of the library, and the same update by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import handwritten
import torch
from torch import Tensor, nn

from orderppl import Batch
from orderppl.guides import Guide, MeanFieldGuide, PolicyGuide, SequentialGuide
from orderppl.inference import RevealTraceGraph_ELBO
from orderppl.inference.fitting import PairLoss
from orderppl.models import LearnedPolicy, PolicyNetwork, SequenceEncoder, SequentialUnmaskingModel, UnmaskingModel
from orderppl.models.denoisers import TransformerDenoiser
from orderppl.models.denoisers.smdm import SmdmDenoiser
from orderppl.policies import RandomSteps

Axis = Literal["steps", "length", "particles", "trainable", "precision", "compiled", "smdm"]
MODES = ("stacked", "sequential", "policy")
LIBRARY, BY_HAND = "library", "by hand"


@dataclass(frozen=True)
class Size:
    """A denoiser with random weights, and how much is put before it.

    Args:
        width: size of the hidden vectors.
        layers: blocks.
        heads: attention heads.
        batch_size: sequences B.
        particles: orders per sequence K.
    """

    width: int = 128
    layers: int = 3
    heads: int = 4
    batch_size: int = 8
    particles: int = 4


@dataclass(frozen=True)
class Shape:
    """What is revealed.

    Args:
        steps: step budget T, where it is not varied.
        length: most positions to reveal.
        prompt: most prompt tokens.
        vocab_size: token classes V, MASK included.
    """

    steps: int = 8
    length: int = 32
    prompt: int = 8
    vocab_size: int = 128


@dataclass(frozen=True)
class Case:
    """One thing to measure."""

    axis: Axis
    mode: str
    denoiser: str
    size: Size
    shape: Shape
    trainable: bool = False
    precision: str = "float32"
    compiled: bool = False

    @property
    def labels(self) -> dict[str, object]:
        """What identifies the case in a record."""
        own = {key: value for key, value in vars(self).items() if key not in ("size", "shape")}
        return own | {"batch_size": self.size.batch_size, "particles": self.size.particles} | asdict(self.shape)

    def make_denoiser(self) -> nn.Module:
        """A transformer, or an SMDM; the last id is MASK."""
        size, classes = self.size, self.shape.vocab_size
        if self.axis == "smdm":
            network: nn.Module = SmdmDenoiser(size.layers, size.heads, size.width, 4 * size.width, classes - 1)
        else:
            longest = self.shape.length + self.shape.prompt
            widths: dict[str, Any] = {"width": size.width, "layers": size.layers, "heads": size.heads}
            network = TransformerDenoiser(classes, classes - 1, max_length=longest, **widths)
        return network.requires_grad_(self.trainable)


def make_updates(case: Case, denoiser: Any, batch: Batch) -> dict[str, Callable[[], None]]:
    """The update of the library and the one by hand, of the same networks and by the same optimiser."""
    steps, particles = case.shape.steps, case.size.particles
    learner, model, guide, by_hand = make_pair(case.mode, denoiser, steps, case.shape.vocab_size)
    for module in (learner, model, guide):
        module.to(batch.device)
    parameters = [p for module in (learner, denoiser) for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-4)
    loss = PairLoss(model, guide, RevealTraceGraph_ELBO(particles))

    def update(value: Callable[[], Tensor]) -> None:
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=case.precision == "bfloat16"):
            current = value()
        current.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # at the end: what is held between updates is the same for both

    twin = partial(by_hand, batch, num_steps=steps, num_particles=particles)
    return {LIBRARY: partial(update, partial(loss, batch)), BY_HAND: partial(update, twin)}


def make_pair(
    mode: str, denoiser: Any, steps: int, vocab_size: int
) -> tuple[nn.Module, nn.Module, nn.Module, Callable[..., Tensor]]:
    """What learns the order, the library's model and guide, and the loss by hand."""
    if mode == "policy":
        policy = LearnedPolicy(PolicyNetwork(vocab_size))
        by_hand = partial(handwritten.tied_policy_update, denoiser, policy.logits)
        return policy, UnmaskingModel(denoiser, policy, steps), PolicyGuide(policy, denoiser, steps), by_hand
    network = SequenceEncoder(vocab_size, steps)
    guide: Guide = MeanFieldGuide(network, steps)
    if mode == "stacked":
        by_hand = partial(handwritten.stacked_update, denoiser, network)
        return network, UnmaskingModel(denoiser, RandomSteps(), steps), guide, by_hand
    by_hand = partial(handwritten.sequential_update, denoiser, network)
    return network, SequentialUnmaskingModel(denoiser, RandomSteps(), steps), SequentialGuide(guide), by_hand
