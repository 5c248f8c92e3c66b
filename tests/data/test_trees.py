import numpy as np
import pytest

from orderppl.data.collate import tensors
from orderppl.data.trees import sample_trees
from orderppl.errors import UserError

PARENT = (np.arange(1, 15) - 1) // 2


def test_law_of_the_tree() -> None:
    n, num_states, stay = 4000, 4, 0.85
    tokens = np.array(sample_trees(n, num_states=num_states, stay=stay, depth=4, seed=0)["tokens"][:])
    assert tokens.shape == (n, 15)
    expected = np.full((num_states, num_states), (1 - stay) / (num_states - 1))
    np.fill_diagonal(expected, stay)
    for child, parent in enumerate(PARENT, start=1):
        pairs = np.zeros((num_states, num_states))
        np.add.at(pairs, (tokens[:, parent], tokens[:, child]), 1)
        visits = pairs.sum(1, keepdims=True)
        z = (pairs / visits - expected) / np.sqrt(expected * (1 - expected) / visits)
        assert np.abs(z).max() < 4.5
    root = np.bincount(tokens[:, 0], minlength=num_states) / n
    assert np.abs((root - 0.25) / np.sqrt(0.25 * 0.75 / n)).max() < 4.5


def test_seed_prefix_and_batch_format() -> None:
    assert sample_trees(5, seed=1)["tokens"][:] == sample_trees(9, seed=1)["tokens"][:5]
    assert sample_trees(9, seed=1)["tokens"][:] != sample_trees(9, seed=2)["tokens"][:]
    batch = tensors(sample_trees(7, depth=3))
    assert batch["tokens"].shape == (7, 7)
    assert batch["attention_mask"].all()


def test_extreme_stays() -> None:
    for row in sample_trees(20, stay=1.0)["tokens"]:
        assert len(set(row)) == 1
    rows = np.array(sample_trees(20, stay=0.0, num_states=3)["tokens"][:])
    assert (rows[:, 1:] != rows[:, PARENT]).all()


@pytest.mark.parametrize(("name", "value"), [("n", 0), ("num_states", 1), ("depth", 0), ("stay", 1.5)])
def test_bad_settings(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"^{name}: "):
        sample_trees(**({"n": 3} | {name: value}))  # type: ignore[arg-type]
