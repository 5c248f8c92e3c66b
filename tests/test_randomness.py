"""Counter-based noise: reproducible by coordinates, uniform and independent across them."""

import contextlib
import math

import pytest
import torch

from orderppl.randomness import (
    TOKENS,
    BatchKeys,
    even_spread,
    generator_seed,
    keyed_draws,
    sample_categorical,
    stratified_uniform,
    uniform,
    uniform_noise,
)


def z_of_mean(values, mean, variance):
    return (values.double().mean() - mean) / math.sqrt(variance / values.numel())


def test_is_a_function_of_the_coordinates():
    ids = torch.tensor([5, 0, 9])
    noise = uniform_noise(3, ids, 2, 6)
    assert noise.dtype == torch.float64
    assert noise.shape == (3, 6)
    assert torch.equal(noise[[1]], uniform_noise(3, torch.tensor([0]), 2, 6))
    assert torch.equal(noise[:, :4], uniform_noise(3, ids, 2, 4))
    assert torch.equal(noise, uniform_noise(3, ids, torch.tensor([2, 2, 2]), 6))


def test_every_coordinate_matters():
    ids = torch.arange(4)
    base = uniform_noise(0, ids, 0, 8)
    for other in (
        uniform_noise(1, ids, 0, 8),
        uniform_noise(0, ids + 4, 0, 8),
        uniform_noise(0, ids, 1, 8),
        uniform_noise(0, ids, 0, 8, TOKENS),
        uniform_noise(-1, ids, 0, 8),
        uniform_noise(2**63 + 5, ids, 0, 8),
    ):
        assert (base != other).all()
    assert base.unique().numel() == base.numel()


def test_uniform_moments_and_cells():
    # n = 200,000; |z| < 4 for each statistic.
    noise = torch.cat([uniform_noise(11, torch.arange(1000), step, 20) for step in range(10)])
    assert ((noise > 0) & (noise < 1)).all()
    assert abs(z_of_mean(noise, 0.5, 1 / 12)) < 4
    assert abs(z_of_mean((noise - 0.5) ** 2, 1 / 12, 1 / 180)) < 4
    cells = torch.histc(noise.float(), 64, 0, 1)
    expected = noise.numel() / 64
    chi = ((cells - expected) ** 2 / expected).sum().item()
    assert abs((chi - 63) / math.sqrt(2 * 63)) < 4


def test_neighbouring_coordinates_are_uncorrelated():
    # n = 100,000 pairs each; the product of two centred uniforms has variance 1 / 144; |z| < 4.
    ids = torch.arange(5000)
    noise = uniform_noise(0, ids, 0, 20) - 0.5
    for other in (
        uniform_noise(0, ids + 1, 0, 20),
        uniform_noise(0, ids, 1, 20),
        uniform_noise(1, ids, 0, 20),
        uniform_noise(0, ids, 0, 20, TOKENS),
        uniform_noise(0, ids, 0, 21)[:, 1:],
    ):
        assert abs(z_of_mean(noise * (other - 0.5), 0.0, 1 / 144)) < 4


def test_sample_categorical_frequencies_and_excluded_classes():
    # n = 50,000; |z| < 4 per class.
    probs = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0], dtype=torch.float64)
    noise = uniform_noise(5, torch.arange(50_000), 0, 1)[:, 0]
    drawn = sample_categorical(probs.log().expand(50_000, -1), noise)
    for value, p in enumerate(probs.tolist()):
        if p == 0:
            assert not (drawn == value).any()
        else:
            assert abs(z_of_mean((drawn == value).double(), p, p * (1 - p))) < 4
    edges = torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    assert sample_categorical(probs.log().expand(2, -1), edges).tolist() == [1, 4]


def test_generator_is_read_not_advanced():
    generator = torch.Generator().manual_seed(12)
    assert generator_seed(generator) == 12
    torch.rand(3, generator=generator)
    assert generator_seed(generator) == 12
    torch.manual_seed(34)
    assert generator_seed(None) == 34


def keys_of(rows: torch.Tensor, epoch: int = 0, mine: torch.Tensor | None = None) -> BatchKeys:
    return BatchKeys(epoch, rows, torch.arange(len(rows)) if mine is None else mine)


CPU = torch.device("cpu")


def test_keyed_draws_do_not_see_the_batch_the_process_or_the_generator():
    rows = torch.tensor([7, 3, 11, 20, 5])

    def three_draws(keys: BatchKeys, width: int) -> list[torch.Tensor]:
        with keyed_draws(9, keys):
            size = len(keys.mine)
            return [uniform((2, size, width), CPU), uniform((size, width), CPU), stratified_uniform(size, CPU)]

    whole = three_draws(keys_of(rows), 6)
    torch.manual_seed(77)
    for process in range(2):
        mine = torch.arange(5)[process::2]
        orders, masks, parts = three_draws(keys_of(rows, mine=mine), 4)
        assert torch.equal(orders, whole[0][:, mine, :4])
        assert torch.equal(masks, whole[1][mine, :4])
        assert torch.equal(parts, whole[2][mine])
    in_another_batch = three_draws(keys_of(torch.tensor([2, 11, 7])), 6)
    assert torch.equal(in_another_batch[0][:, [2, 1]], whole[0][:, [0, 2]])
    with keyed_draws(9, keys_of(rows)):
        shared = uniform((3, 1, 6), CPU)  # no batch dimension: one draw for all sequences
    with keyed_draws(9, keys_of(rows, mine=torch.tensor([1, 3]))):
        assert torch.equal(uniform((3, 1, 6), CPU), shared)
    assert not torch.isin(shared, whole[0]).any()


def test_keyed_draws_of_a_position_do_not_see_what_stands_before_it():
    rows = torch.tensor([7, 3])
    places = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 1, 2, 3]])  # two columns of padding before the first row
    with keyed_draws(9, BatchKeys(0, rows, torch.arange(2), places)):
        padded, other_width = uniform((3, 2, 5), CPU), uniform((3, 2, 4), CPU)
    with keyed_draws(9, BatchKeys(0, rows, torch.arange(2))):
        plain, plain_width = uniform((3, 2, 5), CPU), uniform((3, 2, 4), CPU)
    assert torch.equal(padded[:, 0, 2:], plain[:, 0, :3])
    assert torch.equal(padded[:, 1], plain[:, 1, places[1]])
    assert torch.equal(other_width, plain_width)


def test_uniform_is_torch_s_outside_of_keyed_draws():
    torch.manual_seed(5)
    drawn = uniform((3, 4), CPU)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3, 4))


def test_keyed_draws_are_uniform_and_independent():
    # n = 192,000 numbers and pairs (a seventh fewer along an axis); |z| < 4.5 for each statistic.
    def draws(seed: int, epoch: int) -> torch.Tensor:
        with keyed_draws(seed, keys_of(torch.arange(1000), epoch)):
            return torch.stack([uniform((4, 1000, 8), CPU) for _ in range(6)])  # [draw, particle, row, position]

    noise = draws(3, 5)
    assert noise.unique().numel() == noise.numel()
    assert abs(z_of_mean(noise, 0.5, 1 / 12)) < 4.5
    assert abs(z_of_mean((noise - 0.5) ** 2, 1 / 12, 1 / 180)) < 4.5
    for axis in range(4):  # every row, particle, draw and position by itself
        means = noise.transpose(0, axis).flatten(1).mean(1)
        scores = (means - 0.5) * math.sqrt(12 * noise.numel() / len(means))
        assert scores.abs().max() < 4.5 + (axis == 2)  # the largest of 1,000
    centred = noise - 0.5
    pairs = [(centred, draws(3, 6) - 0.5), (centred, draws(4, 5) - 0.5)]
    pairs += [(centred.narrow(a, 0, n - 1), centred.narrow(a, 1, n - 1)) for a, n in enumerate(noise.shape)]
    for one, other in pairs:
        assert abs(z_of_mean(one * other, 0.0, 1 / 144)) < 4.5


@pytest.mark.parametrize("keyed", [False, True])
def test_stratified_draws_are_spread_evenly_and_uniform_for_each_sequence(keyed):
    # n = 3,000 batches of 8: a sequence hits each of the 8 cells in 1/8 of them, a batch hits every cell once, and
    # two sequences draw their slots without replacement. |z| < 4.5.
    hits = torch.zeros(8, 8)
    product = 0.0
    for epoch in range(3000):
        with keyed_draws(1, keys_of(torch.arange(8), epoch)) if keyed else contextlib.nullcontext():
            cell = (stratified_uniform(8, CPU) * 8).long()
        assert cell.sort().values.tolist() == list(range(8))
        hits[torch.arange(8), cell] += 1
        product += (cell[0] - 3.5).item() * (cell[1] - 3.5).item() / 3000
    assert ((hits - 375) / math.sqrt(3000 / 8 * 7 / 8)).abs().max() < 4.5
    # E = -Var / 7 with Var = 63 / 12; the product of two slots has a standard deviation below 5.25
    assert abs(product + 63 / 12 / 7) < 4.5 * 5.25 / math.sqrt(3000)


def test_even_places_are_the_same_whenever_asked_and_on_every_process():
    """One cell of the grid for each sequence of the global batch; outside of keyed draws in the order of the rows."""
    torch.testing.assert_close(even_spread(4, CPU), torch.tensor([0.125, 0.375, 0.625, 0.875], dtype=torch.float64))
    rows = torch.tensor([4, 9, 2, 7, 30])
    with keyed_draws(9, BatchKeys(3, rows, torch.arange(5))):
        whole = even_spread(5, CPU)
        drawn = uniform((5, 2), CPU)
        assert torch.equal(even_spread(5, CPU), whole)
    torch.testing.assert_close(whole.sort().values, (torch.arange(5, dtype=torch.float64) + 0.5) / 5)
    for process in range(2):
        mine = torch.arange(5)[process::2]
        with keyed_draws(9, BatchKeys(3, rows, mine)):
            assert torch.equal(even_spread(len(mine), CPU), whole[mine])
    with keyed_draws(9, BatchKeys(3, rows, torch.arange(5))):
        assert torch.equal(uniform((5, 2), CPU), drawn)  # asking takes no draw away
    places = []
    for epoch in range(600):
        with keyed_draws(9, BatchKeys(epoch, rows, torch.arange(5))):
            places.append(even_spread(5, CPU))
    # n = 600 epochs: each sequence has each of the 5 places in 1/5 of them, |z| < 4.5.
    for cell in torch.stack(places).mul(5).long().unbind(1):
        share = torch.bincount(cell, minlength=5) / 600
        assert ((share - 0.2).abs() < 4.5 * math.sqrt(0.2 * 0.8 / 600)).all()
