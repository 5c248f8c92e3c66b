"""Lists and Latin squares by difficulty: whether a rule spends its forwards where they are needed.

    orderppl train-denoiser --config lists_denoiser --out runs/lists-denoiser
    orderppl fit-order --config lists_order --seed 0 --out runs/lists-order-0
    orderppl frontier runs/lists-order-0 --config frontier_lists --out runs/lists-frontier
    python experiments/lists.py '[runs/lists-order-0]' --frontier runs/lists-frontier --out runs/lists

Every family is read at the same mean number of forwards over all rows, as a mixture of its two nearest settings, with
tokens drawn. What it spends and solves on the rows of one difficulty stands beside the limit of `orderppl.data.lists`:
the most that any rule can solve which draws the tokens of a step independently of each other.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from difficulty import SHOWN, by_difficulty
from jsonargparse import auto_cli
from learned_opponents import own_arms

from orderppl import evaluate, load_run
from orderppl.data import Lists
from orderppl.data.lists import limit
from orderppl.evaluation import sweep
from orderppl.evaluation.results import read_results, write_results

STEPS = (1, 2, 3)  # of limits
NAMED = (
    "metric value low high arm family kind training_seed nfe n measured target_nfe of own frontier seed_low seed_high"
)
HEURISTICS: list[dict[str, Any]] = [
    {"policy": "Ranked", "score": "random", "budgets": [1, 2, 3, 4]},
    {"policy": "Threshold", "tau": [0.3, 0.5, 0.7, 0.9]},
    {"policy": "EntropyBound", "gamma": [0.1, 0.3, 0.6, 1.0, 2.0, 3.0]},
]


def main(
    orders: list[Path],
    frontier: Path | None = None,
    train: int = 40_000,
    rows: int = 1200,
    target: float = 1.75,
    out: Path = Path("runs/lists"),
) -> None:
    """Cut learned orders and heuristics by difficulty, at one mean number of forwards.

    Args:
        orders: runs of `fit-order --config lists_order`.
        frontier: folder of `frontier`, whose comparisons are kept too.
        train: training rows of the preset, behind which test rows are drawn.
        rows: test rows.
        target: mean forwards over all of them.
        out: folder of the results.
    """
    runs = [load_run(folder) for folder in orders]
    denoiser, learned = runs[0].denoiser, [arm for seed, run in enumerate(runs) for arm in own_arms(run, seed)]
    test = Lists(train=train, min_clues=4, max_clues=10, test=rows).splits(denoiser.tokenizer)["test"]
    names, prompts = np.array(test.names), test.answers or []
    kinds = sorted(set(names.tolist()), key=lambda name: (name.split()[0], int(name.split()[1])))
    records: list[dict[str, Any]] = []
    for steps in STEPS:
        chances = np.array([limit(prompt, steps) for prompt in prompts])
        for name in kinds:
            at = chances[names == name]
            labels = {"arm": f"limit at {steps}", "difficulty": name, "n": len(at)}
            records.append({"metric": "limit", "value": round(float(at.mean()), 4), **labels})
    arms = [replace(arm, temperature=1.0, seeds=range(3)) for arm in [*learned, *sweep(HEURISTICS)]]
    table = evaluate(arms, denoiser, test, metrics=["accuracy"], batch_size=300, out=out / "drawn")
    records += by_difficulty(table, names, kinds, target)
    played = [] if frontier is None else read_results(frontier)["records"]
    best = {record["of"] for record in played if "own" in record and "target_nfe" in record}
    for record in played:
        family = "learned" if record.get("kind") == "learned" else record.get("family")
        compared = record["metric"] == "advantage" and "target_nfe" in record
        if compared or (record["metric"] != "nfe" and family in {*SHOWN, *best}):
            record |= {} if compared else {"family": family}
            records.append({name: record[name] for name in NAMED.split() if name in record})
    write_results(out, "lists", {"rows": rows, "target": target, "orders": len(orders)}, records)


if __name__ == "__main__":
    auto_cli(main)
