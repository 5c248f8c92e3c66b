"""Reactions as SMILES from CSV files, split by a hash of the row."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, DatasetDict, Features, Value

from orderppl.data.report import LoadReport
from orderppl.data.smiles import SmilesTokenizer, smiles_problem
from orderppl.data.splits import split_rows
from orderppl.data.tables import parse_csv, read_text
from orderppl.errors import UserError

ARROW = ">>"
FEATURES = Features(
    {key: Value("string") for key in ("name", "reaction", "prompt", "response")} | {"line": Value("int64")}
)


def read_reactions(
    path: str | Path, report: LoadReport, column: str = "rxn", tokenizer: SmilesTokenizer | None = None
) -> Dataset:
    """Read one CSV file of reactions `reactants>>product`; rows of another form are left out and counted.

    Args:
        path: CSV (tabs in a `.tsv`) with a header line.
        report: receives the counts.
        column: of the reactions.
        tokenizer: also leave out what it cannot read.

    Returns:
        Columns `prompt` (reactants with the arrow), `response` (product), `reaction`, `name`, `line`.

    Raises:
        UserError: the file or column is missing, or no row is left.
    """
    path = Path(path)
    table = parse_csv(path, read_text(path, "CSV"))
    index = table.column(column)
    rows: list[dict[str, str | int]] = []
    for line, cells in table.rows:
        report.read[path.name] += 1
        reaction = cells[index].strip() if index < len(cells) else ""
        reactants, arrow, product = reaction.partition(ARROW)
        problem = smiles_problem(reactants) or smiles_problem(product)
        if problem is None and tokenizer is not None:
            problem = tokenizer.problem(reaction)
        if not (reactants and arrow and product):
            report.reject(path.name, line, "no reactants>>product", reaction)
        elif problem is not None:
            report.reject(path.name, line, "not readable", f"{problem}: {reaction}")
        else:
            name = f"line {line}"
            row: dict[str, str | int] = {
                "name": name,
                "reaction": reaction,
                "prompt": reactants + ARROW,
                "response": product,
                "line": line,
            }
            rows.append(row)
    if not rows:
        raise UserError(str(path), "no reaction is left", "give rows of the form reactants>>product")
    return Dataset.from_list(rows, features=FEATURES)


def load_reactions(
    train: str | Path,
    test: str | Path | None = None,
    *,
    column: str = "rxn",
    tokenizer: SmilesTokenizer | None = None,
    held_out: float = 0.3,
    validation: float = 0.15,
    seed: int = 0,
) -> tuple[DatasetDict, LoadReport]:
    """Read training, validation and held-out reactions; no two splits share one.

    Args:
        train: CSV file.
        test: held-out file; None: a share of `train`, drawn by a hash of the reaction.
        column: see `read_reactions`.
        tokenizer: see `read_reactions`.
        held_out: see `split_rows`.
        validation: see `split_rows`.
        seed: of the hash.

    Raises:
        UserError: as `read_reactions` and `split_rows`.
    """
    report = LoadReport(str(train) if test is None else f"{train}, {test}")
    rows = read_reactions(train, report, column, tokenizer)
    held = None if test is None else read_reactions(test, report, column, tokenizer)
    splits = split_rows(
        rows, held, "reaction", report, held_out=held_out, validation=validation, seed=seed, file=Path(train).name
    )
    return splits, report
