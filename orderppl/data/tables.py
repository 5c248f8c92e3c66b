"""Rows of text that users bring: JSON lines, CSV, and data sets of the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from orderppl.data.dataset import Row, RowData
from orderppl.data.patterns import Pattern
from orderppl.data.prompts import HOLE
from orderppl.data.reading import csv_rows, hub_data, json_lines, text_of
from orderppl.data.report import BadRow, LoadReport, Record
from orderppl.data.tokenizers import Span

HOLES = re.compile(rf"(?:{HOLE.pattern})(?:\s*(?:{HOLE.pattern}))*")  # holes side by side are filled together


class Table(RowData):
    """Rows with named fields: a prompt and its response, a text with holes, or a text alone.

    A text with holes is a `template` such as `Tom has 3 [MASK] and buys [MASK] more.`, beside the whole text or the
    list of what fills the holes, each of any length; or a whole text with the `spans` of characters to hide. All the
    rest of it is given. What is to be written can also be said once for all rows, by a regular expression: `hides`
    hides what it finds in a whole text, such as all numbers (`[0-9]+`) or the last sentence.

    Args:
        train: file of training rows.
        prompt: field of the prompt; None: there is none. Not read with a template, spans or hides.
        response: field of the response; with a template, spans or hides, of the whole text (or the list of fillings).
        template: field of the text with `[MASK]` or `<mask>` where a hole is; None: there is none.
        spans: field of the holes of a whole text, a list of [start, end] in characters; None: there is none.
        hides: regular expression of what is hidden in a whole text; rows without it are bad ones. None: there is none.
        answer: field of what responses are compared with; None: the response itself.
        ends: responses end with a token of their own, so that their length need not be known.
        options: see `RowData`.
    """

    def __init__(
        self,
        train: str | None = None,
        *,
        prompt: str | None = "prompt",
        response: str = "response",
        template: str | None = None,
        spans: str | None = None,
        hides: str | None = None,
        answer: str | None = None,
        ends: bool = True,
        **options: Any,
    ) -> None:
        self.ends = ends
        super().__init__(train, **options)
        self.prompt, self.response, self.answer = prompt, response, answer
        self.template, self.spans, self.hides = template, spans, None if hides is None else Pattern(hides, "hides")

    def row(self, record: Mapping[str, Any]) -> Row:
        """A prompt with its response, or a text with holes."""
        answer = None if self.answer is None else text_of(record, self.answer)
        if self.template is not None:
            template, fillings = text_of(record, self.template), record.get(self.response)
            if isinstance(fillings, list):
                return Row(*fill(template, [str(filling) for filling in fillings]), answer=answer)
            text = text_of(record, self.response)
            return Row(text, hidden=holes_of(template, text), answer=answer)
        text = text_of(record, self.response)
        if self.spans is not None:
            return Row(text, hidden=_spans(record.get(self.spans), text), answer=answer)
        if self.hides is not None:
            return Row(text, hidden=[span for span in self.hides.spans(text) if span[0] < span[1]], answer=answer)
        return Row(text, None if self.prompt is None else text_of(record, self.prompt), answer=answer)


class JsonLines(Table):
    """One JSON object per line; the fields are those of `Table`."""

    def read(self, source: str) -> Iterable[Record]:
        """Rows of a file."""
        return json_lines(source)


class CsvFile(Table):
    """CSV with a header line, tabs in a `.tsv`; the fields are columns, otherwise as `Table`."""

    def read(self, source: str) -> Iterable[Record]:
        """Rows of a file."""
        return csv_rows(source)


class HubDataset(Table):
    """Any data set that `datasets` loads by its name, or a folder of it; the fields are columns.

    Args:
        name: on the hub, or a folder.
        subset: of a data set with several.
        revision: branch, tag or commit.
        train: its split of training rows; a part of one is `train[:1000]`.
            Likewise `validation` and `test`, which are splits of these names where it has them.
        options: see `Table`.
    """

    def __init__(
        self,
        name: str,
        subset: str | None = None,
        revision: str | None = None,
        train: str = "train",
        **options: Any,
    ) -> None:
        super().__init__(train, **options)
        self.name, self.subset, self.revision = name, subset, revision
        self._given = dict(self.sources)

    def make_rows(self, report: LoadReport) -> dict[str, list[Row]]:
        """Find out which splits there are, and read them."""
        known = hub_data(self.name, self.subset, None, self.revision)
        self.sources = {split: split for split in ("validation", "test") if split in known} | self._given
        return super().make_rows(report)

    def read(self, source: str) -> Iterable[Record]:
        """Rows of a split."""
        return enumerate(map(dict, hub_data(self.name, self.subset, source, self.revision)), 1)


def fill(template: str, fillings: list[str]) -> tuple[str, None, Sequence[Span]]:
    """Text (no prompt) and holes of a template that is filled in; `BadRow` where there are more or fewer holes."""
    pieces = HOLES.split(template)
    if len(pieces) != len(fillings) + 1:
        raise BadRow("another number of holes than fillings", f"{len(fillings)} for {template}")
    text, holes = pieces[0], list[Span]()
    for filling, piece in zip(fillings, pieces[1:], strict=True):
        holes.append((len(text), len(text) + len(filling)))
        text += filling + piece
    return text, None, tuple(holes)


def holes_of(template: str, text: str) -> Sequence[Span]:
    """Where the holes of a template are in its whole text; `BadRow` where it does not fit in exactly one way."""
    pieces = HOLES.split(template)
    inner = pieces[1:-1]
    stop = len(text) - len(pieces[-1])
    if len(pieces) < 2:
        raise BadRow("no hole in the template", template, "mark what is to be filled in by [MASK]")
    # the leftmost way to lay the pieces out, and the rightmost: what lies between them fits in one way if they agree
    first, place = list[Span](), len(pieces[0])
    for piece in inner:
        found = text.find(piece, place + 1)
        first.append((place, found))
        place = found + len(piece)
    last, right = list[Span](), stop
    for piece in reversed(inner):
        found = text.rfind(piece, 0, right - 1)
        last.append((found + len(piece), right))
        right = found
    first, last = [*first, (place, stop)], [*last, (len(pieces[0]), right)][::-1]
    fits = text.startswith(pieces[0]) and text.endswith(pieces[-1]) and all(start < end for start, end in first)
    if not fits:
        raise BadRow("the text does not fit the template", f"{text} / {template}")
    if first != last:
        raise BadRow("the text fits the template in several ways", text, "give a list of fillings, or spans")
    return tuple(first)


def _spans(value: Any, text: str) -> Sequence[Span]:
    """Holes as users write them; a text is read as JSON."""
    try:
        spans = [(int(start), int(end)) for start, end in (json.loads(value) if isinstance(value, str) else value)]
    except (TypeError, ValueError, RecursionError):
        raise BadRow("no list of [start, end]", value) from None
    if not spans or not all(0 <= start < end <= len(text) for start, end in spans):
        raise BadRow("a span outside the text", f"{spans} of {len(text)} characters")
    return tuple(spans)
