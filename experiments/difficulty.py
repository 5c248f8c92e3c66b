"""What rules spend and solve on the rows of each difficulty, at one mean number of forwards over all rows."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from orderppl.evaluation.intervals import bootstrap_mean
from orderppl.evaluation.table import ByRow, by_row

SHOWN = ("learned", "random uniform", "threshold", "entropy_bound")  # families that are looked at so


def mixtures(found: ByRow, target: float) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Family, forwards [N] and values [N] of every family at a mean number of forwards, the mean over its seeds."""
    for family, arms in found.arms.groupby("family", sort=False):
        seeds = []
        for _, members in arms.groupby("training_seed", dropna=False):
            places = np.flatnonzero(found.arms.index.isin(members.index))
            nfe, values = found.nfe[:, places], found.values[:, places]
            order = np.argsort(nfe.mean(0), kind="stable")
            weight = [np.interp(target, nfe.mean(0)[order], row) for row in np.eye(len(order))]  # of each setting
            seeds.append((nfe[:, order] @ weight, values[:, order] @ weight))
        yield str(family), *np.mean(seeds, 0)


def by_difficulty(
    table: pd.DataFrame, names: Sequence[str], kinds: Sequence[str], target: float
) -> list[dict[str, Any]]:
    """Records of the `forwards` and the share `solved` of every family, as mixtures of its two nearest settings.

    Args:
        table: of `evaluate`, with accuracy.
        names: the difficulty of each row.
        kinds: the difficulties, in their order.
        target: mean forwards over all rows.
    """
    records: list[dict[str, Any]] = []
    each = np.array(names)
    for family, nfe, right in mixtures(by_row(table, "accuracy"), target):
        for kind in ("all", *kinds):
            here = (each == kind) | (kind == "all")
            for metric, values in (("forwards", nfe), ("solved", right)):
                interval = {
                    name: round(float(value), 4) for name, value in asdict(bootstrap_mean(values[here])).items()
                }
                records.append({"metric": metric, **interval, "arm": family, "difficulty": kind})
    return records
