"""Files that appear complete or not at all, and weights that are never unpickled."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from orderppl.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TEMPORARY = ".unfinished-"  # prefix of everything that may be left behind by a crash
_locked: set[Path] = set()  # folders that this process holds


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """The temporary name of a file that appears complete, or not at all; one for each process that writes it."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new one, never a part."""
    with appearing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a state dict as safetensors, tied tensors once, so that a reader sees the old file or the new one."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        stored[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    with appearing(path) as temporary:
        save_file(stored, temporary, metadata={"aliases": json.dumps(aliases)})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a state dict that `write_tensors`, or anything else that makes safetensors, has written.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            aliases = json.loads((file.metadata() or {}).get("aliases", "{}"))
        state = load_file(path)
        return state | {alias: state[name] for alias, name in aliases.items()}
    except FileNotFoundError as error:
        raise UserError("weights", f"{path} does not exist", "check the path") from error
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError("weights", f"{path} cannot be read ({error})", "give a complete safetensors file") from error


def save_weights(module: nn.Module, path: Path) -> None:
    """Write all parameters and buffers of a module to a safetensors file, tied tensors once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, module.state_dict())


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a safetensors file into a module after checking every name and shape.

    Raises:
        UserError: the file is missing, damaged or of another architecture.
    """
    state = read_tensors(path)
    check_shapes({name: list(tensor.shape) for name, tensor in state.items()}, shapes_of(module), path)
    module.load_state_dict(state)


def shapes_of(module: nn.Module) -> dict[str, list[int]]:
    """Names and shapes of everything a module stores: what makes two architectures the same."""
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def check_shapes(saved: Mapping[str, list[int]], wanted: Mapping[str, list[int]], source: Path | str) -> None:
    """Refuse weights of another architecture.

    Raises:
        UserError: names the first missing, differently shaped or unexpected tensor.
    """
    for name in (*wanted, *saved):
        if name not in saved:
            problem = f"{source} has no tensor {name!r}"
        elif name not in wanted:
            problem = f"{source} has a tensor {name!r} that this model lacks"
        elif list(saved[name]) != wanted[name]:
            problem = f"{name!r} has shape {list(saved[name])} in {source} but {wanted[name]} in this model"
        else:
            continue
        raise UserError("checkpoint", problem, "use the configuration the checkpoint was written with")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing into a folder; the lock goes with this process, however it ends.

    Within the process that holds it, a second lock of the same folder is none.

    Raises:
        UserError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = folder.resolve()
    if fcntl is None or place in _locked:
        yield
        return
    handle = os.open(place, os.O_RDONLY)
    try:
        with suppress(OSError):  # of a file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                problem = f"another process writes into {folder}"
                raise UserError("out", problem, "wait for it, or choose another folder") from None
        _locked.add(place)
        try:
            yield
        finally:
            _locked.discard(place)
    finally:
        os.close(handle)
