"""Order statistics worked by hand (signs, ties, padding), against scipy, and on the exact chain's best order."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from orderppl.diagnostics import order, to_inference_data
from orderppl.errors import UserError
from orderppl.models.denoisers import MarkovChainDenoiser

from chain_programs import chain_batch, chain_programs, fixed_guide

nan = np.nan


def draws(*orders: object) -> xr.DataArray:
    """Orders [draw][sequence][position] as in a posterior group; a single list of positions is one sequence."""
    values = np.array(orders)
    values = values[:, None] if values.ndim == 2 else values
    dims = ("chain", "draw", "sequence", "position")
    return xr.DataArray(values[None], dims=dims, coords={dim: np.arange(n) for dim, n in zip(dims, (1, *values.shape))})  # noqa: B905


def random_draws(rows: int = 3, length: int = 7, steps: int = 4, padded: bool = True) -> xr.DataArray:
    values = np.random.default_rng(0).integers(0, steps, size=(20, rows, length))
    if padded:
        values[:, 1, 4:] = -1
        values[:, 2, :2] = -1
    return draws(*values)


def test_mean_entropy_and_probabilities():
    found = draws([[0, 1, 2], [1, 0, -1]], [[0, 2, 1], [1, 1, -1]])
    assert order.mean_step(found).values.tolist() == [[0, 1.5, 1.5], [1, 0.5, pytest.approx(nan, nan_ok=True)]]
    probs = order.step_probs(found, 3)
    assert probs.values[0].tolist() == [[1, 0, 0], [0, 0.5, 0.5], [0, 0.5, 0.5]]
    assert np.isnan(probs.values[1, 2]).all()
    entropy = order.step_entropy(found, 3).values
    assert entropy == pytest.approx(np.array([[0, np.log(2), np.log(2)], [0, np.log(2), nan]]), nan_ok=True)


def test_precedence_and_ties():
    found = order.precedence(draws([[0, 1, 1], [0, -1, 1]], [[1, 0, 2], [0, -1, 0]]))
    assert found.dims == ("sequence", "position", "other")
    assert found.values[0].tolist() == [[0, 0.5, 1], [0.5, 0, 0.5], [0, 0, 0]]
    assert found.values[1] == pytest.approx(np.array([[0, nan, 0.5], [nan, nan, nan], [0, nan, 0]]), nan_ok=True)
    # positions 1 and 2 are revealed together in half of the draws: 1 - 0.5 - 0
    assert 1 - found[0, 1, 2] - found[0, 2, 1] == 0.5


@pytest.mark.parametrize(
    ("steps", "tau"),
    [
        ([0, 1, 2, 3], 1),
        ([3, 2, 1, 0], -1),
        ([0, 0, 1, 1], 4 / np.sqrt(6 * 4)),
        ([0, 1, 0, 1], 2 / np.sqrt(6 * 4)),
        ([0, -1, 1, -1], 1),
        ([1, 1, 1, 1], nan),
        ([0, -1, -1, -1], nan),
    ],
)
def test_kendall_by_hand(steps, tau):
    assert float(order.kendall_left_to_right(draws(steps)).item()) == pytest.approx(tau, nan_ok=True)


def test_rank_correlations_agree_with_scipy():
    found = random_draws()
    kendall, spearman = order.kendall_left_to_right(found), order.spearman_left_to_right(found)
    between = np.zeros(3)
    for row in range(3):
        kept = found.values[0, 0, row] >= 0
        place = np.arange(kept.sum())
        for draw in range(20):
            steps = found.values[0, draw, row, kept]
            if len(set(steps)) == 1:
                assert np.isnan(kendall[0, draw, row]) and np.isnan(spearman[0, draw, row])
                continue
            assert float(kendall[0, draw, row]) == pytest.approx(stats.kendalltau(steps, place)[0])
            assert float(spearman[0, draw, row]) == pytest.approx(stats.spearmanr(steps, place)[0])
        pairs = found.values[0, :, row][:, kept].reshape(10, 2, -1)
        between[row] = np.nanmean([stats.kendalltau(*pair)[0] for pair in pairs])
    assert order.kendall_between_draws(found).values == pytest.approx(between)
    same = draws([0, 2, 1], [0, 2, 1], [0, 2, 1])
    assert order.kendall_between_draws(same).item() == 1
    assert order.kendall_between_draws(draws([0, 1, 2], [2, 1, 0])).item() == -1
    with pytest.raises(UserError, match="single draw"):
        order.kendall_between_draws(draws([0, 1]))


def test_sizes_and_fractions():
    found = draws([[0, 2, 0, 1], [1, 1, -1, -1]])
    assert order.set_sizes(found, 3).values[0, 0].tolist() == [[2, 1, 1], [0, 2, 0]]
    assert order.revealed_fraction(found, 3).values[0, 0].tolist() == [[0.5, 0.75, 1], [0, 1, 1]]
    assert order.forced_share(found, 3).values[0, 0].tolist() == [0.25, 0]
    assert order.empty_steps(found, 3).values[0, 0].tolist() == [0, 1]  # step 0 of the second; step 2 is never made


@pytest.mark.parametrize(
    ("steps", "ratio"),
    [
        ([0, 0, 1, 1], (2 / 3) / (2 / 6)),
        ([0, 1, 0, 1], 0),
        ([0, -1, 0, 1, 1], (2 / 3) / (2 / 6)),  # padding between neighbours
        ([0, 0, 0, 0], 1),
        ([0, 1, 2, 3], nan),
        ([0, -1, -1, -1], nan),
    ],
)
def test_adjacency_by_hand(steps, ratio):
    assert float(order.adjacency(draws(steps)).item()) == pytest.approx(ratio, nan_ok=True)


@pytest.mark.parametrize(
    ("steps", "k", "in_order", "span"),
    [
        ([0, 1, 2, 3], 1, 1, 1),
        ([0, 1, 2, 3], 2, 1, 1),
        ([3, 2, 1, 0], 1, 1 / 4, 0),
        ([3, 2, 1, 0], 2, 2 / 4, 0),
        ([0, 0, 1, 1], 1, 1, 1),
        ([1, 1, 0, 0], 1, 1 / 2, 2 / 3),  # the first set is not leftmost; 1 -> 0 goes back
        ([0, 2, 1, 3], 1, 3 / 4, 0),  # step 1 reveals the second of three; neighbours jump
        ([0, 2, 1, 3], 2, 1, 0),
        ([0, 1, 1, 3], 2, 1, 1 / 2),
        ([-1, 0, -1, 1], 1, 1, 1),
        ([0, -1, -1, -1], 1, 1, nan),
    ],
)
def test_arness_by_hand(steps, k, in_order, span):
    assert float(order.global_arness(draws(steps), k).item()) == pytest.approx(in_order)
    assert float(order.local_arness(draws(steps), k).item()) == pytest.approx(span, nan_ok=True)


def test_number_of_orders():
    found = draws([[0, 1], [0, -1]], [[0, 1], [0, -1]], [[1, 0], [0, -1]], [[0, 0], [0, -1]])
    assert order.distinct_orders(found).values.tolist() == [3, 1]
    assert order.effective_orders(found).values == pytest.approx([np.exp(1.5 * np.log(2)), 1])


def test_token_types():
    words = {
        "12": "digit",
        "3.5": "digit",
        "\u01207": "digit",
        "+": "operator",
        "\u00d7": "operator",
        "-": "operator",
        "=": "=",
        "####": "####",
        "#": "####",
        "##ing": "word",
        "\u2581apples": "word",
        "don't": "word",
        "<<": "other",
        ".": "other",
        "a1": "other",
        "": "padding",
    }
    assert order.token_types(np.array(list(words))).tolist() == list(words.values())


def test_when_kinds_are_revealed():
    found = draws([[0, 1, 2], [0, 1, -1]], [[0, 1, 1], [0, 0, -1]])
    token = np.array([["1", "+", "2"], ["=", "1", ""]])
    types = order.token_type_steps(found.assign_coords(token=(("sequence", "position"), token)))
    assert dict(zip(types["token_type"].values, types["tokens"].values, strict=True)) == {
        "digit": 3,
        "operator": 1,
        "=": 1,
    }
    # digits: steps 0, 2 and 0, 1 in the first sequence, 1 and 0 in the second
    assert types["mean_step"].values == pytest.approx([4 / 6, 1, 0])
    assert types["mean_place"].values == pytest.approx([(1 / 3 + 1 + 1 / 2 + 1 + 1 + 1) / 6, (2 / 3 + 1) / 2, 3 / 4])
    with pytest.raises(UserError, match="token"):
        order.token_type_steps(found)


@pytest.mark.parametrize("missing", [-1, nan])
def test_what_is_visible_changes_nothing(missing):
    """Every statistic with padding and given positions is that of the others alone, wherever these stand."""
    padded = random_draws(rows=1, length=6, padded=False)
    wide = np.full((1, 20, 1, 11), missing)
    kept = [0, 2, 3, 6, 7, 10]
    wide[..., kept] = padded.values
    wide = draws(*wide[0])
    for function in (
        order.kendall_left_to_right,
        order.spearman_left_to_right,
        order.kendall_between_draws,
        order.adjacency,
        order.global_arness,
        order.local_arness,
        order.distinct_orders,
        order.effective_orders,
        lambda x: order.set_sizes(x, 4),
        lambda x: order.revealed_fraction(x, 4),
        lambda x: order.forced_share(x, 4),
        lambda x: order.empty_steps(x, 4),
    ):
        assert np.array_equal(function(padded).values, function(wide).values, equal_nan=True)
    assert np.array_equal(order.precedence(padded), order.precedence(wide).isel(position=kept, other=kept))
    assert np.array_equal(order.step_entropy(padded, 4), order.step_entropy(wide, 4).isel(position=kept))


def test_a_plan_of_the_best_order_is_dyadic():
    """Exact chain, K = 4, stay 0.85, L = 16, T = 4: steps and precedence of a plan that follows the best order."""
    denoiser = MarkovChainDenoiser(4, 0.85, 16)
    best = denoiser.best_order(4)[0]
    model, _ = chain_programs(16, 4, num_states=4)
    data = to_inference_data(model, fixed_guide(best, 4, 12.0), chain_batch(3, 16, 4), num_samples=50)
    steps = data["posterior"]["reveal_step"]
    mean = order.mean_step(steps)
    assert np.abs(mean - best.numpy()).max() < 0.1
    assert order.set_sizes(steps, 4).mean(("chain", "draw", "sequence")).values == pytest.approx(
        np.bincount(best.numpy()), abs=0.1
    )
    first = order.precedence(steps).isel(sequence=0).values
    expected = best[:, None].numpy() < best[None, :].numpy()
    assert np.abs(first - expected).max() < 0.1
    # Dyadic: whatever is revealed at a step lies between neighbours that were revealed before, one by one.
    for step in (1, 2, 3):
        earlier = np.flatnonzero(best.numpy() < step)
        gaps = np.searchsorted(earlier, np.flatnonzero(best.numpy() == step))
        assert len(set(gaps.tolist())) >= len(gaps) - 2
    assert float(order.adjacency(steps).mean()) < 0.5


def test_faults_are_named():
    with pytest.raises(UserError, match="chain, draw"):
        order.mean_step(draws([0, 1])[0, 0])
    with pytest.raises(UserError, match="not positive"):
        order.global_arness(draws([0, 1]), 0)
