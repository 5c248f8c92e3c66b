"""What a frontier run found: records, tables and the figure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from orderppl.evaluation import Frontier, Point, bootstrap_mean, paired_difference
from orderppl.experiments.results import Record, real
from orderppl.experiments.sweeps import Arm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from orderppl.experiments.frontier import Config

Run = Literal["decoding", "teacher_forced"]
Labels = dict[str, str | int | float]
RUN_OF: dict[str, Run] = {"accuracy": "decoding", "path_nats": "teacher_forced"}  # which run measures a metric
HIGHER = {"accuracy": True, "path_nats": False}


@dataclass
class Measured:
    """All rows of one arm under one seed.

    Attributes:
        columns: float64 [N] each: correct or nats, tokens, canvas, nfe, fallback.
        batch_max: forwards of the slowest row of each batch.
        seconds: wall-clock time of all batches.
    """

    columns: dict[str, Tensor] = field(default_factory=dict)
    batch_max: list[float] = field(default_factory=list)
    seconds: float = 0.0


class Results:
    """The measurements of a comparison, and what follows from them.

    Args:
        config: of the run.
        metrics: what was measured, of accuracy and path_nats.
        labels: put on every record.
        arms: in the order of the table.
        rows: int64 [N], numbers of the rows in their split.
        costs: arm -> labels of what its policy network costs.
    """

    def __init__(
        self,
        config: Config,
        metrics: Sequence[str],
        labels: Labels,
        arms: Sequence[Arm],
        rows: Tensor,
        costs: Mapping[str, Mapping[str, float]],
    ) -> None:
        self.config, self.metrics, self.labels, self.arms = config, metrics, labels, arms
        self.rows, self.costs = len(rows), costs
        self._place = {row: place for place, row in enumerate(rows.tolist())}
        self._measured: dict[tuple[str, Run, float], dict[int, Measured]] = {}
        self._frontiers: dict[str, Frontier | None] = {}

    def add(self, arm: Arm, run: Run, seed: int, temperature: float, piece: Mapping[str, Any]) -> None:
        """Take in a finished piece of work."""
        by_seed = self._measured.setdefault((arm.name, run, temperature), {})
        measured = by_seed.setdefault(seed, Measured())
        places = [self._place[row] for row in piece["rows"]]
        for name in ("correct", "nats", "tokens", "canvas", "nfe", "fallback"):
            if name in piece:
                column = measured.columns.setdefault(name, torch.full((self.rows,), math.nan, dtype=torch.float64))
                column[places] = torch.tensor(piece[name], dtype=torch.float64)
        measured.batch_max.append(max(piece["nfe"]))
        measured.seconds += piece["seconds"]

    # --------------------------------------------------------------------------------------------------------- records

    def records(self) -> list[Record]:
        """Arms, advantages, the frontier itself, and sampled tokens."""
        found: list[Record] = []
        for arm in self.arms:
            found += self._arm_records(arm)
        for metric in self.metrics:
            found += self._frontier_records(metric)
            found += self._advantage_records(metric)
        return [*found, *self._pass_records()]

    def _seeds(self, arm: Arm, metric: str) -> list[Measured]:
        return list(self._measured.get((arm.name, RUN_OF[metric], 0.0), {}).values())

    def _values(self, measured: Measured, metric: str) -> tuple[Tensor, Tensor]:
        """Value and weight of every row: float64 [N] each."""
        if metric == "accuracy":
            return measured.columns["correct"], torch.ones(self.rows, dtype=torch.float64)
        tokens = measured.columns["tokens"]
        return measured.columns["nats"] / tokens.clamp(min=1), tokens

    def point(self, arm: Arm, metric: str) -> Point | None:
        """The arm on every row, the mean over its seeds; None if the metric was not measured."""
        seeds = self._seeds(arm, metric)
        if not seeds:
            return None
        values = torch.stack([self._values(measured, metric)[0] for measured in seeds]).mean(0)
        return Point(arm.name, arm.family, values, torch.stack([m.columns["nfe"] for m in seeds]).mean(0))

    def differences(self, reference: str, others: Iterable[str]) -> Iterable[Record]:
        """Learned arms minus one of them, paired by row; a row's value is the mean over training seeds.

        Args:
            reference: family of the arm to compare with.
            others: families of the others.
        """
        for metric in self.metrics:
            families = {
                family: torch.stack([point.values for curve in curves for _, point in curve]).mean(0)
                for family, curves in self._learned(metric).items()
            }
            first = next(arm for arm in self.arms if self._seeds(arm, metric))
            _, weights = self._values(self._seeds(first, metric)[0], metric)
            options = {"resamples": self.config.resamples, "seed": self.config.seed}
            for family in others:
                if reference in families and family in families and family != reference:
                    gap = paired_difference(families[family], families[reference], weights, **options)
                    head: Record = {"metric": f"{metric}_difference", "value": gap.value, "low": gap.low}
                    yield {
                        **head,
                        "high": gap.high,
                        "arm": family,
                        "baseline": reference,
                        "n": self.rows,
                        **self.labels,
                    }

    def curves(self, metric: str) -> dict[tuple[str, int], list[tuple[float, float]]]:
        """(family, training seed) -> mean NFE and value of its arms, by NFE."""
        found: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for arm in self.arms:
            point = self.point(arm, metric)
            if point is not None:
                _, weights = self._values(self._seeds(arm, metric)[0], metric)
                value = float((weights * point.values).sum() / weights.sum())
                found.setdefault((arm.family, arm.training_seed), []).append((float(point.nfe.mean()), value))
        return {key: sorted(curve) for key, curve in found.items()}

    def frontier(self, metric: str) -> Frontier | None:
        """The best heuristic at every mean NFE; None without heuristics."""
        if metric not in self._frontiers:
            arms = [arm for arm in self.arms if arm.kind == "heuristic" and self._seeds(arm, metric)]
            points = [point for arm in arms if (point := self.point(arm, metric)) is not None]
            self._frontiers[metric] = None
            if points:
                _, weights = self._values(self._seeds(arms[0], metric)[0], metric)
                options = {"resamples": self.config.resamples, "seed": self.config.seed}
                self._frontiers[metric] = Frontier(points, weights, higher_is_better=HIGHER[metric], **options)
        return self._frontiers[metric]

    def _arm_records(self, arm: Arm) -> Iterable[Record]:
        common = {"arm": arm.name, "family": arm.family, "dial": arm.dial, "kind": arm.kind, **arm.labels}
        common |= {"training_seed": arm.training_seed} if arm.kind == "learned" else {}
        common |= {"steps": arm.num_steps, **self.labels}
        measured_cost = None
        for metric in self.metrics:
            seeds, point = self._seeds(arm, metric), self.point(arm, metric)
            if point is None:
                continue
            _, weights = self._values(seeds[0], metric)
            single = [bootstrap_mean(*self._values(measured, metric), resamples=1).value for measured in seeds]
            cost: Labels = {"run": RUN_OF[metric], "temperature": 0.0, "n": self.rows, "seeds": len(seeds)}
            cost |= self._cost(seeds)
            own = self.costs.get(arm.name)
            if own is not None:  # NFE as if the policy's operations were the denoiser's
                cost |= {**own, "nfe_charged": float(cost["nfe"]) * (1 + own["policy_flops_share"])}
            interval = bootstrap_mean(point.values, weights, resamples=self.config.resamples, seed=self.config.seed)
            yield {
                "metric": metric,
                "value": interval.value,
                "low": interval.low,
                "high": interval.high,
                "seed_low": min(single),
                "seed_high": max(single),
                **common,
                **cost,
            }
            if measured_cost is None:
                measured_cost = cost
                forwards = bootstrap_mean(point.nfe, resamples=self.config.resamples, seed=self.config.seed)
                head = {"metric": "nfe", "value": forwards.value, "low": forwards.low, "high": forwards.high}
                yield {**head, **common, **cost}

    def _cost(self, seeds: Sequence[Measured]) -> Labels:
        """What a run cost: NFE of a row, tokens per forward as the ratio of totals, speed last."""
        columns = {
            name: torch.stack([m.columns[name] for m in seeds]) for name in ("nfe", "tokens", "canvas", "fallback")
        }
        nfe = columns["nfe"]  # [seeds, N]
        by_row = nfe.mean(0)
        total = nfe.sum().clamp(min=1)
        return {
            "nfe": float(nfe.mean()),
            "nfe_se": float(by_row.std() / math.sqrt(self.rows)) if self.rows > 1 else 0.0,
            "nfe_min": int(nfe.min()),
            "nfe_max": int(nfe.max()),
            "nfe_batch_max": float(np.mean([value for m in seeds for value in m.batch_max])),
            "tokens_per_forward": float(columns["tokens"].sum() / total),
            "tokens_per_forward_canvas": float(columns["canvas"].sum() / total),
            "fallback": float(columns["fallback"].mean()),
            "seconds_per_row": sum(m.seconds for m in seeds) / (len(seeds) * self.rows),
        }

    def _frontier_records(self, metric: str) -> Iterable[Record]:
        frontier = self.frontier(metric)
        for target in self.config.targets if frontier is not None else ():
            best = frontier.best(target) if frontier is not None else None
            if best is not None:
                head: Record = {"metric": "frontier", "value": best[1], "measured": metric, "of": best[0]}
                yield {**head, "target_nfe": target, "n": self.rows, **self.labels}

    def _advantage_records(self, metric: str) -> Iterable[Record]:
        frontier = self.frontier(metric)
        if frontier is None:
            return
        for family, curves in self._learned(metric).items():
            places: list[tuple[str, float | None, list[list[Point]]]] = []
            for dial in dict.fromkeys(dial for curve in curves for dial, _ in curve):
                own = [[point for at, point in curve if at == dial] for curve in curves]
                if all(len(points) == 1 for points in own):
                    places.append((dial, None, own))
            whole = [[point for _, point in curve] for curve in curves]
            places += [("", target, whole) for target in self.config.targets]
            for dial, target, points in places:
                gain = frontier.advantage(*points, nfe=target)
                if gain is None:
                    continue
                record: dict[str, object] = {
                    "metric": "advantage",
                    "value": gain.value,
                    "low": gain.low,
                    "high": gain.high,
                    "measured": metric,
                    "arm": family,
                    "of": gain.of,
                    "own": gain.own,
                    "frontier": gain.frontier,
                    "nfe": gain.nfe,
                    "training_seeds": len(points),
                    "seed_low": min(gain.by_curve),
                    "seed_high": max(gain.by_curve),
                    "n": self.rows,
                    **self.labels,
                }
                yield record | ({"dial": dial} if target is None else {"target_nfe": target})

    def _learned(self, metric: str) -> dict[str, list[list[tuple[str, Point]]]]:
        """Family -> its curves, one per training seed, of dial values and points."""
        found: dict[str, dict[int, list[tuple[str, Point]]]] = {}
        for arm in self.arms:
            point = self.point(arm, metric) if arm.kind == "learned" else None
            if point is not None:
                found.setdefault(arm.family, {}).setdefault(arm.training_seed, []).append((arm.dial, point))
        return {family: list(curves.values()) for family, curves in found.items()}

    def _pass_records(self) -> Iterable[Record]:
        sampled = self.config.samples
        for arm in self.arms:
            seeds = list(self._measured.get((arm.name, "decoding", sampled.temperature), {}).values())
            if not seeds or not sampled.count:
                continue
            right = torch.stack([measured.columns["correct"] for measured in seeds]).sum(0)  # [N]
            for k in sampled.k:
                if k > len(seeds):
                    continue
                value = pass_at_k(right, len(seeds), k)
                interval = bootstrap_mean(value, resamples=self.config.resamples, seed=self.config.seed)
                yield {
                    "metric": "pass_at_k",
                    "value": interval.value,
                    "low": interval.low,
                    "high": interval.high,
                    "k": k,
                    "samples": len(seeds),
                    "temperature": sampled.temperature,
                    "arm": arm.name,
                    "family": arm.family,
                    "kind": arm.kind,
                    **arm.labels,
                    "steps": arm.num_steps,
                    "n": self.rows,
                    **self.labels,
                    **self._cost(seeds),
                }


def pass_at_k(right: Tensor, samples: int, k: int) -> Tensor:
    """Probability that one of k samples, drawn without replacement from the `samples` made, is right.

    1 - C(samples - right, k) / C(samples, k), without bias for k independent samples (Chen et al., arXiv 2107.03374).

    Args:
        right: float64 [N], how many samples of each problem are right.
        samples: how many were made.
        k: at most `samples`.

    Returns:
        float64 [N].
    """
    wrong = samples - right
    draws = torch.arange(k, dtype=torch.float64)
    return 1 - ((wrong[:, None] - draws).clamp(min=0) / (samples - draws)).prod(-1)


# --------------------------------------------------------------------------------------------------------------- tables


def arm_table(records: Iterable[Record], title: str) -> Table:
    """One line per arm: steps, NFE, tokens per forward, and each metric with its 95% interval."""
    lines: dict[str, dict[str, Record]] = {}
    for record in records:
        if record["metric"] in ("accuracy", "path_nats", "nfe"):
            lines.setdefault(str(record["arm"]), {})[str(record["metric"])] = record
    table = Table(title=title, title_justify="left")
    table.add_column("arm")
    for column in ("steps", "NFE mean ± s.e. (min-max)", "batch max", "tokens/forward", "seeds", "accuracy %"):
        table.add_column(column, justify="right")
    for column in ("path_nats", "@NFE", "policy weights", "FLOPs", "wall", "NFE charged", "ms/row"):
        table.add_column(column, justify="right")
    for arm, metrics in lines.items():
        head, path = metrics["nfe"], metrics.get("path_nats", {})
        table.add_row(
            arm,
            str(head["steps"]),
            f"{real(head, 'nfe'):.2f} ± {real(head, 'nfe_se'):.2f} ({head['nfe_min']}-{head['nfe_max']})",
            f"{real(head, 'nfe_batch_max'):.1f}",
            f"{real(head, 'tokens_per_forward'):.2f}",
            str(head["seeds"]),
            _interval(metrics.get("accuracy"), 100, 1),
            _interval(metrics.get("path_nats"), 1, 3),
            f"{real(path, 'nfe'):.2f}" if path else "",
            str(head.get("policy_parameters", "")),
            *(f"{real(head, key):+.0%}" if key in head else "" for key in ("policy_flops_share", "policy_wall_share")),
            f"{real(head, 'nfe_charged'):.2f}" if "nfe_charged" in head else "",
            f"{1000 * real(head, 'seconds_per_row'):.1f}",
        )
    return table


def advantage_table(records: Iterable[Record], title: str) -> Table:
    """One line per comparison with the best heuristic at equal mean NFE."""
    table = Table(title=f"Best heuristic at equal mean NFE: {title}", title_justify="left")
    for column in ("arm", "dial", "metric", "at NFE", "own", "best heuristic", "of", "advantage", "training seeds"):
        table.add_column(column, justify="left" if column in ("arm", "dial", "metric", "of") else "right")
    for record in records:
        factor, digits = (100, 1) if record.get("measured") == "accuracy" else (1, 4)
        if record["metric"] == "frontier":
            value = f"{factor * real(record, 'value'):.{digits}f}"
            place = f"{real(record, 'target_nfe'):.2f}"
            table.add_row("", "", str(record["measured"]), place, "", value, str(record["of"]))
        elif record["metric"] == "advantage":
            seeds = str(record["training_seeds"])
            if record["training_seeds"] != 1:
                spread = [f"{factor * real(record, key):+.{digits}f}" for key in ("seed_low", "seed_high")]
                seeds += f" ({' to '.join(spread)})"
            table.add_row(
                str(record["arm"]),
                str(record.get("dial", "curve")),
                str(record["measured"]),
                f"{real(record, 'nfe'):.2f}",
                f"{factor * real(record, 'own'):.{digits}f}",
                f"{factor * real(record, 'frontier'):.{digits}f}",
                str(record["of"]),
                _interval(record, factor, digits, "+"),
                seeds,
            )
    return table


def pass_table(records: Iterable[Record], title: str) -> Table:
    """One line per arm: pass@k of sampled tokens."""
    lines: dict[str, dict[int, Record]] = {}
    for record in records:
        if record["metric"] == "pass_at_k":
            lines.setdefault(str(record["arm"]), {})[int(real(record, "k"))] = record
    ks = sorted({k for line in lines.values() for k in line})
    first = next(iter(next(iter(lines.values())).values()))
    about = f"{first['samples']} samples at temperature {real(first, 'temperature'):g}"
    table = Table(title=f"Sampled tokens, {about}: {title}", title_justify="left")
    table.add_column("arm")
    for column in ("NFE", *(f"pass@{k} %" for k in ks)):
        table.add_column(column, justify="right")
    for arm, line in lines.items():
        some = next(iter(line.values()))
        table.add_row(arm, f"{real(some, 'nfe'):.2f}", *(_interval(line.get(k), 100, 1) for k in ks))
    return table


def _interval(record: Record | None, factor: float, digits: int, sign: str = "") -> str:
    if record is None:
        return ""
    value, low, high = (f"{factor * real(record, key):{sign}.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


# --------------------------------------------------------------------------------------------------------------- figure


def frontier_figure(results: Results) -> Figure:
    """One panel per metric: a thin curve per heuristic family, a thick one per learned curve, and the frontier."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    figure, axes = plt.subplots(1, len(results.metrics), figsize=(6.5 * len(results.metrics), 5), squeeze=False)
    kinds = {arm.family: arm.kind for arm in results.arms}
    learned = [family for family, kind in kinds.items() if kind == "learned"]
    colours: dict[str, Any] = {family: f"C{number % 10}" for number, family in enumerate(learned)}
    pale = plt.get_cmap("tab20")
    colours |= {family: pale(number % 20) for number, family in enumerate(f for f in kinds if f not in colours)}
    for axis, metric in zip(axes[0], results.metrics, strict=True):
        curves = results.curves(metric)
        for (family, seed), curve in curves.items():
            thick: dict[str, Any] = {"linewidth": 2.5, "marker": "o", "zorder": 3}
            thin = {"linewidth": 1, "marker": ".", "alpha": 0.7, "linestyle": ":" if kinds[family] == "oracle" else "-"}
            style = thick if kinds[family] == "learned" else thin
            nfe, values = (np.array(column) for column in zip(*curve, strict=True))
            # Straight in NFE, as it is interpolated, which is not straight on a logarithmic axis.
            grid = np.unique(np.concatenate([nfe, np.geomspace(nfe[0], nfe[-1], 100)]))
            line = {"color": colours[family], "alpha": style.pop("alpha", 1.0), "zorder": style.pop("zorder", 2)}
            axis.plot(
                grid, np.interp(grid, nfe, values), label=None if seed else family, **line, **style | {"marker": ""}
            )
            axis.plot(nfe, values, **line, **style | {"linestyle": ""})
        places = sorted(nfe for curve in curves.values() for nfe, _ in curve)
        frontier = results.frontier(metric)
        if frontier is not None and places:
            grid = np.linspace(places[0], places[-1], 400)
            best = [(place, found[1]) for place in grid if (found := frontier.best(float(place))) is not None]
            axis.plot(*zip(*best, strict=True), color="black", linestyle="--", linewidth=1, label="best heuristic")
        axis.set_xlabel("mean NFE (denoiser forwards per row)")
        axis.set_ylabel("accuracy" if metric == "accuracy" else "path_nats (nats per token, lower is better)")
        axis.set_xscale("log")
        axis.set_xticks(
            [tick for tick in (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64) if tick <= max(places, default=1)]
        )
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    return figure
