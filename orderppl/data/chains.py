"""Exact Markov chains: sequences whose every conditional is known in closed form."""

from __future__ import annotations

import numpy as np
from datasets import Dataset, Features, List, Value

from orderppl.errors import UserError


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
    for name, value, least in (("n", n, 1), ("num_states", num_states, 2), ("length", length, 1)):
        if value < least:
            raise UserError(name, f"{value} is too small", f"give at least {least}")
    if not 0 <= stay <= 1:
        raise UserError("stay", f"{stay} is no probability", "give a number in [0, 1]")
    rng = np.random.default_rng(seed)
    uniform = rng.random((n, length, 2))  # [N, L, 2]
    # offset 0 with probability stay, else one of 1..K-1; states are the running sum modulo K
    offset = np.where(
        uniform[..., 0] < stay, 0, 1 + np.floor(uniform[..., 1] * (num_states - 1)).astype(np.int64)
    )  # [N, L]
    offset[:, 0] = np.floor(uniform[:, 0, 1] * num_states).astype(np.int64)
    tokens = np.cumsum(offset, 1) % num_states  # [N, L]
    return Dataset.from_dict({"tokens": tokens.tolist()}, features=Features({"tokens": List(Value("int64"))}))
