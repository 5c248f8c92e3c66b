"""The canvas: what is attended, given and to be revealed; what users may hand over as one."""

from __future__ import annotations

from collections import UserDict
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orderppl import Batch, UserError

TOKENS = torch.tensor([[5, 6, 7, 8], [9, 1, 2, 3], [4, 4, 4, 4]])
ATTENDED = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 0, 0]])
GIVEN = torch.tensor([[1, 0, 0, 1], [1, 1, 0, 0], [1, 1, 1, 0]])


def batch() -> Batch:
    return Batch(TOKENS, ATTENDED, GIVEN)


def test_what_is_latent_by_hand():
    """Attended and not given; padding counts for nothing, even where it is called given or not."""
    one = batch()
    assert one.attention_mask.dtype == one.given.dtype == torch.bool
    assert one.latent.long().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]]
    assert one.readable.tolist() == [[5, 6, 7, 8], [0, 1, 2, 3], [4, 4, 0, 0]]
    assert one.prefix == 1
    assert len(one) == 3
    assert one.hidden().tokens.tolist() == [[5, 0, 0, 8], [9, 1, 0, 0], [4, 4, 4, 4]]
    assert torch.equal(one.hidden().latent, one.latent)


def test_left_out_masks():
    one = Batch(TOKENS)
    assert one.attention_mask.all() and one.latent.all() and one.given is None and one.prefix == 0
    assert Batch(TOKENS, given=torch.ones_like(TOKENS)).prefix == 4  # nothing to reveal anywhere
    assert Batch(TOKENS[:0]).prefix == 4


def test_it_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        batch().tokens = TOKENS  # type: ignore[misc]


@pytest.mark.parametrize(
    "source",
    [
        TOKENS,
        TOKENS.tolist(),
        TOKENS.numpy(),
        Batch(TOKENS),
        {"tokens": TOKENS},
        {"input_ids": TOKENS.tolist()},
        UserDict({"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}),  # as a BatchEncoding
        {"input_ids": np.asarray(TOKENS), "given": np.zeros(TOKENS.shape, dtype=bool)},
    ],
    ids=["tensor", "list", "numpy", "batch", "dict", "input_ids", "encoding", "arrays"],
)
def test_what_users_hold(source):
    one = Batch.of(source)
    assert torch.equal(one.tokens, TOKENS)
    assert one.latent.all()
    if isinstance(source, Batch):
        assert one is source


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"tokens": TOKENS, "attn_mask": ATTENDED}, "batch: unknown entry 'attn_mask'"),
        ({"tokens": TOKENS, "context": TOKENS}, "batch: unknown entry 'context'"),
        ({"attention_mask": ATTENDED}, "batch: no tokens among attention_mask"),
        ({}, "batch: no tokens"),
        (TOKENS.float(), "tokens: shape"),
        (TOKENS[0], "tokens: shape"),
        (TOKENS[None], "tokens: shape"),
        ({"tokens": TOKENS, "attention_mask": ATTENDED[:2]}, "attention_mask: "),
        ({"tokens": TOKENS, "given": GIVEN[:, :2]}, "given: "),
    ],
)
def test_bad_batches_are_refused(source, message: str):
    with pytest.raises(UserError, match=f"^{message}") as caught:
        Batch.of(source)
    assert "\n" not in str(caught.value)


def test_rows_and_devices_keep_what_is_known():
    one = batch()
    assert one.prefix == 1
    for other in (one.rows(slice(0, 2)), one.rows(torch.tensor([1])), one.rows(torch.tensor([True, False, True]))):
        assert other.__dict__["prefix"] == 1  # fewer rows may have more such columns, never less
    last = one.rows(torch.tensor([1]))
    assert torch.equal(last.tokens, TOKENS[1:2])
    assert torch.equal(last.latent, one.latent[1:2])
    moved = one.to("cpu")
    assert moved.__dict__["prefix"] == 1 and torch.equal(moved.latent, one.latent)
    assert "prefix" not in batch().rows(slice(0, 1)).__dict__  # not asked for, not worked out
    assert Batch(TOKENS).rows(slice(0, 1)).given is None


def test_trimmed():
    wide = Batch(
        torch.cat([TOKENS, TOKENS], -1), torch.cat([0 * ATTENDED, ATTENDED], -1), torch.cat([GIVEN, GIVEN], -1)
    )
    narrow = wide.trimmed()
    assert torch.equal(narrow.tokens, TOKENS)
    assert torch.equal(narrow.latent, batch().latent)
    assert narrow.trimmed() is narrow
    nothing = Batch(TOKENS, torch.zeros_like(TOKENS)).trimmed()
    assert nothing.tokens.shape == (3, 1)  # a canvas has a column at least
    assert not nothing.latent.any()


@given(st.integers(0, 2**12 - 1), st.integers(0, 2**12 - 1))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_prefix_is_what_no_row_reveals(attended: int, is_given: int):
    """Of any masks: all columns before it are latent in no row, the one at it is in some."""

    def bits(code: int) -> Tensor:
        return torch.tensor([code >> place & 1 for place in range(12)]).reshape(3, 4)

    one = Batch(TOKENS, bits(attended), bits(is_given))
    assert torch.equal(one.latent, bits(attended).bool() & ~bits(is_given).bool())
    assert not one.latent[:, : one.prefix].any()
    assert one.prefix == 4 or one.latent[:, one.prefix].any()
    kept = one.trimmed()
    assert torch.equal(kept.latent.sum(-1), one.latent.sum(-1))
    assert torch.equal(kept.tokens[kept.attention_mask], TOKENS[one.attention_mask])
