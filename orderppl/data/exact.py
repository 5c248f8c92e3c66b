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


class Field(DataSet):
    """Sequences of states that follow one another in a tree; a subclass says what follows what.

    Args:
        num_states: states K; tokens are 0..K-1, MASK is K. The first state is uniform.
        stay: probability of repeating the state that is followed; else any other comes.
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
        *,
        num_states: int = 4,
        stay: float = 0.85,
        length: int = 16,
        train: int = 4000,
        validation: int = 500,
        test: int = 2000,
        seed: int = 0,
    ) -> None:
        at_least(2, num_states=num_states)
        at_least(1, length=length, train=train, validation=validation, test=test)
        if not 0 <= stay <= 1:
            raise UserError("stay", f"{stay} is no probability", "give a number in [0, 1]")
        self.num_states, self.stay, self.size = num_states, stay, length
        self.rows, self.seed = (train, validation, test), seed

    vocab_size = property(lambda self: self.num_states + 1, doc="Number of token ids, MASK included.")
    mask_index = property(lambda self: self.num_states, doc="Id of MASK.")

    def parent(self, place: int) -> int:
        """The position that a later one follows."""
        return place - 1

    def sample(self, n: int, seed: int) -> Array:
        """Draw sequences, int64 [n, L], one after the other: the first rows do not depend on `n`."""
        uniform = np.random.default_rng(seed).random((n, self.size, 2))  # [N, L, 2]
        other = 1 + np.floor(uniform[..., 1] * (self.num_states - 1)).astype(np.int64)
        tokens = np.where(uniform[..., 0] < self.stay, 0, other)  # steps from the state that is followed, modulo K
        tokens[:, 0] = np.floor(uniform[:, 0, 1] * self.num_states)
        for place in range(1, self.size):
            tokens[:, place] = (tokens[:, self.parent(place)] + tokens[:, place]) % self.num_states
        return tokens

    def make_splits(self, tokenizer: Tokenizer | None, report: LoadReport) -> dict[str, Examples]:
        """Draw the splits; see `DataSet`."""
        seeds = range(3 * self.seed, 3 * self.seed + 3)
        drawn = [torch.from_numpy(self.sample(n, seed)) for n, seed in zip(self.rows, seeds, strict=True)]
        batches = [Batch(tokens, given=torch.zeros_like(tokens, dtype=torch.bool)) for tokens in drawn]
        return {split: Examples(batch) for split, batch in zip(SPLITS, batches, strict=True)}


class Chains(Field):
    """Sequences of a stationary Markov chain, all of one length.

    Args:
        options: see `Field`.
    """


class Trees(Field):
    """States of a Markov field on a complete binary tree, in level order: parent(i) = (i - 1) // 2.

    Args:
        depth: levels; a tree has 2^depth - 1 positions.
        options: see `Field`, without `length`.

    Raises:
        UserError: a setting is out of range.
    """

    settled = ("length",)

    def __init__(self, *, depth: int = 4, **options: Any) -> None:
        at_least(1, depth=depth)
        super().__init__(length=2**depth - 1, **options)
        self.depth = depth

    def parent(self, place: int) -> int:
        """The position that a later one follows."""
        return (place - 1) // 2
