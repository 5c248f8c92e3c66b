"""The script of sudoku, on sizes at which the numbers mean nothing."""

from pathlib import Path
from typing import Any

import priced
import pytest
import sudoku

from orderppl import load_run
from orderppl.evaluation import sweep
from orderppl.evaluation.arms import standard_heuristics
from orderppl.evaluation.results import read_results
from orderppl.policies import PriceRange, ScanPlan

DENOISER = Path(__file__).parents[2] / "docs" / "results" / "sudoku" / "denoiser"


@pytest.mark.parametrize("puzzles", ["open", pytest.param("unique", marks=pytest.mark.slow)])
def test_sudoku(
    puzzles: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three orders of a seed are one curve, which is compared; a second call goes on with what is there."""
    ranked = {"policy": "Ranked", "score": "random", "sizes": ["uniform", "cosine"], "budgets": [1, 3]}
    grid = [{"policy": "EntropyBound", "gamma": [0.1, 1.0]}, ranked]
    assert len(sweep(sudoku.HEURISTICS)) > len(sweep(standard_heuristics()))
    monkeypatch.setattr(sudoku, "HEURISTICS", grid)
    monkeypatch.setattr(sudoku, "PATTERNED", (2,))
    for _ in range(2):
        sudoku.main(DENOISER, puzzles, seeds=1, rows=6, updates=3, out=tmp_path)
    records = read_results(tmp_path)["records"]
    learned = {r["arm"] for r in records if r["metric"] == "accuracy" and r["family"] == "learned"}
    assert len(learned) == len(sudoku.ORDERS) * priced.COUNT + 1
    gains = [r for r in records if r["metric"] == "advantage" and "target_nfe" in r]
    assert {r.get("grid") for r in gains} == {None, "mixtures of two"}
    forwards = {(r["arm"], r["difficulty"]): r["value"] for r in records if r["metric"] == "forwards"}
    assert {arm for arm, _ in forwards} == {"learned", "random uniform", "entropy_bound"} and len(forwards) > 6
    assert {r["arm"] for r in gains} == {"learned"} and {r["measured"] for r in gains} == {"accuracy", "path_nats"}
    prices = load_run(tmp_path / "seed-0" / "careful").model.step_price
    assert isinstance(prices, PriceRange) and (prices.low, prices.high) == (0.03, 0.4)
    assert isinstance(load_run(tmp_path / "seed-0" / "opening").policy, ScanPlan)
    assert "| learned |" in capsys.readouterr().out
    assert (tmp_path / "frontier.svg").stat().st_size > 1000
