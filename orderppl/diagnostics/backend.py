"""The one place that knows arviz: another version of it is an edit here."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from orderppl.errors import UserError
from orderppl.files import appearing

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # arviz 0.23 announces its successor on import, once a day
    import arviz
    from arviz import InferenceData

__all__ = ["Array", "InferenceData", "add_groups", "group", "load", "psis", "save"]

Array = NDArray[Any]
INSTALL = "pip install h5netcdf h5py"  # a dependency of arviz


def psis(log_weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """Tail shape k of Pareto-smoothed importance sampling (Vehtari et al., JMLR 25(72), 2024).

    Args:
        log_weight: float64 [B, K], unnormalised.

    Returns:
        float64 [B].
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.asarray(arviz.psislw(log_weight)[1])


def add_groups(data: InferenceData, groups: dict[str, xr.Dataset]) -> None:
    """Add groups to an InferenceData, whether they are in arviz's schema or not."""
    data.add_groups(groups, warn_on_custom_groups=False)


def group(data: InferenceData, name: str) -> xr.Dataset:
    """A group of the data.

    Raises:
        UserError: it is missing.
    """
    if name not in data.groups():
        has = ", ".join(data.groups()) or "none"
        raise UserError(name, f"no such group; there are: {has}", "make the data with to_inference_data")
    found: xr.Dataset = data[name]
    return found


def save(data: InferenceData, path: str | os.PathLike[str]) -> Path:
    """Write an InferenceData as netCDF; a reader sees the whole file or none.

    Raises:
        UserError: the file cannot be written, or a library for it is missing.
    """
    path = Path(path)
    try:
        with appearing(path) as temporary:
            data.to_netcdf(str(temporary), engine="h5netcdf")
    except ImportError as error:
        raise UserError(str(path), f"netCDF cannot be written: {error}", INSTALL) from error
    except OSError as error:
        raise UserError(str(path), f"cannot be written: {error}", "give a folder that exists, with room") from error
    return path


def load(path: str | os.PathLike[str]) -> InferenceData:
    """Read an InferenceData into memory.

    Raises:
        UserError: no such file, no netCDF, or no library that reads it.
    """
    if not Path(path).is_file():
        raise UserError(str(path), "no such file", "write one with orderppl.diagnostics.save")
    try:
        data: InferenceData = arviz.from_netcdf(str(path), engine="h5netcdf")
        with xr.set_options(keep_attrs=True):
            data.load()
    except ImportError as error:
        raise UserError(str(path), f"netCDF cannot be read: {error}", INSTALL) from error
    except (OSError, ValueError) as error:
        raise UserError(str(path), f"is no InferenceData file: {error}", "write one with save") from error
    return data
