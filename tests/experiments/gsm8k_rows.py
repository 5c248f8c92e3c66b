"""Problems in the format of the real GSM8K files."""

from __future__ import annotations

import json
from pathlib import Path


def write_rows(folder: Path, name: str, first: int, count: int) -> None:
    """A file of problems with two equations, the second with the result of the first."""
    rows = []
    for index in range(first, first + count):
        a, b, c = 2 + index % 7, 3 + index % 5, 1 + index % 11
        total, left = a * b, a * b + c
        question = f"Problem {index}: Mia has {a} bags of {b} pens and buys {c} more. How many pens has she?"
        answer = f"She has <<{a}*{b}={total}>>{total} pens, then <<{total}+{c}={left}>>{left}.\n#### {left}"
        rows.append(json.dumps({"question": question, "answer": answer}))
    (folder / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
