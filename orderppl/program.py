"""What models and guides are to Pyro."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from pyro.nn import PyroModule
from torch import nn

from orderppl.config import Configurable

_ANNOUNCES: ContextVar[bool] = ContextVar("orderppl_announces", default=True)


@contextmanager
def announcing(announces: bool) -> Iterator[None]:
    """Say whether somebody listens to the `param` statements of programs: Pyro's SVI and some of its bounds do."""
    token = _ANNOUNCES.set(announces)
    try:
        yield
    finally:
        _ANNOUNCES.reset(token)


class PyroProgram(Configurable, PyroModule):
    """Base of models and guides: a PyroModule that tells Pyro of its networks only where somebody listens.

    Every access to a network makes a `param` statement per parameter, which goes through all handlers and plates: a
    large denoiser would take longer to announce than a small one to run. What is frozen has nothing to announce, and
    `fit` keeps the parameters in the modules, where nobody asks a store for them (see `announcing`).
    """

    def __getattr__(self, name: str) -> Any:
        module = self.__dict__.get("_modules", {}).get(name)
        if not isinstance(module, nn.Module) or isinstance(module, PyroModule):
            return super().__getattr__(name)
        is_heard = _ANNOUNCES.get() and any(p.requires_grad for p in module.parameters())
        return super().__getattr__(name) if is_heard else module
