"""Generated arithmetic word problems, answered by a chain of equations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from datasets import Dataset, DatasetDict, Features, Value

from orderppl.errors import UserError

Variant = Literal["chain", "mod20", "dual"]
Operation = tuple[str, int, int]  # operator, operand, result

FEATURES = Features({"prompt": Value("string"), "response": Value("string"), "answer": Value("string")})
NAMES = ("mia", "tom", "ana", "ben", "eva", "leo", "zoe", "max")
THINGS = ("pens", "cups", "nuts", "eggs", "cards", "shells", "stamps", "coins")
PHRASES = {
    "+": ("buys {} more", "finds {} more", "gets {} more"),
    "-": ("sells {}", "loses {}", "gives away {}"),
    "*": ("multiplied by {}", "grows {} times"),
    "/": ("split by {}", "shared by {}"),
}
MODULUS = 20


def _word_operations(start: int, count: int, limit: int, rng: np.random.Generator) -> list[Operation]:
    """Operations whose results stay whole and in 1..limit; the operator is uniform over the possible ones."""
    operations: list[Operation] = []
    value = start
    for _ in range(count):
        operands: dict[str, Sequence[int]] = {
            "+": range(1, limit - value + 1),
            "-": range(1, value),
            "*": range(2, limit // value + 1),
            "/": [n for n in range(2, value + 1) if value % n == 0],
        }
        possible = [sign for sign, choices in operands.items() if len(choices)]
        sign = possible[rng.integers(len(possible))]
        n = operands[sign][int(rng.integers(len(operands[sign])))]
        value = {"+": value + n, "-": value - n, "*": value * n, "/": value // n}[sign]
        operations.append((sign, n, value))
    return operations


def _modular_operations(start: int, count: int, rng: np.random.Generator) -> list[Operation]:
    """Operations modulo 20 on 0..19."""
    operations: list[Operation] = []
    value = start
    for _ in range(count):
        sign, n = "+-*"[rng.integers(3)], int(rng.integers(MODULUS))
        value = {"+": value + n, "-": value - n, "*": value * n}[sign] % MODULUS
        operations.append((sign, n, value))
    return operations


def _response(start: int, operations: list[Operation], answer_first: bool) -> str:
    """Equation chain and answer; with `answer_first` the answer, then the equations from the last to the first."""
    equations, value = [], start
    for sign, n, result in operations:
        equations.append(f"{value} {sign} {n} = {result}")
        value = result
    if answer_first:
        return " ; ".join([f"# {value}", *reversed(equations)])
    return " ; ".join(equations) + f" # {value}"


def generate_arithmetic(
    variant: Variant = "chain",
    *,
    train: int = 20_000,
    validation: int = 500,
    test: int = 500,
    num_operations: int = 4,
    limit: int = 20,
    seed: int = 0,
) -> DatasetDict:
    """Make problems with columns `prompt`, `response`, `answer`; no two rows share start number and operations.

    Variants, with 4 operations:
        chain: `mia has 20 pens . split by 4 . sells 3 . ... ?` -> `20 / 4 = 5 ; 5 - 3 = 2 ; ... # n`, 25 number tokens.
        mod20: `7 + 5 * 3 - 4 + 9` worked from left to right modulo 20; 25 tokens, 26 with eos.
        dual: chain whose prompt ends in `answer last ?` or, one half, in `answer first ?`; the response is then
            `# n ; ...` with the equations from the last to the first, so that no fixed order is right for both.

    Args:
        variant: see above.
        train: rows of the training split.
        validation: rows of the validation split (0: no such split).
        test: rows of the test split (0: no such split).
        num_operations: operations of every problem.
        limit: chain and dual: largest number.
        seed: fixes the result.

    Returns:
        Splits that share no problem, whatever names and things it is told with.

    Raises:
        UserError: a setting is out of range, or there are not that many different problems.
    """
    if variant not in ("chain", "mod20", "dual"):
        raise UserError("variant", f"{variant!r} is unknown", "use chain, mod20 or dual")
    sizes = {"train": train, "validation": validation, "test": test}
    for name, value, least in (
        ("num_operations", num_operations, 1),
        ("limit", limit, 4),
        *((k, v, 0) for k, v in sizes.items()),
    ):
        if value < least:
            raise UserError(name, f"{value} is too small", f"give at least {least}")
    rng = np.random.default_rng(seed)
    total = sum(sizes.values())
    seen: set[tuple[int, tuple[Operation, ...]]] = set()
    rows: list[dict[str, str]] = []
    repeats = 0
    while len(rows) < total:
        if variant == "mod20":
            start = int(rng.integers(MODULUS))
            operations = _modular_operations(start, num_operations, rng)
        else:
            start = int(rng.integers(1, limit + 1))
            operations = _word_operations(start, num_operations, limit, rng)
        key = (start, tuple(operations))
        if key in seen:
            repeats += 1
            if repeats > 20 * total + 1000:
                raise UserError(
                    "train",
                    f"only {len(rows)} different problems were found where {total} are asked for",
                    "ask for fewer rows, or raise num_operations or limit",
                )
            continue
        seen.add(key)
        answer_first = variant == "dual" and rng.random() < 0.5
        if variant == "mod20":
            prompt = " ".join([str(start), *(f"{sign} {n}" for sign, n, _ in operations)])
        else:
            story = [f"{NAMES[rng.integers(len(NAMES))]} has {start} {THINGS[rng.integers(len(THINGS))]}"]
            for sign, n, _ in operations:
                story.append(PHRASES[sign][rng.integers(len(PHRASES[sign]))].format(n))
            if variant == "dual":
                story.append("answer first" if answer_first else "answer last")
            prompt = " . ".join(story) + " ?"
        response = _response(start, operations, answer_first)
        rows.append({"prompt": prompt, "response": response, "answer": str(operations[-1][2])})
    splits, begin = {}, 0
    for name, size in sizes.items():
        if size:
            splits[name] = Dataset.from_list(rows[begin : begin + size], features=FEATURES)
        begin += size
    return DatasetDict(splits)
