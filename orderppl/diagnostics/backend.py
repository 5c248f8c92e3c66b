"""The one place that knows arviz: another version of it is an edit here."""

from __future__ import annotations

import os
import warnings
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from orderppl.errors import UserError

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # arviz 0.23 announces its successor on import, once a day
    import arviz
    from arviz import InferenceData

__all__ = ["InferenceData", "inference_data", "load", "psis", "save"]

Array = NDArray[Any]
INSTALL = "pip install h5netcdf h5py"  # a dependency of arviz


def psis(log_weight: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Pareto-smoothed importance sampling (Vehtari et al., JMLR 25(72), 2024).

    Args:
        log_weight: float64 [B, K], unnormalised.

    Returns:
        Smoothed, normalised log-weights float64 [B, K], and the tail shape k of every row, float64 [B].
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        smoothed, shape = arviz.psislw(log_weight)
    return np.asarray(smoothed), np.asarray(shape)


def inference_data(
    groups: Mapping[str, Mapping[str, Array]],
    extra: Mapping[str, Mapping[str, Array]],
    *,
    dims: Mapping[str, Sequence[str]],
    by_group: Mapping[str, Mapping[str, Sequence[str]]],
    coords: Mapping[Hashable, Array],
    labels: Mapping[str, tuple[Sequence[str], Array]],
    attrs: Mapping[str, Any],
) -> InferenceData:
    """Make an InferenceData; variables of sampled groups start with the dimensions chain and draw.

    Args:
        groups: group of arviz's schema -> variable -> array.
        extra: sampled groups outside the schema.
        dims: variable -> its dimensions after chain and draw.
        by_group: group -> the same, where a name has other dimensions in one group.
        coords: labels of the dimensions.
        labels: name -> dimensions and array: coordinates of all groups with these dimensions.
        attrs: attributes of every group.
    """
    data = InferenceData(attrs=dict(attrs))
    for name, group in {**groups, **extra}.items():
        fixed = name in ("observed_data", "constant_data")
        lead: list[str] = [] if fixed else ["chain", "draw"]
        own = {**dims, **by_group.get(name, {})}
        dataset = xr.Dataset({key: (lead + list(own[key]), value) for key, value in group.items()}, attrs=dict(attrs))
        sizes = {"chain": 1, "draw": dataset.sizes.get("draw", 0)}
        index = {dim: coords[dim] if dim in coords else np.arange(sizes[str(dim)]) for dim in dataset.dims}
        named = {key: (list(of), value) for key, (of, value) in labels.items() if set(of) <= set(dataset.dims)}
        data.add_groups({name: dataset.assign_coords(index).assign_coords(named)}, warn_on_custom_groups=False)
    return data


def save(data: InferenceData, path: str | os.PathLike[str]) -> Path:
    """Write an InferenceData as netCDF; a reader sees the whole file or none.

    Raises:
        UserError: the file cannot be written, or a library for it is missing.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        data.to_netcdf(str(temporary), engine="h5netcdf")
        os.replace(temporary, path)
    except ImportError as error:
        raise UserError(str(path), f"netCDF cannot be written: {error}", INSTALL) from error
    except OSError as error:
        raise UserError(str(path), f"cannot be written: {error}", "give a folder that exists, with room") from error
    finally:
        temporary.unlink(missing_ok=True)
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
