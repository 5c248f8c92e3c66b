"""Generated arithmetic word problems, answered by a chain of equations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from orderppl.data.answers import exact_match
from orderppl.data.dataset import SPLITS, Row, TextData, at_least, different, one_of, texts_of
from orderppl.data.report import LoadReport
from orderppl.data.tokenizers import Tokenizer, WordTokenizer

Variant = Literal["chain", "mod20", "dual"]
Operation = tuple[str, int, int]  # operator, operand, result

NAMES = ("mia", "tom", "ana", "ben", "eva", "leo", "zoe", "max")
THINGS = ("pens", "cups", "nuts", "eggs", "cards", "shells", "stamps", "coins")
PHRASES = {
    "+": ("buys {} more", "finds {} more", "gets {} more"),
    "-": ("sells {}", "loses {}", "gives away {}"),
    "*": ("multiplied by {}", "grows {} times"),
    "/": ("split by {}", "shared by {}"),
}
MODULUS = 20


class Arithmetic(TextData):
    """Generated arithmetic word problems, answered by a chain of equations.

    Variants, with 4 operations:
        chain: `mia has 20 pens . split by 4 . sells 3 . ... ?` -> `20 / 4 = 5 ; 5 - 3 = 2 ; ... # n`, 25 number tokens.
        mod20: `7 + 5 * 3 - 4 + 9` worked from left to right modulo 20; 25 tokens, 26 with the end.
        dual: chain whose prompt ends in `answer last ?` or, one half, in `answer first ?`; the response is then
            `# n ; ...` with the equations from the last to the first, so that no fixed order is right for both.

    No two rows share start number and operations, whatever names and things they are told with.

    Args:
        variant: see above.
        train: training problems.
        validation: validation problems (0: no such split).
        test: test problems (0: no such split).
        num_operations: operations of every problem.
        limit: chain and dual: largest number.
        seed: fixes the problems.
        options: see `TextData`.

    Raises:
        UserError: a setting is out of range, or there are not that many different problems.
    """

    usual_grade = staticmethod(exact_match)
    usual_on_bad = "report"

    def __init__(
        self,
        variant: Variant = "chain",
        train: int = 20_000,
        validation: int = 500,
        test: int = 500,
        num_operations: int = 4,
        limit: int = 20,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.variant = one_of("variant", variant, "chain", "mod20", "dual")
        at_least(1, num_operations=num_operations, train=train)
        at_least(4, limit=limit)
        at_least(0, validation=validation, test=test)
        self.sizes = dict(zip(SPLITS, (train, validation, test), strict=True))
        self.num_operations, self.limit, self.seed = num_operations, limit, seed

    def build_tokenizer(self, rows: Iterable[Row]) -> Tokenizer:
        """One token per number."""
        return WordTokenizer.build(texts_of(rows), "numbers", max(self.limit, MODULUS))

    def make_rows(self, report: LoadReport) -> dict[str, list[Row]]:
        """Draw the problems."""
        rng = np.random.default_rng(self.seed)

        def draw(found: int) -> tuple[int, tuple[Operation, ...]]:
            lowest, highest = (0, MODULUS - 1) if self.variant == "mod20" else (1, self.limit)
            start = int(rng.integers(lowest, highest + 1))
            return start, tuple(self._operations(start, rng))

        total, remedy = sum(self.sizes.values()), "raise num_operations or limit"
        problems = different(draw, total, set(), split="train", what="problems", remedy=remedy, tries=20)
        left = (self._row(start, operations, rng) for start, operations in problems)
        return {split: [next(left) for _ in range(size)] for split, size in self.sizes.items() if size}

    def _operations(self, start: int, rng: np.random.Generator) -> list[Operation]:
        """Modulo 20, or with results that stay whole and in 1..limit by an operator uniform over the possible ones."""
        operations: list[Operation] = []
        value = start
        for _ in range(self.num_operations):
            if self.variant == "mod20":
                sign, n = "+-*"[rng.integers(3)], int(rng.integers(MODULUS))
            else:
                operands: dict[str, Sequence[int]] = {
                    "+": range(1, self.limit - value + 1),
                    "-": range(1, value),
                    "*": range(2, self.limit // value + 1),
                    "/": [n for n in range(2, value + 1) if value % n == 0],
                }
                possible = [sign for sign, choices in operands.items() if len(choices)]
                sign = possible[rng.integers(len(possible))]
                n = operands[sign][int(rng.integers(len(operands[sign])))]
            value = {"+": value + n, "-": value - n, "*": value * n, "/": value // max(n, 1)}[sign]
            value = value % MODULUS if self.variant == "mod20" else value
            operations.append((sign, n, value))
        return operations

    def _row(self, start: int, operations: Sequence[Operation], rng: np.random.Generator) -> Row:
        answer_first = self.variant == "dual" and rng.random() < 0.5
        equations, value = [], start
        for sign, n, result in operations:
            equations.append(f"{value} {sign} {n} = {result}")
            value = result
        answer = f"# {value}"
        response = " ; ".join([answer, *reversed(equations)]) if answer_first else f"{' ; '.join(equations)} {answer}"
        if self.variant == "mod20":
            return Row(response, " ".join([str(start), *(f"{s} {n}" for s, n, _ in operations)]), answer=str(value))
        story = [f"{NAMES[rng.integers(len(NAMES))]} has {start} {THINGS[rng.integers(len(THINGS))]}"]
        story += [PHRASES[sign][rng.integers(len(PHRASES[sign]))].format(n) for sign, n, _ in operations]
        if self.variant == "dual":
            story.append("answer first" if answer_first else "answer last")
        return Row(response, " . ".join(story) + " ?", answer=str(value))
