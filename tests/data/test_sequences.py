from pathlib import Path
from typing import Any

import pytest
import torch

from orderppl.data import Antibodies, Fasta
from orderppl.data.dataset import Row
from orderppl.data.report import LoadReport
from orderppl.data.sequences import REGIONS, antibody_regions
from orderppl.data.tokenizers import LetterTokenizer, load_tokenizer
from orderppl.errors import UserError

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "antibodies" / "heavy.csv"
FASTA = ">one first entry\nQVQLVQSG\nAEVKKPGA\n\n>two\nevqllesgg\n>three\nQVQLVESGGG\n"
CSV = 'name,note,heavy\na,x,QVQLVQSGAE\nb,"two\nlines",EVQLLESGGG\nc,z, QVTLKESGPV \n'
DOMAIN = (
    "EVQLVESGGGLVQPGRSLRLSCAASGFTFDDYAMHWVRQAPGKGLEWVSAITWNSGHIDYADSVEGRFTISRDNAKNSLYLQMNSLRAEDTAVYYCAKVSYLS"
    "TASSLDYWGQGTLVTVSS"
)


def _file(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def load(path: Path, **options: Any) -> tuple[dict[str, list[Row]], LoadReport]:
    report = LoadReport()
    return Fasta(str(path), **options).make_rows(report), report


def read(path: Path, **options: Any) -> list[tuple[str, str, int]]:
    """Name, sequence and line of all rows."""
    return [(row.name, row.text, row.line) for row in load(path, test_share=0, **options)[0]["train"]]


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_fasta(tmp_path: Path, ends: str, mark: str) -> None:
    path = tmp_path / "s.fasta"
    path.write_bytes((mark + FASTA).replace("\n", ends).encode())
    assert read(path) == [("one", "QVQLVQSGAEVKKPGA", 1), ("two", "EVQLLESGG", 5), ("three", "QVQLVESGGG", 7)]
    assert load(path, test_share=0)[1].read == {"s.fasta": 3}


def test_csv_and_its_columns(tmp_path: Path) -> None:
    path = _file(tmp_path, "s.csv", CSV)
    rows = [("a", "QVQLVQSGAE", 2), ("b", "EVQLLESGGG", 3), ("c", "QVTLKESGPV", 5)]  # a quoted value spans two lines
    assert read(path) == rows
    renamed = _file(tmp_path, "r.csv", CSV.replace("heavy", "vh"))
    assert read(renamed) == rows
    assert read(renamed, column="vh") == rows
    with pytest.raises(UserError, match=r"no column 'light'; its columns are name, note, vh"):
        read(renamed, column="light")
    tabs = _file(tmp_path, "t.tsv", "id\tseq\n1\tQVQLVQSGAE\n")
    assert read(tabs) == [("line 2", "QVQLVQSGAE", 2)]
    with pytest.raises(UserError, match=r"no column of .* looks like sequences; name one; its columns are a, b"):
        read(_file(tmp_path, "n.csv", "a,b\n1,2\n"))
    with pytest.raises(UserError, match="the column 'a' stands twice"):
        read(_file(tmp_path, "d.csv", "a,a\nQVQLVQSGAE,2\n"))


def test_bad_rows_stop_the_run_or_are_reported(tmp_path: Path) -> None:
    text = CSV + "d,,QVXLZ\ne,,\nf,,QVQLVQSGAEQVQLVQSGAE\n"
    path = _file(tmp_path, "s.csv", text)
    with pytest.raises(UserError, match=r"s\.csv:6: letters outside the alphabet: d: X Z; only ACD"):
        read(path)
    data = Fasta(str(path), on_bad="report", max_length=15, test_share=0)
    assert data.splits()["train"].names == ["a", "b", "c"]
    assert [(e.line, e.reason) for e in data.report.examples] == [
        (6, "letters outside the alphabet"),
        (7, "empty sequence"),
        (8, "response is longer than the canvas"),
    ]
    assert read(path, on_bad="report", alphabet="ABCDEFGHIKLMNPQRSTVWXYZ")[3][0] == "d"


@pytest.mark.parametrize("letter", ["\u00df", "\ufb01", "\u0131", "\u017f", "\u01f0"])
def test_letters_whose_upper_case_is_another_are_refused(tmp_path: Path, letter: str) -> None:
    """Of sharp s upper case is SS, of a ligature FI, of a dotless i and a long s the residues I and S."""
    path = _file(tmp_path, "s.fa", f">x\nQVQ{letter}VQ\n")
    with pytest.raises(UserError, match=r"s\.fa:1: letters outside the alphabet"):
        read(path)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.csv: there is no such file"):
        load(tmp_path / "none.csv")
    with pytest.raises(UserError, match="there is no such file"):
        load(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / ("x" * 400))
    with pytest.raises(UserError, match="the file is empty"):
        load(_file(tmp_path, "e.csv", ""))
    with pytest.raises(UserError, match=r"the train split of .*h\.csv is empty \(0 rows were read\)"):
        load(_file(tmp_path, "h.csv", "name,heavy\n"))
    with pytest.raises(UserError, match=r"^test: the test split .* is empty"):
        load(_file(tmp_path, "s.csv", CSV), test_share=1e-9)
    with pytest.raises(UserError, match=r"test_share: 1 is not in \[0, 1\)"):
        load(_file(tmp_path, "s.csv", CSV), test_share=1)
    with pytest.raises(UserError, match=r"validation_share: 0\.8 is not in \[0, 0\.7\)"):
        load(_file(tmp_path, "s.csv", CSV), test_share=0.3, validation_share=0.8)
    with pytest.raises(UserError, match="train: no file of sequences"):
        Fasta()
    with pytest.raises(UserError, match="names: .* is no regular expression"):
        Fasta("x.csv", names="(")
    (tmp_path / "latin.csv").write_bytes("name,heavy\nK\u00fche,QVQ\n".encode("latin-1"))
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / "latin.csv")


def test_splits_are_disjoint(tmp_path: Path) -> None:
    letters = "ACDEFGHIKLMNPQRSTVWY"
    sequences = [letters[i % 20] * 5 + letters[i // 20] * 6 for i in range(200)] * 2  # each twice
    path = _file(tmp_path, "s.fa", "".join(f">{i}\n{s}\n" for i, s in enumerate(sequences)))
    splits, _ = load(path, test_share=0.3)
    train, test = ({row.text for row in splits[name]} for name in ("train", "test"))
    assert not train & test
    assert len(splits["train"]) + len(splits["test"]) == 400
    assert abs(len(test) - 60) < 5 * (200 * 0.3 * 0.7) ** 0.5
    again, _ = load(path, test_share=0.3)
    assert again["test"] == splits["test"]

    other = _file(tmp_path, "t.fa", f">x\n{sequences[0]}\n>y\nQVQLVQSGAE\n")
    splits, report = load(path, test=str(other))
    assert len(splits["test"]) == 2
    assert len(splits["train"]) == 398
    assert sequences[0] not in {row.text for row in splits["train"]}
    assert report.count("also in the test split", "s.fa") == 2


def test_names(tmp_path: Path) -> None:
    report = LoadReport()
    rows = Fasta(str(_file(tmp_path, "s.csv", CSV)), names="^[ab]$", test_share=0).make_rows(report)
    assert [row.name for row in rows["train"]] == ["a", "b"]
    assert report.count("name not wanted") == 1  # left out, although bad rows stop the run


def test_residues_as_a_denoiser_reads_them(tmp_path: Path, protein_bert: Path) -> None:
    path = _file(tmp_path, "s.fa", FASTA)
    data = Fasta(str(path), test_share=0)
    own = data.splits()["train"]
    assert isinstance(own.tokenizer, LetterTokenizer)
    assert own.tokenizer.tokens[4:24] == list("ACDEFGHIKLMNPQRSTVWY")  # as the antibody model has them
    assert (own.tokenizer.pad_index, own.tokenizer.mask_index, data.end_index) == (1, 24, None)
    assert own.texts(own.batch.tokens) == own.references == ["QVQLVQSGAEVKKPGA", "EVQLLESGG", "QVQLVESGGG"]
    assert own.batch.latent.sum(-1).tolist() == [16, 9, 10]
    # a masked model's frame is given; its tokeniser wants spaces between letters
    tokenizer = load_tokenizer(protein_bert)
    framed = data.splits(tokenizer)["train"]
    assert tokenizer.frame == ((2,), (3,))
    batch = framed.batch
    assert batch.attention_mask.sum(-1).tolist() == [18, 11, 12] and batch.latent.sum(-1).tolist() == [16, 9, 10]
    assert (batch.tokens[:, 0] == 2).all() and batch.tokens[1, 10] == 3
    assert not batch.latent[:, 0].any() and not batch.latent[1, 10:].any()
    assert framed.texts(batch.tokens) == framed.references == [" ".join(text) for text in own.references or []]
    with pytest.raises(UserError, match="tokenizer: has not one token per letter"):
        data.splits(LetterLess())


class LetterLess(LetterTokenizer):
    """Reads every text as one token."""

    def __init__(self) -> None:
        super().__init__("ABC")

    def encode(self, text: str) -> list[int]:
        return [4]


def test_regions_of_a_domain() -> None:
    found = antibody_regions(DOMAIN)
    assert found is not None and len(found) == len(DOMAIN)
    assert list(dict.fromkeys(found)) == list(REGIONS)
    loops = ["".join(r for r, name in zip(DOMAIN, found, strict=True) if name == f"CDR{i}") for i in (1, 2, 3)]
    assert loops == ["GFTFDDYAMH", "AITWNSGHIDYADSVEG", "VSYLSTASSLDY"]
    assert antibody_regions("QVQL") is None


@pytest.mark.parametrize("given", ["CDR1,CDR3", "cdr3, cdr1", ["CDR1", "CDR3"]])
def test_loops_to_write_in_a_given_framework(tmp_path: Path, given: str | list[str]) -> None:
    path = _file(tmp_path, "a.csv", f"name,heavy\nlong,{DOMAIN}\nshort,{DOMAIN[:60]}\n")
    data = Antibodies(str(path), regions=given, test_share=0)
    examples = data.splits()["train"]
    found = antibody_regions(DOMAIN) or []
    wanted = torch.tensor([[region in ("CDR1", "CDR3") for region in found]])
    assert torch.equal(examples.batch.latent, wanted) and torch.equal(examples.batch.given, ~wanted)
    assert examples.texts(examples.batch.tokens) == [DOMAIN]  # whole domains are read and compared
    changed = torch.where(wanted, 4, examples.batch.tokens)
    assert not data.grade(examples.texts(changed), examples.references or []).any()
    assert data.report.count("its regions cannot be told") == 1
    whole = Antibodies(str(path), test_share=0).splits()["train"]
    assert whole.batch.latent.sum(-1).tolist() == [len(DOMAIN), 60]


def test_loops_in_the_frame_of_a_masked_model(tmp_path: Path, protein_bert: Path) -> None:
    path = _file(tmp_path, "a.csv", f"name,heavy\nlong,{DOMAIN}\n")
    examples = Antibodies(str(path), regions="CDR3", test_share=0).splits(load_tokenizer(protein_bert))["train"]
    found = antibody_regions(DOMAIN) or []
    assert examples.batch.latent[0].tolist() == [False, *(region == "CDR3" for region in found), False]
    assert examples.texts(examples.batch.tokens) == [" ".join(DOMAIN)]


def test_unknown_regions() -> None:
    for given in ("CDR4", "CDR1,,CDR2", "", []):
        with pytest.raises(UserError, match=r"^regions: "):
            Antibodies("a.csv", regions=given)


@pytest.mark.skipif(not REAL.is_file(), reason="the antibody file is not beside the project")
def test_real_antibodies() -> None:
    data = Antibodies(str(REAL))
    splits = data.splits()
    assert data.report.read == {"heavy.csv": 400}
    assert len(splits["train"]) + len(splits["test"]) == 400
    assert not data.report.rejected
    assert "Abagovomab" in ((splits["train"].names or [""])[0], (splits["test"].names or [""])[0])
    assert not set(splits["train"].references or []) & set(splits["test"].references or [])
    loops = Antibodies(str(REAL), regions="CDR1,CDR2,CDR3").splits()
    share = loops["test"].batch.latent.sum() / loops["test"].batch.attention_mask.sum()
    assert 0.2 < share < 0.4
    assert len(loops["train"]) + len(loops["test"]) > 360
