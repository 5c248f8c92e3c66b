"""Weights and training state on disk: written under another name, then renamed; never unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from orderppl.errors import UserError

TEMPORARY = ".unfinished-"  # prefix of everything that may be left behind by a crash


def _unique(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split a state dict into tensors to store (on the host) and aliases of tied tensors, alias -> stored name."""
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
    return stored, aliases


def fingerprint(module: nn.Module) -> dict[str, list[int]]:
    """Names and shapes of everything a module stores: what makes two architectures the same."""
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def learned_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict without frozen parameters, such as those of a public denoiser: they are as they were built."""
    frozen = {
        name for name, parameter in module.named_parameters(remove_duplicate=False) if not parameter.requires_grad
    }
    return {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}


def frozen_sums(module: nn.Module) -> dict[str, int]:
    """A number for every frozen parameter that tells other values: the sum of its bit patterns, exact on any device."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return {
        name: int(parameter.detach().view(integer[parameter.element_size()]).sum(dtype=torch.int64))
        for name, parameter in module.named_parameters()
        if not parameter.requires_grad
    }


def check_fingerprint(saved: Mapping[str, list[int]], module: nn.Module, source: Path) -> None:
    """Refuse weights of another architecture.

    Raises:
        UserError: names the first missing, unexpected or differently shaped tensor.
    """
    wanted = fingerprint(module)
    problem = None
    for name, shape in wanted.items():
        if name not in saved:
            problem = f"{source} has no tensor {name!r}"
        elif list(saved[name]) != shape:
            problem = f"{name!r} has shape {list(saved[name])} in {source} but {shape} in this model"
        if problem:
            break
    else:
        extra = [name for name in saved if name not in wanted]
        if extra:
            problem = f"{source} has a tensor {extra[0]!r} that this model lacks"
    if problem:
        raise UserError("checkpoint", problem, "use the configuration the checkpoint was written with")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """The temporary name of a file that appears complete, or not at all; one for each process that writes it."""
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new one, never a part."""
    with _appearing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a state dict as safetensors, tied tensors once, so that a reader sees the old file or the new one."""
    stored, aliases = _unique(state)
    with _appearing(path) as temporary:
        save_file(stored, temporary, metadata={"aliases": json.dumps(aliases)})


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            aliases = json.loads((file.metadata() or {}).get("aliases", "{}"))
        state = load_file(path)
    except FileNotFoundError as error:
        raise UserError("weights", f"{path} does not exist", "check the path") from error
    except (SafetensorError, OSError) as error:
        raise UserError("weights", f"{path} cannot be read ({error})", "give a complete safetensors file") from error
    return state | {alias: state[name] for alias, name in aliases.items()}


def load_tensors(module: nn.Module, path: Path) -> None:
    """Load a safetensors file into a module after checking every name and shape.

    Raises:
        UserError: the file is missing, damaged or of another architecture.
    """
    state = _read_tensors(path)
    check_fingerprint({name: list(tensor.shape) for name, tensor in state.items()}, module, path)
    module.load_state_dict(state)


def save_weights(module: nn.Module, path: Path | str, config: Mapping[str, Any] | None = None) -> Path:
    """Save a finished module: `path` (safetensors) and its configuration beside it as JSON.

    Args:
        module: what to save; tied tensors are stored once.
        path: target file; the suffix becomes `.safetensors`.
        config: what rebuilds the module, JSON values only; `module.config` when left out and present.

    Returns:
        The path of the weights.
    """
    path = Path(path).with_suffix(".safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    if config is None:
        config = getattr(module, "config", None)
    if config is not None:
        write_text(path.with_suffix(".json"), json.dumps(dict(config), indent=2) + "\n")
    write_tensors(path, module.state_dict())
    return path


def load_weights(module: nn.Module, path: Path | str) -> None:
    """Load weights saved by `save_weights` into a module of the same architecture.

    Raises:
        UserError: the file is missing, damaged or of another architecture.
    """
    load_tensors(module, Path(path).with_suffix(".safetensors"))


def read_config(path: Path | str) -> dict[str, Any]:
    """The configuration saved beside the weights at `path`.

    Raises:
        UserError: there is none, or it is not JSON.
    """
    path = Path(path).with_suffix(".json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError("weights", f"{path} does not exist", "keep the JSON file beside the weights") from error
    except ValueError as error:
        raise UserError("weights", f"{path} is not JSON ({error})", "restore the file") from error
    if not isinstance(config, dict):
        raise UserError("weights", f"{path} holds no configuration", "restore the file")
    return config


class CheckpointFolder:
    """The last few training states of a run.

    A checkpoint is a folder `update_<n>` with `weights.safetensors` (without frozen parameters), `state.pt` (loadable
    with `weights_only=True`), `meta.json` and, when a best module is kept, `best.safetensors`. It is written under a
    temporary name and renamed when every file has reached the disk, so a crash at any moment leaves the previous one
    in place.

    Args:
        path: folder of the checkpoints.
        keep: how many of the newest to keep.
    """

    def __init__(self, path: Path, keep: int = 2) -> None:
        self.path, self.keep = path, keep

    def _complete(self) -> list[Path]:
        found = (path for path in self.path.glob("update_*") if (path / "meta.json").is_file())
        return sorted(found, key=lambda path: int(path.name.removeprefix("update_")))

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        complete = self._complete()
        return complete[-1] if complete else None

    def save(
        self, update: int, module: nn.Module, state: Mapping[str, Any], best: Mapping[str, Tensor] | None = None
    ) -> Path:
        """Write a checkpoint and remove the ones that are too old.

        Args:
            update: number of finished updates.
            module: everything trained or needed for it; of frozen parameters only sums are stored.
            state: tensors, numbers, strings and containers of them.
            best: state dict of the best module so far.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for left in self.path.glob(TEMPORARY + "*"):  # of a run that was killed
            shutil.rmtree(left)
        target = self.path / f"update_{update:08d}"
        if not target.exists():
            temporary = self.path / f"{TEMPORARY}{target.name}"
            temporary.mkdir()
            try:
                write_tensors(temporary / "weights.safetensors", learned_state(module))
                if best is not None:
                    write_tensors(temporary / "best.safetensors", best)
                with open(temporary / "state.pt", "wb") as file:
                    torch.save(dict(state), file)
                    file.flush()
                    os.fsync(file.fileno())
                meta = {"update": update, "torch": torch.__version__, "tensors": fingerprint(module)}
                meta |= {"frozen": frozen_sums(module)}
                write_text(temporary / "meta.json", json.dumps(meta, indent=1) + "\n")
                _sync(temporary)
                os.replace(temporary, target)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            _sync(self.path)
        for old in self._complete()[: -self.keep]:
            doomed = old.with_name(TEMPORARY + old.name)
            os.replace(old, doomed)  # a half-deleted folder must not look complete
            shutil.rmtree(doomed)
        return target

    def load(
        self, module: nn.Module, device: torch.device | str = "cpu"
    ) -> tuple[dict[str, Any], dict[str, Tensor] | None] | None:
        """Load the newest checkpoint into `module`.

        Returns:
            The saved state and the best state dict; None when there is no checkpoint.

        Raises:
            UserError: the checkpoint is of another architecture, of other frozen parameters, or damaged.
        """
        latest = self.latest()
        if latest is None:
            return None
        meta = json.loads((latest / "meta.json").read_text(encoding="utf-8"))
        check_fingerprint(meta["tensors"], module, latest)
        saved = _read_tensors(latest / "weights.safetensors")
        learned, shapes = learned_state(module), fingerprint(module)
        kept = {name: shape for name, shape in shapes.items() if name not in learned}
        check_fingerprint(kept | {name: list(tensor.shape) for name, tensor in saved.items()}, module, latest)
        here = frozen_sums(module)
        other = [name for name, value in meta.get("frozen", {}).items() if here.get(name, value) != value]
        if other:
            problem = f"frozen {other[0]!r} has other values than when {latest} was written"
            raise UserError("checkpoint", problem, "load the denoiser of the interrupted run")
        module.load_state_dict(saved, strict=False)
        try:
            # RNG states must stay on the host, so nothing is mapped here; optimisers move their own state.
            state: dict[str, Any] = torch.load(latest / "state.pt", map_location="cpu", weights_only=True)
        except Exception as error:
            raise UserError(
                "checkpoint", f"{latest / 'state.pt'} cannot be read ({error})", "delete this checkpoint and resume"
            ) from error
        best = latest / "best.safetensors"
        if not best.exists():
            return state, None
        return state, {name: tensor.to(device) for name, tensor in _read_tensors(best).items()}
