"""English words as they are spoken: rows of phones from a pronouncing dictionary."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from orderppl.data.dataset import Row, RowData, at_least
from orderppl.data.reading import read_text
from orderppl.data.report import BadRow, Record
from orderppl.data.tokenizers import EOS, MASK, PAD, ClosedTokenizer, Tokenizer
from orderppl.wheels import wheel_file

PACKAGE, VERSION = "pocketsphinx", "5.1.1"
PHONES = [
    *("AA", "AE", "AH", "AO", "AW", "AY", "B", "CH", "D", "DH", "EH", "ER", "EY"),
    *("F", "G", "HH", "IH", "IY", "JH", "K", "L", "M", "N", "NG", "OW", "OY"),
    *("P", "R", "S", "SH", "T", "TH", "UH", "UW", "V", "W", "Y", "Z", "ZH"),
]


class PhoneTokenizer(ClosedTokenizer):
    """The 39 phones of ARPAbet, with spaces between them; MASK follows them."""

    piece = re.compile(r"\S+")

    def __init__(self) -> None:
        super().__init__([*PHONES, MASK, PAD, EOS])
        self.mask_index, self.pad_index, self.eos_index = (self._ids[token] for token in (MASK, PAD, EOS))

    def problem(self, text: str) -> str | None:
        """Why a text has no tokens here; None if it has."""
        foreign = [piece for piece in self.piece.findall(text) if piece not in PHONES]
        return f"{foreign[0]} is no phone" if foreign else None

    def decode(self, ids: Iterable[int]) -> str:
        """Phones with spaces between them."""
        return " ".join(self.tokens[index] for index in self._kept(ids))


class Pronunciations(RowData):
    """Words of one length from a pronouncing dictionary: a word and its phones per line, as in `BOOK B UH K`.

    All phones are to be revealed, and their number is known. Second pronunciations of a word are left out.

    Args:
        train: the dictionary; that of PocketSphinx (134,860 pronunciations) when left out.
        length: phones of a word; other words are left out.
        options: see `RowData`.

    Raises:
        UserError: a setting is wrong, or the package with the dictionary is missing.
    """

    ends = False
    what = "words"

    def __init__(self, train: str | None = None, *, length: int = 8, **options: Any) -> None:
        at_least(1, length=length)
        if train is None:
            train = str(wheel_file(PACKAGE, VERSION, "cmudict-en-us.dict", "the dictionary", "train"))
        super().__init__(train, **options)
        self.word_length = length

    def build_tokenizer(self, rows: Iterable[Row]) -> Tokenizer:
        """The phones."""
        return PhoneTokenizer()

    def read(self, source: str) -> Iterable[Record]:
        """Lines with `word` and `phones`."""
        for number, line in enumerate(read_text(source).splitlines(), 1):
            word, *phones = line.split() or [""]
            yield number, {"word": word, "phones": phones}

    def row(self, record: Mapping[str, Any]) -> Row:
        """A word."""
        word, phones = record["word"], record["phones"]
        if not phones:
            raise BadRow("no phones", word, "remove the line")
        foreign = next((phone for phone in phones if phone not in PHONES), None)
        if foreign is not None:
            raise BadRow("not a phone of ARPAbet", f"{word}: {foreign}", "write phones without stress, such as AH")
        if len(phones) != self.word_length or word.endswith(")"):
            raise BadRow("another length or a second pronunciation", word, wanted=False)
        return Row(" ".join(phones), name=word)
