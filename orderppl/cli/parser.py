"""jsonargparse as orderppl uses it: any class for any argument, what a run knows, errors of one line."""

from __future__ import annotations

import abc
import collections.abc
import dataclasses
import functools
import inspect
import json
import re
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, Optional

from jsonargparse import ArgumentParser, Namespace, set_loader

from orderppl.documents import dump_yaml, parse_yaml, read_yaml
from orderppl.errors import UserError, first_line
from orderppl.import_paths import HOMES, import_path, locate, parameters_of, suggest

KNOWN = ("num_steps", "denoiser", "policy", "vocab_size", "mask_index", "length", "tokenizer", "data")
"""Arguments of classes that a run fills in, see `orderppl.config.build`."""
PLAIN = (int, float, bool, str, type(None), Path)
MADE = (*PLAIN, list, dict, tuple, object)  # what a function may return that is no factory of objects
VIEWED = {"dtype": str, "device": str, "Tensor": list}  # types of torch -> how they are written
STRUCTURE = ("Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a path but")  # of its messages

set_loader("orderppl", parse_yaml, exceptions=(UserError,))


def presets() -> dict[str, Path]:
    """YAML files that come with the package, by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.yaml"))}


def parse(kind: type, arguments: Sequence[str], command: str, config: str | None = None) -> dict[str, Any] | None:
    """Read the arguments of a command.

    Args:
        kind: a dataclass; its fields and docstring declare the options, `POSITIONAL` names one without dashes.
        arguments: as typed.
        command: its name, for help.
        config: what --config is when it is not given; none when left out.

    Returns:
        Plain values of all fields, for `orderppl.config.build`; what YAML aliases repeat is one and the same dict.
        None where help or the config was asked for, which is printed.

    Raises:
        UserError: names the option.
    """
    arguments = _without_positional(kind, list(arguments))
    sources = (
        [] if config is None or any(item.split("=")[0] == "--config" for item in arguments) else ["--config", config]
    )
    arguments, raw = _read_configs([*sources, *arguments])
    about, _, rest = (inspect.getdoc(kind) or "").partition("\nArgs:")
    parser = Parser(
        prog=f"orderppl {command}",
        description=about,
        parser_mode="orderppl",
        print_config=None,
        usage="%(prog)s [options]",
    )
    parser.add_argument("--config", action="config", help=f"YAML file, or one of: {', '.join(presets())}")
    parser.add_argument("--print_config", action="store_true", help="print the complete config and stop")
    parser.add_class_arguments(kind, as_group=False, fail_untyped=False)
    try:
        parsed = parser.parse_args(arguments)
    except UserError:
        raise
    except SystemExit:
        return None  # after --help
    except Exception as error:
        raise _of_import(error) from error
    printing = parsed.pop("print_config")
    parsed.pop("config")
    values: dict[str, Any] = plain(parsed)
    for document in raw:
        restore_sharing(document, values)
    if printing:
        print(dump_yaml(values), end="")  # noqa: T201
        return None
    return values


def _without_positional(kind: type, arguments: list[str]) -> list[str]:
    """Write what is given without dashes at the beginning as an option."""
    count = next((place for place, item in enumerate(arguments) if item.startswith("-")), len(arguments))
    if not count:
        return arguments
    name, given = getattr(kind, "POSITIONAL", None), arguments[:count]
    if name is None or (count > 1 and not name.endswith("s")):
        raise UserError("arguments", f"{given[-1]!r} is no option", "options begin with two dashes, see --help")
    return [f"--{name}={json.dumps(given) if name.endswith('s') else given[0]}", *arguments[count:]]


def _read_configs(arguments: list[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """Find and check the files of --config, which may be names of packaged ones."""
    found, documents = [], []
    items = iter(arguments)
    for item in items:
        option, equals, value = item.partition("=")
        if option == "--config":
            value = value if equals else next(items, "")
            path = presets().get(value, Path(value).expanduser())
            if not path.is_file():
                raise UserError("--config", f"no file {value!r}", f"give a path, or one of: {', '.join(presets())}")
            documents.append(read_yaml(path, "--config"))
            item = f"--config={path}"
        found.append(item)
    return found, documents


def restore_sharing(document: Any, values: dict[str, Any]) -> None:
    """Make what is one dict in a document one dict in the values that were parsed from it.

    Raises:
        UserError: an option has changed one of several places that are the same in the file.
    """
    first: dict[int, tuple[str, ...]] = {}
    for path, item in _paths(document, ()):
        if id(item) not in first:
            first[id(item)] = path
            continue
        try:
            owner = functools.reduce(lambda node, key: node[key], path[:-1], values)
            same = functools.reduce(lambda node, key: node[key], first[id(item)], values)
            if owner[path[-1]] != same:
                problem = f"is one object with {'.'.join(first[id(item)])} in the file"
                raise UserError(".".join(path), problem, "give both the same, or edit the file")
            owner[path[-1]] = same
        except (KeyError, TypeError):  # replaced as a whole by an option
            continue


def _paths(node: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(node, dict) and path:
        yield path, node
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, item in children:
        yield from _paths(item, (*path, key))


def plain(value: Any) -> Any:
    """What jsonargparse returns, as texts, numbers, lists and dicts."""
    if isinstance(value, (Namespace, dict)):
        return {key: plain(item) for key, item in (vars(value) if isinstance(value, Namespace) else value).items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else import_path(value) if callable(value) else value


class Parser(ArgumentParser):
    """A parser of options that functions and classes declare by their signatures and docstrings."""

    def _add_signature_parameter(self, container: Any, key: Any, param: Any, added: Any, *args: Any, **kw: Any) -> Any:
        hint, default = relaxed(param.annotation), param.default
        if param.name in KNOWN and default is inspect.Parameter.empty:  # filled in when it is not given
            hint, default = (Any if hint is inspect.Parameter.empty else Optional[hint]), None  # noqa: UP045
        if hint is str and type(default).__module__ == "torch":
            default = str(default)
        param = dataclasses.replace(param, annotation=hint, default=default)
        return super()._add_signature_parameter(container, key, param, added, *args, **kw)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong in one line.

        Raises:
            UserError: always.
        """
        if getattr(self, "_inner_parser", False):  # the outer one knows where it stands
            super().error(message, ex)
        keys: list[str] = []
        made, reason = None, first_line(Exception(message))
        for line in message.splitlines():
            line = line.strip().removeprefix("- ")
            if found := re.match(r'Parser key "(.+?)"(?: element \d+)?:?\s*(.*)', line):
                keys.append(found[1])
                line = found[2]
            elif found := re.match(r"Problem with given class_path '(.+?)':?\s*(.*)", line):
                made, line = found[1], found[2]
            if line and not line.startswith(STRUCTURE):
                reason = line
                break
        known = [item.dest for item in self._actions]
        raise _told(".".join(keys).replace(".init_args", ""), made, reason, known) from ex


def _told(field: str, made: str | None, reason: str, known: Sequence[str]) -> UserError:
    """What jsonargparse says, as a field, a problem and a remedy."""
    prefix = f"{field}." if field else ""
    if made is not None:
        try:
            known = list(parameters_of(locate(made, field=field)))
        except UserError as error:
            return error
    if found := re.search(r"arguments are required: ([\w.-]+)", reason):
        here = prefix + found[1].removeprefix("--")
        return UserError(here, "is required", f"give --{here}")
    if found := re.search(r"Option '(.+?)' is not accepted|[Uu]nrecognized arguments: (?:--)?([^ =]+)", reason):
        name = found[1] or found[2]
        return UserError(prefix + name, "no such option", suggest(name, known))
    if found := re.match(r"Expected a (?:<class '(?:.*\.)?(\w+)'>|(.+?))\. Got value: (.*)", reason):
        wanted = found[1] or " or ".join(re.findall(r"'(\w+)'", found[2])) or found[2]
        return UserError(field, f"must be {wanted}, got {found[3]!r}", "see --help")
    if found := re.search(r"dot import path string: (\w+)", reason):
        try:
            locate(found[1], field=field)
        except UserError as error:
            return error
    return UserError(field or "arguments", reason.rstrip("."), "see --help")


def _of_import(error: Exception) -> Exception:
    """The failure of a user's module, by its name; any other error as it is."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "import_object":
            try:
                locate(frame.f_locals["name"], field="arguments")
            except UserError as known:
                return known
    return error


# ---- what arguments may be


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
        return Callable[..., any_class(made)] if is_factory else Callable
    if origin in (type, typing.Literal, typing.Annotated):
        return hint
    abstract = {collections.abc.Mapping: dict, collections.abc.Sequence: list, collections.abc.Iterable: list}
    if (kind := abstract.get(origin, origin)) in (list, tuple, dict, set):
        return kind[tuple(item if item is ... else relaxed(item) for item in arguments)]
    if not isinstance(hint, type):
        return Any
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
        found: dict[str, Any] = {}
        for home in HOMES:
            module = import_module(home)
            for name in getattr(module, "__all__", ()):
                thing = getattr(module, name)
                if name not in found and _offered(thing, cls.kind, home):
                    found[name] = thing
        return list(found.values())


def _offered(thing: Any, kind: Any, home: str) -> bool:
    if getattr(kind, "_is_protocol", False):
        is_denoiser = kind.__name__.endswith("Denoiser")
        return home.endswith("denoisers") and hasattr(thing, "__doc__") if is_denoiser else isinstance(thing, type)
    return isinstance(thing, type) and isinstance(kind, type) and issubclass(thing, kind)


@functools.cache
def any_class(kind: Any) -> Any:
    """A type for which jsonargparse takes any class path; `kind` is what help calls it and whose classes it offers; abstract,
    so that help leaves it out.
    """
    return _AnyClass(
        getattr(kind, "__name__", str(kind)), (), {"kind": kind, "hidden": abc.abstractmethod(lambda self: None)}
    )
