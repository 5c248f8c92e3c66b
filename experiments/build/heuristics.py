"""Set sizes and heuristic policies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from orderppl.decoding import Policy, SetSizes, make_policy, make_sizes
from orderppl.errors import UserError
from orderppl.experiments.build.tasks import Task
from orderppl.experiments.config import setting


@dataclass(frozen=True)
class UniformSizesConfig:
    """Equal sets over the step budget; one position a step when there are as many steps as positions."""

    name: Literal["uniform"] = "uniform"


@dataclass(frozen=True)
class CosineSizesConfig:
    """Small sets first."""

    name: Literal["cosine"] = "cosine"


@dataclass(frozen=True)
class FractionalSizesConfig:
    """A given mean number of positions per step."""

    name: Literal["fractional"] = "fractional"
    mean: float = setting(2.0, "positions per step", at_least=1)


SizesConfig = UniformSizesConfig | CosineSizesConfig | FractionalSizesConfig


def build_sizes(config: SizesConfig) -> SetSizes:
    """Schedule of set sizes."""
    return make_sizes(config.mean if isinstance(config, FractionalSizesConfig) else config.name)


Policies = Literal[
    "random",
    "top_prob",
    "margin",
    "entropy",
    "left_to_right",
    "threshold",
    "factor",
    "entropy_bound",
    "klass",
    "oracle_margin",
    "greedy_oracle",
]


@dataclass(frozen=True)
class HeuristicConfig:
    """A decoding policy without parameters, and the options that it has."""

    policy: Policies = setting("top_prob", "the decoding policy")
    sizes: SizesConfig | None = setting(None, "ranking policies: positions revealed at each step; null: uniform")
    ties: Literal["leftmost", "random"] | None = setting(None, "ranking policies: first of equally good positions")
    tau: float | None = setting(None, "threshold, klass: confidence", at_least=0, at_most=1)
    factor: float | None = setting(None, "factor: f", above=0)
    gamma: float | None = setting(None, "entropy_bound: nats", at_least=0)
    eps: float | None = setting(None, "klass: bound of the KL of two predictions in a row, nats", above=0)
    stable_steps: int | None = setting(None, "klass: predictions in a row", at_least=1)
    block_size: int | None = setting(None, "semi-autoregressive blocks of so many positions", at_least=1)
    eos_aware: bool = setting(False, "text tasks: rank predicted ends and padding behind all others")
    sure: float | None = setting(
        None, "tasks with answers: confidence in the answer that ends a row; null: none does", at_least=0, at_most=1
    )


def build_heuristic(config: HeuristicConfig, task: Task) -> Policy:
    """Decoding policy, in the wrappers asked for.

    Raises:
        UserError: an option that the policy does not have, or end tokens of a task without text.
    """
    names = ("ties", "tau", "factor", "gamma", "eps", "stable_steps")
    options: dict[str, Any] = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    if config.sizes is not None:
        options["sizes"] = build_sizes(config.sizes)
    policy = make_policy(config.policy, **options)
    if config.eos_aware:
        if task.tokenizer is None:
            raise UserError("eos_aware", f"{task.name} has no end token", "leave it out")
        policy = make_policy("eos_aware", policy=policy, token_ids=(task.tokenizer.eos_index, task.tokenizer.pad_index))
    if config.sure is not None:
        policy = make_policy("answer_ready", policy=policy, answer=task.answer_tokens("sure"), sure=config.sure)
    return policy if config.block_size is None else make_policy("block", policy=policy, size=config.block_size)
