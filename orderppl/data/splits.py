"""Training, validation and held-out rows that share no text."""

from __future__ import annotations

from datasets import Dataset, DatasetDict

from orderppl.data.report import LoadReport, hash_fraction
from orderppl.errors import UserError


def split_rows(
    rows: Dataset,
    test: Dataset | None,
    key: str,
    report: LoadReport,
    *,
    held_out: float,
    validation: float = 0.0,
    seed: int = 0,
    file: str = "data",
) -> DatasetDict:
    """Split rows by a hash of their text; equal texts fall together.

    Args:
        rows: with a column `key`, and `name` and `line` for the report.
        test: held-out rows of a file of their own; None: a share of `rows`.
        key: column of the text that is hashed.
        report: receives the counts; rows whose text is also in a test file are left out and counted.
        held_out: share drawn from `rows` when `test` is not given.
        validation: share of `rows` kept for validation; 0: no such split.
        seed: of the hash.
        file: name of the file of `rows`, for the report.

    Returns:
        `train`, `validation` if asked for, `test`.

    Raises:
        UserError: a share is not one, or a split is empty.
    """
    drawn = held_out if test is None else 0.0
    if test is None and not 0 < held_out < 1:
        raise UserError("held_out", f"{held_out} is not in (0, 1)", "give a share such as 0.2, or a test file")
    if not 0 <= validation < 1 - drawn:
        problem = f"{validation} is not in [0, {1 - drawn:g})"
        raise UserError("validation", problem, "leave rows to train on")
    taken = set() if test is None else set(test[key])
    places: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for index, (text, line, name) in enumerate(zip(rows[key], rows["line"], rows["name"], strict=True)):
        part = hash_fraction(text, seed)
        if text in taken:
            report.reject(file, line, "also in the test file", name)
        else:
            split = "test" if part < drawn else "validation" if part < drawn + validation else "train"
            places[split].append(index)
    splits = DatasetDict({"train": rows.select(places["train"])})
    if validation:
        splits["validation"] = rows.select(places["validation"])
    splits["test"] = rows.select(places["test"]) if test is None else test
    for name, split in splits.items():
        if not len(split):
            remedy = "give more rows, or another held_out, validation or seed"
            raise UserError(name, f"the {name} split of {report.source} is empty", remedy)
        report.kept[name] = len(split)
    return splits
