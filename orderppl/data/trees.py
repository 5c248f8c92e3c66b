"""Exact Markov fields on binary trees: sequences whose every conditional is known by belief propagation."""

from __future__ import annotations

import numpy as np
from datasets import Dataset, Features, List, Value

from orderppl.data.chains import check_states, draw_offsets
from orderppl.errors import UserError


def sample_trees(n: int, *, num_states: int = 4, stay: float = 0.85, depth: int = 4, seed: int = 0) -> Dataset:
    """Draw the states of complete binary trees: a child keeps its parent's state with probability `stay`.

    The root is uniform over the states; a child that does not keep its parent's state takes one of the others
    uniformly. Nodes stand in level order, parent(i) = (i - 1) // 2. Rows are drawn one after the other, so that the
    first rows do not depend on `n`.

    Args:
        n: number of trees.
        num_states: K; tokens are 0..K-1 (MASK is K by the convention of the exact denoiser).
        stay: probability of keeping the parent's state.
        depth: levels; a tree has 2^depth - 1 nodes.
        seed: fixes the result.

    Returns:
        Column `tokens`, int64 lists of length 2^depth - 1.

    Raises:
        UserError: a setting is out of range.
    """
    check_states(n, num_states, stay)
    if depth < 1:
        raise UserError("depth", f"{depth} is too small", "give at least 1")
    uniform = np.random.default_rng(seed).random((n, 2**depth - 1, 2))  # [N, L, 2]
    offset = draw_offsets(uniform, num_states, stay)  # from the state of the parent, [N, L]
    tokens = np.floor(uniform[..., 1] * num_states).astype(np.int64)  # the root keeps this; children follow
    for node in range(1, tokens.shape[1]):
        tokens[:, node] = (tokens[:, (node - 1) // 2] + offset[:, node]) % num_states
    return Dataset.from_dict({"tokens": tokens.tolist()}, features=Features({"tokens": List(Value("int64"))}))
