"""What a loader read, kept and left out, so that no row disappears without a trace."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orderppl.errors import UserError


class BadRow(Exception):  # noqa: N818  (it is a row, and counted more often than raised)
    """A row that cannot be used, and why.

    Args:
        reason: short, shared by all rows left out for the same cause.
        detail: the text at fault.
        remedy: what the user can do about it.
        wanted: False for a row that a setting leaves out, which never stops the run.

    Attributes:
        source: file or hub split it comes from.
        line: 1-based line number (hub data: row number).
    """

    source, line = "", 0

    def __init__(self, reason: str, detail: Any, remedy: str = "correct or remove it", wanted: bool = True) -> None:
        super().__init__(reason, detail)
        text = str(detail)
        self.reason, self.remedy, self.wanted = reason, remedy, wanted
        self.detail = text if len(text) <= 120 else text[:117] + "..."

    def at(self, source: str, line: int) -> BadRow:
        """The same, with its place."""
        self.source, self.line = source, line
        return self

    @property
    def file(self) -> str:
        """Name of its file, without folders."""
        return Path(self.source).name

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}: {self.detail}"


Record = tuple[int, dict[str, Any] | BadRow]
"""Line (from 1), and what stands there or why it cannot be read."""


@dataclass
class LoadReport:
    """Counts of rows read, kept and left out, with the first examples of every reason.

    Attributes:
        source: folder, file or hub name; "" for generated data.
        read: rows seen per file.
        kept: rows delivered per split.
        rejected: rows left out per (file, reason).
        examples: the first five of them per (file, reason).
    """

    source: str = ""
    read: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    rejected: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: list[BadRow] = field(default_factory=list)

    def reject(self, bad: BadRow, on_bad: str = "report") -> None:
        """Count a row that is left out, or stop the run for it.

        Raises:
            UserError: on_bad="error", and no setting leaves such rows out; names file and line.
        """
        if on_bad == "error" and bad.wanted:
            raise UserError(f"{bad.source}:{bad.line}", f"{bad.reason}: {bad.detail}", bad.remedy) from bad
        self.rejected[bad.file, bad.reason] += 1
        if self.rejected[bad.file, bad.reason] <= 5:
            self.examples.append(bad.with_traceback(None))

    def count(self, reason: str, file: str | None = None) -> int:
        """Rows left out for `reason`, in one file or in all."""
        return sum(n for (f, r), n in self.rejected.items() if r == reason and file in (None, f))

    def worst(self) -> str:
        """The commonest reasons, for messages."""
        worst = "; ".join(f"{n} x {reason}" for (_, reason), n in self.rejected.most_common(2))
        return worst or f"{sum(self.read.values())} rows were read"

    def table(self) -> list[tuple[str, str, int, str]]:
        """Rows `(file, outcome, count, first example)`: read per file, left out per reason, kept per split."""
        rows = [(file, "read", n, "") for file, n in self.read.items()]
        for (file, reason), n in self.rejected.items():
            first = next(e for e in self.examples if (e.file, e.reason) == (file, reason))
            rows.append((file, reason, n, f"line {first.line}: {first.detail}"))
        return rows + [(split, "kept", n, "") for split, n in self.kept.items()]
