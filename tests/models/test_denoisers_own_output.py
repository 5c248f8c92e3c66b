"""Texts that the denoiser writes in place of those of the data."""

from __future__ import annotations

import torch

from orderppl import decode
from orderppl.config import build, describe
from orderppl.data import Arithmetic
from orderppl.models.denoisers import OwnOutput, TransformerDenoiser
from orderppl.policies import Ranked


def small(data: Arithmetic) -> TransformerDenoiser:
    """A small random denoiser of the data."""
    torch.manual_seed(0)
    reader = data.splits()["train"].tokenizer
    return TransformerDenoiser(data.vocab_size, data.mask_index, width=16, layers=1, heads=2, tokenizer=reader)


def test_training_rows_are_rewritten_and_test_rows_are_not():
    """One token a step, surest first; prompts, canvases and references stay."""
    data = Arithmetic(train=12, validation=5, test=5)
    denoiser = small(data)
    reader = denoiser.tokenizer
    own = OwnOutput(data, denoiser, rows=7, batch_size=3)
    theirs, ours = data.splits(reader), own.splits(reader)
    assert {name: len(part) for name, part in ours.items()} == {"train": 7, "validation": 5, "test": 5}
    assert ours["test"] is theirs["test"]
    for name in ("train", "validation"):
        before, after = theirs[name].take(len(ours[name])), ours[name]
        latent = before.batch.latent
        assert after.batch.tokens[~latent].equal(before.batch.tokens[~latent]) and after.batch.latent.equal(latent)
        assert after.references == before.references
        rewritten = decode(denoiser, Ranked("top_prob", 1.0), before.batch, max_steps=latent.shape[1]).sequences
        assert after.batch.tokens.equal(rewritten)
        assert not after.batch.tokens.equal(before.batch.tokens)
    assert (own.vocab_size, own.mask_index, own.length) == (data.vocab_size, data.mask_index, data.length)


def test_can_be_described():
    data = Arithmetic(train=4, validation=2, test=2)
    spec = describe(OwnOutput(data, small(data), rows=2))
    assert spec["class_path"] == "orderppl.models.denoisers.OwnOutput" and spec["init_args"]["rows"] == 2
    assert len(build(spec).splits()["train"]) == 2
