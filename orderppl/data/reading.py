"""Rows of JSON lines, CSV and FASTA files and of the hub, each with its line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from orderppl.data.report import BadRowError
from orderppl.errors import UserError, first_line

Record = tuple[int, "dict[str, Any] | BadRowError"]
"""Line (from 1), and what stands there or why it cannot be read."""
LONGEST = 2**22  # bytes of a row


def check_file(path: str | Path, kind: str) -> Path:
    """The path of an existing file.

    Args:
        path: as the user gave it.
        kind: what it should be, for the message: "FASTA or CSV".

    Raises:
        UserError: there is no such file.
    """
    try:
        if Path(path).is_file():
            return Path(path)
    except (OSError, ValueError) as error:  # no name of a file at all
        raise UserError(str(path)[:80], f"cannot be read ({first_line(error)})", f"give a {kind} file") from error
    raise UserError(str(path), "there is no such file", f"give a {kind} file")


def read_text(path: str | Path, kind: str) -> str:
    """Contents of a text file in UTF-8, with or without a byte-order mark.

    Raises:
        UserError: it is missing or not readable.
    """
    try:
        return check_file(path, kind).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(path), f"cannot be read ({error})", f"give a {kind} file in UTF-8") from error


def text_lines(path: str | Path, kind: str) -> Iterator[tuple[int, str | BadRowError]]:
    """Lines of a text file in UTF-8, white space at both ends left out."""
    try:
        with check_file(path, kind).open("rb") as file:
            line = 0
            while raw := file.readline(LONGEST + 1):
                line += 1
                if len(raw) > LONGEST:
                    while raw and not raw.endswith(b"\n"):
                        raw = file.readline(LONGEST)
                    yield line, BadRowError(f"row is longer than {LONGEST} bytes", "", "shorten it")
                    continue
                try:
                    yield line, raw.decode("utf-8-sig" if line == 1 else "utf-8").strip()
                except UnicodeDecodeError as error:
                    yield line, BadRowError("not UTF-8", error.reason, "write the file in UTF-8")
    except OSError as error:
        raise UserError(str(path), f"cannot be read ({first_line(error)})", f"give a {kind} file") from error


def json_lines(path: str | Path) -> Iterator[Record]:
    """Objects of a file of JSON lines."""
    for line, text in text_lines(path, "JSON lines"):
        yield line, _json_object(text) if isinstance(text, str) else text


def _json_object(text: str) -> dict[str, Any] | BadRowError:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise BadRowError("a key stands twice", text)
        return found

    if not text:
        return BadRowError("empty line", "", "remove it")
    try:
        row = json.loads(text, object_pairs_hook=unique)
    except BadRowError as bad:
        return bad
    except json.JSONDecodeError as error:
        return BadRowError("not JSON", f"{error.msg} in {text}", "write one JSON object per line")
    except RecursionError:
        return BadRowError("nested too deeply", text, "write one flat JSON object per line")
    except ValueError as error:  # a number of thousands of digits
        return BadRowError("not JSON", first_line(error))
    return row if isinstance(row, dict) else BadRowError("not an object", text, "write one JSON object per line")


def csv_rows(path: str | Path, text: str | None = None) -> Iterator[Record]:
    """Rows of a CSV file with a header line (tabs in a `.tsv`), each with the line it begins at.

    Args:
        path: the file.
        text: its contents, where these are read already.

    Raises:
        UserError: it is empty or no CSV.
    """
    text = read_text(path, "CSV") if text is None else text
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if str(path).lower().endswith(".tsv") else ",")
    try:
        header = [name.strip() for name in next(reader, [])]
        if not any(header):
            raise UserError(str(path), "the file is empty", "give CSV with a header line")
        twice = [name for index, name in enumerate(header) if name and name in header[:index]]
        if twice:
            raise UserError(str(path), f"the column {twice[0]!r} stands twice", "rename one of them")
        line = reader.line_num + 1  # a quoted value may span lines: a row is named by its first
        for row in reader:
            if any(cell.strip() for cell in row[len(header) :]):
                yield line, BadRowError(f"more than {len(header)} cells", ",".join(row), "put quotes around commas")
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


def hub_rows(name: str, subset: str | None, split: str | None, revision: str | None = None) -> Mapping[str, Any] | Any:
    """A split of a data set that `datasets` can load, or all of them by their name.

    Raises:
        UserError: it cannot be loaded.
    """
    from datasets import load_dataset

    try:
        return load_dataset(name, subset, split=split, revision=revision)
    except Exception as error:  # the hub client raises many unrelated types; all mean that the name cannot be read
        problem = f"{name!r} is no local path and cannot be loaded from the hub ({first_line(error)})"
        raise UserError("data", problem, "give a local file or folder, or a name on the hub") from error


def text_of(record: Mapping[str, Any], key: str) -> str:
    """A text, or a number as text, of a row.

    Raises:
        BadRowError: there is none.
    """
    value = record.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        known = f"its fields are {', '.join(map(str, record))}"
        raise BadRowError(f"no text in {key!r}", json.dumps(dict(record), default=str), known)
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise BadRowError(f"half a character in {key!r}", ascii(value))
    return value


def cell_of(record: Mapping[str, Any], column: str) -> str:
    """A cell of a CSV file, without white space around it.

    Raises:
        UserError: there is no such column.
    """
    if column not in record:
        raise UserError("column", f"no column {column!r}", f"its columns are {', '.join(record)}")
    return str(record[column]).strip()
