from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from orderppl.errors import UserError
from orderppl.experiments.config import RunConfig
from orderppl.experiments.results import environment, read_results, results_table, write_results


@dataclass(frozen=True)
class Settings(RunConfig):
    steps: tuple[int, ...] = (2, 4)


RECORDS = [
    {"metric": "path_nats", "value": torch.tensor(0.5), "arm": "learned", "steps": 4, "low": 0.4, "high": 0.625},
    {"metric": "path_nats", "value": np.float32(1.25), "arm": "random", "steps": 4},
    {"metric": "nfe", "value": 4, "arm": "learned", "steps": 4, "seed": None},
    {"metric": "nfe", "value": np.int64(3), "arm": "learned", "steps": 4},
]


def test_results_hold_config_environment_and_plain_records(tmp_path: Path) -> None:
    write_results(tmp_path, "demo", Settings(seed=3), RECORDS, seconds=1.23456)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    document = read_results(tmp_path)
    assert document["experiment"] == "demo"
    assert document["seconds"] == 1.235
    assert document["config"] == {"seed": 3, "device": "cpu", "dtype": "float32", "steps": [2, 4]}
    assert document["environment"]["torch"] == torch.__version__
    wanted = {"python", "torch", "pyro", "orderppl", "device", "device_name", "dtype", "cores", "threads"}
    assert wanted <= document["environment"].keys()
    assert [record["value"] for record in document["records"]] == [0.5, 1.25, 4, 3]
    assert document["records"][0]["low"] == 0.4


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"value": 1.0}, "records[1].metric"),
        ({"metric": "elbo"}, "records[1].value"),
        ({"metric": "elbo", "value": float("nan")}, "records[1].value"),
        ({"metric": "elbo", "value": torch.tensor(torch.inf)}, "records[1].value"),
        ({"metric": "elbo", "value": True}, "records[1].value"),
        ({"metric": "elbo", "value": "1.0"}, "records[1].value"),
        ({"metric": "elbo", "value": 1.0, "steps": [1, 2]}, "records[1].steps"),
        ({"metric": "elbo", "value": 1.0, "low": float("nan")}, "records[1].low"),
    ],
)
def test_a_bad_record_is_named_and_nothing_is_written(tmp_path: Path, record: dict[str, object], field: str) -> None:
    with pytest.raises(UserError) as error:
        write_results(tmp_path, "demo", Settings(), [RECORDS[0], record], seconds=0.0)
    assert error.value.field == field
    assert list(tmp_path.iterdir()) == []


def test_results_are_strict_json(tmp_path: Path) -> None:
    path = write_results(tmp_path, "demo", Settings(), RECORDS, seconds=0.0)
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_environment_names_the_dtype_without_torch() -> None:
    assert environment("cpu", torch.bfloat16)["dtype"] == "bfloat16"


def test_the_table_pivots_records() -> None:
    screen = Console(file=io.StringIO(), width=100)
    screen.print(results_table(RECORDS, rows=("arm",), columns=("metric", "steps"), title="demo"))
    assert isinstance(screen.file, io.StringIO)
    text = screen.file.getvalue()
    learned = next(line for line in text.splitlines() if "learned" in line)
    assert "path_nats 4" in text
    assert "0.500 [0.400, 0.625]" in learned
    assert "3.500 (3.000-4.000, 2)" in learned
    assert "1.250" in next(line for line in text.splitlines() if "random" in line)
