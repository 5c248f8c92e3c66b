"""Policies by name, and their names and parameters for records."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

from orderppl.decoding.adaptive import EntropyBound, Factor, Klass, Threshold
from orderppl.decoding.heuristic import Heuristic
from orderppl.decoding.oracles import GreedyOracle, OracleMargin
from orderppl.decoding.ranking import Entropy, LeftToRight, Margin, Random, TopProb
from orderppl.decoding.schedules import SetSizes, make_sizes
from orderppl.decoding.wrappers import AnswerReady, Block, EosAware
from orderppl.errors import UserError

POLICIES: dict[str, type[Heuristic]] = {
    kind.name: kind
    for kind in (
        Random,
        TopProb,
        Margin,
        Entropy,
        LeftToRight,
        Threshold,
        Factor,
        EntropyBound,
        Klass,
        OracleMargin,
        GreedyOracle,
        Block,
        EosAware,
        AnswerReady,
    )
}


def make_policy(name: str, **options: Any) -> Heuristic:
    """Build a heuristic policy by name.

    Args:
        name: a key of `POLICIES`.
        **options: arguments of its class. `sizes` also takes "uniform", "cosine" or a number of positions a step;
            `policy`, of a wrapper, also takes a name.

    Raises:
        UserError: for an unknown name or option, a missing option, or a value that the class refuses.
    """
    if name not in POLICIES:
        raise UserError("policy", f"unknown policy {name!r}", f"use one of {', '.join(POLICIES)}")
    kind = POLICIES[name]
    signature = inspect.signature(kind)
    for option in options:
        if option not in signature.parameters:
            known = ", ".join(signature.parameters)
            raise UserError("policy", f"{name} has no option {option!r}", f"its options are {known}")
    missing = [key for key, p in signature.parameters.items() if p.default is p.empty and key not in options]
    if missing:
        raise UserError("policy", f"{name} lacks {', '.join(missing)}", "give it")
    if "sizes" in options:
        options["sizes"] = make_sizes(options["sizes"])
    if isinstance(options.get("policy"), str):
        options["policy"] = make_policy(options["policy"])
    return kind(**options)


def describe_policy(policy: object) -> dict[str, str | int | float]:
    """Name and parameters of a policy as flat labels for records: `policy`, `sizes`, `tau`, `block_size`, ..."""
    labels: dict[str, str | int | float] = {"policy": getattr(policy, "name", type(policy).__name__)}
    if not dataclasses.is_dataclass(policy):
        return labels
    for item in dataclasses.fields(policy):
        value = getattr(policy, item.name)
        if isinstance(value, SetSizes):
            labels["sizes"] = value.name
            labels.update({f"sizes_{k}": v for k, v in vars(value).items() if v is not None})
        elif item.name == "policy":
            inner = describe_policy(value)
            labels["policy"] = f"{labels['policy']}({inner.pop('policy')})"
            labels.update(inner)
        elif isinstance(value, (str, int, float)):
            labels["block_size" if isinstance(policy, Block) else item.name] = value
        elif isinstance(value, Sequence):
            labels[item.name] = " ".join(map(str, value))
    return labels
