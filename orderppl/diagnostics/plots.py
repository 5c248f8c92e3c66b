"""Figures of an InferenceData.

As in arviz, every function takes the data and an `ax`, makes one when there is none, and returns it. The style is that
of `orderppl.figures`, whose `save_figure` writes a file for light and dark pages.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from orderppl.diagnostics.backend import InferenceData, group
from orderppl.diagnostics.importance import importance_report
from orderppl.diagnostics.order import SAMPLE
from orderppl.diagnostics.statistics import STATISTICS
from orderppl.errors import UserError
from orderppl.figures import COLOURS, HEIGHT, INK, STYLE, colour_bar, new_figure

SHOWN_TOKENS = 32  # with more positions their tokens would overlap


@contextmanager
def _drawing(ax: Axes | None, height: float = HEIGHT) -> Iterator[Axes]:
    """Where to draw: the caller's axes in the caller's style, or a figure of our own."""
    if ax is not None:
        yield ax
        return
    with plt.rc_context(STYLE):
        yield new_figure(height).subplots()


def plot_order(data: InferenceData, ax: Axes | None = None, *, sequence: int | None = None) -> Axes:
    """Heat map of P(r_i = t).

    Args:
        data: from `to_inference_data`.
        ax: where to draw.
        sequence: label of one sequence; the longest when left out.
    """
    probs, chosen = _one(data, "step_probs", sequence)
    with _drawing(ax) as ax:
        image = ax.imshow(probs.T, aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="none")
        colour_bar(image, ax, "P(step | position)")
        ax.set(ylabel="step", yticks=range(probs.sizes["step"]), title=f"sequence {chosen}")
        _label_positions(ax, probs, "x")
        return ax


def plot_precedence(data: InferenceData, ax: Axes | None = None, *, sequence: int | None = None) -> Axes:
    """Matrix of P(r_i < r_j): row i, column j.

    Args:
        data: from `to_inference_data`.
        ax: where to draw.
        sequence: label of one sequence; the longest when left out.
    """
    first, chosen = _one(data, "precedence", sequence)
    first = first.isel(other=[int(np.flatnonzero(first["other"] == place)[0]) for place in first["position"].values])
    with _drawing(ax, HEIGHT * 1.2) as ax:
        image = ax.imshow(first, cmap="cividis", vmin=0, vmax=1, interpolation="none")
        colour_bar(image, ax, "P(row before column)")
        ax.set(title=f"sequence {chosen}")
        _label_positions(ax, first, "x")
        _label_positions(ax, first, "y")
        return ax


def plot_steps_used(data: InferenceData, ax: Axes | None = None) -> Axes:
    """Histogram of the number of steps that an order uses, over draws and sequences.

    Args:
        data: from `to_inference_data`.
        ax: where to draw.
    """
    used = group(data, "sample_stats")["steps_used"].values.ravel()
    budget = int(data["sample_stats"].attrs["num_steps"])
    with _drawing(ax) as ax:
        ax.bar(range(1, budget + 1), np.bincount(used, minlength=budget + 1)[1:] / len(used), color=COLOURS[0])
        ax.axvline(used.mean(), color=INK, linestyle="--", linewidth=1, label=f"mean {used.mean():.2f}")
        ax.set(xlabel="steps used", ylabel="share of orders", xticks=_few(range(1, budget + 1)))
        ax.legend()
        return ax


def plot_set_sizes(data: InferenceData, ax: Axes | None = None) -> Axes:
    """Tokens revealed at each step: mean, and where 80% of orders and sequences lie.

    Args:
        data: from `to_inference_data`.
        ax: where to draw.
    """
    sizes = group(data, STATISTICS)["set_sizes"].stack(order=(*SAMPLE, "sequence"))
    mean = sizes.mean("order").values
    low, high = np.quantile(sizes.transpose("step", "order").values, [0.1, 0.9], axis=1)
    with _drawing(ax) as ax:
        steps = sizes["step"].values
        ax.bar(steps, mean, color=COLOURS[0])
        spread = np.maximum([mean - low, high - mean], 0)  # a mean can be outside
        ax.errorbar(steps, mean, yerr=spread, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
        ax.set(xlabel="step", ylabel="tokens revealed", xticks=_few(steps))
        return ax


def plot_token_types(data: InferenceData, ax: Axes | None = None) -> Axes:
    """When each kind of token is revealed: mean of (step + 1) / steps used, earliest on top.

    Args:
        data: from `to_inference_data`.
        ax: where to draw.
    """
    stats = group(data, STATISTICS)
    place = stats["type_place"].sortby(stats["type_place"], ascending=False)
    with _drawing(ax) as ax:
        ax.barh(np.arange(place.size), place.values, height=0.6, color=COLOURS[0])
        counts = stats["type_tokens"].sel(token_type=place["token_type"]).values
        names = [f"{kind} ({count})" for kind, count in zip(place["token_type"].values, counts, strict=True)]
        ax.set(yticks=range(place.size), yticklabels=names, xlim=(0, 1), ylim=(-0.7, max(place.size, 3) - 0.3))
        ax.set(xlabel="mean place in the order, 1 is last")
        return ax


def plot_pareto_k(data: InferenceData, ax: Axes | None = None) -> Axes:
    """k-hat of every sequence and its threshold; filled where `trusted`, triangles where k is not finite.

    Args:
        data: from `to_inference_data`.
        ax: where to draw.
    """
    weights = group(data, "sample_stats")["log_weight"]
    report = importance_report(weights, group(data, "sample_stats_prior")["log_weight"])
    shape, trusted = report["pareto_k"].values, report["trusted"].values
    threshold = report.attrs["threshold"]
    finite = shape[np.isfinite(shape)]
    low, high = min([0.0, *finite]) - 0.2, max([1.0, *finite]) + 0.2
    height = np.clip(shape, low + 0.05, high - 0.05)
    places = np.arange(len(shape))
    with _drawing(ax) as ax:
        for mark, chosen in (("o", np.isfinite(shape)), ("v", np.isneginf(shape)), ("^", np.isposinf(shape))):
            for kept, colour, face in ((trusted, COLOURS[0], COLOURS[0]), (~trusted, COLOURS[1], "none")):
                some = chosen & kept
                ax.scatter(places[some], height[some], s=14, marker=mark, edgecolors=colour, facecolors=face)
        ax.axhline(threshold, color=INK, linestyle="--", linewidth=1)
        at_end: Any = {"va": "bottom", "ha": "right", "fontsize": "small", "transform": ax.get_yaxis_transform()}
        ax.text(1, threshold, f"{threshold:.2f}", **at_end)
        ax.set(xlabel="sequence", ylabel="Pareto k", ylim=(low, high), xticks=_few(places))
        ax.set_title(f"{int(trusted.sum())} of {len(shape)} trusted (filled)")
        return ax


def plot_elbo_parts(data: InferenceData, ax: Axes | None = None) -> Axes:
    """ELBO, log-likelihood and minus the KL over the updates of a fit, from the group `training`.

    Args:
        data: from `to_inference_data`.
        ax: where to draw.
    """
    trace = group(data, "training")
    names = {"elbo": "ELBO", "log_likelihood": "log-likelihood", "kl": "minus KL"}
    if not set(names) & set(trace):
        raise UserError("training", f"has none of {', '.join(names)}", "log a fit of RevealTraceGraph_ELBO")
    with _drawing(ax) as ax:
        for (name, label), colour in zip(names.items(), COLOURS, strict=False):
            if name in trace:
                values = trace[name].to_series() * (-1 if name == "kl" else 1)
                smooth = values.ewm(alpha=0.05, ignore_na=True).mean()
                ax.plot(values.index, values, color=colour, alpha=0.25, linewidth=0.7)
                ax.plot(values.index, smooth, color=colour, linewidth=1.3, label=label)
        ax.set(xlabel="update", ylabel="nats per sequence")
        ax.legend()
        return ax


def plot_gradient(data: InferenceData, ax: Axes | None = None) -> Axes:
    """Standard deviation of the gradient, and the norm of its running mean, from the group `training`.

    Args:
        data: from `to_inference_data`.
        ax: where to draw.
    """
    trace = group(data, "training")
    if "grad_variance" not in trace:
        raise UserError("training", "has no grad_variance", "fit by Adam, and see `training_trace`")
    with _drawing(ax) as ax:
        known = trace["grad_variance"].dropna("update")
        mean = trace["grad_mean_norm"].sel(update=known["update"])
        ax.plot(known["update"], np.sqrt(known), color=COLOURS[1], marker=".", label="standard deviation")
        ax.plot(known["update"], mean, color=COLOURS[0], marker=".", label="norm of the mean")
        ax.set(xlabel="update", ylabel="gradient", yscale="log")
        ax.legend()
        return ax


def plot_bound_curve(curve: xr.Dataset, ax: Axes | None = None) -> Axes:
    """L_K against K with two standard errors, and the evidence where it is known.

    Args:
        curve: from `bound_curve`.
        ax: where to draw.
    """
    with _drawing(ax) as ax:
        mean, error = curve["mean_bound"], curve["mean_standard_error"].fillna(0.0)
        ax.fill_between(curve["K"], mean - 2 * error, mean + 2 * error, color=COLOURS[0], alpha=0.2, linewidth=0)
        ax.plot(curve["K"], mean, color=COLOURS[0], marker="o", markersize=3, linewidth=1.1, label="bound")
        if "evidence" in curve:
            exact = float(curve["evidence"].mean())
            ax.axhline(exact, color=INK, linestyle="--", linewidth=1, label="log evidence")
        ax.set(xlabel="orders K", ylabel="nats per sequence", xscale="log")
        ax.legend()
        return ax


def plot_ranks(calibration: xr.Dataset, function: str, ax: Axes | None = None, *, bins: int = 16) -> Axes:
    """Histogram of one test function's ranks, and where 99% of the bars of a calibrated guide lie.

    Args:
        calibration: from `calibrate`.
        function: of the test functions.
        ax: where to draw.
        bins: of the histogram.
    """
    from scipy.stats import binom

    ranks = calibration["rank"].sel(function=function).values
    edges = np.linspace(0, calibration.attrs["num_draws"] + 1, bins + 1).round()
    expected = np.diff(edges) / edges[-1]
    low, high = (binom.ppf(level, len(ranks), expected) for level in (0.005, 0.995))
    with _drawing(ax) as ax:
        ax.stairs(np.histogram(ranks, edges - 0.5)[0], edges, color=COLOURS[0], fill=True)
        ax.stairs(high, edges, baseline=low, color=INK, fill=True, alpha=0.25)
        p_value = float(calibration["p_value"].sel(function=function))
        ax.set(xlabel=f"rank of {function}", ylabel="simulations", title=f"p = {p_value:.2g}")
        return ax


def _one(data: InferenceData, name: str, sequence: int | None) -> tuple[xr.DataArray, int]:
    """A variable of one sequence, without what is given and padding."""
    stats = group(data, STATISTICS)
    if sequence is None:
        sequence = int(stats["sequence"].values[stats["mean_step"].notnull().sum("position").values.argmax()])
    if sequence not in stats["sequence"].values:
        problem = f"there is no sequence {sequence}"
        raise UserError("sequence", problem, f"use 0..{stats.sizes['sequence'] - 1}")
    there = np.flatnonzero(stats["mean_step"].sel(sequence=sequence).notnull().values)
    return stats[name].sel(sequence=sequence).isel(position=there), sequence


def _label_positions(ax: Axes, values: xr.DataArray, axis: str) -> None:
    """Tokens along an axis where there is room, else positions."""
    ax.set(**{f"{axis}label": "position to reveal"})
    if "token" not in values.coords or values.sizes["position"] > SHOWN_TOKENS:
        return
    ax.set(**{f"{axis}label": "position to reveal, by its token"})
    ax.set(**{f"{axis}ticks": range(values.sizes["position"]), f"{axis}ticklabels": values["token"].values})
    if values.sizes["position"] > SHOWN_TOKENS // 2:
        (ax.xaxis if axis == "x" else ax.yaxis).set_tick_params(labelsize="x-small")
    if axis == "x" and max(map(len, values["token"].values)) > 2:
        ax.tick_params(axis="x", rotation=90)


def _few(ticks: Any) -> list[int]:
    """At most about ten of the ticks."""
    chosen = list(ticks)
    return chosen[:: max(1, -(-len(chosen) // 10))]
