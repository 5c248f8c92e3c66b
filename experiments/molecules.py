"""What the experiments on pretrained models of molecules share: learn an order, compare it, show it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pyro
import torch
from opponents import best_of, opponents, spaced_orders
from plan_fits import fit_plan
from rich.console import Console
from torch import Tensor

from orderppl import Batch, Denoiser, Policy, evaluate, follow
from orderppl.data import Examples
from orderppl.evaluation import Arm, paired_difference, summary
from orderppl.evaluation.results import results_table
from orderppl.figures import STYLE, colour_bar, new_figure
from orderppl.policies.plans import Planned


def updates_within(rows: int, batch_size: int, particles: int, steps: int) -> int:
    """Updates that a number of denoiser rows pays for.

    An update reads the fully hidden state of each sequence once and the T - 1 later ones once per order.
    """
    return max(rows // (batch_size * (1 + (steps - 1) * particles)), 1)


def learn_plan(
    plan: Planned,
    denoiser: Denoiser,
    train: Examples,
    steps: int,
    *,
    rows: int,
    lr: float,
    bonus: float,
    batch_size: int = 4,
    particles: int = 8,
    seed: int = 0,
    out: Path | None = None,
    **settings: Any,
) -> int:
    """Fit a plan with as many updates as `rows` pay for, see `fit_plan`; return their number."""
    pyro.set_rng_seed(seed)
    updates = updates_within(rows, batch_size, particles, steps)
    fit_plan(
        plan,
        denoiser,
        train,
        steps,
        bonus=bonus,
        fade=int(0.75 * updates),
        lr=lr,
        particles=particles,
        updates=updates,
        batch_size=batch_size,
        seed=seed,
        out=out,
        **settings,
    )
    return updates


def compare(
    learned: Policy,
    denoiser: Denoiser,
    test: Examples,
    steps: int,
    *,
    chosen_on: Examples,
    seed: int,
    out: Path,
    title: str,
) -> pd.DataFrame:
    """Follow every arm along the held-out rows: records, and a table of the best on the screen.

    The spaced order among the opponents is the best one on the rows `chosen_on`.
    """
    spaced = best_of(spaced_orders(steps), denoiser, chosen_on)
    arms = [
        Arm("learned", learned, steps, mode=True, training_seed=seed),
        Arm("learned, drawn", learned, steps, training_seed=seed, seeds=(0, 1, 2)),
        *opponents(steps),
        spaced,
    ]
    table = evaluate(arms, denoiser, test, out=out)
    records = summary(table, ["path_nats", "nfe"])
    nats = records[records["metric"] == "path_nats"].sort_values("value")
    best = nats[(nats["kind"] == "heuristic") & (nats["arm"] != spaced.name)]["arm"].iloc[0]
    gains = []
    for other in (best, spaced.name):
        loss = paired_difference(table, "learned", other, "path_nats")
        gain = {"metric": "advantage", "arm": "learned", "of": other}
        gains.append(gain | {"value": -loss.value, "low": -loss.high, "high": -loss.low})
    records = pd.concat([records, pd.DataFrame(gains)]).assign(steps=steps, training_seed=seed)
    Console().print(results_table(nats.head(10), title=f"{title}, {len(test)} held-out, {steps} steps"))
    Console().print(results_table(gains, rows=("arm", "of"), title="Paired: learned better by, nats per token"))
    return records


@torch.no_grad()
def revealed_steps(policy: Policy, denoiser: Denoiser, batch: Batch, steps: int, size: int = 64) -> Tensor:
    """The step at which the mode of a policy reveals every position: int64 [B, S], -1 where it is given."""
    parts = [batch.rows(slice(begin, begin + size)) for begin in range(0, len(batch), size)]
    return torch.cat([follow(policy, denoiser, part, steps, mode=True).reveal_step for part in parts])


def step_shares(policy: Planned, denoiser: Denoiser, batch: Batch, steps: int, draws: int = 64) -> Tensor:
    """P(step | position) of the rows of a batch, by draws: float [B, S, T]; 0 where a position is given."""
    with torch.no_grad():
        drawn = policy.order(batch, denoiser, steps).sample(torch.Size((draws,)))  # [draws, B, S]
    return torch.stack([(drawn == step).float().mean(0) for step in range(steps)], -1)


def mean_by_group(steps: Tensor, groups: Sequence[Sequence[str | None]], label: str) -> pd.DataFrame:
    """`mean_step` of every group of positions, from 0: `groups` names that of each revealed position, row by row."""
    found: dict[str, list[float]] = {}
    for row, names in zip(steps, groups, strict=True):
        for step, name in zip(row[row >= 0].tolist(), names, strict=True):
            if name is not None:
                found.setdefault(name, []).append(step)
    records = [{"value": sum(v) / len(v), "n": len(v), label: name} for name, v in found.items()]
    return pd.DataFrame(records).assign(metric="mean_step", arm="learned")


def figure_of(shares: Sequence[Tensor], labels: Sequence[Sequence[str]], means: pd.DataFrame, label: str) -> Any:
    """P(step | position) of some rows (float [S, T] each), and the mean step of every group below."""
    heights = [2.0] * len(shares) + [1.0 + 0.21 * len(means)]
    with plt.rc_context(STYLE):
        figure = new_figure(sum(heights))
        axes = figure.subplots(len(heights), 1, height_ratios=heights)
        for axis, probs, names in zip(axes, shares, labels, strict=False):
            image = axis.imshow(probs.T.numpy(), aspect="auto", vmin=0, vmax=1)
            axis.set(ylabel="step", yticks=range(probs.shape[-1]))
            if len(names):
                axis.set_xticks(range(len(names)), names, fontsize="x-small")
            else:
                axis.set_xlabel("position")
        colour_bar(image, list(axes[:-1]), "P(step | position)")
        axes[-1].barh(means[label], means["value"], height=0.6)
        axes[-1].set(xlabel=f"mean step of a {label}, from 0")
        axes[-1].invert_yaxis()
    return figure
