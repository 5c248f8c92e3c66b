"""The constructor is the config: from objects to class paths with arguments, and back."""

from __future__ import annotations

import functools
import inspect
import numbers
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

from orderppl.calls import PLAIN, call_of
from orderppl.errors import UserError, first_line, is_out_of_memory
from orderppl.import_paths import admits_import, admits_text, dotted, import_path, locate, parameters_of, suggest

F = TypeVar("F", bound=Callable[..., Any])
LARGEST_TENSOR = 4096  # values that a description can hold


class Configurable:
    """Remembers how it was constructed, so that `describe` can write it down and `build` can make it again.

    A mixin for classes of any kind: modules, Pyro modules, dataclasses. What counts are the arguments of the outermost
    constructor, and plain defaults of those that were not given.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Record the call; deep copies and pickles carry the record along."""
        if (args or kwargs) and cls.__init__ is object.__init__:
            raise TypeError(f"{cls.__name__}() takes no arguments")
        made = super().__new__(cls)
        object.__setattr__(made, "_made_by", (cls, args, kwargs))  # modules refuse attributes before their __init__
        return made


def recorded(function: F) -> F:
    """Decorate a function or classmethod that loads an object: `describe` names the function and its arguments."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        made = function(*args, **kwargs)
        object.__setattr__(made, "_made_by", (call, args, kwargs))
        return made

    call._is_recorded = True  # type: ignore[attr-defined]
    return typing.cast(F, call)


def tensor(data: Any, dtype: str) -> Any:
    """Make a small tensor; how a description writes one."""
    import torch

    return torch.tensor(data, dtype=getattr(torch, dtype))


# ---- from objects to descriptions


def describe(thing: Any, *, for_call: bool = False) -> Any:
    """Write an object down as plain values: `{"class_path": "pkg.Class", "init_args": {...}}`, nested.

    An object that is met twice is one and the same dict, which YAML keeps by an anchor. Lists and dicts of objects are
    described item by item; functions and classes are their import path. Where an argument is annotated as a Callable, a
    `functools.partial` is the class or function with the arguments it has so far.

    Args:
        thing: a `Configurable`, something made by a `recorded` function, or any object that keeps its constructor's
            arguments in attributes of the same names.
        for_call: `thing` is to be called: a partial is described as what it calls.

    Raises:
        UserError: an argument that is not known any more, or that cannot be written.
    """
    return _describe(thing, "", {}, for_call)


def _describe(value: Any, field: str, seen: dict[int, tuple[Any, dict[str, Any]]], for_call: bool = False) -> Any:
    torch = sys.modules.get("torch")
    if value is None or type(value) in PLAIN:
        return value
    if isinstance(value, (str, Path)) or (torch and isinstance(value, (torch.dtype, torch.device))):
        return str(value)
    if isinstance(value, numbers.Number):  # of numpy
        return value.item() if hasattr(value, "item") else value
    if type(value) in (set, frozenset):
        value = sorted(value, key=repr)
    if type(value) in (list, tuple):
        return [_describe(item, f"{field}[{index}]", seen) for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise UserError(field, "has keys that are no names", "use texts as keys")
        return {key: _describe(item, dotted(field, key), seen) for key, item in value.items()}
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        return import_path(value, field)
    if torch and isinstance(value, torch.Tensor):
        if value.numel() > LARGEST_TENSOR:
            problem = f"a tensor of {value.numel()} numbers is too large for a config"
            raise UserError(field, problem, "make it from smaller arguments, or keep it as a buffer")
        init_args: dict[str, Any] = {"data": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
        return {"class_path": "orderppl.config.tensor", "init_args": init_args}
    if id(value) not in seen:
        path, arguments, maker = call_of(value, field)
        if maker is functools.partial and for_call:
            path, maker = import_path(arguments.pop("func"), field), value.func
        spec: dict[str, Any] = {"class_path": path}
        seen[id(value)] = value, spec  # the value too: its id must not be given to another
        init_args = {
            key: _describe(item, dotted(field, key), seen, admits_import(maker, key)) for key, item in arguments.items()
        }
        for key, item in arguments.items():
            is_path = isinstance(init_args[key], str) and not isinstance(item, (str, Path)) and callable(item)
            if is_path and not admits_import(maker, key):
                problem = f"nothing says that {key!r} is a function or class, so its name would stay text"
                raise UserError(dotted(field, key), problem, f"annotate {key} as Callable or type[...]")
        if init_args:
            spec["init_args"] = init_args
    return seen[id(value)][1]


# ---- from descriptions to objects


def build(spec: Any, known: Mapping[str, Any] | None = None, *, trust: bool = True, field: str = "") -> Any:
    """Make what a description says; the same dict gives the same object.

    Args:
        spec: what `describe` returned, or plain values with such dicts in them; a class path alone is a string.
        known: values for arguments that are not given (or null), by their name, at every depth: an argument that is
            required, or None by default, is filled in from here.
        trust: False for a description of foreign origin: only what belongs to orderppl and torch.nn is made then.
        field: what messages call it.

    Raises:
        UserError: names the argument.
    """
    return Builder(known, trust=trust).make({"class_path": spec} if isinstance(spec, str) else spec, field)


class Builder:
    """Makes several descriptions, one after another; what they share is made once.

    Args:
        known: see `build`; may grow between two calls of `make`.
        trust: see `build`.
    """

    def __init__(self, known: Any = None, *, trust: bool = True) -> None:
        self.known, self.trust = ({} if known is None else known), trust
        self._made: dict[int, tuple[Any, Any]] = {}

    def put(self, spec: Any, made: Any) -> None:
        """Use an object wherever this description is met."""
        self._made[id(spec)] = spec, made

    def make(self, spec: Any, field: str = "", for_call: bool = False) -> Any:
        """Make one description, see `build`; `for_call`: to be called with the arguments that are still missing."""
        if isinstance(spec, (list, tuple)):
            return [self.make(item, f"{field}[{index}]") for index, item in enumerate(spec)]
        if not isinstance(spec, Mapping):
            return spec
        if "class_path" not in spec:
            return {key: self.make(item, dotted(field, str(key))) for key, item in spec.items()}
        if id(spec) not in self._made:
            self.put(spec, self._call(spec, field, for_call))
        return self._made[id(spec)][1]

    def _call(self, spec: Mapping[str, Any], field: str, for_call: bool) -> Any:
        for key in spec:
            if key not in ("class_path", "init_args"):
                raise UserError(dotted(field, str(key)), "stands beside class_path", "put arguments under init_args")
        maker = locate(spec["class_path"], trust=self.trust, field=field)
        label, given = str(spec["class_path"]).rpartition(".")[-1], spec.get("init_args") or {}
        if not callable(maker) or not isinstance(given, Mapping):
            raise UserError(field, f"{label} with {given!r} makes no object", "give a class and its arguments")
        if not self.trust and (given.get("trust_remote_code") or not _makes_safely(maker)):
            raise UserError(field, f"{spec['class_path']} may run foreign code", "allow it by trust_remote_code")
        arguments = {
            name: self.make(item, dotted(field, name), admits_import(maker, name)) for name, item in given.items()
        }
        for name, item in arguments.items():
            if isinstance(item, str) and admits_import(maker, name) and ("." in item or not admits_text(maker, name)):
                arguments[name] = locate(item, trust=self.trust, field=dotted(field, name))
        parameters = parameters_of(maker)
        for name, parameter in parameters.items():
            is_open = parameter.default is parameter.empty or parameter.default is None
            if is_open and name in self.known and arguments.get(name) is None:
                arguments[name] = self.known[name]
        missing = _check_arguments(label, parameters, arguments, field)
        if missing and for_call:
            return functools.partial(maker, **arguments)
        if missing:
            raise UserError(dotted(field, missing[0]), f"{label} needs it", f"give {dotted(field, missing[0])}")
        if maker is functools.partial:
            return functools.partial(arguments.pop("func"), **arguments)
        try:
            made = maker(**arguments)
        except UserError as error:
            raise UserError(dotted(field, error.field), error.problem or "", error.remedy) from error
        except Exception as error:
            if is_out_of_memory(error):
                raise
            problem = f"{label} cannot be made ({type(error).__name__}: {first_line(error)})"
            raise UserError(field or label, problem, "check its arguments") from error
        if "_made_by" not in getattr(made, "__dict__", {"_made_by": None}):
            object.__setattr__(made, "_made_by", (maker, (), arguments))  # known even of classes that record nothing
        return made


def _check_arguments(
    label: str, parameters: Mapping[str, inspect.Parameter], given: Iterable[str], field: str
) -> list[str]:
    """Refuse arguments that there are not; the names of those that are missing."""
    many = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {name: item for name, item in parameters.items() if item.kind not in many}
    open_ended = any(item.kind is item.VAR_KEYWORD for item in parameters.values())
    for name in given:
        if name not in named and not open_ended:
            raise UserError(dotted(field, name), f"{label} has no such argument", suggest(name, named))
    return [name for name, item in named.items() if item.default is item.empty and name not in given]


def _makes_safely(maker: Any) -> bool:
    """Whether calling it runs no code but that of orderppl and torch.nn."""
    return isinstance(maker, type) or maker is tensor or getattr(maker, "_is_recorded", False)
