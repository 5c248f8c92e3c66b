"""The picture of a comparison: quality against forwards."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from orderppl.evaluation.curves import Frontier, frontier
from orderppl.evaluation.table import PER_TOKEN, by_row, metrics_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELLED = 8  # curves with a name and a colour
TICKS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
AXES = {metric: f"{metric} (nats per token, lower is better)" for metric in PER_TOKEN}


def frontier_figure(
    table: pd.DataFrame, metrics: Iterable[str] | None = None, *, highlight: Iterable[str] = ()
) -> Figure:
    """One panel per metric: mean NFE and value of every arm, joined by family, and the best heuristic.

    Learned families are thick, one line per training seed. At most eight curves have names and colours: those of
    `highlight`, the learned ones, then the heuristics that are the best one somewhere; the rest is grey.

    Args:
        table: of `evaluate`.
        metrics: accuracy, path_nats or any column; those that were measured when left out.
        highlight: families that are named first.
    """
    import matplotlib.pyplot as plt

    wanted = metrics_of(table) if metrics is None else list(metrics)
    figure, axes = plt.subplots(1, len(wanted), figsize=(6.5 * len(wanted), 5), squeeze=False)
    colours: dict[str, str] = {}
    for axis, metric in zip(axes[0], wanted, strict=True):
        _panel(axis, table, metric, list(highlight), colours)
    handles = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    axes[0][-1].legend(handles.values(), handles, fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    return figure


def _panel(axis: Axes, table: pd.DataFrame, metric: str, highlight: list[str], colours: dict[str, str]) -> None:
    rows = by_row(table, metric)
    means = rows.weights @ rows.values / rows.weights.sum()
    arms = rows.arms.assign(nfe=rows.nfe.mean(0), value=means)
    low, high = float(arms["nfe"].min()), float(arms["nfe"].max())
    grid = np.geomspace(low, max(high, low * 1.01), 200)
    best: list[tuple[float, str, float]] = []
    if (arms["kind"] == "heuristic").any():
        edge: Frontier = frontier(table, metric, resamples=0)
        best = [(float(place), *found) for place in grid if (found := edge.best(float(place))) is not None]
    named = dict.fromkeys([*highlight, *arms["family"][arms["kind"] == "learned"], *(family for _, family, _ in best)])
    for family in [family for family in named if family in set(arms["family"])]:
        if family not in colours and len(colours) < LABELLED - 1:  # one name is left for the best heuristic
            colours[family] = f"C{len(colours)}"
    for (family, _), curve in arms.groupby(["family", "training_seed"], dropna=False, sort=False):
        _curve(axis, str(family), curve.sort_values("nfe"), colours.get(str(family)))
    if best:
        nfe, _, values = zip(*best, strict=True)
        axis.plot(nfe, values, color="black", linestyle="--", linewidth=1, label="best heuristic", zorder=4)
    axis.set(xlabel="mean NFE (denoiser forwards per row)", ylabel=AXES.get(metric, metric), xscale="log")
    axis.set_xticks([tick for tick in TICKS if low <= tick <= high] or [low])
    axis.xaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def _curve(axis: Axes, family: str, curve: pd.DataFrame, colour: str | None) -> None:
    learned, oracle = (bool((curve["kind"] == kind).any()) for kind in ("learned", "oracle"))
    nfe, values = curve["nfe"].to_numpy(), curve["value"].to_numpy()
    style: dict[str, Any] = {"color": colour or "0.8", "zorder": 3 if learned else 2 if colour else 1}
    # Straight in NFE, as it is interpolated, which is not straight on a logarithmic axis.
    grid = np.unique(np.concatenate([nfe, np.geomspace(nfe[0], nfe[-1], 100)]))
    first = family not in axis.get_legend_handles_labels()[1]
    axis.plot(
        grid,
        np.interp(grid, nfe, values),
        linewidth=2.5 if learned else 1,
        linestyle=":" if oracle else "-",
        label=family if colour is not None and first else None,
        **style,
    )
    axis.plot(nfe, values, linestyle="", marker="o" if learned else ".", **style)
