"""Records of a result: `results.json`, where they were measured, and the table that shows them."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
import pyro
import torch
from rich.table import Table

from orderppl.errors import UserError
from orderppl.files import write_text

Record: TypeAlias = Mapping[str, object]
"""A flat object: `metric`, `value`, and the labels that identify it (`task`, `arm`, `steps`, `seed`, `n`, ...)."""
Records: TypeAlias = "Iterable[Record] | pd.DataFrame"
FILE = "results.json"


def environment(device: str | torch.device = "cpu", dtype: str | torch.dtype = "float32") -> dict[str, object]:
    """Where a number was measured: versions, device, dtype, cores and threads."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    from orderppl import __version__

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "orderppl": __version__,
        "platform": platform.platform(),
        "device": str(device),
        "device_name": name,
        "dtype": str(dtype).removeprefix("torch."),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def write_results(
    out: str | Path, experiment: str, config: Mapping[str, Any], records: Records, *, seconds: float | None = None
) -> Path:
    """Write `out/results.json`.

    Args:
        out: the run folder.
        experiment: name of the experiment.
        config: its settings as JSON values; a `device` and a `dtype` in them describe the environment.
        records: see `Record`; a data frame such as that of `summary`, whose empty cells are left out, or several of
            them one after another. A value is a finite number; labels are text, numbers, booleans or None.
        seconds: wall-clock time of the run.

    Raises:
        UserError: a record is not such an object; nothing is written.
    """
    document = {
        "experiment": experiment,
        "config": dict(config),
        "environment": environment(config.get("device") or "cpu", config.get("dtype") or "float32"),
        **({} if seconds is None else {"seconds": round(seconds, 3)}),
    }
    compact: Any = {"allow_nan": False, "separators": (",", ":")}
    lines = [json.dumps(_checked(index, record), **compact) for index, record in enumerate(plain_records(records))]
    head = json.dumps(document, indent=1, allow_nan=False).removesuffix("\n}")
    path = Path(out) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, head + ',\n "records": [\n' + ",\n".join(lines) + "\n]}\n")  # a line per record
    return path


def read_results(out: str | Path) -> dict[str, Any]:
    """Read `out/results.json` back.

    Args:
        out: the run folder.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    path = Path(out) / FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(document, dict) and isinstance(document.get("records"), list):
            return document
        problem = "holds no records"
    except FileNotFoundError:
        problem = "no such file"
    except (OSError, ValueError, RecursionError) as error:
        problem = f"cannot be read ({type(error).__name__})"
    raise UserError(str(path), problem, "run the experiment first, or again")


def plain_records(records: Records) -> list[dict[str, object]]:
    """Records as dicts of Python values; empty cells of a data frame are left out."""
    if isinstance(records, pd.DataFrame):
        rows = [dict(zip(records.columns, line, strict=True)) for line in records.itertuples(index=False, name=None)]
        records = [{name: item for name, item in row.items() if not pd.isna(item)} for row in rows]
    return [{str(key): _number(item) for key, item in record.items()} for record in records]


def results_table(
    records: Records,
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
    lines: dict[tuple[str, ...], dict[str, list[dict[str, object]]]] = {}
    heads: dict[str, None] = {}
    for record in plain_records(records):
        head = " ".join(_text(record.get(name, "")) for name in columns)
        heads[head] = None
        line = lines.setdefault(tuple(_text(record.get(name, "")) for name in rows), {})
        line.setdefault(head, []).append(record)
    table = Table(title=title, title_justify="left")
    for name in rows:
        table.add_column(name, overflow="fold")
    for head in heads:
        table.add_column(head.strip(), justify="right", overflow="fold")
    for names, cells in lines.items():
        table.add_row(*names, *(_cell(cells.get(head, []), digits) for head in heads))
    return table


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(records: Sequence[Record], digits: int) -> str:
    values = [float(str(record["value"])) for record in records]
    if not values:
        return ""
    mean = sum(values) / len(values)
    if len(values) > 1:
        return f"{mean:.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f}, {len(values)})"
    low, high = records[0].get("low"), records[0].get("high")
    if isinstance(low, (int, float)) and isinstance(high, (int, float)):
        return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{mean:.{digits}f}"


def _checked(index: int, record: dict[str, object]) -> dict[str, object]:
    """The record, or a UserError."""
    where = f"records[{index}]"
    if not isinstance(record.get("metric"), str):
        problem = f"must be the metric's name, got {record.get('metric')!r}"
        raise UserError(f"{where}.metric", problem, "name the metric")
    value = record.get("value")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        problem = f"{record['metric']} must be a finite number, got {value!r}"
        raise UserError(f"{where}.value", problem, "look for a loss that became NaN")
    for key, item in record.items():
        if not (item is None or isinstance(item, (str, bool, int, float))):
            problem = f"a label must be flat, got {type(item).__name__}"
            raise UserError(f"{where}.{key}", problem, "split it into several labels")
        if isinstance(item, float) and not math.isfinite(item):
            raise UserError(f"{where}.{key}", f"must be finite, got {item!r}", "leave the label out instead")
    return record


def _number(value: object) -> object:
    """A Python number from a 0-dimensional tensor or a numpy scalar; anything else as it is."""
    return value.item() if hasattr(value, "item") and not isinstance(value, (str, bytes)) else value
