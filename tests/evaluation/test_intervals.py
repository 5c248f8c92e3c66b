"""Bootstrap intervals against the normal approximation, and their pairing."""

import math

import pytest
import torch

from orderppl.errors import UserError
from orderppl.evaluation import bootstrap_mean, paired_difference


def test_matches_the_standard_error():
    # 2,000 rows: half-width 1.96 * s / sqrt(n), within 10% (Monte Carlo error of 2,000 resamples is about 3%).
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    interval = bootstrap_mean(values)
    assert interval.value == pytest.approx(values.mean().item())
    width = 1.96 * values.std().item() / math.sqrt(2000)
    assert interval.high - interval.value == pytest.approx(width, rel=0.1)
    assert interval.value - interval.low == pytest.approx(width, rel=0.1)
    narrow = bootstrap_mean(values, level=0.5)
    assert interval.low < narrow.low < narrow.high < interval.high


def test_is_seeded():
    values = torch.arange(50.0)
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


def test_weights_make_a_ratio_of_totals():
    values, weights = torch.tensor([1.0, 4.0]), torch.tensor([3.0, 1.0])
    interval = bootstrap_mean(values, weights)
    assert interval.value == pytest.approx(7 / 4)
    assert (interval.low, interval.high) == (1.0, 4.0)  # the resamples are (1, 1), (1, 4), (4, 4)


def test_pairing_removes_what_the_rows_share():
    shared = torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    better = paired_difference(shared + 0.1, shared)
    assert better.low == pytest.approx(0.1)
    assert better.high == pytest.approx(0.1)
    alone = bootstrap_mean(shared)
    assert alone.high - alone.low > 0.1


@pytest.mark.parametrize(
    "call",
    [
        lambda: bootstrap_mean(torch.zeros(0)),
        lambda: bootstrap_mean(torch.ones(2), torch.zeros(2)),
        lambda: bootstrap_mean(torch.ones(2), level=1.0),
        lambda: paired_difference(torch.ones(2), torch.ones(3)),
    ],
)
def test_bad_input(call):
    with pytest.raises(UserError):
        call()
