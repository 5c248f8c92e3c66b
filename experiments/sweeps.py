"""The arms of a comparison: heuristics over grids of their options, and learned orders over their test-time dials.

An arm is a policy and the value of one dial (a threshold, a step budget, a price); arms that differ in the dial alone
form a family, a curve over the mean number of steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from orderppl.decoding import Policy, describe_policy
from orderppl.decoding.policy import needs_noise
from orderppl.denoising import Denoiser
from orderppl.errors import UserError
from orderppl.experiments.build import OrderProblem, Task, learned_order, learned_policy
from orderppl.experiments.build.heuristics import (
    CosineSizesConfig,
    FractionalSizesConfig,
    HeuristicConfig,
    Policies,
    SizesConfig,
    UniformSizesConfig,
    build_heuristic,
)
from orderppl.experiments.config import config_dict, setting
from orderppl.experiments.evaluate import load_order, load_settings
from orderppl.experiments.fit_order import ORDER_FILE
from orderppl.experiments.identity import tensor_digest
from orderppl.inference.checkpoints import file_digest
from orderppl.models import PriceRange

RANKINGS = ("random", "top_prob", "margin", "entropy", "left_to_right", "oracle_margin", "greedy_oracle")
DIALS = ("tau", "factor", "gamma")
PRICES = 7  # of a policy that was learned for a range of them


@dataclass(frozen=True)
class SweepConfig:
    """Decoding policies without parameters, in every combination of the options given."""

    policy: tuple[Policies, ...] = setting(("top_prob",), "the policies")
    budgets: tuple[int, ...] = setting((), "step budgets T; none: as many steps as tokens", at_least=1)
    sizes: tuple[Literal["uniform", "cosine"], ...] = setting((), "rankings: set sizes; none: uniform")
    per_step: tuple[float, ...] = setting((), "rankings: mean positions per step, in place of sizes", at_least=1)
    tau: tuple[float, ...] = setting((), "threshold, klass: confidences", at_least=0, at_most=1)
    factor: tuple[float, ...] = setting((), "factor: f", above=0)
    gamma: tuple[float, ...] = setting((), "entropy_bound: nats", at_least=0)
    eps: tuple[float, ...] = setting((), "klass: bounds of the KL, nats", above=0)
    stable_steps: tuple[int, ...] = setting((), "klass: predictions in a row", at_least=1)
    block_size: tuple[int, ...] = setting(
        (), "semi-autoregressive blocks of so many positions; none: no blocks", at_least=1
    )
    eos_aware: bool = setting(False, "text tasks: rank predicted ends and padding behind all others")
    sure: tuple[float, ...] = setting(
        (), "tasks with answers: confidences in the answer that end a row; none: no row", at_least=0, at_most=1
    )

    def __post_init__(self) -> None:
        """Check what belongs together."""
        if not self.policy:
            raise UserError("policy", "there is none", "name at least one")
        if self.sizes and self.per_step:
            raise UserError("per_step", "given together with sizes", "give one of them, in a sweep of its own each")


@dataclass(frozen=True)
class TurnConfig:
    """One position of the dials."""

    beta: float | None = setting(None, "factor on reveal probabilities; null: as learned", above=0)
    price: float | None = setting(
        None, "nats per step, for a policy learned for a range of prices; null: its middle", above=0
    )


@dataclass(frozen=True)
class DialsConfig:
    """What can be turned on a learned order after training; every combination of beta and price, or the turns alone."""

    decisions: tuple[Literal["mode", "sample", "rank"], ...] = setting(
        ("mode",), "how probabilities become reveal sets: mode, sample or (plans) rank"
    )
    beta: tuple[float, ...] = setting((), "factors on reveal probabilities; none: as learned", above=0)
    price: tuple[float, ...] = setting(
        (), "nats per step, for a policy learned for a range of prices; none: across its range", above=0
    )
    turns: tuple[TurnConfig, ...] = setting(
        (), "positions of beta and price together, such as a beta beyond the range of prices only"
    )
    budgets: tuple[int, ...] = setting((), "step budgets T; none: that of the run", at_least=1)

    def __post_init__(self) -> None:
        """Check what belongs together."""
        if self.turns and (self.beta or self.price):
            raise UserError("turns", "given together with beta or price", "give them as turns too")


@dataclass(frozen=True)
class LearnedSweepConfig(DialsConfig):
    """One curve: the runs times their dials. Entries with the same name are training seeds of one arm."""

    arm: str = setting("learned", "its name")
    runs: tuple[str, ...] = setting((), "run folders with an order.safetensors")
    training_seed: int | None = setting(
        None, "number from 0; runs on one curve with dials of their own have the same; null: the next", at_least=0
    )

    def __post_init__(self) -> None:
        """Check that there is a run, and the dials."""
        super().__post_init__()
        if not self.runs:
            raise UserError("runs", f"no run folder for {self.arm}", "give at least one, or leave the arm out")


@dataclass(frozen=True)
class Arm:
    """A policy with one value of its dial, ready to be evaluated.

    Attributes:
        name: unique among all arms.
        family: the curve it is a point of; the same for the training seeds of a learned arm.
        dial: what the family varies, such as `tau=0.7`.
        kind: `oracle` for heuristics that read the true tokens.
        policy: decides the reveal sets.
        num_steps: step budget.
        draws: whether it needs several seeds.
        identity: JSON value that its results depend on, besides denoiser and rows.
        labels: of its records.
        training_seed: number of the curve among those of the family.
        network: what is charged as the cost of the policy.
        denoiser: its own, if it was trained together with the order.
    """

    name: str
    family: str
    dial: str
    kind: Literal["heuristic", "oracle", "learned"]
    policy: Policy
    num_steps: int
    draws: bool
    identity: dict[str, Any]
    labels: dict[str, str | int | float] = field(default_factory=dict)
    training_seed: int = 0
    network: nn.Module | None = None
    denoiser: Denoiser | None = None


def heuristic_arms(sweeps: Sequence[SweepConfig], task: Task, longest: int) -> list[Arm]:
    """Expand the sweeps.

    Args:
        sweeps: the grids.
        task: its data.
        longest: budget that allows one step per token.

    Raises:
        UserError: an option that a policy lacks, blocks for which the budget has no step, or one arm twice.
    """
    arms: dict[str, Arm] = {}
    for number, sweep in enumerate(sweeps):
        for arm in _expanded(sweep, task, longest, f"heuristics[{number}]"):
            if arm.name in arms:
                raise UserError(f"heuristics[{number}]", f"{arm.name} comes twice", "leave one out")
            arms[arm.name] = arm
    return list(arms.values())


def _expanded(sweep: SweepConfig, task: Task, longest: int, where: str) -> Iterator[Arm]:
    names = ("tau", "factor", "gamma", "eps", "stable_steps", "block_size", "sure")
    sizes: list[SizesConfig | None] = [_sizes(name) for name in sweep.sizes]
    sizes += [FractionalSizesConfig(mean=mean) for mean in sweep.per_step]
    others = (getattr(sweep, name) or (None,) for name in names)
    grid: list[Sequence[Any]] = [sweep.policy, sweep.budgets or (None,), sizes or (None,), *others]
    for policy, budget, size, *values in itertools.product(*grid):
        options = dict(zip(names, values, strict=True))
        if policy in RANKINGS and size is None:
            size = UniformSizesConfig()
        config = HeuristicConfig(policy=policy, sizes=size, eos_aware=sweep.eos_aware, **options)
        try:
            built = build_heuristic(config, task)
        except UserError as error:
            raise UserError(f"{where}.{error.field}", error.problem, error.remedy) from None
        num_steps = longest if budget is None else budget
        block = options["block_size"]
        if block is not None and -(-longest // block) > num_steps:
            problem = f"{-(-longest // block)} blocks of {block} in {num_steps} steps"
            raise UserError(f"{where}.block_size", problem, "use larger blocks or larger budgets")
        dial, family = _dial(config, budget)
        yield Arm(
            name=f"{family} {dial}".strip(),
            family=family,
            dial=dial,
            kind="oracle" if getattr(built, "needs_truth", False) else "heuristic",
            policy=built,
            num_steps=num_steps,
            draws=needs_noise(built),
            identity={"heuristic": config_dict(config), "steps": num_steps},
            labels=describe_policy(built),
        )


def _sizes(name: str) -> SizesConfig:
    return CosineSizesConfig() if name == "cosine" else UniformSizesConfig()


def _dial(config: HeuristicConfig, budget: int | None) -> tuple[str, str]:
    """The dial of a heuristic with its value, and the name of what the others of its curve have in common."""
    own = next((name for name in DIALS if getattr(config, name) is not None), None)
    words: list[str] = [config.policy]
    dial = ""
    if own is not None:
        dial = f"{own}={getattr(config, own):g}"
        words += [] if budget is None else [f"T={budget}"]
    elif isinstance(config.sizes, FractionalSizesConfig):
        dial = f"{config.sizes.mean:g} a step"
        words += ["fractional"] + ([] if budget is None else [f"T={budget}"])
    else:
        words += [] if config.sizes is None else [config.sizes.name]
        dial = "sequential" if budget is None else f"T={budget}"
    words += [f"{name}={getattr(config, name):g}" for name in ("eps", "stable_steps") if getattr(config, name)]
    words += ["eos-aware"] if config.eos_aware else []
    words += [f"block {config.block_size}"] if config.block_size else []
    words += [f"sure {config.sure:g}"] if config.sure is not None else []
    return dial, " ".join(words)


def grouped_runs(runs: Sequence[str], dials: DialsConfig) -> list[LearnedSweepConfig]:
    """Run folders as arms: those whose settings differ in the seed alone are training seeds of one arm."""
    named: dict[str, str] = {}
    sweeps = []
    for folder in runs:
        settings = str(config_dict(replace(load_settings(folder), seed=0)))
        name = named.setdefault(settings, Path(folder).resolve().name)
        options = {dial.name: getattr(dials, dial.name) for dial in fields(DialsConfig)}
        sweeps.append(LearnedSweepConfig(arm=name, runs=(folder,), **options))
    return sweeps


def learned_arms(sweeps: Sequence[LearnedSweepConfig], task: Task, denoiser: nn.Module, device: str) -> list[Arm]:
    """Load the runs and expand their dials.

    Args:
        sweeps: one per curve.
        task: data of the comparison.
        denoiser: of the comparison; an order that was learned for another frozen one is refused.
        device: where the policies go.

    Raises:
        UserError: a folder without an order, an order of another denoiser, or a dial that a policy does not have.
    """
    shared = tensor_digest(denoiser.state_dict())
    arms: dict[str, Arm] = {}
    seen: dict[str, int] = {}
    for sweep in sweeps:
        seen[sweep.arm] = seen.get(sweep.arm, -1) + 1
        training_seed = seen[sweep.arm] if sweep.training_seed is None else sweep.training_seed
        for folder in sweep.runs:
            config, problem = load_order(folder, device, task)
            if config.freeze_denoiser and tensor_digest(problem.denoiser.state_dict()) != shared:
                problem_text = f"{folder} was learned for another denoiser"
                raise UserError("--run", problem_text, "compare it on its own denoiser")
            weights = file_digest(Path(folder) / ORDER_FILE)
            for arm in _turned(sweep, folder, weights, config.num_steps, config.freeze_denoiser, problem):
                arm = replace(arm, training_seed=training_seed)
                if len([other for other in sweeps if other.arm == sweep.arm]) > 1:
                    arm = replace(arm, name=f"{arm.name} #{training_seed}")
                if arm.name in arms:
                    raise UserError("orders", f"{arm.name} comes twice", "give arms or dials of their own")
                arms[arm.name] = arm
    return list(arms.values())


def _turned(
    sweep: LearnedSweepConfig, folder: str, weights: str, num_steps: int, frozen: bool, problem: OrderProblem
) -> Iterator[Arm]:
    turns: list[tuple[float | None, float | None]] = [(turn.beta, turn.price) for turn in sweep.turns]
    if not turns:
        turns = list(itertools.product(sweep.beta or (None,), sweep.price or _learned_prices(problem) or (None,)))
    for decision, (beta, price), budget in itertools.product(sweep.decisions, turns, sweep.budgets or (num_steps,)):
        policy = learned_policy(problem, decision, beta=beta, price=price)
        dial = [f"beta={beta:g}"] if beta is not None else []
        dial += [f"price={price:g}"] if price is not None else []
        dial += [f"T={budget}"] if sweep.budgets else []
        dial += [Path(folder).resolve().name] if len(sweep.runs) > 1 or sweep.training_seed is not None else []
        family = f"{sweep.arm} ({decision})"
        labels: dict[str, str | int | float] = {"decision": decision, "run_folder": folder, "policy_weights": weights}
        labels |= {key: value for key, value in (("beta", beta), ("price", price)) if value is not None}
        yield Arm(
            name=" ".join([family, *dial]),
            family=family,
            dial=" ".join(dial),
            kind="learned",
            policy=policy,
            num_steps=budget,
            draws=decision == "sample",
            identity={"weights": weights, "decision": decision, "beta": beta, "price": price, "steps": budget},
            labels={"policy": problem.model.prior.__class__.__name__, **labels},
            network=learned_order(problem),
            denoiser=None if frozen else problem.model.denoiser,
        )


def _learned_prices(problem: OrderProblem) -> list[float]:
    """Prices across the range that a policy was learned for; none for any other policy."""
    prices = getattr(problem.model.prior, "price", None)
    if not isinstance(prices, PriceRange):
        return []
    ratio = prices.high / prices.low
    return [prices.low * ratio ** (step / (PRICES - 1)) for step in range(PRICES)]
