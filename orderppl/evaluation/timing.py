"""Wall-clock time of things that take turns, so that other work on the machine disturbs all of them alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


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

    wall: dict[Any, list[float]] = field(default_factory=dict)
    cpu: dict[Any, list[float]] = field(default_factory=dict)

    def ratios(self, over: str, under: str, name: str = "time_ratio", **labels: object) -> list[dict[str, object]]:
        """Median over the rounds of one variant's time over another's, with a 95% interval of that median."""
        records: list[dict[str, object]] = []
        for metric, seconds in ((name, self.wall), (f"cpu_{name}", self.cpu)):
            paired = [first / second for first, second in zip(seconds[over], seconds[under], strict=True)]
            records.append({"metric": metric, **median(paired), "of": under, **labels})
        return records

    def seconds(self, **labels: object) -> list[dict[str, object]]:
        """Median seconds of every variant."""
        named = (("seconds", self.wall), ("cpu_seconds", self.cpu))
        return [
            {"metric": metric, **median(values), "variant": variant, **labels}
            for metric, by_variant in named
            for variant, values in by_variant.items()
        ]


def take_turns(variants: Mapping[Any, Callable[[], object]], rounds: Rounds, device: torch.device) -> Timing:
    """Time warm variants one after another, round by round, each round in the other order."""
    timing = Timing({name: [] for name in variants}, {name: [] for name in variants})
    begin = time.perf_counter()
    for index in range(rounds.most):
        for name in list(variants)[:: 1 if index % 2 == 0 else -1]:
            wait(device)
            wall, cpu = time.perf_counter(), time.process_time()
            variants[name]()
            wait(device)
            timing.wall[name].append(time.perf_counter() - wall)
            timing.cpu[name].append(time.process_time() - cpu)
        if index + 1 >= rounds.least and time.perf_counter() - begin > rounds.seconds:
            break
    return timing


def wait(device: torch.device) -> None:
    """Until a device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median(values: Sequence[float]) -> dict[str, float]:
    """`value`, with its interval `low` to `high`, to six digits: no clock tells more."""
    low, high = median_interval(values)
    found = {"value": statistics.median(values), "low": low, "high": high}
    return {name: float(f"{value:.6g}") for name, value in found.items()}


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Order statistics that hold the median with this probability, or all values where they are too few."""
    ordered, n, below, rank = sorted(values), len(values), 0.0, 0
    for candidate in range(n // 2):
        below += math.comb(n, candidate) / 2**n  # P(at most this many values below the median)
        if below > (1 - level) / 2:
            break
        rank = candidate
    return ordered[rank], ordered[n - 1 - rank]
