from itertools import pairwise

import numpy as np
import pytest
import torch

from orderppl.data import Chains, Trees
from orderppl.errors import UserError

PARENT = (np.arange(1, 15) - 1) // 2


def _check_steps(first: np.ndarray, second: np.ndarray, num_states: int, stay: float) -> None:
    pairs = np.zeros((num_states, num_states))
    np.add.at(pairs, (first.ravel(), second.ravel()), 1)
    expected = np.full((num_states, num_states), (1 - stay) / (num_states - 1))
    np.fill_diagonal(expected, stay)
    visits = pairs.sum(1, keepdims=True)
    z = (pairs / visits - expected) / np.sqrt(expected * (1 - expected) / visits)
    assert np.abs(z).max() < 4.5


def _check_start(states: np.ndarray, num_states: int) -> None:
    n = len(states)
    start = np.bincount(states, minlength=num_states) / n
    assert np.abs((start - 0.25) / np.sqrt(0.25 * 0.75 / n)).max() < 4.5


def test_distribution_of_the_chain() -> None:
    tokens = Chains(num_states=4, stay=0.85, length=16).sample(4000, 0)
    assert tokens.shape == (4000, 16)
    _check_steps(tokens[:, :-1], tokens[:, 1:], 4, 0.85)
    _check_start(tokens[:, 0], 4)


def test_distribution_of_the_tree() -> None:
    tokens = Trees(num_states=4, stay=0.85, depth=4).sample(4000, 0)
    assert tokens.shape == (4000, 15)
    for child, parent in enumerate(PARENT, start=1):
        _check_steps(tokens[:, parent], tokens[:, child], 4, 0.85)
    _check_start(tokens[:, 0], 4)


@pytest.mark.parametrize("kind", [Chains, Trees])
def test_seed_and_prefix(kind: type[Chains] | type[Trees]) -> None:
    data = kind()
    assert (data.sample(5, 1) == data.sample(9, 1)[:5]).all()
    assert (data.sample(9, 1) != data.sample(9, 2)).any()
    first, again, other = (
        kind(train=5, validation=3, test=2, seed=seed).splits()["train"].batch.tokens for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_extreme_stays() -> None:
    for row in Chains(stay=1.0).sample(20, 0):
        assert len(set(row)) == 1
    for row in Chains(stay=0.0, num_states=2).sample(20, 0):
        assert all(a != b for a, b in pairwise(row))
    for row in Trees(stay=1.0).sample(20, 0):
        assert len(set(row)) == 1
    rows = Trees(stay=0.0, num_states=3).sample(20, 0)
    assert (rows[:, 1:] != rows[:, PARENT]).all()


def test_splits() -> None:
    data = Chains(num_states=5, length=7, train=4, validation=3, test=2)
    splits = data.splits()
    assert {name: tuple(rows.batch.tokens.shape) for name, rows in splits.items()} == {
        "train": (4, 7),
        "validation": (3, 7),
        "test": (2, 7),
    }
    for rows in splits.values():
        assert rows.batch.attention_mask.all() and rows.batch.latent.all()
        assert rows.references is None and rows.tokenizer is None
        assert rows.texts(rows.batch.tokens)[0] == " ".join(map(str, rows.batch.tokens[0].tolist()))
    assert (data.vocab_size, data.mask_index, data.length, data.end_index) == (6, 5, 7, None)
    assert data.splits() is splits
    assert Trees(depth=3, train=2, validation=1, test=1).length == 7


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        *((kind, *bad) for kind in (Chains, Trees) for bad in (("train", 0), ("num_states", 1), ("stay", 1.5))),
        (Chains, "length", 0),
        (Trees, "depth", 0),
    ],
)
def test_bad_settings(kind: type[Chains] | type[Trees], name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"^{name}: "):
        kind(**{name: value})  # type: ignore[arg-type]
