"""Quality against denoiser forwards (NFE): the frontier of many arms, and how far an arm is above it.

Arms with one free dial (a threshold, a step budget, a price) form a family, whose curve is piecewise linear between its
points (mean NFE, value); a point between two arms is what choosing between them at random gives. A decoder may always
stop early, so a curve never gets worse to the right: it holds the best value so far. The frontier at an NFE is the best
family there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from orderppl.errors import UserError
from orderppl.evaluation.intervals import Interval

Array = NDArray[np.float64]
_CHUNK = 2**24  # entries of a float table of resampled rows held at once


@dataclass(frozen=True)
class Point:
    """One arm on all rows; where it draws, the mean of each row over its seeds.

    Attributes:
        arm: its name.
        family: the curve it is a point of.
        values: float [N], e.g. 1 where the answer is right, or nats per token.
        nfe: float [N], denoiser forwards.
    """

    arm: str
    family: str
    values: Tensor
    nfe: Tensor


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
    """A family in every replicate, [R, P] each, sorted by NFE; values in the direction where higher is better."""

    nfe: Array
    value: Array

    def read(self, nfe: Array) -> Array:
        """Value at an NFE [R]: interpolated, the first point's to the left and the last point's to the right: [R]."""
        replicate = np.arange(len(nfe))
        right = (self.nfe <= nfe[:, None]).sum(1)
        before, after = (right - 1).clip(min=0), right.clip(max=self.nfe.shape[1] - 1)
        low, high = self.nfe[replicate, before], self.nfe[replicate, after]
        share = np.where(high > low, (nfe - low) / np.where(high > low, high - low, 1.0), 0.0).clip(0.0, 1.0)
        below, above = self.value[replicate, before], self.value[replicate, after]
        return np.asarray((1 - share) * below + share * above)

    def best_so_far(self) -> _Curve:
        """The curve of a decoder that may stop early."""
        return _Curve(self.nfe, np.maximum.accumulate(self.value, 1))


class Frontier:
    """The best of several families at every mean NFE, on the same rows and in the same bootstrap samples as others.

    Everything that is estimated from the rows is estimated again in every bootstrap sample of them: mean NFEs, values,
    the interpolation, and which family is best. Picking the best family by the very rows that it is compared on favours
    the frontier: an advantage over it is a conservative one.

    Args:
        points: arms of all families, on the same rows.
        weights: float [N]; means over rows are sum(w v) / sum(w), e.g. w = tokens of the row. NFEs are plain means.
        higher_is_better: whether values are better when higher (accuracy) or lower (nats).
        level: coverage of intervals.
        resamples: number of bootstrap samples of the rows.
        seed: seed of the resampling.

    Raises:
        UserError: no arms, no rows, no weight, arms on different rows, or values that are not finite.
    """

    def __init__(
        self,
        points: Sequence[Point],
        weights: Tensor,
        *,
        higher_is_better: bool,
        level: float = 0.95,
        resamples: int = 2000,
        seed: int = 0,
    ) -> None:
        if not points:
            raise UserError("points", "a frontier of no arms", "give at least one")
        if not len(weights):
            raise UserError("weights", "no rows", "give a split that is not empty")
        if not 0 < level < 1:
            raise UserError("level", f"{level} is no coverage", "give a number between 0 and 1, such as 0.95")
        self.weights = _array(weights)
        if not self.weights.sum() > 0:
            raise UserError("weights", "they sum to 0", "give rows with at least one token")
        self.sign = 1.0 if higher_is_better else -1.0
        self.level = level
        rows = len(self.weights)
        draws = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=resamples)
        # How often each row is in a sample: the first "sample" is the rows themselves.
        self.counts = np.concatenate([np.ones((1, rows)), draws]).astype(np.uint16)
        families = list(dict.fromkeys(point.family for point in points))
        curves = {name: self._curve([point for point in points if point.family == name]) for name in families}
        self.families = {name: curve.best_so_far() for name, curve in curves.items()}

    def best(self, nfe: float) -> tuple[str, float] | None:
        """Family and value of the frontier at a mean NFE; None to the left of every family."""
        name = self._best_family(nfe)
        if name is None:
            return None
        return name, float(self.sign * self.families[name].read(np.full(len(self.counts), nfe))[0])

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
            curve = self._curve(points)
            first = curve.nfe[:, 0]
            where = first if nfe is None else np.maximum(first, nfe)
            family = self._best_family(where[0])
            if family is None or (nfe is not None and first[0] > nfe + 1e-9):
                return None
            here = [name for name in self.families if self._reaches(name, where[0])]
            frontier = np.stack([self.families[name].read(where) for name in here]).max(0)  # [R]
            own = curve.read(where)
            gains.append(own - frontier)
            owns.append(own[0])
            bests.append(frontier[0])
            at.append(where[0])
            of.append(family)
        gain = np.mean(gains, axis=0)  # [R]
        tail = (1 - self.level) / 2
        low, high = np.quantile(gain[1:], [tail, 1 - tail]) if len(gain) > 1 else (gain[0], gain[0])
        return Advantage(
            value=float(gain[0]),
            low=float(low),
            high=float(high),
            of=" or ".join(dict.fromkeys(of)),
            frontier=float(self.sign * np.mean(bests)),
            own=float(self.sign * np.mean(owns)),
            nfe=float(np.mean(at)),
            by_curve=tuple(float(own[0]) for own in gains),
        )

    def _reaches(self, family: str, nfe: float) -> bool:
        return bool(self.families[family].nfe[0, 0] <= nfe + 1e-9)

    def _best_family(self, nfe: float) -> str | None:
        here = np.full(1, nfe)
        found = {
            name: float(_Curve(curve.nfe[:1], curve.value[:1]).read(here)[0])
            for name, curve in self.families.items()
            if self._reaches(name, nfe)
        }
        return max(found, key=found.__getitem__) if found else None

    def _curve(self, points: Sequence[Point]) -> _Curve:
        rows = len(self.weights)
        for point in points:
            if point.values.shape != (rows,) or point.nfe.shape != (rows,):
                problem = f"{point.arm}: {len(point.values)} values and {len(point.nfe)} NFEs for {rows} rows"
                raise UserError("points", problem, "compare arms on the same rows")
        values = np.stack([_array(point.values) for point in points], 1)  # [N, P]
        nfe = np.stack([_array(point.nfe) for point in points], 1)
        if not (np.isfinite(values).all() and np.isfinite(nfe).all()):
            raise UserError("points", f"{points[0].family}: values that are not finite", "look for a failed arm")
        value = self._sums(self.weights[:, None] * values) / self._sums(self.weights[:, None])
        forwards = self._sums(nfe) / rows
        order = np.argsort(forwards, 1, kind="stable")
        return _Curve(np.take_along_axis(forwards, order, 1), np.take_along_axis(self.sign * value, order, 1))

    def _sums(self, values: Array) -> Array:
        """Sums over the rows of every bootstrap sample: [R, P] from [N, P]."""
        step = max(1, _CHUNK // len(values))
        parts = [self.counts[i : i + step].astype(np.float64) @ values for i in range(0, len(self.counts), step)]
        return np.concatenate(parts)


def _array(values: Tensor) -> Array:
    return np.asarray(values.detach().cpu().double().numpy())
