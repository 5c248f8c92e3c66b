"""The picture of a comparison: quality against forwards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from orderppl.evaluation.table import PER_TOKEN, by_row, higher_is_better, metrics_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELLED = 8  # curves with a name and a colour
MARKS = (1, 1.5, 2, 3, 4, 6, 8)
TICKS = (*(mark * 10.0**power for power in range(-6, 0) for mark in MARKS), *MARKS, 12, 16, 24, 32, 64)
UNITS = {"accuracy": "accuracy (share of rows)"} | {metric: f"{metric} (nats per token)" for metric in PER_TOKEN}
FORWARDS = "mean denoiser forwards per row (NFE)"


class Panel(NamedTuple):
    """Arms with `family`, `kind`, `training_seed`, and means: `value` of a metric, `nfe` of what `xlabel` says."""

    metric: str
    arms: pd.DataFrame
    xlabel: str = FORWARDS


def frontier_figure(
    table: pd.DataFrame,
    metrics: Iterable[str] | None = None,
    *,
    highlight: Iterable[str] = (),
    seconds: pd.DataFrame | None = None,
) -> Figure:
    """One panel per metric: mean NFE and value of every arm, joined by family, and the best heuristic.

    Learned families are thick, one line per training seed. At most eight curves have names and colours: those of
    `highlight`, the learned ones, then the heuristics that are the best one somewhere; the rest is grey. Oracles are
    dotted.

    Args:
        table: of `evaluate`.
        metrics: accuracy, path_nats or any column; those that were measured when left out.
        highlight: families that are named first.
        seconds: of `decoding_seconds`; the first metric is then shown against the seconds at every batch size as well.
    """
    import matplotlib.pyplot as plt

    from orderppl.figures import HEIGHT, STYLE, new_figure

    panels = []
    for metric in metrics_of(table) if metrics is None else metrics:
        rows = by_row(table, metric)
        means = rows.weights @ rows.values / rows.weights.sum()
        panels.append(Panel(metric, rows.arms.assign(nfe=rows.nfe.mean(0), value=means)))
    for measured, timed in () if seconds is None else seconds.groupby("metric", sort=False):
        metric, arms, _ = panels[0]
        arms = arms.assign(nfe=arms["arm"].map(timed.set_index("arm")["value"])).dropna(subset="nfe")
        panels.append(Panel(metric, arms, f"seconds per row at batch size {str(measured).rpartition('_')[2]}"))
    with plt.rc_context(STYLE):
        figure = new_figure(HEIGHT * len(panels) + 0.8)
        draw_curves(figure, panels, highlight=highlight)
    return figure


def draw_curves(figure: Any, panels: Sequence[Panel], *, highlight: Iterable[str] = ()) -> None:
    """Draw what `frontier_figure` says.

    Args:
        figure: an empty figure, or a part of one.
        panels: one below the other.
        highlight: families that are named first.
    """
    from orderppl.figures import COLOURS, SOFT, legend

    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    best = [best_heuristic(panel.arms, higher_is_better(panel.metric)) for panel in panels]
    named = dict.fromkeys(highlight)
    for panel, edge in zip(panels, best, strict=True):
        named |= dict.fromkeys([*panel.arms["family"][panel.arms["kind"] == "learned"], *edge["family"]])
    there = {family for panel in panels for family in panel.arms["family"]}
    oracles = {family: SOFT for _, arms, _ in panels for family in arms["family"][arms["kind"] == "oracle"]}
    free = COLOURS[: LABELLED - 1 - bool(oracles)]  # names are left for the best heuristic and for what sees the truth
    colours = oracles | dict(zip([name for name in named if name in there], free, strict=False))
    for axis, panel, edge in zip(axes, panels, best, strict=True):
        _panel(axis, panel.arms, edge, colours)
        axis.set(xlabel=panel.xlabel, ylabel=UNITS.get(panel.metric, panel.metric))
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
