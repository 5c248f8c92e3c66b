"""The pictures of docs/results, from the records that lie there: nothing is run again.

    python experiments/pictures.py                              # picture.svg of every folder
    python experiments/pictures.py --folder docs/results/chain

A folder holds `results.json`, or folders of runs that do.
"""

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from jsonargparse import auto_cli
from picture_layouts import LAYOUTS, Curves, Dots, Where

from orderppl.evaluation.figures import Panel, draw_curves
from orderppl.evaluation.results import read_results
from orderppl.figures import COLOURS, INK, SOFT, STYLE, legend, new_figure, save_figure

Record = dict[str, Any]
ROW = 0.21  # inches
BUDGET = re.compile(r" T=\d+| #\d+$")  # or seed, in the name of an arm
SHORT = {"training_seed": "seed", "vocab_size": "V", "batch_size": "batch", "target_nfe": "forwards"}
SHORT["fixed_order periodic=True steps="] = "periodic "


def records_of(folder: Path) -> list[Record]:
    """All records below a folder, with the run that they are of."""
    paths = sorted(folder.rglob("results.json"))
    return [{"run": path.parent.name} | record for path in paths for record in read_results(path.parent)["records"]]


def chosen(records: Sequence[Record], metric: str, where: Where) -> list[Record]:
    """Those of a metric whose labels have some of the values."""
    return [r for r in records if r["metric"] == metric and all(r.get(k) in v for k, v in where.items())]


def draw_dots(axis: Any, spec: Dots, records: Sequence[Record]) -> dict[str, Any]:
    """One panel; what its legend names."""
    shown = chosen(records, spec.metric, spec.where)
    varied = [name for name in spec.rows.split() if len({r.get(name) for r in shown}) > 1]
    shown.sort(key=lambda r: [value if isinstance(value := r.get(name), (int, float)) else 0 for name in varied])
    lines = [", ".join(tidy(name, record.get(name)) for name in varied) for record in shown]
    series = [tidy(spec.series, record.get(spec.series)) for record in shown]
    places, kinds = list(dict.fromkeys(lines)), sorted(set(series), key=series.index)
    handles = {}
    for number, kind in enumerate(kinds):
        own = [(r, places.index(line)) for r, line, other in zip(shown, lines, series, strict=True) if other == kind]
        heights = [place + (number - (len(kinds) - 1) / 2) * 0.7 / len(kinds) for _, place in own]
        look = {"color": [*COLOURS, INK, SOFT][number], "linewidth": 1.2}
        values, low, high = ([r.get(end, r["value"]) for r, _ in own] for end in ("value", "low", "high"))
        handles[kind] = axis.plot(values, heights, "o", markersize=4, **look)[0]
        axis.hlines(heights, low, high, **look)
    if spec.even is not None:
        axis.axvline(spec.even, color=SOFT, linewidth=0.8, linestyle="--", zorder=0)
    axis.set_xlabel(spec.label, loc="right")  # room for a long one, below the names
    axis.set(yticks=range(len(places)), yticklabels=places, ylim=(len(places) - 0.4, -0.6))
    axis.locator_params(axis="x", nbins=6)
    if spec.log:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
    axis.grid(axis="x")
    return handles if len(kinds) > 1 else {}


def tidy(label: str, value: object) -> str:
    """A value of a label as it is read; numbers with their name."""
    text = f"{label} {value:g}" if isinstance(value, (int, float)) else BUDGET.sub("", str(value or "no seed"))
    text = re.sub(r"^T0?(\d+)", r"\1 steps", text).replace("-seed", ", seed ")
    return functools.reduce(lambda found, name: found.replace(name, SHORT[name]), SHORT, text)


def curves_of(spec: Curves, records: Sequence[Record]) -> list[Panel]:
    """Arms of every metric of the panel; where arms differ in their budget alone they are a family."""
    found = []
    for metric in spec.metrics.split():
        kept = chosen(records, metric, spec.where)
        arms = pd.DataFrame([record for record in kept if "nfe" in record and record.get("kind") is not None])
        learned = arms["kind"] == "learned"
        arms["family"] = [tidy("", name) for name in arms[spec.by if spec.by in arms else "arm"]]
        if spec.against:
            other = {r["arm"]: r["value"] for r in records if r["metric"] == spec.against}
            arms = arms.assign(nfe=arms["arm"].map(other))
        if arms["family"][learned].nunique() == 1:
            arms.loc[learned, "family"] = "learned"
        seeds = arms["training_seed"].where(learned) if "training_seed" in arms else None
        found.append(Panel(metric, arms.assign(training_seed=seeds), spec.xlabel))
    return found


def height_of(spec: Curves | Dots, records: Sequence[Record]) -> float:
    """Inches."""
    if isinstance(spec, Curves):
        return 3.2 * len(spec.metrics.split()) + 0.8
    shown = chosen(records, spec.metric, spec.where)
    lines, kinds = ({tuple(r.get(name) for name in n.split()) for r in shown} for n in (spec.rows, spec.series))
    return 1.0 + len(lines) * ROW * max(1.0, 0.35 * len(kinds))


def main(folder: Path = Path("docs/results")) -> None:
    """Draw picture.svg of a folder of results, or of every folder in it.

    Args:
        folder: with a README or with records, or docs/results.
    """
    alone = any((folder / name).is_file() for name in ("README.md", "results.json"))
    for place in [folder] if alone else sorted(path for path in folder.iterdir() if path.is_dir()):
        records = records_of(place)
        measured = {record["metric"] for record in records}
        layout = LAYOUTS.get(place.name, [Curves("accuracy" if "accuracy" in measured else "path_nats")])
        heights = [height_of(spec, records) for spec in layout]
        with plt.rc_context(STYLE):
            figure = new_figure(sum(heights))
            parts = figure.subfigures(len(layout), 1, height_ratios=heights, squeeze=False)[:, 0]
            for part, spec in zip(parts, layout, strict=True):
                if isinstance(spec, Curves):
                    draw_curves(part, curves_of(spec, records))
                elif handles := draw_dots(part.subplots(), spec, records):
                    legend(part, handles)
            save_figure(figure, place / "picture.svg")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
