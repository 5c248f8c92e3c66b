"""Numbers that change over a fit: KL weight, guide temperature, step price."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from orderppl.errors import UserError


@dataclass(frozen=True)
class Anneal:
    """A value that moves in a straight line from `start` to `end` and stays there.

    Args:
        start: value at update 0.
        end: value from update `updates` on.
        updates: length of the change; 0 gives `end` at once.

    Raises:
        UserError: a negative length, or a value that is not finite.
    """

    start: float
    end: float
    updates: int

    def __post_init__(self) -> None:
        if self.updates < 0:
            raise UserError("updates", f"an annealing length of {self.updates} is negative", "use 0 or more")
        if not (math.isfinite(self.start) and math.isfinite(self.end)):
            raise UserError("start/end", f"{self.start} -> {self.end} is not finite", "use finite values")

    def __call__(self, update: int) -> float:
        """Value at the 0-based `update`."""
        if update >= self.updates:
            return self.end
        return self.start + (self.end - self.start) * (max(update, 0) / self.updates)


def set_number(targets: Mapping[str, Any], name: str, value: float) -> None:
    """Set a number inside a named object.

    Args:
        targets: the objects a name may start with, e.g. `{"model": ..., "guide": ..., "objective": ...}`.
        name: dotted path, e.g. `guide.temperature` or `model.step_price`.
        value: the new value; a tensor (buffer) is filled in place, a plain number replaced.

    Raises:
        UserError: no such object, no such attribute, or the attribute is not a number.
    """
    root, *path = name.split(".")
    if root not in targets or not path:
        raise UserError(name, f"names no number of {', '.join(targets)}", "use e.g. guide.temperature")
    owner = current = targets[root]
    for depth, part in enumerate(path):
        owner = current
        if not hasattr(owner, part):
            problem = f"{'.'.join([root, *path[:depth]])} ({type(owner).__name__}) has no attribute {part!r}"
            raise UserError(name, problem, "name an attribute it has")
        current = getattr(owner, part)
    if isinstance(current, Tensor):
        current.data.fill_(value)
    elif isinstance(current, int | float) and not isinstance(current, bool):
        setattr(owner, path[-1], value)
    else:
        raise UserError(name, f"is a {type(current).__name__}, not a number", "name a numeric attribute")
