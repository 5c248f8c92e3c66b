"""The frontier of several families, by hand and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from orderppl.errors import UserError
from orderppl.evaluation import Frontier, Point


def flat(arm: str, family: str, value: float, nfe: float, rows: int = 4) -> Point:
    """An arm with the same value and NFE on every row: no sampling noise."""
    return Point(arm, family, torch.full((rows,), value), torch.full((rows,), nfe))


def frontier(*points: Point, higher: bool = True, **options: int) -> Frontier:
    return Frontier(points, torch.ones(len(points[0].values)), higher_is_better=higher, **options)


def test_between_two_arms_the_curve_is_the_straight_line() -> None:
    curve = frontier(flat("a", "x", 0.2, 2.0), flat("b", "x", 0.8, 4.0))
    assert curve.best(2.0) == ("x", pytest.approx(0.2))
    assert curve.best(2.5) == ("x", pytest.approx(0.35))  # 0.2 + 0.25 * 0.6
    assert curve.best(4.0) == ("x", pytest.approx(0.8))


def test_outside_it_is_undefined_to_the_left_and_keeps_its_best_value_to_the_right() -> None:
    curve = frontier(flat("b", "x", 0.7, 4.0), flat("a", "x", 0.2, 2.0), flat("c", "x", 0.5, 6.0))
    assert curve.best(1.99) is None
    assert curve.best(6.0) == ("x", pytest.approx(0.7))  # stopping early is allowed
    assert curve.best(99.0) == ("x", pytest.approx(0.7))


def test_the_best_family_wins_at_each_place_by_itself() -> None:
    arms = flat("a", "x", 0.0, 1.0), flat("b", "x", 1.0, 5.0), flat("c", "y", 0.4, 2.0), flat("d", "y", 0.6, 4.0)
    curve = frontier(*arms)
    assert curve.best(1.5) == ("x", pytest.approx(0.125))
    assert curve.best(2.0) == ("y", pytest.approx(0.4))
    assert curve.best(3.0) == ("x", pytest.approx(0.5)) or curve.best(3.0) == ("y", pytest.approx(0.5))
    assert curve.best(4.0) == ("x", pytest.approx(0.75))


def test_nats_are_better_when_lower_and_the_advantage_is_positive_all_the_same() -> None:
    curve = frontier(flat("a", "x", 2.0, 2.0), flat("b", "x", 1.0, 4.0), flat("c", "y", 1.7, 3.0), higher=False)
    assert curve.best(3.0) == ("x", pytest.approx(1.5))
    gain = curve.advantage([flat("l", "learned", 1.2, 3.0)])
    assert gain is not None
    assert gain.value == gain.low == gain.high == pytest.approx(0.3)
    assert (gain.of, gain.own, gain.frontier, gain.nfe) == ("x", pytest.approx(1.2), pytest.approx(1.5), 3.0)


def test_a_learned_curve_is_read_at_the_target_without_choosing_its_best() -> None:
    curve = frontier(flat("a", "x", 0.0, 1.0), flat("b", "x", 1.0, 5.0))
    learned = [flat("l", "l", 0.6, 2.0), flat("m", "l", 0.4, 3.0)]
    gain = curve.advantage(learned, nfe=2.5)
    assert gain is not None and gain.value == pytest.approx(0.5 - 0.375)
    right = curve.advantage(learned, nfe=4.0)  # its last value, not its best one
    assert right is not None and right.value == pytest.approx(0.4 - 0.75)
    assert curve.advantage(learned, nfe=1.5) is None


def test_training_seeds_are_compared_at_their_own_nfe_and_averaged() -> None:
    curve = frontier(flat("a", "x", 0.0, 1.0), flat("b", "x", 1.0, 5.0))
    gain = curve.advantage([flat("s0", "l", 0.5, 2.0)], [flat("s1", "l", 0.9, 4.0)])
    assert gain is not None
    assert gain.by_curve == (pytest.approx(0.25), pytest.approx(0.15))
    assert (gain.value, gain.nfe, gain.own) == (pytest.approx(0.2), 3.0, pytest.approx(0.7))


def test_means_are_weighted_and_steps_are_not() -> None:
    weights = torch.tensor([1.0, 3.0])
    arm = Point("a", "x", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]))
    curve = Frontier([arm], weights, higher_is_better=False)
    assert curve.best(2.0) == ("x", pytest.approx(1.75))
    assert curve.best(1.99) is None


def test_the_interval_of_a_constant_shift_is_that_shift() -> None:
    """Two arms that differ by the same on every row differ by it in every bootstrap sample: the pairing works."""
    values, nfe = torch.rand(50), torch.randint(1, 5, (50,)).double()
    base = Point("a", "x", values, nfe)
    gain = Frontier([base], torch.ones(50), higher_is_better=True).advantage([Point("b", "l", values + 0.25, nfe)])
    assert gain is not None
    assert [gain.value, gain.low, gain.high] == pytest.approx([0.25] * 3, abs=1e-6)


def test_mean_steps_are_estimated_again_in_every_bootstrap_sample() -> None:
    """Slow rows are slow in every arm: the learned arm stays half-way between two others, whatever rows are drawn."""
    forwards = torch.arange(1.0, 41.0)
    arms = [Point("a", "x", torch.zeros(40), forwards), Point("b", "x", torch.ones(40), forwards + 2)]
    curve = Frontier(arms, torch.ones(40), higher_is_better=True)
    gain = curve.advantage([Point("l", "l", torch.full((40,), 0.5), forwards + 1)])
    assert gain is not None
    assert [gain.value, gain.low, gain.high] == pytest.approx([0.0] * 3, abs=1e-9)


def test_intervals_cover_the_truth() -> None:
    """Bernoulli answers with a known frontier; 250 data sets of 200 rows, bound at 4.5 standard errors of the coverage.

    Truth: threshold-like curve with accuracy 0.3 at mean NFE 2 and 0.8 at 4; learned 0.6 at mean NFE 2.6. A row's
    difficulty moves its answers in all arms together and the NFE of the row, so neither the pairing nor the estimation
    of the mean NFEs may be left out.
    """
    rng = np.random.default_rng(7)
    rows, sets = 200, 250
    truth = 0.6 - (0.3 + 0.5 * (2.6 - 2.0) / 2.0)
    covered, points = 0, []
    for number in range(sets):
        difficulty = rng.random(rows)  # answered right where it is below the accuracy of the arm
        nfe = [1 + 2 * difficulty, 3 + 2 * difficulty, 1.6 + 2 * difficulty]
        noisy = [(difficulty + 0.3 * rng.random(rows)) % 1.0 for _ in range(3)]
        arms = [
            Point(name, family, torch.tensor((u < p).astype(float)), torch.tensor(n))
            for name, family, u, p, n in zip("abl", "xxl", noisy, (0.3, 0.8, 0.6), nfe, strict=True)
        ]
        curve = Frontier(arms[:2], torch.ones(rows), higher_is_better=True, resamples=200, seed=number)
        gain = curve.advantage([arms[2]])
        assert gain is not None
        points.append(gain.value)
        covered += gain.low <= truth <= gain.high
    error = math.sqrt(0.95 * 0.05 / sets)
    assert abs(covered / sets - 0.95) < 4.5 * error + 0.01  # 0.01: percentile intervals at 200 rows
    assert abs(np.mean(points) - truth) < 4.5 * np.std(points) / math.sqrt(sets) + 0.002


def test_choosing_the_best_family_inside_the_bootstrap_is_conservative() -> None:
    """Twelve families that are equally good as the learned arm: hardly ever is it declared better."""
    rng = np.random.default_rng(3)
    better = 0
    for number in range(120):
        rows = 150
        arms = [
            Point(f"a{i}", f"x{i}", torch.tensor((rng.random(rows) < 0.5).astype(float)), torch.full((rows,), 2.0))
            for i in range(13)
        ]
        curve = Frontier(arms[:12], torch.ones(rows), higher_is_better=True, resamples=200, seed=number)
        gain = curve.advantage([arms[12]])
        assert gain is not None
        better += gain.low > 0
    assert better <= 1  # against one family chosen beforehand it would be 2.5%


def test_bad_input_is_one_clear_line() -> None:
    arm = flat("a", "x", 0.5, 2.0)
    with pytest.raises(UserError, match="no arms"):
        Frontier([], torch.ones(4), higher_is_better=True)
    with pytest.raises(UserError, match="same rows"):
        Frontier([arm], torch.ones(3), higher_is_better=True)
    with pytest.raises(UserError, match="sum to 0"):
        Frontier([arm], torch.zeros(4), higher_is_better=True)
    with pytest.raises(UserError, match="not finite"):
        frontier(flat("a", "x", math.nan, 2.0))
    with pytest.raises(UserError, match="without an NFE"):
        frontier(arm).advantage([arm, arm])
    with pytest.raises(UserError, match="coverage"):
        Frontier([arm], torch.ones(4), higher_is_better=True, level=95)
