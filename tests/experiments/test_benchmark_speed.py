from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from orderppl.errors import UserError
from orderppl.experiments import benchmark_speed, cli
from orderppl.experiments.config import load_config
from orderppl.experiments.results import read_results
from orderppl.experiments.update_parts import PARTS, Clock, gradient_bytes, saved_bytes
from orderppl.models.denoisers import SmdmConfig, SmdmDenoiser

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


def test_a_large_denoiser(records: list[dict[str, object]]) -> None:
    """A frozen one leaves no activations and no gradients; a trained one, of the same records, does both."""
    settings = QUICK.smdm
    weights = {"stacked": 1 + settings.particles, "policy": 1 + settings.particles}  # rows per sequence at T = 2
    for mode in settings.modes:

        def value(metric: str, mode: str = mode, **labels: object) -> float:
            (record,) = chosen(records, metric, axis="smdm", mode=mode, **labels)
            return float(str(record["value"]))

        assert value("denoiser_rows") == weights[mode]
        assert value("saved_megabytes", variant="frozen") == value("gradient_megabytes", variant="frozen") == 0
        assert value("saved_megabytes", variant="trained") > 0
        assert value("gradient_megabytes", variant="trained") == value("parameters") * 4 / 2**20
        assert value("peak_megabytes", variant="trained") > value("peak_megabytes", variant="frozen") > 0
        assert 0 < value("used_share") < 1.5
        shares = {str(r["part"]): float(str(r["value"])) for r in chosen(records, "part_share", mode=mode)}
        assert set(shares) == set(PARTS)
        assert sum(shares.values()) == pytest.approx(1)
        assert min(shares.values()) > 0


def test_operations_of_a_forward() -> None:
    """By hand: one block of width 4 with 3 x 4 x 8 gated weights, a head of 5 classes, on 6 tokens."""
    config = SmdmConfig(1, 2, 4, 8, 5)
    weights = 4 * 4 * 4 + 3 * 4 * 8 + 5 * 4
    products = 2 * (6 * 6 * 4)  # queries with keys, and their mixture of values: 2 operations each
    assert benchmark_speed.forward_gflop(config, 6) == pytest.approx((2 * weights * 6 + 2 * products) / 1e9)
    parameters = sum(p.numel() for p in SmdmDenoiser(config).parameters() if p.ndim == 2)
    assert parameters == weights + 6 * 4  # and the embeddings, which cost nothing


def test_a_clock_books_inner_parts_once() -> None:
    clock = Clock(torch.device("cpu"))
    inner, outer = nn.Linear(2, 2), nn.Sequential(nn.Identity())
    with clock.inside(inner, "denoiser"), clock.inside(outer, "network"):
        begin = time.perf_counter()
        with clock.part("rest"):
            time.sleep(0.02)
            inner(torch.zeros(1, 2))
            outer(torch.zeros(1))
            outer[0](torch.zeros(1))  # called without what it stands in
        passed = time.perf_counter() - begin
    assert sum(clock.seconds.values()) == pytest.approx(passed, rel=0.05)
    assert clock.seconds["rest"] >= 0.02
    assert min(clock.seconds["denoiser"], clock.seconds["network"]) > 0


def test_what_is_kept_of_a_denoiser() -> None:
    """Of a layer with a trained weight its input is kept, and of the loss around it nothing is counted."""
    layer = nn.Linear(3, 2, bias=False)
    x = torch.ones(5, 3)

    def loss() -> Tensor:
        return layer(x).exp().sum()

    assert saved_bytes(layer, loss) == 5 * 3 * 4
    assert gradient_bytes(layer, loss) == 2 * 3 * 4
    layer.requires_grad_(False)
    assert saved_bytes(layer, loss) == 0
