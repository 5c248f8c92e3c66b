"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168) as full text, as equation chains or as programs to execute."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np

from orderppl.data.answers import exact_match, flexible_match
from orderppl.data.dataset import SPLITS, Row, RowData, at_least, one_of, texts_of
from orderppl.data.reading import hub_data, json_lines, text_lines, text_of
from orderppl.data.report import BadRow, LoadReport, Record
from orderppl.data.tokenizers import Tokenizer, WordTokenizer
from orderppl.errors import UserError

Form = Literal["full", "equations", "programs", "smdm"]

ANNOTATION = re.compile(r"<<(.*?)>>")
EXPRESSION = re.compile(r"[0-9.+\-*/() ]+")
ANSWER = re.compile(r"-?(?:[0-9]{1,30}\.?[0-9]{0,30}|\.[0-9]{1,30})")
NUMERAL = re.compile(r"[0-9]+\.?[0-9]*|\.[0-9]+")
OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
SEGMENT = re.compile(r"\n(?=Answer: )")  # where the next one begins
SMDM_CANVAS = 256
DRAWS, ROUNDS = 1024, 200  # of constants for a structure, and how often before it is given up


class Gsm8k(RowData):
    """GSM8K, or GSM8K-Aug: questions, or programs, and their equation chains.

    Local files are `train.jsonl` and `test.jsonl` (keys `question`, `answer`) or the `question||chain #### answer`
    lines of GSM8K-Aug (Deng et al. 2023, arXiv 2311.01460) in `train.txt` and `test.txt`.

    Forms:
        full: question -> answer text.
        equations: question -> `<<a*b=c>> <<...>> #### n`.
        programs: `3 * 20 ; r1 - 15` -> `3 * 20 = 60 ; 60 - 15 = 45 # 45`; rows with other numbers are left out.
        smdm: as SMDM writes GSM8K-Aug (Nie et al. 2024, arXiv 2410.18514). A problem is two examples, `Question: ...`
            -> `Answer: <<a*b=c>> ` and `Question: ...`, `Answer: ...` -> `#### n` with a line break. Each of these
            segments is read by itself and starts with the begin token of the tokeniser, if it has one. Ends, all to be
            revealed, fill prompt and response up to `canvas` positions (256 when left out); longer rows are left out.
            Prompts as texts have a line for each segment. Held-out splits have the first example alone, and the last
            number of a text is its answer.

    Args:
        source: folder, single file, or hub name (GSM8K or GSM8K-Aug).
        form: see above.
        max_number: programs: largest integer; also the largest number token.
        max_equations: programs: most equations.
        augment: programs: training rows made with constants drawn again.
        min_count: words seen less often in training become unknown.
        options: see `RowData`.

    Raises:
        UserError: the source cannot be read, or a setting is wrong.
    """

    usual_grade = staticmethod(exact_match)
    usual_on_bad = "report"
    usual_separator = True
    usual_shares = (0.1, 0.05)
    what = "problems"

    settled = ("train",)

    def __init__(
        self,
        source: str = "openai/gsm8k",
        form: Form = "programs",
        max_number: int = 99,
        max_equations: int = 4,
        augment: int = 0,
        min_count: int = 1,
        **options: Any,
    ) -> None:
        if form == "smdm":
            usual = {"canvas": SMDM_CANVAS, "separator": False, "grade": flexible_match}
            options |= {name: value for name, value in usual.items() if options.get(name) is None}
        super().__init__(source, **options)
        self.source, self.form = str(source), one_of("form", form, "full", "equations", "programs", "smdm")
        at_least(1, max_number=max_number, max_equations=max_equations)
        at_least(0, augment=augment, min_count=min_count)
        self.max_number, self.max_equations = max_number, max_equations
        self.augment, self.min_count = augment, min_count

    def build_tokenizer(self, rows: Iterable[Row]) -> Tokenizer:
        """One token per number."""
        return WordTokenizer.build(texts_of(rows), "numbers", max(self.max_number, 9), self.min_count)

    def make_rows(self, report: LoadReport) -> dict[str, list[Row]]:
        """Read the rows, and make more of them."""
        self._find_sources()
        rows = super().make_rows(report)
        report.source = self.source
        if self.augment and self.form == "programs":
            held_out = [row for split in rows if split != "train" for row in rows[split]]
            made = augment_programs(rows["train"], self.augment, self.seed, held_out, self.max_number)
            rows["train"] = [*rows["train"], *made]
        if self.form == "smdm":
            rows = {split: [part for row in rows[split] for part in _segments(row, split == "train")] for split in rows}
        return rows

    def encode(self, text: str, tokenizer: Tokenizer) -> list[int]:
        """Token ids; smdm: of every segment by itself, behind a begin token."""
        if self.form != "smdm":
            return super().encode(text, tokenizer)
        begin = [] if tokenizer.bos_index is None else [tokenizer.bos_index]
        return [index for part in SEGMENT.split(text) for index in (*begin, *tokenizer.encode(part))]

    def num_ends(self, prompt: int, response: int) -> int:
        """End tokens behind a response; smdm: up to the canvas, which the prompt counts for."""
        if self.form != "smdm":
            return super().num_ends(prompt, response)
        if prompt + response > (self.canvas or 0):
            detail = f"{prompt} + {response} tokens, canvas {self.canvas}"
            raise BadRow("prompt and response are longer than the canvas", detail, "raise canvas")
        return (self.canvas or 0) - prompt - response

    def _find_sources(self) -> None:
        path = Path(self.source)
        self._hub = not path.exists()
        if self._hub:
            subset = "main" if path.name == "gsm8k" else None
            self._splits_on_hub = hub_data(self.source, subset, None)
            self.sources = {split: split for split in SPLITS if split in self._splits_on_hub}
        elif path.is_file():
            self.sources = {next((s for s in ("test", "validation") if path.stem.startswith(s)), "train"): self.source}
        else:
            files = {split: [path / f"{split}{end}" for end in (".jsonl", ".txt")] for split in SPLITS}
            found = {split: next((file for file in pair if file.is_file()), None) for split, pair in files.items()}
            self.sources = {split: str(file) for split, file in found.items() if file is not None}
            if "train" not in self.sources:
                remedy = "give a folder with train.jsonl and test.jsonl, or one such file"
                raise UserError("source", f"{self.source} has no train.jsonl", remedy)

    def read(self, source: str) -> Iterable[Record]:
        """Rows with `question` and `answer`."""
        if self._hub:
            return enumerate(map(dict, self._splits_on_hub[source]), 1)
        return _chain_lines(source) if source.endswith(".txt") else json_lines(source)

    def key(self, row: Row) -> str:
        """Problems are told apart by their prompt."""
        return row.prompt or ""

    def row(self, record: Mapping[str, Any]) -> Row:
        """One problem in the form that was asked for."""
        question = text_of(record, "question").strip()
        text = text_of(record, "answer").strip()
        if isinstance(record.get("steps"), list):  # GSM8K-Aug keeps the chain in a column of its own
            text = " ".join([*map(str, record["steps"]), "####", text])
        _, mark, tail = text.rpartition("####")
        answer = tail.strip().replace(",", "")
        if not mark or not ANSWER.fullmatch(answer):
            raise BadRow("no number after ####", (mark + tail) or text[-60:])
        if self.form == "full":
            return Row(text, question, answer=answer)
        if self.form == "smdm":
            return Row(text, " ".join(question.split("\n")), answer=answer)
        equations = [_equation(text) for text in ANNOTATION.findall(text)]
        if not equations:
            raise BadRow("no equations", text)
        if self.form == "equations":
            chain = " ".join(f"<<{left}={right}>>" for left, right in equations)
            return Row(f"{chain} #### {answer}", question, answer=answer)
        return self._program(equations, answer)

    def _program(self, equations: list[tuple[str, str]], answer: str) -> Row:
        """The programs form; an operand equal to an earlier result is a reference to the latest such result."""
        if len(equations) > self.max_equations:
            raise BadRow(f"more than {self.max_equations} equations", len(equations))
        prompts: list[str] = []
        executed: list[str] = []
        results: list[str] = []
        for left, right in equations:
            text = f"{left}={right}"
            numerals = [*NUMERAL.findall(left), right]
            if any(not n.isdecimal() for n in numerals):
                raise BadRow("a number is not a whole number >= 0", text)
            if any(int(n) > self.max_number for n in numerals):
                raise BadRow(f"a number is above {self.max_number}", text)
            if len(numerals) < 3:
                raise BadRow("an equation has no operator", text)
            if evaluate_expression(left) != int(right):
                raise BadRow("an equation is false", text)
            pieces = [str(int(p)) if p.isdecimal() else p for p in re.findall(r"\d+|[^\d\s]", left)]
            result = str(int(right))
            named = {value: f"r{index + 1}" for index, value in enumerate(results)}  # later results win
            prompts.append(" ".join(named.get(piece, piece) for piece in pieces))
            executed.append(" ".join(pieces) + " = " + result)
            results.append(result)
        if Fraction(answer) != int(results[-1]):
            raise BadRow("the last result is not the answer", f"{equations[-1][1]} but #### {answer}")
        return Row(f"{' ; '.join(executed)} # {results[-1]}", " ; ".join(prompts), answer=answer)


def _segments(row: Row, both: bool) -> Iterator[Row]:
    """The examples of a problem in the form of SMDM: question to chain, and question and chain to answer."""
    chain, mark, tail = row.text.rpartition("####")
    question, chain = f"Question: {row.prompt}", f"Answer: {chain}"
    yield row._replace(prompt=question, text=chain)
    if both:
        yield row._replace(prompt=f"{question}\n{chain}", text=f"{mark}{tail}\n")


def _chain_lines(path: str) -> Iterator[Record]:
    """The lines of GSM8K-Aug."""
    for line, text in text_lines(path):
        if isinstance(text, str):
            question, mark, answer = text.partition("||")
            yield line, {"question": question, "answer": answer} if mark else BadRow("no question||answer", text)
        else:
            yield line, text


def _equation(text: str) -> tuple[str, str]:
    """Left side and result of an annotation, checked to be an expression and a number."""
    left, _, right = text.partition("=")
    try:
        evaluate_expression(left)
    except ValueError:
        raise BadRow("equation does not parse", text) from None
    if not ANSWER.fullmatch(right):
        raise BadRow("equation does not parse", text)
    return left, right


def evaluate_expression(expression: str) -> Fraction:
    """Exact value of an arithmetic expression over `0-9 . + - * / ( )`.

    Raises:
        ValueError: it is no such expression, or divides by zero.
    """
    if not EXPRESSION.fullmatch(expression):
        raise ValueError(f"{expression!r} has other characters than 0-9 . + - * / ( )")
    try:
        return Fraction(_walk(_parse(expression), {}))
    except ZeroDivisionError as error:
        raise ValueError(f"{expression!r} divides by zero") from error


def _parse(expression: str) -> ast.expr:
    """Syntax tree of an arithmetic expression; `ValueError` when it is none."""
    plain = re.sub(r"(?<![\d.])0+(?=\d)", "", expression)  # Python refuses leading zeros
    if len(plain) > 300:
        raise ValueError("expression is longer than 300 characters")
    try:
        return ast.parse(plain.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{expression!r} is not an arithmetic expression") from error


def _walk(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """Value of a tree of + - * / over numerals (exact fractions) and `names` (fractions or arrays)."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_walk(node.left, names), _walk(node.right, names))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = _walk(node.operand, names)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    raise ValueError("only + - * / ( ) and numerals may occur")


class _Structure:
    """A program with its constants taken out: `c1 * c2 ; r1 - c3`."""

    def __init__(self, prompt: str) -> None:
        self.equations: list[list[str]] = []
        self.constants: list[int] = []
        for equation in prompt.split(" ; "):
            pieces = []
            for piece in equation.split():
                if piece.isdecimal():
                    self.constants.append(int(piece))
                    piece = f"c{len(self.constants)}"
                pieces.append(piece)
            self.equations.append(pieces)
        self.key = " ; ".join(" ".join(pieces) for pieces in self.equations)
        self.trees = [_parse(" ".join(pieces)) for pieces in self.equations]

    def draw(self, pool: np.ndarray, max_number: int, rng: np.random.Generator) -> Iterator[Row]:
        """Yield those of some draws of the constants whose results are whole and in 0..max_number."""
        shape = (DRAWS, len(self.constants))
        # half as frequent as in real problems, half uniform: real test numbers, and all of the tables
        drawn = np.where(rng.random(shape) < 0.5, rng.choice(pool, shape), rng.integers(1, max_number + 1, shape))
        names: dict[str, Any] = {f"c{i + 1}": drawn[:, i].astype(np.float64) for i in range(shape[1])}
        good = np.ones(DRAWS, dtype=bool)
        with np.errstate(divide="ignore", invalid="ignore"):
            for index, tree in enumerate(self.trees):
                value = np.broadcast_to(np.asarray(_walk(tree, names), dtype=np.float64), DRAWS)
                # Exact: a quotient of whole numbers below 2^53 is a whole float only if it is whole, and what the
                # divisions of one equation leave behind is at least max_number^-divisions away from a whole number.
                good &= np.isfinite(value) & (value == np.floor(value)) & (value >= 0) & (value <= max_number)
                names[f"r{index + 1}"] = value
        for place in np.flatnonzero(good):
            text = {name: str(int(value[place])) for name, value in names.items()}
            results = [text[f"r{index + 1}"] for index in range(len(self.equations))]
            asked = (" ".join(text[p] if p[0] == "c" else p for p in equation) for equation in self.equations)
            done = (" ".join(text.get(p, p) for p in equation) for equation in self.equations)
            executed = " ; ".join(f"{left} = {result}" for left, result in zip(done, results, strict=True))
            yield Row(f"{executed} # {results[-1]}", " ; ".join(asked), answer=results[-1])


def augment_programs(
    rows: Sequence[Row], n: int, seed: int, held_out: Sequence[Row] = (), max_number: int = 99
) -> list[Row]:
    """Make `n` programs with the structure of real ones and constants drawn again.

    Structures are drawn as often as they occur in `rows`; one that cannot be filled is given up, and others are used
    more often. Every result is whole and in 0..max_number, constants are in 1..max_number, and neither the prompt nor
    the response equals one of a held-out row. The same row may be made twice.

    Args:
        rows: training rows of the programs form.
        n: rows to make.
        seed: fixes the result.
        held_out: validation and test rows.
        max_number: largest number.

    Returns:
        Shuffled rows; `line` is that of a real row of the same structure.

    Raises:
        UserError: no structure of `rows` can be filled.
    """
    rng = np.random.default_rng(seed)
    prompts, responses = {row.prompt for row in held_out}, {row.text for row in held_out}
    real = [_Structure(row.prompt or "") for row in rows]
    structures: dict[str, tuple[_Structure, int]] = {}
    for structure, row in zip(real, rows, strict=True):
        structures.setdefault(structure.key, (structure, row.line))
    keys = [structure.key for structure in real]
    pool = np.array([c for structure in real for c in structure.constants if 1 <= c <= max_number])
    made: list[Row] = []
    while len(made) < n:
        if not keys or not len(pool):
            remedy = "give more training rows or a larger max_number"
            raise UserError("augment", "no program can be filled with new constants", remedy)
        picked, quotas = np.unique(rng.choice(np.array(keys), n - len(made)), return_counts=True)
        for key, quota in zip(picked.tolist(), quotas.tolist(), strict=True):
            structure, line = structures[key]
            left = quota
            for attempt in range(ROUNDS + quota):
                for row in structure.draw(pool, max_number, rng):
                    if left and row.prompt not in prompts and row.text not in responses:
                        made.append(row._replace(line=line))
                        left -= 1
                if not left or (left == quota and attempt + 1 >= ROUNDS):
                    break
            if left == quota:
                keys = [other for other in keys if other != key]
    return [made[place] for place in rng.permutation(n)]
