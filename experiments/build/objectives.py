"""Objectives, chosen by their name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pyro.infer import ELBO, Trace_ELBO, TraceGraph_ELBO

from orderppl.errors import UserError
from orderppl.experiments.config import setting
from orderppl.inference import (
    EnumeratedELBO,
    ImportanceWeightedELBO,
    RelaxedELBO,
    RevealTraceGraph_ELBO,
    SequenceWakeSleep,
)


@dataclass(frozen=True)
class ObjectiveConfig:
    """What all objectives can be told."""

    estimates: ClassVar[bool] = False  # whether an unbiased estimate of log p(x, r) is enough for it
    one_step: bool = setting(False, "one random step per sequence instead of all")

    def __post_init__(self) -> None:
        """Refuse estimates where densities are needed."""
        if self.one_step and not self.estimates:
            problem = f"{getattr(self, 'name', 'this objective')} needs log p(x, r) itself, one step only estimates it"
            raise UserError("one_step", problem, "set it to false, or choose elbo=reveal_trace_graph")


@dataclass(frozen=True)
class RevealTraceGraphConfig(ObjectiveConfig):
    """The bound, every reveal set credited with what it made easier."""

    estimates = True
    name: Literal["reveal_trace_graph"] = "reveal_trace_graph"
    num_particles: int = setting(8, "orders drawn per sequence", at_least=1)
    kl_weight: float = setting(1.0, "weight of the KL term", at_least=0)
    leave_one_out: bool = setting(True, "mean of the other particles as baseline")
    credit: Literal["gain", "expected"] | None = setting(None, "what a reveal set is credited with; null: by program")
    discount: float = setting(1.0, "of later steps in a gain; below 1 biased, and less noisy", at_least=0, at_most=1)

    def __post_init__(self) -> None:
        """Refuse gains, which one step does not show."""
        super().__post_init__()
        if self.one_step and self.credit == "gain":
            raise UserError("credit", "a one-step program cannot see gains", "set it to null, or one_step to false")


@dataclass(frozen=True)
class TraceGraphConfig(ObjectiveConfig):
    """The bound as Pyro estimates it, by the score function with costs downstream."""

    estimates = True
    name: Literal["trace_graph"] = "trace_graph"
    num_particles: int = setting(8, "orders drawn per sequence", at_least=1)


@dataclass(frozen=True)
class TraceConfig(ObjectiveConfig):
    """The bound as Pyro estimates it, by the plain score function."""

    estimates = True
    name: Literal["trace"] = "trace"
    num_particles: int = setting(8, "orders drawn per sequence", at_least=1)


@dataclass(frozen=True)
class ImportanceWeightedConfig(ObjectiveConfig):
    """The tighter bound of several orders at once."""

    name: Literal["importance_weighted"] = "importance_weighted"
    num_particles: int = setting(8, "orders per sequence in the bound", at_least=1)
    kl_weight: float = setting(1.0, "exponent of p(order) / q(order) in the weights", at_least=0)


@dataclass(frozen=True)
class WakeSleepConfig(ObjectiveConfig):
    """Reweighted wake-sleep."""

    name: Literal["wake_sleep"] = "wake_sleep"
    num_particles: int = setting(8, "orders drawn per sequence", at_least=2)


@dataclass(frozen=True)
class EnumeratedConfig(ObjectiveConfig):
    """The bound as a sum over all orders."""

    name: Literal["enumerated"] = "enumerated"
    max_orders: int = setting(10_000, "most orders T^L that are enumerated", at_least=1)
    kl_weight: float = setting(1.0, "weight of the KL term", at_least=0)


@dataclass(frozen=True)
class RelaxedConfig(ObjectiveConfig):
    """The bound with a relaxed gradient, which is biased: for ablations."""

    name: Literal["relaxed"] = "relaxed"
    num_particles: int = setting(8, "orders drawn per sequence", at_least=1)
    kl_weight: float = setting(1.0, "weight of the KL term", at_least=0)
    temperature: float = setting(0.5, "of the Gumbel-softmax", above=0)


ElboConfig = (
    RevealTraceGraphConfig
    | TraceGraphConfig
    | TraceConfig
    | ImportanceWeightedConfig
    | WakeSleepConfig
    | EnumeratedConfig
    | RelaxedConfig
)


def build_elbo(config: ElboConfig) -> ELBO:
    """Make the objective."""
    match config:
        case RevealTraceGraphConfig():
            return RevealTraceGraph_ELBO(
                num_particles=config.num_particles,
                kl_weight=config.kl_weight,
                leave_one_out=config.leave_one_out,
                credit=config.credit,
                discount=config.discount,
            )
        case TraceGraphConfig():
            return TraceGraph_ELBO(config.num_particles, max_plate_nesting=1, vectorize_particles=True)
        case TraceConfig():
            return Trace_ELBO(config.num_particles, max_plate_nesting=1, vectorize_particles=True)
        case ImportanceWeightedConfig():
            return ImportanceWeightedELBO(config.num_particles, kl_weight=config.kl_weight)
        case WakeSleepConfig():
            return SequenceWakeSleep(config.num_particles)
        case EnumeratedConfig():
            return EnumeratedELBO(config.max_orders, kl_weight=config.kl_weight)
        case RelaxedConfig():
            return RelaxedELBO(config.num_particles, temperature=config.temperature, kl_weight=config.kl_weight)
