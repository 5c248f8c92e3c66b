"""What is compared: policies with their settings, and sweeps of the settings of heuristics."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, Literal

from orderppl.config import build
from orderppl.errors import UserError
from orderppl.policies import AtPrice, Blocks, EarlyCommit, EndStop, EosAware, Klass, Policy, Spaced
from orderppl.policies.plans import PlacedOrder
from orderppl.policies.wrappers import Wrapper
from orderppl.unmasking import Denoiser

MEASURED = ("run", "seed", "row", "tokens", "tokens_written", "nfe", "fallback", "nats", "correct")
DESCRIBED = ("arm", "family", "kind", "setting", "policy", "policy_parameters")
PLAYED = ("steps", "mode", "temperature", "block_size", "training_seed")
CURVE = ("price", "tau", "factor", "gamma", "sizes")  # the setting that makes a curve, the first one that is a number


@dataclass(frozen=True, eq=False)
class Arm:
    """A policy with one value of its setting, as it is played.

    Args:
        name: unique among the arms of a table.
        policy: decides the reveal sets.
        steps: step budget T; one step per token of the longest row when left out.
        family: the curve that it is a point of, the same for all training seeds of a learned one; its name when left
            out.
        mode: play the most probable set of every step instead of drawing one.
        block_size: semi-autoregressive blocks of this many positions.
        temperature: of token sampling when decoding; 0 takes the most likely token.
        seeds: of what is drawn; one is enough where nothing is.
        training_seed: number of the fit that the policy comes from; None for what was not learned.
        setting: what varies along the curve, such as {"tau": 0.7}: columns of the table.
        denoiser: its own, if it was trained together with the order.

    Raises:
        UserError: no name, no policy, no seeds, a budget below 1, or a setting that is called like another column.
    """

    name: str
    policy: Policy
    steps: int | None = None
    _: KW_ONLY
    family: str | None = None
    mode: bool = False
    block_size: int | None = None
    temperature: float = 0.0
    seeds: Sequence[int] = (0,)
    training_seed: int | None = None
    setting: Mapping[str, str | int | float | None] = field(default_factory=dict)
    denoiser: Denoiser | None = None

    def __post_init__(self) -> None:
        """Check what belongs together."""
        if not self.name:
            raise UserError("name", "an arm without a name", "give one")
        policy: object = self.policy
        if not isinstance(policy, Policy):
            problem = f"{type(policy).__name__} of {self.name} is none"
            raise UserError("policy", problem, "give a subclass of orderppl.policies.Policy")
        if self.steps is not None and self.steps < 1:
            raise UserError("steps", f"a budget of {self.steps} steps for {self.name}", "allow at least 1")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError("seeds", f"{list(self.seeds)} for {self.name}", "give every seed once, at least one")
        taken = [name for name in self.setting if name in DESCRIBED + PLAYED + MEASURED]
        if taken:
            raise UserError("setting", f"{taken[0]!r} of {self.name} is a column of its own", "use another name")

    @property
    def kind(self) -> Literal["heuristic", "oracle", "learned"]:
        """An oracle reads the true tokens, so that it cannot decode; what has a training seed was learned."""
        if any(getattr(module, "sees_truth", False) for module in self.policy.modules()):
            return "oracle"
        return "heuristic" if self.training_seed is None else "learned"

    def labels(self, steps: int) -> dict[str, Any]:
        """What describes the arm in every row of the table; `steps` is the budget that it has there."""
        words = [f"{name}={_short(value)}" for name, value in self.setting.items() if value is not None]
        return {
            "arm": self.name,
            "family": self.family or self.name,
            "kind": self.kind,
            "setting": " ".join(words) or f"T={steps}",
            **self.setting,
            "policy": type(self.policy).__name__,
            "policy_parameters": sum(parameter.numel() for parameter in self.policy.parameters()),
            "steps": steps,
            "mode": self.mode,
            "temperature": self.temperature,
            "block_size": self.block_size,
            "training_seed": self.training_seed,
        }


def sweep(
    specs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    known: Mapping[str, Any] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    family: str | None = None,
    training_seed: int | None = None,
) -> list[Arm]:
    """Expand grids of settings to arms.

    A spec is a mapping of `policy` (a class path or short name, or several) and arguments of its constructor, each one
    value or a list of values: every combination is an arm. Besides, `budgets` (step budgets T; none: a step per token),
    `block_size`, `eos_aware` (predicted ends and padding last), `sure` (confidence in the answer that ends a row),
    `around` (a wrapper, such as `{policy: LookAhead, candidates: 4}`) and `mode`. Arms that differ in one number only,
    or in their budget, are a family.

    Args:
        specs: one or several.
        known: values for arguments that are not given, by name: `token_ids` (of ends and padding), `answer`, and the
            `policy` that a wrapper such as `AtPrice` is put around.
        seeds: of arms that draw; others get the first one.
        family: name of the curve in place of the policy's, such as "learned".
        training_seed: see `Arm`.

    Raises:
        UserError: names the entry: an argument that a policy does not have, or one arm twice.
    """
    arms: dict[str, Arm] = {}
    for number, spec in enumerate([specs] if isinstance(specs, Mapping) else specs):
        for arm in _expanded(spec, known, family, f"sweep[{number}]"):
            mark = "" if training_seed is None else f" #{training_seed}"
            chosen = tuple(seeds) if draws(arm.policy) and not arm.mode else tuple(seeds[:1])
            arm = replace(arm, name=f"{arm.name}{mark}", seeds=chosen, training_seed=training_seed)
            if arm.name in arms:
                raise UserError(f"sweep[{number}]", f"{arm.name} comes twice", "leave one out")
            arms[arm.name] = arm
    return list(arms.values())


def standard_heuristics() -> list[dict[str, Any]]:
    """Every family of heuristics, swept densely enough to read it at any mean NFE from 1 to about 8: for `sweep`."""
    rankings = ["random", "top_prob", "margin", "entropy", "left_to_right"]
    taus = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99]
    budgets = [1, 2, 3, 4, 5, 6, 8, 10]
    return [
        {"policy": "Ranked", "score": rankings, "sizes": ["uniform", "cosine"], "budgets": budgets},
        {"policy": "Threshold", "tau": taus},
        {"policy": "Factor", "factor": [0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0]},
        {"policy": "EntropyBound", "gamma": [0.01, 0.03, 0.1, 0.3, 0.6, 1.0, 2.0, 3.0, 5.0]},
        {"policy": "Klass", "tau": [0.3, 0.5, 0.7, 0.8, 0.9], "eps": [0.01, 0.1]},
        {"policy": "Threshold", "tau": [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95], "block_size": [8, 16]},
        {"policy": "Factor", "factor": [0.5, 1.0, 2.0, 4.0, 8.0], "block_size": 16},
        {"policy": "Dilated", "budgets": budgets},
        {"policy": "PositionWeighted", "decay": [0.02, 0.25], "budgets": budgets},
        {"policy": "Threshold", "tau": taus, "around": {"policy": "Spaced", "spread": 8.0}},
        {
            "policy": "Ranked",
            "score": "top_prob",
            "temperature": 0.1,
            "budgets": [1, 2, 3],
            "around": {"policy": "LookAhead", "candidates": 4},
        },
    ]


def draws(policy: Policy) -> bool:
    """Whether a policy draws its sets: one with a temperature of 0 does not, one of a kind that is not known may."""
    hard = getattr(policy, "temperature", None) == 0
    if isinstance(policy, Wrapper):
        as_the_other = AtPrice | Blocks | EndStop | EosAware | Spaced
        hard = isinstance(policy, as_the_other) or (isinstance(policy, EarlyCommit) and hard)
        return not hard or draws(policy.policy)
    return not (isinstance(policy, PlacedOrder | Klass) or hard) or getattr(policy, "score", None) == "random"


def _expanded(spec: Mapping[str, Any], known: Mapping[str, Any] | None, name: str | None, where: str) -> Iterator[Arm]:
    if not isinstance(spec, Mapping) or "policy" not in spec:
        raise UserError(f"{where}.policy", "there is none", "name the class of one")
    axes = {name: value if isinstance(value, (list, tuple)) else [value] for name, value in spec.items()}
    empty = [name for name, values in axes.items() if not values]
    if empty:
        raise UserError(f"{where}.{empty[0]}", "an empty list", "give a value, or leave it out")
    for values in itertools.product(*axes.values()):
        options = dict(zip(axes, values, strict=True))
        played = {name: options.pop(name, None) for name in ("policy", "budgets", "block_size", "mode")}
        ends, sure = bool(options.pop("eos_aware", False)), options.pop("sure", None)
        around = options.pop("around", None)
        given = dict(options)
        if "price" in options and str(played["policy"]).split(".")[-1] != "AtPrice":  # of the policy that is wrapped
            at = {"price": options.pop("price")}
            options["policy"] = {"class_path": "orderppl.policies.AtPrice", "init_args": at}
        made: Any = {"class_path": played["policy"], "init_args": options}
        options = given
        if ends:
            made = {"class_path": "EosAware", "init_args": {"policy": made}}
        if around is not None:
            made = _wrapped(made, around, f"{where}.around")
        if sure is not None:
            made = {"class_path": "EarlyCommit", "init_args": {"policy": made, "sure": sure}}
        numbers = [key for key, value in options.items() if type(value) in (int, float)]
        varied = [key for key in numbers if len(axes[key]) > 1 and played["budgets"] is None]
        curve = next((key for key in (*CURVE, *varied) if key in numbers), None)
        ranking = options["score"] if isinstance(options.get("score"), str) else None  # says enough by itself
        family = [name or ranking or _snake(played["policy"])]
        family += [
            _said(key, value) for key, value in options.items() if key != curve and (ranking is None or key != "score")
        ]
        family += [f"T={played['budgets']}"] if curve is not None and played["budgets"] is not None else []
        family += [f"block {played['block_size']}"] if played["block_size"] is not None else []
        family += ["eos-aware"] * ends + ["mode"] * bool(played["mode"])
        if around is not None:
            rest = [_said(key, value) for key, value in around.items() if key != "policy"]
            family += [_snake(around["policy"]), *rest]
        family += [f"sure {_short(sure)}"] if sure is not None else []
        last = "sequential" if played["budgets"] is None else f"T={played['budgets']}"
        yield Arm(
            " ".join([*family, last if curve is None else _said(curve, options[curve])]),
            build(made, known, field=where),
            played["budgets"],
            family=" ".join(family),
            mode=bool(played["mode"]),
            block_size=played["block_size"],
            setting={} if curve is None else {curve: options[curve]},
        )


def _wrapped(made: dict[str, Any], around: Any, where: str) -> dict[str, Any]:
    """The description of a policy inside that of a wrapper."""
    if not isinstance(around, Mapping) or "policy" not in around:
        raise UserError(
            where, f"{around!r} names no wrapper", "give its class and arguments, such as {policy: EndStop}"
        )
    arguments = {name: value for name, value in around.items() if name != "policy"}
    return {"class_path": around["policy"], "init_args": {"policy": made, **arguments}}


def _snake(policy: Any) -> str:
    """The name of a class as that of a family."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(policy).split(".")[-1]).lower()


def _said(name: str, value: Any) -> str:
    """A setting in the name of an arm."""
    return value if isinstance(value, str) else f"{name}={_short(value)}"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
