"""Splits of sequences, ready for batches, and what every data set is."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from orderppl.config import Configurable
from orderppl.data.answers import Grade, same_text
from orderppl.data.reading import Record
from orderppl.data.report import BadRowError, LoadReport
from orderppl.data.tokenizers import Span, Tokenizer, WordTokenizer, load_tokenizer
from orderppl.errors import UserError
from orderppl.unmasking import Batch

OnBad = Literal["error", "report"]
SPLITS = ("train", "validation", "test")


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
        if self.answers is None and self.tokenizer is not None:
            return self.texts(self.batch.tokens)
        return self.answers

    def rows(self, index: Tensor | slice | Sequence[int]) -> Examples:
        """Some of the rows, by their numbers, a slice or bool [N]."""
        numbers = torch.arange(len(self))[index if isinstance(index, slice | Tensor) else list(index)]

        def of(values: list[Any] | None) -> list[Any] | None:
            return None if values is None else [values[number] for number in numbers.tolist()]

        kept = {name: of(getattr(self, name)) for name in ("answers", "names", "lines")}
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
        shown = (batch.attention_mask if self.whole else batch.latent).tolist()
        skip = len(self.tokenizer.frame[0]) if self.whole and self.tokenizer is not None else 0
        rows = zip(tokens.tolist(), shown, strict=True)
        return [self._text([token for token, is_shown in zip(*row, strict=True) if is_shown][skip:]) for row in rows]

    def _text(self, ids: list[int]) -> str:
        return " ".join(map(str, ids)) if self.tokenizer is None else self.tokenizer.decode(ids)

    def spell(self, token: int) -> str:
        """One token as text."""
        return str(token) if self.tokenizer is None else self.tokenizer.tokens[token]


class DataSet(Configurable):
    """What every data set is; a subclass says how its splits are made.

    Which rows a split has depends on the arguments of the constructor alone, never on a seed of training.
    """

    _splits: dict[str, Examples] | None = None
    _report: LoadReport

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show the options that a constructor passes on in its signature, where configs and `--help` look for them."""
        super().__init_subclass__(**kwargs)
        shown: dict[str, inspect.Parameter] = {}
        for owner in cls.__mro__:
            if "__init__" in vars(owner):
                own = list(inspect.signature(owner.__init__).parameters.values())[1:]
                shown = shown | {p.name: p for p in own if p.name not in shown and p.kind is not p.VAR_KEYWORD}
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

    @property
    def _first(self) -> Examples:
        return next(iter(self.splits().values()))

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The one that was asked for; None: that of the denoiser, or one built from training rows."""
        return None

    @property
    def report(self) -> LoadReport:
        """What was left out."""
        self.splits()
        return self._report

    def grade(self, texts: Sequence[str], references: Sequence[str]) -> Tensor:
        """Which texts are right: float64 [N]."""
        return self._first.grade(texts, references)

    @property
    def end_index(self) -> int | None:
        """Id that ends a response; None where its length is known."""
        return self._first.end_index

    @property
    def length(self) -> int:
        """Widest canvas of any split, tokens."""
        return max(rows.batch.tokens.shape[1] for rows in self.splits().values())

    @property
    def prompt_length(self) -> int:
        """Longest prompt of any split, tokens: responses begin at this column."""
        return 0

    @property
    def separator_index(self) -> int | None:
        """Id of the token that ends every prompt, if one does."""
        return None

    @property
    def vocab_size(self) -> int:
        """Number of token ids, MASK included."""
        assert self._first.tokenizer is not None
        return self._first.tokenizer.vocab_size

    @property
    def mask_index(self) -> int:
        """Id of MASK."""
        assert self._first.tokenizer is not None
        return self._first.tokenizer.mask_index


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
    hidden: tuple[Span, ...] | None = None
    answer: str | None = None
    line: int = 0
    name: str = ""


class TextData(DataSet):
    """Rows of text; a subclass says where they come from.

    Args:
        tokenizer: name of a Hugging Face tokeniser or a saved one (.json), for a denoiser that is yet to be trained;
            that of a trained denoiser goes first. Built from the training rows when left out.
        max_prompt: longest prompt, tokens, its separator included.
        max_length: longest response (or text with holes), tokens, its end included.
        canvas: fill responses up to so many positions with ends.
        separator: end every prompt with an end token, which tells a denoiser where the response begins.
        grade: function of texts and references that says what is right, such as `exact_match`, `flexible_match`,
            `same_text` or `my_module.my_function`.
        on_bad: a bad row stops the run ("error"), or is left out and counted ("report").

    Raises:
        UserError: a setting out of range.
    """

    default_grade: ClassVar[Grade] = staticmethod(same_text)
    default_on_bad: ClassVar[OnBad] = "error"
    ends = True  # responses end with a token of their own: their length is not known
    _prompt_length = 0

    def __init__(
        self,
        *,
        tokenizer: str | Tokenizer | None = None,
        max_prompt: int | None = None,
        max_length: int | None = None,
        canvas: int | None = None,
        separator: bool = False,
        grade: Callable[..., Tensor] | None = None,
        on_bad: OnBad | None = None,
    ) -> None:
        at_least(1, max_prompt=max_prompt, max_length=max_length, canvas=canvas)
        if canvas is not None and not self.ends:
            raise UserError("canvas", "the rows have no ends to fill it up with", "leave it out")
        if grade is not None and not callable(grade):
            raise UserError("grade", f"{grade!r} is no function", "give one, such as orderppl.data.exact_match")
        self.on_bad = one_of("on_bad", on_bad or self.default_on_bad, "error", "report")
        self.max_prompt, self.max_length, self.canvas, self.separator = max_prompt, max_length, canvas, separator
        self._grade: Grade = grade or self.default_grade
        self._tokenizer = tokenizer

    def make_rows(self, report: LoadReport) -> dict[str, list[Row]]:
        """The rows of every split."""
        raise NotImplementedError

    def build_tokenizer(self, rows: Iterable[Row]) -> Tokenizer:
        """A small vocabulary from training rows."""
        return WordTokenizer.build(text for row in rows for text in (row.prompt, row.text) if text is not None)

    def spelling(self, row: Row, tokenizer: Tokenizer) -> Row:
        """The row as a tokeniser wants it to be written."""
        return row

    def source_of(self, split: str) -> str:
        """Where the rows of a split come from, for messages."""
        return split

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The one that was asked for; None: that of the denoiser, or one built from training rows."""
        if isinstance(self._tokenizer, str | Path):
            self._tokenizer = load_tokenizer(self._tokenizer)
        return self._tokenizer

    @property
    def prompt_length(self) -> int:
        """Longest prompt of any split, tokens: responses begin at this column."""
        self.splits()
        return self._prompt_length

    @property
    def separator_index(self) -> int | None:
        """Id of the token that ends every prompt, if one does."""
        tokenizer = self._first.tokenizer
        return tokenizer.eos_index if self.separator and tokenizer is not None else None

    def make_splits(self, tokenizer: Tokenizer | None, report: LoadReport) -> dict[str, Examples]:
        """Turn the rows into tokens; see `DataSet`."""
        rows = self.make_rows(report)
        if tokenizer is None:
            tokenizer = self.tokenizer or self.build_tokenizer(next(iter(rows.values())))
        encoded = {split: list(self._encoded(split, rows[split], tokenizer, report)) for split in rows}
        for split, sequences in encoded.items():
            if not sequences:
                raise UserError(split, f"no row is left ({report.worst()})", "raise max_prompt or max_length")
        self._prompt_length = max(len(sequence.left) for part in encoded.values() for sequence in part)
        return {split: self._examples(part, tokenizer) for split, part in encoded.items()}

    def _encoded(
        self, split: str, rows: Iterable[Row], tokenizer: Tokenizer, report: LoadReport
    ) -> Iterator[_Sequence]:
        for number, row in enumerate(rows, 1):
            try:
                yield self._encode(self.spelling(row, tokenizer), tokenizer)
            except BadRowError as bad:
                settle(bad, self.on_bad, self.source_of(split), row.line or number, report)

    def _encode(self, row: Row, tokenizer: Tokenizer) -> _Sequence:
        """Tokens of a row, with the frame that the tokeniser's model expects.

        Raises:
            BadRowError: it is too long, or empty.
        """
        begin, close = tokenizer.frame
        if row.hidden is None:
            ids = tokenizer.encode(row.text)
            if self.ends:
                ids, close = ids + [tokenizer.eos_index] * max((self.canvas or 0) - len(ids), 1), ()
            latent = bytes([True] * len(ids))
        else:
            ids, spans = tokenizer.encode_with_spans(row.text)
            latent = bytes(any(_touches(span, hole) for hole in row.hidden) for span in spans)
        left = [] if row.prompt is None else tokenizer.encode(row.prompt)
        if left and self.separator:
            left.append(tokenizer.eos_index)
        for name, part, limit in (("response", ids, self.max_length), ("prompt", left, self.max_prompt)):
            text, option = (row.text, "max_length") if name == "response" else (row.prompt, "max_prompt")
            if limit is not None and len(part) > limit:
                detail = f"{len(part)} tokens, limit {limit}: {text}"
                remedy = f"raise {option}, or leave such rows out by on_bad=report"
                raise BadRowError(f"{name} is longer than the canvas", detail, remedy)
            if not part and text is not None:
                raise BadRowError(f"{name} is empty", repr(text), "remove the row")
        if not any(latent):
            raise BadRowError("nothing is to be revealed", row.text)
        return _Sequence([*begin, *left], [*ids, *close], latent + bytes(len(close)), row)

    def _examples(self, sequences: Sequence[_Sequence], tokenizer: Tokenizer) -> Examples:
        pad, rows = tokenizer.pad_index, [sequence.row for sequence in sequences]
        left, has_left = padded([s.left for s in sequences], pad, self._prompt_length)
        right, has_right = padded([s.right for s in sequences], pad)
        latent, _ = padded([s.latent for s in sequences], 0)
        batch = Batch(
            torch.cat([left, right], 1),
            torch.cat([has_left, has_right], 1),
            torch.cat([has_left, has_right & ~latent.bool()], 1),
        )
        return Examples(
            batch,
            tokenizer,
            self._grade,
            tokenizer.eos_index if self.ends and rows[0].hidden is None else None,
            answers=[str(row.answer) for row in rows] if rows[0].answer is not None else None,
            names=[row.name for row in rows] if rows[0].name else None,
            lines=[row.line for row in rows] if rows[0].line else None,
            whole=rows[0].hidden is not None,
        )


class RowData(TextData):
    """Rows of text from files or the hub; a subclass says how one is read.

    Args:
        train: file of training rows.
        validation: file of validation rows; None: a share of the training rows.
        test: file of held-out rows; None: a share of the training rows.
        seed: of the draw of shares, by a hash of the row: equal rows fall together.
        test_share: share of the training rows held out without a test file; 0: none.
        validation_share: the same for validation.
        options: see `TextData`.

    Raises:
        UserError: no file, or a share out of range.
    """

    what = "rows"

    def __init__(
        self,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        *,
        seed: int = 0,
        test_share: float = 0.1,
        validation_share: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        given = zip(SPLITS, (train, validation, test), strict=True)
        self.sources = {split: str(source) for split, source in given if source is not None}
        if not self.sources:
            raise UserError("train", f"no file of {self.what}", "give one")
        for name, share, room in (("test_share", test_share, 1.0), ("validation_share", validation_share, 1 - test_share)):
            if not 0 <= share < room:
                raise UserError(name, f"{share} is not in [0, {room:g})", "leave rows to train on")
        self.seed, self.shares = seed, {"test": test_share, "validation": validation_share}

    def read(self, source: str) -> Iterable[Record]:
        """What stands in a file, row by row."""
        raise NotImplementedError

    def row(self, record: Mapping[str, Any]) -> Row:
        """One row, or `BadRowError`."""
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
        for held_out, others in (("test", ("train", "validation")), ("validation", ("train",))):
            taken = {self.key(row) for row in parts.get(held_out, ())}
            for split in [other for other in others if taken and other in parts]:
                for row in parts[split]:
                    if self.key(row) in taken:
                        bad = BadRowError(f"also in the {held_out} split", row.name or self.key(row))
                        report.reject(Path(self.sources[split]).name, row.line, bad)
                parts[split] = [row for row in parts[split] if self.key(row) not in taken]
        shares = {split: share for split, share in self.shares.items() if share and split not in parts}
        if "train" in parts and shares:
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
        file = Path(source).name
        for line, record in self.read(source):
            report.read[file] += 1
            try:
                if isinstance(record, BadRowError):
                    raise record
                yield self.row(record)._replace(line=line)
            except BadRowError as bad:
                settle(bad, self.on_bad, source, line, report)


class _Sequence(NamedTuple):
    left: list[int]  # before the response: given
    right: list[int]
    latent: bytes  # of `right`: 1 where it is to be revealed
    row: Row


def settle(bad: BadRowError, on_bad: OnBad, source: str, line: int, report: LoadReport) -> None:
    """Stop the run for a bad row, or leave it out and count it.

    Raises:
        UserError: names file and line.
    """
    if on_bad == "error" and bad.wanted:
        raise UserError(f"{source}:{line}", f"{bad.reason}: {bad.detail}", bad.remedy) from bad
    report.reject(Path(source).name, line, bad)


def hash_fraction(text: str, seed: int = 0) -> float:
    """Map a text to [0, 1) by SHA-256, the same on every machine: the rule by which splits are drawn."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{text}".encode()).digest()[:7], "big") / 2**56


def at_least(least: float, **settings: float | None) -> None:
    """Refuse numbers that are too small; None passes.

    Raises:
        UserError: names the setting.
    """
    for name, value in settings.items():
        if value is not None and value < least:
            raise UserError(name, f"{value} is too small", f"give at least {least}")


def one_of(name: str, value: Any, *known: Any) -> Any:
    """The value, if it is one of those known.

    Raises:
        UserError: it is not.
    """
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
