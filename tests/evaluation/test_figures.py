"""The picture of a frontier, by what is drawn."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from orderppl.errors import UserError
from orderppl.evaluation import frontier, frontier_figure
from orderppl.evaluation.figures import best_heuristic
from orderppl.figures import GREY

from measured_rows import arm, together


def many_families(count: int = 14) -> pd.DataFrame:
    """Heuristics each of which is the best one somewhere, two training seeds, and an oracle."""
    parts = [
        arm(f"h{i} {n}", family=f"h{i}", nfe=nfe, correct=0.5 + 0.03 * i + 0.01 * n, nats=4 * (2 - 0.1 * i - 0.1 * n))
        for i in range(count)
        for n, nfe in enumerate((1 + 0.5 * i, 2 + 0.5 * i))
    ]
    for seed in (0, 1):
        parts += [
            arm(f"l {n} #{seed}", family="l", nfe=n, correct=0.9, nats=2.0, training_seed=seed, setting=f"T={n}")
            for n in (2, 4)
        ]
    return together(*parts, arm("oracle", nats=0.1, kind="oracle"))


def test_at_most_eight_curves_have_names_and_the_rest_is_grey() -> None:
    figure = frontier_figure(many_families(), highlight=["h0"])
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert {"h0", "l", "best heuristic", "oracle, sees the truth"} <= labels and len(labels) == 8
    for axis in figure.axes:
        curves = {to_hex(line.get_color()) for line in axis.lines if not line.get_label().startswith("_")}
        assert GREY not in curves
        grey = [line for line in axis.lines if to_hex(line.get_color()) == GREY]
        assert len(grey) >= 2 * (14 + 1 - 6)  # a line and its points for each of the others
    plt.close(figure)


def test_curves_go_through_their_points() -> None:
    table = together(
        *(arm(f"h {n}", family="h", nfe=n, correct=np.full(4, n / 10)) for n in (1, 3, 5)),
        *(arm(f"l {n}", family="l", nfe=n, correct=0.9, training_seed=0) for n in (2, 4)),
    )
    figure = frontier_figure(table)
    (axis,) = figure.axes
    lines = {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}
    x, y = lines["h"].get_data()
    assert np.interp(4.0, x, y) == pytest.approx(0.4)
    x, y = lines["best heuristic"].get_data()
    assert np.interp([1.0, 5.0], x, y) == pytest.approx([0.1, 0.5])
    assert lines["l"].get_linewidth() > lines["h"].get_linewidth()
    assert axis.get_ylabel() == "accuracy (share of rows)"
    plt.close(figure)


def test_the_first_metric_stands_against_seconds_as_well() -> None:
    table = together(*(arm(f"h {n}", family="h", nfe=n, correct=n / 10, nats=1.0) for n in (1, 2)), arm("o", nats=1.0))
    seconds = pd.DataFrame(
        {"metric": f"seconds_batch_{size}", "arm": f"h {n}", "value": 0.02 * n / size}
        for size in (1, 32)
        for n in (1, 2)
    )
    figure = frontier_figure(table, seconds=seconds)
    assert [axis.get_xlabel().rpartition(" ")[2] for axis in figure.axes[2:]] == ["1", "32"]
    for axis, size in zip(figure.axes[2:], (1, 32), strict=True):
        (curve,) = [line for line in axis.lines if line.get_label() == "h"]
        assert (curve.get_xdata()[0], curve.get_ydata()[0]) == pytest.approx((0.02 / size, 0.1))
        assert len(axis.get_xticks())
    plt.close(figure)


def test_the_best_heuristic_is_the_frontier_of_the_means() -> None:
    table = many_families()
    arms = (
        table[table["run"] == "decoding"].groupby(["arm", "family", "kind"], as_index=False)[["nfe", "correct"]].mean()
    )
    best = best_heuristic(arms.rename(columns={"correct": "value"}), higher=True)
    edge = frontier(table, "accuracy", resamples=0)
    assert len(best) > 20
    for nfe, value, _ in best.itertuples(index=False):
        assert value == pytest.approx(edge.best(nfe)[1])  # type: ignore[index]


def test_without_heuristics_and_without_anything() -> None:
    learned = together(*(arm(f"l {n}", family="l", nfe=n, nats=1.0, training_seed=0) for n in (2, 4)))
    figure = frontier_figure(learned)
    assert [line.get_label() for line in figure.axes[0].lines if not line.get_label().startswith("_")] == ["l"]
    plt.close(figure)
    with pytest.raises(UserError, match="accuracy was not measured"):
        frontier_figure(learned, ["accuracy"])
    plt.close("all")
