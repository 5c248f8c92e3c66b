"""What models and guides are to Pyro."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from pyro.poutine import runtime
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from orderppl.config import Configurable
from orderppl.errors import UserError

_ANNOUNCES: ContextVar[bool] = ContextVar("orderppl_announces", default=True)
_announced = WeakTensorKeyDictionary()  # parameters of programs of this process


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
        if is_heard and self._pyro_context.active:
            _agree_with_store(self._pyro_get_fullname(name), module)
        return super().__getattr__(name) if is_heard else module


@torch.no_grad()
def _agree_with_store(name: str, module: nn.Module) -> None:
    """Make the parameters of a network those of Pyro's store.

    What was loaded into the store is copied into the network; parameters of an earlier program of this process, which
    Pyro would train instead, give way.
    """
    store = pyro.get_param_store()
    for key, parameter in module.named_parameters():
        full = pyro.params.param_store.param_with_module_name(name, key)
        if parameter.requires_grad and full in store and (stored := store._params[full]) is not parameter:
            if stored not in _announced:
                if stored.shape != parameter.shape:
                    problem = f"{full} has shape {list(stored.shape)} in the store, {list(parameter.shape)} here"
                    raise UserError("param_store", problem, "load the store of the same programs, or clear it")
                parameter.copy_(stored)
            del store[full]  # the `param` statement that follows puts the network's own there
        _announced[parameter] = True


def rows_plate(size: int) -> AbstractContextManager[Any]:
    """The plate over the sequences of a batch: that around the program, such as a subsampled one, where there is one.

    Raises:
        UserError: the plate around it is of another size.
    """
    for frame in runtime._PYRO_STACK:
        if isinstance(frame, pyro.plate) and frame.dim == -1:
            if frame.subsample_size != size:
                problem = f"{frame.name!r} has {frame.subsample_size} elements, the batch {size} sequences"
                raise UserError("plate", problem, "give the rows that the plate has drawn, or another dim than -1")
            return nullcontext()
    plate: AbstractContextManager[Any] = pyro.plate("batch", size, dim=-1)
    return plate
