"""The tables of docs/results, from the records that lie there: `results.json` of a folder, or of runs in it.

`python experiments/tables.py FOLDER` prints them; with `--write true` they stand between two comments of its README.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import auto_cli
from rich import box
from rich.console import Console

from orderppl.evaluation.results import read_results, results_table

BEGIN, END = "<!-- tables -->\n", "<!-- end -->\n"
# what is compared where
PLACES = ("task", "written", "domains", "chain", "grid", "measured", "steps", "n", "training_seed", "target_nfe")
Record = dict[str, Any]


class Layout(NamedTuple):
    """A table of the records of some metrics whose labels have some of the values (None: no such label)."""

    title: str
    metrics: str
    rows: str
    columns: str = "metric"
    where: Mapping[str, Sequence[object]] = {}


PAIRED = "learned opponent advantage worst best", " ".join(("arm", *PLACES, "of"))
COMPARED = Layout("Learned against the best opponent (`of`)", *PAIRED)
ARMS = {"arm": ("learned", "learned, drawn", "best fixed order", "random", "top_prob", "entropy", "left_to_right")}
GAPS = [
    Layout("Expected gap to the log evidence, nats", "expected_gap_nats", "length steps", "arm"),
    Layout("Gap to the log evidence on test rows, nats", "gap_nats", "length steps", "arm", ARMS),
]
BY_ARM = Layout("Gap to the log evidence, nats", "gap_nats expected_gap_nats", "arm")
NATS = Layout("Nats per token", "path_nats", "arm nfe")
BASELINES = {"baseline": (*(f"random uniform T={t}" for t in (2, 4, 8)), "threshold at equal NFE")}
SPREAD = {"family": ("learned", "long search", "periodic", "random uniform", "top_prob uniform", "entropy uniform")}
MODES = {"axis": ("steps",), "mode": ("stacked", "sequential", "policy")}
UPDATES = Layout("Time of an update, library / by hand", "time_ratio", "measured denoiser mode", "steps", MODES)
PLAYED = {"policy": ("random", "top_prob", "entropy", "threshold")}
DECODING = Layout("Time of decoding / ...", "time_ratio", "denoiser vocab_size batch_size policy prompt", "of", PLAYED)
COST = "accuracy nfe nfe_stopped seconds_batch_1 seconds_batch_32"
AGAINST = "advantage", "steps arm", "forwards of", {"measured": ("accuracy",), "forwards": ("equal", "T")}
SHARES = "cpu_used_share used_share part_share saved_megabytes gradient_megabytes"
ORDERS = {"family": ("learned", "periodic", "spaced", "random uniform", "top_prob uniform", "left_to_right uniform")}
CLUES = [
    COMPARED,
    Layout("Forwards by the number of clues", "forwards", "difficulty", "arm"),
    Layout("Share solved by the number of clues", "solved", "difficulty", "arm"),
]
LAYOUTS: dict[str, list[Layout]] = {
    "english": [
        COMPARED,
        NATS._replace(rows="written family", columns="steps", where=ORDERS),
        Layout("Share of neighbours that are revealed in the same step", "neighbours_together", "written arm", "steps"),
        Layout("Mean step of a kind of token, from 0", "mean_step", "written kind", "steps"),
    ],
    "loops": [
        COMPARED,
        NATS._replace(title="Nats per residue", rows="chain family", columns="steps", where=ORDERS),
        Layout("Written freely: nats of an independent model", "judge_nats", "steps arm"),
        Layout("Edits per residue, to the nearest natural loop and apart", "natural_edits edits_apart", "arm region"),
    ],
    "receptors": [COMPARED, NATS._replace(title="Nats per residue", rows="family", columns="steps", where=ORDERS)],
    "lists": [
        COMPARED,
        Layout("Forwards of each difficulty", "forwards", "difficulty", "arm"),
        Layout("Solved, and the most that any rule can solve", "solved limit", "difficulty", "arm"),
    ],
    "frontier-programs-wide": [COMPARED, Layout("Costs, seconds per row", COST, "arm", where={"n": (200, 32)})],
    **dict.fromkeys(("chain", "tree"), GAPS),
    **dict.fromkeys(("sudoku", "sudoku-unique"), CLUES),
    "phones": [
        Layout("Better than the best opponent by, and distance to a search", "advantage regret", "steps training_seed"),
        NATS._replace(title="Nats per phone", rows="family", columns="steps", where=SPREAD),
    ],
    "posterior": [BY_ARM],
    "quickstart": [BY_ARM, NATS._replace(title="Antibodies, nats per residue", rows="arm")],
    "gsm8k": [Layout("Less the baseline", "path_nats_difference", "form arm nfe baseline", where=BASELINES)],
    "paper": [
        Layout("Negative bound on held-out problems, nats per problem", "bound_nats", "steps arm", "training_seed"),
        Layout("Bound above that of the policy alone", "advantage", "steps arm", where={"measured": ("bound",)}),
        Layout("Policies without their guides", "accuracy path_nats marginal_nats nfe", "steps family"),
        Layout("More accurate than the heuristics by, with as many forwards and with T", *AGAINST),
    ],
    "benchmark-speed": [UPDATES],
    "benchmark-speed-smdm": [Layout("An update", f"{SHARES} peak_megabytes", "metric part variant", "mode")],
    "benchmark-decode": [DECODING],
    "gpu": [UPDATES, DECODING],
    "benchmark-estimators": [
        Layout("Standard deviation of a gradient", "gradient_sd", "task state", "estimator"),
        Layout("The same over that of the default", "relative_sd", "task state", "estimator"),
        Layout("Learned after so many denoiser rows, nats per token", "path_nats", "task rows", "estimator"),
        Layout("Share of another's rows that the default needs", "rows_ratio", "task", "estimator"),
        Layout("Largest |z| of the mean gradient against the exact one", "bias_z", "task", "estimator"),
    ],
}


def compared(records: Sequence[Record]) -> Iterator[Record]:
    """What every advantage is the difference of, as records of one metric each."""
    nats = [record for record in records if record["metric"] == "path_nats"]
    for record in records:
        if record["metric"] != "advantage" or ("own" in record and "target_nfe" not in record):
            continue
        labels = {name: record[name] for name in ("arm", *PLACES, "of") if name in record}
        yield {**labels, **{name: record[name] for name in ("metric", "value", "low", "high")}}
        names = {"learned": "own", "opponent": "frontier", "worst": "seed_low", "best": "seed_high"}
        found = {metric: record[name] for metric, name in names.items() if name in record}
        if "own" not in record:
            same = [{name: r.get(name, record[name]) for name in PLACES if name in record} for r in nats]
            here = [r for r, place in zip(nats, same, strict=True) if place.items() <= record.items()]
            own, other = (next(r["value"] for r in here if r["arm"] == record[name]) for name in ("arm", "of"))
            found |= {"learned": own, "opponent": other}
        yield from ({**labels, "metric": metric, "value": value} for metric, value in found.items())


def markdown(layout: Layout, records: Sequence[Record]) -> str:
    """One table, without labels that tell nothing apart; nothing without records."""
    metrics = layout.metrics.split()
    shown = sorted((r for r in records if r["metric"] in metrics), key=lambda r: metrics.index(r["metric"]))
    shown = [r for r in shown if all(r.get(name) in values for name, values in layout.where.items())]
    if not shown:
        return ""
    rows = [name for name in layout.rows.split() if len({record.get(name) for record in shown}) > 1]
    table = results_table(shown, rows=rows or layout.rows.split()[:1], columns=layout.columns.split())
    table.box = box.MARKDOWN
    Console(file=(text := io.StringIO()), width=400).print(table)
    lines = [" ".join(line.split()) for line in text.getvalue().splitlines() if line.strip()]
    return "\n".join([f"{layout.title}:", "", *lines, ""])


def tables(folder: Path) -> str:
    """The tables of a folder as Markdown."""
    records = [r for path in sorted(folder.rglob("results.json")) for r in read_results(path.parent)["records"]]
    layouts = LAYOUTS.get(folder.resolve().name, [COMPARED])
    found = (markdown(layout, list(compared(records)) if layout is COMPARED else records) for layout in layouts)
    return "\n".join(filter(None, found))


def main(folder: Path, write: bool = False) -> None:
    """Print the tables of a folder of docs/results; `write`: into its README."""
    print(text := tables(folder))
    if write:
        before, begin, rest = (folder / "README.md").read_text("utf-8").partition(BEGIN)
        (folder / "README.md").write_text(f"{before}{begin}\n{text}\n{END}{rest.partition(END)[2]}", "utf-8")


if __name__ == "__main__":
    auto_cli(main)
