"""Sudoku of four by four cells: all 288 grids, and puzzles made from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import permutations, product
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from orderppl.data.answers import graded
from orderppl.data.dataset import SPLITS, Row, TextData, at_least, different, one_of
from orderppl.data.report import LoadReport
from orderppl.data.tokenizers import Tokenizer, WordTokenizer
from orderppl.errors import UserError

SIDE, CELLS, BLANK = 4, 16, "."
SHARES = (192, 48, 48)  # grids of each split


@cache
def all_grids(boxes: bool = True) -> NDArray[np.int64]:
    """Every valid grid, int64 [288, 16], cells row by row, values 1..4, in lexicographic order.

    Without boxes, the 576 Latin squares of order 4.
    """
    rows = list(permutations(range(1, SIDE + 1)))
    bands = [(upper, lower) for upper, lower in product(rows, rows) if not boxes or _boxes_differ(upper, lower)]
    grids = [first + second for first, second in product(bands, bands)]
    cells = np.array(grids, dtype=np.int64)  # [., 4, 4], rows and boxes right, columns not yet
    columns = (np.sort(cells, axis=1) == np.arange(1, SIDE + 1)[:, None]).all((1, 2))
    return np.asarray(cells[columns].reshape(-1, CELLS))


def _boxes_differ(upper: Sequence[int], lower: Sequence[int]) -> bool:
    return not (set(upper[:2]) & set(lower[:2]) or set(upper[2:]) & set(lower[2:]))


def completions(puzzle: str, boxes: bool = True) -> NDArray[np.bool_]:
    """Which of `all_grids(boxes)` agree with a puzzle of 16 characters, 1 to 4 or `.` for a blank cell: bool [288]."""
    given = np.array([0 if cell == BLANK else int(cell) for cell in puzzle])
    return np.asarray(((all_grids(boxes) == given) | (given == 0)).all(1))


def solved(grids: Sequence[str], puzzles: Sequence[str]) -> Tensor:
    """Whether grids (16 digits each) are valid and agree with the clues; any completion counts: float64 [N]."""
    valid = {"".join(map(str, grid)) for grid in all_grids()}

    def is_solved(grid: str, puzzle: str) -> bool:
        return grid in valid and all(clue in (BLANK, cell) for clue, cell in zip(puzzle, grid, strict=True))

    return graded(grids, puzzles, is_solved)


class Sudoku(TextData):
    """Puzzles of four by four cells.

    The 288 grids are divided among the splits (192, 48, 48), so that no grid of the test split has been seen, and no
    two puzzles are the same. A puzzle of few clues may be completed to grids of other splits too: any completion is
    right. Response or text is the grid that the puzzle is from, the reference answer is the puzzle.

    Args:
        layout: "prompt": 16 given positions with the clues (or `.`), then the 16 cells to reveal; "grid": 16 positions,
            the clues among them given.
        train: training puzzles.
        validation: validation puzzles (0: no such split).
        test: test puzzles (0: no such split).
        min_clues: fewest clues of a puzzle; their number is uniform.
        max_clues: most clues.
        solutions: "any" number of completions, or a "unique" one.
        seed: fixes the puzzles; the division of the grids depends on nothing else.

    Raises:
        UserError: a setting is out of range, or there are not that many different puzzles.
    """

    usual_grade = staticmethod(solved)
    ends = False

    def __init__(
        self,
        layout: Literal["prompt", "grid"] = "prompt",
        train: int = 10_000,
        validation: int = 500,
        test: int = 1000,
        min_clues: int = 2,
        max_clues: int = 6,
        solutions: Literal["any", "unique"] = "any",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.layout = one_of("layout", layout, "prompt", "grid")
        self.solutions = one_of("solutions", solutions, "any", "unique")
        at_least(1, train=train)
        at_least(0, validation=validation, test=test)
        if not 0 <= min_clues <= max_clues <= CELLS:
            raise UserError("min_clues", f"{min_clues} to {max_clues} clues", f"use 0 to {CELLS}, the smaller first")
        if layout == "grid" and max_clues == CELLS:
            raise UserError("max_clues", "16 clues leave nothing to reveal", "give at most 15")
        self.sizes, self.clues, self.seed = (train, validation, test), (min_clues, max_clues), seed

    def build_tokenizer(self, rows: Iterable[Row]) -> Tokenizer:
        """One token per cell."""
        return WordTokenizer.build([BLANK * CELLS, *(row.text for row in rows)], "digits", 9)

    def make_rows(self, report: LoadReport) -> dict[str, list[Row]]:
        """Draw the puzzles."""
        shuffled = all_grids()[np.random.default_rng(self.seed).permutation(len(all_grids()))]
        parts = np.split(shuffled, np.cumsum(SHARES)[:-1])
        seen: set[str] = set()
        return {
            split: self._puzzles(split, parts[index], size, np.random.default_rng([self.seed, index]), seen)
            for index, (split, size) in enumerate(zip(SPLITS, self.sizes, strict=True))
            if size
        }

    def _puzzles(
        self, split: str, grids: NDArray[np.int64], size: int, rng: np.random.Generator, seen: set[str]
    ) -> list[Row]:
        solution: dict[str, str] = {}

        def draw(found: int) -> str | None:
            grid = grids[rng.integers(len(grids))]
            shown = rng.permutation(CELLS)[: rng.integers(self.clues[0], self.clues[1] + 1)]
            puzzle = "".join(str(value) if cell in shown else BLANK for cell, value in enumerate(grid))
            solution[puzzle] = "".join(map(str, grid))
            return None if self.solutions == "unique" and completions(puzzle).sum() > 1 else puzzle

        rows: list[Row] = []
        for puzzle in different(draw, size, seen, split=split, what="puzzles", remedy="allow more clues"):
            blanks = tuple((cell, cell + 1) for cell in range(CELLS) if puzzle[cell] == BLANK)
            prompt, hidden = (puzzle, None) if self.layout == "prompt" else (None, blanks)
            rows.append(Row(solution[puzzle], prompt, hidden, puzzle))
        return rows
