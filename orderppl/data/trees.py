"""Exact Markov fields on binary trees: sequences whose every conditional is known by belief propagation."""

from __future__ import annotations

import numpy as np
from datasets import Dataset, Features, List, Value

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
    for name, value, least in (("n", n, 1), ("num_states", num_states, 2), ("depth", depth, 1)):
        if value < least:
            raise UserError(name, f"{value} is too small", f"give at least {least}")
    if not 0 <= stay <= 1:
        raise UserError("stay", f"{stay} is no probability", "give a number in [0, 1]")
    uniform = np.random.default_rng(seed).random((n, 2**depth - 1, 2))  # [N, L, 2]
    # offset 0 with probability stay, else one of 1..K-1, from the parent's state modulo K
    offset = np.where(
        uniform[..., 0] < stay, 0, 1 + np.floor(uniform[..., 1] * (num_states - 1)).astype(np.int64)
    )  # [N, L]
    tokens = np.floor(uniform[..., 1] * num_states).astype(np.int64)  # the root keeps this; children follow
    for node in range(1, tokens.shape[1]):
        tokens[:, node] = (tokens[:, (node - 1) // 2] + offset[:, node]) % num_states
    return Dataset.from_dict({"tokens": tokens.tolist()}, features=Features({"tokens": List(Value("int64"))}))
