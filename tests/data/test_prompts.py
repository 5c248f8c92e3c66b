"""Canvases of what a user types."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken

from orderppl.data.dataset import Row, TextData
from orderppl.data.prompts import prompt_batch, template_batch
from orderppl.data.report import LoadReport
from orderppl.data.tokenizers import PretrainedTokenizer, WordTokenizer, load_tokenizer
from orderppl.errors import UserError

WORDS = WordTokenizer.build(["Tom has 3 pens and buys 20 more ."])


class One(TextData):
    def make_rows(self, report: LoadReport) -> dict[str, list[Row]]:
        return {"train": [Row("20 more .", "Tom has 3"), Row("pens", "and")]}


@pytest.mark.parametrize("separator", [False, True])
@pytest.mark.parametrize("pretrained", [False, True])
def test_prompts_are_laid_out_as_those_of_data(bert: Path, separator: bool, pretrained: bool) -> None:
    tokenizer = load_tokenizer(bert) if pretrained else WORDS
    known = One(separator=separator).splits(tokenizer)["train"].batch
    typed = prompt_batch(["Tom has 3", "and"], tokenizer, 5, separator)
    width = known.prefix
    assert typed.prefix == width and typed.tokens.shape == (2, width + 5)
    for name in ("tokens", "attention_mask", "given"):
        assert torch.equal(getattr(typed, name)[:, :width], getattr(known, name)[:, :width])
    assert (typed.tokens[:, width:] == tokenizer.mask_index).all() and typed.latent[:, width:].all()


def test_no_prompt() -> None:
    batch = prompt_batch(["", "Tom"], WORDS, 2, separator=True)
    assert batch.attention_mask.tolist() == [[False, False, True, True], [True, True, True, True]]
    assert prompt_batch([""], WORDS, 2).tokens.tolist() == [[1, 1]]
    for prompts, length in (([], 2), (["Tom"], 0)):
        with pytest.raises(UserError, match="^prompt: "):
            prompt_batch(prompts, WORDS, length)


def test_templates() -> None:
    texts = ["Tom has [MASK] pens", "[MASK]<mask> more ."]
    batch = template_batch(texts, WORDS)
    assert batch.latent.tolist() == [[False, False, True, False], [True, True, False, False]]
    assert (batch.tokens == WORDS.mask_index).tolist() == batch.latent.tolist()
    assert batch.given is not None and batch.given[0].tolist() == [True, True, False, True]
    filled = batch.tokens.masked_fill(batch.latent, WORDS.encode("20")[0])
    assert WORDS.decode(filled[0].tolist()) == "Tom has 20 pens"
    for templates in ([], ["Tom has"], ["Tom [MASK]", "Tom"]):
        with pytest.raises(UserError, match="^template: "):
            template_batch(templates, WORDS)


def test_templates_of_a_masked_model(bert: Path) -> None:
    tokenizer = load_tokenizer(bert)
    batch = template_batch(["Tom has [MASK] [MASK]."], tokenizer)
    shown = [tokenizer.tokens[index] for index in batch.tokens[0].tolist()]
    assert shown == ["[CLS]", "tom", "has", "[MASK]", "[MASK]", ".", "[SEP]"]
    assert batch.latent[0].tolist() == [False, False, False, True, True, False, False]


def test_a_mask_that_the_tokeniser_does_not_know(bert: Path) -> None:
    """As of LLaDA, whose MASK is an id that its tokeniser gives no name."""
    inner = load_tokenizer(bert)
    assert isinstance(inner, PretrainedTokenizer)
    behind = PretrainedTokenizer(inner.tokenizer, mask_index=inner.vocab_size)
    batch = template_batch(["Tom has [MASK] pens"], behind)
    assert batch.tokens[0].tolist()[3] == inner.vocab_size and int(batch.latent.sum()) == 1


def test_a_mask_that_takes_the_space_before_it(bert: Path) -> None:
    tokenizer = load_tokenizer(bert)
    assert isinstance(tokenizer, PretrainedTokenizer)
    tokenizer.tokenizer.add_special_tokens({"mask_token": AddedToken("<mask>", lstrip=True)})
    renewed = PretrainedTokenizer(tokenizer.tokenizer)
    batch = template_batch(["Tom has [MASK] pens"], renewed)
    assert batch.tokens[0, 3] == renewed.mask_index and batch.tokens.shape[1] == 7
