"""Quality against denoiser forwards (NFE): the frontier of many arms, and how far an arm is above it.

Arms of which one setting varies (a threshold, a step budget, a price) form a family, whose curve is piecewise linear
between its points (mean NFE, value); a point between two arms is what choosing between them at random gives. A decoder
may always stop early, so a curve never gets worse to the right: it holds the best value so far. The frontier at an NFE
is the best family there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from orderppl.errors import UserError
from orderppl.evaluation.intervals import Array, Interval, Resamples
from orderppl.evaluation.table import ByRow, by_row, higher_is_better, metrics_of

AUP_DROP, AUP_DECAY = 5.0, 3.0  # points below the first that no longer count; how fast a loss of accuracy weighs


@dataclass(frozen=True)
class Point:
    """One arm on all rows; where it draws, the mean of each row over its seeds.

    Attributes:
        arm: its name.
        family: the curve it is a point of.
        values: float64 [N], e.g. 1 where the answer is right, or nats per token.
        nfe: float64 [N], denoiser forwards.
    """

    arm: str
    family: str
    values: Array
    nfe: Array


@dataclass(frozen=True)
class Advantage(Interval):
    """How much better than the frontier, in the unit of the values; positive is better, whichever metric it is.

    Attributes:
        of: the family that is the frontier there.
        frontier: its value.
        own: the value compared with it.
        nfe: mean NFE of the frontier where it was read.
        by_curve: the advantage of each curve by itself, such as one per training seed.
    """

    of: str
    frontier: float
    own: float
    nfe: float
    by_curve: tuple[float, ...]


@dataclass(frozen=True)
class _Curve:
    """Arms in every sample, [R, P] each; values in the direction where higher is better. A family is sorted by NFE."""

    nfe: Array
    value: Array

    def sorted(self) -> _Curve:
        """The same by NFE, in every sample."""
        order = np.argsort(self.nfe, 1, kind="stable")
        return _Curve(np.take_along_axis(self.nfe, order, 1), np.take_along_axis(self.value, order, 1))

    def read(self, nfe: Array) -> Array:
        """Value at an NFE [R]: interpolated, the first point's to the left and the last point's to the right: [R]."""
        sample = np.arange(len(nfe))
        right = (self.nfe[: len(nfe)] <= nfe[:, None]).sum(1)
        before, after = (right - 1).clip(min=0), right.clip(max=self.nfe.shape[1] - 1)
        low, high, below, above = (p[sample, at] for p in (self.nfe, self.value) for at in (before, after))
        return _between(low, high, below, above, nfe)

    def reaches(self, nfe: float) -> bool:
        """Whether its first arm needs no more than an NFE."""
        return bool(self.nfe[0, 0] <= nfe + 1e-9)


class Frontier:
    """The best of several families at every mean NFE, on the same rows and in the same bootstrap samples as others.

    Everything that is estimated from the rows is estimated again in every bootstrap sample of them: mean NFEs, values,
    the interpolation, and which family is best. Picking the best family by the very rows that it is compared on favours
    the frontier: an advantage over it is a conservative one. Give `chosen_on` to pick it on other rows.

    Args:
        points: arms of all families, on the same rows.
        weights: float64 [N]; means over rows are sum(w v) / sum(w), e.g. w = tokens of the row. NFEs are plain means.
        higher_is_better: whether values are better when higher (accuracy) or lower (nats).
        chosen_on: the frontier of the same families on validation rows, which then says which of them is best at an
            NFE; in every bootstrap sample of its own rows again.
        mixed: the opponents are mixtures of any two arms, of whichever family: a coin per row decides between them.
        level: coverage of intervals.
        resamples: number of bootstrap samples of the rows.
        seed: of the resampling.

    Raises:
        UserError: no arms, no rows, no weight, arms on different rows, values that are not finite, or validation rows
            without these families.
    """

    def __init__(
        self,
        points: Sequence[Point],
        weights: Array,
        *,
        higher_is_better: bool,
        chosen_on: Frontier | None = None,
        mixed: bool = False,
        level: float = 0.95,
        resamples: int = 2000,
        seed: int = 0,
    ) -> None:
        if not points:
            raise UserError("points", "a frontier of no arms", "give at least one")
        self.weights = np.asarray(weights, dtype=np.float64)
        self.samples = Resamples(len(self.weights), level=level, resamples=resamples, seed=seed)
        self.sign = 1.0 if higher_is_better else -1.0
        self.mixed, self._arms, self._means = mixed, [point.arm for point in points], self._means_of(points)
        self.families: dict[str, _Curve] = {}
        for name in dict.fromkeys(point.family for point in points):
            own = [number for number, point in enumerate(points) if point.family == name]
            curve = _Curve(self._means.nfe[:, own], self._means.value[:, own]).sorted()
            self.families[name] = _Curve(curve.nfe, np.maximum.accumulate(curve.value, 1))  # it may stop early
        self._judge = self if chosen_on is None else chosen_on
        absent = [name for name in self.families if name not in self._judge.families]
        if mixed and self._arms != self._judge._arms:
            raise UserError("chosen_on", "other arms", "measure the same arms on both sets of rows")
        if absent or len(self._judge.samples.counts) != len(self.samples.counts):
            problem = f"no family {absent[0]!r} there" if absent else "another number of resamples"
            raise UserError("chosen_on", problem, "measure the same arms on both sets of rows")

    def best(self, nfe: float) -> tuple[str, float] | None:
        """Family and value of the frontier at a mean NFE; None to the left of every family."""
        found = self._read(np.full(1, nfe))
        return None if found is None else (found[0], self.sign * float(found[1][0]))

    def advantage(self, *curves: Sequence[Point], nfe: float | None = None) -> Advantage | None:
        """Compare curves with the frontier, each at its own value at one mean NFE, and average over the curves.

        Args:
            curves: arms of one family each, such as one curve per training seed. Between its arms a curve is
                interpolated; to the right of its last arm it keeps that value, without choosing the best so far. In
                bootstrap samples in which its first arm needs more than `nfe` it is compared at the NFE of that arm.
            nfe: where; None for curves of a single arm, each at its own mean NFE.

        Returns:
            None where a curve or the frontier is not defined: to the left of its first arm.

        Raises:
            UserError: no NFE for a curve of several arms, or no arms.
        """
        if not curves or not all(curves):
            raise UserError("curves", "a curve of no arms", "give at least one arm")
        if nfe is None and any(len(curve) > 1 for curve in curves):
            raise UserError("nfe", "curves of several arms without an NFE", "say at which mean NFE to compare")
        gains, owns, bests, at, of = [], [], [], [], []
        for points in curves:
            curve = self._means_of(points).sorted()
            where = curve.nfe[:, 0] if nfe is None else np.maximum(curve.nfe[:, 0], nfe)
            found = self._read(where)
            if found is None or (nfe is not None and not curve.reaches(nfe)):
                return None
            own = curve.read(where)
            gains.append(own - found[1])
            owns.append(own[0])
            bests.append(found[1][0])
            at.append(where[0])
            of.append(found[0])
        gain = self.samples.interval(np.mean(gains, axis=0))
        return Advantage(
            gain.value,
            gain.low,
            gain.high,
            of=" or ".join(dict.fromkeys(of)),
            frontier=float(self.sign * np.mean(bests)),
            own=float(self.sign * np.mean(owns)),
            nfe=float(np.mean(at)),
            by_curve=tuple(float(own[0]) for own in gains),
        )

    def _read(self, nfe: Array) -> tuple[str, Array] | None:
        """Best family in the first sample, and in every sample the value of the one that is best there: float64 [R]."""
        if self.mixed:
            return self._read_mixed(nfe)
        curves = [(self.families[name], self._judge.families[name], name) for name in self.families]
        here = [(own, judged, name) for own, judged, name in curves if own.reaches(nfe[0]) and judged.reaches(nfe[0])]
        if not here:
            return None
        judged = np.stack([judge.read(nfe) for _, judge, _ in here])  # [families, R]
        best = judged.argmax(0)  # [R]
        values = judged if self._judge is self else np.stack([own.read(nfe) for own, _, _ in here])
        return here[best[0]][2], values[best, np.arange(len(nfe))]

    def _read_mixed(self, nfe: Array) -> tuple[str, Array] | None:
        """The same of the best two arms, the coin weighed so that the mean is that NFE."""
        sample = np.arange(len(nfe))
        judged, own = (_Curve(of.nfe[sample], of.value[sample]) for of in (self._judge._means, self._means))
        alone = np.where(judged.nfe <= nfe[:, None], judged.value, -np.inf)  # [R, P], which may stop early
        arms, best = np.stack([alone.argmax(1)] * 2), alone.max(1)
        for first, forwards in enumerate(judged.nfe.T):
            value = _between(forwards[:, None], judged.nfe, judged.value[:, [first]], judged.value, nfe[:, None])
            around = (forwards[:, None] <= nfe[:, None]) & (judged.nfe >= nfe[:, None])  # [R, P]
            value = np.where(around, value, -np.inf)
            second = value.argmax(1)
            better = value[sample, second] > best
            best = np.where(better, value[sample, second], best)
            arms[0, better], arms[1, better] = first, second[better]
        if best[0] == -np.inf:
            return None
        (low, high), (below, above) = ([part[sample, arm] for arm in arms] for part in (own.nfe, own.value))
        return " or ".join(dict.fromkeys(self._arms[arm[0]] for arm in arms)), _between(low, high, below, above, nfe)

    def _means_of(self, points: Sequence[Point]) -> _Curve:
        """Means of the arms as they come, not sorted."""
        rows = len(self.weights)
        for point in points:
            if point.values.shape != (rows,) or point.nfe.shape != (rows,):
                problem = f"{point.arm}: {len(point.values)} values and {len(point.nfe)} NFEs for {rows} rows"
                raise UserError("points", problem, "compare arms on the same rows")
            if not (np.isfinite(point.values).all() and np.isfinite(point.nfe).all()):
                raise UserError("points", f"{point.family}: values that are not finite", "look for a failed arm")
        values = np.stack([point.values for point in points], 1)  # [N, P]
        nfe = np.stack([point.nfe for point in points], 1)
        return _Curve(self.samples.means(nfe), self.sign * self.samples.means(values, self.weights))


def _between(low: Array, high: Array, below: Array, above: Array, nfe: Array) -> Array:
    """The straight line from one arm to another at an NFE; the nearer end outside."""
    share = np.where(high > low, (nfe - low) / np.where(high > low, high - low, 1.0), 0.0).clip(0.0, 1.0)
    return np.asarray((1 - share) * below + share * above)


# ------------------------------------------------------------------------------------------------- from a table


def frontier(
    table: pd.DataFrame,
    metric: str,
    *,
    opponents: Iterable[str] | None = None,
    validation: pd.DataFrame | None = None,
    mixed: bool = False,
    resamples: int = 2000,
    seed: int = 0,
) -> Frontier:
    """The best of the opponents at every mean NFE.

    Args:
        table: of `evaluate`.
        metric: accuracy, path_nats or any column.
        opponents: their families; all heuristics when left out (the training seeds of a learned one are families of
            their own).
        validation: the table of the same arms on other rows, on which the best family is chosen.
        mixed: see `Frontier`.
        resamples: number of bootstrap samples of the rows.
        seed: of the resampling.

    Raises:
        UserError: no opponents, or see `Frontier`.
    """
    chosen_on, opponents = None, None if opponents is None else list(opponents)
    if validation is not None:  # other bootstrap samples: they are other rows
        options: dict[str, Any] = {"mixed": mixed, "resamples": resamples, "seed": seed + 1}
        chosen_on = frontier(validation, metric, opponents=opponents, **options)
    rows = by_row(table, metric)
    wanted = _opponents(rows.arms, opponents)
    points = [point for point, arm in zip(_points(rows), rows.arms.itertuples(), strict=True) if arm.family in wanted]
    return Frontier(
        points,
        rows.weights,
        higher_is_better=higher_is_better(metric),
        chosen_on=chosen_on,
        mixed=mixed,
        resamples=resamples,
        seed=seed,
    )


def advantages(
    table: pd.DataFrame,
    targets: Iterable[float] = (),
    metrics: Iterable[str] | None = None,
    *,
    opponents: Iterable[str] | None = None,
    validation: pd.DataFrame | None = None,
    mixed: bool = False,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """How much better than the best opponent every other family is, at equal mean NFE.

    Args:
        table: of `evaluate`.
        targets: mean NFEs at which curves are compared.
        metrics: accuracy, path_nats or any column; those of the first two that were measured when left out.
        opponents: see `frontier`.
        validation: see `frontier`.
        mixed: see `Frontier`; at the targets only, with the label `grid`.
        resamples: number of bootstrap samples of the rows.
        seed: of the resampling.

    Returns:
        Rows of `metric` "frontier", the best opponent (`of`) at each `target_nfe`, and "advantage", positive where
        the family `arm` is better than it, with `own` and `frontier`: at each target, and, for a `setting` that every
        training seed has, at its own mean NFE. `measured` is the metric; `seed_low`, `seed_high` the range over
        `training_seeds`. Empty without opponents.
    """
    targets, opponents = list(targets), None if opponents is None else list(opponents)
    found: list[dict[str, Any]] = []
    for metric in metrics_of(table) if metrics is None else metrics:
        rows = by_row(table, metric)
        if not _opponents(rows.arms, opponents):
            continue
        options: dict[str, Any] = {"mixed": mixed, "resamples": resamples, "seed": seed}
        edge = frontier(table, metric, opponents=opponents, validation=validation, **options)
        common = {"measured": metric, "n": len(rows.weights)} | ({"grid": "mixtures of two"} if mixed else {})
        for target in targets:
            best = edge.best(target)
            if best is not None:
                found.append({"metric": "frontier", "value": best[1], "of": best[0], "target_nfe": target} | common)
        points = dict(zip(rows.arms.index, _points(rows), strict=True))
        own = rows.arms[~rows.arms["family"].isin(_opponents(rows.arms, opponents)) & (rows.arms["kind"] != "oracle")]
        for family, arms in own.groupby("family", sort=False):
            for place, curves in _curves(arms, points, targets):
                if mixed and "target_nfe" not in place:
                    continue
                gain = edge.advantage(*curves, nfe=place.get("target_nfe"))
                if gain is not None:
                    record = {"metric": "advantage", **vars(gain), "arm": family, "training_seeds": len(curves)}
                    by_curve = record.pop("by_curve")
                    found.append(record | {"seed_low": min(by_curve), "seed_high": max(by_curve)} | place | common)
    return pd.DataFrame(found)


def _curves(
    arms: pd.DataFrame, points: dict[str, Point], targets: Sequence[float]
) -> Iterator[tuple[dict[str, Any], list[list[Point]]]]:
    """Where to compare a family, and its curves there, one per training seed."""
    seeds = [list(part.index) for _, part in arms.groupby("training_seed", dropna=False, sort=False)]
    for setting in dict.fromkeys(arms["setting"]):
        here = [[name for name in names if arms.loc[name, "setting"] == setting] for names in seeds]
        if all(len(names) == 1 for names in here):
            yield {"setting": setting}, [[points[name] for name in names] for names in here]
    for target in targets:
        yield {"target_nfe": target}, [[points[name] for name in names] for names in seeds]


def _points(rows: ByRow) -> list[Point]:
    """Every arm as a point of its curve; training seeds are curves of their own."""
    seeds = ["" if pd.isna(seed) else f" #{int(seed)}" for seed in rows.arms["training_seed"]]
    families = [f"{family}{seed}" for family, seed in zip(rows.arms["family"], seeds, strict=True)]
    columns = zip(rows.arms.index, families, rows.values.T, rows.nfe.T, strict=True)
    return [Point(arm, family, values, nfe) for arm, family, values, nfe in columns]


def _opponents(arms: pd.DataFrame, wanted: Iterable[str] | None) -> list[str]:
    """Families of the opponents: those wanted, else all heuristics."""
    families = arms["family"].unique() if wanted is not None else arms["family"][arms["kind"] == "heuristic"].unique()
    absent = [family for family in wanted or () if family not in families]
    if absent:
        raise UserError("opponents", f"no family {absent[0]!r}", f"use some of {', '.join(families)}")
    return list(families if wanted is None else wanted)


# ------------------------------------------------------------------------------------------------------------ AUP


def aup(
    table: pd.DataFrame,
    *,
    best: float | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Area under the curve of accuracy against tokens per forward, for every family: accuracy under parallelism.

    The points of a family, sorted by tokens per forward x_i, without those whose accuracy y_i (in %) is 5 below that of
    the first:

        AUP  = x_1 y_1 + sum_{i > 1} (x_i - x_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1})) / 2
        W(y) = min(exp(-3 (1 - y / y_max)), 1)

    Args:
        table: of `evaluate`, with accuracy.
        best: y_max in %; that of the best arm of the table when left out, in every bootstrap sample again.
        resamples: number of bootstrap samples of the rows.
        seed: of the resampling.

    Returns:
        One row per family: `metric` "aup", `value`, `low`, `high`, `arm` (the family), `points`, `training_seeds`, `n`;
        the mean over training seeds.
    """
    rows = by_row(table, "accuracy")
    samples = Resamples(len(rows.weights), resamples=resamples, seed=seed)
    written = rows.part.groupby(["row", "arm"])["tokens_written"].mean().unstack("arm")[list(rows.arms.index)]
    speed = samples.sums(written.to_numpy(np.float64)) / samples.sums(rows.nfe).clip(min=1e-9)  # [R + 1, P]
    accuracy = 100 * samples.means(rows.values)  # [R + 1, P]
    top = accuracy.max(1) if best is None else np.full(len(accuracy), best)
    arms, found = rows.arms.reset_index(drop=True), []
    for family, part in arms.groupby("family", sort=False):
        curves = [list(curve.index) for _, curve in part.groupby("training_seed", dropna=False, sort=False)]
        areas = [[_area(speed[r, c], accuracy[r, c], top[r]) for r in range(len(top))] for c in curves]
        interval = samples.interval(np.mean(areas, axis=0))
        counts = {"points": len(part), "training_seeds": len(curves), "n": len(rows.weights)}
        found.append({"metric": "aup", **vars(interval), "arm": family, "kind": part["kind"].iloc[0], **counts})
    return pd.DataFrame(found)


def _area(speed: Array, accuracy: Array, best: float) -> float:
    """AUP of one curve, float64 [P] each."""
    order = np.argsort(speed, kind="stable")
    x, y = speed[order], accuracy[order]
    kept = y >= y[0] - AUP_DROP
    x, y = x[kept], y[kept]
    weighed = y * np.minimum(np.exp(-AUP_DECAY * (1 - y / best)), 1.0) if best > 0 else y
    return float(x[0] * y[0] + np.sum(np.diff(x) * (weighed[1:] + weighed[:-1]) / 2))
