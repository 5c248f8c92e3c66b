"""Networks of learned priors and guides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from orderppl.denoising import Denoiser
from orderppl.errors import UserError
from orderppl.experiments.build.tasks import Task
from orderppl.experiments.config import setting
from orderppl.models import PriceRange, networks
from orderppl.models.plans import OpeningPlan


def check_kernel(kernel: int | None) -> None:
    """Refuse a convolution without a centre.

    Raises:
        UserError: an even kernel.
    """
    if kernel is not None and kernel % 2 == 0:
        raise UserError("kernel", f"{kernel} is even", "give an odd number")


@dataclass(frozen=True)
class TableConfig:
    """Free numbers per position."""

    name: Literal["table"] = "table"
    split: int | None = setting(None, "positions indexed from the left end; the others from the right", at_least=0)
    noise: float = setting(0.0, "standard deviation of the initial numbers", at_least=0)
    period: int | None = setting(None, "positions after which the numbers repeat; null: never", at_least=1)


@dataclass(frozen=True)
class EncoderConfig:
    """A transformer over prompt and response."""

    name: Literal["transformer"] = "transformer"
    width: int = setting(64, "size of the hidden vectors", at_least=8)
    layers: int = setting(2, "blocks", at_least=1)
    heads: int = setting(4, "attention heads", at_least=1)
    zero_init: bool = setting(False, "start with all outputs 0")


@dataclass(frozen=True)
class OpeningPlanConfig:
    """Waves over the positions, and what the denoiser expects while everything is hidden; for plans."""

    name: Literal["opening"] = "opening"
    width: int = setting(32, "size of the hidden vectors", at_least=1)
    kernel: int = setting(5, "positions that a convolution sees, odd", at_least=1)
    reads_opening: bool = setting(True, "look at the predictions, and so at the prompt")
    noise: float = setting(0.1, "standard deviation of the initial weights of the waves", at_least=0)
    period: int | None = setting(None, "positions after which a free pattern repeats; null: no pattern", at_least=1)

    def __post_init__(self) -> None:
        """Refuse kernels without a centre."""
        check_kernel(self.kernel)


SequenceConfig = TableConfig | EncoderConfig | OpeningPlanConfig


@dataclass(frozen=True)
class PolicyNetworkConfig:
    """Reads a partially revealed sequence and the denoiser's view of it."""

    width: int = setting(64, "size of the hidden vectors", at_least=8)
    layers: int = setting(2, "blocks", at_least=1)
    heads: int = setting(4, "attention heads", at_least=1)
    features: tuple[str, ...] = setting(
        networks.FEATURES,
        "of the denoiser: confidence, margin, entropy, before, chance, prediction, hidden; and price, of a step",
    )
    reads_tokens: bool = setting(True, "see revealed tokens and prompt")
    bias: float = setting(-2.0, "initial logit")
    places: bool = setting(False, "an embedding per position, where each means something of its own: a grid")
    hidden: int | None = setting(None, "size of the denoiser's hidden states, for the feature hidden", at_least=1)
    kernel: int | None = setting(None, "positions that convolutions see, odd; null: attention only", at_least=1)

    def __post_init__(self) -> None:
        """Refuse kernels without a centre."""
        check_kernel(self.kernel)


@dataclass(frozen=True)
class PosteriorNetworkConfig:
    """Reads the true tokens, a partially revealed sequence and the denoiser's view of it."""

    width: int = setting(64, "size of the hidden vectors", at_least=8)
    layers: int = setting(2, "blocks", at_least=1)
    heads: int = setting(4, "attention heads", at_least=1)
    features: tuple[str, ...] = setting(
        networks.TRUTH_FEATURES,
        "of the denoiser: confidence, margin, entropy, before, chance, likelihood (of the true token)",
    )
    reads_tokens: bool = setting(True, "see the prompt, and the revealed tokens apart from the true ones")
    bias: float = setting(-1.0, "initial logit")


def build_sequence_network(config: SequenceConfig, task: Task, out: int, denoiser: Denoiser | None = None) -> nn.Module:
    """Network from whole sequences to `out` numbers per response position.

    Raises:
        UserError: a network that reads a denoiser where none is given.
    """
    if isinstance(config, OpeningPlanConfig):
        if denoiser is None:
            raise UserError("network.name", "opening reads the denoiser", "use it in guide=mean_field, untied")
        return OpeningPlan(
            denoiser,
            out,
            width=config.width,
            kernel=config.kernel,
            reads_opening=config.reads_opening,
            noise=config.noise,
            period=config.period,
        )
    if isinstance(config, TableConfig):
        length, periodic = config.period or task.longest, config.period is not None
        return networks.PositionTable(length, out, split=config.split, noise=config.noise, periodic=periodic)
    return networks.SequenceEncoder(
        task.vocab_size,
        out,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        max_length=task.canvas_length,
        zero_init=config.zero_init,
    )


def build_policy_network(
    config: PolicyNetworkConfig | PosteriorNetworkConfig,
    task: Task,
    zero_init: bool = False,
    prices: PriceRange | None = None,
) -> nn.Module:
    """Network from states, or from states and true tokens, to reveal logits; it reads prices if it has the feature."""
    own: dict[str, int | None] = {}
    if isinstance(config, PolicyNetworkConfig):
        own = {"places": task.longest if config.places else None, "hidden": config.hidden, "kernel": config.kernel}
    return networks.PolicyNetwork(
        task.vocab_size,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        features=config.features,
        reads_tokens=config.reads_tokens,
        zero_init=zero_init,
        bias=config.bias,
        sees_truth=isinstance(config, PosteriorNetworkConfig),
        prices=prices if "price" in config.features else None,
        **own,
    )
