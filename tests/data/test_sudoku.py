from __future__ import annotations

import numpy as np
import pytest
import torch

from orderppl.data.sudoku import all_grids, completions, generate_sudoku, solved
from orderppl.data.tokenizers import WordTokenizer
from orderppl.errors import UserError
from orderppl.experiments.build import SudokuTask, build_task


def test_all_grids_are_valid_and_different() -> None:
    grids = all_grids()
    assert grids.shape == (288, 16)  # the known number of 4x4 grids
    assert len({tuple(grid) for grid in grids}) == 288
    square = grids.reshape(-1, 4, 4)
    boxes = square.reshape(-1, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 4, 4)
    for units in (square, square.transpose(0, 2, 1), boxes):
        assert (np.sort(units, -1) == np.arange(1, 5)).all()


def test_completions_of_puzzles() -> None:
    assert completions("." * 16).sum() == 288
    assert completions("1" + "." * 15).sum() == 72  # by symmetry of the digits
    assert completions("11" + "." * 14).sum() == 0
    assert completions("1234341221434321").sum() == 1


def test_a_grid_is_solved_by_any_completion_only() -> None:
    clues = "12.............."
    first, second = ("".join(map(str, grid)) for grid in all_grids()[completions(clues)][[0, -1]])
    assert first != second
    wrong_clue = "".join(map(str, all_grids()[completions("2" + "." * 15)][0]))
    swapped = first[:15] + first[14]  # one cell wrong
    found = solved([first, second, wrong_clue, swapped, first[:15], "", "x" * 16], [clues] * 7)
    assert torch.equal(found, torch.tensor([1, 1, 0, 0, 0, 0, 0], dtype=torch.float64))
    with pytest.raises(UserError, match="for 1 puzzles"):
        solved([first, second], [clues])


def test_splits_share_no_grid_and_no_puzzle() -> None:
    splits = generate_sudoku(train=300, validation=40, test=60, min_clues=2, max_clues=5, seed=1)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 300, "validation": 40, "test": 60}
    grids = {name: set(rows["response"]) for name, rows in splits.items()}
    assert not grids["train"] & grids["test"] and not grids["train"] & grids["validation"]
    assert not grids["validation"] & grids["test"]
    puzzles = [puzzle for rows in splits.values() for puzzle in rows["prompt"]]
    assert len(set(puzzles)) == len(puzzles)
    assert {16 - puzzle.count(".") for puzzle in puzzles} == {2, 3, 4, 5}
    for rows in splits.values():
        assert solved(rows["response"], rows["answer"]).all()
        assert rows["answer"][:] == rows["prompt"][:]
    # another setting divides the grids in the same way: orders may be learned on other puzzles than the denoiser
    other = generate_sudoku(train=300, validation=0, test=60, min_clues=5, max_clues=6, solutions="unique", seed=1)
    assert set(other) == {"train", "test"}
    assert not set(other["test"]["response"]) & grids["train"]
    assert all(completions(puzzle).sum() == 1 for puzzle in other["test"]["prompt"])


def test_settings_out_of_range() -> None:
    with pytest.raises(UserError, match="5 to 3 clues"):
        generate_sudoku(min_clues=5, max_clues=3)
    with pytest.raises(UserError, match="different puzzles were found"):
        generate_sudoku(train=10, validation=0, test=0, min_clues=0, max_clues=0)
    with pytest.raises(UserError, match="is unknown"):
        generate_sudoku(solutions="some")  # type: ignore[arg-type]


def test_a_task_of_one_token_per_cell() -> None:
    task = build_task(SudokuTask(train=20, validation=5, test=10), 0)
    assert isinstance(task.tokenizer, WordTokenizer)
    for batch in task.splits.values():
        assert batch["tokens"].shape[1] == batch["context"].shape[1] == 16
        assert batch["attention_mask"].all()
    texts = [task.tokenizer.decode(row) for row in task.splits["test"]["tokens"].tolist()]
    assert task.grade(texts, task.references["test"]).all()
