"""Bootstrap samples of rows, and the intervals of means over them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from orderppl.errors import UserError

Array = NDArray[np.float64]
_CHUNK = 2**24  # entries of a float table of resampled rows held at once


@dataclass(frozen=True)
class Interval:
    """A mean and the percentile interval of its bootstrap distribution.

    Attributes:
        value: the mean.
        low: lower end of the interval.
        high: upper end.
    """

    value: float
    low: float
    high: float


class Resamples:
    """How often each of N rows is in each bootstrap sample of them; the first "sample" is the rows themselves.

    Whatever is computed from the same object is computed from the same samples: its differences are paired by row.

    Args:
        rows: number of rows N.
        level: coverage of intervals.
        resamples: number of samples R.
        seed: of the draws.

    Raises:
        UserError: no rows, or a level that is no coverage.
    """

    def __init__(self, rows: int, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> None:
        if rows == 0:
            raise UserError("rows", "no rows to average", "give a split that is not empty")
        if not 0 < level < 1:
            raise UserError("level", f"{level} is no coverage", "give a number between 0 and 1, such as 0.95")
        self.level = level
        generator, share = np.random.default_rng(seed), np.full(rows, 1 / rows)
        self.counts = np.ones((resamples + 1, rows), dtype=np.uint16)
        step = max(1, _CHUNK // rows)
        for start in range(1, resamples + 1, step):
            self.counts[start : start + step] = generator.multinomial(rows, share, min(step, resamples + 1 - start))

    def sums(self, values: Array) -> Array:
        """Sums over the rows of every sample: float64 [R + 1, P] from [N, P]."""
        step = max(1, _CHUNK // len(values))
        parts = [self.counts[i : i + step].astype(np.float64) @ values for i in range(0, len(self.counts), step)]
        return np.concatenate(parts)

    def means(self, values: Array, weights: Array | None = None) -> Array:
        """Weighted means sum(w v) / sum(w) over the rows of every sample: float64 [R + 1, P] from [N, P] and [N].

        Raises:
            UserError: other rows than those of the samples, or no weight.
        """
        rows = self.counts.shape[1]
        weights = np.ones(rows) if weights is None else weights
        if len(values) != rows or weights.shape != (rows,):
            raise UserError("rows", f"{len(values)} values for {rows} rows", "compare arms on the same rows")
        if not weights.sum() > 0:
            raise UserError("weights", "they sum to 0", "give rows with at least one token")
        with np.errstate(invalid="ignore", divide="ignore"):  # a sample of rows without any weight
            return np.asarray(self.sums(weights[:, None] * values) / self.sums(weights[:, None]))

    def interval(self, samples: Array) -> Interval:
        """Percentile interval of something computed in every sample, float64 [R + 1]."""
        tail = (1 - self.level) / 2
        low, high = np.nanquantile(samples[1:] if len(samples) > 1 else samples, [tail, 1 - tail])
        return Interval(float(samples[0]), float(low), float(high))


def bootstrap_mean(
    values: ArrayLike, weights: ArrayLike | None = None, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Bootstrap interval of a mean over rows; give differences by row for a paired one.

    Args:
        values: float [N], one value per row.
        weights: float [N], at least 0; the mean is then sum(w v) / sum(w), e.g. w = tokens of the row.
        level: coverage.
        resamples: number of bootstrap samples of the rows.
        seed: of the resampling.

    Raises:
        UserError: when there are no rows or no weight.
    """
    value = np.asarray(values, dtype=np.float64)
    weight = None if weights is None else np.asarray(weights, dtype=np.float64)
    samples = Resamples(len(value), level=level, resamples=resamples, seed=seed)
    return samples.interval(samples.means(value[:, None], weight)[:, 0])
