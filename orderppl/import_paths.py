"""Dotted import paths: of a class or function, and what one says; what an argument's annotation admits."""

from __future__ import annotations

import difflib
import functools
import inspect
import sys
import types
import typing
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from orderppl.errors import UserError, first_line

HOMES = (
    *(f"orderppl.{name}" for name in ("policies", "models", "guides", "inference", "data", "models.denoisers")),
    "torch.optim",
)
"""Packages whose public names need no path: `Threshold` is `orderppl.policies.Threshold`."""
TRUSTED = ("orderppl.", "torch.", "functools.partial")


def import_path(thing: Any, field: str = "class_path") -> str:
    """The shortest dotted path by which a class or function can be imported.

    Raises:
        UserError: it has none, such as a lambda.
    """
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    bound = getattr(thing, "__self__", None)
    if not module or not name or "<" in name or not (bound is None or isinstance(bound, (type, types.ModuleType))):
        raise UserError(field, f"{name or thing!r} cannot be imported by a name", "define it at the top of a module")
    if module == "__main__":
        module = _main_name() or module
    parts = module.split(".")
    for size in range(1, len(parts)):
        package = sys.modules.get(".".join(parts[:size]))
        if package is not None and getattr(package, name, None) is thing:
            return f"{package.__name__}.{name}"
    return f"{module}.{name}"


def _main_name() -> str | None:
    """The name under which the running script can be imported; None for a notebook, or if another module has it."""
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    name = spec.name if spec is not None else Path(file).stem if file else None
    taken = sys.modules.get(name or "", main) is not main  # the command `orderppl` is no package `orderppl`
    return None if taken else name


def locate(path: str, *, trust: bool = True, field: str = "class_path") -> Any:
    """Import what a dotted path or a short name says.

    Args:
        path: such as `my_module.MyGuide`, or a public name of orderppl's packages or torch.optim.
        trust: False: only what belongs to orderppl and torch.nn.
        field: what messages call it.

    Raises:
        UserError: there is no such thing, its module fails, or it is not trusted.
    """
    parts = path.split(".") if isinstance(path, str) else [""]
    if not all(part.isidentifier() for part in parts):
        raise UserError(field, f"{path!r} is no import path", "write module.Class")
    if len(parts) == 1:
        return _public_name(path, field)
    if not trust and not path.startswith(TRUSTED):
        raise UserError(field, f"{path} would run code of its own", "allow it by trust_remote_code")
    module, size = _import_longest(parts, field)
    thing = module
    for part in parts[size:]:
        if not hasattr(thing, part):
            problem = f"{'.'.join(parts[:size])} has no {'.'.join(parts[size:])}"
            raise UserError(field, problem, suggest(part, [name for name in dir(thing) if name[0] != "_"]))
        thing = getattr(thing, part)
    owner = str(getattr(thing, "__module__", None))
    if not trust and not owner.startswith(("orderppl.", "torch.nn.", "functools")):
        raise UserError(field, f"{path} belongs to {owner}", "allow it by trust_remote_code")
    return thing


def _public_name(name: str, field: str) -> Any:
    known: list[str] = []
    for home in map(import_module, HOMES):
        names = getattr(home, "__all__", None) or [item for item in vars(home) if item[0] != "_"]
        if name in names:
            return getattr(home, name)
        known += names
    problem = f"no class of orderppl is called {name!r}"
    raise UserError(field, problem, f"{suggest(name, sorted(known))}; your own: module.{name}")


def _import_longest(parts: list[str], field: str) -> tuple[Any, int]:
    """The module that a path begins with, and how many parts are its name."""
    main = sys.modules["__main__"]
    for size in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:size])
        if name == _main_name():
            return main, size
        try:
            return import_module(name), size
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise UserError(field, f"{name} cannot be imported ({error})", "install what it needs") from error
        except (Exception, SystemExit) as error:
            problem = f"{name} cannot be imported ({type(error).__name__}: {first_line(error)})"
            raise UserError(field, problem, "correct the module") from error
    remedy = "put it into the current folder, or install it"
    raise UserError(field, f"there is no module {parts[0]!r}", remedy)


def signature_of(maker: Any) -> inspect.Signature:
    """That of a call. A class that inherits its constructor has the signature of the one that it inherits from.

    Python 3.11.2 takes an inherited `__new__`, such as that of `Configurable`, before a nearer `__init__`.
    """
    if isinstance(maker, type) and not hasattr(maker, "__signature__"):
        maker = next(kind for kind in maker.__mro__ if {"__init__", "__new__"} & vars(kind).keys())
    return inspect.signature(maker)


def parameters_of(maker: Any) -> dict[str, inspect.Parameter]:
    """The arguments of a class or function, without `self`."""
    try:
        return dict(signature_of(maker).parameters)
    except ValueError:  # of a class written in C
        return {"kwargs": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)}


def admits_import(maker: Any, name: str) -> bool:
    """Whether a text given to this argument may stand for a function, a class or a dtype."""
    if maker is functools.partial:
        return name == "func"
    hint, default = _hint(maker, name)
    words = ("Callable", "type[", "dtype", "<class 'type'>")
    return any(word in hint for word in words) or hint == "type" or (callable(default) and hint == "")


def admits_text(maker: Any, name: str) -> bool:
    """Whether this argument may also be plain text."""
    hint, _ = _hint(maker, name)
    return any(word in hint for word in ("str", "Literal"))


def _hint(maker: Any, name: str) -> tuple[str, Any]:
    """The annotation of an argument as text, with what its names stand for where that is known, and its default."""
    parameter = parameters_of(maker).get(name)
    if parameter is None or parameter.annotation is parameter.empty:
        return "", None if parameter is None else parameter.default
    function = inspect.getattr_static(maker, "__init__") if isinstance(maker, type) else maker
    try:
        return str(typing.get_type_hints(function)[name]), parameter.default
    except Exception:  # names imported for type checkers only
        return str(parameter.annotation), parameter.default


def suggest(given: str, known: Iterable[str]) -> str:
    """What to write instead of a name that is not known."""
    names = [name for name in known if name != "self"]
    close = difflib.get_close_matches(given, names, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"known: {', '.join(names[:20])}" if names else "leave it out"


def dotted(path: str, name: str) -> str:
    """The name of a field inside another one."""
    return f"{path}.{name}" if path else name
