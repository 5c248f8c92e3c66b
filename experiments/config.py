"""Typed settings: dataclasses filled from a YAML file and `--set a.b=c`, strictly.

A config is a frozen dataclass whose fields are `int`, `float`, `bool`, `str`, a `Literal`, a tuple of these, another
config or, where one of several things is chosen by name, a union of configs, each with a field `name: Literal[...]`.
Its `__post_init__` may raise `UserError` with the name of one of its fields; the loader adds the path to it. Bounds are
declared with the field, see `setting`. Nothing here imports torch, so that a wrong option is reported at once.

A YAML file may be another one with changes: `base: NAME` and, under `set:`, assignments `a.b: c`. In these and in
`--set` an item of a list is named by its number from 0, and all items by `*`: `orders.*.fit.updates: 10`.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from orderppl.errors import UserError

C = TypeVar("C")


def setting(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    file: bool = False,
    option: str | None = None,
    unnamed: bool = False,
    alters: bool = True,
) -> Any:
    """A field of a config, with its bounds.

    Args:
        default: the value when a file does not give one; a callable makes a fresh one.
        help: what it sets, with its unit; shown by `--help` for an option.
        at_least: smallest value allowed.
        at_most: largest value allowed.
        above: the value must be larger.
        below: the value must be smaller.
        file: the value is the path of a file or folder that must exist.
        option: name of a command-line option of its own, such as `--steps`.
        unnamed: a group of settings without a `name` is of the default's kind.
        alters: False where results are the same, up to rounding, whatever the value: a run may go on with another one.
    """
    metadata = {
        "help": help,
        "bounds": {"at least": at_least, "at most": at_most, "above": above, "below": below},
        "file": file,
        "option": option,
        "unnamed": unnamed,
        "alters": alters,
    }
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class RunConfig:
    """What every experiment has."""

    seed: int = setting(0, "seed of every random generator", at_least=0)
    device: str = setting("cpu", "torch device, such as cpu or cuda:0")
    dtype: Literal["float32", "float64", "bfloat16"] = setting("float32", "dtype of the networks; bfloat16 by autocast")


def packaged_configs() -> dict[str, Path]:
    """YAML files that come with the package, by name."""
    folder = Path(str(files("orderppl.experiments") / "configs"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_config(
    kind: type[C],
    source: str | Path | None = None,
    overrides: Sequence[str] = (),
    options: Mapping[str, object] | None = None,
) -> C:
    """Read a config: the file, then `--set` assignments in order, then options.

    Args:
        kind: the dataclass.
        source: name of a packaged file (`chain`) or a path; None for the defaults of the dataclass.
        overrides: assignments `a.b=c`; the right side is YAML.
        options: values of top-level fields.

    Raises:
        UserError: names the dotted field, what is wrong and what to write instead.
    """
    data = {} if source is None else _read_yaml(source)
    for assignment in overrides:
        _assign(data, assignment)
    return build_config(kind, data | dict(options or {}))


def build_config(kind: type[C], data: Mapping[str, object]) -> C:
    """Fill the dataclass `kind` from plain values, strictly."""
    return typing.cast(C, _config(kind, data, ""))


def config_dict(config: object) -> dict[str, Any]:
    """The config as plain YAML and JSON values."""
    plain = _plain(asdict(typing.cast(Any, config)))
    assert isinstance(plain, dict)
    return plain


def identity_dict(config: object) -> dict[str, Any]:
    """The config as `config_dict` gives it, without the settings that results do not depend on."""
    plain = _plain(_altering(config))
    assert isinstance(plain, dict)
    return plain


def _altering(value: Any) -> object:
    if is_dataclass(value):
        own = [item.name for item in fields(value) if item.metadata.get("alters", True)]
        return {name: _altering(getattr(value, name)) for name in own}
    return [_altering(item) for item in value] if isinstance(value, (list, tuple)) else value


def dump_config(config: object) -> str:
    """The config as a YAML document that `load_config` reads back."""
    return yaml.safe_dump(config_dict(config), sort_keys=False, width=120)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _read_yaml(source: str | Path) -> dict[str, object]:
    packaged = packaged_configs()
    path = packaged.get(str(source), Path(source))
    if not path.is_file():
        names = ", ".join(packaged)
        raise UserError("--config", f"no file {str(source)!r}", f"give a path, or one of: {names}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = "" if where is None else f" at line {where.line + 1}"
        raise UserError("--config", f"{path} is not valid YAML{line}", "correct that line") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError("--config", f"{path} holds a {type(data).__name__}", "write settings as `name: value` lines")
    data = typing.cast(dict[str, object], _plain(data))  # what an alias repeats can be changed in one place
    if "base" in data:
        changes = data.get("set", {})
        if set(data) - {"base", "set"} or not isinstance(changes, dict):
            raise UserError("--config", f"{path} has a base", "write its changes under `set:`, as `a.b: c` lines")
        data = _read_yaml(str(data["base"]))
        for name, value in changes.items():
            _put(data, str(name).split("."), value, str(name))
    return data


def _assign(data: dict[str, object], assignment: str) -> None:
    path, equals, text = assignment.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise UserError("--set", f"cannot read {assignment!r}", "write --set name=value or --set part.name=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(path, f"cannot read {text!r} as YAML", "quote the value") from error
    _put(data, keys, value, path)


def _put(node: object, keys: Sequence[str], value: object, path: str) -> None:
    """Set what the keys lead to, in nested groups and lists; groups are made where there are none."""
    key, rest = keys[0], keys[1:]
    if isinstance(node, list):
        if key != "*" and not (key.isdecimal() and int(key) < len(node)):
            raise UserError(
                path, f"the list has {len(node)} items", f"write 0 to {len(node) - 1}, or * for all, not {key}"
            )
        for place in range(len(node)) if key == "*" else [int(key)]:
            if rest:
                _put(node[place], rest, value, path)
            else:
                node[place] = _plain(value)
        return
    if not isinstance(node, dict):
        raise UserError(path, f"cannot set {key} of {node!r}", "give a group of settings there first")
    if not rest:
        node[key] = _plain(value)
        return
    inner = node.setdefault(key, {})
    if isinstance(inner, str):  # `prior: easy_first` stands for `prior: {name: easy_first}`
        inner = node[key] = {"name": inner}
    if not isinstance(inner, (dict, list)):
        raise UserError(path, f"{key} is set to {inner!r}", f"give {key} as a group of settings first")
    _put(inner, rest, value, path)


def _config(kind: type, data: object, path: str) -> object:
    if not isinstance(data, Mapping):
        raise UserError(path, f"must be a group of settings, got {data!r}", f"set {path}.<name>=... for one of them")
    known = {item.name: item for item in fields(kind) if item.init}
    hints = typing.get_type_hints(kind)
    for key in data:
        if key not in known:
            raise UserError(_join(path, str(key)), "no such setting", _suggest(str(key), known))
    values = {}
    for name, item in known.items():
        here = _join(path, name)
        if name in data:
            given = data[name]
            if item.metadata.get("unnamed") and isinstance(given, Mapping) and "name" not in given:
                given = {"name": _tag(item.default_factory), **given}
            values[name] = _value(hints[name], given, here)
            _check_bounds(item, values[name], here)
        elif item.default is MISSING and item.default_factory is MISSING:
            raise UserError(here, "is required", f"set {here}")
    try:
        return kind(**values)
    except UserError as error:
        raise UserError(_join(path, error.field), error.problem, error.remedy) from None


def _value(hint: Any, value: object, path: str) -> object:
    """Convert and check one value against a type annotation."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        options = [item for item in arguments if item is not type(None)]
        configs = [item for item in options if is_dataclass(item)]
        if len(configs) == len(options):
            return _named(configs, value, path)
        if len(options) == 1:
            return _value(options[0], value, path)
        raise TypeError(f"{path}: a union of plain types is not supported: {hint}")
    if is_dataclass(hint):
        return _named([hint], value, path) if _tag(hint) else _config(typing.cast(type, hint), value, path)
    if origin is Literal:
        if value in arguments and not isinstance(value, bool):
            return value
        known = [str(item) for item in arguments]
        raise UserError(path, f"no such choice: {value!r}", _suggest(str(value), known))
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_value(arguments[0], item, f"{path}[{index}]") for index, item in enumerate(items))
    return _scalar(hint, value, path)


def _scalar(hint: type, value: object, path: str) -> object:
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        with contextlib.suppress(ValueError):
            value = float(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not hint:
        raise UserError(path, f"must be {wanted}, got {value!r}", f"set {path} to {wanted}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(path, f"must be finite, got {value!r}", f"set {path} to {wanted}")
    return value


def _tag(kind: Any) -> str | None:
    """The name by which a union of configs chooses `kind`."""
    hint = typing.get_type_hints(kind).get("name")
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Literal else None


def _named(kinds: Iterable[Any], value: object, path: str) -> object:
    """Fill the config whose `name` is given: `easy_first`, or `{name: easy_first, threshold: 0.8}`."""
    by_name = {_tag(kind): kind for kind in kinds}
    data = {"name": value} if isinstance(value, str) else value
    known = [str(name) for name in by_name]
    if not isinstance(data, Mapping) or "name" not in data:
        if isinstance(data, Mapping) and len(by_name) == 1:
            return _config(next(iter(by_name.values())), data, path)
        choices = ", ".join(known)
        raise UserError(path, f"must name one of its kinds, got {value!r}", f"set {path}.name to one of: {choices}")
    if data["name"] not in by_name:
        raise UserError(path, f"no such kind: {data['name']!r}", _suggest(str(data["name"]), known))
    return _config(by_name[data["name"]], data, path)


def _check_bounds(item: Field[Any], value: object, path: str) -> None:
    for number in value if isinstance(value, tuple) else (value,):
        if not isinstance(number, (int, float)):
            continue
        for word, bound in item.metadata.get("bounds", {}).items():
            if bound is None:
                continue
            fine = {
                "at least": number >= bound,
                "at most": number <= bound,
                "above": number > bound,
                "below": number < bound,
            }
            if not fine[word]:
                wanted = f"{word} {bound:g}"
                raise UserError(path, f"must be {wanted}, got {number:g}", f"set {path} to a number {wanted}")
    if item.metadata.get("file") and value is not None and not Path(str(value)).exists():
        raise UserError(path, f"no such file: {value}", "give the path of an existing file")


def _suggest(given: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(given, names, n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(names)}"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
