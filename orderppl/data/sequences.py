"""Protein sequences from FASTA or CSV files, split by a hash of the sequence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from datasets import Dataset, DatasetDict, Features, Value

from orderppl.data.report import LoadReport
from orderppl.data.splits import split_rows
from orderppl.data.tables import CsvTable, parse_csv, read_text
from orderppl.errors import UserError

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
FEATURES = Features({"name": Value("string"), "sequence": Value("string"), "line": Value("int64")})

Entry = tuple[int, str, str]  # line, name, sequence


def _fasta(text: str) -> Iterator[Entry]:
    """Entries of a FASTA file with the line of their headers."""
    line, name, parts = 1, "", list[str]()
    for number, raw in enumerate(text.splitlines(), 1):
        if raw.startswith(">"):
            if name or parts:
                yield line, name, "".join(parts)
            words = raw[1:].split()
            line, name, parts = number, words[0] if words else f"entry at line {number}", []
        elif not raw.startswith(";"):  # an old form of comment
            parts.append("".join(raw.split()))
    if name or any(parts):
        yield line, name, "".join(parts)


def _pick_column(table: CsvTable, column: str | None, alphabet: str) -> int:
    """Index of the sequence column: the named one, else `heavy`, else the first one that looks like sequences."""
    if column is not None or "heavy" in table.header:
        return table.column(column or "heavy")
    letters = set(alphabet)
    for index in range(len(table.header)):
        cells = [row[index].strip().upper() for _, row in table.rows[:20] if index < len(row) and row[index].strip()]
        if cells and all(len(cell) >= 10 and set(cell) <= letters for cell in cells):
            return index
    known = f"name one; its columns are {', '.join(table.header)}"
    raise UserError("column", f"no column of {table.path} looks like sequences", known)


def _table(table: CsvTable, column: str | None, alphabet: str) -> Iterator[Entry]:
    """Entries of a CSV file with their lines."""
    index = _pick_column(table, column, alphabet)
    name_index = table.header.index("name") if "name" in table.header else None
    for line, row in table.rows:
        name = row[name_index] if name_index is not None and name_index < len(row) else f"line {line}"
        yield line, name, row[index] if index < len(row) else ""


def read_sequences(
    path: str | Path,
    report: LoadReport,
    *,
    column: str | None = None,
    alphabet: str = AMINO_ACIDS,
    max_length: int | None = None,
    names: str | None = None,
    on_bad: Literal["error", "report"] = "error",
) -> Dataset:
    """Read one FASTA or CSV file; letters are raised to upper case, white space around a sequence is dropped.

    Args:
        path: a file that starts with `>` is FASTA, any other is CSV (tabs in a `.tsv`) with a header line.
        report: receives the counts.
        column: CSV column of the sequences; None: `heavy`, else the first column that holds only sequences.
        alphabet: letters that may occur.
        max_length: longest sequence; None: any.
        names: regular expression that is searched for in the name of a row; others are left out and counted.
        on_bad: a bad row stops the run with its line ("error"), or is left out and counted ("report").

    Returns:
        Columns `name`, `sequence`, `line`.

    Raises:
        UserError: the file or column is missing, a row is bad (on_bad="error"), or no row is left.
    """
    path = Path(path)
    if on_bad not in ("error", "report"):
        raise UserError("on_bad", f"{on_bad!r} is unknown", "use 'error' or 'report'")
    try:
        wanted = re.compile(names or "")
    except re.error as error:
        raise UserError("names", f"{names!r} is no regular expression ({error})", "give one such as 'umab$'") from error
    text = read_text(path, "FASTA or CSV")
    is_fasta = text.lstrip().startswith(">")
    entries = _fasta(text) if is_fasta else _table(parse_csv(path, text), column, alphabet)
    letters = set(alphabet)
    rows: list[dict[str, str | int]] = []
    for line, name, raw in entries:
        report.read[path.name] += 1
        if not wanted.search(name):
            report.reject(path.name, line, "name not asked for", name)
            continue
        sequence = raw.strip().upper()
        foreign = sorted(set(sequence) - letters)
        if not sequence:
            reason, detail, remedy = "empty sequence", name, "fill or remove the row"
        elif foreign:
            reason, detail = "letters outside the alphabet", f"{name}: {' '.join(foreign)}"
            remedy = f"only {alphabet} may occur: correct or remove the row, or ask for a report instead"
        elif max_length is not None and len(sequence) > max_length:
            reason, detail = "longer than the canvas", f"{name}: {len(sequence)} letters, limit {max_length}"
            remedy = "raise max_length or remove the row"
        else:
            rows.append({"name": name, "sequence": sequence, "line": line})
            continue
        if on_bad == "error":
            raise UserError(f"{path}:{line}", f"{reason} ({detail})", remedy)
        report.reject(path.name, line, reason, detail)
    if not rows:
        raise UserError(str(path), "no sequence is left", "give a file with at least one usable sequence")
    return Dataset.from_list(rows, features=FEATURES)


def load_sequences(
    train: str | Path,
    test: str | Path | None = None,
    *,
    column: str | None = None,
    alphabet: str = AMINO_ACIDS,
    held_out: float = 0.2,
    validation: float = 0.0,
    seed: int = 0,
    max_length: int | None = None,
    names: str | None = None,
    on_bad: Literal["error", "report"] = "error",
) -> tuple[DatasetDict, LoadReport]:
    """Read training and held-out sequences; no two splits share one.

    Args:
        train: FASTA or CSV file.
        test: held-out file; None: a share of `train`, drawn by a hash of the sequence (equal ones fall together).
        column: see `read_sequences`.
        alphabet: see `read_sequences`.
        held_out: see `split_rows`.
        validation: see `split_rows`.
        seed: of the hash.
        max_length: see `read_sequences`.
        names: see `read_sequences`.
        on_bad: see `read_sequences`.

    Returns:
        The splits with columns `name`, `sequence`, `line`, and the report. Training rows whose sequence is also in a
        test file are left out and counted.

    Raises:
        UserError: as `read_sequences` and `split_rows`.
    """
    report = LoadReport(str(train) if test is None else f"{train}, {test}")
    rows, held = (
        None
        if path is None
        else read_sequences(
            path, report, column=column, alphabet=alphabet, max_length=max_length, names=names, on_bad=on_bad
        )
        for path in (train, test)
    )
    assert rows is not None
    splits = split_rows(
        rows,
        held,
        "sequence",
        report,
        held_out=held_out,
        validation=validation,
        seed=seed,
        file=Path(train).name,
    )
    return splits, report
