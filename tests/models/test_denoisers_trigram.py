"""Forward-backward against sums over all rows, and the phone model of the package."""

from __future__ import annotations

import itertools

import pytest
import torch

from orderppl import Batch, follow
from orderppl.config import build, describe
from orderppl.data import Pronunciations
from orderppl.errors import UserError
from orderppl.models.denoisers.trigram import PhoneDenoiser, TrigramDenoiser
from orderppl.policies import Ranked

V = 3


def tables(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (V,), (V, V), (V, V, V)
    return tuple(torch.rand(shape, generator=generator).mul(3).softmax(-1) for shape in shapes)  # type: ignore[return-value]


def joint(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All rows, int64 [V^L, L], and their probabilities, by the formula."""
    first, second, third = tables()
    rows = torch.tensor(list(itertools.product(range(V), repeat=length)))
    probability = first[rows[:, 0]].double()
    for i in range(1, length):
        probability *= second[rows[:, 0], rows[:, 1]] if i == 1 else third[rows[:, i - 2], rows[:, i - 1], rows[:, i]]
    return rows, probability


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_every_conditional_is_that_of_the_sum_over_all_rows(length: int) -> None:
    denoiser = TrigramDenoiser(*tables())
    rows, probability = joint(length)
    generator = torch.Generator().manual_seed(1)
    for hidden in itertools.product([False, True], repeat=length):
        tokens = rows[torch.randint(len(rows), (1,), generator=generator)]
        state = torch.where(torch.tensor(hidden), denoiser.mask_index, tokens)
        said = denoiser(state, torch.ones_like(state)).softmax(-1)[0]
        agrees = ((rows == state) | torch.tensor(hidden)).all(-1)
        for place in range(length):
            if hidden[place]:
                weight = torch.stack([probability[agrees & (rows[:, place] == v)].sum() for v in range(V)])
                torch.testing.assert_close(said[place].double(), weight / weight.sum(), atol=1e-5, rtol=1e-4)


def test_padding_anywhere_takes_no_place() -> None:
    denoiser = TrigramDenoiser(*tables())
    alone = torch.tensor([[V, 1, V, 0, V]])
    among = torch.tensor([[0, V, 2, 1, V, 0, 0, V]])
    attended = torch.tensor([[0, 1, 0, 1, 1, 1, 0, 1]])
    said = denoiser(among, attended)[attended.bool()].softmax(-1)
    torch.testing.assert_close(said, denoiser(alone, torch.ones_like(alone))[0].softmax(-1))


def test_the_evidence_is_the_probability_of_the_row() -> None:
    denoiser = TrigramDenoiser(*tables())
    rows, probability = joint(4)
    torch.testing.assert_close(denoiser.log_evidence(rows).double(), probability.log(), atol=1e-4, rtol=1e-4)


def test_a_tables_shape_and_zeros_are_refused() -> None:
    first, second, third = tables()
    with pytest.raises(UserError, match="do not fit together"):
        TrigramDenoiser(first, second[:2], third)
    with pytest.raises(UserError, match="not positive"):
        TrigramDenoiser(first, second, third.masked_fill(third < third.median(), 0.0))


def test_one_phone_at_a_time_every_order_of_a_real_word_is_equally_likely() -> None:
    denoiser = PhoneDenoiser()
    words = Pronunciations(length=6).splits(denoiser.tokenizer)["test"].batch.rows(slice(40))
    assert build(describe(denoiser)).after.equal(denoiser.after)
    torch.testing.assert_close(denoiser.after.sum(-1), torch.ones(39, 39))
    evidence = denoiser.log_evidence(words.tokens).double()
    for score in ("random", "left_to_right", "top_prob"):
        path = follow(Ranked(score), denoiser, Batch(words.tokens), 6)
        torch.testing.assert_close(path.nats, -evidence, atol=1e-3, rtol=1e-4)
    assert 2 < float(-evidence.mean() / 6) < 3.2
