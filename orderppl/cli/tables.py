"""Tables of a command: on the terminal in 80 columns, in a folder as CSV and results.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from orderppl.evaluation.results import write_results
from orderppl.files import appearing

HEADS = {"measured": "metric", "frontier": "best", "accuracy_stopped": "acc. stop", "nfe_stopped": "nfe stop"}
HEADS |= {f"seconds_batch_{size}": f"s, batch {size}" for size in (1, 32)}  # columns with shorter heads
Rows = Any
"""A data frame, or a mapping per line."""


def show(rows: Rows, columns: Sequence[str] | None = None, title: str | None = None, limit: int = 60) -> None:
    """Print a table; numbers with three or four digits.

    Args:
        rows: one per line.
        columns: which, in this order; all when left out.
        title: above the table.
        limit: how many lines are shown; the files have the others.
    """
    frame = pd.DataFrame(rows)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns or frame.columns:
        is_number = pd.api.types.is_numeric_dtype(frame[name])
        table.add_column(HEADS.get(name, name), justify="right" if is_number else "left", overflow="fold")
    for values in frame[list(columns or frame.columns)].head(limit).itertuples(index=False):
        table.add_row(*(_cell(value) for value in values))
    console = Console(markup=False)
    console.print(table)
    if len(frame) > limit:
        console.print(f"and {len(frame) - limit} more")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.3f}" if 1e-3 <= abs(value) < 1000 else f"{value:.3g}"
    return str(value)


def write_table(folder: Path, name: str, rows: Rows, config: Mapping[str, Any] | None = None) -> Path:
    """Write `folder/results.json` with the rows as records, each with `metric` and `value`.

    Args:
        folder: made when there is none.
        name: what was measured.
        rows: the records.
        config: how; plain values.
    """
    return write_results(folder, name, dict(config or {}), rows if isinstance(rows, pd.DataFrame) else list(rows))


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Write a table as CSV, which appears complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with appearing(path) as temporary:
        frame.to_csv(temporary, index=False)
