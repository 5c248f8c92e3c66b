"""Everything that describes the learning of an order, optimiser and loop included, and the objects made from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import pyro
import torch
from pyro.infer import ELBO
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from orderppl import guides, models
from orderppl.decoding import Policy
from orderppl.errors import UserError
from orderppl.experiments.build.denoisers import (
    ChainDenoiserConfig,
    DenoiserConfig,
    as_denoiser,
    build_denoiser,
    saved_tokenizer,
)
from orderppl.experiments.build.guides import (
    GuideConfig,
    MeanFieldConfig,
    RenormalisedScoreConfig,
    build_guide,
    is_table_plan,
)
from orderppl.experiments.build.heuristics import HeuristicConfig, Policies, build_heuristic
from orderppl.experiments.build.loop import LoopConfig
from orderppl.experiments.build.objectives import ElboConfig, RevealTraceGraphConfig, build_elbo
from orderppl.experiments.build.priors import PriorConfig, StepPriceConfig, UniformStepsConfig, build_prior
from orderppl.experiments.build.tasks import ChainTask, Task, TaskConfig, build_task
from orderppl.experiments.config import RunConfig, setting
from orderppl.inference import (
    Imitation,
)
from orderppl.inference.annealing import Anneal
from orderppl.models.priors import RevealPrior


@dataclass(frozen=True)
class OptimizerConfig:
    """Any of three torch optimisers, with a learning-rate schedule."""

    algorithm: Literal["adam", "adamw", "sgd"] = setting("adam", "torch.optim class")
    lr: float = setting(0.01, "largest learning rate", above=0)
    weight_decay: float = setting(0.0, "decay of the weights", at_least=0)
    schedule: Literal["constant", "linear", "cosine"] = setting("constant", "after the warm-up")
    warmup: int = setting(0, "updates of the linear warm-up", at_least=0)


@dataclass(frozen=True)
class WarmStartConfig(HeuristicConfig):
    """A decoding policy to imitate before the bound is climbed."""

    policy: Policies = setting("threshold", "the teacher")
    smoothing: float = setting(0.05, "probability of a flipped decision of the teacher", at_least=0, below=0.5)
    updates: int = setting(200, "updates of the imitation", at_least=1)


@dataclass(frozen=True)
class FitConfig(LoopConfig):
    """The training loop."""

    updates: int = setting(500, "updates", at_least=1)
    batch_size: int = setting(32, "sequences per update", at_least=1)
    group: int = setting(1, "batches sorted by length together, against padding; 1: rows stay unsorted", at_least=1)
    grad_clip: float | None = setting(None, "largest gradient norm", above=0)
    kl_weight: Anneal | None = setting(None, "annealed elbo.kl_weight")
    temperature: Anneal | None = setting(None, "annealed guide.temperature")
    step_price: Anneal | None = setting(None, "annealed price of a step_price prior")
    validate_every: int | None = setting(100, "updates between two validations", at_least=1)
    patience: int | None = setting(None, "validations without progress before stopping", at_least=1)
    ema_decay: float | None = setting(None, "decay of averaged parameters", above=0, below=1)
    warm_start: WarmStartConfig | None = setting(None, "a policy to imitate first; null: none")

    def __post_init__(self) -> None:
        """Check what belongs together."""
        if self.patience is not None and self.validate_every is None:
            raise UserError("patience", "needs validations", "set validate_every")
        if self.temperature is not None and min(self.temperature.start, self.temperature.end) <= 0:
            raise UserError("temperature", "must stay above 0", "set start and end to positive numbers")


@dataclass(frozen=True)
class RefineConfig:
    """The local search on a plan, after the fit or before it; it climbs the likelihood alone. See `refine_plan`."""

    first: bool = setting(False, "search before the fit, which then starts from the plan that was found")
    start: Literal["mode", "alternating"] = setting(
        "mode", "where it starts: the most likely steps, or every other place at the last step, the rest in turn"
    )
    margin: float = setting(10.0, "log-odds of the planned step against any other one", above=0)
    rows: int = setting(1000, "training sequences it looks at, at most", at_least=1)
    longest: int | None = setting(None, "tokens of prompt and response; longer sequences are left out", at_least=1)
    block: int = setting(128, "changes looked at together", at_least=1)
    kicks: int = setting(0, "times it goes on from the best plan with a few places moved at random", at_least=0)
    screen: int = setting(128, "sequences of the first look at a change", at_least=1)
    max_evaluations: int | None = setting(None, "most plans to look at", at_least=1)


@dataclass(frozen=True)
class OrderConfig(RunConfig):
    """Everything that describes the learning of an order."""

    num_steps: int = setting(4, "step budget T", at_least=1, option="--steps")
    task: TaskConfig = setting(ChainTask, "data")
    denoiser: DenoiserConfig = setting(ChainDenoiserConfig, "what fills in the tokens")
    freeze_denoiser: bool = setting(True, "learn the order only")
    outlier: float = setting(0.0, "share of sequences that may be anything; see RevealedTokens", at_least=0, below=1)
    asked: Literal["response", "answer"] = setting(
        "response", "what has to be right: all tokens, or those of the answer and what is written before it is there"
    )
    token_temperature: float = setting(
        1.0, "at which tokens are drawn in the likelihood; 0.25 comes close to the greedy tokens of a decoder", above=0
    )
    prior: PriorConfig = setting(UniformStepsConfig, "p(order)")
    guide: GuideConfig = setting(MeanFieldConfig, "q(order | sequence)")
    elbo: ElboConfig = setting(RevealTraceGraphConfig, "the objective", unnamed=True)
    optimizer: OptimizerConfig = setting(OptimizerConfig, "the optimiser")
    fit: FitConfig = setting(FitConfig, "the training loop")
    refine: RefineConfig | None = setting(None, "a local search on the plan after the fit; null: none")

    def __post_init__(self) -> None:
        """Check what belongs together."""
        if self.refine is not None and not is_table_plan(self.guide, self.refine.first):
            problem = f"{self.guide.name} has no plan to search on"
            remedy = "choose guide=mean_field with a table that is blind to the tokens, or set refine=null"
            raise UserError("refine", problem, remedy)
        if self.refine is not None and isinstance(self.prior, StepPriceConfig):
            raise UserError("refine", "does not know the price of a step", "set refine=null, or another prior")
        if self.fit.temperature is not None and not isinstance(self.guide, RenormalisedScoreConfig):
            raise UserError("fit.temperature", f"{self.guide.name} has no temperature", "leave it out")
        if self.fit.step_price is not None and not isinstance(self.prior, StepPriceConfig):
            raise UserError("fit.step_price", f"{self.prior.name} has no price", "set prior.name=step_price")
        if self.fit.step_price is not None and getattr(self.prior, "highest", None) is not None:
            raise UserError("fit.step_price", "a range of prices is not annealed", "set prior.highest=null")
        if self.fit.kl_weight is not None and not hasattr(self.elbo, "kl_weight"):
            remedy = "set it to null, or choose another objective"
            raise UserError("fit.kl_weight", f"{self.elbo.name} has no weight of a KL to anneal", remedy)
        if self.token_temperature != 1 and self.elbo.name == "relaxed":
            raise UserError("token_temperature", "the relaxed objective knows none", "set it to 1")
        if self.elbo.one_step or self.elbo.name == "relaxed":
            problem = "needs the likelihood of whole sequences, which this objective does not know"
            remedy = "or use elbo=reveal_trace_graph with one_step=false"
            if self.outlier:
                raise UserError("outlier", problem, f"set it to 0, {remedy}")
            if self.asked == "answer":
                raise UserError("asked", problem, f"set it to response, {remedy}")


@dataclass
class OrderProblem:
    """The objects of one `OrderConfig`."""

    task: Task
    denoiser: nn.Module
    model: models.UnmaskingModel
    guide: guides.RevealGuide
    elbo: ELBO


def build_problem(config: OrderConfig, task: Task | None = None, denoiser: nn.Module | None = None) -> OrderProblem:
    """Make everything a fit needs.

    Args:
        config: the settings.
        task: data that is already there, in place of `config.task`.
        denoiser: one that is already there, in place of `config.denoiser`.
    """
    task = build_task(config.task, config.seed, saved_tokenizer(config.denoiser)) if task is None else task
    denoiser = build_denoiser(config.denoiser, task, config.task) if denoiser is None else denoiser
    denoiser.requires_grad_(not config.freeze_denoiser)
    prior = build_prior(config.prior, task, config.num_steps)
    with pyro.settings.context(module_local_params=True):  # as `fit` runs them; a program remembers how it was made
        model = models.UnmaskingModel(
            as_denoiser(denoiser),
            prior,
            config.num_steps,
            one_step=config.elbo.one_step,
            outlier=config.outlier,
            asked=task.answer_tokens("asked") if config.asked == "answer" else None,
            temperature=config.token_temperature,
        )
        guide = build_guide(config.guide, prior, denoiser, task, config.num_steps)
    return OrderProblem(task, denoiser, model, guide, build_elbo(config.elbo))


def build_imitation(config: WarmStartConfig, problem: OrderProblem) -> Imitation:
    """Make the objective of a warm start; its teacher never waits where a student may not."""
    prior, guide = problem.model.prior, problem.guide
    assert isinstance(prior, RevealPrior)
    policy, denoiser = build_heuristic(config, problem.task), as_denoiser(problem.denoiser)
    non_empty = prior.non_empty or guide.non_empty
    with pyro.settings.context(module_local_params=True):
        teacher = guides.HeuristicGuide(policy, denoiser, guide.num_steps, config.smoothing, non_empty)
    return Imitation(teacher)


def build_optimizer(config: OptimizerConfig) -> Callable[[Iterable[nn.Parameter]], Optimizer]:
    """What makes the optimiser from the parameters."""
    kind: Any = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[config.algorithm]
    return partial(kind, lr=config.lr, weight_decay=config.weight_decay)


def build_schedule(config: OptimizerConfig, updates: int) -> Callable[[Optimizer], LRScheduler] | None:
    """What makes the learning-rate schedule from the optimiser; None for a constant rate."""
    if config.schedule == "constant" and not config.warmup:
        return None

    def factor(update: int) -> float:
        if update < config.warmup:
            return (update + 1) / config.warmup
        part = min((update - config.warmup) / max(updates - config.warmup, 1), 1.0)
        return {"constant": 1.0, "linear": 1 - part, "cosine": (1 + math.cos(math.pi * part)) / 2}[config.schedule]

    return lambda optimizer: LambdaLR(optimizer, factor)


def autocast_dtype(config: RunConfig) -> torch.dtype | None:
    """Dtype of autocast; float32 and float64 train in their own."""
    return torch.bfloat16 if config.dtype == "bfloat16" else None


def autocast(config: RunConfig) -> torch.autocast:
    """The context in which networks run that are not trained."""
    dtype = autocast_dtype(config)
    return torch.autocast(torch.device(config.device).type, dtype=dtype, enabled=dtype is not None)


def learned_policy(
    problem: OrderProblem,
    decision: Literal["mode", "sample", "rank"] = "mode",
    *,
    beta: float | None = None,
    price: float | None = None,
) -> Policy:
    """What a fit learned, as a decoding policy: the plan of a guide that does not see the tokens, else the prior.

    Args:
        problem: the fitted objects.
        decision: how probabilities become reveal sets; `rank` is for plans, see `PlannedOrder`.
        beta: factor on the reveal probabilities of a prior, see `StochasticDecision`; as learned when left out.
        price: of a prior that was learned for a range of step prices, nats per step; its middle when left out.

    Raises:
        UserError: a dial that what was learned does not have.
    """
    return models.as_policy(learned_order(problem), decision, beta, price)


def learned_order(problem: OrderProblem) -> nn.Module:
    """What of a fit generates: the network of a guide that does not see the tokens, which is a plan, else the prior."""
    guide, prior = problem.guide, problem.model.prior
    if isinstance(guide, guides.MeanFieldGuide) and not guide.sees_tokens:
        return guide.network
    assert isinstance(prior, RevealPrior)
    return prior
