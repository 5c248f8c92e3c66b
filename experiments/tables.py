"""The tables of docs/results, from the records that lie there: `results.json` of a folder, or of runs in it.

`python experiments/tables.py FOLDER` prints them; with `--write true` they stand between two comments of its README.
"""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from rich import box
from rich.console import Console
from table_layouts import COMPARED, LAYOUTS, PLACES, Layout

from orderppl.evaluation.results import read_results, results_table

BEGIN, END = "<!-- tables -->\n", "<!-- end -->\n"
Record = dict[str, Any]


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
