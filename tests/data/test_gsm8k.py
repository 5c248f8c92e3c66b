import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Regex, decoders
from tokenizers import Tokenizer as RawTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from orderppl.data import Gsm8k
from orderppl.data.dataset import Row, texts_of
from orderppl.data.gsm8k import Form, augment_programs, evaluate_expression
from orderppl.data.report import LoadReport
from orderppl.data.tokenizers import PretrainedTokenizer, WordTokenizer, load_tokenizer
from orderppl.errors import UserError

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "gsm8k"
needs_real = pytest.mark.skipif(
    not (REAL / "train.jsonl").is_file(), reason="the real GSM8K files are not beside the project"
)


def load(source: Path | str, form: Form = "equations", **options: Any) -> tuple[dict[str, list[Row]], LoadReport]:
    report = LoadReport()
    rows = Gsm8k(str(source), form, **{"test_share": 0, "validation_share": 0, **options}).make_rows(report)
    return rows, report


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


def _complete(report: LoadReport, splits: dict[str, list[Row]]) -> None:
    """Every row read is either delivered or counted under a reason."""
    assert sum(report.read.values()) == sum(len(rows) for rows in splits.values()) + sum(report.rejected.values())


def _disjoint(splits: dict[str, list[Row]]) -> None:
    prompts = [{row.prompt for row in rows} for rows in splits.values()]
    assert sum(map(len, prompts)) == len(set().union(*prompts))


def _check_program(row: Row, max_number: int = 99, max_equations: int = 4) -> None:
    """The response is the prompt with references filled in, every equation true and in range."""
    chain, _, answer = row.text.partition(" # ")
    results: list[str] = []
    asked, executed = (row.prompt or "").split(" ; "), chain.split(" ; ")
    assert len(asked) == len(executed) <= max_equations
    for prompt, equation in zip(asked, executed, strict=True):
        left, result = equation.split(" = ")
        assert re.sub(r"r(\d)", lambda m: results[int(m[1]) - 1], prompt) == left
        value = Fraction(eval(re.sub(r"(\d+)", r"Fraction(\1)", left), {"Fraction": Fraction}))
        assert value == int(result)
        assert all(0 <= int(n) <= max_number for n in re.findall(r"\d+", equation))
        results.append(result)
    assert results[-1] == answer == (row.answer or "").removesuffix(".0")


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
    splits, report = load(folder, "equations", validation_share=0.2)
    found = {example.line: example.reason for example in report.examples}
    assert found == {
        4: "not JSON",
        6: "no text in 'answer'",
        8: "no number after ####",
        10: "no equations",
        12: "equation does not parse",
        14: "empty line",
        16: "not an object",
        18: "also in the test split",
    }
    assert all(example.file == "train.jsonl" for example in report.examples)
    assert "3/4=3/4" in next(str(e) for e in report.examples if e.line == 12)
    _complete(report, splits)
    _disjoint(splits)
    assert ("train.jsonl", "not JSON", 1) in [row[:3] for row in report.table()]
    assert ("train.jsonl", "read", 60, "") in report.table()


def test_forms_of_known_rows(folder: Path) -> None:
    def first(form: Form) -> Row:
        return load(folder, form)[0]["train"][0]

    assert first("full").text == _good(0)["answer"]
    assert first("equations") == Row("<<2+1=3>> <<3*1=3>> #### 3", "Question 0?", answer="3", line=1)
    assert first("programs") == Row("2 + 1 = 3 ; 3 * 1 = 3 # 3", "2 + 1 ; r1 * 1", answer="3", line=1)
    thousands = next(row for row in load(folder)[0]["train"] if row.line == 20)
    assert (thousands.text, thousands.answer) == ("<<500*2=1000>> #### 1000", "1000")


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
    ],
)
def test_rows_without_a_program(tmp_path: Path, answer: str, reason: str) -> None:
    rows = [_good(0), {"question": "Bad?", "answer": answer}]
    _write(tmp_path / "train.jsonl", [json.dumps(row) for row in rows])
    splits, report = load(tmp_path, "programs")
    assert [row.line for row in splits["train"]] == [1]
    assert [(e.line, e.reason) for e in report.examples] == [(2, reason)]


def test_reference_is_the_latest_equal_result(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "<<2+2=4>> <<8/2=4>> <<4*(3-2)=4>> <<4+09=13>> #### 13.0"}
    _write(tmp_path / "train.jsonl", [json.dumps(row)])
    splits, _ = load(tmp_path, "programs")
    made = splits["train"][0]
    assert made.prompt == "2 + 2 ; 8 / 2 ; r2 * ( 3 - 2 ) ; r3 + 9"
    assert made.text == "2 + 2 = 4 ; 8 / 2 = 4 ; 4 * ( 3 - 2 ) = 4 ; 4 + 9 = 13 # 13"
    _check_program(made)


def test_equation_chain_files_and_single_files(tmp_path: Path) -> None:
    lines = ["\ufeffHow many?||<<2+3=5>> <<5*2=10>> #### 10", "no separator", "Again?||<<1+1=2>> #### 2"]
    _write(tmp_path / "train.txt", lines)
    splits, report = load(tmp_path, "equations")
    assert [row.text for row in splits["train"]] == ["<<2+3=5>> <<5*2=10>> #### 10", "<<1+1=2>> #### 2"]
    assert splits["train"][0].prompt == "How many?"  # without the byte-order mark
    assert [(e.line, e.reason) for e in report.examples] == [(2, "no question||answer")]
    alone, _ = load(tmp_path / "train.txt", "equations")
    assert alone["train"] == splits["train"]
    (tmp_path / "train.txt").rename(tmp_path / "test-rows.txt")
    assert set(load(tmp_path / "test-rows.txt", "equations")[0]) == {"test"}


def test_hub_rows_take_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    # The hub itself cannot be reached from a test; rows have its columns, the chain in `steps` as in GSM8K-Aug.
    asked: list[tuple[str, str | None]] = []

    def fake(name: str, subset: str | None, **options: Any) -> DatasetDict:
        asked.append((name, subset))
        plain = Dataset.from_list([{"question": "q1", "answer": "<<2+3=5>>\n#### 5"}])
        augmented = Dataset.from_list([{"question": "q2", "steps": ["<<2*3=6>>", "<<6-1=5>>"], "answer": "5"}])
        return DatasetDict({"train": augmented if "aug" in name else plain})

    monkeypatch.setattr(datasets, "load_dataset", fake)
    plain, report = load("openai/gsm8k", "equations")
    assert plain["train"] == [Row("<<2+3=5>> #### 5", "q1", answer="5", line=1)]
    assert report.read == {"train": 1}
    augmented, _ = load("whynlp/gsm8k-aug", "programs")
    assert augmented["train"][0].text == "2 * 3 = 6 ; 6 - 1 = 5 # 5"
    assert asked == [("openai/gsm8k", "main"), ("whynlp/gsm8k-aug", None)]


def test_bad_input_names_the_field(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no train\.jsonl"):
        load(tmp_path / "empty")
    with pytest.raises(UserError, match=r"^form: 'poem' is unknown"):
        load(folder, "poem")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^validation_share: "):
        load(folder, validation_share=1.0)
    with pytest.raises(UserError, match=r"^max_number: "):
        load(folder, "programs", max_number=0)
    with pytest.raises(UserError, match=r"^data: 'no/such' is no local path"):
        load("no/such")
    _write(folder / "train.jsonl", [json.dumps(_good(i)) for i in range(59)])
    with pytest.raises(UserError, match=r"the train split of .* is empty .*59 x a number is above 2"):
        load(folder, "programs", max_number=2)


def test_validation_split_is_a_stable_hash(folder: Path) -> None:
    first, _ = load(folder, "equations", validation_share=0.3)
    again, _ = load(folder, "equations", validation_share=0.3)
    other, _ = load(folder, "equations", validation_share=0.3, seed=1)
    assert first["validation"] == again["validation"]
    assert first["validation"] != other["validation"]
    # a row keeps its side when other rows come or go
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    _write(folder / "train.jsonl", lines[20:])
    fewer, _ = load(folder, "equations", validation_share=0.3)
    assert {row.prompt for row in fewer["validation"]} < {row.prompt for row in first["validation"]}


def test_augmented_programs_are_valid(folder: Path) -> None:
    rows = [
        {"question": "a", "answer": "<<3*20=60>> <<60-15-25=20>> #### 20"},
        {"question": "b", "answer": "<<90/3=30>> <<30/2*4=60>> <<60-30+1=31>> #### 31"},
        {"question": "c", "answer": "<<(2+4)*5=30>> <<30-7=23>> #### 23"},
    ]
    _write(folder / "train.jsonl", [json.dumps(row) for row in rows])
    splits, _ = load(folder, "programs")
    made = augment_programs(splits["train"], 600, 1, splits["test"])
    assert len(made) == 600

    def structure(prompt: str) -> str:
        return re.sub(r"(?<![r\d])\d+", "c", prompt)

    real = {structure(row.prompt or ""): row.line for row in splits["train"]}
    for row in made:
        _check_program(row)
        assert real[structure(row.prompt or "")] == row.line
    assert {structure(row.prompt or "") for row in made} == set(real)
    assert len({row.prompt for row in made}) > 300
    again = augment_programs(splits["train"], 600, 1, splits["test"])
    assert made == again
    assert made != augment_programs(splits["train"], 600, 2, splits["test"])


def test_augmented_programs_avoid_held_out_rows(tmp_path: Path) -> None:
    _write(tmp_path / "train.jsonl", [json.dumps({"question": "a", "answer": "<<1+2=3>> #### 3"})])
    splits, _ = load(tmp_path, "programs", max_number=4)
    every = augment_programs(splits["train"], 300, 0, max_number=4)
    assert {"1 + 1", "1 + 3", "2 + 2"} <= {row.prompt for row in every}  # only six rows are possible
    held = [row for row in every if row.prompt in ("1 + 1", "2 + 2")]
    kept = augment_programs(splits["train"], 300, 0, held, max_number=4)
    assert {row.prompt for row in kept} == {"1 + 2", "2 + 1", "1 + 3", "3 + 1"}
    with pytest.raises(UserError, match="no program can be filled"):
        augment_programs(splits["train"], 1, 0, every, max_number=4)


@needs_real
def test_real_equations() -> None:
    splits, report = load(REAL, "equations", validation_share=0.05)
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
    rows = {row.line: row for row in splits["test"]}
    assert rows[1].text == "<<16-3-4=9>> <<9*2=18>> #### 18"
    assert (
        rows[3].text
        == "<<80000+50000=130000>> <<80000*1.5=120000>> <<120000+80000=200000>> <<200000-130000=70000>> #### 70000"
    )
    assert 0.03 < len(splits["validation"]) / 7376 < 0.07


@needs_real
def test_real_full_text() -> None:
    splits, report = load(REAL, "full", validation_share=0.05)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 7120, "validation": 353, "test": 1319}
    assert not report.rejected
    assert all("," not in str(row.answer) for row in splits["train"])
    tokenizer = WordTokenizer.build(texts_of(splits["test"]))
    for text in texts_of(splits["test"][:300]):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@needs_real
def test_real_programs() -> None:
    splits, report = load(REAL, "programs", validation_share=0.05)
    assert len(splits["test"]) == 408
    assert len(splits["train"]) + len(splits["validation"]) == 2304
    assert report.count("also in the test split") == 13
    _complete(report, splits)
    _disjoint(splits)
    for rows in splits.values():
        for row in rows:
            _check_program(row)
    tokenizer = WordTokenizer.build(texts_of(splits["train"]))
    for text in texts_of(splits["test"]):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert len(ids) == len(text.split())  # one token per number, operator and reference
    held_out = [*splits["validation"], *splits["test"]]
    made = augment_programs(splits["train"], 2000, 0, held_out)
    held = {row.text for row in held_out}
    for row in made:
        _check_program(row)
        assert row.text not in held


def test_canvases_of_programs(folder: Path) -> None:
    data = Gsm8k(str(folder), "programs", validation_share=0.2, augment=50, seed=3)
    splits = data.splits()
    rows = data.report.kept["train"]
    assert {"train", "validation", "test"} == set(splits) and len(splits["train"]) == rows
    assert rows == sum(1 for line in splits["train"].lines or []) and rows > 50
    for examples in splits.values():
        batch, tokenizer = examples.batch, examples.tokenizer
        assert tokenizer is not None and tokenizer.tokens[-1] != "100" and "99" in tokenizer.tokens
        assert (batch.tokens[:, batch.prefix - 1] == data.separator_index).all()  # usual for this data
        assert examples.grade(examples.texts(batch.tokens), examples.references or []).all()
    # the denoiser's own tokeniser goes first, and the rows stay the same
    other = WordTokenizer.build(["2 + 3 = 5 # 5 ; r1 * 9"])
    again = data.splits(other)
    assert again["test"].tokenizer is other and data.vocab_size == other.vocab_size
    assert again["test"].lines == splits["test"].lines and again["test"].answers == splits["test"].answers
    assert data.splits() is again
    # a training seed changes nothing: there is none among the arguments
    assert (
        Gsm8k(str(folder), "programs", validation_share=0.2, seed=3).splits(other)["test"].lines == again["test"].lines
    )


def begin_and_end(folder: Path) -> PretrainedTokenizer:
    """A tokeniser of words, marks and every blank, with a begin and an end token of its own, as that of SMDM."""
    words = ["<s>", "</s>", "<m>", "?", *"0123456789 \n:.,+*=", "<<", ">>", "####", "Question", "Answer", "How", "many"]
    raw = RawTokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="?"))
    raw.pre_tokenizer = Split(Regex(r"####|<<|>>|[A-Za-z]+|[0-9]|\s|."), "isolated")
    raw.decoder = decoders.Fuse()
    special = {"bos_token": "<s>", "eos_token": "</s>", "mask_token": "<m>", "unk_token": "?"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **special).save_pretrained(folder / "tokenizer")
    return load_tokenizer(folder / "tokenizer")


def smdm(folder: Path, **options: Any) -> Gsm8k:
    shares = {"test_share": 0.0, "validation_share": 0.0}
    return Gsm8k(str(folder), "smdm", tokenizer_from=str(folder / "tokenizer"), **{**shares, **options})


def test_the_form_of_smdm_token_by_token(tmp_path: Path) -> None:
    """Both examples of a problem: a begin token before every segment, ends up to the canvas, all to be revealed."""
    tokens = begin_and_end(tmp_path).tokens
    _write(tmp_path / "train.txt", ["How many ?||<<2+3=5>> <<5*20=100>> #### 1,00"])
    _write(tmp_path / "test.txt", ["How ?||<<2+2=4>> #### 4", "many ?||#### 3"])
    data = smdm(tmp_path, canvas=48)
    splits = data.splits()
    question = ["<s>", "Question", ":", " ", "How", " ", "many", " ", "?"]
    chain = ["<s>", "Answer", ":", " ", "<<", *"2+3=5", ">>", " ", "<<", *"5*20=100", ">>", " "]
    answer = ["<s>", "####", " ", *"1,00", "\n"]
    found = []
    for row in range(len(splits["train"])):
        batch = splits["train"].batch.rows([row])
        spelt = [tokens[token] for token in batch.tokens[0].tolist()]
        found.append(
            [[t for t, kept in zip(spelt, mask[0], strict=True) if kept] for mask in (batch.given, batch.latent)]
        )
    assert found == [
        [question, chain + ["</s>"] * (48 - len(question) - len(chain))],
        [question + chain, answer + ["</s>"] * (48 - len(question) - len(chain) - len(answer))],
    ]
    # the held-out problems, of which one has no chain: the first example alone
    test = splits["test"]
    assert test.texts(test.batch.tokens) == ["Answer: <<2+2=4>> ", "Answer: "] and test.answers == ["4", "3"]
    assert (test.batch.attention_mask.sum(-1) == 48).all()
    assert test.grade(["Answer: <<1+3=4>> ", "Answer: <<1+3=4>> "], ["4", "3"]).tolist() == [1.0, 0.0]
    assert data.separator_index is None


def test_the_form_of_smdm_leaves_long_rows_out(tmp_path: Path) -> None:
    """Row by row: here a chain fits to the last position and needs no end, and its answer does not."""
    begin_and_end(tmp_path)
    _write(tmp_path / "train.txt", ["many ?||<<2+3=5>> #### 5"])
    data = smdm(tmp_path, canvas=19)
    batch = data.splits()["train"].batch
    assert len(batch) == 1 and batch.latent.sum() == 12 and batch.given.sum() == 7
    assert data.splits()["train"].texts(batch.tokens) == ["Answer: <<2+3=5>> "]
    assert data.report.count("prompt and response are longer than the canvas") == 1
    assert smdm(tmp_path).splits()["train"].batch.attention_mask.sum(-1).tolist() == [256, 256]
    with pytest.raises(UserError, match=r"no row is left .*longer than the canvas"):
        smdm(tmp_path, canvas=18).splits()


def test_the_form_of_smdm_without_a_begin_token(folder: Path) -> None:
    data = Gsm8k(str(folder), "smdm", validation_share=0.2)
    splits = data.splits()
    assert data.tokenizer is None and splits["train"].batch.attention_mask.sum(-1).unique().tolist() == [256]
    assert data.report.count("no equations") == 0  # the text stays as it is
    for split, rows in splits.items():
        lines = rows.lines or []
        assert len(lines) == (2 if split == "train" else 1) * len(set(lines))
