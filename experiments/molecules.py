"""What the experiments on pretrained models share: learn an order, compare it, show it."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, groupby, product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from opponents import opponents
from rich.console import Console
from torch import Tensor

from orderppl import Batch, Denoiser, Policy, evaluate, follow
from orderppl.data import Examples
from orderppl.evaluation import Arm, paired_difference, summary
from orderppl.evaluation.results import results_table
from orderppl.figures import SOFT, STYLE, colour_bar, new_figure
from orderppl.policies.plans import Planned


def compare(
    learned: Mapping[int, Policy],
    denoiser: Denoiser,
    test: Examples,
    steps: int,
    *,
    spaced: Arm,
    out: Path,
    title: str,
    drawn: bool = False,
    others: Sequence[Arm] = (),
) -> pd.DataFrame:
    """Follow every arm along the held-out rows: records, and a table of the best on the screen.

    Args:
        learned: policies by their training seeds.
        denoiser: see `orderppl.Denoiser`.
        test: the rows.
        steps: step budget T.
        spaced: the best spaced order on other rows, an opponent.
        out: folder of the measurements.
        title: of the table.
        drawn: deploy draws of the policies, three of each, instead of their modes, which a policy that scans can only
            guess.
        others: further arms, to compare with as well.
    """
    arms = [*opponents(steps), spaced, *others]
    ways: dict[str, dict[str, Any]] = {"mode": {"mode": True}, "drawn": {"seeds": (0, 1, 2)}}
    for (seed, policy), way in product(learned.items(), ways):
        name = "learned" if drawn == (way == "drawn") else f"learned, {way}"
        arms.append(Arm(f"{name} #{seed}", policy, steps, family=name, training_seed=seed, **ways[way]))
    table = evaluate(arms, denoiser, test, out=out)
    records = summary(table, ["path_nats"])
    nats = records.sort_values("value")
    apart = [arm.name for arm in (spaced, *others)]
    rivals = nats[(nats["kind"] == "heuristic") & ~nats["arm"].isin(apart)]["arm"]
    gains = []
    for seed, other in product(learned, (rivals.iloc[0], *apart)):
        loss = paired_difference(table, f"learned #{seed}", other, "path_nats")
        gain = {"metric": "advantage", "arm": "learned", "of": other, "training_seed": seed}
        gains.append(gain | {"value": -loss.value, "low": -loss.high, "high": -loss.low})
    records = pd.concat([records, pd.DataFrame(gains)]).assign(steps=steps)
    if len(learned) == 1:  # other seeds may hold out other rows
        records["training_seed"] = next(iter(learned))
    records["arm"] = records["arm"].str.replace(r" #\d+$", "", regex=True)
    Console().print(results_table(nats.head(10), title=f"{title}, {len(test)} held-out, {steps} steps"))
    rows = ("arm", "training_seed", "of")
    Console().print(results_table(gains, rows=rows, title="Paired: learned better by, nats per token"))
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


def side_by_side(steps: Tensor) -> float:
    """Share of neighbours that are revealed in one step; steps: int64 [B, S], -1 where nothing is."""
    both = (steps[:, 1:] >= 0) & (steps[:, :-1] >= 0)
    return float(((steps[:, 1:] == steps[:, :-1]) & both).sum() / both.sum())


def figure_of(shares: Sequence[Tensor], labels: Sequence[Sequence[str]], means: pd.DataFrame, label: str) -> Any:
    """P(step | position) of some rows (float [S, T] each), and the mean step of every group below.

    Given positions stay empty. A label that neighbours share stands once, between lines.
    """
    heights = [2.0] * len(shares) + [1.0 + 0.21 * len(means)]
    with plt.rc_context(STYLE):
        figure = new_figure(sum(heights))
        axes = figure.subplots(len(heights), 1, height_ratios=heights)
        for axis, probs, names in zip(axes, shares, labels, strict=False):
            shown = probs.masked_fill(probs.sum(-1, keepdim=True) == 0, float("nan")).T.numpy()
            image = axis.imshow(shown, aspect="auto", vmin=0, vmax=1)
            axis.set(ylabel="step", yticks=range(probs.shape[-1]))
            runs = [(name, len(list(run))) for name, run in groupby(names)]
            ends = list(accumulate(size for _, size in runs))
            centres = [end - (size + 1) / 2 for end, (_, size) in zip(ends, runs, strict=True)]
            axis.set_xticks(centres, [name for name, _ in runs], fontsize="x-small")
            if len(runs) < len(names) / 2:
                axis.vlines([end - 0.5 for end in ends[:-1]], -0.5, probs.shape[-1] - 0.5, SOFT, linewidth=0.8)
        colour_bar(image, list(axes[:-1]), "P(step | position)")
        axes[-1].barh(means[label], means["value"], height=0.6)
        axes[-1].set(xlabel=f"mean step of a {label}, from 0")
        axes[-1].invert_yaxis()
    return figure
