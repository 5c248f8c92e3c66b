"""Guides, chosen by their name, and which prior each may be paired with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from orderppl import guides, models
from orderppl.errors import UserError
from orderppl.experiments.build.denoisers import as_denoiser
from orderppl.experiments.build.heuristics import (
    HeuristicConfig,
    SizesConfig,
    UniformSizesConfig,
    build_heuristic,
    build_sizes,
)
from orderppl.experiments.build.networks import (
    EncoderConfig,
    OpeningPlanConfig,
    PosteriorNetworkConfig,
    SequenceConfig,
    TableConfig,
    build_policy_network,
    build_sequence_network,
)
from orderppl.experiments.build.tasks import Task
from orderppl.experiments.config import setting
from orderppl.models.priors import RevealPrior


@dataclass(frozen=True)
class RandomGuideConfig:
    """The control: nothing is learned."""

    name: Literal["random"] = "random"


@dataclass(frozen=True)
class HeuristicGuideConfig(HeuristicConfig):
    """What a decoding policy selects along the true tokens; nothing is learned."""

    name: Literal["heuristic"] = "heuristic"
    smoothing: float = setting(0.0, "probability of a flipped decision", at_least=0, below=0.5)
    non_empty: bool | None = setting(None, "reveal at least one position at every step; null: as the prior does")


@dataclass(frozen=True)
class MeanFieldConfig:
    """Independent steps per position; blind to the tokens it is a plan that a decoder can follow."""

    name: Literal["mean_field"] = "mean_field"
    network: SequenceConfig = setting(TableConfig, "its network")
    sees_tokens: bool = setting(False, "show the response tokens to the network")
    tied: bool = setting(False, "share the network of a learned_steps prior")


@dataclass(frozen=True)
class PlackettLuceConfig:
    """Scores ranked and cut into steps of fixed sizes; one position a step is LO-ARM."""

    name: Literal["plackett_luce"] = "plackett_luce"
    network: SequenceConfig = setting(EncoderConfig, "network of the scores")
    sizes: SizesConfig = setting(UniformSizesConfig, "positions revealed at each step")


@dataclass(frozen=True)
class PosteriorConfig:
    """Sets that depend on the tokens and on the state on the way."""

    name: Literal["posterior"] = "posterior"
    network: PosteriorNetworkConfig = setting(PosteriorNetworkConfig, "its network")
    non_empty: bool | None = setting(None, "reveal at least one position at every step; null: as the prior does")


@dataclass(frozen=True)
class RenormalisedScoreConfig:
    """The paper's posterior."""

    name: Literal["renormalised_score"] = "renormalised_score"
    network: SequenceConfig = setting(EncoderConfig, "network of the scores")
    temperature: float = setting(0.1, "of the reveal probabilities", above=0)


@dataclass(frozen=True)
class PolicyGuideConfig:
    """The prior is its own guide."""

    name: Literal["policy"] = "policy"


GuideConfig = (
    RandomGuideConfig
    | HeuristicGuideConfig
    | MeanFieldConfig
    | PlackettLuceConfig
    | PosteriorConfig
    | RenormalisedScoreConfig
    | PolicyGuideConfig
)


def is_table_plan(config: GuideConfig, at_start: bool = False) -> bool:
    """Whether a guide is one plan for all sequences, in a table, or at least begins as one."""
    if not isinstance(config, MeanFieldConfig) or config.sees_tokens:
        return False
    begins = isinstance(config.network, OpeningPlanConfig) and config.network.period is not None
    return isinstance(config.network, TableConfig) or (at_start and begins)


def build_guide(
    config: GuideConfig, prior: RevealPrior, denoiser: nn.Module, task: Task, num_steps: int
) -> guides.RevealGuide:
    """Make a guide; `policy` and a tied `mean_field` use the parameters of the prior.

    Raises:
        UserError: a tied guide without a prior it can be tied to, or a guide outside the support of the prior.
    """
    guide = _make_guide(config, prior, denoiser, task, num_steps)
    if prior.sizes is not None and guide.sizes != prior.sizes:
        problem = f"{config.name} takes other set sizes than this prior's {prior.sizes}: the ELBO is -inf"
        remedy = "choose guide=plackett_luce with the sizes of the prior, guide=policy, or another prior"
        raise UserError("guide.name", problem, remedy)
    if prior.non_empty and not guide.non_empty:
        problem = f"{config.name} may reveal nothing at a step, which this prior gives probability 0: the ELBO is -inf"
        remedy = "choose a guide that never waits (policy, posterior, renormalised_score), or a prior that may wait"
        raise UserError("guide.name", problem, remedy)
    return guide


def _make_guide(
    config: GuideConfig, prior: RevealPrior, denoiser: nn.Module, task: Task, num_steps: int
) -> guides.RevealGuide:
    free = prior.prior if isinstance(prior, models.StepPrice) else prior  # a guide is a normalised law
    match config:
        case RandomGuideConfig():
            return guides.RandomGuide(num_steps)
        case HeuristicGuideConfig():
            policy = build_heuristic(config, task)
            non_empty = prior.non_empty if config.non_empty is None else config.non_empty
            return guides.HeuristicGuide(policy, as_denoiser(denoiser), num_steps, config.smoothing, non_empty)
        case MeanFieldConfig():
            if not config.tied:
                network = build_sequence_network(config.network, task, num_steps, as_denoiser(denoiser))
                return guides.MeanFieldGuide(network, num_steps, sees_tokens=config.sees_tokens)
            if not isinstance(free, models.LearnedSteps) or config.sees_tokens:
                problem = "needs a prior it can share a network with"
                raise UserError("guide.tied", problem, "set prior=learned_steps and guide.sees_tokens=false")
            return guides.MeanFieldGuide(free.network, num_steps, sees_tokens=False)
        case PlackettLuceConfig():
            network = build_sequence_network(config.network, task, 1)
            return guides.PlackettLuceGuide(network, num_steps, build_sizes(config.sizes))
        case PosteriorConfig():
            network = build_policy_network(config.network, task)
            non_empty = prior.non_empty if config.non_empty is None else config.non_empty
            return guides.PosteriorGuide(network, as_denoiser(denoiser), num_steps, non_empty)
        case RenormalisedScoreConfig():
            network = build_sequence_network(config.network, task, 1)
            return guides.RenormalisedScoreGuide(network, num_steps, config.temperature)
        case PolicyGuideConfig():
            return guides.PolicyGuide(free, as_denoiser(denoiser), num_steps)
