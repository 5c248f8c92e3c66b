"""Training states on disk: each appears complete or not at all, and is never unpickled."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orderppl.errors import UserError, first_line
from orderppl.files import TEMPORARY, appearing, check_shapes, shapes_of
from orderppl.identity import bit_sum


class CheckpointFolder:
    """The last few training states of a run, in files `update_<n>.pt` that `torch.load(weights_only=True)` reads.

    Args:
        path: folder of the checkpoints.
        keep: how many of the newest to keep.
    """

    def __init__(self, path: Path, keep: int = 2) -> None:
        self.path, self.keep = path, keep

    def latest(self) -> Path | None:
        """The newest checkpoint, or None."""
        return max(self.path.glob("update_*.pt"), default=None)

    def save(self, state: Mapping[str, Any]) -> Path:
        """Write a checkpoint and remove the ones that are too old.

        Args:
            state: tensors, numbers, strings and containers of them; `update` says how far it is.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for left in self.path.glob(TEMPORARY + "*"):  # of a run that was killed
            left.unlink()
        target = self.path / f"update_{state['update']:08d}.pt"
        if not target.exists():
            with appearing(target) as temporary:
                torch.save(dict(state), temporary)
        for old in sorted(self.path.glob("update_*.pt"))[: -self.keep]:
            os.remove(old)
        return target

    def load(self) -> dict[str, Any] | None:
        """The newest state, on the host; None when there is none.

        Raises:
            UserError: it is damaged.
        """
        latest = self.latest()
        if latest is None:
            return None
        try:
            state: dict[str, Any] = torch.load(latest, map_location="cpu", weights_only=True)
            return state
        except Exception as error:
            problem = f"{latest} cannot be read ({first_line(error)})"
            raise UserError("checkpoint", problem, "delete this checkpoint and resume") from error


def learned_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict without frozen parameters, such as those of a public denoiser: they are as they were built."""
    parameters = module.named_parameters(remove_duplicate=False)
    frozen = {name for name, parameter in parameters if not parameter.requires_grad}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}


def frozen_sums(module: nn.Module) -> dict[str, int]:
    """A number for every frozen parameter that tells other values; see `bit_sum`."""
    return {
        name: bit_sum(module, name, parameter)
        for name, parameter in module.named_parameters()
        if not parameter.requires_grad
    }


def module_state(module: nn.Module) -> dict[str, Any]:
    """What a checkpoint holds of a module: what is learned, and what tells whether the rest is the same."""
    return {"learned": learned_state(module), "shapes": shapes_of(module), "frozen": frozen_sums(module)}


def load_module_state(module: nn.Module, saved: Mapping[str, Any], source: str = "the checkpoint") -> None:
    """Load what is learned into a module whose frozen parameters are as they were.

    Raises:
        UserError: another architecture, other frozen parameters, or other values of them.
    """
    learned, shapes = learned_state(module), shapes_of(module)
    check_shapes(saved["shapes"], shapes, source)
    kept = {name: shape for name, shape in shapes.items() if name not in learned}
    check_shapes(kept | {name: list(tensor.shape) for name, tensor in saved["learned"].items()}, shapes, source)
    here = frozen_sums(module)
    other = [name for name, value in saved["frozen"].items() if here.get(name, value) != value]
    if other:
        problem = f"frozen {other[0]!r} has other values than when {source} was written"
        raise UserError("checkpoint", problem, "load the denoiser of the interrupted run")
    module.load_state_dict(saved["learned"], strict=False)
