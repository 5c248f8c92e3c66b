"""Reveal priors, chosen by their name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orderppl import models
from orderppl.errors import UserError
from orderppl.experiments.build.heuristics import (
    HeuristicConfig,
    SizesConfig,
    UniformSizesConfig,
    build_heuristic,
    build_sizes,
)
from orderppl.experiments.build.networks import (
    PolicyNetworkConfig,
    SequenceConfig,
    TableConfig,
    build_policy_network,
    build_sequence_network,
)
from orderppl.experiments.build.tasks import Task
from orderppl.experiments.config import setting
from orderppl.models.priors import RevealPrior


@dataclass(frozen=True)
class UniformStepsConfig:
    """Every step is as likely for every position."""

    name: Literal["uniform_steps"] = "uniform_steps"


@dataclass(frozen=True)
class CosineStepsConfig:
    """Few positions early, many late."""

    name: Literal["cosine_steps"] = "cosine_steps"


@dataclass(frozen=True)
class LeftToRightConfig:
    """The leftmost masked positions first."""

    name: Literal["left_to_right"] = "left_to_right"
    temperature: float = setting(0.25, "smaller is closer to the fixed order", above=0)


@dataclass(frozen=True)
class EasyFirstConfig:
    """Confident positions first."""

    name: Literal["easy_first"] = "easy_first"
    threshold: float = setting(0.9, "confidence at which revealing has odds of one", above=0, below=1)
    temperature: float = setting(1.0, "towards 0 this is the threshold decoder", above=0)


@dataclass(frozen=True)
class BoundedEntropyConfig:
    """Certain positions first, as many as their entropies allow."""

    name: Literal["bounded_entropy"] = "bounded_entropy"
    bound: float = setting(0.5, "entropy of more certain positions at which revealing has odds of one", at_least=0)
    temperature: float = setting(0.1, "nats; towards 0 this is the entropy-bound decoder", above=0)


@dataclass(frozen=True)
class LearnedPolicyConfig:
    """A network decides from what is visible."""

    name: Literal["learned_policy"] = "learned_policy"
    network: PolicyNetworkConfig = setting(PolicyNetworkConfig, "its network")
    non_empty: bool = setting(True, "reveal at least one position at every step")


@dataclass(frozen=True)
class LearnedStepsConfig:
    """A learned plan of the whole order, from prompt and positions alone."""

    name: Literal["learned_steps"] = "learned_steps"
    network: SequenceConfig = setting(TableConfig, "network of the plan")
    steps: int | None = setting(None, "of the plan, which is played more slowly; null: num_steps", at_least=1)


@dataclass(frozen=True)
class HeldBackConfig:
    """Another policy, with the later sets of a plan held back."""

    name: Literal["held_back"] = "held_back"
    base: EasyFirstConfig | BoundedEntropyConfig | LearnedPolicyConfig = setting(EasyFirstConfig, "the other policy")
    network: SequenceConfig = setting(TableConfig, "network of the plan")
    steps: int | None = setting(None, "of the plan; null: num_steps", at_least=1)
    weight: float = setting(0.5, "log-odds per step of the plan, at first", at_least=0)


LogitPriorConfig = (
    LeftToRightConfig
    | EasyFirstConfig
    | BoundedEntropyConfig
    | LearnedPolicyConfig
    | LearnedStepsConfig
    | HeldBackConfig
)


@dataclass(frozen=True)
class ResidualPolicyConfig:
    """A heuristic and a learned correction to it, zero at the start."""

    name: Literal["residual_policy"] = "residual_policy"
    base: LogitPriorConfig = setting(EasyFirstConfig, "the heuristic, or a plan")
    network: PolicyNetworkConfig = setting(PolicyNetworkConfig, "network of the correction")
    non_empty: bool = setting(True, "reveal at least one position at every step")


@dataclass(frozen=True)
class RankedPolicyConfig:
    """The best positions by another policy, as many as a schedule says."""

    name: Literal["ranked_policy"] = "ranked_policy"
    prior: LogitPriorConfig | ResidualPolicyConfig = setting(ResidualPolicyConfig, "the other policy")
    sizes: SizesConfig = setting(UniformSizesConfig, "positions revealed at each step")


@dataclass(frozen=True)
class AnswerOddsConfig:
    """Ends a sequence because its answer is known."""

    name: Literal["answer_odds"] = "answer_odds"
    sure: float = setting(0.9, "confidence in the answer at which ending has odds of one", above=0, below=1)
    temperature: float = setting(0.5, "towards 0 it ends exactly from that confidence on", above=0)


@dataclass(frozen=True)
class FinishingPolicyConfig:
    """Another policy, with one decision before each of its own: reveal all that is left."""

    name: Literal["finishing_policy"] = "finishing_policy"
    prior: LogitPriorConfig | ResidualPolicyConfig = setting(ResidualPolicyConfig, "the other policy")
    network: PolicyNetworkConfig = setting(PolicyNetworkConfig, "network of the decision; its bias is the first one")
    slope: float = setting(4.0, "with a range of prices: log-odds between its middle and its ends", at_least=0)
    base: AnswerOddsConfig | None = setting(None, "a heuristic that the network corrects, 0 at first; null: none")


@dataclass(frozen=True)
class LearnedScheduleConfig:
    """A learned probability of each step, the same for all positions."""

    name: Literal["learned_schedule"] = "learned_schedule"


@dataclass(frozen=True)
class FixedSizesConfig:
    """Every ordered partition of given set sizes alike."""

    name: Literal["fixed_sizes"] = "fixed_sizes"
    sizes: SizesConfig = setting(UniformSizesConfig, "positions revealed at each step")


@dataclass(frozen=True)
class HeuristicPriorConfig(HeuristicConfig):
    """What a decoding policy selects, some decisions flipped."""

    name: Literal["heuristic"] = "heuristic"
    smoothing: float = setting(0.05, "probability of a flip", above=0, below=0.5)
    non_empty: bool = setting(True, "reveal at least one position at every step")


FreePriorConfig = (
    UniformStepsConfig
    | CosineStepsConfig
    | LearnedScheduleConfig
    | FixedSizesConfig
    | HeuristicPriorConfig
    | LogitPriorConfig
    | ResidualPolicyConfig
    | RankedPolicyConfig
    | FinishingPolicyConfig
)


@dataclass(frozen=True)
class StepPriceConfig:
    """Any prior with a price per executed step."""

    name: Literal["step_price"] = "step_price"
    prior: FreePriorConfig = setting(UniformStepsConfig, "what the price is put on")
    price: float = setting(1.0, "nats per executed step", at_least=0)
    highest: float | None = setting(None, "largest price of a range that begins at `price`; null: one price", above=0)

    def __post_init__(self) -> None:
        """Check the range."""
        if self.highest is not None and not 0 < self.price <= self.highest:
            problem = f"{self.price:g} to {self.highest:g} is no range of positive prices"
            raise UserError("highest", problem, "set price above 0 and highest above price")


PriorConfig = FreePriorConfig | StepPriceConfig


def build_prior(
    config: PriorConfig, task: Task, num_steps: int, prices: models.PriceRange | None = None
) -> RevealPrior:
    """Make a reveal prior.

    Args:
        config: which one.
        task: its data.
        num_steps: step budget T.
        prices: the range that a step price around it charges, for networks with the feature `price`.
    """
    match config:
        case UniformStepsConfig():
            return models.UniformSteps()
        case CosineStepsConfig():
            return models.CosineSteps()
        case LearnedScheduleConfig():
            return models.LearnedSchedule(num_steps)
        case FixedSizesConfig():
            return models.FixedSizes(build_sizes(config.sizes))
        case HeuristicPriorConfig():
            return models.HeuristicPrior(build_heuristic(config, task), config.smoothing, config.non_empty)
        case LeftToRightConfig():
            return models.LeftToRight(config.temperature)
        case EasyFirstConfig():
            return models.EasyFirst(config.threshold, config.temperature)
        case BoundedEntropyConfig():
            return models.BoundedEntropy(config.bound, config.temperature)
        case LearnedPolicyConfig():
            return models.LearnedPolicy(build_policy_network(config.network, task, prices=prices), config.non_empty)
        case ResidualPolicyConfig():
            base = _build_logits(config.base, task, num_steps, prices)
            correction = build_policy_network(config.network, task, True, prices)
            return models.ResidualPolicy(base, correction, config.non_empty)
        case HeldBackConfig():
            base = _build_logits(config.base, task, num_steps, prices)
            network = build_sequence_network(config.network, task, config.steps or num_steps)
            return models.HeldBack(base, network, config.weight)
        case RankedPolicyConfig():
            ranked = _build_logits(config.prior, task, num_steps, prices)
            return models.RankedPolicy(ranked, build_sizes(config.sizes))
        case FinishingPolicyConfig():
            other = build_prior(config.prior, task, num_steps, prices)
            decision = build_policy_network(config.network, task, config.base is not None, prices)
            known = None
            if config.base is not None:
                answer = task.answer_tokens("prior.base")
                known = models.AnswerOdds(answer, config.base.sure, config.base.temperature)
            return models.FinishingPolicy(other, decision, prices, config.slope, known)
        case LearnedStepsConfig():
            planned = config.steps or num_steps
            if planned > num_steps:
                raise UserError("prior.steps", f"a plan of {planned} steps in {num_steps}", "give at most num_steps")
            return models.LearnedSteps(build_sequence_network(config.network, task, planned))
        case StepPriceConfig():
            price = config.price if config.highest is None else models.PriceRange(config.price, config.highest)
            prices = price if isinstance(price, models.PriceRange) else None
            return models.StepPrice(build_prior(config.prior, task, num_steps, prices), price)


def _build_logits(
    config: LogitPriorConfig | ResidualPolicyConfig, task: Task, num_steps: int, prices: models.PriceRange | None
) -> models.LogitPrior:
    prior = build_prior(config, task, num_steps, prices)
    assert isinstance(prior, models.LogitPrior)
    return prior
