"""Exact tasks: sequences of Markov chains and of Markov fields on trees, whose every conditional is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from orderppl.data.dataset import SPLITS, DataSet, Examples, at_least
from orderppl.data.report import LoadReport
from orderppl.data.tokenizers import Tokenizer
from orderppl.errors import UserError
from orderppl.unmasking import Batch

Array = NDArray[Any]


class _Field(DataSet):
    """Sequences whose neighbours share a state with probability `stay`; tokens are 0..K-1, MASK is K."""

    def __init__(self, num_states: int, stay: float, length: int, sizes: tuple[int, int, int], seed: int) -> None:
        at_least(2, num_states=num_states)
        at_least(1, **dict(zip(SPLITS, sizes, strict=True)))
        if not 0 <= stay <= 1:
            raise UserError("stay", f"{stay} is no probability", "give a number in [0, 1]")
        self.num_states, self.stay, self.seed = num_states, stay, seed
        self._length, self.sizes = length, sizes

    def sample(self, n: int, seed: int) -> Array:
        """Draw sequences, int64 [n, L], one after the other: the first rows do not depend on `n`."""
        uniform = np.random.default_rng(seed).random((n, self._length, 2))  # [N, L, 2]
        other = 1 + np.floor(uniform[..., 1] * (self.num_states - 1)).astype(np.int64)
        start = np.floor(uniform[:, 0, 1] * self.num_states).astype(np.int64)
        # what a state adds to that of the position before it, modulo K: 0 with probability `stay`, else one of 1..K-1
        return self.run(start, np.where(uniform[..., 0] < self.stay, 0, other))

    def run(self, start: Array, offset: Array) -> Array:
        """States int64 [N, L] from uniform first ones, int64 [N], and steps to the others, int64 [N, L]."""
        raise NotImplementedError

    def make_splits(self, tokenizer: Tokenizer | None, report: LoadReport) -> dict[str, Examples]:
        """Draw the splits; see `DataSet`."""
        splits = {}
        for index, (split, size) in enumerate(zip(SPLITS, self.sizes, strict=True)):
            tokens = torch.from_numpy(self.sample(size, 3 * self.seed + index))
            splits[split] = Examples(Batch(tokens, given=torch.zeros_like(tokens, dtype=torch.bool)))
        return splits

    @property
    def vocab_size(self) -> int:
        """Number of token ids, MASK included."""
        return self.num_states + 1

    @property
    def mask_index(self) -> int:
        """Id of MASK."""
        return self.num_states


class Chains(_Field):
    """Sequences of a stationary Markov chain, all of one length; the first state is uniform.

    Args:
        num_states: states K; tokens are 0..K-1, MASK is K.
        stay: probability of repeating the state; else any other follows.
        length: positions L.
        train: training sequences.
        validation: validation sequences.
        test: test sequences.
        seed: fixes the sequences.

    Raises:
        UserError: a setting is out of range.
    """

    def __init__(
        self,
        num_states: int = 4,
        stay: float = 0.85,
        length: int = 16,
        train: int = 4000,
        validation: int = 500,
        test: int = 2000,
        seed: int = 0,
    ) -> None:
        at_least(1, length=length)
        super().__init__(num_states, stay, length, (train, validation, test), seed)

    def run(self, start: Array, offset: Array) -> Array:
        """States are the running sum of the steps."""
        offset[:, 0] = start
        return np.cumsum(offset, 1) % self.num_states


class Trees(_Field):
    """States of a Markov field on a complete binary tree, in level order: parent(i) = (i - 1) // 2.

    Args:
        num_states: states K; tokens are 0..K-1, MASK is K.
        stay: probability of keeping the parent's state; else a child takes any other. The root is uniform.
        depth: levels; a tree has 2^depth - 1 positions.
        train: training sequences.
        validation: validation sequences.
        test: test sequences.
        seed: fixes the sequences.

    Raises:
        UserError: a setting is out of range.
    """

    def __init__(
        self,
        num_states: int = 4,
        stay: float = 0.85,
        depth: int = 4,
        train: int = 4000,
        validation: int = 500,
        test: int = 2000,
        seed: int = 0,
    ) -> None:
        at_least(1, depth=depth)
        super().__init__(num_states, stay, 2**depth - 1, (train, validation, test), seed)

    def run(self, start: Array, offset: Array) -> Array:
        """Children follow their parents."""
        offset[:, 0] = start
        for node in range(1, offset.shape[1]):
            offset[:, node] = (offset[:, (node - 1) // 2] + offset[:, node]) % self.num_states
        return offset
