from pathlib import Path

import pytest

from orderppl.data.reactions import load_reactions, read_reactions
from orderppl.data.report import LoadReport
from orderppl.data.smiles import SmilesTokenizer
from orderppl.errors import UserError

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "reactions" / "reactions.csv"


def _file(tmp_path: Path, rows: list[str], name: str = "r.csv", header: str = "rxn") -> Path:
    path = tmp_path / name
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_rows_and_what_is_left_out(tmp_path: Path) -> None:
    path = _file(tmp_path, ["CO.Cl>>CCl", "CO", "C1>>C", ">>C", "CF>>C"])
    report = LoadReport("x")
    rows = read_reactions(
        path, report, tokenizer=SmilesTokenizer(["[PAD]", "[SEP]", "[MASK]", "C", "O", "Cl", ".", ">>"])
    )
    assert [(row["prompt"], row["response"], row["line"]) for row in rows] == [("CO.Cl>>", "CCl", 2)]
    assert [(e.line, e.reason) for e in report.examples] == [
        (3, "no reactants>>product"),
        (4, "not readable"),
        (5, "no reactants>>product"),
        (6, "not readable"),
    ]
    assert report.read == {"r.csv": 5}


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        load_reactions(tmp_path / "none.csv")
    with pytest.raises(UserError, match="no column 'rxn'; its columns are smiles"):
        load_reactions(_file(tmp_path, ["C>>C"], header="smiles"))
    with pytest.raises(UserError, match="no reaction is left"):
        load_reactions(_file(tmp_path, ["C"]))
    with pytest.raises(UserError, match=r"validation: 0\.8 is not in \[0, 0\.7\)"):
        load_reactions(_file(tmp_path, ["C>>C"]), validation=0.8)


def test_splits_share_nothing(tmp_path: Path) -> None:
    reactions = [f"{'C' * (i % 17 + 1)}>>{'O' * (i // 17 + 1)}" for i in range(200)] * 2
    path = _file(tmp_path, reactions)
    splits, report = load_reactions(path)
    sets = {name: set(split["reaction"]) for name, split in splits.items()}
    assert list(sets) == ["train", "validation", "test"] and sum(map(len, sets.values())) == 200
    assert abs(len(sets["test"]) - 60) < 5 * 42**0.5 and abs(len(sets["validation"]) - 30) < 5 * 26**0.5
    assert sum(report.kept.values()) == 400
    held = _file(tmp_path, [reactions[0], "N>>N"], "t.csv")
    splits, report = load_reactions(path, held, validation=0.0)
    assert list(splits) == ["train", "test"] and len(splits["test"]) == 2
    assert report.count("also in the test file", "r.csv") == 2


@pytest.mark.skipif(not REAL.is_file(), reason="the reactions are not beside the project")
def test_real_reactions() -> None:
    splits, report = load_reactions(REAL)
    assert report.read == {"reactions.csv": 715} and not report.rejected
    assert sum(report.kept.values()) == 715
    assert set(splits) == {"train", "validation", "test"}
