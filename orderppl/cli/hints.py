"""Which values a parser takes for an annotated argument: plain ones strictly, objects by any class path."""

from __future__ import annotations

import abc
import collections.abc
import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import _typehints

from orderppl.errors import UserError
from orderppl.import_paths import HOMES, import_path, locate

PLAIN = (int, float, bool, str, type(None), Path)
MADE = (*PLAIN, list, dict, tuple, object)  # what a function may return that is no factory of objects
VIEWED = {"dtype": str, "device": str, "Tensor": list}  # types of torch -> how they are written


def relaxed(hint: Any) -> Any:
    """An annotation as jsonargparse should check it: plain values strictly, objects by any class path."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in (inspect.Parameter.empty, Any, type) or isinstance(hint, (str, typing.ForwardRef)) or hint in PLAIN:
        return hint
    if origin in (typing.Union, types.UnionType):
        return typing.Union[tuple(relaxed(item) for item in arguments)]  # noqa: UP007
    if origin is collections.abc.Callable or hint in (collections.abc.Callable, typing.Callable):
        made = arguments[-1] if arguments else Any
        is_factory = isinstance(made, type) and made not in MADE and made.__name__ not in VIEWED
        return Callable[..., any_class(made)] if is_factory else Callable | any_class(object)
    if origin in (type, typing.Literal, typing.Annotated):
        return hint
    abstract = {collections.abc.Mapping: dict, collections.abc.Sequence: list, collections.abc.Iterable: list}
    if (kind := abstract.get(origin, origin)) in (list, tuple, dict, set):
        return kind[tuple(item if item is ... else relaxed(item) for item in arguments)]
    if not isinstance(hint, type) or isinstance(hint, _AnyClass):
        return hint if isinstance(hint, _AnyClass) else Any
    if hint in (list, tuple, dict) or dataclasses.is_dataclass(hint):
        return hint
    return VIEWED.get(hint.__name__) or any_class(hint)


class _AnyClass(abc.ABCMeta):
    """Metaclass of types that any class may stand for: what does not fit, its constructor or its user refuses."""

    kind: Any

    def __subclasscheck__(cls, other: type) -> bool:
        return True

    def __instancecheck__(cls, thing: object) -> bool:
        return False

    def __repr__(cls) -> str:
        return f"<class '{cls.__name__}'>"

    def __subclasses__(cls) -> list[Any]:
        """What orderppl and torch.optim offer, for help and for names without a path."""
        kind = locate(cls.kind) if isinstance(cls.kind, str) else cls.kind
        found: dict[str, Any] = {}
        for home in map(import_module, HOMES):
            for name in getattr(home, "__all__", ()):
                thing = getattr(home, name)
                if name not in found and _offered(thing, kind, home.__name__):
                    found[name] = thing
        return list(found.values())


def _offered(thing: Any, kind: Any, home: str) -> bool:
    if not getattr(kind, "_is_protocol", False):
        return isinstance(thing, type) and isinstance(kind, type) and issubclass(thing, kind)
    if kind.__name__.endswith("Denoiser"):
        return home.endswith("denoisers") and (isinstance(thing, type) or hasattr(thing, "_is_recorded"))
    return isinstance(thing, type) and home.startswith("orderppl.")


@functools.cache
def any_class(kind: Any) -> Any:
    """A type for which jsonargparse takes any class path.

    Args:
        kind: the class that is meant, or its import path: help calls the type by its name and offers its subclasses.
    """
    name = kind.rpartition(".")[-1] if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
    # Abstract, so that help leaves out the type itself.
    return _AnyClass(name, (), {"kind": kind, "hidden": abc.abstractmethod(lambda self: None)})


# ---- two decisions of jsonargparse, for these types alone


def _fits(value: Any, kind: Any) -> bool:
    """What a function returns shows when it is called, not in its annotation."""
    return callable(value) if isinstance(kind, _AnyClass) else _fits_by_type(value, kind)


def _path_of(kind: Any, name: str) -> str:
    """A public name stands for its class whatever the argument is annotated with."""
    if "." not in name and isinstance(kind, _AnyClass):
        with suppress(UserError):
            return import_path(locate(name))
    return str(_path_by_type(kind, name))


_fits_by_type, _path_by_type = _typehints.is_subclass_or_implements_protocol, _typehints.resolve_class_path_by_name
_typehints.is_subclass_or_implements_protocol = _fits  # type: ignore[assignment]
_typehints.resolve_class_path_by_name = _path_of  # type: ignore[assignment]
