"""Tables as `evaluate` makes them, from numbers given by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd


def arm(
    name: str,
    *,
    family: str | None = None,
    nfe: Sequence[float] | float = 1,
    correct: Sequence[float] | float | None = None,
    nats: Sequence[float] | float | None = None,
    tokens: Sequence[int] | int = 4,
    rows: int = 4,
    seed: int = 0,
    training_seed: int | None = None,
    kind: str | None = None,
    setting: str = "T=4",
) -> pd.DataFrame:
    """Rows of an arm under one seed: decoded if `correct` is given, teacher-forced if `nats` is."""
    labels: dict[str, Any] = {"arm": name, "family": family or name}
    labels |= {"kind": kind or ("heuristic" if training_seed is None else "learned"), "setting": setting, "steps": 4}
    parts = []
    for run, column, values in (("decoding", "correct", correct), ("teacher_forced", "nats", nats)):
        if values is not None:
            measured = {"row": np.arange(rows), "tokens": tokens, "tokens_written": tokens, "nfe": nfe, "fallback": 0}
            nothing = {"nats": np.nan, "correct": np.nan}
            part = labels | {"training_seed": training_seed, "run": run, "seed": seed} | measured | nothing
            parts.append(pd.DataFrame(part | {column: values}))
    return together(*parts)


def together(*parts: pd.DataFrame) -> pd.DataFrame:
    """One table."""
    typed = {"training_seed": "Int64", "nats": "float64", "correct": "float64"}
    return pd.concat([part.astype(typed) for part in parts], ignore_index=True)
