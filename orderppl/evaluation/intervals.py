"""Bootstrap intervals over rows, paired where two arms answer the same rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from orderppl.errors import UserError

_CHUNK = 2**22  # entries of a resampling table held at once


@dataclass(frozen=True)
class Interval:
    """A mean and the percentile interval of its bootstrap distribution."""

    value: float
    low: float
    high: float


def _array(values: Tensor) -> NDArray[np.float64]:
    return np.asarray(values.detach().cpu().double().numpy())


def _bootstrap(
    totals: NDArray[np.float64], weights: NDArray[np.float64], level: float, resamples: int, seed: int
) -> Interval:
    """Interval of sum(totals) / sum(weights) over resampled rows."""
    rows = len(totals)
    if rows == 0:
        raise UserError("rows", "no rows to average", "give a split that is not empty")
    if weights.sum() <= 0:
        raise UserError("weights", "they sum to 0", "give rows with at least one token")
    if not 0 < level < 1:
        raise UserError("level", f"{level} is no coverage", "give a number between 0 and 1, such as 0.95")
    generator = np.random.default_rng(seed)
    step = max(1, _CHUNK // rows)
    means = []
    for start in range(0, resamples, step):
        picked = generator.integers(rows, size=(min(step, resamples - start), rows))
        with np.errstate(invalid="ignore", divide="ignore"):
            means.append(totals[picked].sum(1) / weights[picked].sum(1))
    tail = (1 - level) / 2
    low, high = np.nanquantile(np.concatenate(means), [tail, 1 - tail])
    return Interval(float(totals.sum() / weights.sum()), float(low), float(high))


def bootstrap_mean(
    values: Tensor, weights: Tensor | None = None, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Bootstrap interval of a mean over rows.

    Args:
        values: float [N], one value per row.
        weights: float [N], at least 0; the mean is then sum(w v) / sum(w), e.g. w = tokens of the row.
        level: coverage.
        resamples: number of bootstrap samples of the rows.
        seed: seed of the resampling.

    Raises:
        UserError: when there are no rows or no weight.
    """
    weight = np.ones(len(values)) if weights is None else _array(weights)
    return _bootstrap(_array(values) * weight, weight, level, resamples, seed)


def paired_difference(
    values: Tensor,
    baseline: Tensor,
    weights: Tensor | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of mean(values) - mean(baseline), both resampled by the same rows.

    Args:
        values: float [N], one value per row.
        baseline: float [N], the other arm on the same rows.
        weights: float [N], as in `bootstrap_mean`.
        level: coverage.
        resamples: number of bootstrap samples of the rows.
        seed: seed of the resampling.

    Raises:
        UserError: when the arms have different numbers of rows, or none.
    """
    if values.shape != baseline.shape:
        problem = f"{len(baseline)} rows for {len(values)} of the other arm"
        raise UserError("baseline", problem, "compare arms on the same rows")
    return bootstrap_mean(values - baseline, weights, level=level, resamples=resamples, seed=seed)
