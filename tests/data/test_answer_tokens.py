"""Which tokens of a canvas are its answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from orderppl.config import build, describe
from orderppl.data import AnswerTokens, Arithmetic, JsonLines
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
EVERYWHERE = torch.ones(1, 1, dtype=torch.bool)


@pytest.mark.parametrize("mode", ["numbers", "digits"])
@pytest.mark.parametrize("prompt", [None, "# 9 ; 7 #"])
def test_the_answer_is_the_mark_and_what_follows(tmp_path: Path, mode: str, prompt: str | None) -> None:
    tokenizer = WordTokenizer.build(TEXTS, mode, max_number=20)  # type: ignore[arg-type]
    rows = "".join(f'{{"prompt": "{prompt}", "response": "{text}"}}\n' for text in TEXTS)
    (tmp_path / "t.jsonl").write_text(rows)
    data = JsonLines(str(tmp_path / "t.jsonl"), prompt=prompt and "prompt", test_share=0, validation_share=0, canvas=14)
    batch = data.splits(tokenizer)["train"].batch
    found = AnswerTokens(tokenizer)(batch.tokens, batch.latent)
    for row, tokens, latent, answer in zip(found, batch.tokens, batch.latent, TEXTS.values(), strict=True):
        assert tokenizer.decode(tokens[row].tolist()).split() == answer.split()
        assert not (row & ~latent).any()


def test_marks_of_prompt_and_padding_do_not_count() -> None:
    answer = AnswerTokens(marks=[1], ends=[2])
    tokens = torch.tensor([[1, 5, 5, 5, 1]])
    latent = torch.tensor([[False, False, True, True, False]])  # prompt with a mark, response, padding that equals one
    assert answer(tokens, latent).tolist() == [[False, False, True, True, False]]  # no mark: the response itself
    holes = torch.tensor([[True, False, False, True, False]])  # a text with holes: its given mark counts
    assert answer(torch.tensor([[5, 5, 1, 6, 1]]), holes).tolist() == [[False, False, False, True, False]]
    assert not answer(tokens, torch.zeros_like(latent)).any()
    stacked = answer(tokens.expand(3, 2, 1, 5), latent.expand(3, 2, 1, 5))
    assert stacked.shape == (3, 2, 1, 5) and (stacked == latent).all()


def test_the_answer_of_generated_problems() -> None:
    data = Arithmetic("dual", train=30, validation=0, test=0, separator=True)
    examples = data.splits()["train"]
    tokenizer = examples.tokenizer
    assert tokenizer is not None and examples.answers is not None
    batch = examples.batch
    found = AnswerTokens(tokenizer)(batch.tokens, batch.latent)
    for row, tokens, answer in zip(found, batch.tokens, examples.answers, strict=True):
        assert tokenizer.decode(tokens[row].tolist()) == f"# {answer}"


@pytest.mark.parametrize("space", ["", " ", "\u2581", "\u0120"])
def test_marks_are_found_in_the_vocabularies_of_others(space: str) -> None:
    class Pieces:
        tokens = ["<s>", f"{space}####", f"{space}<<", "5", f"{space}#5"]
        eos_index = 0

    answer = AnswerTokens(Pieces())  # type: ignore[arg-type]
    assert answer.marks == (1,)
    found = answer(torch.tensor([[2, 3, 1, 3, 3, 0, 3]]), EVERYWHERE.expand(1, 7))
    assert found.tolist() == [[False, False, True, True, True, False, False]]


def test_a_description_holds_the_ids() -> None:
    made = AnswerTokens(WordTokenizer.build(TEXTS, "numbers", max_number=20))
    spec = describe(made)
    assert spec["init_args"] == {"tokenizer": None, "marks": list(made.marks), "ends": list(made.ends)}
    again = build(spec, known={"tokenizer": WordTokenizer.build(["# 5"])})  # that of another denoiser changes nothing
    assert (again.marks, again.ends) == (made.marks, made.ends)


def test_a_tokeniser_without_a_mark_is_refused() -> None:
    with pytest.raises(UserError, match="^tokenizer: "):
        AnswerTokens(WordTokenizer.build(["2 + 3 = 5"], "numbers", max_number=20))
