"""The call that an object was made by: recorded, or read off its attributes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sized
from typing import Any

from orderppl.errors import UserError
from orderppl.import_paths import dotted, import_path, signature_of

PLACES = ("device", "dtype")  # of torch's constructors, which keep neither
PLAIN = (bool, int, float, str)


def call_of(thing: Any, field: str) -> tuple[str, dict[str, Any], Any]:
    """The path of what makes `thing`, its arguments by name, and the maker itself."""
    if isinstance(thing, functools.partial):
        given = signature_of(thing.func).bind_partial(*thing.args).arguments
        return "functools.partial", {"func": thing.func, **given, **thing.keywords}, functools.partial
    state = getattr(thing, "__dict__", {})
    compiled = state.get("_modules", {}).get("_orig_mod")
    if compiled is not None:
        return call_of(compiled, field)
    if "_made_by" not in state:
        return import_path(type(thing), field), dict(_kept_arguments(thing, field)), type(thing)
    maker, args, kwargs = state["_made_by"]
    signature = signature_of(maker)
    given = signature.bind(*args, **kwargs).arguments
    arguments: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        if name in given and parameter.kind is parameter.VAR_POSITIONAL:
            raise UserError(dotted(field, name), f"{maker.__name__} takes any number of them", "take one list instead")
        if name in given:
            arguments |= given[name] if parameter.kind is parameter.VAR_KEYWORD else {name: given[name]}
        elif parameter.default is None or type(parameter.default) in PLAIN:  # another version may have others
            arguments[name] = parameter.default
    if isinstance(arguments.get("cls"), type):  # a classmethod
        return f"{import_path(arguments.pop('cls'), field)}.{maker.__name__}", arguments, maker
    return import_path(maker, field), arguments, maker


def _kept_arguments(thing: Any, field: str) -> Iterator[tuple[str, Any]]:
    """Arguments of a constructor that recorded nothing, from attributes of the same names."""
    kind = type(thing)
    if kind.__init__.__qualname__ in ("Module.__init__", "object.__init__"):
        return
    for name, parameter in signature_of(kind).parameters.items():
        is_open = parameter.kind is inspect.Parameter.VAR_POSITIONAL
        if parameter.kind is inspect.Parameter.VAR_KEYWORD or (is_open and not isinstance(thing, Sized)):
            continue
        if not hasattr(thing, name) or is_open:  # torch.nn.Sequential
            if name in PLACES:
                continue
            problem = f"{kind.__name__} does not keep its argument {name!r}"
            remedy = f"set self.{name} = {name} in its constructor, or derive it from orderppl.config.Configurable"
            raise UserError(dotted(field, name), problem, remedy)
        value = getattr(thing, name)
        if isinstance(parameter.default, bool) and not isinstance(value, bool):  # `bias` of torch.nn.Linear
            value = value is not None
        yield name, value
