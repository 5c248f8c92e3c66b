"""Whatever stands in a config, a data file, a run folder or a shared order: success, or one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from orderppl import UserError, fit, load_order, load_run
from orderppl.cli.main import main
from orderppl.data import Chains, Fasta, JsonLines
from orderppl.files import file_digest
from orderppl.guides import PolicyGuide
from orderppl.models import PositionTable, UnmaskingModel
from orderppl.models.denoisers import MarkovChainDenoiser
from orderppl.policies import Plan, RandomSteps
from orderppl.runs import CONFIG, INFO, WEIGHTS
from orderppl.sharing import share_run

FUZZ = settings(
    max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
TEXTS = ["", "[", "\0", "\ud800", "../..", "a" * 5000]
HOSTILE = st.sampled_from([None, True, -1, 0, 2**32, 2**64, 10**30, 1e300, float("nan"), float("inf"), *TEXTS])
PLAIN = HOSTILE | st.integers() | st.floats() | st.text(max_size=12)


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)


VALUES = st.recursive(PLAIN, nested)
DEEP = b"[" * 20_000


def ends_well(action: Callable[[], object]) -> None:
    """No other exception than one line of a `UserError`."""
    said = ""
    try:
        action()
    except UserError as error:
        said = str(error).strip()
    assert "\n" not in said


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values of nested dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path] * bool(path) + [found for key, value in items for found in leaves(value, (*path, key))]


def replaced(tree: Any, place: int, value: Any) -> Any:
    """One of the values by another."""
    tree = json.loads(json.dumps(tree))
    paths = leaves(tree)
    *way, last = paths[place % len(paths)]
    inner = tree
    for key in way:
        inner = inner[key]
    inner[last] = value
    return tree


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run and the order that was shared of it."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("fuzz")
    denoiser = MarkovChainDenoiser(4, 0.85, 6)
    pair = (UnmaskingModel(denoiser, RandomSteps(), 3), PolicyGuide(Plan(PositionTable(6, 3)), denoiser, 3))
    data = Chains(length=6, train=16, validation=8, test=8)
    fit(*pair, data, out=root / "run", updates=1, batch_size=8, progress=False)
    share_run(load_run(root / "run"), root / "order")
    return {"run": root / "run", "order": root / "order"}


def damaged(source: Path, target: Path, name: str, content: bytes, signs: bool = True) -> Path:
    """A copy whose file has other contents, with or without a digest that agrees."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    (target / name).write_bytes(content)
    if signs and name != INFO:
        info = json.loads((target / INFO).read_text())
        info["digests"][name] = file_digest(target / name)
        (target / INFO).write_text(json.dumps(info))
    return target


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["run", "order"])
@FUZZ
@given(name=st.sampled_from([CONFIG, INFO]), place=st.integers(0, 500), value=VALUES)
def test_values_of_run_folders(
    folders: dict[str, Path], tmp_path: Path, kind: str, name: str, place: int, value: Any
) -> None:
    """A file of a run with another value somewhere: what was written for it is right, so that it is read."""
    tree = yaml.safe_load((folders[kind] / name).read_text())
    tree = replaced(tree, place, value)
    content = (json.dumps(tree) if name == INFO else yaml.safe_dump(tree)).encode("utf-8", "surrogatepass")
    copy = damaged(folders[kind], tmp_path / "copy", name, content)
    ends_well(lambda: (load_run if kind == "run" else load_order)(copy))


@pytest.mark.slow
@FUZZ
@given(
    kind=st.sampled_from(["run", "order"]),
    name=st.sampled_from([CONFIG, INFO, WEIGHTS]),
    content=st.binary(max_size=60),
    keep=st.integers(0, 3000),
)
@example(kind="run", name=INFO, content=DEEP, keep=0)
@example(kind="order", name=CONFIG, content=DEEP, keep=0)
def test_bytes_of_run_folders(
    folders: dict[str, Path], tmp_path: Path, kind: str, name: str, content: bytes, keep: int
) -> None:
    """A file of a run that is cut, and goes on with something else."""
    whole = (folders[kind] / name).read_bytes()[:keep]
    ends_well(lambda: load_run(damaged(folders[kind], tmp_path / "copy", name, whole + content)))


@pytest.mark.slow
@FUZZ
@given(rows=st.lists(st.binary(max_size=40) | VALUES.map(lambda v: json.dumps(v).encode()), max_size=5), key=PLAIN)
@example(rows=[DEEP], key="prompt")
@example(rows=[b'{"prompt": ' + b"9" * 5000 + b"}"], key="prompt")
@example(rows=[b'{"prompt": "\\ud800", "response": "x"}'], key="prompt")
@example(rows=[b'{"\\n":null,"":null}'], key=None)  # found: a field whose name is a line break
def test_data_files(tmp_path: Path, rows: list[bytes], key: Any) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\n".join([*rows, json.dumps({"prompt": key, "response": key}).encode()]))
    ends_well(lambda: JsonLines(str(path)).splits())
    ends_well(lambda: Fasta(str(path)).splits())


@pytest.mark.slow
@settings(FUZZ, max_examples=300)
@given(place=st.integers(0, 500), value=VALUES, tail=st.binary(max_size=20))
@example(place=0, value=None, tail=DEEP)
def test_configs(
    folders: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], place: int, value: Any, tail: bytes
) -> None:
    """The config of a run with another value, printed by the command."""
    assert main(["fit-order", "--config", "chain", "--print_config"]) == 0
    tree = yaml.safe_load(capfd.readouterr().out)
    text = yaml.safe_dump(replaced(tree, place, value)).encode("utf-8", "surrogatepass")
    (tmp_path / "config.yaml").write_bytes(text + tail)
    status = main(["fit-order", "--config", str(tmp_path / "config.yaml"), "--print_config"])
    said = capfd.readouterr().err.strip()
    assert status == 0 or (status == 2 and said.startswith("error: ") and len(said.splitlines()) == 1), said
