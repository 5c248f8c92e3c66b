"""jsonargparse as orderppl uses it: any class for any argument, what a run knows, errors of one line."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import re
import traceback
import typing
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, Optional, TypeVar

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, set_loader

from orderppl.cli.hints import relaxed
from orderppl.config import describe
from orderppl.documents import dump_yaml, parse_yaml, read_yaml
from orderppl.errors import UserError
from orderppl.import_paths import locate, parameters_of, suggest

KNOWN = {"num_steps", "out", "denoiser", "policy", "vocab_size", "num_tokens", "mask_index", "length", "max_length"}
KNOWN |= {"prompt_room", "separator_index", "tokenizer", "data", "num_states", "stay", "token_ids", "answer"}
"""Arguments of classes that a run fills in, see `orderppl.cli.assemble`."""
STRUCTURE = ("Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a path but")  # of its messages

C = TypeVar("C")
set_loader("orderppl", parse_yaml, exceptions=(UserError,))


def presets() -> dict[str, Path]:
    """YAML files that come with the package, by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.yaml"))}


class _Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the examples of a description on lines of their own."""


def parse(kind: type[C], arguments: Sequence[str], command: str) -> C | None:
    """Read the arguments of a command.

    Args:
        kind: a dataclass; its fields and docstring declare the options. `POSITIONAL` names one without dashes,
            `REPEATED` lists of texts that are taken literally, one each time the option is given.
        arguments: as typed.
        command: its name, for help.

    Returns:
        The dataclass, with plain values for objects, for `orderppl.config.build`; what YAML aliases repeat is one and
        the same dict. None where help or the config was asked for, which is printed.

    Raises:
        UserError: names the option.
    """
    arguments = _without_positional(kind, list(arguments))
    arguments = _collected(kind, _in_order(arguments, _switches(kind)))
    arguments, raw = _read_configs(arguments)
    about = (inspect.getdoc(kind) or "").partition("\nArgs:")[0]
    parser = Parser(
        prog=f"orderppl {command}",
        usage="%(prog)s [options]",
        description=about,
        formatter_class=_Formatter,
        parser_mode="orderppl",
        print_config=None,
        allow_abbrev=False,
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
        print(dump_yaml(values), end="")
        return None
    return kind(**values)


def _without_positional(kind: type, arguments: list[str]) -> list[str]:
    """Write what is given without dashes at the beginning as an option."""
    count = next((place for place, item in enumerate(arguments) if item.startswith("-")), len(arguments))
    if not count:
        return arguments
    name, given = getattr(kind, "POSITIONAL", None), arguments[:count]
    if name is None or (count > 1 and not name.endswith("s")):
        raise UserError("arguments", f"{given[-1]!r} is no option", "options begin with two dashes, see --help")
    return [f"--{name}={json.dumps(given) if name.endswith('s') else given[0]}", *arguments[count:]]


def _switches(kind: type, prefix: str = "--") -> set[str]:
    """Options that are true when they are given without a value."""
    found = set()
    for name, hint in typing.get_type_hints(kind).items():
        if hint is bool:
            found.add(prefix + name)
        elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
            found |= _switches(hint, f"{prefix}{name}.")
    return found


def _in_order(arguments: list[str], switches: set[str]) -> list[str]:
    """Write every option as `--name=value`; those of an object behind the one that says its class."""
    found: list[str] = []
    items = iter(zip(arguments, [*arguments, "--"][1:], strict=False))
    for item, after in items:
        is_alone = after.startswith("--") or len(found) == len(arguments)
        is_switch = item in switches or ("." in item and not item.endswith(".help"))  # of a class that is not known yet
        if item.startswith("--") and "=" not in item and is_switch and is_alone:
            item = f"{item}=true"
        elif item.startswith("--") and "=" not in item and not is_alone:
            item = f"{item}={after}"
            next(items, None)
        found.append(item)
    return sorted(found, key=lambda item: item.partition("=")[0].count(".") if item.startswith("--") else 0)


def _collected(kind: type, arguments: list[str]) -> list[str]:
    """Gather what is given several times, as one list."""
    for name in getattr(kind, "REPEATED", ()):
        option = f"--{name}="
        texts = [item.removeprefix(option) for item in arguments if item.startswith(option)]
        if texts:
            arguments = [*(item for item in arguments if not item.startswith(option)), option + json.dumps(texts)]
    return arguments


def _read_configs(arguments: list[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """Find and check the files of --config, which may be names of packaged ones; put them first."""
    files, documents = [], []
    for item in arguments:
        option, _, value = item.partition("=")
        if option != "--config":
            continue
        path = presets().get(value, Path(value).expanduser())
        if not path.is_file():
            raise UserError("--config", f"no file {value!r}", f"give a path, or one of: {', '.join(presets())}")
        documents.append(read_yaml(path, "--config"))
        files += [f"--config={path}"] if documents[-1] else []
    return [*files, *(item for item in arguments if item.partition("=")[0] != "--config")], documents


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


def _written(default: Any) -> Any:
    """A default as a config writes it; as it is where that cannot be."""
    if isinstance(default, (tuple, type)) or type(default).__name__ == "_HAS_DEFAULT_FACTORY_CLASS":
        return default
    try:
        return describe(default, for_call=True)
    except UserError:
        return default


def plain(value: Any) -> Any:
    """What jsonargparse returns, as texts, numbers, lists and dicts."""
    if isinstance(value, (Namespace, dict)):
        return {key: plain(item) for key, item in (vars(value) if isinstance(value, Namespace) else value).items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return describe(value, for_call=True)


class Parser(ArgumentParser):
    """A parser of options that functions and classes declare by their signatures and docstrings."""

    def _add_signature_parameter(
        self, container: Any, nested_key: Any, param: Any, added_args: Any, *args: Any, **kwargs: Any
    ) -> Any:
        hint, default = relaxed(param.annotation), param.default
        if param.name in KNOWN and default is inspect.Parameter.empty:  # filled in when it is not given
            hint, default = (Any if hint is inspect.Parameter.empty else Optional[hint]), None  # noqa: UP045
        if default is not inspect.Parameter.empty and not dataclasses.is_dataclass(default):
            default = _written(default)
        param = dataclasses.replace(param, annotation=hint, default=default)
        return super()._add_signature_parameter(container, nested_key, param, added_args, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong in one line.

        Raises:
            UserError: always.
        """
        if getattr(self, "_inner_parser", False):  # the outer one knows where it stands
            super().error(message, ex)
        keys: list[str] = []
        leaves: list[str] = []
        made = value = None
        for line in message.splitlines():
            line = line.strip().removeprefix("- ")
            if found := re.match(r'Parser key "(.+?)"(?: element \d+)?:?\s*(.*)', line):
                keys += [] if leaves else [found[1]]
                line = found[2]
            elif found := re.match(r"Problem with given class_path '(.+?)':?\s*(.*)", line):
                made, line = (made if leaves else found[1]), found[2]
            elif found := re.match(r"Given value: (.*)", line):
                value = value or found[1]
            if line and not line.startswith(STRUCTURE):
                leaves.append(line)
        known = [item.dest for item in self._actions]
        raise _told(".".join(keys).replace(".init_args", ""), made, leaves or ["is wrong"], value, known) from ex


def _told(field: str, made: str | None, leaves: list[str], value: str | None, known: Sequence[str]) -> UserError:
    """What jsonargparse says, as a field, a problem and a remedy."""
    prefix, reason = f"{field}." if field else "", leaves[0]
    if made is not None and made.startswith("abc."):  # the type itself
        return UserError(field, "says no class", f"give --{field}, such as module.Class")
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
    if found := re.search(r"dot import path string: (\w+)", reason):
        try:
            locate(found[1], field=field)
        except UserError as error:
            return error
    expected = [re.match(r"Expected an? (.+?)(?:\. Got value: (.*))?$", leaf) for leaf in leaves]
    if first := expected[0]:
        kinds = [_kind_of(found[1]) for found in expected if found and found[1] != "<class 'NoneType'>"]
        return UserError(field, f"must be {' or '.join(dict.fromkeys(kinds))}, got {first[2] or value!r}", "see --help")
    return UserError(field or "arguments", reason.rstrip("."), "see --help")


def _kind_of(text: str) -> str:
    """A type as jsonargparse prints it, in fewer words."""
    if "Literal" in text:
        return " or ".join(re.findall(r"['\"](.*?)['\"]", text))
    return re.sub(r"<class '(?:.*?\.)?(\w+)'>", r"\1", text).removeprefix("typing.").removeprefix("collections.abc.")


def _of_import(error: Exception) -> Exception:
    """The failure of a user's module, by its name; any other error as it is."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "import_object":
            try:
                locate(frame.f_locals["name"], field="arguments")
            except UserError as known:
                return known
    return error
