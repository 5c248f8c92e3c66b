"""How the programs of a pair are called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
from pyro.nn import PyroModule
from torch import Tensor, nn

Program = Callable[..., Any]

ARGUMENTS = ("tokens", "attention_mask", "context", "context_mask")  # of every model and guide, in order


def positional(batch: Mapping[str, Tensor]) -> tuple[Tensor | None, ...]:
    """A batch as positional arguments: Pyro's effect handlers have an argument of their own called `context`."""
    return tuple(batch.get(name) for name in ARGUMENTS)


def make_local(program: Program) -> None:
    """Let a program built under either value of `module_local_params` run under True.

    Pyro 1.9 gives a module the place for local parameters when it is made, and fails later when that is missing.
    """
    for module in program.modules() if isinstance(program, nn.Module) else ():
        if isinstance(module, PyroModule) and not hasattr(module._pyro_context, "param_state"):
            module._pyro_context.param_state = {"params": {}, "constraints": {}}


@contextmanager
def local_parameters(*programs: Program) -> Iterator[None]:
    """Run programs on their own parameters, whatever Pyro's global setting and store hold."""
    for program in programs:
        make_local(program)
    with pyro.settings.context(module_local_params=True):
        yield
