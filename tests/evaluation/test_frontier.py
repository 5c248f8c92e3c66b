"""The frontier of several families, by hand and by simulation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from orderppl.errors import UserError
from orderppl.evaluation import advantages
from orderppl.evaluation import frontier as frontier_of
from orderppl.evaluation.curves import Frontier, Point, aup

from measured_rows import arm, together


def flat(arm: str, family: str, value: float, nfe: float, rows: int = 4) -> Point:
    """An arm with the same value and NFE on every row: no sampling noise."""
    return Point(arm, family, np.full((rows,), value), np.full((rows,), nfe))


def frontier(*points: Point, higher: bool = True, **options: Any) -> Frontier:
    return Frontier(points, np.ones(len(points[0].values)), higher_is_better=higher, **options)


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
    weights = np.array([1.0, 3.0])
    arm = Point("a", "x", np.array([1.0, 2.0]), np.array([1.0, 3.0]))
    curve = Frontier([arm], weights, higher_is_better=False)
    assert curve.best(2.0) == ("x", pytest.approx(1.75))
    assert curve.best(1.99) is None


def test_the_interval_of_a_constant_shift_is_that_shift() -> None:
    """Two arms that differ by the same on every row differ by it in every bootstrap sample: the pairing works."""
    rng = np.random.default_rng(0)
    values, nfe = rng.random(50), rng.integers(1, 5, 50).astype(float)
    base = Point("a", "x", values, nfe)
    gain = Frontier([base], np.ones(50), higher_is_better=True).advantage([Point("b", "l", values + 0.25, nfe)])
    assert gain is not None
    assert [gain.value, gain.low, gain.high] == pytest.approx([0.25] * 3, abs=1e-6)


def test_mean_steps_are_estimated_again_in_every_bootstrap_sample() -> None:
    """Slow rows are slow in every arm: the learned arm stays half-way between two others, whatever rows are drawn."""
    forwards = np.arange(1.0, 41.0)
    arms = [Point("a", "x", np.zeros(40), forwards), Point("b", "x", np.ones(40), forwards + 2)]
    curve = Frontier(arms, np.ones(40), higher_is_better=True)
    gain = curve.advantage([Point("l", "l", np.full((40,), 0.5), forwards + 1)])
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
            Point(name, family, np.array((u < p).astype(float)), np.array(n))
            for name, family, u, p, n in zip("abl", "xxl", noisy, (0.3, 0.8, 0.6), nfe, strict=True)
        ]
        curve = Frontier(arms[:2], np.ones(rows), higher_is_better=True, resamples=200, seed=number)
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
            Point(f"a{i}", f"x{i}", np.array((rng.random(rows) < 0.5).astype(float)), np.full((rows,), 2.0))
            for i in range(13)
        ]
        curve = Frontier(arms[:12], np.ones(rows), higher_is_better=True, resamples=200, seed=number)
        gain = curve.advantage([arms[12]])
        assert gain is not None
        better += gain.low > 0
    assert better <= 1  # against one family chosen beforehand it would be 2.5%


def test_bad_input_is_one_clear_line() -> None:
    arm = flat("a", "x", 0.5, 2.0)
    with pytest.raises(UserError, match="no arms"):
        Frontier([], np.ones(4), higher_is_better=True)
    with pytest.raises(UserError, match="same rows"):
        Frontier([arm], np.ones(3), higher_is_better=True)
    with pytest.raises(UserError, match="sum to 0"):
        Frontier([arm], np.zeros(4), higher_is_better=True)
    with pytest.raises(UserError, match="not finite"):
        frontier(flat("a", "x", math.nan, 2.0))
    with pytest.raises(UserError, match="without an NFE"):
        frontier(arm).advantage([arm, arm])
    with pytest.raises(UserError, match="coverage"):
        Frontier([arm], np.ones(4), higher_is_better=True, level=95)


# ------------------------------------------------------------------------------------------------- chosen on other rows


def test_the_opponent_can_be_chosen_on_validation_rows() -> None:
    """On validation rows y is best, on the test rows x: the test rows are read at y."""
    judge = frontier(flat("a", "x", 0.2, 2.0), flat("b", "y", 0.6, 2.0))
    arms = flat("a", "x", 0.5, 2.0), flat("b", "y", 0.4, 2.0)
    curve = frontier(*arms, chosen_on=judge)
    assert curve.best(2.0) == ("y", pytest.approx(0.4))
    gain = curve.advantage([flat("l", "l", 0.45, 2.0)])
    assert gain is not None
    assert (gain.of, gain.value) == ("y", pytest.approx(0.05))
    own = frontier(*arms).advantage([flat("l", "l", 0.45, 2.0)])
    assert own is not None and own.value == pytest.approx(-0.05)


def test_a_coin_may_decide_between_arms_of_two_families() -> None:
    """At 3 forwards: half of 0.2 at 2 and half of 0.8 at 4. An arm alone may stop early."""
    arms = flat("a", "x", 0.2, 2.0), flat("b", "y", 0.8, 4.0), flat("c", "z", 0.3, 3.0)
    assert frontier(*arms).best(3.0) == ("z", pytest.approx(0.3))
    mixed = frontier(*arms, mixed=True)
    assert mixed.best(3.0) == ("a or b", pytest.approx(0.5))
    assert mixed.best(2.5) == ("a or b", pytest.approx(0.35))
    assert mixed.best(6.0) == ("b", pytest.approx(0.8))
    assert mixed.best(1.9) is None
    gain = mixed.advantage([flat("l", "l", 0.6, 3.0)])
    assert gain is not None and gain.value == pytest.approx(0.1)


def test_a_mixture_is_chosen_on_validation_rows_and_weighed_on_its_own() -> None:
    """There c is best alone; here a and b are, and b needs 6 forwards: a quarter of it at 3."""
    judge = frontier(flat("a", "x", 0.2, 2.0), flat("b", "y", 0.8, 4.0), flat("c", "z", 0.4, 3.0), mixed=True)
    arms = flat("a", "x", 0.2, 2.0), flat("b", "y", 0.8, 6.0), flat("c", "z", 0.9, 3.0)
    curve = frontier(*arms, mixed=True, chosen_on=judge)
    assert curve.best(3.0) == ("a or b", pytest.approx(0.35))
    with pytest.raises(UserError, match="other arms"):
        frontier(flat("a", "x", 0.2, 2.0), flat("d", "y", 0.8, 6.0), mixed=True, chosen_on=judge)


def test_mixtures_are_searched_among_all_pairs() -> None:
    """On rows with noise: in every bootstrap sample the upper concave hull of the arms."""
    generator = np.random.default_rng(0)
    points = [Point(f"{n}", f"{n}", generator.random(30), generator.random(30) + 0.3 * n) for n in range(6)]
    curve = frontier(*points, mixed=True, resamples=50)
    found = curve._read(np.full(51, 1.4))
    assert found is not None
    for sample, value in enumerate(found[1]):
        nfe, values = curve._means.nfe[sample], curve._means.value[sample]
        pairs = [(i, j) for i in range(6) for j in range(6) if nfe[i] <= 1.4 <= nfe[j]]
        lines = [values[i] + (values[j] - values[i]) * (1.4 - nfe[i]) / (nfe[j] - nfe[i]) for i, j in pairs]
        alone = [values[i] for i in range(6) if nfe[i] <= 1.4]
        assert value == pytest.approx(max(lines + alone))


def test_a_family_has_to_reach_the_target_on_both_sets_of_rows() -> None:
    judge = frontier(flat("a", "x", 0.9, 2.5), flat("b", "y", 0.6, 2.0))
    curve = frontier(flat("a", "x", 0.5, 2.0), flat("b", "y", 0.4, 2.0), chosen_on=judge)
    assert curve.best(2.0) == ("y", pytest.approx(0.4))
    assert curve.best(2.5) == ("x", pytest.approx(0.5))


def test_the_choice_on_validation_rows_is_made_again_in_every_bootstrap_sample() -> None:
    """Two families that are level on 40 validation rows: about half of the samples choose the one 0.3 worse."""
    rng = np.random.default_rng(0)
    noisy = rng.permutation(np.repeat([0.0, 1.0], 20))
    judge = Frontier(
        [Point("a", "x", noisy, np.full(40, 2.0)), Point("b", "y", 1 - noisy, np.full(40, 2.0))],
        np.ones(40),
        higher_is_better=True,
        seed=1,
    )
    curve = frontier(flat("a", "x", 0.5, 2.0), flat("b", "y", 0.2, 2.0), chosen_on=judge)
    gain = curve.advantage([flat("l", "l", 0.5, 2.0)])
    assert gain is not None
    assert (gain.low, gain.high) == (pytest.approx(0.0), pytest.approx(0.3))


def test_choosing_on_other_rows_is_unbiased() -> None:
    """Eight families as good as the learned arm: the mean advantage is 0, chosen on the rows themselves it is below."""
    rng = np.random.default_rng(5)
    rows, gains = 150, {True: [], False: []}
    for number in range(150):
        draws = [[(rng.random(rows) < 0.5).astype(float) for _ in range(9)] for _ in range(2)]
        test, validation = (
            [Point(f"a{i}", f"x{i}", values, np.full(rows, 2.0)) for i, values in enumerate(part)] for part in draws
        )
        options = {"higher_is_better": True, "resamples": 0, "seed": number}
        judge = Frontier(validation[:8], np.ones(rows), **options)
        for other in (True, False):
            curve = Frontier(test[:8], np.ones(rows), chosen_on=judge if other else None, **options)
            gain = curve.advantage([test[8]])
            assert gain is not None
            gains[other].append(gain.value)
    error = math.sqrt(2 * 0.25 / rows / 150)  # standard error of a mean of 150 differences of two shares
    assert abs(np.mean(gains[True])) < 4.5 * error
    assert np.mean(gains[False]) < -4.5 * error


def test_validation_rows_need_the_same_arms() -> None:
    judge = frontier(flat("a", "x", 0.2, 2.0))
    with pytest.raises(UserError, match="no family 'y'"):
        frontier(flat("a", "x", 0.5, 2.0), flat("b", "y", 0.4, 2.0), chosen_on=judge)


# ------------------------------------------------------------------------------------------------------- from a table


def curves(rows: int = 40) -> pd.DataFrame:
    """A heuristic of two settings, another of one, an oracle, and a learned curve of two settings and two seeds."""
    rng = np.random.default_rng(0)

    def played(name: str, nfe: float, nats: float, **labels: Any) -> pd.DataFrame:
        noise = rng.normal(scale=0.1, size=rows)
        return arm(name, nfe=nfe, nats=4 * (nats + noise), correct=rng.random(rows) < 0.5, rows=rows, **labels)

    parts = [
        played("h tau=0.5", 2.0, 2.0, family="h", setting="tau=0.5"),
        played("h tau=0.9", 4.0, 1.0, family="h", setting="tau=0.9"),
        played("other", 3.0, 1.9),
        played("oracle", 1.0, 0.1, kind="oracle"),
    ]
    for seed in (0, 1):
        for price, nfe in ((0.1, 4.0), (1.0, 2.0)):
            labels = {"family": "l", "setting": f"price={price}", "training_seed": seed}
            parts.append(played(f"l price={price} #{seed}", nfe, 2.5 - 0.4 * nfe + 0.1 * seed, **labels))
    return together(*parts)


def test_advantages_of_a_table_are_those_of_the_frontier() -> None:
    table = curves()
    found = advantages(table, [2.0, 3.0, 1.5], ["path_nats"])
    best = found[found["metric"] == "frontier"].set_index("target_nfe")
    assert list(best.index) == [2.0, 3.0] and set(best["of"]) == {"h"}  # oracles are no opponents
    assert best.loc[3.0, "value"] == pytest.approx(1.5, abs=0.05)
    gains = found[found["metric"] == "advantage"]
    assert set(gains["arm"]) == {"l"} and (gains["training_seeds"] == 2).all() and (gains["n"] == 40).all()
    assert set(gains["setting"].dropna()) == {"price=0.1", "price=1.0"}
    at = gains.set_index("target_nfe").loc[3.0]
    assert at["value"] == pytest.approx(at["frontier"] - at["own"]) == pytest.approx(0.15, abs=0.05)
    assert (at["of"], at["nfe"]) == ("h", 3.0)
    assert at["seed_low"] < at["value"] < at["seed_high"]
    assert at["low"] < at["value"] < at["high"]
    edge = frontier_of(table, "path_nats")
    assert edge.best(3.0) == ("h", best.loc[3.0, "value"])


def test_opponents_can_be_named() -> None:
    table = curves()
    found = advantages(table, [3.5], ["path_nats"], opponents=["other"])
    gains = found[(found["metric"] == "advantage") & found["target_nfe"].notna()]
    assert set(gains["arm"]) == {"h", "l"} and set(gains["of"]) == {"other"}
    seeds = frontier_of(table, "path_nats", opponents=["l"])
    assert set(seeds.families) == {"l #0", "l #1"}
    with pytest.raises(UserError, match="no family 'x'"):
        advantages(table, [3.5], opponents=["x"])
    alone = table[table["kind"] == "learned"]
    assert advantages(alone, [3.5]).empty
    with pytest.raises(UserError, match="no arms"):
        frontier_of(alone, "path_nats")


def test_mixtures_of_a_table_are_compared_at_the_targets() -> None:
    table = together(
        arm("a", nfe=2, correct=0.2), arm("b", nfe=4, correct=0.8), arm("l", nfe=3, correct=0.6, training_seed=0)
    )
    found = advantages(table, [3.0], ["accuracy"], mixed=True).query("metric == 'advantage'")
    assert found[["of", "grid"]].to_numpy().tolist() == [["a or b", "mixtures of two"]]
    assert found["value"].iloc[0] == pytest.approx(0.1)


def test_a_validation_table_chooses_the_opponent() -> None:
    table, validation = curves(), curves(rows=20)
    validation.loc[validation["arm"] == "other", "nats"] = 0.0
    found = advantages(table, [3.0], ["path_nats"], validation=validation)
    assert set(found[found["target_nfe"] == 3.0]["of"]) == {"other"}


def test_accuracy_under_parallelism_by_hand() -> None:
    """Two rows of 10 tokens: 1, 2 and 5 tokens per forward at 100%, 50% and 100%; the second falls out."""
    table = together(
        arm("a", family="x", correct=1, nfe=10, tokens=10, rows=2),
        arm("b", family="x", correct=[1, 0], nfe=5, tokens=10, rows=2),
        arm("c", family="x", correct=1, nfe=2, tokens=10, rows=2),
        arm("d", correct=[1, 0], nfe=5, tokens=10, rows=2),
    )
    found = aup(table).set_index("arm")
    assert found.loc["x", "value"] == pytest.approx(1 * 100 + (5 - 1) * 100)
    assert found.loc["d", "value"] == pytest.approx(2 * 50)  # one point: no weight
    assert (found.loc["x", "points"], found.loc["d", "n"]) == (3, 2)


def test_a_loss_of_accuracy_weighs_exponentially() -> None:
    correct = np.repeat([1.0, 0.0], [97, 3])
    table = together(
        arm("a", family="x", correct=1, nfe=4, rows=100), arm("b", family="x", correct=correct, nfe=2, rows=100)
    )
    weighed = 97 * math.exp(-3 * (1 - 0.97))
    assert aup(table)["value"][0] == pytest.approx(1 * 100 + (2 - 1) * (100 + weighed) / 2)
    own = 97 * math.exp(-3 * (1 - 97 / 200)), 100 * math.exp(-3 * (1 - 100 / 200))
    assert aup(table, best=200)["value"][0] == pytest.approx(100 + sum(own) / 2)
    assert (aup(table)["low"] <= aup(table)["value"]).all()
