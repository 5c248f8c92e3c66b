from pathlib import Path

import pytest

from orderppl.data.report import LoadReport
from orderppl.data.sequences import load_sequences, read_sequences
from orderppl.errors import UserError

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "antibodies" / "heavy.csv"
FASTA = ">one first entry\nQVQLVQSG\nAEVKKPGA\n\n>two\nevqllesgg\n>three\nQVQLVESGGG\n"
CSV = 'name,note,heavy\na,x,QVQLVQSGAE\nb,"two\nlines",EVQLLESGGG\nc,z, QVTLKESGPV \n'


def _file(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_fasta(tmp_path: Path) -> None:
    report = LoadReport("x")
    rows = read_sequences(_file(tmp_path, "s.fasta", FASTA), report)
    assert list(rows) == [
        {"name": "one", "sequence": "QVQLVQSGAEVKKPGA", "line": 1},
        {"name": "two", "sequence": "EVQLLESGG", "line": 5},
        {"name": "three", "sequence": "QVQLVESGGG", "line": 7},
    ]
    assert report.read == {"s.fasta": 3}


def test_csv_and_its_columns(tmp_path: Path) -> None:
    path = _file(tmp_path, "s.csv", CSV)
    rows = read_sequences(path, LoadReport("x"))
    assert list(rows) == [
        {"name": "a", "sequence": "QVQLVQSGAE", "line": 2},
        {"name": "b", "sequence": "EVQLLESGGG", "line": 3},
        {"name": "c", "sequence": "QVTLKESGPV", "line": 5},  # a quoted value spans two lines
    ]
    renamed = _file(tmp_path, "r.csv", CSV.replace("heavy", "vh"))
    assert read_sequences(renamed, LoadReport("x"))[:] == rows[:]
    assert read_sequences(renamed, LoadReport("x"), column="vh")[:] == rows[:]
    with pytest.raises(UserError, match=r"no column 'light'; its columns are name, note, vh"):
        read_sequences(renamed, LoadReport("x"), column="light")
    tabs = _file(tmp_path, "t.tsv", "id\tseq\n1\tQVQLVQSGAE\n")
    assert read_sequences(tabs, LoadReport("x"))["sequence"][:] == ["QVQLVQSGAE"]
    with pytest.raises(UserError, match=r"no column of .* looks like sequences; name one; its columns are a, b"):
        read_sequences(_file(tmp_path, "n.csv", "a,b\n1,2\n"), LoadReport("x"))


def test_bad_rows_stop_the_run_or_are_reported(tmp_path: Path) -> None:
    text = CSV + "d,,QVXLZ\ne,,\nf,,QVQLVQSGAEQVQLVQSGAE\n"
    path = _file(tmp_path, "s.csv", text)
    with pytest.raises(UserError, match=r"s\.csv:6: letters outside the alphabet \(d: X Z\); only ACD"):
        read_sequences(path, LoadReport("x"))
    report = LoadReport("x")
    rows = read_sequences(path, report, on_bad="report", max_length=15)
    assert rows["name"][:] == ["a", "b", "c"]
    assert [(e.line, e.reason) for e in report.examples] == [
        (6, "letters outside the alphabet"),
        (7, "empty sequence"),
        (8, "longer than the canvas"),
    ]
    assert read_sequences(path, LoadReport("x"), on_bad="report", alphabet="ABCDEFGHIKLMNPQRSTVWXYZ")["name"][3] == "d"


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.csv: there is no such file"):
        load_sequences(tmp_path / "none.csv")
    with pytest.raises(UserError, match="the file is empty"):
        load_sequences(_file(tmp_path, "e.csv", ""))
    with pytest.raises(UserError, match="no sequence is left"):
        load_sequences(_file(tmp_path, "h.csv", "name,heavy\n"))
    with pytest.raises(UserError, match=r"^test: the test split .* is empty"):
        load_sequences(_file(tmp_path, "s.csv", CSV), held_out=1e-9)
    with pytest.raises(UserError, match="held_out: 0 is not in"):
        load_sequences(_file(tmp_path, "s.csv", CSV), held_out=0)


def test_splits_are_disjoint(tmp_path: Path) -> None:
    letters = "ACDEFGHIKLMNPQRSTVWY"
    sequences = [letters[i % 20] * 5 + letters[i // 20] * 6 for i in range(200)] * 2  # each twice
    path = _file(tmp_path, "s.fa", "".join(f">{i}\n{s}\n" for i, s in enumerate(sequences)))
    splits, report = load_sequences(path, held_out=0.3)
    train, test = set(splits["train"]["sequence"]), set(splits["test"]["sequence"])
    assert not train & test
    assert len(splits["train"]) + len(splits["test"]) == 400
    assert abs(len(test) - 60) < 5 * (200 * 0.3 * 0.7) ** 0.5
    assert report.kept == {"train": len(splits["train"]), "test": len(splits["test"])}
    again, _ = load_sequences(path, held_out=0.3)
    assert again["test"][:] == splits["test"][:]

    other = _file(tmp_path, "t.fa", f">x\n{sequences[0]}\n>y\nQVQLVQSGAE\n")
    splits, report = load_sequences(path, other)
    assert len(splits["test"]) == 2
    assert len(splits["train"]) == 398
    assert sequences[0] not in splits["train"]["sequence"]
    assert report.count("also in the test file", "s.fa") == 2


@pytest.mark.skipif(not REAL.is_file(), reason="the antibody file is not beside the project")
def test_real_antibodies() -> None:
    splits, report = load_sequences(REAL)
    assert report.read == {"heavy.csv": 400}
    assert len(splits["train"]) + len(splits["test"]) == 400
    assert not report.rejected
    assert splits["train"]["name"][0] == "Abagovomab" or splits["test"]["name"][0] == "Abagovomab"
    assert not set(splits["train"]["sequence"]) & set(splits["test"]["sequence"])
