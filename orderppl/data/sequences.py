"""Protein sequences from FASTA or CSV files, split by a hash of the sequence."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from datasets import Dataset, DatasetDict, Features, Value

from orderppl.data.report import LoadReport, hash_fraction
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


def _pick_column(path: Path, header: list[str], rows: list[list[str]], column: str | None, alphabet: str) -> int:
    """Index of the sequence column: the named one, else `heavy`, else the first one that looks like sequences."""
    known = f"its columns are {', '.join(header)}"
    if column is not None:
        if column not in header:
            raise UserError("column", f"{path} has no column {column!r}", known)
        return header.index(column)
    if "heavy" in header:
        return header.index("heavy")
    letters = set(alphabet)
    for index in range(len(header)):
        values = [row[index].strip().upper() for row in rows[:20] if index < len(row) and row[index].strip()]
        if values and all(len(value) >= 10 and set(value) <= letters for value in values):
            return index
    raise UserError("column", f"no column of {path} looks like sequences", f"name one; {known}")


def _table(path: Path, text: str, column: str | None, alphabet: str) -> Iterator[Entry]:
    """Entries of a CSV (or .tsv) file with their lines."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    try:
        header = [name.strip() for name in next(reader, [])]
        numbered: list[tuple[int, list[str]]] = []
        line = reader.line_num + 1  # a quoted value may span lines: a row is named by its first
        for row in reader:
            numbered.append((line, row))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}", str(error), "write the file as plain CSV") from error
    if not header:
        raise UserError(str(path), "the file is empty", "give FASTA, or CSV with a header line")
    index = _pick_column(path, header, [row for _, row in numbered], column, alphabet)
    name_index = header.index("name") if "name" in header else None
    for line, row in numbered:
        name = row[name_index] if name_index is not None and name_index < len(row) else f"line {line}"
        yield line, name, row[index] if index < len(row) else ""


def read_sequences(
    path: str | Path,
    report: LoadReport,
    *,
    column: str | None = None,
    alphabet: str = AMINO_ACIDS,
    max_length: int | None = None,
    on_bad: Literal["error", "report"] = "error",
) -> Dataset:
    """Read one FASTA or CSV file; letters are raised to upper case, white space around a sequence is dropped.

    Args:
        path: a file that starts with `>` is FASTA, any other is CSV (tabs in a `.tsv`) with a header line.
        report: receives the counts.
        column: CSV column of the sequences; None: `heavy`, else the first column that holds only sequences.
        alphabet: letters that may occur.
        max_length: longest sequence; None: any.
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
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(str(path), "there is no such file", "give a FASTA or CSV file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(path), f"cannot be read ({error})", "give a FASTA or CSV file in UTF-8") from error
    entries = _fasta(text) if text.lstrip().startswith(">") else _table(path, text, column, alphabet)
    letters = set(alphabet)
    rows: list[dict[str, str | int]] = []
    for line, name, raw in entries:
        report.read[path.name] += 1
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
    seed: int = 0,
    max_length: int | None = None,
    on_bad: Literal["error", "report"] = "error",
) -> tuple[DatasetDict, LoadReport]:
    """Read training and held-out sequences; splits `train` and `test` share none.

    Args:
        train: FASTA or CSV file.
        test: held-out file; None: a share of `train`, drawn by a hash of the sequence (equal ones fall together).
        column: see `read_sequences`.
        alphabet: see `read_sequences`.
        held_out: share drawn from `train` when `test` is not given.
        seed: of the hash.
        max_length: see `read_sequences`.
        on_bad: see `read_sequences`.

    Returns:
        The splits with columns `name`, `sequence`, `line`, and the report. Training rows whose sequence is also in a
        test file are left out and counted.

    Raises:
        UserError: as `read_sequences`; or `held_out` is not in (0, 1), or a split is empty.
    """
    report = LoadReport(str(train) if test is None else f"{train}, {test}")
    rows = read_sequences(train, report, column=column, alphabet=alphabet, max_length=max_length, on_bad=on_bad)
    if test is None:
        if not 0 < held_out < 1:
            raise UserError("held_out", f"{held_out} is not in (0, 1)", "give a share such as 0.2, or a test file")
        out = [hash_fraction(sequence, seed) < held_out for sequence in rows["sequence"]]
        held = rows.select([i for i, o in enumerate(out) if o])
        kept = rows.select([i for i, o in enumerate(out) if not o])
    else:
        held = read_sequences(test, report, column=column, alphabet=alphabet, max_length=max_length, on_bad=on_bad)
        shared = set(held["sequence"])
        for name, sequence, line in zip(rows["name"], rows["sequence"], rows["line"], strict=True):
            if sequence in shared:
                report.reject(Path(train).name, line, "sequence is also in the test file", name)
        kept = rows.select([i for i, sequence in enumerate(rows["sequence"]) if sequence not in shared])
    splits = DatasetDict({"train": kept, "test": held})
    for name, split in splits.items():
        if not len(split):
            remedy = "give more sequences, or another held_out or seed" if test is None else "give other files"
            raise UserError(name, f"the {name} split of {report.source} is empty", remedy)
        report.kept[name] = len(split)
    return splits, report
