"""Learned opponents: what others would train on the same denoiser, beside the orders of some runs.

    orderppl fit-order --config sudoku_order --denoiser.name_or_path docs/results/sudoku/denoiser --out runs/sudoku/0
    python experiments/learned_opponents.py --runs '[runs/sudoku/0]' --out runs/opponents

The runs differ in their seed alone. Each opponent (see peers.py) is fitted on the data of the run once per seed, and
may spend as many denoiser rows as the run did.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import torch
from jsonargparse import auto_cli
from peers import Peer, peers
from tables import COMPARED, compared, markdown

from orderppl import evaluate, fit, load_run
from orderppl.evaluation import Arm, advantages, frontier_figure, summary
from orderppl.evaluation.results import plain_records, write_results
from orderppl.figures import save_figure
from orderppl.guides import PolicyGuide
from orderppl.inference import Imitation
from orderppl.models import UnmaskingModel
from orderppl.policies import AtPrice
from orderppl.runs import Run

FACTORS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 8.0)  # of probabilities: more or fewer forwards
MOST = 2000  # updates of what is supervised, which costs few denoiser rows


def own_arms(run: Run, seed: int) -> list[Arm]:
    """The learned order of a run, at seven prices of its range."""
    prices, played = run.model.step_price, {"family": "learned", "mode": True, "training_seed": seed}
    arms = []
    for price in prices.grid(7):
        name, setting = f"learned price={price:.3g} #{seed}", {"price": price}
        arms.append(Arm(name, AtPrice(run.policy, price), run.num_steps, setting=setting, **played))
    return arms


def learn(name: str, peer: Peer, run: Run, seed: int, budget: int, lr: float, out: Path) -> int:
    """Fit a peer within a budget of denoiser rows; return those that it spends."""
    batch_size, spent = run.config["fit"]["batch_size"], 0
    guide = PolicyGuide(peer.policy, run.denoiser, run.num_steps)
    prices = run.model.step_price
    middle = (prices.low * prices.high) ** 0.5  # of the one that is charged for steps by the model
    model = UnmaskingModel(run.denoiser, peer.policy, run.num_steps, step_price=middle)
    settings: dict[str, Any] = {"schedule": "cosine", "warmup": 20, "grad_clip": 1.0, "group": 8, "seed": seed}
    settings |= {"optimizer": partial(torch.optim.Adam, lr=lr), "batch_size": batch_size}
    for number, one in enumerate(peer.fits):
        most = MOST if isinstance(one.objective, Imitation) else budget
        updates = max(min(budget // (len(peer.fits) * batch_size * one.rows), most), 1)
        folder = out / f"{name.replace(' ', '-')}-{seed}-{number}"
        settings |= {"updates": updates, "out": folder, "resume": True, "checkpoint_every": 100}
        fit(model, guide, one.data, objective=one.objective, **settings)
        spent += updates * batch_size * one.rows
    return spent


def main(
    runs: Sequence[Path],
    rows: int = 500,
    targets: Sequence[float] = (2.0, 2.5, 3.0, 4.0),
    lr: float = 0.003,
    speed: float = 1.0,
    price: float = 0.02,
    split: str = "test",
    out: Path = Path("runs/opponents"),
) -> None:
    """Fit every opponent on every seed, and compare.

    Args:
        runs: folders of fit-order, one per seed, with a range of prices.
        rows: of the comparison.
        targets: mean numbers of forwards.
        lr: learning rate of the opponents.
        speed: exponent of the steps saved, in the reward of policy_gradient.
        price: of a step, in that of dultra.
        split: of the comparison; tune on validation.
        out: folder of runs and results.
    """
    loaded, arms, spent = [load_run(folder) for folder in runs], list[Arm](), dict[str, int]()
    for seed, run in enumerate(loaded):
        arms += own_arms(run, seed)
        orders = 1 + (run.num_steps - 1) * run.objective.num_particles
        budget = spent["learned"] = run.info["updates"] * run.config["fit"]["batch_size"] * orders
        pyro.set_rng_seed(seed)
        for name, peer in peers(run, speed, price).items():
            spent[name] = learn(name, peer, run, seed, budget, lr, out)
            seeds = (0,) if peer.mode else (0, 1, 2)
            for factor in FACTORS:
                played = {"family": name, "mode": peer.mode, "training_seed": seed, "setting": {"factor": factor}}
                arm = f"{name} factor={factor:g} #{seed}"
                arms.append(Arm(arm, peer.play(peer.policy, factor), peer.steps, seeds=seeds, **played))
    test = loaded[0].data.splits()[split].take(rows)
    table = evaluate(arms, loaded[0].denoiser, test, metrics=["accuracy", "path_nats"], batch_size=rows, out=out)
    gains = [advantages(table, targets, opponents=[name]) for name in spent if name != "learned"]
    gained = pd.concat(gains).query("metric == 'advantage' and arm == 'learned' and target_nfe.notna()")
    found = pd.concat([summary(table), gained])
    records = plain_records(found.assign(task=type(loaded[0].data).__name__.lower(), rows=found["arm"].map(spent)))
    config = {"test_rows": len(test), "split": split, "spent": spent, "lr": lr, "speed": speed, "price": price}
    write_results(out, "learned-opponents", config, records)
    save_figure(frontier_figure(table), out / "frontier.svg")
    print(markdown(COMPARED, list(compared(records))))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
