"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168) as full text, as equation chains or as programs to execute.

Local files are `train.jsonl` and `test.jsonl` (keys `question`, `answer`) or the `question||chain #### answer` lines of
GSM8K-Aug (Deng et al. 2023, arXiv 2311.01460) in `train.txt` and `test.txt`; hub names go through `datasets`.
"""

from __future__ import annotations

import ast
import json
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset, DatasetDict, Features, Value, load_dataset

from orderppl.data.report import LoadReport, hash_fraction
from orderppl.errors import UserError, first_line

Form = Literal["full", "equations", "programs"]

FEATURES = Features(
    {"prompt": Value("string"), "response": Value("string"), "answer": Value("string"), "line": Value("int64")}
)
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


class _BadRowError(Exception):
    """Why a row has no such form: a reason shared by many rows, and the text at fault."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def _parse(expression: str) -> ast.expr:
    """Syntax tree of an arithmetic expression; `ValueError` when it is none."""
    plain = re.sub(r"(?<![\d.])0+(?=\d)", "", expression)  # Python refuses leading zeros
    if len(plain) > 300:
        raise ValueError("expression is longer than 300 characters")
    try:
        return ast.parse(plain.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{expression!r} is not an arithmetic expression") from error


def _walk(node: ast.expr, names: dict[str, Any]) -> Any:
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


def _equations(text: str) -> list[tuple[str, str]]:
    """The annotations of an answer as (left side, result), each checked to be an expression and a number."""
    found = ANNOTATION.findall(text)
    if not found:
        raise _BadRowError("no equations", text)
    pairs = []
    for equation in found:
        left, _, right = equation.partition("=")
        try:
            evaluate_expression(left)
        except ValueError:
            raise _BadRowError("equation does not parse", equation) from None
        if not ANSWER.fullmatch(right):
            raise _BadRowError("equation does not parse", equation)
        pairs.append((left, right))
    return pairs


def _answer(text: str) -> str:
    """The reference answer: what follows the last ####, commas removed."""
    _, mark, tail = text.rpartition("####")
    answer = tail.strip().replace(",", "")
    if not mark or not ANSWER.fullmatch(answer):
        raise _BadRowError("no number after ####", (mark + tail) or text[-60:])
    return answer


def _program(equations: list[tuple[str, str]], answer: str, limits: tuple[int, int, int | None]) -> tuple[str, str]:
    """Prompt and response of the programs form.

    An operand equal to an earlier result is a reference to the latest such result.
    """
    max_number, max_equations, max_operands = limits
    if len(equations) > max_equations:
        raise _BadRowError(f"more than {max_equations} equations", str(len(equations)))
    prompts: list[str] = []
    executed: list[str] = []
    results: list[str] = []
    for left, right in equations:
        text = f"{left}={right}"
        numerals = [*NUMERAL.findall(left), right]
        if any(not n.isdecimal() for n in numerals):
            raise _BadRowError("a number is not a whole number >= 0", text)
        if any(int(n) > max_number for n in numerals):
            raise _BadRowError(f"a number is above {max_number}", text)
        if len(numerals) < 3:
            raise _BadRowError("an equation has no operator", text)
        if max_operands is not None and len(numerals) - 1 > max_operands:
            raise _BadRowError(f"more than {max_operands} operands", text)
        if evaluate_expression(left) != int(right):
            raise _BadRowError("an equation is false", text)
        pieces = [str(int(p)) if p.isdecimal() else p for p in re.findall(r"\d+|[^\d\s]", left)]
        result = str(int(right))
        named = {value: f"r{index + 1}" for index, value in enumerate(results)}  # later results win
        prompts.append(" ".join(named.get(piece, piece) for piece in pieces))
        executed.append(" ".join(pieces) + " = " + result)
        results.append(result)
    if Fraction(answer) != int(results[-1]):
        raise _BadRowError("the last result is not the answer", f"{equations[-1][1]} but #### {answer}")
    return " ; ".join(prompts), " ; ".join(executed) + " # " + results[-1]


def _row(row: dict[str, Any], line: int, form: Form, limits: tuple[int, int, int | None]) -> dict[str, str | int]:
    """One record of the asked form."""
    missing = [key for key in ("question", "answer") if not isinstance(row.get(key), str) or not row[key].strip()]
    if missing:
        raise _BadRowError(f"no text in column {missing[0]!r}", json.dumps(row, default=str))
    question, text = row["question"].strip(), row["answer"].strip()
    if isinstance(row.get("steps"), list):  # GSM8K-Aug keeps the chain in a column of its own
        text = " ".join([*map(str, row["steps"]), "####", text])
    answer = _answer(text)
    if form == "full":
        return {"prompt": question, "response": text, "answer": answer, "line": line}
    equations = _equations(text)
    if form == "equations":
        chain = " ".join(f"<<{left}={right}>>" for left, right in equations)
        return {"prompt": question, "response": f"{chain} #### {answer}", "answer": answer, "line": line}
    prompt, response = _program(equations, answer, limits)
    return {"prompt": prompt, "response": response, "answer": answer, "line": line}


def _read_file(path: Path, report: LoadReport) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a local file with their line numbers; unreadable lines go to the report."""
    with path.open("rb") as file:
        for line, raw in enumerate(file, 1):
            report.read[path.name] += 1
            try:
                text = raw.decode("utf-8")
                if path.suffix == ".txt":
                    question, mark, answer = text.partition("||")
                    row: Any = {"question": question, "answer": answer} if mark else None
                else:
                    row = json.loads(text) if text.strip() else None
            except UnicodeDecodeError as error:
                report.reject(path.name, line, "not UTF-8", error.reason)
                continue
            except json.JSONDecodeError as error:
                report.reject(path.name, line, "not JSON", f"{error.msg} in {text.strip()}")
                continue
            if not isinstance(row, dict):
                reason = (
                    "empty line"
                    if not text.strip()
                    else "no question||answer"
                    if path.suffix == ".txt"
                    else "not an object"
                )
                report.reject(path.name, line, reason, text.strip())
                continue
            yield line, row


def _hub(name: str, report: LoadReport) -> dict[str, tuple[str, Iterator[tuple[int, dict[str, Any]]]]]:
    """Rows of a hub data set by split, numbered from 1."""
    try:
        loaded = load_dataset(name, "main") if name.rpartition("/")[2] == "gsm8k" else load_dataset(name)
    except Exception as error:  # the hub client raises many unrelated types; all mean that the name cannot be read
        reason = first_line(error)
        raise UserError(
            "data",
            f"{name!r} is no local path and cannot be loaded from the hub ({reason})",
            "give a folder with train.jsonl and test.jsonl, one such file, or a hub name such as openai/gsm8k",
        ) from error

    def rows(split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, row in enumerate(loaded[split]):
            report.read[split] += 1
            yield index + 1, dict(row)

    return {str(split): (str(split), rows(split)) for split in loaded}


def _local(source: Path, report: LoadReport) -> dict[str, tuple[str, Iterator[tuple[int, dict[str, Any]]]]]:
    """Rows of a folder's train and test files, or of one file, by split."""
    if source.is_file():
        split = next((s for s in ("test", "validation") if source.stem.startswith(s)), "train")
        return {split: (source.name, _read_file(source, report))}
    files = {
        split: path
        for split in ("train", "validation", "test")
        for path in [
            next((source / f"{split}{s}" for s in (".jsonl", ".txt") if (source / f"{split}{s}").is_file()), None)
        ]
        if path is not None
    }
    if "train" not in files:
        raise UserError(
            "data", f"{source} has no train.jsonl", "give a folder with train.jsonl and test.jsonl, or one such file"
        )
    return {split: (path.name, _read_file(path, report)) for split, path in files.items()}


def load_gsm8k(
    source: str | Path = "openai/gsm8k",
    form: Form = "equations",
    *,
    validation: float = 0.05,
    seed: int = 0,
    max_number: int = 99,
    max_equations: int = 4,
    max_operands: int | None = None,
) -> tuple[DatasetDict, LoadReport]:
    """Load GSM8K with columns `prompt`, `response`, `answer` (text after ####, no commas) and `line` (source line).

    Forms: `full` (question -> answer text), `equations` (question -> `<<a*b=c>> <<...>> #### n`) and `programs`
    (`3 * 20 ; r1 - 15` -> `3 * 20 = 60 ; 60 - 15 = 45 # 45`).

    Args:
        source: folder, single file, or hub name (GSM8K or GSM8K-Aug).
        form: see above.
        validation: share of the training prompts held out, drawn by a hash of the prompt; a validation split that the
            source brings is used instead. 0: none.
        seed: of the hash.
        max_number: programs: largest integer anywhere in a row.
        max_equations: programs: most equations.
        max_operands: programs: most operands of an equation; None: any number.

    Returns:
        The splits, and a report that accounts for every row that is not in them.

    Raises:
        UserError: the source cannot be read, a setting is wrong, or a split is empty.
    """
    if form not in ("full", "equations", "programs"):
        raise UserError("form", f"{form!r} is unknown", "use full, equations or programs")
    if not 0 <= validation < 1:
        raise UserError(
            "validation", f"{validation} is not in [0, 1)", "give a share of the training rows, such as 0.05"
        )
    for name, limit, least in (
        ("max_number", max_number, 1),
        ("max_equations", max_equations, 1),
        ("max_operands", max_operands, 2),
    ):
        if limit is not None and limit < least:
            raise UserError(name, f"{limit} is too small", f"give at least {least}")
    report = LoadReport(str(source), form)
    path = Path(source)
    parts = _local(path, report) if path.exists() else _hub(str(source), report)
    limits = (max_number, max_equations, max_operands)
    splits: dict[str, list[dict[str, str | int]]] = {}
    files = {split: file for split, (file, _) in parts.items()}
    for split, (file, rows) in parts.items():
        splits[split] = []
        for line, row in rows:
            try:
                splits[split].append(_row(row, line, form, limits))
            except _BadRowError as bad:
                report.reject(file, line, bad.reason, bad.detail)
    # held-out rows stay whole; the training rows give way
    for held_out in ("test", "validation"):
        prompts = {row["prompt"] for row in splits.get(held_out, [])}
        for split in ("train", "validation") if held_out == "test" else ("train",):
            for row in splits.get(split, []):
                if row["prompt"] in prompts:
                    report.reject(
                        files[split], int(row["line"]), f"prompt is also in the {held_out} split", row["prompt"]
                    )
            if split in splits:
                splits[split] = [row for row in splits[split] if row["prompt"] not in prompts]
    if "validation" not in splits and "train" in splits and validation > 0:
        held = [hash_fraction(str(row["prompt"]), seed) < validation for row in splits["train"]]
        splits["validation"] = [row for row, out in zip(splits["train"], held, strict=True) if out]
        splits["train"] = [row for row, out in zip(splits["train"], held, strict=True) if not out]
    for split, kept in splits.items():
        report.kept[split] = len(kept)
        if not kept:
            worst = (
                "; ".join(f"{n} x {reason}" for (_, reason), n in report.rejected.most_common(2)) or "no rows were read"
            )
            raise UserError(
                "data", f"the {split} split of {source} is empty ({worst})", "check the file, the form and its limits"
            )
    return DatasetDict({split: Dataset.from_list(kept, features=FEATURES) for split, kept in splits.items()}), report


def _held_out_texts(held_out: Iterable[Dataset]) -> tuple[set[str], set[str]]:
    """Prompts and responses that may not be made again."""
    prompts: set[str] = set()
    responses: set[str] = set()
    for rows in held_out:
        prompts.update(rows["prompt"])
        responses.update(rows["response"])
    return prompts, responses


class _Structure:
    """A program with its constants taken out: `c1 * c2 ; r1 - c3`."""

    def __init__(self, prompt: str) -> None:
        count = 0
        self.equations: list[list[str]] = []
        self.constants: list[int] = []
        for equation in prompt.split(" ; "):
            pieces = []
            for piece in equation.split():
                if piece.isdecimal():
                    self.constants.append(int(piece))
                    count += 1
                    piece = f"c{count}"
                pieces.append(piece)
            self.equations.append(pieces)
        self.key = " ; ".join(" ".join(pieces) for pieces in self.equations)
        self.trees = [_parse(" ".join(pieces)) for pieces in self.equations]

    def draw(
        self, pool: np.ndarray, size: int, max_number: int, rng: np.random.Generator
    ) -> Iterator[tuple[str, str, str]]:
        """Yield prompt, response and answer of those of `size` draws whose results are whole and in 0..max_number."""
        shape = (size, len(self.constants))
        # half as frequent as in real problems, half uniform: real test numbers, and all of the tables
        drawn = np.where(rng.random(shape) < 0.5, rng.choice(pool, shape), rng.integers(1, max_number + 1, shape))
        names: dict[str, Any] = {f"c{i + 1}": drawn[:, i].astype(np.float64) for i in range(shape[1])}
        good = np.ones(size, dtype=bool)
        with np.errstate(divide="ignore", invalid="ignore"):
            for index, tree in enumerate(self.trees):
                value = np.broadcast_to(np.asarray(_walk(tree, names), dtype=np.float64), size)
                # Exact: a quotient of whole numbers below 2^53 is a whole float only if it is whole, and what the
                # divisions of one equation leave behind is at least max_number^-divisions away from a whole number.
                good &= np.isfinite(value) & (value == np.floor(value)) & (value >= 0) & (value <= max_number)
                names[f"r{index + 1}"] = value
        for row in np.flatnonzero(good):
            text = {name: str(int(value[row])) for name, value in names.items()}
            prompt = " ; ".join(
                " ".join(text[p] if p in text and p[0] == "c" else p for p in e) for e in self.equations
            )
            executed = [
                " ".join(text.get(p, p) for p in e) + " = " + text[f"r{index + 1}"]
                for index, e in enumerate(self.equations)
            ]
            answer = text[f"r{len(self.equations)}"]
            yield prompt, " ; ".join(executed) + " # " + answer, answer


def augment_programs(
    rows: Dataset, n: int, seed: int, *, held_out: Iterable[Dataset] = (), max_number: int = 99, attempts: int = 200
) -> Dataset:
    """Make `n` programs with the structure of real ones and constants drawn again.

    Structures are drawn as often as they occur in `rows`. Every result is whole and in 0..max_number, constants are in
    1..max_number, and neither the prompt nor the response equals one of a held-out row. The same row may be made twice.

    Args:
        rows: programs of the training split (`load_gsm8k(form="programs")`).
        n: rows to make.
        seed: fixes the result.
        held_out: validation and test rows.
        max_number: largest number.
        attempts: rounds of 1,024 draws before a structure is given up (then others are used more often).

    Returns:
        Rows with the columns of `rows`, shuffled; `line` is that of a real row of the same structure.

    Raises:
        UserError: no structure of `rows` can be filled.
    """
    if n < 0:
        raise UserError("n", f"{n} is negative", "give the number of rows to make")
    rng = np.random.default_rng(seed)
    prompts, responses = _held_out_texts(held_out)
    structures: dict[str, _Structure] = {}
    keys: list[str] = []
    lines: dict[str, int] = {}
    for prompt, line in zip(rows["prompt"], rows["line"], strict=True):
        structure = _Structure(prompt)
        structures.setdefault(structure.key, structure)
        lines.setdefault(structure.key, line)
        keys.append(structure.key)
    constants = np.array([c for prompt in rows["prompt"] for c in _Structure(prompt).constants if 1 <= c <= max_number])
    made: list[dict[str, str | int]] = []
    while len(made) < n:
        if not keys or not len(constants):
            raise UserError(
                "rows", "no program can be filled with new constants", "give more training rows or a larger max_number"
            )
        picked, quotas = np.unique(rng.choice(np.array(keys), n - len(made)), return_counts=True)
        for key, quota in zip(picked.tolist(), quotas.tolist(), strict=True):
            left = quota
            for attempt in range(attempts + quota):
                for prompt, response, answer in structures[key].draw(constants, 1024, max_number, rng):
                    if left and prompt not in prompts and response not in responses:
                        made.append({"prompt": prompt, "response": response, "answer": answer, "line": lines[key]})
                        left -= 1
                if not left or (left == quota and attempt + 1 >= attempts):
                    break
            if left == quota:
                keys = [k for k in keys if k != key]
    order = rng.permutation(n)
    return Dataset.from_list([made[i] for i in order], features=FEATURES)
