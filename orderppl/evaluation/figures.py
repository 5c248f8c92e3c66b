"""The picture of a comparison: quality against forwards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from orderppl.evaluation.table import PER_TOKEN, by_row, higher_is_better, metrics_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELLED = 8  # curves with a name and a colour
TICKS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
UNITS = {"accuracy": "accuracy (share of rows)"} | {metric: f"{metric} (nats per token)" for metric in PER_TOKEN}
FORWARDS = "mean denoiser forwards per row (NFE)"


def frontier_figure(
    table: pd.DataFrame, metrics: Iterable[str] | None = None, *, highlight: Iterable[str] = ()
) -> Figure:
    """One panel per metric: mean NFE and value of every arm, joined by family, and the best heuristic.

    Learned families are thick, one line per training seed. At most eight curves have names and colours: those of
    `highlight`, the learned ones, then the heuristics that are the best one somewhere; the rest is grey. Oracles are
    dotted.

    Args:
        table: of `evaluate`.
        metrics: accuracy, path_nats or any column; those that were measured when left out.
        highlight: families that are named first.
    """
    import matplotlib.pyplot as plt

    from orderppl.figures import HEIGHT, STYLE, new_figure

    panels = {}
    for metric in metrics_of(table) if metrics is None else metrics:
        rows = by_row(table, metric)
        means = rows.weights @ rows.values / rows.weights.sum()
        panels[metric] = rows.arms.assign(nfe=rows.nfe.mean(0), value=means)
    with plt.rc_context(STYLE):
        figure = new_figure(HEIGHT * len(panels) + 0.8)
        draw_curves(figure, panels, highlight=highlight)
    return figure


def draw_curves(
    figure: Any, panels: Mapping[str, pd.DataFrame], *, highlight: Iterable[str] = (), xlabel: str = FORWARDS
) -> None:
    """Draw what `frontier_figure` says.

    Args:
        figure: an empty figure, or a part of one.
        panels: by metric, arms with `family`, `kind`, `training_seed` and the means `nfe` and `value`.
        highlight: families that are named first.
        xlabel: what `nfe` counts.
    """
    from orderppl.figures import COLOURS, SOFT, legend

    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    best = {metric: best_heuristic(arms, higher_is_better(metric)) for metric, arms in panels.items()}
    named = dict.fromkeys(highlight)
    for metric, arms in panels.items():
        named |= dict.fromkeys([*arms["family"][arms["kind"] == "learned"], *best[metric]["family"]])
    there = {family for arms in panels.values() for family in arms["family"]}
    oracles = {family: SOFT for arms in panels.values() for family in arms["family"][arms["kind"] == "oracle"]}
    free = COLOURS[: LABELLED - 1 - bool(oracles)]  # names are left for the best heuristic and for what sees the truth
    colours = oracles | dict(zip([name for name in named if name in there], free, strict=False))
    for axis, (metric, arms) in zip(axes, panels.items(), strict=True):
        _panel(axis, arms, best[metric], colours)
        axis.set(xlabel=xlabel, ylabel=UNITS.get(metric, metric))
    handles = [pair for axis in axes for pair in zip(*axis.get_legend_handles_labels(), strict=True)]
    legend(figure, {label: line for line, label in handles})


def best_heuristic(arms: pd.DataFrame, higher: bool) -> pd.DataFrame:
    """The frontier at the means, see `Frontier`: `nfe`, `value` and `family` of the best curve, left to right."""
    curves = {
        str(family): (curve["nfe"].to_numpy(), curve["value"].to_numpy())
        for family, curve in arms[arms["kind"] == "heuristic"].sort_values("nfe").groupby("family", sort=False)
    }
    found = []
    sign, best_of = (1, np.maximum) if higher else (-1, np.minimum)
    for nfe in _grid(arms["nfe"].to_numpy()) if curves else ():
        read = [
            (float(np.interp(nfe, places, best_of.accumulate(values))), family)
            for family, (places, values) in curves.items()
            if places[0] <= nfe + 1e-9
        ]
        if read:
            value, family = max(read, key=lambda pair: sign * pair[0])
            found.append((nfe, value, family))
    return pd.DataFrame(found, columns=["nfe", "value", "family"])


def _grid(nfe: np.ndarray) -> np.ndarray:
    """Arms' own places and some between: a curve is straight in NFE, which is not straight on a logarithmic axis."""
    return np.unique(np.concatenate([nfe, np.geomspace(nfe.min(), nfe.max(), 12)]))


def _panel(axis: Axes, arms: pd.DataFrame, best: pd.DataFrame, colours: Mapping[str, str]) -> None:
    from orderppl.figures import INK

    low, high = float(arms["nfe"].min()), float(arms["nfe"].max())
    for (family, _), curve in arms.groupby(["family", "training_seed"], dropna=False, sort=False):
        _curve(axis, str(family), curve.sort_values("nfe"), colours.get(str(family)))
    if len(best):
        axis.plot(best["nfe"], best["value"], color=INK, linestyle="--", linewidth=1, label="best heuristic", zorder=4)
    axis.set_xscale("log")
    axis.set_xticks([tick for tick in TICKS if low <= tick <= high] or [low])
    axis.xaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.grid()
    axis.set_axisbelow(True)


def _curve(axis: Axes, family: str, curve: pd.DataFrame, colour: str | None) -> None:
    from orderppl.figures import GREY

    learned, oracle = (bool((curve["kind"] == kind).any()) for kind in ("learned", "oracle"))
    nfe, values = curve["nfe"].to_numpy(), curve["value"].to_numpy()
    style: dict[str, Any] = {"color": colour or GREY, "zorder": 3 if learned else 2 if colour else 1}
    grid = _grid(nfe) if len(nfe) > 1 else nfe
    name = "oracle, sees the truth" if oracle else family
    first = name not in axis.get_legend_handles_labels()[1]
    axis.plot(
        grid,
        np.interp(grid, nfe, values),
        linewidth=2.5 if learned else 1,
        linestyle=":" if oracle else "-",
        label=name if colour is not None and first else None,
        **style,
    )
    axis.plot(nfe, values, linestyle="", marker="o" if learned else ".", markersize=5, **style)
