"""Counter-based noise: reproducible by coordinates, uniform and independent across them."""

import math

import torch

from orderppl.decoding.noise import TOKENS, generator_seed, sample_categorical, uniform_noise


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
