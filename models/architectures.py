"""What learned orders are made of, as JSON: from objects to a description, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from orderppl.data.answer_tokens import AnswerTokens
from orderppl.errors import UserError
from orderppl.models.finishing import AnswerOdds, FinishingPolicy
from orderppl.models.networks import PolicyNetwork, PositionTable, SequenceEncoder
from orderppl.models.plans import OpeningPlan
from orderppl.models.price import PriceRange
from orderppl.models.priors import (
    BoundedEntropy,
    CosineSteps,
    EasyFirst,
    HeldBack,
    LearnedPolicy,
    LearnedSchedule,
    LearnedSteps,
    LeftToRight,
    RankedPolicy,
    ResidualPolicy,
    StepPrice,
    UniformSteps,
)

ARCHITECTURES: dict[str, type[Any]] = {
    "answer_odds": AnswerOdds,
    "answer_tokens": AnswerTokens,
    "bounded_entropy": BoundedEntropy,
    "cosine_steps": CosineSteps,
    "easy_first": EasyFirst,
    "finishing_policy": FinishingPolicy,
    "held_back": HeldBack,
    "learned_policy": LearnedPolicy,
    "learned_schedule": LearnedSchedule,
    "learned_steps": LearnedSteps,
    "left_to_right": LeftToRight,
    "opening_plan": OpeningPlan,
    "policy_network": PolicyNetwork,
    "position_table": PositionTable,
    "price_range": PriceRange,
    "ranked_policy": RankedPolicy,
    "residual_policy": ResidualPolicy,
    "sequence_encoder": SequenceEncoder,
    "step_price": StepPrice,
    "uniform_steps": UniformSteps,
}
"""Name -> class. An object of such a class has `config`, the arguments that make one like it: JSON values, or further
objects. Put a class of your own here, under the same name where it is saved and where it is loaded."""


def describe(thing: object) -> dict[str, Any]:
    """The architecture of an object as JSON values; an object that is met twice is described once.

    Raises:
        UserError: an object of a class that is not in `ARCHITECTURES`.
    """
    seen: dict[int, str] = {}

    def visit(item: Any, path: str) -> Any:
        name = next((name for name, kind in ARCHITECTURES.items() if type(item) is kind), None)
        if name is None:
            if isinstance(item, nn.Module) or hasattr(item, "config") or not path:
                problem = f"{path.lstrip('.') or 'it'} is a {type(item).__name__}, which nothing rebuilds"
                raise UserError("policy", problem, "add its class to orderppl.models.ARCHITECTURES")
            return list(item) if isinstance(item, tuple) else item
        if id(item) in seen:
            return {"same": seen[id(item)]}
        seen[id(item)] = path
        return {"name": name, **{key: visit(value, f"{path}.{key}") for key, value in item.config.items()}}

    found: dict[str, Any] = visit(thing, "")
    return found


def build(description: Mapping[str, Any]) -> Any:
    """Make an object of the architecture that `describe` returned, with new weights.

    Raises:
        UserError: a name that is not in `ARCHITECTURES`.
    """
    made: dict[str, Any] = {}

    def visit(item: Any, path: str) -> Any:
        if not isinstance(item, Mapping):
            return item
        if "same" in item:
            return made[item["same"]]
        name = item["name"]
        if name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise UserError(
                "policy", f"unknown architecture {name!r}", f"known: {known}; update orderppl or add its class"
            )
        arguments = {key: visit(value, f"{path}.{key}") for key, value in item.items() if key != "name"}
        made[path] = ARCHITECTURES[name](**arguments)
        return made[path]

    return visit(description, "")
