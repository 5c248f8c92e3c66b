"""Rows of text become canvases; what every data set does alike."""

from pathlib import Path
from typing import Any

import pytest
import torch

from orderppl.config import build, describe
from orderppl.data import Examples, exact_match
from orderppl.data.dataset import Row, RowData, TextData
from orderppl.data.report import BadRow, LoadReport
from orderppl.data.tokenizers import Tokenizer, WordTokenizer, load_tokenizer
from orderppl.errors import UserError
from orderppl.unmasking import Batch

ROWS = [
    Row("3 * 20 = 60 # 60", "3 * 20", answer="60", line=11),
    Row("1 + 2 = 3 ; 3 + 4 = 7 # 7", "1 + 2 ; r1 + 4", answer="7", line=12),
]
TOKENIZER = WordTokenizer.build([text for row in ROWS for text in (row.text, row.prompt or "")])


class Given(TextData):
    """Rows as they are given."""

    def __init__(self, rows: list[Row], ends: bool = True, **options: Any) -> None:
        self.ends = ends
        super().__init__(**options)
        self.given = rows

    def make_rows(self, report: LoadReport) -> dict[str, list[Row]]:
        return {"train": self.given}


def examples(rows: list[Row] = ROWS, tokenizer: Tokenizer = TOKENIZER, **options: Any) -> Examples:
    return Given(rows, **options).splits(tokenizer)["train"]


def test_an_end_is_appended_once_and_columns_are_carried() -> None:
    with_ends, without = examples(), examples(ends=False)
    for found, ends in ((with_ends, 1), (without, 0)):
        assert (found.answers, found.lines, found.names) == (["60", "7"], [11, 12], None)
        assert found.references == ["60", "7"]
        assert found.texts(found.batch.tokens) == [row.text for row in ROWS]
        for row, tokens, latent, attended in zip(
            ROWS, found.batch.tokens, found.batch.latent, found.batch.attention_mask, strict=True
        ):
            assert tokens[latent].tolist() == TOKENIZER.encode(row.text) + [TOKENIZER.eos_index] * ends
            assert tokens[attended & ~latent].tolist() == TOKENIZER.encode(row.prompt or "")
    assert (with_ends.end_index, without.end_index) == (TOKENIZER.eos_index, None)


def test_prompts_stand_on_the_left_of_a_common_column() -> None:
    batch = examples().batch
    assert batch.tokens.shape == batch.attention_mask.shape == (2, 7 + 14)
    assert batch.prefix == 7
    assert batch.tokens.dtype == torch.int64 and batch.given is not None
    for row, (prompt, response) in enumerate(((3, 8), (7, 14))):
        attended = [False] * (7 - prompt) + [True] * (prompt + response) + [False] * (14 - response)
        assert batch.attention_mask[row].tolist() == attended
        assert batch.given[row].tolist() == [False] * (7 - prompt) + [True] * prompt + [False] * 14
        assert batch.tokens[row][~batch.attention_mask[row]].eq(TOKENIZER.pad_index).all()


def test_splits_have_their_prompts_in_the_same_columns() -> None:
    class Two(Given):
        def make_rows(self, report: LoadReport) -> dict[str, list[Row]]:
            return {"train": self.given, "test": self.given[:1]}

    data = Two(ROWS)
    splits = data.splits(TOKENIZER)
    assert [rows.batch.prefix for rows in splits.values()] == [7, 7] and data.prompt_length == 7
    assert [rows.batch.tokens.shape[1] for rows in splits.values()] == [21, 15] and data.length == 21


def test_rows_without_prompt() -> None:
    found = examples([row._replace(prompt=None, answer=None) for row in ROWS])
    assert found.batch.tokens.shape == (2, 14) and found.batch.prefix == 0
    assert found.batch.given is not None and not found.batch.given.any()  # `decode` would take None otherwise
    assert found.references == [row.text for row in ROWS]


def test_a_separator_ends_prompts() -> None:
    data = Given([*ROWS, Row("3", None)], separator=True)
    batch = data.splits(TOKENIZER)["train"].batch
    assert data.separator_index == TOKENIZER.eos_index
    assert batch.prefix == 8 and (batch.tokens[:2, 7] == TOKENIZER.eos_index).all()
    assert not batch.attention_mask[2, :8].any()


def test_long_rows_stop_the_run_or_are_reported() -> None:
    with pytest.raises(
        UserError, match=r"train:12: response is longer than the canvas: 14 tokens, limit 13: .*max_length"
    ):
        examples(max_length=13)
    with pytest.raises(UserError, match=r"train:12: prompt is longer than the canvas: 7 tokens, limit 6: .*max_prompt"):
        examples(max_prompt=6)
    data = Given(ROWS, max_length=13, on_bad="report")
    assert data.splits(TOKENIZER)["train"].lines == [11]
    assert data.report.count("response is longer than the canvas", "train") == 1
    assert data.report.examples[0].line == 12 and data.report.kept == {"train": 1}
    assert ("train", "kept", 1, "") in data.report.table()
    with pytest.raises(UserError, match="no row is left"):
        examples(max_length=1, on_bad="report")
    with pytest.raises(UserError, match="train:1: prompt is empty"):
        examples([Row("3", "")])
    with pytest.raises(UserError, match="train:1: response is empty"):
        examples([Row("")], ends=False)
    with pytest.raises(UserError, match="train:1: nothing is to be revealed"):
        examples([Row("3 + 4", hidden=[(1, 2)])])


def test_a_canvas_is_filled_up_with_ends() -> None:
    filled = examples(canvas=11)
    ends = (filled.batch.tokens == TOKENIZER.eos_index) & filled.batch.latent
    assert ends.sum(-1).tolist() == [4, 1]  # the second row is longer than the canvas: one end, as ever
    assert filled.batch.latent.sum(-1).tolist() == [11, 14]
    assert filled.texts(filled.batch.tokens) == [row.text for row in ROWS]


def test_settings_out_of_range() -> None:
    for options, field in (
        ({"max_length": 0}, "max_length"),
        ({"canvas": 0}, "canvas"),
        ({"canvas": 4, "ends": False}, "canvas"),
        ({"on_bad": "skip"}, "on_bad"),
        ({"grade": "exact_match"}, "grade"),
    ):
        with pytest.raises(UserError, match=rf"^{field}: "):
            Given(ROWS, **options)


def test_rows_with_holes_are_whole_texts() -> None:
    rows = [Row("3 * 20 = 60", hidden=[(0, 1), (9, 11)]), Row("1 + 2 = 3", hidden=[(8, 9)])]
    found = examples(rows)
    batch = found.batch
    assert batch.tokens.shape == (2, 5) and batch.attention_mask.all()  # no end of their own
    assert batch.latent.tolist() == [[True, False, False, False, True], [False, False, False, False, True]]
    assert found.whole and found.end_index is None
    changed = batch.tokens.clone()
    changed[0, 4] = TOKENIZER.encode("7")[0]
    assert found.texts(changed) == ["3 * 20 = 7", "1 + 2 = 3"] and found.references == ["3 * 20 = 60", "1 + 2 = 3"]
    assert found.grade(found.texts(changed), found.references).tolist() == [0.0, 1.0]


def test_what_a_hole_touches_is_hidden() -> None:
    tokenizer = WordTokenizer.build(["a b + c"], "digits")
    spaces = [Row("a  b12 + c", hidden=[(0, 5)])]  # two spaces are spelt out; b12 is unknown as a whole
    assert examples(spaces, tokenizer).batch.latent[0].tolist() == [True] * 4 + [False] * 2
    joined = [Row("a+ c", hidden=[(0, 1)]), Row("a+ c", hidden=[(0, 2)])]  # JOIN stands between a and +
    assert examples(joined, tokenizer).batch.latent[:, :3].tolist() == [[True, False, False], [True, True, True]]


def test_the_frame_of_a_masked_model_is_given(bert: Path) -> None:
    tokenizer = load_tokenizer(bert)
    rows = [Row("tom has 12", "tom buys more pens", answer="12"), Row("7", "and", answer="7")]
    batch = examples(rows, tokenizer).batch
    begin, end = 2, 3
    assert batch.prefix == 6
    first = [tokenizer.tokens[index] for index in batch.tokens[0].tolist()]
    assert first == ["[CLS]", "tom", "buys", "more", "pen", "##s", "tom", "has", "1", "##2", "[SEP]"]
    assert batch.tokens[1].tolist()[4:8] == [begin, *tokenizer.encode("and"), *tokenizer.encode("7"), end]
    assert batch.latent[1].tolist() == [False] * 6 + [True, True] + [False] * 3  # the end is to be found out
    known = examples(rows, tokenizer, ends=False).batch
    assert known.latent[1].tolist() == [False] * 6 + [True] + [False] * 4 and known.attention_mask[1, 7]
    separated = examples(rows, tokenizer, separator=True).batch
    assert (separated.tokens[:, 6] == end).all()  # [CLS] prompt [SEP] response [SEP]
    holes = examples([Row("Tom has pens", hidden=[(4, 7)])], tokenizer)
    assert holes.batch.latent[0].tolist() == [False, False, True, False, False, False]
    assert holes.texts(holes.batch.tokens) == holes.references == ["tom has pens"]


def test_rows_and_texts_of_examples() -> None:
    found = examples()
    for index in ([1], slice(1, 2), torch.tensor([1]), torch.tensor([False, True])):
        one = found.rows(index)
        assert (len(one), one.answers, one.lines, one.references) == (1, ["7"], [12], ["7"])
        assert one.texts(one.batch.tokens) == [ROWS[1].text]
    assert len(found.take(1)) == 1 and len(found.take(9)) == 2
    trimmed = found.take(1).batch.trimmed()
    assert found.take(1).texts(trimmed.tokens, trimmed) == [ROWS[0].text]
    with pytest.raises(UserError, match=r"tokens: \[1, 11\] for rows of \[1, 21\]"):
        found.take(1).texts(trimmed.tokens)
    assert found.spell(TOKENIZER.mask_index) == "<mask>"
    plain = Examples(Batch(torch.tensor([[1, 2], [3, 4]])))
    assert plain.references is None and plain.texts(plain.batch.tokens) == ["1 2", "3 4"] and plain.spell(3) == "3"


class Words(RowData):
    """A user's own: words of a file, one a line."""

    def read(self, source: str) -> Any:
        return enumerate(({"word": line} for line in Path(source).read_text().splitlines()), 1)

    def row(self, record: Any) -> Row:
        if record["word"] == "bad":
            raise BadRow("it is bad", record["word"])
        return Row(record["word"])


def test_shares_are_drawn_by_a_hash(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(300)] * 2
    (tmp_path / "w.txt").write_text("\n".join(words))
    report = LoadReport()
    splits = Words(str(tmp_path / "w.txt"), test_share=0.3, validation_share=0.2).make_rows(report)
    sets = {name: {row.text for row in rows} for name, rows in splits.items()}
    assert list(sets) == ["train", "validation", "test"] and sum(map(len, sets.values())) == 300
    assert abs(len(sets["test"]) - 90) < 5 * 63**0.5 and abs(len(sets["validation"]) - 60) < 5 * 48**0.5
    (tmp_path / "h.txt").write_text("w1\nw2\n")
    same = Words(str(tmp_path / "w.txt"), test=str(tmp_path / "h.txt"), validation=str(tmp_path / "h.txt"))
    with pytest.raises(UserError, match="^validation: the validation split of .* is empty"):
        same.make_rows(LoadReport())
    (tmp_path / "v.txt").write_text("w2\nw3\n")
    report = LoadReport()
    files = {"test": str(tmp_path / "h.txt"), "validation": str(tmp_path / "v.txt")}
    splits = Words(str(tmp_path / "w.txt"), **files).make_rows(report)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 594, "validation": 1, "test": 2}
    assert report.rejected == {
        ("w.txt", "also in the test split"): 4,
        ("v.txt", "also in the test split"): 1,
        ("w.txt", "also in the validation split"): 2,
    }
    assert sum(report.read.values()) == 604


def test_an_own_data_set_in_a_config(tmp_path: Path) -> None:
    (tmp_path / "w.txt").write_text("a\nbad\nb\n")
    spec = {"class_path": "Words", "init_args": {"train": str(tmp_path / "w.txt"), "test_share": 0, "on_bad": "report"}}
    data = Words(**spec["init_args"], validation_share=0, grade=exact_match)  # type: ignore[arg-type]
    assert data.splits()["train"].lines == [1, 3]
    assert data.report.table() == [
        ("w.txt", "read", 3, ""),
        ("w.txt", "it is bad", 1, "line 2: bad"),
        ("train", "kept", 2, ""),
    ]
    said = describe(data)["init_args"]
    assert said["grade"] == "orderppl.data.exact_match" and said["on_bad"] == "report"
    with pytest.raises(UserError, match=r"w\.txt:2: it is bad: bad; correct or remove it"):
        Words(str(tmp_path / "w.txt")).splits()


def test_options_of_all_constructors_reach_a_config(tmp_path: Path) -> None:
    """Of a class that hands options on, a config still knows all of them, and imports functions for them."""
    options = {"train": "t.jsonl", "prompt": "q", "grade": "exact_match", "max_length": 5}
    data = build({"class_path": "JsonLines", "init_args": options}, known={"length": 3})
    assert data.max_length == 5 and data.prompt == "q" and data._grade is exact_match
    assert build(describe(data)).sources == {"train": "t.jsonl"}
    with pytest.raises(UserError, match="promt: JsonLines has no such argument; did you mean prompt"):
        build({"class_path": "JsonLines", "init_args": {"train": "t.jsonl", "promt": "q"}})
    with pytest.raises(UserError, match="grade: os.system would run code"):
        build({"class_path": "JsonLines", "init_args": {"train": "t", "grade": "os.system"}}, trust=False)
