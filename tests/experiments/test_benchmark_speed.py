from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from orderppl.errors import UserError
from orderppl.experiments import benchmark_speed, cli
from orderppl.experiments.config import load_config
from orderppl.experiments.results import read_results

QUICK = load_config(benchmark_speed.Config, "speed_quick")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """Of a quick run as from the command line."""
    out = tmp_path_factory.mktemp("speed")
    cli.run_experiment("benchmark speed", sys.modules[benchmark_speed.__name__], QUICK, out)
    assert (out / "speed.png").stat().st_size > 0
    return read_results(out)["records"]


def chosen(records: list[dict[str, object]], metric: str, **labels: object) -> list[dict[str, object]]:
    return [r for r in records if r["metric"] == metric and all(r.get(k) == v for k, v in labels.items())]


def test_every_pair_is_measured(records: list[dict[str, object]]) -> None:
    ratios = chosen(records, "time_ratio", axis="steps")
    found = {(r["mode"], r["denoiser"], r["steps"]) for r in ratios}
    assert found == {(m, d, t) for m in benchmark_speed.MODES for d in ("0.6M", "10M") for t in QUICK.steps}
    assert all(0 < r["low"] <= r["value"] <= r["high"] and r["device"] == "cpu" for r in ratios)
    for metric in ("cpu_time_ratio", "memory_ratio"):
        assert len(chosen(records, metric, axis="steps")) == len(ratios)
    for metric in ("seconds_per_update", "cpu_seconds_per_update", "peak_megabytes", "denoiser_rows", "host_share"):
        values = [r["value"] for r in chosen(records, metric, axis="steps")]
        assert len(values) == 2 * len(ratios)
        assert min(values) > 0
    trained = chosen(records, "time_ratio", axis="trainable")
    assert {(r["mode"], r["denoiser"]) for r in trained} == {
        (m, d) for m in benchmark_speed.MODES for d in ("0.6M", "10M")
    }
    assert {r["trainable"] for r in trained} == {True}
    assert len(chosen(records, "time_ratio", precision="bfloat16")) == 1
    assert chosen(records, "compile_available")[0]["value"] == 1  # the quick run compiles without code generation
    assert {r["axis"] for r in chosen(records, "time_slope")} == {"steps", "length", "particles"}


def test_one_comparison_can_be_chosen() -> None:
    chosen_axes = dataclasses.replace(QUICK, axes=("trainable", "length"))
    assert {case.axis for case in benchmark_speed.plan(chosen_axes)} == {"trainable", "length"}


def test_rows_through_the_denoiser(records: list[dict[str, object]]) -> None:
    """The same for library and twin; one per particle in a one-step program, whatever T."""
    for record in chosen(records, "denoiser_rows", axis="steps"):
        particles, steps = int(str(record["particles"])), int(str(record["steps"]))
        wanted = particles if record["mode"] == "one_step" else 1 + (steps - 1) * particles
        assert record["value"] == wanted


def test_a_failing_compiler_is_reported() -> None:
    """The reason is kept; everything else is measured."""

    def broken(graph: object, inputs: object) -> object:
        raise RuntimeError("no compiler here\nsecond line")

    config = dataclasses.replace(QUICK, compile_backend=broken)
    case = next(case for case in benchmark_speed.plan(config) if case.compiled)
    records = benchmark_speed.measure_or_report(config, case, torch.device("cpu"))
    assert [(r["metric"], r["value"]) for r in records] == [("compile_available", 0)]
    assert "no compiler here" in str(records[0]["reason"])
    assert "\n" not in str(records[0]["reason"])


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def one_after_another() -> None:
        for _ in range(3):
            torch.empty(1000, 1000).zero_()

    def together() -> None:
        torch.cat([torch.zeros(1000, 1000) for _ in range(3)])

    size = 4 * 1000 * 1000
    cpu = torch.device("cpu")
    assert benchmark_speed.peak_bytes(one_after_another, cpu) == pytest.approx(size, rel=0.01)
    assert benchmark_speed.peak_bytes(together, cpu) == pytest.approx(6 * size, rel=0.01)


def test_interval_of_a_median() -> None:
    """Of 15 values the 4th and the 12th: P(Bin(15, 1/2) <= 3) = 0.018; of few values all."""
    assert benchmark_speed.median_interval(list(range(1, 16))) == (4, 12)
    assert benchmark_speed.median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert benchmark_speed.median_interval([2.0]) == (2.0, 2.0)


def test_growth_is_the_slope_in_logarithms() -> None:
    labels = {"mode": "stacked", "denoiser": "0.6M", "variant": "library", "axis": "steps"}
    records = [{"metric": "seconds_per_update", "value": 0.1 * t**1.5, "steps": t, **labels} for t in (2, 4, 8)]
    (slope,) = benchmark_speed.growth(records)
    assert slope["metric"] == "time_slope"
    assert slope["value"] == pytest.approx(1.5)


def test_one_budget_has_no_growth(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least two"):
        benchmark_speed.run(dataclasses.replace(QUICK, steps=(2,)), tmp_path)
