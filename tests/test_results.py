"""docs/results: every folder has records that load, a README that says what they say, and denoisers that decode."""

import re
import shutil
from pathlib import Path

import matplotlib
import pictures
import pytest
import tables
import torch

from orderppl import evaluate
from orderppl.data import Arithmetic, Gsm8k, Sudoku
from orderppl.evaluation import Arm, summary
from orderppl.evaluation.results import read_results
from orderppl.models.denoisers import load_denoiser
from orderppl.policies import Ranked, Threshold
from orderppl.runs import load_run

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
FOLDERS = sorted(path for path in RESULTS.iterdir() if path.is_dir())
DENOISERS = [path for path in FOLDERS if (path / "denoiser").is_dir()]
LARGEST = 15 * 2**20  # bytes, all together
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
PICTURE = re.compile(r"!\[[^\]]{10,}\]\(([^)]+)\)")
WRITTEN = re.compile(r">([^<>]+)</text>")
COMMAND = re.compile(r"```sh\n[^`]*(python experiments/|orderppl |make quickstart)")
LARGEST_PICTURE = 70_000  # bytes
LINK = re.compile(r"\]\(([^)#]+)\)")


def numbers_of(folder: Path) -> list[float]:
    """Every number in the records."""
    records = [record for path in folder.rglob("results.json") for record in read_results(path.parent)["records"]]
    found = [value for record in records for value in record.values()]
    return [float(value) for value in found if isinstance(value, (int, float)) and not isinstance(value, bool)]


def table_lines(folder: Path) -> list[str]:
    """The lines of tables in a README."""
    return [line for line in (folder / "README.md").read_text("utf-8").splitlines() if line.startswith("|")]


def test_all_of_it_is_small() -> None:
    assert sum(path.stat().st_size for path in RESULTS.rglob("*") if path.is_file()) < LARGEST


def test_there_is_nothing_but_readmes_records_pictures_and_denoisers() -> None:
    known = ("README.md", "results.json", "denoiser/config.yaml", "denoiser/run.json", "denoiser/weights.safetensors")
    for folder in FOLDERS:
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert (folder / "README.md").is_file(), folder
        others = [path for path in files if not str(path.relative_to(folder)).endswith(known)]
        assert [path.name for path in others] == ["picture.svg"], f"python experiments/pictures.py --folder {folder}"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_tables_of_a_readme_are_those_of_the_records(folder: Path) -> None:
    shown, text = table_lines(folder), tables.tables(folder)
    assert shown and shown == [line for line in text.splitlines() if line.startswith("|")], (
        f"python experiments/tables.py {folder.relative_to(ROOT)} --write true"
    )


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_numbers_of_a_table_are_in_the_records(folder: Path) -> None:
    """Read independently of how the tables are made: single values, not means over seeds."""
    known = numbers_of(folder)
    cells = [cell for line in table_lines(folder)[2:] for cell in line.strip("|").split("|")]
    values = [cell for cell in cells if re.fullmatch(r"\s*-?\d+\.\d{3}( \[-?\d+\.\d{3}, -?\d+\.\d{3}\])?\s*", cell)]
    assert values
    for text in {number for cell in values for number in NUMBER.findall(cell)}:
        assert any(abs(value - float(text)) <= 5.1e-4 for value in known), text


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_readme_shows_its_picture_and_a_command_and_its_links_are_there(folder: Path) -> None:
    text = (folder / "README.md").read_text("utf-8")
    links = LINK.findall(text)
    assert all((folder / link).is_file() for link in links), links
    assert PICTURE.findall(text) == ["picture.svg"]
    assert COMMAND.search(text)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_picture_is_what_its_command_draws(folder: Path, tmp_path: Path) -> None:
    """To the last byte with the matplotlib that drew it; with another one by all that is written in it."""
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("denoiser"))
    pictures.main(copy)
    kept, drawn = ((place / "picture.svg").read_text("utf-8") for place in (folder, copy))
    assert sorted(WRITTEN.findall(kept)) == sorted(WRITTEN.findall(drawn)), "python experiments/pictures.py"
    if f"Matplotlib v{matplotlib.__version__}," in kept:
        assert kept == drawn, "python experiments/pictures.py"
    assert "prefers-color-scheme: dark" in kept and len(kept) < LARGEST_PICTURE


@pytest.mark.parametrize("folder", DENOISERS, ids=lambda folder: folder.name)
def test_a_denoiser_loads_frozen(folder: Path) -> None:
    denoiser = load_denoiser(folder / "denoiser")
    assert not denoiser.training and not any(parameter.requires_grad for parameter in denoiser.parameters())
    assert load_run(folder / "denoiser").kind == "denoiser" and denoiser.tokenizer is not None
    state = torch.full((2, 8), denoiser.mask_index)
    assert bool(denoiser(state, torch.ones_like(state, dtype=torch.bool)).isfinite().all())


def check(name: str, data: Arithmetic | Gsm8k | Sudoku, rows: int | None, arms: list[Arm], metrics: list[str]) -> None:
    """Play arms again, on all the rows that the records are of."""
    denoiser = load_denoiser(RESULTS / name / "denoiser")
    test = data.splits(denoiser.tokenizer)["test"]
    table = evaluate(arms, denoiser, test if rows is None else test.take(rows), metrics=metrics, batch_size=512)
    records = {(r["arm"], r["metric"]): r for r in read_results(RESULTS / name)["records"] if "arm" in r}
    for found in summary(table, metrics, resamples=0).to_dict("records"):
        recorded = records[found["arm"], found["metric"]]
        assert recorded["n"] == found["n"]
        assert found["value"] == pytest.approx(recorded["value"], abs=2e-6)
        assert found["nfe"] == pytest.approx(recorded["nfe"], abs=2e-5)


def test_sudoku_is_as_recorded() -> None:
    arms = [Arm("threshold tau=0.6", Threshold(0.6)), Arm("top_prob uniform T=2", Ranked("top_prob"), 2)]
    check("sudoku", Sudoku(train=4000, min_clues=2, max_clues=4), 500, arms, ["accuracy", "path_nats"])


@pytest.mark.skipif(not GSM8K.is_dir(), reason="no GSM8K in ../shared/data")
def test_programs_are_as_recorded() -> None:
    data = Gsm8k(str(GSM8K), validation_share=0.1, max_prompt=41, max_length=56)
    arms = [Arm("threshold tau=0.9", Threshold(0.9)), Arm("random uniform T=2", Ranked("random"), 2)]
    check("frontier-programs", data, None, arms, ["accuracy"])


@pytest.mark.slow
def test_modular_arithmetic_is_as_recorded() -> None:
    data = Arithmetic("mod20", train=40_000, validation=2000, test=4000)
    check("frontier-mod20", data, 1500, [Arm("threshold tau=0.6", Threshold(0.6))], ["accuracy"])
