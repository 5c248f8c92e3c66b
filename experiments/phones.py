"""English words as they are spoken, under an exact trigram model of phones: real rows whose every conditional is known.

    python experiments/phones.py --steps 3 --seeds 3 --out runs/phones

One phone at a time every order is equally likely, so that all there is between the arms is what phones that are
revealed together do not know of each other. The order is a plan whose steps depend on each other, learned by SVI alone.
Opponents are all heuristics and the best spaced order, dilated or periodic, chosen on validation words. `long search`
is a local search with restarts from the learned order, on training words: how far learning is from it is in `regret`, a
share of the way from random sets.
"""

from dataclasses import asdict
from pathlib import Path

import pandas as pd
from jsonargparse import auto_cli
from opponents import best_of, opponents, spaced_orders
from plan_fits import PlanFit, learn_plans
from rich.console import Console

from orderppl import evaluate
from orderppl.data import Pronunciations
from orderppl.evaluation import Arm, paired_difference, summary
from orderppl.evaluation.results import results_table, write_results
from orderppl.inference.refine import refine_plan
from orderppl.models import PositionTable, ScanNetwork
from orderppl.models.denoisers import PhoneDenoiser
from orderppl.policies import FixedOrder, ScanPlan

FIT = PlanFit(rows=400_000, batch_size=16)


def main(
    steps: int = 3,
    seeds: int = 3,
    length: int = 8,
    fit: PlanFit = FIT,
    restarts: int = 10,
    out: Path = Path("runs/phones"),
) -> None:
    """Learn on every seed and compare on held-out words.

    Args:
        steps: step budget T.
        seeds: training seeds, from 0.
        length: phones of a word.
        fit: what a fit may spend, and how.
        restarts: of the long search.
        out: folder of runs and results.
    """
    denoiser = PhoneDenoiser()
    splits = Pronunciations(length=length, test_share=0.3).splits(denoiser.tokenizer)
    arms = [*opponents(steps), best_of(spaced_orders(steps), denoiser, splits["validation"])]
    plans = learn_plans(
        lambda count: ScanPlan(ScanNetwork(count, PositionTable(length, 8, noise=0.3))),
        *(denoiser, splits["train"], steps, range(seeds), out, fit),
    )
    for seed, plan in plans.items():
        arms.append(Arm(f"learned #{seed}", plan, steps, family="learned", mode=True, training_seed=seed))
        order = plan.order(splits["test"].batch.rows(slice(1)), denoiser, steps).mode[0]
        found = refine_plan(denoiser, splits["train"].batch.rows(slice(1000)), order, steps, restarts=restarts)
        steps_found = FixedOrder(found.steps.tolist())
        arms.append(Arm(f"long search #{seed}", steps_found, steps, family="long search", training_seed=seed))

    table = evaluate(arms, denoiser, splits["test"], out=out)
    nats = summary(table, ["path_nats"]).set_index("arm", drop=False)
    rivals = nats[(nats["kind"] == "heuristic") & (nats["family"] != "long search")]["value"]
    searched = nats[nats["family"] == "long search"]["value"].min()
    records = nats.to_dict("records")
    for seed in range(seeds):
        own = f"learned #{seed}"
        loss = paired_difference(table, own, str(rivals.idxmin()), "path_nats")
        gain = {"metric": "advantage", "arm": "learned", "of": rivals.idxmin(), "training_seed": seed}
        records.append(gain | {"value": -loss.value, "low": -loss.high, "high": -loss.low})
        regret = (nats["value"][own] - searched) / (nats["value"][f"random uniform T={steps}"] - searched)
        records.append({"metric": "regret", "arm": "learned", "training_seed": seed, "value": regret})
    labels = {"task": "phones", "steps": steps, "length": length, "rows": fit.rows}
    config = {**labels, **asdict(fit), "seeds": seeds}
    write_results(out, "phones", config, pd.DataFrame(records).assign(**labels))
    best = nats.sort_values("value").head(12)
    title = f"Words of {length} phones in {steps} steps, {len(splits['test'])} held-out"
    Console().print(results_table(best, rows=("arm",), title=title))
    gains = [record for record in records if record["metric"] in ("advantage", "regret")]
    Console().print(results_table(gains, rows=("arm", "training_seed", "of"), title="Paired: learned better by"))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
