from pathlib import Path
from typing import Any

import pytest

from orderppl.data import Reactions
from orderppl.data.dataset import Row
from orderppl.data.report import LoadReport
from orderppl.data.smiles import SmilesTokenizer
from orderppl.errors import UserError

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "reactions" / "reactions.csv"


def _file(tmp_path: Path, rows: list[str], name: str = "r.csv", header: str = "rxn") -> Path:
    path = tmp_path / name
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def load(path: Path, **options: Any) -> tuple[dict[str, list[Row]], LoadReport]:
    report = LoadReport()
    return Reactions(str(path), **options).make_rows(report), report


def test_rows_and_what_is_left_out(tmp_path: Path) -> None:
    path = _file(tmp_path, ["CO.Cl>>CCl", "CO", "C1>>C", ">>C", "CF>>C"])
    data = Reactions(str(path), test_share=0, validation_share=0)
    tokenizer = SmilesTokenizer(["[PAD]", "[SEP]", "[MASK]", "C", "O", "Cl", ".", ">>"])
    examples = data.splits(tokenizer)["train"]
    batch = examples.batch
    assert examples.lines == [2] and examples.texts(batch.tokens) == examples.references == ["CCl"]
    assert tokenizer.decode(batch.tokens[0][~batch.latent[0]].tolist()) == "CO.Cl>>"
    assert batch.prefix == 5 and data.end_index is None
    assert sorted((e.line, e.reason) for e in data.report.examples) == [
        (3, "no reactants>>product"),
        (4, "not readable"),
        (5, "no reactants>>product"),
        (6, "not readable"),
    ]
    assert data.report.read == {"r.csv": 5}


def test_a_vocabulary_of_their_own(tmp_path: Path) -> None:
    data = Reactions(str(_file(tmp_path, ["CO.Cl>>CCl", "CF>>C"])), test_share=0, validation_share=0)
    tokenizer = data.splits()["train"].tokenizer
    assert tokenizer is not None
    assert tokenizer.tokens == ["[PAD]", "[MASK]", "[SEP]", ".", ">>", "C", "Cl", "F", "O"]
    long = _file(tmp_path, ["C" * 97 + ">>C", "C>>" + "C" * 65, "C>>C"], "l.csv")
    data = Reactions(str(long), test_share=0, validation_share=0)
    assert data.splits()["train"].lines == [4]
    assert [e.reason[:8] for e in data.report.examples] == ["prompt i", "response"]


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        load(tmp_path / "none.csv")
    with pytest.raises(UserError, match="no column 'rxn'; its columns are smiles"):
        load(_file(tmp_path, ["C>>C"], header="smiles"))
    with pytest.raises(UserError, match=r"the train split of .* is empty \(1 x no reactants>>product\)"):
        load(_file(tmp_path, ["C"]), test_share=0, validation_share=0)
    with pytest.raises(UserError, match=r"validation_share: 0\.8 is not in \[0, 0\.7\)"):
        load(_file(tmp_path, ["C>>C"]), validation_share=0.8)


def test_splits_share_nothing(tmp_path: Path) -> None:
    reactions = [f"{'C' * (i % 17 + 1)}>>{'O' * (i // 17 + 1)}" for i in range(200)] * 2
    path = _file(tmp_path, reactions)
    splits, _ = load(path)
    sets = {name: {f"{row.prompt}{row.text}" for row in rows} for name, rows in splits.items()}
    assert list(sets) == ["train", "validation", "test"] and sum(map(len, sets.values())) == 200
    assert abs(len(sets["test"]) - 60) < 5 * 42**0.5 and abs(len(sets["validation"]) - 30) < 5 * 26**0.5
    assert sum(map(len, splits.values())) == 400
    held = _file(tmp_path, [reactions[0], "N>>N"], "t.csv")
    splits, report = load(path, test=str(held), validation_share=0.0)
    assert list(splits) == ["train", "test"] and len(splits["test"]) == 2
    assert report.count("also in the test split", "r.csv") == 2


@pytest.mark.skipif(not REAL.is_file(), reason="the reactions are not beside the project")
def test_real_reactions() -> None:
    splits, report = load(REAL)
    assert report.read == {"reactions.csv": 715} and not report.rejected
    assert sum(map(len, splits.values())) == 715
    assert set(splits) == {"train", "validation", "test"}
