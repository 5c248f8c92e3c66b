"""Sudoku of four by four cells: which cells to fill first, and how many at a time.

    orderppl train-denoiser --config sudoku_denoiser --out runs/sudoku-denoiser
    orderppl sudoku --denoiser runs/sudoku-denoiser --out runs/sudoku-open
    orderppl sudoku --denoiser runs/sudoku-denoiser --preset unique --out runs/sudoku-unique

The grids of the test puzzles are in no puzzle that denoiser or orders were trained on. Accuracy is the solve rate: a
valid grid that agrees with the clues, whichever completion it is. In the preset `open` a puzzle has 2 to 4 clues and
most have several completions: cells depend on each other, and filling too many at once makes grids that no completion
agrees with. In the preset `unique` a puzzle has one completion, which a perfect denoiser would see in a single step.

With one step every arm fills all cells at once, so all are the same. Per training seed, both learn policies for two
ranges of step prices and one for two steps. Finished fits and measurements are kept: repeat the command to go on after
a kill. See `frontier` for the tables.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from orderppl.experiments import comparison
from orderppl.experiments.results import Record

PRESETS = {"open": "sudoku_open", "unique": "sudoku_unique"}
CONFIG = "sudoku_open"


@dataclass(frozen=True)
class Config(comparison.Config):
    """Settings of sudoku."""


def run(config: Config, out: Path) -> Iterable[Record]:
    """Learn the orders of every seed, and compare them with the heuristics on test puzzles."""
    return comparison.learn_and_compare(config, out)[1]
