"""Rows of JSON lines, CSV and FASTA files and of the hub, each with its line; what cannot be read is a `UserError`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from orderppl.data.report import BadRow, Record
from orderppl.errors import UserError, first_line

LONGEST = 2**22  # bytes of a row


def read_text(path: str | Path) -> str:
    """Contents of a text file in UTF-8, with or without a byte-order mark."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | Path, error: Exception) -> UserError:
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        return UserError(str(path), "there is no such file", "give the path of a file")
    return UserError(str(path)[:200], f"cannot be read ({first_line(error)})", "give a text file in UTF-8")


def text_lines(path: str | Path) -> Iterator[tuple[int, str | BadRow]]:
    """Lines of a text file in UTF-8, white space at both ends left out."""
    try:
        with Path(path).open("rb") as file:
            line = 0
            while raw := file.readline(LONGEST + 1):
                line += 1
                is_long = len(raw) > LONGEST
                while len(raw) > LONGEST and not raw.endswith(b"\n"):
                    raw = file.readline(LONGEST + 1)
                try:
                    text = raw.decode("utf-8-sig" if line == 1 else "utf-8").strip()
                    yield line, BadRow(f"longer than {LONGEST} bytes", "", "shorten it") if is_long else text
                except UnicodeDecodeError as error:
                    yield line, BadRow("not UTF-8", error.reason, "write the file in UTF-8")
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def json_lines(path: str | Path) -> Iterator[Record]:
    """Objects of a file of JSON lines."""
    for line, text in text_lines(path):
        yield line, _json_object(text) if isinstance(text, str) else text


def _json_object(text: str) -> dict[str, Any] | BadRow:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise BadRow("a key stands twice", text)
        return dict(pairs)

    if not text:
        return BadRow("empty line", "", "remove it")
    try:
        row = json.loads(text, object_pairs_hook=unique)
    except BadRow as bad:
        return bad
    except RecursionError:
        return BadRow("nested too deeply", text)
    except ValueError as error:  # also for a number of thousands of digits
        return BadRow("not JSON", f"{first_line(error)} in {text}", "write one JSON object per line")
    return row if isinstance(row, dict) else BadRow("not an object", text, "write one JSON object per line")


def csv_rows(path: str | Path, text: str | None = None) -> Iterator[Record]:
    """Rows of a CSV file with a header line (tabs in a `.tsv`); `text` is its contents where these are read already."""
    text = read_text(path) if text is None else text
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if str(path).lower().endswith(".tsv") else ",")
    try:
        header = [name.strip() for name in next(reader, [])]
        twice = [name for index, name in enumerate(header) if name and name in header[:index]]
        if not any(header) or twice:
            problem = f"the column {twice[0]!r} stands twice" if twice else "the file is empty"
            raise UserError(str(path), problem, "give CSV with a header line")
        line = reader.line_num + 1  # a quoted value may span lines: a row is named by its first
        for row in reader:
            if any(cell.strip() for cell in row[len(header) :]):
                yield line, BadRow(f"more than {len(header)} cells", ",".join(row), "put quotes around commas")
            elif row:
                yield line, dict.fromkeys(header, "") | dict(zip(header, row, strict=False))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}", str(error), "write the file as plain CSV") from error


def fasta_entries(text: str) -> Iterator[Record]:
    """Entries `name`, `sequence` of a FASTA file with the line of their headers."""
    line, name, parts = 1, "", list[str]()
    for number, raw in enumerate([*text.split("\n"), ">"], 1):
        if raw.startswith(">"):
            if name or any(parts):
                yield line, {"name": name, "sequence": "".join(parts)}
            words = raw[1:].split()
            line, name, parts = number, words[0] if words else f"entry at line {number}", []
        elif not raw.startswith(";"):  # an old form of comment
            parts.append("".join(raw.split()))


def hub_data(name: str, subset: str | None, split: str | None, revision: str | None = None) -> Any:
    """A split of a data set that `datasets` can load, or all of them by their name."""
    import datasets  # slow to import

    try:
        return datasets.load_dataset(name, subset, split=split, revision=revision)
    except Exception as error:  # the hub client raises many unrelated types; all mean that the name cannot be read
        problem = f"{name!r} is no local path and cannot be loaded from the hub ({first_line(error)})"
        raise UserError("data", problem, "give a local file or folder, or a name on the hub") from error


def text_of(record: Mapping[str, Any], key: str) -> str:
    """A text, or a number as text, of a row; raises `BadRow` where there is none."""
    value = record.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        remedy = f"its fields are {', '.join(map(str, record))}"
        raise BadRow(f"no text in {key!r}", json.dumps(dict(record), default=str), remedy)
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise BadRow(f"half a character in {key!r}", ascii(value))
    return value


def cell_of(record: Mapping[str, Any], column: str) -> str:
    """A cell of a CSV file, without white space around it; refuses a column that is not there."""
    if column not in record:
        raise UserError("column", f"no column {column!r}", f"its columns are {', '.join(record)}")
    return str(record[column]).strip()
