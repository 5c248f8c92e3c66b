"""What the log of a fit says about its optimisation."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from orderppl.errors import UserError


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Records of a `log.jsonl`, updates and validations.

    Raises:
        UserError: no such file, or a line that is no record.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(str(path), "no such file", "give the log.jsonl that fit writes into its folder `out`")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            record["update"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}", "is no record of an update", "give a log.jsonl of fit") from error
        records.append(record)
    return records


def training_trace(
    log: Iterable[Mapping[str, Any]], *, decay: float = 0.9, grad_clip: float | None = None
) -> xr.Dataset:
    """Numbers of every update, and the variance of the gradient.

        variance_u = ( sum_v w_v |g_v|^2  -  | sum_v w_v g_v |^2 ) / (1 - sum_v w_v^2),    v <= u,  w_v ~ decay^{u - v}

    the trace of the gradient's covariance over the last updates, about (1 + decay) / (1 - decay) = 19 of them at Adam's
    default decay. The first sum is made here from `grad_norm`, the second is the norm of Adam's first moment, which the
    log has at log points (`grad_mean_norm`). A drift of the mean gradient within the window counts as variance.

    Args:
        log: records of `FitResult.trace` or `read_log`; validations are left out.
        decay: of Adam's first moment.
        grad_clip: the largest norm of the fit: Adam has seen clipped gradients.

    Returns:
        Over `update` every number of the log, NaN where a record does not have it, and with Adam `grad_variance` and
        `grad_snr` = |mean gradient| / sqrt(variance of a gradient), at log points.

    Raises:
        UserError: no update in the log.
    """
    records = [record for record in log if "loss" in record]
    if not records:
        raise UserError("log", "holds no update", "give the trace of a fit that ran")
    frame = pd.DataFrame(records).set_index("update").drop(columns="validation", errors="ignore")
    trace = xr.Dataset.from_dataframe(frame.apply(pd.to_numeric, errors="coerce").astype(np.float64))
    if "grad_mean_norm" not in trace or "grad_norm" not in trace:
        return trace
    clip = np.inf if grad_clip is None else grad_clip
    mean_square = (frame["grad_norm"].clip(upper=clip) ** 2).ewm(alpha=1 - decay).mean()
    past = decay ** np.arange(1, len(frame) + 1)
    share = (1 - decay) / (1 + decay) * (1 + past) / (1 - past)  # sum_v w_v^2 / (sum_v w_v)^2
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = np.maximum(mean_square.to_numpy() - trace["grad_mean_norm"] ** 2, 0) / (1 - share)
        trace["grad_variance"] = variance.where(np.arange(len(frame)) > 0)  # a single gradient has none
        trace["grad_snr"] = trace["grad_mean_norm"] / trace["grad_variance"] ** 0.5
    trace.attrs.update(decay=decay, grad_clip=clip)
    return trace
