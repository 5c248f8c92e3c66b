"""Means, paired differences and pass@k of tables whose numbers are given by hand."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

from orderppl import Batch, evaluate
from orderppl.errors import UserError
from orderppl.evaluation import Arm, paired_difference, summary
from orderppl.evaluation.intervals import bootstrap_mean
from orderppl.evaluation.table import marginal, pass_at_k
from orderppl.guides import PolicyGuide
from orderppl.inference.exact import all_orders, exact_evidence
from orderppl.models import UnmaskingModel
from orderppl.models.denoisers import MarkovChainDenoiser
from orderppl.policies import Ranked

from measured_rows import arm, together


def lines(frame: pd.DataFrame) -> dict[tuple[str, str], pd.Series]:
    return {(row["metric"], row["arm"]): row for _, row in frame.iterrows()}


def test_a_line_per_metric_and_arm() -> None:
    table = together(
        arm("a", correct=[1, 0, 1, 1], nats=[2.0, 4.0, 6.0, 8.0], nfe=[1, 2, 3, 4], tokens=[1, 2, 3, 4]),
        arm("b", correct=[0, 0, 0, 1], nats=[1.0, 2.0, 3.0, 4.0], nfe=[2, 2, 2, 2], tokens=[1, 2, 3, 4]),
    )
    found = lines(summary(table))
    assert set(found) == {(metric, name) for metric in ("accuracy", "path_nats", "nfe") for name in "ab"}
    assert found["accuracy", "a"]["value"] == 0.75
    assert found["path_nats", "a"]["value"] == pytest.approx(20 / 10)  # the ratio of totals, not the mean of ratios
    assert found["nfe", "a"]["value"] == 2.5
    assert found["path_nats", "a"]["run"] == "teacher_forced"
    assert found["accuracy", "a"]["run"] == found["nfe", "a"]["run"] == "decoding"
    first = found["accuracy", "a"]
    assert (first["n"], first["seeds"], first["steps"], first["family"]) == (4, 1, 4, "a")
    assert (first["nfe"], first["nfe_min"], first["nfe_max"], first["tokens_per_forward"]) == (2.5, 1, 4, 1.0)
    assert first["nfe_se"] == pytest.approx(np.std([1, 2, 3, 4], ddof=1) / 2)
    assert found["accuracy", "b"]["nfe_se"] == 0.0
    for line in found.values():
        assert line["low"] <= line["value"] <= line["high"]
    same = bootstrap_mean([1, 0, 1, 1])
    assert (first["low"], first["high"]) == (same.low, same.high)


def test_seeds_are_averaged_by_row() -> None:
    seeds = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
    table = together(*(arm("a", correct=correct, seed=seed) for seed, correct in enumerate(seeds)))
    line = lines(summary(table, ["accuracy"]))["accuracy", "a"]
    assert (line["value"], line["seed_low"], line["seed_high"], line["seeds"]) == (pytest.approx(0.5), 0.25, 0.75, 3)
    of_means = bootstrap_mean(np.mean(seeds, axis=0))
    assert (line["low"], line["high"]) == (pytest.approx(of_means.low), pytest.approx(of_means.high))


def test_the_order_of_the_rows_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    table = together(*(arm(name, correct=rng.integers(0, 2, 30), nats=rng.random(30), rows=30) for name in "abc"))
    shuffled = table.sample(frac=1, random_state=0)
    before, after = (summary(part).sort_values(["metric", "arm"], ignore_index=True) for part in (table, shuffled))
    pd.testing.assert_frame_equal(before, after)


def test_any_column_is_a_metric() -> None:
    table = arm("a", nats=[2.0, 4.0, 6.0, 8.0])
    table["gap_nats"] = table["nats"] - [2.0, 3.0, 4.0, 5.0]
    line = lines(summary(table, ["gap_nats"]))["gap_nats", "a"]
    assert line["value"] == pytest.approx(1.5)  # of a row, not of a token


def test_a_difference_is_paired_by_row() -> None:
    rng = np.random.default_rng(1)
    shared = rng.normal(size=200)
    table = together(
        arm("a", nats=shared + 4.4, rows=200), arm("b", nats=shared[::1] + 4.0, rows=200), arm("c", nats=4.0, rows=200)
    )
    gap = paired_difference(table, "a", "b", "path_nats")
    assert [gap.value, gap.low, gap.high] == pytest.approx([0.1] * 3)
    wide = paired_difference(table, "a", "c", "path_nats")
    assert wide.high - wide.low > 0.05
    assert paired_difference(table, "b", "a", "path_nats").value == pytest.approx(-0.1)


def test_training_seeds_of_a_family_are_averaged() -> None:
    seeds = [
        arm(f"l #{seed}", family="l", correct=correct, training_seed=seed)
        for seed, correct in enumerate(([1, 1, 0, 0], [1, 1, 1, 0]))
    ]
    table = together(arm("a", correct=[1, 0, 0, 0]), *seeds)
    gap = paired_difference(table, "l", "a", "accuracy")
    expected = bootstrap_mean([0, 1, 0.5, 0])
    assert (gap.value, gap.low, gap.high) == (pytest.approx(0.375), expected.low, expected.high)
    with pytest.raises(UserError, match="several settings"):
        paired_difference(together(table, arm("l more", family="l", correct=1, training_seed=0)), "l", "a", "accuracy")
    with pytest.raises(UserError, match="no arm 'x'"):
        paired_difference(table, "x", "a", "accuracy")


def test_pass_at_k_counts_the_draws_with_a_right_one() -> None:
    right = [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 1]]  # 0, 1, 2 and 4 of 4 samples of a row
    table = together(*(arm("a", correct=correct, seed=seed) for seed, correct in enumerate(right)))
    found = pass_at_k(table, [1, 2, 4, 5])
    assert list(found["k"]) == [1, 2, 4]  # five samples were not made
    # of the 6 pairs of 4 samples 0, 3, 5 and 6 hold a right one
    means = [np.mean([0, 1 / 4, 2 / 4, 1]), np.mean([0, 3 / 6, 5 / 6, 1]), np.mean([0, 1, 1, 1])]
    assert list(found["value"]) == pytest.approx(means)
    assert set(found["metric"]) == {"pass_at_k"}
    assert (found["low"] <= found["value"]).all() and (found["value"] <= found["high"]).all()


def test_arms_are_compared_on_the_same_rows() -> None:
    table = together(arm("a", correct=1), arm("b", correct=1)[:3])
    with pytest.raises(UserError, match="'b' lacks 1 of 4 rows"):
        summary(table)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_value_is_named(value: float) -> None:
    table = together(arm("a", nats=1.0), arm("b", nats=[1.0, 2.0, value, 1.0]))
    with pytest.raises(UserError, match=r"row 2 of arm 'b' has path_nats -?inf"):
        summary(table)


def test_what_was_not_measured_is_said() -> None:
    for metric in ("accuracy", "speed"):
        with pytest.raises(UserError, match=f"{metric} was not measured"):
            summary(arm("a", nats=1.0), [metric])


def test_the_marginal_likelihood_is_a_mean_over_seeds_of_probabilities() -> None:
    nats = [[1.0, 800.0, 3.0], [2.0, 801.0, 3.0]]  # of two drawn orders; the second row underflows as a probability
    table = together(
        *(
            arm("a", nats=found, nfe=[seed + 1] * 3, tokens=[1, 2, 2], rows=3, seed=seed)
            for seed, found in enumerate(nats)
        ),
        arm("b", nats=[1.0, 2.0, 3.0], tokens=[1, 2, 2], rows=3),
    )
    one = -math.log((1 + math.exp(-1)) / 2)
    found = marginal(table)
    assert found[found["arm"] == "a"]["marginal_nats"].tolist() == pytest.approx([1 + one, 800 + one, 3.0])
    means = lines(summary(table, ["path_nats", "marginal_nats"]))
    assert means["marginal_nats", "a"]["value"] == pytest.approx((804 + 2 * one) / 5)
    assert means["path_nats", "a"]["value"] == pytest.approx(805 / 5)
    assert means["marginal_nats", "a"]["nfe"] == 1.5
    assert means["marginal_nats", "b"]["value"] == means["path_nats", "b"]["value"]  # one order, or one that is certain


def test_the_mean_probability_is_the_evidence() -> None:
    """Random sets on the exact chain, 400 orders of each of 8 rows, against the sum over all orders; |z| < 4.5."""
    denoiser = MarkovChainDenoiser(2, 0.8, 3)
    tokens = torch.cartesian_prod(*[torch.arange(2)] * 3)
    model = UnmaskingModel(denoiser, Ranked("random"), 2)
    orders = all_orders(PolicyGuide(Ranked("random"), denoiser, 2), Batch(tokens))
    exact = exact_evidence(model, orders, Batch(tokens)).exp().numpy()
    arms = [Arm("random", Ranked("random"), 2, seeds=range(400))]
    table = evaluate(arms, denoiser, Batch(tokens), metrics=["marginal_nats"], progress=False)
    probability = np.exp(-marginal(table).sort_values("row")["marginal_nats"].to_numpy())
    error = table.assign(p=np.exp(-table["nats"])).groupby("row")["p"].std().to_numpy() / math.sqrt(400)
    assert np.abs((probability - exact) / error).max() < 4.5
    assert summary(table, ["marginal_nats"])["value"][0] < summary(table, ["path_nats"])["value"][0] - 0.01
