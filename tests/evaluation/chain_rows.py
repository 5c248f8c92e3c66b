"""An exact denoiser, rows of a few tokens, and arms to play on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from orderppl.config import Configurable
from orderppl.data.answers import exact_match
from orderppl.data.dataset import Examples
from orderppl.evaluation import Arm
from orderppl.policies import Ranked, Threshold
from orderppl.unmasking import Batch

CLASSES, MASK = 3, 3
STAY = 0.8
ROWS = [[0, 0, 1, 1], [2, 2], [1, 1, 1, 1, 1, 0], [0, 2, 2], [1]]


class Chain(Configurable):
    """Exact conditionals of a symmetric Markov chain on 3 states, from matrix powers; prompts are ignored.

    p(x_i | visible) is proportional to P^a[left, x_i] P^b[x_i, right], with the nearest visible neighbours.
    """

    mask_index, vocab_size = MASK, CLASSES

    def __init__(self, prompt: int = 0, stay: float = STAY) -> None:
        step = torch.full((CLASSES, CLASSES), (1 - stay) / (CLASSES - 1), dtype=torch.float64)
        step.fill_diagonal_(stay)
        self.powers = torch.stack([torch.linalg.matrix_power(step, k) for k in range(20)])
        self.prompt = prompt

    def __call__(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        logits = torch.zeros(*state.shape, CLASSES, dtype=torch.float64)
        for n, row in enumerate(state.tolist()):
            seen = [i for i in range(self.prompt, len(row)) if row[i] != MASK and attention_mask[n, i]]
            for i in range(self.prompt, len(row)):
                left, right = [j for j in seen if j < i], [j for j in seen if j > i]
                if left:
                    logits[n, i] += self.powers[i - left[-1], row[left[-1]]].log()
                if right:
                    logits[n, i] += self.powers[right[0] - i, :, row[right[0]]].log()
        return logits


def digits(texts: Sequence[str], references: Sequence[str]) -> Tensor:
    """Whether the tokens make the right number."""
    return exact_match(["#### " + text.replace(" ", "") for text in texts], references)


def padded(rows: Sequence[Sequence[int]], prompt: int = 0) -> Batch:
    """Right-padded rows behind given zeros; padding holds an id that no token has."""
    parts = [torch.tensor([0] * prompt + list(row)) for row in rows]
    tokens = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=99)
    given = torch.arange(tokens.shape[-1]).expand(tokens.shape) < prompt
    return Batch(tokens, tokens != 99, given if prompt else None)


def texts(references: Sequence[str] | None = ("0", "0.0", "#### 1", "#### 000", "2"), **options: Any) -> Examples:
    answers = None if references is None else list(references)
    return Examples(padded(ROWS), grade=digits, answers=answers, **options)


ARMS = [
    Arm("random", Ranked("random"), 2, seeds=(0, 1)),
    Arm("threshold", Threshold(0.6), 4, family="threshold", setting={"tau": 0.6}),
    Arm("ranked", Ranked("entropy", sizes="cosine"), 3),
]
BOTH: dict[str, Any] = {"metrics": ["accuracy", "path_nats"], "progress": False}
