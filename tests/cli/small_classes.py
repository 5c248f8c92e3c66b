"""A command and classes that nothing knows but their path, for the tests of the parser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from somewhere import Unknown


class Reader(Protocol):
    """What nothing has to derive from."""

    mask_index: int

    def __call__(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """Read."""
        ...


class Part(nn.Module):
    """A part.

    Args:
        width: of the hidden vectors.
        rate: a share.
        mode: how.
        inner: another part.
        vocab_size: what a run knows.
    """

    def __init__(
        self,
        width: int,
        rate: float = 0.5,
        mode: Literal["a", "b"] = "a",
        inner: Part | None = None,
        *,
        vocab_size: int,
    ) -> None:
        super().__init__()
        self.width, self.vocab_size, self.inner = width, vocab_size, inner


class Duck:
    """Derives from nothing, is annotated with everything."""

    def __init__(
        self,
        reader: Reader,
        price: float | Part = 0.0,
        grade: Callable[[str], float] | str = "exact",
        later: Unknown | None = None,
        order: Tensor | None = None,
        anything: Any = None,
        dtype: torch.dtype = torch.float32,
        sizes: Sequence[int] = (1, 2),
        parts: list[Part] | None = None,
        kind: type[nn.Module] = nn.GELU,
        untyped=3,
    ) -> None:
        self.reader = reader


class MyReader(nn.Module):
    """A reader without annotations."""

    def __init__(self, size=3):
        super().__init__()


def load_reader(path, *, strict: bool = False):
    """Load a reader.

    Args:
        path: where it is.
        strict: whether to look twice.
    """


def grade(text: str) -> float:
    """Grade."""
    return 1.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How.

    Args:
        updates: how many.
        optimizer: makes it.
        rates: one, or one per part.
        progress: show it.
    """

    updates: int = 10
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam
    rates: float | dict[str, float] | None = None
    progress: bool = True


@dataclass(frozen=True, kw_only=True)
class Config:
    """A command for tests.

        orderppl small --part small_classes.Part

    Args:
        part: the part.
        reader: reads.
        num_steps: how many.
        fit: how.
        names: of things.
        grids: of things.
        resume: go on.
        out: where.
    """

    part: Part
    reader: Reader | None = None
    num_steps: int = 4
    fit: Settings = field(default_factory=Settings)
    names: list[str] = field(default_factory=list)
    grids: list[dict[str, Any]] = field(default_factory=list)
    resume: bool = False
    out: str = "runs/small"
    POSITIONAL = "names"
