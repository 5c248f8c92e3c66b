"""Set-size schedules: hand-worked sizes and sums."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orderppl import UserError
from orderppl.policies.schedules import (
    CosineSizes,
    DreamSizes,
    FractionalSizes,
    LladaSizes,
    UniformSizes,
    make_sizes,
)

SCHEDULES = [UniformSizes(), UniformSizes(3), CosineSizes(), CosineSizes(5), FractionalSizes(1.0), FractionalSizes(2.7)]
SCHEDULES += [LladaSizes(), DreamSizes()]


def all_sizes(schedule, positions, num_steps):
    positions = torch.as_tensor(positions)
    steps = [schedule.sizes(positions, torch.full_like(positions, t), num_steps) for t in range(num_steps)]
    return torch.stack(steps, -1).tolist()


def test_uniform_spreads_the_remainder():
    assert all_sizes(UniformSizes(), [10, 8, 3], 4) == [[2, 3, 2, 3], [2, 2, 2, 2], [1, 1, 1, 0]]


def test_cosine_starts_small():
    # 16 (1 - cos(pi/2 t/4)): 0, 1.218, 4.686, 9.877, 16 -> 0, 1, 5, 10, 16
    assert all_sizes(CosineSizes(), [16], 4) == [[1, 4, 5, 6]]
    # 4 (1 - cos): 0.304, 1.172, 2.469 -> 0, 1, 2; at least one a step lifts this to 1, 2, 3
    assert all_sizes(CosineSizes(), [4], 4) == [[1, 1, 1, 1]]


def test_rounding_of_other_samplers():
    """LLaDA puts the remainder first; Dream takes floor(m (1 - next / now)) of m left, at 1, .75025, .5005, .25075."""
    assert all_sizes(LladaSizes(), [10, 8, 3], 4) == [[3, 3, 2, 2], [2, 2, 2, 2], [1, 1, 1, 0]]
    # 10 * 0.24975 = 2.5, 8 * 0.33289 = 2.7, 6 * 0.49900 = 2.99, and what is left
    assert all_sizes(DreamSizes(), [10], 4) == [[2, 2, 2, 4]]
    assert all_sizes(DreamSizes(), [3], 4) == [[1, 1, 1, 0]]


def test_fractional_mean():
    assert all_sizes(FractionalSizes(1.5), [9], 9) == [[1, 2, 1, 2, 1, 2, 0, 0, 0]]
    sizes = all_sizes(FractionalSizes(2.3), [23], 12)[0]
    assert sizes[:10] == [2, 2, 2, 3, 2, 2, 3, 2, 2, 3]
    assert set(sizes[10:]) == {0}
    assert all_sizes(FractionalSizes(1.5), [9], 3) == [[1, 2, 6]]  # the budget ends: everything left


def test_budget_per_row():
    sizes = UniformSizes().sizes(torch.tensor([6, 6]), torch.tensor([1, 1]), torch.tensor([2, 3]))
    assert sizes.tolist() == [3, 2]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(SCHEDULES), st.lists(st.integers(0, 40), min_size=1, max_size=4), st.integers(1, 12))
def test_sizes_sum_to_the_length_and_leave_no_gap(schedule, positions, num_steps):
    for length, sizes in zip(positions, all_sizes(schedule, positions, num_steps), strict=True):
        assert sum(sizes) == length
        masked = length
        for size in sizes:
            assert size >= 0
            assert size >= 1 or masked == 0
            masked -= size


def test_make_sizes():
    assert make_sizes("uniform") == UniformSizes()
    assert make_sizes("cosine") == CosineSizes()
    assert (make_sizes("llada"), make_sizes("dream")) == (LladaSizes(), DreamSizes())
    assert make_sizes(2) == FractionalSizes(2.0)
    assert make_sizes(CosineSizes(3)) == CosineSizes(3)


@pytest.mark.parametrize(
    "make",
    [lambda: UniformSizes(0), lambda: CosineSizes(-1), lambda: FractionalSizes(0.5), lambda: make_sizes("linear")],
)
def test_bad_schedules(make):
    with pytest.raises(UserError):
        make()
