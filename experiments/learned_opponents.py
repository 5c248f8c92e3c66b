"""Learned opponents: what others would train on the same denoiser, beside the orders of some runs.

    orderppl fit-order --config sudoku_order --denoiser.name_or_path docs/results/sudoku/denoiser --out runs/sudoku/0
    python experiments/learned_opponents.py --runs '[runs/sudoku/0]' --out runs/opponents

The runs differ in their seed alone. Each opponent (see peers.py) is fitted on the data of the run once per seed, and
may spend as many denoiser rows as the run did. Its learning rate is the one that does best on validation rows of the
first run. What is finished is kept: repeat the command to go on.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import torch
from jsonargparse import auto_cli
from peers import Peer, arms_of, peers
from priced import priced_arms
from table_layouts import COMPARED
from tables import compared, markdown

from orderppl import evaluate, fit, load_run
from orderppl.evaluation import Arm, advantages, frontier_figure, summary
from orderppl.evaluation.results import plain_records, write_results
from orderppl.figures import save_figure
from orderppl.guides import PolicyGuide
from orderppl.inference import Imitation
from orderppl.models import UnmaskingModel
from orderppl.models.denoisers import OwnOutput
from orderppl.runs import Run

MOST = 2000  # updates of what is supervised, which costs few denoiser rows


def own_arms(run: Run, seed: int) -> list[Arm]:
    """The learned order of a run, at the prices of its range."""
    return priced_arms("learned", run.policy, run.model.step_price, run.num_steps, seed)


def learn(name: str, peer: Peer, run: Run, seed: int, budget: int, lr: float, out: Path) -> int:
    """Fit a peer within a budget of denoiser rows; return those that it spends."""
    batch_size, spent, own = run.config["fit"]["batch_size"], 0, run.model
    guide = PolicyGuide(peer.policy, run.denoiser, run.num_steps)
    middle = (own.step_price.low * own.step_price.high) ** 0.5  # of the one that is charged for steps by the model
    scored = {"answer": own.answer, "temperature": own.temperature}
    model = UnmaskingModel(run.denoiser, peer.policy, run.num_steps, step_price=middle, **scored)
    settings: dict[str, Any] = {"schedule": "cosine", "warmup": 20, "grad_clip": 1.0, "group": 8, "seed": seed}
    settings |= {"optimizer": partial(torch.optim.Adam, lr=lr), "batch_size": batch_size}
    for number, one in enumerate(peer.fits):
        most = MOST if isinstance(one.objective, Imitation) else budget
        updates = max(min(budget // (len(peer.fits) * batch_size * one.rows), most), 1)
        folder = out / f"{name.replace(' ', '-')}-{seed}" / f"lr-{lr:g}" / str(number)
        settings |= {"updates": updates, "out": folder, "resume": True, "checkpoint_every": 100}
        fit(model, guide, one.data, objective=one.objective, **settings)
        spent += updates * batch_size * one.rows
    return spent


def gains_on(opponent: str, table: pd.DataFrame, targets: Sequence[float], **options: Any) -> pd.DataFrame:
    """What the learned order is better by than an opponent, at the targets that both curves reach."""
    gains = advantages(table, targets, opponents=[opponent], **options)
    if "target_nfe" not in gains:  # it is nowhere as fast as that
        return pd.DataFrame({"value": []})
    return gains[(gains["metric"] == "advantage") & (gains["arm"] == "learned") & gains["target_nfe"].notna()]


def tune(
    run: Run,
    lrs: Sequence[float],
    make: Callable[[Run], dict[str, Peer]],
    budget: int,
    targets: Sequence[float],
    out: Path,
) -> dict[str, float]:
    """The learning rate of every peer by which it comes nearest to the learned order, on validation rows."""
    if len(lrs) == 1:
        return dict.fromkeys(make(run), lrs[0])
    arms, tried = own_arms(run, 0), list[tuple[str, float]]()
    for lr in lrs:
        pyro.set_rng_seed(0)
        for name, peer in make(run).items():
            learn(name, peer, run, 0, budget, lr, out)
            arms += arms_of(name, peer, 0, f" lr={lr:g}")
            tried.append((name, lr))
    rows = run.data.splits()["validation"].take(500)
    table = evaluate(arms, run.denoiser, rows, metrics=["accuracy"], batch_size=len(rows), out=out / "validation")
    behind: dict[tuple[str, float], float] = {}  # by 1 at a target that its curve does not reach
    for name, lr in tried:
        here = gains_on(f"{name} lr={lr:g}", table, targets, resamples=0)
        behind[name, lr] = here["value"].sum() + len(targets) - len(here)
    return {name: min(lrs, key=lambda lr: behind[name, lr]) for name, _ in tried}


def main(
    runs: Sequence[Path],
    rows: int = 500,
    targets: Sequence[float] = (2.0, 2.5, 3.0, 4.0),
    lrs: Sequence[float] = (0.001, 0.003, 0.01),
    speed: float = 1.0,
    price: float = 0.02,
    start: float = -2.0,
    split: str = "test",
    out: Path = Path("runs/opponents"),
) -> None:
    """Fit every opponent on every seed, and compare.

    Args:
        runs: folders of fit-order, one per seed, with a range of prices.
        rows: of the comparison.
        targets: mean numbers of forwards.
        lrs: learning rates to choose from, for every opponent its own.
        speed: exponent of the steps saved, in the reward of policy_gradient.
        price: of a step, in that of dultra.
        start: log-odds of the Bernoulli policies at first; higher where T steps do not end a row at these.
        split: of the comparison; tune on validation.
        out: folder of runs and results.
    """
    loaded, arms, spent = [load_run(folder) for folder in runs], list[Arm](), dict[str, int]()
    orders = 1 + (loaded[0].num_steps - 1) * loaded[0].objective.num_particles
    budget = spent["learned"] = loaded[0].info["updates"] * loaded[0].config["fit"]["batch_size"] * orders
    rewards = {"speed": speed, "price": price, "start": start}
    own = OwnOutput(loaded[0].data, loaded[0].denoiser, rows=2000)  # written once for all seeds and learning rates
    make = partial(peers, own=own, **rewards)
    chosen = tune(loaded[0], lrs, make, budget, targets, out)
    for seed, run in enumerate(loaded):
        arms += own_arms(run, seed)
        pyro.set_rng_seed(seed)
        for name, peer in make(run).items():
            spent[name] = learn(name, peer, run, seed, budget, chosen[name], out)
            arms += arms_of(name, peer, seed)
    test = loaded[0].data.splits()[split].take(rows)
    table = evaluate(arms, loaded[0].denoiser, test, metrics=["accuracy", "path_nats"], batch_size=rows, out=out)
    gains = [gains_on(name, table, targets) for name in spent if name != "learned"]
    found = pd.concat([summary(table), *gains])
    records = plain_records(found.assign(task=type(loaded[0].data).__name__.lower(), rows=found["arm"].map(spent)))
    config = {"test_rows": len(test), "split": split, "spent": spent, "lr": chosen, **rewards}
    write_results(out, "learned-opponents", config, records)
    save_figure(frontier_figure(table), out / "frontier.svg")
    print(markdown(COMPARED, list(compared(records))))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
