"""CSV files with a header line, every row with the line it begins at."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from orderppl.errors import UserError


@dataclass(frozen=True)
class CsvTable:
    """A table of strings.

    Attributes:
        path: the file.
        header: names of the columns.
        rows: 1-based line and cells of every row; a row may have fewer cells than the header.
    """

    path: Path
    header: list[str]
    rows: list[tuple[int, list[str]]]

    def column(self, name: str) -> int:
        """Index of a column.

        Raises:
            UserError: there is none of that name.
        """
        if name not in self.header:
            known = f"its columns are {', '.join(self.header)}"
            raise UserError("column", f"{self.path} has no column {name!r}", known)
        return self.header.index(name)


def read_text(path: str | Path, kind: str) -> str:
    """Contents of a text file in UTF-8.

    Args:
        path: the file.
        kind: what it should be, for the message: "FASTA or CSV".

    Raises:
        UserError: it is missing or not readable.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(str(path), "there is no such file", f"give a {kind} file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(path), f"cannot be read ({error})", f"give a {kind} file in UTF-8") from error


def parse_csv(path: Path, text: str) -> CsvTable:
    """Read the text of a CSV file (tabs in a `.tsv`).

    Raises:
        UserError: it is empty or no CSV.
    """
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    try:
        header = [name.strip() for name in next(reader, [])]
        rows: list[tuple[int, list[str]]] = []
        line = reader.line_num + 1  # a quoted value may span lines: a row is named by its first
        for row in reader:
            rows.append((line, row))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}", str(error), "write the file as plain CSV") from error
    if not header:
        raise UserError(str(path), "the file is empty", "give CSV with a header line")
    return CsvTable(path, header, rows)
