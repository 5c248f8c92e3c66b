"""Which tokens of a response are its answer."""

from __future__ import annotations

import pytest
import torch

from orderppl.data.answer_tokens import NO_TOKEN, AnswerTokens
from orderppl.data.collate import collate
from orderppl.data.tokenizers import WordTokenizer
from orderppl.errors import UserError

TEXTS = {
    "2 + 3 = 5 # 5": "# 5",
    "# 5 ; 2 + 3 = 5": "# 5",
    "<<2+3=5>><<5*2=10>> #### 10": "#### 10",
    "#### 10 <<2+3=5>>": "#### 10",
    "2 + 3 = 5": "2 + 3 = 5",
    "# 5 ; # 125": "# 5 # 125",
}


@pytest.mark.parametrize("mode", ["numbers", "digits"])
def test_the_answer_is_the_mark_and_what_follows(mode: str):
    tokenizer = WordTokenizer.build(TEXTS, mode, max_number=20)
    rows = [tokenizer.encode(text) + [tokenizer.eos_index] for text in TEXTS]
    batch = collate([{"tokens": row} for row in rows], tokenizer.pad_index)
    asked = AnswerTokens.of(tokenizer)(batch["tokens"].masked_fill(~batch["attention_mask"], NO_TOKEN))
    for row, tokens, answer in zip(asked, batch["tokens"], TEXTS.values(), strict=True):
        assert tokenizer.decode(tokens[row].tolist()).split() == answer.split()


def test_a_response_without_a_mark_is_its_own_answer():
    tokenizer = WordTokenizer.build(TEXTS, "numbers", max_number=20)
    tokens = torch.tensor([tokenizer.encode("2 + 3 = 5")])
    assert AnswerTokens.of(tokenizer)(tokens).all()


@pytest.mark.parametrize("space", ["", " ", "\u2581", "\u0120"])
def test_marks_are_found_in_the_vocabularies_of_others(space: str):
    class Pieces:
        tokens = ["<s>", f"{space}####", f"{space}<<", "5", f"{space}#5"]
        eos_index = 0

    answer = AnswerTokens.of(Pieces())
    assert answer.marks == (1,)
    assert answer(torch.tensor([[2, 3, 1, 3, 3, 0, 3]])).tolist() == [[False, False, True, True, True, False, False]]


def test_a_tokeniser_without_a_mark_is_refused():
    with pytest.raises(UserError, match="^tokenizer: "):
        AnswerTokens.of(WordTokenizer.build(["2 + 3 = 5"], "numbers", max_number=20))
