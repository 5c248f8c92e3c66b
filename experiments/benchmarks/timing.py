"""What the benchmarks share: variants that take turns, peak memory, records and how they are shown."""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from rich.console import Console
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from orderppl import Batch
from orderppl.errors import UserError
from orderppl.evaluation.results import results_table, write_results

Records = list[dict[str, object]]


def command(main: Callable[..., Any]) -> None:
    """Run a benchmark by the arguments of the command line, on one thread; bad input is one line."""
    torch.set_num_threads(1)
    try:
        auto_cli(main, as_positional=False, description=(main.__doc__ or "").partition("Args:")[0])
    except UserError as error:
        sys.exit(f"error: {error}")


@dataclass(frozen=True)
class Rounds:
    """How long variants take turns.

    Args:
        most: rounds.
        least: rounds, however long they take.
        seconds: after which no further round begins.
    """

    most: int = 15
    least: int = 3
    seconds: float = 5.0


@dataclass
class Timing:
    """Seconds of every round, by variant: by the clock, and of this process's CPU."""

    wall: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)

    def ratios(self, over: str, under: str, name: str = "time_ratio", **labels: object) -> Records:
        """Median over the rounds of one variant's time over another's, with a 95% interval of that median."""
        records: Records = []
        for metric, seconds in ((name, self.wall), (f"cpu_{name}", self.cpu)):
            paired = [first / second for first, second in zip(seconds[over], seconds[under], strict=True)]
            records.append({"metric": metric, **_median(paired), "of": under, **labels})
        return records

    def seconds(self, **labels: object) -> Records:
        """Median seconds of every variant."""
        named = (("seconds", self.wall), ("cpu_seconds", self.cpu))
        return [
            {"metric": metric, **_median(values), "variant": variant, **labels}
            for metric, by_variant in named
            for variant, values in by_variant.items()
        ]


def take_turns(variants: Mapping[str, Callable[[], object]], rounds: Rounds, device: torch.device) -> Timing:
    """Time warm variants one after another, round by round, each round in the other order."""
    timing = Timing({name: [] for name in variants}, {name: [] for name in variants})
    begin = time.perf_counter()
    for index in range(rounds.most):
        for name in list(variants)[:: 1 if index % 2 == 0 else -1]:
            _wait(device)
            wall, cpu = time.perf_counter(), time.process_time()
            variants[name]()
            _wait(device)
            timing.wall[name].append(time.perf_counter() - wall)
            timing.cpu[name].append(time.process_time() - cpu)
        if index + 1 >= rounds.least and time.perf_counter() - begin > rounds.seconds:
            break
    return timing


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _median(values: Sequence[float]) -> dict[str, float]:
    low, high = median_interval(values)
    return {"value": statistics.median(values), "low": low, "high": high}


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Order statistics that hold the median with this probability, or all values where they are too few."""
    ordered, n, below, rank = sorted(values), len(values), 0.0, 0
    for candidate in range(n // 2):
        below += math.comb(n, candidate) / 2**n  # P(at most this many values below the median)
        if below > (1 - level) / 2:
            break
        rank = candidate
    return ordered[rank], ordered[n - 1 - rank]


def peak_bytes(update: Callable[[], object], device: torch.device) -> int:
    """Most memory that one update holds at a time, on top of what is held before it, bytes."""
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        update()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        update()
    held = peak = 0
    kineto = profiled.profiler.kineto_results
    events = (event for event in kineto.events() if event.name() == "[memory]")  # every allocation and release
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what torch's profiler says of itself from standard error."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def random_batch(count: int, prompt: int, length: int, vocab_size: int, seed: int) -> Batch:
    """Random tokens: prompts, then responses to reveal, each between half and all of its room; the last id is MASK."""
    generator = torch.Generator().manual_seed(seed)

    def ragged(room: int) -> tuple[Tensor, Tensor]:
        sizes = torch.randint(-(-room // 2), room + 1, (count, 1), generator=generator)
        return torch.randint(vocab_size - 1, (count, room), generator=generator), torch.arange(room) < sizes

    (context, context_mask), (tokens, mask) = ragged(prompt), ragged(length)
    attention = torch.cat([context_mask, mask], 1)
    is_prompt = (torch.arange(prompt + length) < prompt).expand(count, -1)
    batch = Batch(torch.cat([context, tokens], 1), attention, is_prompt & attention)
    assert batch.prefix == prompt  # asked here, before the batch goes to a device
    return batch


def finish(
    out: Path | None, name: str, config: Mapping[str, Any], records: Records, tables: Sequence[Mapping[str, Any]]
) -> None:
    """Print tables and write the records.

    Args:
        out: folder of `results.json`; nothing is written without one.
        name: of the benchmark.
        config: its settings, JSON values.
        records: see `orderppl.evaluation.write_results`.
        tables: one each: `title`, `rows` and `columns` of `results_table`, `metrics`, and further labels it shows only.
    """
    console = Console()
    for table in tables:
        layout = {key: table[key] for key in ("title", "rows", "columns")}
        wanted = {key: value for key, value in table.items() if key not in layout and key != "metrics"}
        shown = [r for r in records if all(r.get(key) == value for key, value in wanted.items())]
        shown = [record for record in shown if record["metric"] in table["metrics"]]
        if shown:
            console.print(results_table(shown, **layout))
    if out is not None:
        console.print(f"{len(records)} records in {write_results(out, name, config, records)}")
