"""Orders that nobody has to learn: heuristics, and spacing out what a step reveals."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from math import gcd

from orderppl import Denoiser, evaluate
from orderppl.data import Examples
from orderppl.evaluation import Arm, summary, sweep
from orderppl.evaluation.table import higher_is_better
from orderppl.policies import Dilated, FixedOrder, Oracle

SCREENED, FINALISTS = 100, 4  # rows on which many arms are looked at, and how many go on
SPACED = [(0, 3, 1, 3, 2, 3), (3, 0, 3, 1, 3, 2)]  # of four steps, with longer periods than all that are tried


def opponents(steps: int, seeds: Sequence[int] = (0, 1, 2)) -> list[Arm]:
    """Every heuristic with a budget of T steps, and the oracle that ranks by the truth."""
    scores = ["random", "top_prob", "margin", "entropy", "left_to_right"]
    specs = [
        {"policy": "Ranked", "score": scores, "sizes": ["uniform", "cosine"], "budgets": [steps]},
        {"policy": "Threshold", "tau": [0.3, 0.5, 0.7, 0.9], "budgets": [steps]},
        {"policy": "Factor", "factor": [1.0, 2.0, 4.0, 8.0], "budgets": [steps]},
        {"policy": "EntropyBound", "gamma": [0.1, 1.0, 4.0], "budgets": [steps]},
        {"policy": "Klass", "tau": [0.5, 0.7], "eps": [0.01, 0.1], "budgets": [steps]},
    ]
    oracles = [Arm(f"greedy oracle {sizes}", Oracle("greedy", sizes), steps) for sizes in ("uniform", "cosine")]  # type: ignore[arg-type]
    return [*sweep(specs, seeds=seeds), *oracles]


def spaced_orders(steps: int, whole: bool = False) -> list[Arm]:
    """The dilated schedule, every pattern of at most four positions that uses all steps, and strides of more steps.

    A stride k reveals position i at step k i mod T. For 8 steps also two that keep each step far from the earlier ones.
    `whole`: also patterns that lie on the whole row, where what is given stands between what is revealed.
    """
    patterns = [p for size in range(2, 5) for p in product(range(steps), repeat=size) if len(set(p)) == steps]
    strides = [k for k in range(2, steps) if gcd(k, steps) == 1]
    patterns += [tuple(k * i % steps for i in range(steps)) for k in strides if steps > 4]
    patterns += [(0, 4, 2, 6, 1, 5, 3, 7), (0, 7, 3, 6, 1, 5, 2, 4)] if steps == 8 else []  # always halfway between
    patterns += SPACED if steps == 4 else []
    arms = []
    for pattern, given in product(patterns, (False, True) if whole else (False,)):
        order = FixedOrder(pattern, periodic=True, counts_given=given)
        name = "periodic on rows" if given else "periodic"
        arms.append(Arm(f"{name} {pattern}", order, steps, family="periodic"))
    return [*arms, Arm("dilated", Dilated(), steps)]


def spaced_rules(steps: int) -> list[Arm]:
    """Rankings and a threshold whose sets are kept apart, with a budget of T steps."""
    apart = {"budgets": [steps], "around": [{"policy": "Spaced", "spread": spread} for spread in (2.0, 4.0, 8.0)]}
    ranked = {"policy": "Ranked", "score": ["random", "top_prob", "margin"], "sizes": ["uniform", "cosine"]}
    arms = sweep([ranked | apart, {"policy": "Threshold", "tau": [0.02, 0.1, 0.3]} | apart], seeds=(0,))
    return [replace(arm, family="spaced") for arm in arms]


def best_of(
    arms: list[Arm],
    denoiser: Denoiser,
    rows: Examples,
    metric: str = "path_nats",
    screened: int = 100,
    finalists: int = 4,
) -> Arm:
    """The best arm by a metric on all rows; of many rows, among the best few on the first ones."""
    if len(rows) > screened:
        arms = _best(arms, denoiser, rows.take(screened), metric, finalists)
    return _best(arms, denoiser, rows, metric, 1)[0]


def _best(arms: list[Arm], denoiser: Denoiser, rows: Examples, metric: str, kept: int) -> list[Arm]:
    table = evaluate(arms, denoiser, rows, metrics=[metric])
    means = summary(table, [metric]).set_index("arm")["value"] * (-1 if higher_is_better(metric) else 1)
    best = means.nsmallest(kept).index
    return [arm for arm in arms if arm.name in best]
