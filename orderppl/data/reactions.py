"""Chemical reactions from CSV files: the product, given the reactants."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from orderppl.data.dataset import Row, RowData
from orderppl.data.reading import cell_of, csv_rows
from orderppl.data.report import BadRow, Record
from orderppl.data.smiles import TOKEN, SmilesTokenizer, smiles_problem
from orderppl.data.tokenizers import ClosedTokenizer, Tokenizer

ARROW = ">>"


class Reactions(RowData):
    """Reactions `reactants>>product` as SMILES, from CSV files (tabs in a `.tsv`); others are left out and counted.

    Args:
        train: file of training reactions.
        column: of the reactions.
        max_prompt: longest reactants, tokens with the arrow.
        max_length: longest product, tokens.
        options: see `RowData`.
    """

    usual_on_bad = "report"
    usual_shares = (0.3, 0.15)
    ends = False  # how long a product is, is known
    what = "reactions"

    def __init__(
        self,
        train: str | None = None,
        *,
        column: str = "rxn",
        max_prompt: int | None = 96,
        max_length: int | None = 64,
        **options: Any,
    ) -> None:
        super().__init__(train, max_prompt=max_prompt, max_length=max_length, **options)
        self.column = column

    def read(self, source: str) -> Iterable[Record]:
        """Rows of a CSV file."""
        return csv_rows(source)

    def row(self, record: Mapping[str, Any]) -> Row:
        """Reactants with the arrow, and the product."""
        reaction = cell_of(record, self.column)
        reactants, arrow, product = reaction.partition(ARROW)
        if not (reactants and arrow and product):
            raise BadRow("no reactants>>product", reaction)
        problem = smiles_problem(reactants) or smiles_problem(product)
        if problem is not None:
            raise BadRow("not readable", f"{problem}: {reaction}")
        return Row(product, reactants + ARROW)

    def spelling(self, row: Row, tokenizer: Tokenizer) -> Row:
        """The row, if its tokens are in the vocabulary."""
        problem = tokenizer.problem(self.key(row)) if isinstance(tokenizer, ClosedTokenizer) else None
        if problem is not None:
            raise BadRow("not readable", f"{problem}: {self.key(row)}")
        return row

    def build_tokenizer(self, rows: Iterable[Row]) -> Tokenizer:
        """The tokens that occur."""
        found = {piece for row in rows for piece in TOKEN.findall(self.key(row))}
        return SmilesTokenizer(["[PAD]", "[MASK]", "[SEP]", *sorted(found)])
