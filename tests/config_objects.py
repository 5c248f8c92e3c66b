"""Objects of many kinds that the tests of descriptions take apart and put together again."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from orderppl.config import Configurable, recorded


class Network(Configurable, nn.Module):
    """A network.

    Args:
        width: of the hidden layer.
        activation: class of the non-linearity.
        inner: another one to read first.
    """

    def __init__(self, width: int, activation: type[nn.Module] = nn.GELU, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.activation, self.inner = activation(), inner


class Deep(Network):
    """A subclass whose constructor calls that of its parent with other arguments."""

    def __init__(self, layers: int, **rest: Any) -> None:
        super().__init__(2 * layers, **rest)
        self.layers = layers


class Program(Configurable, PyroModule):
    """A Pyro program around networks that may be one and the same."""

    def __init__(
        self, network: nn.Module, other: nn.Module, num_steps: int, tags: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.network, self.other, self.num_steps, self.tags = network, other, num_steps, tags


@dataclasses.dataclass(frozen=True)
class Options(Configurable):
    """A dataclass."""

    low: float = 0.5
    names: tuple[str, ...] = ()
    length: int | None = None


class Plain(nn.Module):
    """A module that derives from nothing of ours and keeps its arguments."""

    def __init__(self, size: int, mode: Literal["a", "b"] = "a") -> None:
        super().__init__()
        self.size, self.mode = size, mode
        self.layer = nn.Linear(size, 1)


class Forgetful(nn.Module):
    """A module that does not."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer = nn.Linear(size, 1)


class Graded(Configurable):
    """Takes functions and classes."""

    def __init__(self, grade: Callable[[str], float], either: Callable[[str], float] | str = "exact", loose=None):
        self.grade, self.either, self.loose = grade, either, loose


class Held(Configurable):
    """Takes values that YAML does not have."""

    def __init__(self, order: Tensor, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.order, self.dtype, self.device = order, dtype, device


class Many(Configurable):
    """Takes any number of things."""

    def __init__(self, *parts: int) -> None:
        self.parts = parts


class NoArguments(Configurable):
    """Takes nothing."""


class Picky(Configurable):
    """Refuses numbers in two ways."""

    def __init__(self, number: int) -> None:
        from orderppl.errors import UserError

        if number < 0:
            raise UserError("number", f"must be positive, got {number}", "raise it")
        self.number = 1 / number


def grade(text: str) -> float:
    """A function to be named."""
    return float(len(text))


@recorded
def load_network(name: str, *, width: int = 4) -> Network:
    """Load something by a name."""
    network = Network(width)
    network.name = name  # type: ignore[assignment]
    return network


class Wheel(Network):
    """Something that a classmethod loads."""

    @classmethod
    @recorded
    def from_wheel(cls, chain: str) -> "Wheel":
        """Load it."""
        made = cls(3)
        made.chain = chain  # type: ignore[assignment]
        return made


class Loop(Configurable):
    """Takes something that makes an optimiser."""

    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam) -> None:
        self.optimizer = optimizer
