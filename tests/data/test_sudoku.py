from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from orderppl.data import Sudoku
from orderppl.data.dataset import Row
from orderppl.data.report import LoadReport
from orderppl.data.sudoku import all_grids, completions, solved
from orderppl.errors import UserError


def generate(**options: Any) -> dict[str, list[Row]]:
    return Sudoku(**options).make_rows(LoadReport())


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
    with pytest.raises(UserError, match="2 predictions for 1 references"):
        solved([first, second], [clues])


def test_splits_share_no_grid_and_no_puzzle() -> None:
    splits = generate(train=300, validation=40, test=60, min_clues=2, max_clues=5, seed=1)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 300, "validation": 40, "test": 60}
    grids = {name: {row.text for row in rows} for name, rows in splits.items()}
    assert not grids["train"] & grids["test"] and not grids["train"] & grids["validation"]
    assert not grids["validation"] & grids["test"]
    puzzles = [str(row.prompt) for rows in splits.values() for row in rows]
    assert len(set(puzzles)) == len(puzzles)
    assert {16 - puzzle.count(".") for puzzle in puzzles} == {2, 3, 4, 5}
    for rows in splits.values():
        assert solved([row.text for row in rows], [str(row.answer) for row in rows]).all()
        assert all(row.answer == row.prompt for row in rows)
    # another setting divides the grids in the same way: orders may be learned on other puzzles than the denoiser
    other = generate(train=300, validation=0, test=60, min_clues=5, max_clues=6, solutions="unique", seed=1)
    assert set(other) == {"train", "test"}
    assert not {row.text for row in other["test"]} & grids["train"]
    assert all(completions(str(row.prompt)).sum() == 1 for row in other["test"])


def test_settings_out_of_range() -> None:
    with pytest.raises(UserError, match="5 to 3 clues"):
        Sudoku(min_clues=5, max_clues=3)
    with pytest.raises(UserError, match="different puzzles were found"):
        Sudoku(train=10, validation=0, test=0, min_clues=0, max_clues=0).splits()
    with pytest.raises(UserError, match="solutions: 'some' is unknown"):
        Sudoku(solutions="some")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="layout: 'round' is unknown"):
        Sudoku("round")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="nothing to reveal"):
        Sudoku("grid", max_clues=16)


def test_one_token_per_cell() -> None:
    data = Sudoku("prompt", train=20, validation=5, test=10)
    for rows in data.splits().values():
        assert rows.batch.tokens.shape[1] == 32 and rows.batch.prefix == 16
        assert rows.batch.attention_mask.all() and rows.batch.latent[:, 16:].all()
    test = data.splits()["test"]
    assert data.grade(test.texts(test.batch.tokens), test.references or []).all()
    assert data.end_index is None


def test_clues_in_the_grid_are_given() -> None:
    prompt, grid = (Sudoku(layout, train=20, validation=5, test=10, seed=3).splits() for layout in ("prompt", "grid"))
    for split, rows in grid.items():
        beside = prompt[split]  # the same puzzles, laid out otherwise
        batch, puzzles = rows.batch, rows.references
        assert batch.tokens.shape[1] == 16 and puzzles == beside.references and puzzles is not None
        assert torch.equal(batch.latent, torch.tensor([[cell == "." for cell in puzzle] for puzzle in puzzles]))
        assert rows.texts(batch.tokens) == beside.texts(beside.batch.tokens)
        assert rows.grade(rows.texts(batch.tokens), puzzles).all()
        wrong = batch.tokens.flip(-1)
        assert rows.grade(rows.texts(wrong), puzzles).sum() < len(rows)
