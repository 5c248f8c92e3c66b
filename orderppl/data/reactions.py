"""Chemical reactions from CSV files: the product, given the reactants."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from orderppl.data.dataset import Row, RowData
from orderppl.data.reading import Record, cell_of, csv_rows
from orderppl.data.report import BadRowError
from orderppl.data.smiles import TOKEN, SmilesTokenizer, smiles_problem
from orderppl.data.tokenizers import Tokenizer

ARROW = ">>"


class Reactions(RowData):
    """Reactions `reactants>>product` as SMILES; rows of another form are left out and counted.

    Args:
        train: CSV file (tabs in a `.tsv`) of training reactions.
        validation: CSV file of validation reactions; None: a share of the training reactions.
        test: CSV file of held-out reactions; None: a share of the training reactions.
        column: of the reactions.
        test_share: see `RowData`.
        validation_share: see `RowData`.
        options: see `RowData` and `TextData`.
    """

    default_on_bad = "report"
    ends = False  # the model knows how long a product is
    what = "reactions"

    def __init__(
        self,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        *,
        column: str = "rxn",
        test_share: float = 0.3,
        validation_share: float = 0.15,
        **options: Any,
    ) -> None:
        options |= {"test_share": test_share, "validation_share": validation_share}
        super().__init__(train, validation, test, **options)
        self.column = column

    def read(self, source: str) -> Iterable[Record]:
        """Rows of a CSV file."""
        return csv_rows(source)

    def row(self, record: Mapping[str, Any]) -> Row:
        """Reactants with the arrow, and the product."""
        reaction = cell_of(record, self.column)
        reactants, arrow, product = reaction.partition(ARROW)
        if not (reactants and arrow and product):
            raise BadRowError("no reactants>>product", reaction)
        problem = smiles_problem(reactants) or smiles_problem(product)
        if problem is not None:
            raise BadRowError("not readable", f"{problem}: {reaction}")
        return Row(product, reactants + ARROW)

    def spelling(self, row: Row, tokenizer: Tokenizer) -> Row:
        """The row, if its tokens are in the vocabulary."""
        if isinstance(tokenizer, SmilesTokenizer):
            problem = tokenizer.problem(self.key(row))
            if problem is not None:
                raise BadRowError("not readable", f"{problem}: {self.key(row)}")
        return row

    def build_tokenizer(self, rows: Iterable[Row]) -> Tokenizer:
        """The tokens that occur."""
        found = {piece for row in rows for piece in TOKEN.findall(self.key(row))}
        return SmilesTokenizer(["[PAD]", "[MASK]", "[SEP]", *sorted(found)])
