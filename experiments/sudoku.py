"""Sudoku of four by four cells: which cells to fill first, and how many at a time.

    orderppl train-denoiser --config sudoku_denoiser --out runs/sudoku-denoiser
    python experiments/sudoku.py runs/sudoku-denoiser --seeds 3 --out runs/sudoku
    python experiments/sudoku.py docs/results/sudoku/denoiser --puzzles unique --out runs/sudoku-unique

The clues are given; a grid is solved if it is valid and agrees with them, whichever completion it is. The grids of the
test puzzles are in no puzzle that denoiser or orders were trained on. `open` puzzles have 2 to 4 clues and mostly
several completions: cells depend on each other, and filling too many at once makes grids that no completion agrees
with. `unique` puzzles have one completion, which a perfect denoiser would see in a single step.

On every seed three orders are learned: a plan of two steps, whose cells depend on each other, and two policies, each
its own guide, for a range of high and of low step prices, which start as an entropy bound. Together they are one curve
over the mean number of forwards. The best heuristic is chosen on validation puzzles. What is finished is kept: repeat
the command to go on.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyro
import torch
from difficulty import SHOWN, by_difficulty
from jsonargparse import auto_cli
from opponents import best_of, spaced_orders
from plan_fits import fit_plan
from priced import priced_arms
from table_layouts import COMPARED
from tables import compared, markdown

from orderppl import Denoiser, evaluate, fit
from orderppl.data import Sudoku
from orderppl.data.sudoku import BLANK, CELLS
from orderppl.evaluation import Arm, advantages, frontier_figure, summary, sweep
from orderppl.evaluation.arms import standard_heuristics
from orderppl.evaluation.results import plain_records, write_results
from orderppl.figures import save_figure
from orderppl.guides import PolicyGuide
from orderppl.models import LearnedPolicy, PolicyNetwork, PositionTable, ScanNetwork, UnmaskingModel
from orderppl.models.denoisers import load_denoiser
from orderppl.policies import EntropyBound, PriceRange, ScanPlan

STEPS = 8  # steps of policies: the prices ask for fewer
FEATURES = ("confidence", "margin", "entropy", "before", "chance", "prediction", "price")
# forwards at which orders are compared; nobody needs two for a single completion
TARGETS = {"open": (2.0, 2.5, 3.0, 4.0), "unique": (1.2, 1.3, 1.4, 1.5)}
COMMON: dict[str, Any] = {"batch_size": 32, "grad_clip": 1.0, "checkpoint_every": 100, "resume": True}


@dataclass(frozen=True)
class Order:
    """What is learned at which prices, nats per step, in which share of the updates."""

    low: float
    high: float
    share: float


BASE = EntropyBound(0.5, temperature=0.1)
ORDERS = {
    "priced": Order(0.15, 4.0, share=1.0),
    # Low prices apart: the others may lead to one set of cells for all prices, which is too quick for them.
    "careful": Order(0.03, 0.4, share=1 / 3),
}
METRICS, PATTERNED = ("accuracy", "path_nats"), (2, 3, 4)  # steps of the patterns that repeat
DIFFICULTY = {"open": 2.5, "unique": 1.3}  # mean forwards at which the clues are compared
APART = [{"policy": "Spaced", "spread": spread} for spread in (2.0, 5.0)]
HEURISTICS: list[dict[str, Any]] = [
    *standard_heuristics(),
    {"policy": "EntropyBound", "gamma": [0.5, 1.0, 2.0, 4.0], "around": APART},
    {"policy": "Ranked", "score": ["random", "top_prob"], "budgets": [2, 3, 4], "around": APART},
]


def learn(order: Order, denoiser: Denoiser, data: Sudoku, seed: int, updates: int, out: Path) -> LearnedPolicy:
    """Fit one policy, its own guide; longer than it seems to need: what to fill first is often found late."""
    pyro.set_rng_seed(seed)
    prices = PriceRange(order.low, order.high)
    network = PolicyNetwork(data.vocab_size, width=48, features=FEATURES, zero_init=True, prices=prices, places=CELLS)
    policy = LearnedPolicy(network, base=BASE)
    model, guide = UnmaskingModel(denoiser, policy, STEPS, step_price=prices), PolicyGuide(policy, denoiser, STEPS)
    settings = {"schedule": "cosine", "warmup": 20, "updates": max(round(order.share * updates), 1)}
    fit(model, guide, data, optimizer=partial(torch.optim.Adam, lr=0.003), seed=seed, out=out, **COMMON, **settings)
    return policy


def learn_opening(denoiser: Denoiser, data: Sudoku, seed: int, updates: int, out: Path) -> ScanPlan:
    """Fit a plan of two steps."""
    pyro.set_rng_seed(seed)
    plan = ScanPlan(ScanNetwork(2, PositionTable(CELLS, 8, noise=0.3)))
    settings = {"updates": max(updates // 2, 1), "fade": max(int(0.35 * updates), 1), "seed": seed, "out": out}
    fit_plan(plan, denoiser, data, 2, bonus=0.1, lr=0.01, **COMMON, **settings)
    return plan


def main(
    denoiser: Path,
    puzzles: Literal["open", "unique"] = "open",
    seeds: int = 3,
    rows: int = 500,
    updates: int = 1200,
    out: Path = Path("runs/sudoku"),
) -> None:
    """Learn on every seed and compare with the heuristics.

    Args:
        denoiser: run folder of train-denoiser.
        puzzles: open (2 to 4 clues, any completion) or unique (4 to 6 clues, one completion).
        seeds: training seeds, from 0.
        rows: test puzzles.
        updates: SVI updates of a policy; for low prices a third of them, for the plan half.
        out: folder of runs and results.
    """
    network = load_denoiser(denoiser)
    if puzzles == "open":
        data = Sudoku(train=4000, min_clues=2, max_clues=4)
    else:
        data = Sudoku(train=3000, validation=300, min_clues=4, max_clues=6, solutions="unique")
    splits = data.splits(network.tokenizer)
    test, validation = splits["test"].take(rows), splits["validation"].take(rows)
    arms = sweep(HEURISTICS, seeds=(0, 1, 2))
    patterns = [best_of(spaced_orders(steps), network, validation, m) for steps in PATTERNED for m in METRICS]
    arms += {arm.name: arm for arm in patterns}.values()
    for seed in range(seeds):
        folder = out / f"seed-{seed}"
        plan = learn_opening(network, data, seed, updates, folder / "opening")
        arms.append(Arm(f"opening #{seed}", plan, 2, family="learned", mode=True, training_seed=seed))
        for name, order in ORDERS.items():
            policy = learn(order, network, data, seed, updates, folder / name)
            arms += priced_arms(name, policy, PriceRange(order.low, order.high), STEPS, seed)
    settings = {"metrics": METRICS, "batch_size": rows}
    table = evaluate(arms, network, test, out=out, **settings)
    judged = evaluate(arms, network, validation, out=out / "validation", **settings)
    better = [advantages(table, TARGETS[puzzles], validation=judged, mixed=mixed) for mixed in (False, True)]
    clues = [f"{CELLS - puzzle.count(BLANK)} clues" for puzzle in test.answers or []]
    shown = table[table["family"].isin(SHOWN)]
    cut = by_difficulty(shown, clues, sorted(set(clues)), DIFFICULTY[puzzles])
    labels = {"task": "sudoku", "puzzles": puzzles}
    records = [record | labels for record in plain_records(pd.concat([summary(table), *better])) + cut]
    write_results(out, "sudoku", {**labels, "seeds": seeds, "rows": rows, "updates": updates}, records)
    save_figure(frontier_figure(table), out / "frontier.svg")
    print(markdown(COMPARED, list(compared(records))))


if __name__ == "__main__":
    auto_cli(main)
