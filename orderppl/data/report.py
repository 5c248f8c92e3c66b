"""What a loader read, kept and rejected, so that no row disappears without a trace."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class BadRow:
    """One rejected row.

    Attributes:
        file: file name or hub split it came from.
        line: 1-based line number (hub data: row number).
        reason: short, shared by all rows rejected for the same cause.
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
    """Counts of rows read, kept and rejected, with the first examples of every reason.

    Attributes:
        source: folder, file or hub name.
        form: the form asked for, "" where there is only one.
        read: rows seen per file.
        kept: rows delivered per split.
        rejected: rows rejected per (file, reason).
        examples: the first `max_examples` rejected rows per (file, reason).
        max_examples: how many examples to keep per (file, reason).
    """

    source: str
    form: str = ""
    read: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    rejected: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: list[BadRow] = field(default_factory=list)
    max_examples: int = 5

    def reject(self, file: str, line: int, reason: str, detail: object) -> None:
        """Count a rejected row; its text is cut at 120 characters."""
        self.rejected[file, reason] += 1
        if self.rejected[file, reason] <= self.max_examples:
            text = str(detail)
            self.examples.append(BadRow(file, line, reason, text if len(text) <= 120 else text[:117] + "..."))

    def count(self, reason: str, file: str | None = None) -> int:
        """Rows rejected for `reason`, in one file or in all."""
        return sum(n for (f, r), n in self.rejected.items() if r == reason and file in (None, f))

    def table(self) -> list[tuple[str, str, int, str]]:
        """Rows `(file, outcome, count, first example)`: read per file, rejected per reason, kept per split."""
        rows = [(file, "read", n, "") for file, n in self.read.items()]
        for (file, reason), n in self.rejected.items():
            first = next(e for e in self.examples if (e.file, e.reason) == (file, reason))
            rows.append((file, reason, n, f"line {first.line}: {first.detail}"))
        return rows + [(split, "kept", n, "") for split, n in self.kept.items()]

    def records(self) -> list[dict[str, str | int]]:
        """The table as flat JSON-ready objects."""
        return [
            {"source": self.source, "form": self.form, "file": file, "outcome": outcome, "count": n, "example": example}
            for file, outcome, n, example in self.table()
        ]


def hash_fraction(text: str, seed: int = 0) -> float:
    """Map a text to [0, 1) by SHA-256, the same on every machine: the rule by which splits are drawn."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{text}".encode()).digest()[:7], "big") / 2**56
