"""Proteins and other sequences of letters from FASTA or CSV files; regions of antibodies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from orderppl.data.dataset import Row, RowData
from orderppl.data.patterns import Pattern
from orderppl.data.reading import cell_of, csv_rows, fasta_entries, read_text
from orderppl.data.report import BadRow, Record
from orderppl.data.tokenizers import LetterTokenizer, Span, Tokenizer
from orderppl.errors import UserError

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
REGIONS = ("FR1", "CDR1", "FR2", "CDR2", "FR3", "CDR3", "FR4")
# After the rules by which loops are found by eye (A. C. R. Martin, "How to identify the CDRs by looking at a
# sequence"): CDR1 four residues behind a cysteine and before a tryptophan, CDR2 fifteen behind CDR1, CDR3 three behind
# the second cysteine and before W-G-x-G.
_HEAVY = re.compile(
    r"(?P<FR1>.{16,24}C.{3})(?P<CDR1>.{8,14}?)(?P<FR2>[WV][VIFALY].{12})(?P<CDR2>.{13,20}?)"
    r"(?P<FR3>[KRQTHSN][VFLAIST][TSIAVMP].{25,29}C.{2})(?P<CDR3>.{1,32}?)(?P<FR4>[A-Z]G.G.{4,8})$"
)
# Of light chains: CDR1 behind a cysteine and before a tryptophan, CDR2 seven residues, fifteen behind CDR1, CDR3 behind
# the second cysteine and before F-G-x-G.
_LIGHT = re.compile(
    r"(?P<FR1>.{19,23}C)(?P<CDR1>.{8,17}?)(?P<FR2>W[YFLV].{13})(?P<CDR2>.{7})"
    r"(?P<FR3>.{31,33}C)(?P<CDR3>.{5,14}?)(?P<FR4>FG.G.{4,8})$"
)


def antibody_regions(sequence: str) -> list[str] | None:
    """Region of every residue of a variable domain, heavy or light; None where its landmarks are not found.

    Args:
        sequence: one-letter residues.
    """
    found = _HEAVY.match(sequence) or _LIGHT.match(sequence)
    return None if found is None else [name for name in REGIONS for _ in found[name]]


class Fasta(RowData):
    """Sequences from files that start with `>` (FASTA) or are CSV (tabs in a `.tsv`) with a header line.

    All letters are to be revealed, and their number is known. Letters are raised to upper case.

    Args:
        train: file of training sequences.
        column: CSV column of the sequences; None: `heavy`, else the first column that holds only sequences.
        names: regular expression that is searched for in the name of a row; others are left out and counted.
        alphabet: letters that may occur.
        options: see `RowData`.

    Raises:
        UserError: a setting is wrong.
    """

    usual_shares = (0.2, 0.0)
    ends = False
    what = "sequences"

    def __init__(
        self,
        train: str | None = None,
        *,
        column: str | None = None,
        names: str | None = None,
        alphabet: str = AMINO_ACIDS,
        **options: Any,
    ) -> None:
        super().__init__(train, **options)
        self.names = Pattern(names or "", "names")
        self.column, self.alphabet = column, alphabet

    def read(self, source: str) -> Iterable[Record]:
        """Entries with `name` and `sequence`."""
        text = read_text(source)
        if text.lstrip().startswith(">"):
            return fasta_entries(text)
        records = list(csv_rows(source, text))
        column = self._pick_column(source, [record for _, record in records if isinstance(record, dict)])
        return [
            (line, {"name": f"line {line}", **record, "sequence": cell_of(record, column)})
            if isinstance(record, dict)
            else (line, record)
            for line, record in records
        ]

    def _pick_column(self, source: str, records: Sequence[Mapping[str, Any]]) -> str:
        header = list(records[0]) if records else []
        if self.column is not None or "heavy" in header or not records:
            return self.column or "heavy"
        for column in header:
            cells = [record[column].strip().upper() for record in records[:20] if record[column].strip()]
            if cells and all(len(cell) >= 10 and set(cell) <= set(self.alphabet) for cell in cells):
                return column
        known = f"name one; its columns are {', '.join(header)}"
        raise UserError("column", f"no column of {source} looks like sequences", known)

    def row(self, record: Mapping[str, Any]) -> Row:
        """A sequence, and what of it is hidden."""
        name, raw = str(record["name"]), record["sequence"].strip()
        if not self.names.is_in(name):
            raise BadRow("name not wanted", name, wanted=False)
        if not raw:
            raise BadRow("empty sequence", name, "fill or remove the row")
        # Of other letters upper case may be two letters, or another one.
        sequence = re.sub("[a-z]", lambda letter: letter[0].upper(), raw)
        foreign = sorted(set(sequence) - set(self.alphabet))
        if foreign:
            remedy = f"only {self.alphabet} may occur: correct the row, or leave it out by on_bad=report"
            raise BadRow("letters outside the alphabet", f"{name}: {' '.join(foreign)}", remedy)
        return Row(sequence, hidden=self.hidden(sequence, name), name=name)

    def hidden(self, sequence: str, name: str) -> Sequence[Span] | None:
        """What of a sequence is to be revealed; None: all of it."""
        return None

    def spelling(self, row: Row, tokenizer: Tokenizer) -> Row:
        """One token per letter: some tokenisers want spaces between them."""
        if len(tokenizer.encode(row.text)) == len(row.text):
            return row
        spaced = " ".join(row.text)
        if len(tokenizer.encode(spaced)) != len(row.text):
            problem = f"has not one token per letter of {row.text[:20]}..."
            raise UserError("tokenizer", problem, "use one of a model of such sequences")
        hidden = None if row.hidden is None else [(2 * start, 2 * end - 1) for start, end in row.hidden]
        return row._replace(text=spaced, hidden=hidden)

    def build_tokenizer(self, rows: Iterable[Row]) -> Tokenizer:
        """One token per letter."""
        return LetterTokenizer(self.alphabet)


class Antibodies(Fasta):
    """Variable domains of antibodies, heavy or light ones.

    Args:
        train: file of training sequences.
        regions: of FR1, CDR1, FR2, CDR2, FR3, CDR3 and FR4 those to write, such as `CDR1,CDR2,CDR3`; the residues of
            the others are given, and domains whose regions cannot be told are left out and counted. None: the whole
            domain is to be written.
        options: see `Fasta`.

    Raises:
        UserError: a setting is wrong.
    """

    usual_shares = (0.3, 0.0)

    def __init__(self, train: str | None = None, *, regions: str | Sequence[str] | None = None, **options: Any) -> None:
        super().__init__(train, **options)
        parts = regions.split(",") if isinstance(regions, str) else regions or ()
        self.regions = tuple(part.strip().upper() for part in parts)
        unknown = [part for part in self.regions if part not in REGIONS]
        if unknown or (regions is not None and not self.regions):
            problem = f"unknown region {unknown[0]!r}" if unknown else "names none"
            raise UserError("regions", problem, f"use some of {','.join(REGIONS)}")

    def hidden(self, sequence: str, name: str) -> Sequence[Span] | None:
        """The residues of the regions to write."""
        if not self.regions:
            return None
        found = antibody_regions(sequence)
        if found is None:
            raise BadRow("its regions cannot be told", f"{name}: {sequence}", wanted=False)
        return [(place, place + 1) for place, region in enumerate(found) if region in self.regions]
