"""The exact Markov chain: how close a learned order comes to the log evidence and to the provably best fixed order.

    python experiments/chain.py --seeds 5 --steps 4 --out runs/chain

For every seed a plan whose steps depend on each other is learned by SVI alone: no search, no restarts. The denoiser is
exact, so tokens are scored by what it expects of them (`expected`), free of the luck of single tokens. The best fixed
order, and the best of all policies that see what is revealed, come from dynamic programming. `gap_nats` is the log
evidence minus the path log-likelihood, nats per sequence: 0 is perfect; `expected_gap_nats` is its exact expectation.
Where the denoiser is exactly symmetric, confidence rules break ties at random (leftmost-first would make them
left-to-right).
"""

from pathlib import Path
from time import perf_counter

import pandas as pd
import pyro
import torch
from jsonargparse import auto_cli
from plan_fits import fit_plan
from rich.console import Console

from orderppl import evaluate
from orderppl.data import Chains, DataSet, Trees
from orderppl.evaluation import Arm, summary
from orderppl.evaluation.results import results_table, write_results
from orderppl.models import PositionTable, ScanNetwork
from orderppl.models.denoisers import MarkovChainDenoiser, TreeFieldDenoiser
from orderppl.policies import FixedOrder, Ranked, ScanPlan

Denoiser = MarkovChainDenoiser | TreeFieldDenoiser
TIES_AT_RANDOM = 1e-6  # a temperature


def learn(
    denoiser: Denoiser, data: DataSet, steps: int, seed: int, updates: int, batch_size: int, bonus: float, out: Path
) -> ScanPlan:
    """Learn a plan, scored by what the exact denoiser expects."""
    pyro.set_rng_seed(seed)
    plan = ScanPlan(ScanNetwork(steps, PositionTable(denoiser.length, 8, noise=0.3)))
    train, fade = data.splits()["train"], int(0.7 * updates)
    options = {"updates": updates, "batch_size": batch_size, "seed": seed, "out": out}
    fit_plan(plan, denoiser, train, steps, bonus=bonus, fade=fade, lr=0.01, expected=True, **options)
    return plan


def measure(denoiser: Denoiser, data: DataSet, arms: list[Arm], steps: int) -> pd.DataFrame:
    """One row per metric and arm: `gap_nats` on the test rows, and forwards."""
    test = data.splits()["test"]
    table = evaluate(arms, denoiser, test, batch_size=500)
    evidence = denoiser.log_evidence(test.batch.tokens).double().numpy()
    table["gap_nats"] = table["nats"] + evidence[table["row"]]
    return summary(table, ["gap_nats", "nfe"])


def main(
    seeds: int = 5,
    steps: int = 4,
    length: int = 16,
    updates: int = 1500,
    batch_size: int = 64,
    bonus: float = 0.5,
    out: Path = Path("runs/chain"),
    task: str = "chain",
) -> None:
    """Learn on every seed and compare.

    Args:
        seeds: training seeds, from 0.
        steps: step budget T.
        length: positions of the chain.
        updates: SVI updates per seed.
        batch_size: sequences of an update, 8 orders each.
        bonus: weight of the entropy bonus at the start; it fades.
        out: folder of runs and results.
        task: chain, or tree (of depth 4).
    """
    data: DataSet = Chains(length=length) if task == "chain" else Trees(depth=4)
    denoiser: Denoiser = MarkovChainDenoiser(4, 0.85, length) if task == "chain" else TreeFieldDenoiser(4, 0.85, 4)
    order, cost = denoiser.best_order(steps)
    drawn = torch.randint(steps, (2000, denoiser.length), generator=torch.Generator().manual_seed(0))
    random_cost = [denoiser.expected_cost(order) for order in drawn]
    labels = {"task": task, "steps": steps, "length": denoiser.length}
    expected = [{"metric": "expected_gap_nats", "arm": "best fixed order", "value": cost}]
    expected.append({"metric": "expected_gap_nats", "arm": "random order", "value": sum(random_cost) / 2000})

    arms = [Arm("best fixed order", FixedOrder(order.tolist()), steps)]
    for score in ("random", "top_prob", "entropy", "left_to_right"):
        arms.append(Arm(score, Ranked(score, temperature=TIES_AT_RANDOM), steps))
    for seed in range(seeds):
        began = perf_counter()
        plan = learn(denoiser, data, steps, seed, updates, batch_size, bonus, out / f"seed-{seed}")
        seconds = perf_counter() - began
        arms.append(Arm(f"learned #{seed}", plan, steps, family="learned", mode=True, training_seed=seed))
        arms.append(Arm(f"learned, drawn #{seed}", plan, steps, family="learned, drawn", training_seed=seed))
        found = plan.order(data.splits()["test"].batch.rows(slice(1)), denoiser, steps).mode[0]
        value = denoiser.expected_cost(found)
        regret = (value - cost) / (expected[1]["value"] - cost)  # type: ignore[operator]
        own = {"arm": "learned", "training_seed": seed, "seconds": round(seconds, 1), "regret": regret}
        expected.append({"metric": "expected_gap_nats", "value": value, **own})

    measured = measure(denoiser, data, arms, steps)
    records = [{**record, **labels} for record in expected]
    records += measured.assign(arm=measured["family"], **labels).to_dict("records")
    config = {**labels, "seeds": seeds, "updates": updates, "batch_size": batch_size, "bonus": bonus}
    write_results(out, "chain", config, pd.DataFrame(records))
    Console().print(results_table(records, title=f"Exact {task}, {steps} steps: gap to the log evidence, nats"))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
