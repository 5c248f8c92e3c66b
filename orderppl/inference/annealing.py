"""Numbers that change over a fit: KL weight, guide temperature, step price."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from orderppl.errors import UserError


@dataclass(frozen=True)
class Anneal:
    """A value that moves from `start` to `end` and stays there.

    Attributes:
        start: value at update 0.
        end: value from update `updates` on.
        updates: length of the change; 0 gives `end` at once.
        shape: `linear`, `cosine` (flat at both ends) or `exponential` (constant ratio; needs positive values).

    Raises:
        UserError: an unknown shape, a negative length, or an exponential through zero.
    """

    start: float
    end: float
    updates: int
    shape: Literal["linear", "cosine", "exponential"] = "linear"

    def __post_init__(self) -> None:
        if self.shape not in ("linear", "cosine", "exponential"):
            raise UserError("shape", f"unknown annealing shape {self.shape!r}", "use linear, cosine or exponential")
        if self.updates < 0:
            raise UserError("updates", f"an annealing length of {self.updates} is negative", "use 0 or more")
        if not (math.isfinite(self.start) and math.isfinite(self.end)):
            raise UserError("start/end", f"{self.start} -> {self.end} is not finite", "use finite values")
        if self.shape == "exponential" and (self.start <= 0 or self.end <= 0):
            raise UserError(
                "start/end", f"{self.start} -> {self.end} has no constant ratio", "use positive values or shape linear"
            )

    def __call__(self, update: int) -> float:
        """Value at the 0-based `update`."""
        if update >= self.updates:
            return self.end
        part = max(update, 0) / self.updates
        if self.shape == "cosine":
            part = (1 - math.cos(math.pi * part)) / 2
        if self.shape == "exponential":
            return float(self.start * (self.end / self.start) ** part)
        return self.start + (self.end - self.start) * part


def set_dial(targets: Mapping[str, Any], name: str, value: float) -> None:
    """Set a number inside a named object.

    Args:
        targets: the objects a name may start with, e.g. `{"model": ..., "guide": ..., "elbo": ...}`.
        name: dotted path, e.g. `guide.temperature` or `model.prior.price`.
        value: the new value; a tensor (buffer) is filled in place, a plain number replaced.

    Raises:
        UserError: no such object, no such attribute, or the attribute is not a number.
    """
    root, *path = name.split(".")
    if root not in targets or not path:
        raise UserError(name, f"names no dial of {', '.join(sorted(targets))}", "use e.g. guide.temperature")
    owner: Any = targets[root]
    for i, part in enumerate(path):
        if not hasattr(owner, part):
            parent = ".".join([root, *path[:i]])
            raise UserError(
                name, f"{parent} ({type(owner).__name__}) has no attribute {part!r}", "name an attribute it has"
            )
        if i < len(path) - 1:
            owner = getattr(owner, part)
    current = getattr(owner, path[-1])
    if isinstance(current, Tensor):
        current.data.fill_(value)
    elif isinstance(current, (int, float)) and not isinstance(current, bool):
        setattr(owner, path[-1], value)
    else:
        raise UserError(name, f"is a {type(current).__name__}, not a number", "name a numeric attribute")
