"""Splits of sequences, ready for batches, and what every data set is."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from orderppl.config import Configurable
from orderppl.data.answers import Grade, same_text
from orderppl.data.report import BadRow, LoadReport, Record
from orderppl.data.tokenizers import Span, Tokenizer, WordTokenizer, load_tokenizer
from orderppl.errors import UserError
from orderppl.unmasking import Batch

SPLITS = ("train", "validation", "test")
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Examples:
    """The rows of one split.

    Attributes:
        batch: all of them, on the CPU: responses begin at the same column, prompts are given positions before it.
        tokenizer: what they were read with; None where tokens are numbers.
        grade: (texts, references) -> float64 [N], 1 where a text is right.
        end_index: id that ends a response; None where its length is known.
        answers: reference answers, where rows bring them.
        names: of the rows, where they have some.
        lines: of the file they come from.
        whole: texts are whole rows, such as filled templates, and not the tokens that were to be revealed alone.
    """

    batch: Batch
    tokenizer: Tokenizer | None = None
    grade: Grade = same_text
    end_index: int | None = None
    answers: list[str] | None = None
    names: list[str] | None = None
    lines: list[int] | None = None
    whole: bool = False

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.batch)

    @cached_property
    def references(self) -> list[str] | None:
        """What texts are compared with: the answers of the rows, else their own texts; None for numbers."""
        own = self.answers is None and self.tokenizer is not None
        return self.texts(self.batch.tokens) if own else self.answers

    @property
    def is_filled_up(self) -> bool:
        """Whether tokens of some response stand behind its first end."""
        if self.end_index is None:
            return False
        ended = ((self.batch.tokens == self.end_index) & self.batch.latent).long()
        return bool((self.batch.latent & (ended.cumsum(-1) > ended)).any())

    def rows(self, index: Tensor | slice | Sequence[int]) -> Examples:
        """Some of the rows, by their numbers, a slice or bool [N]."""
        numbers = torch.arange(len(self))[index if isinstance(index, slice | Tensor) else list(index)]
        columns = {name: getattr(self, name) for name in ("answers", "names", "lines")}
        kept: dict[str, Any] = {name: v and [v[number] for number in numbers.tolist()] for name, v in columns.items()}
        return replace(self, batch=self.batch.rows(numbers), **kept)

    def take(self, n: int) -> Examples:
        """The first n rows, or all if there are fewer."""
        return self.rows(slice(n))

    def texts(self, tokens: Tensor, batch: Batch | None = None) -> list[str]:
        """Texts of responses (of whole rows where `whole`), up to the end token.

        Args:
            tokens: int64 [N, S], such as decoded canvases of these rows.
            batch: whose columns they have; that of these examples when left out.

        Raises:
            UserError: tokens of another shape.
        """
        batch = self.batch if batch is None else batch
        if tokens.shape != batch.tokens.shape:
            problem = f"{list(tokens.shape)} for rows of {list(batch.tokens.shape)}"
            raise UserError("tokens", problem, "give the canvases of these rows, or the batch that was decoded")
        shown = batch.attention_mask if self.whole else batch.latent
        rows = [row[kept].tolist() for row, kept in zip(tokens.cpu(), shown.cpu(), strict=True)]
        if self.tokenizer is None:
            return [" ".join(map(str, ids)) for ids in rows]
        skip = len(self.tokenizer.frame[0]) if self.whole else 0  # the frame may begin with an end token
        return [self.tokenizer.decode(ids[skip:]) for ids in rows]

    def spell(self, token: int) -> str:
        """One token as text."""
        return str(token) if self.tokenizer is None else self.tokenizer.tokens[token]


class DataSet(Configurable):
    """What every data set is; a subclass defines `make_splits`, and `vocab_size` and `mask_index` without a tokeniser.

    Which rows a split has depends on the arguments of the constructor alone, never on a seed of training.

    Attributes:
        tokenizer: that was asked for; None: that of the denoiser, or one built from training rows.
    """

    tokenizer: Any = None
    settled: ClassVar[tuple[str, ...]] = ()  # options of a parent that the constructor fills in itself
    _splits: dict[str, Examples] | None = None
    _report: LoadReport

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show the options that a constructor passes on in its signature, where configs look for them."""
        super().__init_subclass__(**kwargs)
        shown: dict[str, inspect.Parameter] = {}
        for owner in cls.__mro__:
            if "__init__" in vars(owner):
                own = list(inspect.signature(vars(owner)["__init__"]).parameters.values())[1:]
                new = [p for p in own if p.name not in (*shown, *cls.settled) and p.kind is not p.VAR_KEYWORD]
                shown |= {p.name: p for p in new}
                if all(p.kind is not p.VAR_KEYWORD for p in own):
                    break
        cls.__signature__ = inspect.Signature(sorted(shown.values(), key=lambda p: p.kind))  # type: ignore[attr-defined]

    def make_splits(self, tokenizer: Tokenizer | None, report: LoadReport) -> dict[str, Examples]:
        """Read or make `train`, `validation` and `test`, or some of them.

        Args:
            tokenizer: of the denoiser that will read them; None: that of the data.
            report: receives the counts.
        """
        raise NotImplementedError

    def splits(self, tokenizer: Tokenizer | None = None) -> dict[str, Examples]:
        """The splits, by their names `train`, `validation`, `test`; made once for a tokeniser.

        Args:
            tokenizer: of the denoiser that will read them; it goes before that of the data. When left out, the
                splits are those made last, else made with `self.tokenizer`, else with one built from training rows.

        Raises:
            UserError: they cannot be read, or a split is empty.
        """
        if self._splits is None or (tokenizer is not None and tokenizer is not self._first.tokenizer):
            report = LoadReport()
            self._splits, self._report = self.make_splits(tokenizer, report), report
            report.kept.update({name: len(rows) for name, rows in self._splits.items()})
        return self._splits

    def grade(self, texts: Sequence[str], references: Sequence[str]) -> Tensor:
        """Which texts are right: float64 [N]."""
        return self._first.grade(texts, references)

    _first = property(lambda self: next(iter(self.splits().values())))
    report = property(lambda self: self.splits() and self._report, doc="`LoadReport` of what was left out.")
    end_index = property(lambda self: self._first.end_index, doc="See `Examples`.")
    vocab_size = property(lambda self: self._first.tokenizer.vocab_size, doc="Number of token ids, MASK included.")
    mask_index = property(lambda self: self._first.tokenizer.mask_index, doc="Id of MASK.")
    separator_index = property(lambda self: None, doc="Id of the token that ends every prompt, if one does.")

    @property
    def length(self) -> int:
        """Widest canvas of any split, tokens."""
        return max(rows.batch.tokens.shape[1] for rows in self.splits().values())

    @property
    def prompt_length(self) -> int:
        """Columns before the first one that any row has to reveal."""
        return min(rows.batch.prefix for rows in self.splits().values())


class Row(NamedTuple):
    """A row of text.

    Attributes:
        text: the response; with `hidden`, a whole text.
        prompt: given before it; None: none.
        hidden: the characters of the text that are to be revealed; None: all of them.
        answer: reference; None: the text itself.
        line: of its file.
        name: if it has one.
    """

    text: str
    prompt: str | None = None
    hidden: Sequence[Span] | None = None
    answer: str | None = None
    line: int = 0
    name: str = ""


class TextData(DataSet):
    """Rows of text; a subclass defines `make_rows`.

    Args:
        tokenizer_from: folder or hub name of a Hugging Face tokeniser, for a denoiser that is yet to be trained; that
            of a trained denoiser goes first. Built from training rows when left out.
        max_prompt: longest prompt, tokens, its separator included.
        max_length: longest response (or text with holes), tokens, its end included.
        canvas: fill responses up to so many positions with ends.
        separator: end every prompt with an end token, which tells a denoiser where the response begins; None: as is
            usual for the data.
        grade: says what is right, such as `exact_match`, `orderppl.data.answers.flexible_match` or
            `my_module.my_function`, called with texts and references; None: as is usual for the data.
        on_bad: a bad row stops the run ("error"), or is left out and counted ("report"); None: as is usual for it.

    Raises:
        UserError: a setting out of range.
    """

    usual_grade: ClassVar[Any] = staticmethod(same_text)
    usual_separator = False
    usual_on_bad: Literal["error", "report"] = "error"
    ends = True  # responses end with a token of their own: their length is not known

    def __init__(
        self,
        *,
        tokenizer_from: str | None = None,
        max_prompt: int | None = None,
        max_length: int | None = None,
        canvas: int | None = None,
        separator: bool | None = None,
        grade: Callable[..., Any] | None = None,
        on_bad: Literal["error", "report"] | None = None,
    ) -> None:
        at_least(1, max_prompt=max_prompt, max_length=max_length, canvas=canvas)
        if canvas is not None and not self.ends:
            raise UserError("canvas", "the rows have no ends to fill it up with", "leave it out")
        if grade is not None and not callable(grade):
            raise UserError("grade", f"{grade!r} is no function", "give one, such as orderppl.data.exact_match")
        self.on_bad = one_of("on_bad", on_bad or self.usual_on_bad, "error", "report")
        self.separator = self.usual_separator if separator is None else separator
        self.max_prompt, self.max_length, self.canvas = max_prompt, max_length, canvas
        self._grade, self.tokenizer_from = grade or self.usual_grade, tokenizer_from

    def make_rows(self, report: LoadReport) -> dict[str, list[Row]]:
        """The rows of every split."""
        raise NotImplementedError

    def build_tokenizer(self, rows: Iterable[Row]) -> Tokenizer:
        """A small vocabulary from training rows."""
        return WordTokenizer.build(texts_of(rows))

    def spelling(self, row: Row, tokenizer: Tokenizer) -> Row:
        """The row as a tokeniser wants it to be written."""
        return row

    def encode(self, text: str, tokenizer: Tokenizer) -> list[int]:
        """Token ids of a prompt or a response, without its ends."""
        return tokenizer.encode(text)

    def num_ends(self, prompt: int, response: int) -> int:
        """End tokens behind a response, from the numbers of tokens."""
        return max((self.canvas or 0) - response, 1)

    def source_of(self, split: str) -> str:
        """Where the rows of a split come from, for messages."""
        return split

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The one that was asked for."""
        return None if self.tokenizer_from is None else load_tokenizer(self.tokenizer_from)

    separator_index = property(
        lambda self: self._first.tokenizer.eos_index if self.separator else None,
        doc="Id of the token that ends every prompt, if one does.",
    )

    def make_splits(self, tokenizer: Tokenizer | None, report: LoadReport) -> dict[str, Examples]:
        """Turn the rows into tokens; see `DataSet`."""
        rows = self.make_rows(report)
        reader = tokenizer or self.tokenizer or self.build_tokenizer(next(iter(rows.values())))
        encoded = {split: list(self._encoded(split, rows[split], reader, report)) for split in rows}
        for split, sequences in encoded.items():
            if not sequences:
                raise UserError(split, f"no row is left ({report.worst()})", "raise max_prompt or max_length")
        width = max(len(sequence.left) for part in encoded.values() for sequence in part)
        return {split: self._examples(part, width, reader) for split, part in encoded.items()}

    def _encoded(self, split: str, rows: list[Row], tokenizer: Tokenizer, report: LoadReport) -> Iterator[_Sequence]:
        for number, row in enumerate(rows, 1):
            try:
                yield self._encode(self.spelling(row, tokenizer), tokenizer)
            except BadRow as bad:
                report.reject(bad.at(self.source_of(split), row.line or number), self.on_bad)

    def _encode(self, row: Row, tokenizer: Tokenizer) -> _Sequence:
        begin, close = tokenizer.frame
        left = [] if row.prompt is None else self.encode(row.prompt, tokenizer)
        if left and self.separator:
            left.append(tokenizer.eos_index)
        if row.hidden is None:
            ids = self.encode(row.text, tokenizer)
            if self.ends:
                ids, close = ids + [tokenizer.eos_index] * self.num_ends(len(left), len(ids)), ()
            latent = bytes([True] * len(ids))
        else:
            ids, spans = tokenizer.encode_with_spans(row.text)
            latent = bytes(any(_touches(span, hole) for hole in row.hidden) for span in spans)
        parts = ("response", ids, row.text, "max_length"), ("prompt", left, row.prompt, "max_prompt")
        for name, part, text, option in parts:
            limit = getattr(self, option)
            if limit is not None and len(part) > limit:
                remedy = f"raise {option}, or leave such rows out by on_bad=report"
                detail = f"{len(part)} tokens, limit {limit}: {text}"
                raise BadRow(f"{name} is longer than the canvas", detail, remedy)
            if not part and text is not None:
                raise BadRow(f"{name} is empty", repr(text), "remove the row")
        if not any(latent):
            raise BadRow("nothing is to be revealed", row.text)
        return _Sequence([*begin, *left], [*ids, *close], latent + bytes(len(close)), row)

    def _examples(self, sequences: Sequence[_Sequence], width: int, tokenizer: Tokenizer) -> Examples:
        left, has_left = padded([s.left for s in sequences], tokenizer.pad_index, width)
        right, has_right = padded([s.right for s in sequences], tokenizer.pad_index)
        latent, _ = padded([s.latent for s in sequences], 0)
        given = torch.cat([has_left, has_right & ~latent.bool()], 1)
        batch = Batch(torch.cat([left, right], 1), torch.cat([has_left, has_right], 1), given)
        rows = [sequence.row for sequence in sequences]
        has_holes = rows[0].hidden is not None
        return Examples(
            batch,
            tokenizer,
            self._grade,
            tokenizer.eos_index if self.ends and not has_holes else None,
            answers=[str(row.answer) for row in rows] if rows[0].answer is not None else None,
            names=[row.name for row in rows] if rows[0].name else None,
            lines=[row.line for row in rows] if rows[0].line else None,
            whole=has_holes,
        )


class RowData(TextData):
    """Rows of text from files or the hub; a subclass defines `read` and `row`.

    Args:
        train: file of training rows.
        validation: file of validation rows; None: a share of the training rows.
        test: file of held-out rows; None: a share of the training rows.
        seed: of the draw of shares, by a hash of the row: equal rows fall together.
        test_share: share of the training rows held out without a test file; 0: none; None: as is usual for the data.
        validation_share: the same for validation.
        options: see `TextData`.

    Raises:
        UserError: no file, or a share out of range.
    """

    what = "rows"
    usual_shares = (0.1, 0.1)

    def __init__(
        self,
        train: str | None = None,
        *,
        validation: str | None = None,
        test: str | None = None,
        seed: int = 0,
        test_share: float | None = None,
        validation_share: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        given = zip(SPLITS, (train, validation, test), strict=True)
        self.sources = {split: str(source) for split, source in given if source is not None}
        if not self.sources:
            raise UserError("train", f"no file of {self.what}", "give one")
        self.seed, self.shares, room = seed, dict[str, float](), 1.0
        for split, share, usual in zip(SPLITS[:0:-1], (test_share, validation_share), self.usual_shares, strict=True):
            share = usual if share is None else share
            if not 0 <= share < room:
                raise UserError(f"{split}_share", f"{share} is not in [0, {room:g})", "leave rows to train on")
            self.shares[split], room = share, room - share

    def read(self, source: str) -> Iterable[Record]:
        """What stands in a file, row by row."""
        raise NotImplementedError

    def row(self, record: Mapping[str, Any]) -> Row:
        """One row; raises `BadRow` where it is none."""
        raise NotImplementedError

    def source_of(self, split: str) -> str:
        """The file of the rows of a split."""
        return self.sources.get(split) or self.sources["train"]

    def key(self, row: Row) -> str:
        """What two rows share if they are one and the same."""
        return (row.prompt or "") + row.text

    def make_rows(self, report: LoadReport) -> dict[str, list[Row]]:
        """Read the files, and draw what they do not hold; no two splits share a row."""
        report.source = ", ".join(self.sources.values())
        parts = {split: list(self._read(source, report)) for split, source in self.sources.items()}
        for held_out, split in (("test", "train"), ("test", "validation"), ("validation", "train")):
            taken = {self.key(row) for row in parts.get(held_out, ())}
            for row in parts.get(split, ()):
                if self.key(row) in taken:
                    bad = BadRow(f"also in the {held_out} split", row.name or self.key(row))
                    report.reject(bad.at(self.sources[split], row.line))
            if split in parts:
                parts[split] = [row for row in parts[split] if self.key(row) not in taken]
        shares = {split: share for split, share in self.shares.items() if share and split not in parts}
        if "train" in parts:
            bounds = list(zip(shares, accumulate(shares.values()), strict=True))
            drawn: dict[str, list[Row]] = {split: [] for split in ("train", *shares)}
            for row in parts["train"]:
                place = hash_fraction(self.key(row), self.seed)
                drawn[next((split for split, bound in bounds if place < bound), "train")].append(row)
            parts |= drawn
        for split, rows in parts.items():
            if not rows:
                remedy = f"give more {self.what}, or another share or seed"
                raise UserError(split, f"the {split} split of {report.source} is empty ({report.worst()})", remedy)
        return {split: parts[split] for split in SPLITS if split in parts}

    def _read(self, source: str, report: LoadReport) -> Iterator[Row]:
        for line, record in self.read(source):
            report.read[Path(source).name] += 1
            try:
                if isinstance(record, BadRow):
                    raise record
                yield self.row(record)._replace(line=line)
            except BadRow as bad:
                report.reject(bad.at(source, line), self.on_bad)


class _Sequence(NamedTuple):
    left: list[int]  # before the response: given
    right: list[int]
    latent: bytes  # of `right`: 1 where it is to be revealed
    row: Row


def texts_of(rows: Iterable[Row]) -> Iterator[str]:
    """Prompts and texts."""
    return (text for row in rows for text in (row.prompt, row.text) if text is not None)


def hash_fraction(text: str, seed: int = 0) -> float:
    """Map a text to [0, 1) by SHA-256, the same on every machine: the rule by which splits are drawn."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{text}".encode()).digest()[:7], "big") / 2**56


def different(
    draw: Callable[[int], T | None], count: int, seen: set[T], *, split: str, what: str, remedy: str, tries: int = 50
) -> Iterator[T]:
    """Draws of which no two are the same, one after another.

    Args:
        draw: number of those so far -> something to tell draws apart by; None: it is not wanted.
        count: how many.
        seen: those that there are already; it grows.
        split: that they are for.
        what: they are, in the plural.
        remedy: beside fewer rows.
        tries: draws in vain for each one, and 1,000 more, before it is given up.

    Raises:
        UserError: there are not that many, or they are hard to find.
    """
    found = failures = 0
    while found < count:
        drawn = draw(found)
        if drawn is None or drawn in seen:
            failures += 1
            if failures > tries * count + 1000:
                problem = f"only {found} different {what} were found where {count} are needed"
                raise UserError(split, problem, f"ask for fewer rows, or {remedy}")
            continue
        seen.add(drawn)
        found += 1
        yield drawn


def at_least(least: float, **settings: float | None) -> None:
    """Refuse numbers that are too small; None passes."""
    for name, value in settings.items():
        if value is not None and value < least:
            raise UserError(name, f"{value} is too small", f"give at least {least}")


def one_of(name: str, value: Any, *known: Any) -> Any:
    """The value, if it is one of those known."""
    if value not in known:
        raise UserError(name, f"{value!r} is unknown", f"use {', '.join(map(str, known[:-1]))} or {known[-1]}")
    return value


def _touches(span: Span, hole: Span) -> bool:
    inside = hole[0] < span[0] < hole[1]  # a token without characters of its own
    return inside if span[0] == span[1] else max(span[0], hole[0]) < min(span[1], hole[1])


def padded(lists: Sequence[Sequence[int]], pad: int, on_left: int | None = None) -> tuple[Tensor, Tensor]:
    """Lists of ids below each other, int64 [N, W], and where they stand, bool [N, W].

    Args:
        lists: N of them.
        pad: id at padding.
        on_left: pad on the left, to this width; None: on the right, to the longest.
    """
    sizes = torch.tensor([len(ids) for ids in lists])[:, None]
    place = torch.arange(int(sizes.max()) if on_left is None else on_left)
    mask = place < sizes if on_left is None else place >= on_left - sizes
    values = torch.full(mask.shape, pad, dtype=torch.int64)
    # row-major order of the mask is the order of the ids: one copy instead of one per row
    values[mask] = torch.tensor(list(chain.from_iterable(lists)), dtype=torch.int64)
    return values, mask
