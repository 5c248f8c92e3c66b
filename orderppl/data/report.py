"""What a loader read, kept and left out, so that no row disappears without a trace."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


class BadRowError(Exception):
    """Why a row cannot be used.

    Args:
        reason: short, shared by all rows left out for the same cause.
        detail: the text at fault.
        remedy: what the user can do about it.
        wanted: False for a row that a setting leaves out, which never stops the run.
    """

    def __init__(
        self, reason: str, detail: object, remedy: str = "correct or remove the row", wanted: bool = True
    ) -> None:
        super().__init__(reason)
        text = str(detail)
        self.reason, self.remedy, self.wanted = reason, remedy, wanted
        self.detail = text if len(text) <= 120 else text[:117] + "..."


@dataclass(frozen=True)
class BadRow:
    """One row that was left out.

    Attributes:
        file: file name or hub split it came from.
        line: 1-based line number (hub data: row number).
        reason: short, shared by all rows left out for the same cause.
        detail: the offending text.
    """

    file: str
    line: int
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}: {self.detail}"


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

    def reject(self, file: str, line: int, bad: BadRowError) -> None:
        """Count a row that is left out."""
        self.rejected[file, bad.reason] += 1
        if self.rejected[file, bad.reason] <= 5:
            self.examples.append(BadRow(file, line, bad.reason, bad.detail))

    def count(self, reason: str, file: str | None = None) -> int:
        """Rows left out for `reason`, in one file or in all."""
        return sum(n for (f, r), n in self.rejected.items() if r == reason and file in (None, f))

    def worst(self) -> str:
        """The commonest reasons, for messages."""
        return "; ".join(f"{n} x {reason}" for (_, reason), n in self.rejected.most_common(2)) or "no row was read"

    def table(self) -> list[tuple[str, str, int, str]]:
        """Rows `(file, outcome, count, first example)`: read per file, left out per reason, kept per split."""
        rows = [(file, "read", n, "") for file, n in self.read.items()]
        for (file, reason), n in self.rejected.items():
            first = next(e for e in self.examples if (e.file, e.reason) == (file, reason))
            rows.append((file, reason, n, f"line {first.line}: {first.detail}"))
        return rows + [(split, "kept", n, "") for split, n in self.kept.items()]
