"""How many positions to reveal at each step, row by row.

A schedule is the cumulative number of positions revealed before a step. Every schedule reveals at least one position a
step while any is masked, and exactly the row's length in all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from orderppl.errors import UserError


class SetSizes(ABC):
    """Set sizes as a function of a row's length and the step."""

    name: str

    @abstractmethod
    def planned(self, positions: Tensor, step: Tensor, num_steps: Tensor | int) -> Tensor:
        """Positions to have been revealed before `step`, not yet limited to the row's length: int64 [*]."""

    def cumulative(self, positions: Tensor, step: Tensor, num_steps: Tensor | int) -> Tensor:
        """Number of positions revealed before `step`.

        Args:
            positions: int64 [*], length of the row.
            step: int64 [*], from 0 (nothing revealed) to `num_steps` (all revealed).
            num_steps: the step budget T, one number or int64 [*].

        Returns:
            int64 [*], broadcast.
        """
        planned = torch.maximum(self.planned(positions, step, num_steps), step)  # at least one a step
        return torch.where(step >= num_steps, positions, torch.minimum(planned, positions))

    def sizes(self, positions: Tensor, step: Tensor, num_steps: Tensor | int) -> Tensor:
        """Number of positions to reveal at `step`: int64 [*]; arguments as for `cumulative`."""
        return self.cumulative(positions, step + 1, num_steps) - self.cumulative(positions, step, num_steps)


def _check_num_steps(num_steps: int | None) -> None:
    if num_steps is not None and num_steps < 1:
        raise UserError("num_steps", f"a schedule of {num_steps} steps", "give at least 1, or leave it out")


@dataclass(frozen=True)
class UniformSizes(SetSizes):
    """Equal sets: floor(n (t + 1) / T) - floor(n t / T), which spreads the remainder over the steps.

    Args:
        num_steps: T; the decoder's budget when left out. Rows shorter than T reveal one position a step.
    """

    num_steps: int | None = None
    name = "uniform"

    def __post_init__(self) -> None:
        _check_num_steps(self.num_steps)

    def planned(self, positions: Tensor, step: Tensor, num_steps: Tensor | int) -> Tensor:
        """Return floor(n t / T), with T at most n."""
        total = positions.clamp(max=num_steps if self.num_steps is None else self.num_steps).clamp(min=1)
        return positions * step // total


@dataclass(frozen=True)
class CosineSizes(SetSizes):
    """Small sets first: a share cos(pi/2 * t/T) is still masked before step t (MaskGIT, arXiv 2202.04200).

    Args:
        num_steps: T; the decoder's budget when left out.
    """

    num_steps: int | None = None
    name = "cosine"

    def __post_init__(self) -> None:
        _check_num_steps(self.num_steps)

    def planned(self, positions: Tensor, step: Tensor, num_steps: Tensor | int) -> Tensor:
        """Return n (1 - cos(pi/2 * t/T)), rounded half up."""
        total = num_steps if self.num_steps is None else self.num_steps
        share = (step.double() / total).clamp(max=1.0)
        # Rounding half up keeps every step after the first of size one or more non-empty, because the curve is convex.
        return (positions * (1.0 - (share * (torch.pi / 2)).cos()) + 0.5).floor().long()


@dataclass(frozen=True)
class LladaSizes(SetSizes):
    """LLaDA's rounding: floor(n / T) positions a step, and one more in each of the first n mod T steps."""

    name = "llada"

    def planned(self, positions: Tensor, step: Tensor, num_steps: Tensor | int) -> Tensor:
        """Return t floor(n / T) + min(t, n mod T)."""
        return step * (positions // num_steps) + torch.minimum(step, positions % num_steps)


@dataclass(frozen=True)
class DreamSizes(SetSizes):
    """Dream's rounding: floor(m (1 - u_{t+1} / u_t)) of the m positions that are left, u_t from 1 to `end` in T steps.

    Its sampler may reveal nothing at a step; here that is one position.

    Args:
        end: last time u_T, above 0.
    """

    end: float = 1e-3
    name = "dream"

    def planned(self, positions: Tensor, step: Tensor, num_steps: Tensor | int) -> Tensor:
        """Follow the steps one by one."""
        left, budget = positions.clone(), torch.as_tensor(num_steps, dtype=torch.float64, device=positions.device)
        for t in range(int(step.max())):
            now, then = (1 - (1 - self.end) * (t + i) / budget for i in (0, 1))
            moved = (left * (1 - then / now)).floor().long().clamp(min=0)
            left = torch.where(t < step, left - moved, left)
        return positions - left


@dataclass(frozen=True)
class FractionalSizes(SetSizes):
    """A mix of floor and ceiling whose mean is `mean`: floor(m (t + 1)) - floor(m t).

    Args:
        mean: positions per step, at least 1. A row needs about length / mean steps, whatever the budget; what is left
            at the last budgeted step is revealed there.
    """

    mean: float
    name = "fractional"

    def __post_init__(self) -> None:
        if not self.mean >= 1:
            raise UserError("mean", f"{self.mean} positions a step", "give 1 or more")

    def planned(self, positions: Tensor, step: Tensor, num_steps: Tensor | int) -> Tensor:
        """Return floor(m t)."""
        return (self.mean * step.double() + 1e-9).floor().long()  # so that 1.1 * 10 does not lose one to rounding


def make_sizes(sizes: SetSizes | str | float) -> SetSizes:
    """Read a schedule: an object, a name such as "uniform", or a number (mean positions per step).

    Raises:
        UserError: for any other value.
    """
    if isinstance(sizes, SetSizes):
        return sizes
    if isinstance(sizes, (int, float)):
        return FractionalSizes(float(sizes))
    if sizes not in NAMED:
        raise UserError("sizes", f"unknown schedule {sizes!r}", f"use {', '.join(NAMED)} or positions per step")
    return NAMED[sizes]()


NAMED: dict[str, type[SetSizes]] = {
    "uniform": UniformSizes,
    "cosine": CosineSizes,
    "llada": LladaSizes,
    "dream": DreamSizes,
}
