"""The reference has every public name, and says of every argument what it is."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import docstring_parser
import pytest

import orderppl
import orderppl.guides
import orderppl.models

ROOT = Path(__file__).parents[1]
PACKAGES = ["orderppl", *(m.name for m in pkgutil.walk_packages(orderppl.__path__, "orderppl.") if m.ispkg)]
PACKAGES = [name for name in PACKAGES if hasattr(importlib.import_module(name), "__all__")]
FOREIGN = ("pyro.", "torch.", "builtins", "typing", "lm_eval", "abc")  # documented elsewhere


def named(path: str) -> Any:
    """What a line `::: path` shows."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


def public(module: ModuleType) -> list[Any]:
    """What a page shows of a module."""
    own = [n for n, thing in vars(module).items() if getattr(thing, "__module__", None) == module.__name__]
    return [getattr(module, name) for name in getattr(module, "__all__", own) if not name.startswith("_")]


def shown() -> list[Any]:
    """Classes and functions of all pages of the reference."""
    found = []
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        for path in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.MULTILINE):
            thing = named(path)
            found += public(thing) if isinstance(thing, ModuleType) else [thing]
    return [thing for thing in found if inspect.isclass(thing) or inspect.isfunction(thing)]


SHOWN = shown()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_on_a_page(package: str) -> None:
    module = importlib.import_module(package)
    missing = [name for name in module.__all__ if getattr(module, name) not in SHOWN]
    assert missing == []


def explained(thing: Any) -> set[str]:
    """Arguments that a docstring names."""
    return {
        entry.arg_name.lstrip("*") for entry in docstring_parser.parse(inspect.cleandoc(thing.__doc__ or "")).params
    }


@pytest.mark.parametrize("thing", SHOWN, ids=lambda thing: f"{thing.__module__}.{thing.__name__}")
def test_every_argument_is_explained(thing: Any) -> None:
    """By its own docstring or by that of a base class which is on a page, too."""
    bases = (
        [base for base in thing.__mro__ if not base.__module__.startswith(FOREIGN)]
        if inspect.isclass(thing)
        else [thing]
    )
    parameters = inspect.signature(thing.__init__ if inspect.isclass(thing) else thing).parameters.values()
    wanted = {p.name for p in parameters if p.name not in ("self", "args", "kwargs") and not p.name.startswith("_")}
    for base in bases:
        explains = explained(base) & wanted
        assert not explains or base in SHOWN, f"{base.__name__} explains {explains} and is on no page"
        wanted -= explains
    assert wanted == set()
