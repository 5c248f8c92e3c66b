"""The one writer of `results.json` and of an experiment's figures, and the table that shows the records."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import torch
from rich.table import Table

from orderppl.errors import UserError
from orderppl.experiments.config import config_dict
from orderppl.inference.checkpoints import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = Mapping[str, object]
"""A flat object: `metric`, `value`, and the labels that identify it (`task`, `arm`, `steps`, `seed`, `n`, ...)."""


def real(record: Record, key: str = "value") -> float:
    """A number of a record."""
    value = record[key]
    assert isinstance(value, (int, float))
    return float(value)


def environment(device: str | torch.device = "cpu", dtype: str | torch.dtype = "float32") -> dict[str, object]:
    """Where a number was measured: versions, device, dtype, cores and threads."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    try:
        package = version("orderppl")
    except PackageNotFoundError:  # run from a source tree that was never installed
        package = "source"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "orderppl": package,
        "platform": platform.platform(),
        "device": str(device),
        "device_name": name,
        "dtype": str(dtype).removeprefix("torch."),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def write_results(out: str | Path, experiment: str, config: object, records: Iterable[Record], seconds: float) -> Path:
    """Write `out/results.json`.

    Args:
        out: the run folder.
        experiment: name of the experiment.
        config: its resolved config; a `device` and a `dtype` in it describe the environment.
        records: see `Record`. A value is a finite number; labels are text, numbers, booleans or None.
        seconds: wall-clock time of the run.

    Raises:
        UserError: a record is not such an object; nothing is written.
    """
    settings = config_dict(config)
    document = {
        "experiment": experiment,
        "config": settings,
        "environment": environment(settings.get("device", "cpu"), settings.get("dtype", "float32")),
        "seconds": round(seconds, 3),
        "records": [_checked(index, record) for index, record in enumerate(records)],
    }
    path = Path(out) / "results.json"
    write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")
    return path


def read_results(out: str | Path) -> dict[str, Any]:
    """Read `out/results.json` back."""
    path = Path(out) / "results.json"
    if not path.is_file():
        raise UserError(str(path), "no such file", "run the experiment first")
    document = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(document, dict)
    return document


def _checked(index: int, record: Record) -> dict[str, object]:
    """The record with plain Python numbers, or a UserError."""
    plain = {key: _number(item) for key, item in record.items()}
    where = f"records[{index}]"
    if not isinstance(plain.get("metric"), str):
        raise UserError(f"{where}.metric", f"must be the metric's name, got {plain.get('metric')!r}", "name the metric")
    value = plain.get("value")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        problem = f"{plain['metric']} must be a finite number, got {value!r}"
        raise UserError(f"{where}.value", problem, "look for a loss that became NaN")
    for key, item in plain.items():
        if not (item is None or isinstance(item, (str, bool, int, float))):
            problem = f"a label must be flat, got {type(item).__name__}"
            raise UserError(f"{where}.{key}", problem, "split it into several labels")
        if isinstance(item, float) and not math.isfinite(item):
            raise UserError(f"{where}.{key}", f"must be finite, got {item!r}", "leave the label out instead")
    return plain


def _number(value: object) -> object:
    """A Python number from a 0-dimensional tensor or a numpy scalar; anything else as it is."""
    return value.item() if hasattr(value, "item") and not isinstance(value, (str, bytes)) else value


def save_figure(figure: Figure, path: Path) -> None:
    """Write a matplotlib figure as PNG so that a reader sees the whole file or none, and close it."""
    import matplotlib.pyplot as plt

    temporary = path.with_name(path.stem + ".tmp.png")
    figure.savefig(temporary, dpi=150)
    plt.close(figure)
    temporary.replace(path)


def results_table(
    records: Iterable[Record],
    rows: Sequence[str] = ("arm",),
    columns: Sequence[str] = ("metric",),
    title: str | None = None,
    digits: int = 3,
) -> Table:
    """Pivot records into a table: one line per combination of `rows` labels, one column per combination of `columns`.

    Args:
        records: see `Record`; `low` and `high` are shown as an interval, several values of a cell as mean and spread.
        rows: labels that name a line.
        columns: labels that name a column of values.
        title: shown above the table.
        digits: decimals of a value.
    """
    heads, lines = pivot(records, rows, columns, digits)
    table = Table(title=title, title_justify="left")
    for index, head in enumerate(heads):
        table.add_column(head, justify="left" if index < len(rows) else "right")
    for line in lines:
        table.add_row(*line)
    return table


def pivot(
    records: Iterable[Record], rows: Sequence[str] = ("arm",), columns: Sequence[str] = ("metric",), digits: int = 3
) -> tuple[list[str], list[list[str]]]:
    """Heads and lines of the table that `results_table` shows; arguments as there."""
    cells: dict[tuple[str, ...], dict[tuple[str, ...], list[Record]]] = {}
    heads: dict[tuple[str, ...], None] = {}
    for record in records:
        line = tuple(str(record.get(name, "")) for name in rows)
        head = tuple(str(record.get(name, "")) for name in columns)
        heads[head] = None
        cells.setdefault(line, {}).setdefault(head, []).append(record)
    names = [*rows, *(" ".join(part for part in head if part) for head in heads)]
    lines = [[*line, *(_cell(values.get(head, []), digits) for head in heads)] for line, values in cells.items()]
    return names, lines


def _cell(records: Sequence[Record], digits: int) -> str:
    values = [float(str(_number(record["value"]))) for record in records]
    if not values:
        return ""
    mean = sum(values) / len(values)
    if len(values) > 1:
        return f"{mean:.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f}, {len(values)})"
    low, high = records[0].get("low"), records[0].get("high")
    if isinstance(low, (int, float)) and isinstance(high, (int, float)):
        return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{mean:.{digits}f}"
