import json
import re
from fractions import Fraction
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

import orderppl.data.gsm8k as gsm8k
from orderppl.data.gsm8k import Form, augment_programs, evaluate_expression, load_gsm8k
from orderppl.data.report import LoadReport
from orderppl.data.tokenizers import WordTokenizer
from orderppl.errors import UserError

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "gsm8k"
needs_real = pytest.mark.skipif(
    not (REAL / "train.jsonl").is_file(), reason="the real GSM8K files are not beside the project"
)


def _good(index: int) -> dict[str, str]:
    total = index % 90 + 3
    return {
        "question": f"Question {index}?",
        "answer": f"Two and {total - 2}: <<2+{total - 2}={total}>>{total}.\n"
        f"Doubled <<{total}*1={total}>>{total}.\n#### {total}",
    }


def _write(path: Path, lines: list[str]) -> None:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train = [json.dumps(_good(i)) for i in range(60)]
    train[3] = "{not json"
    train[5] = json.dumps({"question": "No answer key?"})
    train[7] = json.dumps({"question": "No mark?", "answer": "<<1+1=2>>2"})
    train[9] = json.dumps({"question": "No equation?", "answer": "It is one.\n#### 1"})
    train[11] = json.dumps({"question": "A fraction?", "answer": "<<3/4=3/4>>\n#### 1"})
    train[13] = ""
    train[15] = json.dumps([1, 2])
    train[17] = json.dumps(_good(1000))  # also in the test file
    train[19] = json.dumps({"question": "Thousands?", "answer": "<<500*2=1000>>\n#### 1,000"})
    _write(tmp_path / "train.jsonl", train)
    _write(tmp_path / "test.jsonl", [json.dumps(_good(i)) for i in range(1000, 1010)])
    return tmp_path


def _complete(report: LoadReport, splits: DatasetDict) -> None:
    """Every row read is either delivered or counted under a reason."""
    assert sum(report.read.values()) == sum(len(rows) for rows in splits.values()) + sum(report.rejected.values())
    assert report.kept == {name: len(rows) for name, rows in splits.items()}


def _disjoint(splits: DatasetDict) -> None:
    prompts = [set(rows["prompt"]) for rows in splits.values()]
    assert sum(map(len, prompts)) == len(set().union(*prompts))


def _check_program(row: dict[str, str], max_number: int = 99, max_equations: int = 4) -> None:
    """The response is the prompt with references filled in, every equation true and in range."""
    chain, _, answer = row["response"].partition(" # ")
    results: list[str] = []
    asked, executed = row["prompt"].split(" ; "), chain.split(" ; ")
    assert len(asked) == len(executed) <= max_equations
    for prompt, equation in zip(asked, executed, strict=True):
        left, result = equation.split(" = ")
        assert re.sub(r"r(\d)", lambda m: results[int(m[1]) - 1], prompt) == left
        value = Fraction(eval(re.sub(r"(\d+)", r"Fraction(\1)", left), {"Fraction": Fraction}))
        assert value == int(result)
        assert all(0 <= int(n) <= max_number for n in re.findall(r"\d+", equation))
        results.append(result)
    assert results[-1] == answer == row["answer"].removesuffix(".0")


def test_evaluate_expression() -> None:
    assert evaluate_expression("3*(20-5)/2") == Fraction(45, 2)
    assert evaluate_expression(".1+0.2") == Fraction(3, 10)
    assert evaluate_expression("007-010.50") == Fraction(-7, 2)
    for bad in (
        "",
        "3//2",
        "2**9",
        "1/0",
        "a+1",
        "2(3)",
        "__import__('os')",
        "1+",
        "1j",
        "True",
        "5if 3",
        "9" * 400,
        "(" * 150,
    ):
        with pytest.raises(ValueError, match=r".+"):
            evaluate_expression(bad)


def test_bad_rows_are_reported_by_line(folder: Path) -> None:
    splits, report = load_gsm8k(folder, "equations", validation=0.2)
    found = {example.line: example.reason for example in report.examples}
    assert found == {
        4: "not JSON",
        6: "no text in column 'answer'",
        8: "no number after ####",
        10: "no equations",
        12: "equation does not parse",
        14: "empty line",
        16: "not an object",
        18: "prompt is also in the test split",
    }
    assert all(example.file == "train.jsonl" for example in report.examples)
    assert "3/4=3/4" in next(str(e) for e in report.examples if e.line == 12)
    _complete(report, splits)
    _disjoint(splits)
    assert ("train.jsonl", "not JSON", 1) in [row[:3] for row in report.table()]
    assert ("train.jsonl", "read", 60, "") in report.table()
    assert json.loads(json.dumps(report.records()))[0]["count"] == 60


def test_forms_of_known_rows(folder: Path) -> None:
    def first(form: Form) -> dict[str, str]:
        splits, _ = load_gsm8k(folder, form, validation=0)
        return dict(splits["train"][0])

    assert first("full")["response"] == _good(0)["answer"]
    assert first("equations") == {
        "prompt": "Question 0?",
        "response": "<<2+1=3>> <<3*1=3>> #### 3",
        "answer": "3",
        "line": 1,
    }
    assert first("programs") == {
        "prompt": "2 + 1 ; r1 * 1",
        "response": "2 + 1 = 3 ; 3 * 1 = 3 # 3",
        "answer": "3",
        "line": 1,
    }
    splits, _ = load_gsm8k(folder, "equations", validation=0)
    thousands = next(row for row in splits["train"] if row["line"] == 20)
    assert (thousands["response"], thousands["answer"]) == ("<<500*2=1000>> #### 1000", "1000")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("<<1+1=2>> <<2+1=3>> <<3+1=4>> <<4+1=5>> <<5+1=6>> #### 6", "more than 4 equations"),
        ("<<99+1=100>> #### 100", "a number is above 99"),
        ("<<1/2=0.5>> #### 0.5", "a number is not a whole number >= 0"),
        ("<<1-2=-1>> #### -1", "a number is not a whole number >= 0"),
        ("<<7=7>> #### 7", "an equation has no operator"),
        ("<<2+2=5>> #### 5", "an equation is false"),
        ("<<2+2=4>> #### 5", "the last result is not the answer"),
        ("<<1+1+1+1=4>> #### 4", "more than 3 operands"),
    ],
)
def test_rows_without_a_program(tmp_path: Path, answer: str, reason: str) -> None:
    rows = [_good(0), {"question": "Bad?", "answer": answer}]
    _write(tmp_path / "train.jsonl", [json.dumps(row) for row in rows])
    splits, report = load_gsm8k(tmp_path, "programs", validation=0, max_operands=3)
    assert splits["train"]["line"][:] == [1]
    assert [(e.line, e.reason) for e in report.examples] == [(2, reason)]


def test_reference_is_the_latest_equal_result(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "<<2+2=4>> <<8/2=4>> <<4*(3-2)=4>> <<4+09=13>> #### 13.0"}
    _write(tmp_path / "train.jsonl", [json.dumps(row)])
    splits, _ = load_gsm8k(tmp_path, "programs", validation=0)
    made = splits["train"][0]
    assert made["prompt"] == "2 + 2 ; 8 / 2 ; r2 * ( 3 - 2 ) ; r3 + 9"
    assert made["response"] == "2 + 2 = 4 ; 8 / 2 = 4 ; 4 * ( 3 - 2 ) = 4 ; 4 + 9 = 13 # 13"
    _check_program(made)


def test_equation_chain_files_and_single_files(tmp_path: Path) -> None:
    _write(
        tmp_path / "train.txt", ["How many?||<<2+3=5>> <<5*2=10>> #### 10", "no separator", "Again?||<<1+1=2>> #### 2"]
    )
    splits, report = load_gsm8k(tmp_path, "equations", validation=0)
    assert splits["train"]["response"][:] == ["<<2+3=5>> <<5*2=10>> #### 10", "<<1+1=2>> #### 2"]
    assert [(e.line, e.reason) for e in report.examples] == [(2, "no question||answer")]
    alone, _ = load_gsm8k(tmp_path / "train.txt", "equations", validation=0)
    assert alone["train"][:] == splits["train"][:]


def test_hub_rows_take_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    # The hub itself cannot be reached from a test; rows have its columns, the chain in `steps` as in GSM8K-Aug.
    asked: list[tuple[str, ...]] = []

    def fake(*name: str) -> DatasetDict:
        asked.append(name)
        plain = Dataset.from_list([{"question": "q1", "answer": "<<2+3=5>>\n#### 5"}])
        augmented = Dataset.from_list([{"question": "q2", "steps": ["<<2*3=6>>", "<<6-1=5>>"], "answer": "5"}])
        return DatasetDict({"train": augmented if "aug" in name[0] else plain})

    monkeypatch.setattr(gsm8k, "load_dataset", fake)
    plain, report = load_gsm8k("openai/gsm8k", "equations", validation=0)
    assert plain["train"][0] == {"prompt": "q1", "response": "<<2+3=5>> #### 5", "answer": "5", "line": 1}
    assert report.read == {"train": 1}
    augmented, _ = load_gsm8k("whynlp/gsm8k-aug", "programs", validation=0)
    assert augmented["train"][0]["response"] == "2 * 3 = 6 ; 6 - 1 = 5 # 5"
    assert asked == [("openai/gsm8k", "main"), ("whynlp/gsm8k-aug",)]


def test_bad_input_names_the_field(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no train\.jsonl"):
        load_gsm8k(tmp_path / "empty")
    with pytest.raises(UserError, match=r"^form: 'poem' is unknown"):
        load_gsm8k(folder, "poem")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^validation: "):
        load_gsm8k(folder, validation=1.0)
    with pytest.raises(UserError, match=r"^max_number: "):
        load_gsm8k(folder, "programs", max_number=0)
    _write(folder / "train.jsonl", [json.dumps(_good(i)) for i in range(59)])
    with pytest.raises(UserError, match=r"the train split of .* is empty .*59 x a number is above 2"):
        load_gsm8k(folder, "programs", max_number=2)


def test_validation_split_is_a_stable_hash(folder: Path) -> None:
    first, _ = load_gsm8k(folder, "equations", validation=0.3)
    again, _ = load_gsm8k(folder, "equations", validation=0.3)
    other, _ = load_gsm8k(folder, "equations", validation=0.3, seed=1)
    assert first["validation"][:] == again["validation"][:]
    assert first["validation"]["prompt"][:] != other["validation"]["prompt"][:]
    # a row keeps its side when other rows come or go
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    _write(folder / "train.jsonl", lines[20:])
    fewer, _ = load_gsm8k(folder, "equations", validation=0.3)
    assert set(fewer["validation"]["prompt"]) < set(first["validation"]["prompt"])


def test_augmented_programs_are_valid(folder: Path) -> None:
    rows = [
        {"question": "a", "answer": "<<3*20=60>> <<60-15-25=20>> #### 20"},
        {"question": "b", "answer": "<<90/3=30>> <<30/2*4=60>> <<60-30+1=31>> #### 31"},
        {"question": "c", "answer": "<<(2+4)*5=30>> <<30-7=23>> #### 23"},
    ]
    _write(folder / "train.jsonl", [json.dumps(row) for row in rows])
    splits, _ = load_gsm8k(folder, "programs", validation=0)
    made = augment_programs(splits["train"], 600, 1, held_out=[splits["test"]])
    assert len(made) == 600
    assert made.features == splits["train"].features

    def structure(prompt: str) -> str:
        return re.sub(r"(?<![r\d])\d+", "c", prompt)

    real = {structure(row["prompt"]): row["line"] for row in splits["train"]}
    for row in made:
        _check_program(row)
        assert real[structure(row["prompt"])] == row["line"]
    assert {structure(prompt) for prompt in made["prompt"]} == set(real)
    assert len(set(made["prompt"])) > 300
    again = augment_programs(splits["train"], 600, 1, held_out=[splits["test"]])
    assert made[:] == again[:]
    assert made[:] != augment_programs(splits["train"], 600, 2, held_out=[splits["test"]])[:]


def test_augmented_programs_avoid_held_out_rows(tmp_path: Path) -> None:
    _write(tmp_path / "train.jsonl", [json.dumps({"question": "a", "answer": "<<1+2=3>> #### 3"})])
    splits, _ = load_gsm8k(tmp_path, "programs", validation=0, max_number=4)
    every = augment_programs(splits["train"], 300, 0, max_number=4)
    assert {"1 + 1", "1 + 3", "2 + 2"} <= set(every["prompt"])  # only six rows are possible
    held = every.filter(lambda row: row["prompt"] in ("1 + 1", "2 + 2"))
    kept = augment_programs(splits["train"], 300, 0, held_out=[held], max_number=4)
    assert set(kept["prompt"]) == {"1 + 2", "2 + 1", "1 + 3", "3 + 1"}
    with pytest.raises(UserError, match="no program can be filled"):
        augment_programs(splits["train"], 1, 0, held_out=[every], max_number=4)


@needs_real
def test_real_equations() -> None:
    splits, report = load_gsm8k(REAL, "equations")
    # 7,378 and 1,301 rows have equations; those of three do not parse
    unparsed = {e.line: e.detail for e in report.examples if e.reason == "equation does not parse"}
    assert unparsed == {395: "560//10=56", 4170: "180//3=60", 320: "3/4=3/4"}
    assert report.read == {"train.jsonl": 7473, "test.jsonl": 1319}
    assert report.count("no equations", "train.jsonl") == 95
    assert report.count("no equations", "test.jsonl") == 18
    assert report.count("equation does not parse", "train.jsonl") == 2
    assert report.count("equation does not parse", "test.jsonl") == 1
    assert len(splits["train"]) + len(splits["validation"]) == 7376
    assert len(splits["test"]) == 1300
    _complete(report, splits)
    _disjoint(splits)
    rows = {row["line"]: row for row in splits["test"]}
    assert rows[1]["response"] == "<<16-3-4=9>> <<9*2=18>> #### 18"
    assert (
        rows[3]["response"]
        == "<<80000+50000=130000>> <<80000*1.5=120000>> <<120000+80000=200000>> <<200000-130000=70000>> #### 70000"
    )
    assert 0.03 < len(splits["validation"]) / 7376 < 0.07


@needs_real
def test_real_full_text() -> None:
    splits, report = load_gsm8k(REAL, "full")
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 7120, "validation": 353, "test": 1319}
    assert not report.rejected
    assert all("," not in answer for answer in splits["train"]["answer"])
    tokenizer = WordTokenizer.build([*splits["test"]["prompt"], *splits["test"]["response"]])
    for row in splits["test"].select(range(300)):
        for text in (row["prompt"], row["response"]):
            assert tokenizer.decode(tokenizer.encode(text)) == text


@needs_real
def test_real_programs() -> None:
    splits, report = load_gsm8k(REAL, "programs")
    assert len(splits["test"]) == 408
    assert len(splits["train"]) + len(splits["validation"]) == 2304
    assert report.count("prompt is also in the test split") == 13
    _complete(report, splits)
    _disjoint(splits)
    for rows in splits.values():
        for row in rows:
            _check_program(row)
    tokenizer = WordTokenizer.build([*splits["train"]["prompt"], *splits["train"]["response"]])
    for row in splits["test"]:
        for text in (row["prompt"], row["response"]):
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert len(ids) == len(text.split())  # one token per number, operator and reference
    made = augment_programs(splits["train"], 2000, 0, held_out=[splits["validation"], splits["test"]])
    held = set(splits["validation"]["response"]) | set(splits["test"]["response"])
    for row in made:
        _check_program(row)
        assert row["response"] not in held
