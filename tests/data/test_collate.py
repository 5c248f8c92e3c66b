import pytest
import torch
from datasets import Dataset

from orderppl.data.collate import collate, tensors, tokenize
from orderppl.data.report import LoadReport
from orderppl.data.tokenizers import WordTokenizer
from orderppl.errors import UserError

ROWS = Dataset.from_dict(
    {
        "prompt": ["3 * 20", "1 + 2 ; r1 + 4"],
        "response": ["3 * 20 = 60 # 60", "1 + 2 = 3 ; 3 + 4 = 7 # 7"],
        "answer": ["60", "7"],
        "line": [11, 12],
    }
)
TOKENIZER = WordTokenizer.build([*ROWS["prompt"], *ROWS["response"]])


def test_eos_is_appended_once_and_columns_are_carried() -> None:
    with_eos = tokenize(ROWS, TOKENIZER, 10, 20)
    without = tokenize(ROWS, TOKENIZER, 10, 20, eos=False)
    for new, plain, row in zip(with_eos, without, ROWS, strict=True):
        assert new["tokens"] == plain["tokens"] + [TOKENIZER.eos_index]
        assert TOKENIZER.decode(new["tokens"]) == row["response"]
        assert TOKENIZER.decode(new["context"]) == row["prompt"]
        assert (new["answer"], new["line"]) == (row["answer"], row["line"])


def test_collate_pads_on_the_right() -> None:
    rows = list(tokenize(ROWS, TOKENIZER, 10, 20))
    batch = collate(rows, TOKENIZER.pad_index)
    assert set(batch) == {"tokens", "attention_mask", "context", "context_mask"}
    assert batch["tokens"].shape == batch["attention_mask"].shape == (2, 14)
    assert batch["context"].shape == batch["context_mask"].shape == (2, 7)
    for values, mask, key in (
        (batch["tokens"], batch["attention_mask"], "tokens"),
        (batch["context"], batch["context_mask"], "context"),
    ):
        assert values.dtype == torch.int64
        assert mask.dtype == torch.bool
        for row, ids in enumerate(rows):
            size = len(ids[key])
            assert values[row, :size].tolist() == ids[key]
            assert values[row, size:].eq(TOKENIZER.pad_index).all()
            assert mask[row].tolist() == [True] * size + [False] * (mask.shape[1] - size)


def test_tensors_equal_collated_rows() -> None:
    dataset = tokenize(ROWS, TOKENIZER, 10, 20)
    whole = tensors(dataset, TOKENIZER.pad_index, length=18, context_length=9)
    batch = collate(list(dataset), TOKENIZER.pad_index, length=18, context_length=9)
    assert whole["tokens"].shape == (2, 18)
    assert set(whole) == set(batch)
    for key, value in whole.items():
        assert torch.equal(value, batch[key])


def test_rows_without_prompt() -> None:
    dataset = tokenize(ROWS.remove_columns("prompt"), TOKENIZER, 1, 20)
    assert set(tensors(dataset)) == {"tokens", "attention_mask"}
    with pytest.raises(UserError, match="only some rows"):
        collate([{"tokens": [1]}, {"tokens": [1], "context": [1]}], 0)
    with pytest.raises(UserError, match="batch is empty"):
        collate([], 0)
    with pytest.raises(UserError, match="shorter than the longest row"):
        collate([{"tokens": [1, 2, 3]}], 0, length=2)


def test_long_rows_stop_the_run_or_are_reported() -> None:
    with pytest.raises(
        UserError, match=r"train:12: response is longer than the canvas: 14 tokens, limit 13: .*max_length"
    ):
        tokenize(ROWS, TOKENIZER, 10, 13, name="train")
    with pytest.raises(
        UserError, match=r"train:12: prompt is longer than the canvas: 7 tokens, limit 6: .*max_context"
    ):
        tokenize(ROWS, TOKENIZER, 6, 20, name="train")
    report = LoadReport("here")
    kept = tokenize(ROWS, TOKENIZER, 10, 13, on_long="report", report=report, name="train")
    assert kept["line"][:] == [11]
    assert report.count("response is longer than the canvas", "train") == 1
    assert report.examples[0].line == 12
    with pytest.raises(UserError, match="no row is left"):
        tokenize(ROWS, TOKENIZER, 1, 1, on_long="report", report=report)
    with pytest.raises(UserError, match="without a report"):
        tokenize(ROWS, TOKENIZER, 10, 13, on_long="report")
    with pytest.raises(UserError, match="prompt is empty"):
        tokenize(Dataset.from_dict({"prompt": [""], "response": ["3"]}), TOKENIZER, 5, 5)


def test_a_canvas_is_filled_up_with_ends() -> None:
    plain = tokenize(ROWS, TOKENIZER, 10, 20, eos=False)
    filled = tokenize(ROWS, TOKENIZER, 10, 20, canvas=11)
    for new, old, row in zip(filled, plain, ROWS, strict=True):
        ends = max(11 - len(old["tokens"]), 1)  # the second row is longer than the canvas: one end, as ever
        assert new["tokens"] == old["tokens"] + ends * [TOKENIZER.eos_index]
        assert TOKENIZER.decode(new["tokens"]) == row["response"]
    assert [len(new["tokens"]) for new in filled] == [11, 14]
