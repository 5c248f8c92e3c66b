"""Rows that users bring: JSON lines, CSV and data sets by their name, and what is wrong with some."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from orderppl.data import CsvFile, HubDataset, JsonLines, exact_match
from orderppl.data.dataset import Row
from orderppl.data.reading import LONGEST
from orderppl.data.report import BadRow, LoadReport
from orderppl.data.tables import fill, holes_of
from orderppl.data.tokenizers import load_tokenizer
from orderppl.errors import UserError

PAIRS = [{"prompt": f"{i} + {i}", "response": f"{i} + {i} = {2 * i} # {2 * i}", "answer": 2 * i} for i in range(40)]
ALL = {"test_share": 0, "validation_share": 0}


def write(path: Path, rows: list[Any], mark: str = "") -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_bytes((mark + "".join(f"{line}\n" for line in lines)).encode())
    return str(path)


def read(path: str, **options: Any) -> tuple[list[Row], LoadReport]:
    report = LoadReport()
    return JsonLines(path, **{**ALL, **options}).make_rows(report)["train"], report


def test_prompts_and_responses(tmp_path: Path) -> None:
    data = JsonLines(write(tmp_path / "t.jsonl", PAIRS), answer="answer", grade=exact_match)
    splits = data.splits()
    assert set(splits) == {"train", "validation", "test"} and sum(map(len, splits.values())) == 40
    for rows in splits.values():
        texts = rows.texts(rows.batch.tokens)
        assert rows.references == [str(PAIRS[line - 1]["answer"]) for line in rows.lines or []]
        assert texts == [PAIRS[line - 1]["response"] for line in rows.lines or []]
        assert data.grade(texts, rows.references).all()
    assert data.end_index is not None


def test_names_of_fields_can_be_set(tmp_path: Path) -> None:
    rows = [{"q": "one ?", "a": "1", "x": None}, {"a": "2", "q": "two ?"}]
    path = write(tmp_path / "t.jsonl", rows)
    assert read(path, prompt="q", response="a")[0] == [Row("1", "one ?", line=1), Row("2", "two ?", line=2)]
    assert read(path, prompt=None, response="q")[0] == [Row("one ?", line=1), Row("two ?", line=2)]
    with pytest.raises(UserError, match=r"t\.jsonl:1: no text in 'prompt': .*; its fields are q, a, x"):
        read(path, response="a")
    with pytest.raises(UserError, match=r"t\.jsonl:1: no text in 'x'"):
        read(path, prompt="q", response="x")


def test_files_for_every_split(tmp_path: Path) -> None:
    files = {name: write(tmp_path / f"{name}.jsonl", PAIRS[i : i + 3]) for i, name in enumerate(("train", "test"))}
    splits = JsonLines(**files, validation_share=0).splits()
    assert {name: rows.lines for name, rows in splits.items()} == {"train": [1], "test": [1, 2, 3]}
    only = JsonLines(test=files["test"])
    assert set(only.splits()) == {"test"}
    with pytest.raises(UserError, match="train: no file of rows; give one"):
        JsonLines()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", "not JSON"),
        ("", "empty line"),
        ("[1, 2]", "not an object"),
        ("17", "not an object"),
        ('{"prompt": "a", "prompt": "b", "response": "c"}', "a key stands twice"),
        ('{"prompt": "a", "response": "c", "more": {"x": 1, "x": 2}}', "a key stands twice"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        ('{"prompt": ' + "9" * 5000 + ', "response": "c"}', "not JSON"),
        ('{"prompt": "a", "response": ""}', "no text in 'response'"),
        ('{"prompt": "a", "response": ["c"]}', "no text in 'response'"),
        ('{"prompt": "a", "response": true}', "no text in 'response'"),
        ('{"prompt": "a", "response": "\\ud800"}', "half a character in 'response'"),
        ('{"prompt": "' + "a" * LONGEST + '", "response": "b"}', f"longer than {LONGEST} bytes"),
    ],
)
def test_bad_rows_by_line(tmp_path: Path, line: str, reason: str) -> None:
    path = write(tmp_path / "t.jsonl", [PAIRS[1], line, PAIRS[2]])
    rows, report = read(path, on_bad="report")
    assert [row.line for row in rows] == [1, 3]
    assert [(bad.file, bad.line, bad.reason) for bad in report.examples] == [("t.jsonl", 2, reason)]
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:2: {reason}") and len(str(error.value)) < 400
    assert "\n" not in str(error.value)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"prompt": "a", "response": "caf\xe9"}\n' + json.dumps(PAIRS[0]).encode())
    rows, report = read(str(path), on_bad="report")
    assert [row.line for row in rows] == [2] and report.examples[0].reason == "not UTF-8"


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", PAIRS[:2], "\ufeff")
    assert [row.prompt for row in read(path)[0]] == ["0 + 0", "1 + 1"]
    (tmp_path / "t.csv").write_text("\ufeffprompt,response\na,b\n", encoding="utf-8")
    rows = CsvFile(str(tmp_path / "t.csv"), **ALL).make_rows(LoadReport())  # type: ignore[arg-type]
    assert rows["train"] == [Row("b", "a", line=2)]


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('prompt,response,answer\n"a, b","c\nd",1\ne,f,2,3\n\ng,h\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"t\.csv:4: more than 3 cells: e,f,2,3; put quotes around commas"):
        CsvFile(str(path)).splits()
    report = LoadReport()
    rows = CsvFile(str(path), **ALL, on_bad="report").make_rows(report)["train"]  # type: ignore[arg-type]
    assert rows == [Row("c\nd", "a, b", line=2), Row("h", "g", line=6)]
    path.write_text("prompt,response,answer\na,b,1\n\n\n\ng,h\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"t\.csv:6: no text in 'answer'"):
        CsvFile(str(path), answer="answer").splits()


# ---- texts with holes


@pytest.mark.parametrize(
    ("template", "text", "filled"),
    [
        ("Tom has 3 [MASK] and buys [MASK] more.", "Tom has 3 pens and buys 2 more.", ["pens", "2"]),
        ("[MASK] has", "Tom has", ["Tom"]),
        ("has <mask>", "has 3 big pens", ["3 big pens"]),
        ("a [MASK] [MASK][MASK] b", "a x y b", ["x y"]),
        ("[MASK]", "all of it", ["all of it"]),
        ("a.*[MASK](", "a.*b(", ["b"]),
    ],
)
def test_holes_of_a_template(template: str, text: str, filled: list[str]) -> None:
    holes = holes_of(template, text)
    assert [text[start:end] for start, end in holes] == filled
    assert fill(template, filled) == (text, None, tuple(holes))


@pytest.mark.parametrize(
    ("template", "text", "reason"),
    [
        ("no hole", "no hole", "no hole in the template"),
        ("Tom [MASK].", "Ann runs.", "the text does not fit the template"),
        ("Tom [MASK].", "Tom .", "the text does not fit the template"),
        ("Tom [MASK]", "Tom", "the text does not fit the template"),
        ("a [MASK] b [MASK] c", "a c", "the text does not fit the template"),
        ("ab[MASK]ba", "aba", "the text does not fit the template"),
        ("[MASK] and [MASK]", "a and b and c", "the text fits the template in several ways"),
    ],
)
def test_templates_that_do_not_fit(template: str, text: str, reason: str) -> None:
    with pytest.raises(BadRow) as error:
        holes_of(template, text)
    assert error.value.reason == reason


def test_a_long_template_takes_no_time() -> None:
    text = "a " * 5000
    holes = holes_of("a [MASK]" * 2000, "a b" * 2000)
    assert len(holes) == 2000
    with pytest.raises(BadRow):
        holes_of("[MASK] a " * 1000 + "b", text)


def test_templates_with_their_text_or_fillings(tmp_path: Path) -> None:
    rows = [
        {"template": "Tom has 3 [MASK] and buys [MASK] more .", "text": "Tom has 3 pens and buys 20 more ."},
        {"template": "Tom has 3 [MASK] and buys [MASK] more .", "text": ["pens", 2]},
        {"template": "Tom has [MASK] .", "text": "Tom has 3 more pens ."},
    ]
    path = write(tmp_path / "t.jsonl", rows)
    data = JsonLines(path, template="template", response="text", **ALL)  # type: ignore[arg-type]
    examples = data.splits()["train"]
    tokenizer, batch = examples.tokenizer, examples.batch
    assert tokenizer is not None and data.end_index is None and batch.given is not None
    hidden = [
        tokenizer.decode(tokens[latent].tolist()) for tokens, latent in zip(batch.tokens, batch.latent, strict=True)
    ]
    assert hidden == ["pens 20", "pens 2", "3 more pens"]
    assert (batch.latent ^ batch.given)[batch.attention_mask].all()
    assert examples.texts(batch.tokens) == examples.references
    assert examples.references == [
        "Tom has 3 pens and buys 20 more .",
        "Tom has 3 pens and buys 2 more .",
        "Tom has 3 more pens .",
    ]
    for bad, reason in (
        ({"template": "a [MASK]", "text": ["b", "c"]}, "another number of holes than fillings"),
        ({"template": "a [MASK]", "text": "b"}, "the text does not fit the template"),
        ({"text": "b"}, "no text in 'template'"),
        ({"template": "a [MASK]"}, "no text in 'text'"),
    ):
        with pytest.raises(UserError, match=rf"b\.jsonl:1: {reason}"):
            JsonLines(write(tmp_path / "b.jsonl", [bad]), template="template", response="text").splits()


def test_holes_in_the_pieces_of_a_masked_model(tmp_path: Path, bert: Path) -> None:
    rows = [{"template": "Tom has 3 [MASK] and buys [MASK] more.", "text": "Tom has 3 pens and buys 20 more."}]
    data = JsonLines(write(tmp_path / "t.jsonl", rows), template="template", response="text", **ALL)  # type: ignore[arg-type]
    tokenizer = load_tokenizer(bert)
    examples = data.splits(tokenizer)["train"]
    batch = examples.batch
    shown = [tokenizer.tokens[index] for index in batch.tokens[0].tolist()]
    assert shown == ["[CLS]", "tom", "has", "3", "pen", "##s", "and", "buys", "2", "##0", "more", ".", "[SEP]"]
    assert [piece for piece, latent in zip(shown, batch.latent[0], strict=True) if latent] == ["pen", "##s", "2", "##0"]
    changed = batch.tokens.clone()
    changed[0, 9] = batch.tokens[0, 8]
    assert examples.grade(examples.texts(batch.tokens), examples.references or []).all()
    assert not examples.grade(examples.texts(changed), examples.references or []).any()


def test_spans(tmp_path: Path) -> None:
    rows = [{"text": "Tom has 3 pens", "holes": [[0, 3], [8, 9]]}, {"text": "Tom runs", "holes": "[[4, 8]]"}]
    examples = JsonLines(write(tmp_path / "t.jsonl", rows), response="text", spans="holes", **ALL).splits()["train"]  # type: ignore[arg-type]
    assert examples.batch.latent.tolist() == [[True, False, True, False], [False, True, False, False]]
    for holes in ([], [[3, 3]], [[-1, 2]], [[0, 99]], "x", 3, None, [[1]], [["a", "b"]], "[" * 100_000):
        path = write(tmp_path / "b.jsonl", [{"text": "Tom runs", "holes": holes}])
        with pytest.raises(UserError, match=r"b\.jsonl:1: (no list of|a span outside)"):
            JsonLines(path, response="text", spans="holes").splits()


def test_what_a_pattern_hides(tmp_path: Path) -> None:
    rows = [{"text": "Tom has 3 pens . He buys 20"}, {"text": "Tom has pens"}, {"text": "7"}]
    path = write(tmp_path / "t.jsonl", rows)
    data = JsonLines(path, response="text", hides=r"\d+", on_bad="report", **ALL)  # type: ignore[arg-type]
    examples = data.splits()["train"]
    assert examples.batch.latent.tolist() == [[False] * 2 + [True] + [False] * 4 + [True], [True] + [False] * 7]
    assert "nothing is to be revealed" in str(data.report)
    last = JsonLines(path, response="text", hides=r"(?<=\. ).+$", on_bad="report", **ALL).splits()["train"]  # type: ignore[arg-type]
    assert last.batch.latent.tolist() == [[False] * 5 + [True] * 3]
    with pytest.raises(UserError, match=r"t\.jsonl:2: nothing is to be revealed"):
        JsonLines(path, response="text", hides=r"\d+", **ALL).splits()  # type: ignore[arg-type]
    with pytest.raises(UserError, match="^hides: .* is no regular expression"):
        JsonLines(path, response="text", hides="(")


# ---- data sets by their name


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that `datasets` loads like one of the hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", PAIRS[:30])
    write(folder / "test.jsonl", PAIRS[28:])
    return folder


def test_a_data_set_by_its_name(hub: Path) -> None:
    data = HubDataset(str(hub), answer="answer", validation_share=0.2)
    splits = data.splits()
    assert set(splits) == {"train", "validation", "test"}
    assert splits["test"].lines == list(range(1, 13)) and len(splits["train"]) + len(splits["validation"]) == 28
    assert data.report.rejected == {("train", "also in the test split"): 2}
    assert splits["test"].references == [str(row["answer"]) for row in PAIRS[28:]]
    part = HubDataset(str(hub), train="train[:5]", test="train[20:25]", validation_share=0).splits()
    assert {name: len(rows) for name, rows in part.items()} == {"train": 5, "test": 5}


def test_what_cannot_be_loaded(hub: Path) -> None:
    with pytest.raises(UserError, match="^data: 'no/such' is no local path"):
        HubDataset("no/such").splits()
    with pytest.raises(UserError, match="no text in 'prompt'|no text in 'question'"):
        HubDataset(str(hub), prompt="question").splits()
