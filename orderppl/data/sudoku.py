"""Sudoku of four by four cells: all 288 grids, and puzzles made from them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import permutations, product
from typing import Literal

import numpy as np
import torch
from datasets import Dataset, DatasetDict, Features, Value
from numpy.typing import NDArray
from torch import Tensor

from orderppl.errors import UserError

Solutions = Literal["any", "unique"]

SIDE, CELLS, BLANK = 4, 16, "."
FEATURES = Features({"prompt": Value("string"), "response": Value("string"), "answer": Value("string")})
SHARES = {"train": 192, "validation": 48, "test": 48}  # grids of each split


@cache
def all_grids() -> NDArray[np.int64]:
    """Every valid grid, int64 [288, 16], cells row by row, values 1..4, in lexicographic order."""
    rows = list(permutations(range(1, SIDE + 1)))
    bands = [(upper, lower) for upper, lower in product(rows, rows) if _boxes_differ(upper, lower)]
    grids = [first + second for first, second in product(bands, bands)]
    cells = np.array(grids, dtype=np.int64)  # [., 4, 4], rows and boxes right, columns not yet
    columns = (np.sort(cells, axis=1) == np.arange(1, SIDE + 1)[:, None]).all((1, 2))
    return np.asarray(cells[columns].reshape(-1, CELLS))


def _boxes_differ(upper: Sequence[int], lower: Sequence[int]) -> bool:
    return not (set(upper[:2]) & set(lower[:2]) or set(upper[2:]) & set(lower[2:]))


def completions(puzzle: str) -> NDArray[np.bool_]:
    """Which of `all_grids()` agree with a puzzle: bool [288].

    Args:
        puzzle: 16 characters, row by row: 1 to 4, or `.` for a blank cell.
    """
    given = np.array([0 if cell == BLANK else int(cell) for cell in puzzle])
    return np.asarray(((all_grids() == given) | (given == 0)).all(1))


def solved(grids: Sequence[str], puzzles: Sequence[str]) -> Tensor:
    """Whether grids are valid and agree with the clues; any completion counts.

    Args:
        grids: 16 digits each; anything else is wrong.
        puzzles: as `completions` reads them.

    Returns:
        float64 [N], 1 where solved.

    Raises:
        UserError: for lists of different lengths.
    """
    if len(grids) != len(puzzles):
        raise UserError("grids", f"{len(grids)} for {len(puzzles)} puzzles", "give one grid per puzzle")
    valid = {"".join(map(str, grid)) for grid in all_grids()}

    def is_solved(grid: str, puzzle: str) -> bool:
        return grid in valid and all(clue in (BLANK, cell) for clue, cell in zip(puzzle, grid, strict=True))

    return torch.tensor([is_solved(*pair) for pair in zip(grids, puzzles, strict=True)], dtype=torch.float64)


def generate_sudoku(
    *,
    train: int = 10_000,
    validation: int = 500,
    test: int = 1000,
    min_clues: int = 2,
    max_clues: int = 6,
    solutions: Solutions = "any",
    seed: int = 0,
) -> DatasetDict:
    """Make puzzles: columns `prompt` (the clues), `response` (the grid they are from) and `answer` (the clues again).

    The 288 grids are divided among the splits (192, 48, 48), so that no grid of the test split has been seen, and no
    two puzzles are the same. A puzzle of few clues may be completed to grids of other splits too: what `solved` counts
    is any completion.

    Args:
        train: puzzles of the training split.
        validation: puzzles of the validation split (0: no such split).
        test: puzzles of the test split (0: no such split).
        min_clues: fewest clues of a puzzle; their number is uniform.
        max_clues: most clues.
        solutions: `any` number of completions, or a `unique` one.
        seed: fixes the result; the division of the grids depends on nothing else.

    Raises:
        UserError: a setting is out of range, or there are not that many different puzzles.
    """
    if solutions not in ("any", "unique"):
        raise UserError("solutions", f"{solutions!r} is unknown", "use any or unique")
    if not 0 <= min_clues <= max_clues <= CELLS:
        raise UserError("min_clues", f"{min_clues} to {max_clues} clues", f"use 0 to {CELLS}, the smaller first")
    shuffled = all_grids()[np.random.default_rng(seed).permutation(len(all_grids()))]
    seen: set[str] = set()
    splits, begin = {}, 0
    for index, (name, size) in enumerate({"train": train, "validation": validation, "test": test}.items()):
        grids = shuffled[begin : begin + SHARES[name]]
        begin += SHARES[name]
        rng = np.random.default_rng([seed, index])
        rows: list[dict[str, str]] = []
        failures = 0
        while len(rows) < size:
            grid = grids[rng.integers(len(grids))]
            shown = rng.permutation(CELLS)[: rng.integers(min_clues, max_clues + 1)]
            puzzle = "".join(str(value) if cell in shown else BLANK for cell, value in enumerate(grid))
            if puzzle in seen or (solutions == "unique" and completions(puzzle).sum() > 1):
                failures += 1
                if failures > 50 * size + 1000:
                    problem = f"only {len(rows)} different puzzles were found where {size} are asked for"
                    raise UserError(name, problem, "ask for fewer rows, or allow more clues")
                continue
            seen.add(puzzle)
            rows.append({"prompt": puzzle, "response": "".join(map(str, grid)), "answer": puzzle})
        if size:
            splits[name] = Dataset.from_list(rows, features=FEATURES)
    return DatasetDict(splits)
