"""Records on disk and on the screen."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console

from orderppl.errors import UserError
from orderppl.evaluation import advantages, summary
from orderppl.evaluation.results import environment, plain_records, read_results, results_table, write_results

from measured_rows import arm, together

CONFIG = {"seed": 3, "device": "cpu", "dtype": "float32", "steps": [2, 4]}
RECORDS: list[dict[str, Any]] = [
    {"metric": "path_nats", "value": torch.tensor(0.5), "arm": "learned", "steps": 4, "low": 0.4, "high": 0.625},
    {"metric": "path_nats", "value": np.float32(1.25), "arm": "random", "steps": 4},
    {"metric": "nfe", "value": 4, "arm": "learned", "steps": 4, "seed": None},
    {"metric": "nfe", "value": np.int64(3), "arm": "learned", "steps": 4},
]


def test_results_hold_config_environment_and_plain_records(tmp_path: Path) -> None:
    write_results(tmp_path, "demo", CONFIG, RECORDS, seconds=1.23456)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    document = read_results(tmp_path)
    assert document["experiment"] == "demo"
    assert document["seconds"] == 1.235
    assert document["config"] == CONFIG
    assert document["environment"]["torch"] == torch.__version__
    wanted = {"python", "torch", "pyro", "orderppl", "device", "device_name", "dtype", "cores", "threads"}
    assert wanted <= document["environment"].keys()
    assert [record["value"] for record in document["records"]] == [0.5, 1.25, 4, 3]
    assert document["records"][0]["low"] == 0.4


def test_a_data_frame_is_written_without_its_empty_cells(tmp_path: Path) -> None:
    table = together(
        arm("h", correct=[1, 0, 1, 1], nats=1.0, nfe=2), arm("l", correct=1, nats=0.5, nfe=2, training_seed=0)
    )
    frames = [summary(table), advantages(table, [2.0])]
    write_results(tmp_path, "demo", {}, [record for frame in frames for record in plain_records(frame)])
    records = read_results(tmp_path)["records"]
    heads = [record for record in records if record["metric"] == "accuracy"]
    assert [record["value"] for record in heads] == [0.75, 1.0]
    assert "training_seed" not in heads[0] and heads[1]["training_seed"] == 0 and heads[1]["steps"] == 4
    gain = next(r for r in records if r["metric"] == "advantage" and r["measured"] == "accuracy" and "target_nfe" in r)
    assert gain["value"] == 0.25 and "setting" not in gain
    write_results(tmp_path, "demo", {}, frames[0])
    assert read_results(tmp_path)["records"] == plain_records(frames[0])


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
        write_results(tmp_path, "demo", {}, [RECORDS[0], record], seconds=0.0)
    assert error.value.field == field
    assert list(tmp_path.iterdir()) == []


def test_results_are_strict_json(tmp_path: Path) -> None:
    path = write_results(tmp_path, "demo", CONFIG, RECORDS, seconds=0.0)
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize("text", [None, "{", "[]", '{"records": 3}', "[" * 100_000, "\xff"])
def test_what_is_no_result_is_named(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "results.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"results\.json"):
        read_results(tmp_path)


def test_environment_names_the_dtype_without_torch() -> None:
    assert environment("cpu", torch.bfloat16)["dtype"] == "bfloat16"


def test_the_table_pivots_records() -> None:
    def shown(records: Any) -> str:
        screen = Console(file=io.StringIO(), width=100)
        screen.print(results_table(records, rows=("arm",), columns=("metric", "steps"), title="demo"))
        assert isinstance(screen.file, io.StringIO)
        return screen.file.getvalue()

    text = shown(RECORDS)
    learned = next(line for line in text.splitlines() if "learned" in line)
    assert "path_nats 4" in text
    assert "0.500 [0.400, 0.625]" in learned
    assert "3.500 (3.000-4.000, 2)" in learned
    assert "1.250" in next(line for line in text.splitlines() if "random" in line)
    assert shown(pd.DataFrame(plain_records(RECORDS))) == text


def test_a_table_of_many_columns_fits_80_and_loses_no_letter() -> None:
    names = ("leave-one-out", "log_likelihood", "importance_weighted", "effective_particles", "path_nats", "stock")
    records = [
        {"metric": "value", "value": 0.5, "low": 0.25, "high": 0.75, "task": "antibodies", "arm": name}
        for name in names
    ]
    console = Console(width=80, file=io.StringIO())
    console.print(results_table(records, rows=("task",), columns=("arm",)))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in console.file.getvalue()
    heads = [line.split("┃")[1:-1] for line in lines if line.startswith("┃")]
    whole = ["".join(part.strip() for part in column) for column in zip(*heads, strict=True)]
    assert set(names) <= set(whole)
