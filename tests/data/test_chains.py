from itertools import pairwise

import numpy as np
import pytest

from orderppl.data.chains import sample_chains
from orderppl.data.collate import tensors
from orderppl.errors import UserError


def test_law_of_the_chain() -> None:
    n, num_states, stay, length = 4000, 4, 0.85, 16
    tokens = np.array(sample_chains(n, num_states=num_states, stay=stay, length=length, seed=0)["tokens"][:])
    assert tokens.shape == (n, length)
    pairs = np.zeros((num_states, num_states))
    np.add.at(pairs, (tokens[:, :-1].ravel(), tokens[:, 1:].ravel()), 1)
    expected = np.full((num_states, num_states), (1 - stay) / (num_states - 1))
    np.fill_diagonal(expected, stay)
    visits = pairs.sum(1, keepdims=True)
    z = (pairs / visits - expected) / np.sqrt(expected * (1 - expected) / visits)
    assert np.abs(z).max() < 4.5
    start = np.bincount(tokens[:, 0], minlength=num_states) / n
    assert np.abs((start - 0.25) / np.sqrt(0.25 * 0.75 / n)).max() < 4.5


def test_seed_and_prefix() -> None:
    assert sample_chains(5, seed=1)["tokens"][:] == sample_chains(9, seed=1)["tokens"][:5]
    assert sample_chains(9, seed=1)["tokens"][:] != sample_chains(9, seed=2)["tokens"][:]


def test_extreme_stays_and_batch_format() -> None:
    for row in sample_chains(20, stay=1.0)["tokens"]:
        assert len(set(row)) == 1
    for row in sample_chains(20, stay=0.0, num_states=2)["tokens"]:
        assert all(a != b for a, b in pairwise(row))
    batch = tensors(sample_chains(7, length=5))
    assert batch["tokens"].shape == (7, 5)
    assert batch["attention_mask"].all()


@pytest.mark.parametrize(("name", "value"), [("n", 0), ("num_states", 1), ("length", 0), ("stay", 1.5)])
def test_bad_settings(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"^{name}: "):
        sample_chains(**({"n": 3} | {name: value}))  # type: ignore[arg-type]
