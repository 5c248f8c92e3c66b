"""Bootstrap intervals against the normal approximation, and their pairing."""

import math

import numpy as np
import pytest
import torch

from orderppl.errors import UserError
from orderppl.evaluation.intervals import Resamples, bootstrap_mean


def test_matches_the_standard_error() -> None:
    # 2,000 rows: half-width 1.96 * s / sqrt(n), within 10% (Monte Carlo error of 2,000 resamples is about 3%).
    values = np.random.default_rng(0).normal(size=2000)
    interval = bootstrap_mean(values)
    assert interval.value == pytest.approx(values.mean())
    width = 1.96 * values.std(ddof=1) / math.sqrt(2000)
    assert interval.high - interval.value == pytest.approx(width, rel=0.1)
    assert interval.value - interval.low == pytest.approx(width, rel=0.1)
    narrow = bootstrap_mean(values, level=0.5)
    assert interval.low < narrow.low < narrow.high < interval.high


def test_is_seeded() -> None:
    values = torch.arange(50.0)  # tensors are taken as they are
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


def test_weights_make_a_ratio_of_totals() -> None:
    interval = bootstrap_mean([1.0, 4.0], [3.0, 1.0])
    assert interval.value == pytest.approx(7 / 4)
    assert (interval.low, interval.high) == (1.0, 4.0)  # the resamples are (1, 1), (1, 4), (4, 4)


def test_pairing_removes_what_the_rows_share() -> None:
    shared = np.random.default_rng(0).normal(size=500)
    better = bootstrap_mean((shared + 0.1) - shared)
    assert better.low == pytest.approx(0.1)
    assert better.high == pytest.approx(0.1)
    alone = bootstrap_mean(shared)
    assert alone.high - alone.low > 0.1


def test_samples_do_not_depend_on_how_many_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=(30, 2))
    whole = Resamples(30, resamples=50).means(values)
    monkeypatch.setattr("orderppl.evaluation.intervals._CHUNK", 100)
    np.testing.assert_allclose(Resamples(30, resamples=50).means(values), whole)
    assert (Resamples(30, resamples=50).counts.sum(1) == 30).all()


@pytest.mark.parametrize(
    ("values", "weights", "level", "message"),
    [
        ([], None, 0.95, "no rows"),
        ([1.0, 1.0], [0.0, 0.0], 0.95, "sum to 0"),
        ([1.0, 1.0], None, 1.0, "coverage"),
        ([1.0, 1.0], [1.0, 1.0, 1.0], 0.95, "same rows"),
    ],
)
def test_bad_input(values: list[float], weights: list[float] | None, level: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        bootstrap_mean(values, weights, level=level)
