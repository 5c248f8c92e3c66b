"""Exact Markov chains: sequences whose every conditional is known in closed form."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from numpy.typing import NDArray

from orderppl.errors import UserError

Array = NDArray[Any]


def sample_chains(n: int, *, num_states: int = 4, stay: float = 0.85, length: int = 16, seed: int = 0) -> Dataset:
    """Draw sequences of a stationary chain that stays with probability `stay` and else moves to any other state.

    The start is uniform over the states, which is the stationary law. Rows are drawn one after the other, so that the
    first rows do not depend on `n`.

    Args:
        n: number of sequences.
        num_states: K; tokens are 0..K-1 (MASK is K by the convention of the exact denoiser).
        stay: probability of repeating the state.
        length: L.
        seed: fixes the result.

    Returns:
        Column `tokens`, int64 lists of length L.

    Raises:
        UserError: a setting is out of range.
    """
    check_states(n, num_states, stay)
    if length < 1:
        raise UserError("length", f"{length} is too small", "give at least 1")
    rng = np.random.default_rng(seed)
    uniform = rng.random((n, length, 2))  # [N, L, 2]
    offset = draw_offsets(uniform, num_states, stay)  # [N, L]
    offset[:, 0] = np.floor(uniform[:, 0, 1] * num_states).astype(np.int64)
    tokens = np.cumsum(offset, 1) % num_states  # states are the running sum, [N, L]
    return Dataset.from_dict({"tokens": tokens.tolist()}, features=Features({"tokens": List(Value("int64"))}))


def check_states(n: int, num_states: int, stay: float) -> None:
    """Refuse settings of a field whose neighbours share a state with probability `stay` that make no sense.

    Raises:
        UserError: no sequence, fewer than two states, or a `stay` that is no probability.
    """
    for name, value, least in (("n", n, 1), ("num_states", num_states, 2)):
        if value < least:
            raise UserError(name, f"{value} is too small", f"give at least {least}")
    if not 0 <= stay <= 1:
        raise UserError("stay", f"{stay} is no probability", "give a number in [0, 1]")


def draw_offsets(uniform: Array, num_states: int, stay: float) -> Array:
    """What a state adds to that of the position before it, modulo K: 0 with probability `stay`, else one of 1..K-1.

    Args:
        uniform: float64 [*, 2], uniform draws.
        num_states: K.
        stay: probability of 0.

    Returns:
        int64 [*].
    """
    other = 1 + np.floor(uniform[..., 1] * (num_states - 1)).astype(np.int64)
    return np.where(uniform[..., 0] < stay, 0, other)
