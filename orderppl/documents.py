"""YAML documents of configs: read strictly, whatever they hold, and written so that sharing is kept."""

from __future__ import annotations

import datetime
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from orderppl.errors import UserError, first_line

LARGEST, DEEPEST, MOST = 2**20, 40, 100_000  # bytes, levels, values of a document, aliases counted each time
FLOAT = re.compile(r"([-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+|[-+]?(\d+\.\d*|\.\d+)|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$")


class _Loader(yaml.SafeLoader):
    """YAML without dates, with floats such as 1e-3, and without keys that come twice."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith((":timestamp", ":float"))]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """Refuse a key that comes twice."""
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = next((key for place, key in enumerate(keys) if key in keys[:place]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} comes twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that `_Loader` would read as numbers."""


for end in (_Loader, _Dumper):
    end.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


def parse_yaml(text: str, field: str = "config") -> Any:
    """Read a document of plain values: texts, numbers, lists and mappings.

    Raises:
        UserError: it is too large or too deep, no YAML, or holds anything else.
    """
    if len(text) > LARGEST:
        raise UserError(field, f"{len(text)} characters are too many", f"use at most {LARGEST}")
    try:
        value = yaml.load(text.removeprefix("\ufeff"), _Loader)  # a safe one
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f" at line {mark.line + 1}"
        reason = getattr(error, "problem", None) or (
            "too deep" if isinstance(error, RecursionError) else first_line(error)
        )
        raise UserError(field, f"no valid YAML{line} ({reason})", "correct it") from error
    _check(value, field, DEEPEST, [MOST])
    return value


def _check(value: Any, field: str, depth: int, left: list[int]) -> None:
    left[0] -= 1
    if depth < 0 or left[0] < 0:
        raise UserError(field, "nested too deep" if depth < 0 else "too many values", "write fewer")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise UserError(field, f"{key!r} is no name", "write `name: value` lines, with quotes where needed")
            _check(item, field, depth - 1, left)
    elif isinstance(value, list):
        for item in value:
            _check(item, field, depth - 1, left)
    elif not isinstance(value, (str, int, float, type(None))) or isinstance(value, datetime.date):
        raise UserError(field, f"holds a {type(value).__name__}", "write texts, numbers, lists and mappings")


def read_yaml(path: Path, field: str = "config") -> dict[str, Any]:
    """Read a file of `name: value` lines.

    Raises:
        UserError: it cannot be read, or see `parse_yaml`.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(LARGEST + 1).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(field, f"{path} cannot be read ({first_line(error)})", "give a YAML file in UTF-8") from error
    try:
        value = parse_yaml(text, field)
    except UserError as error:
        raise UserError(field, f"{path}: {error.problem}", error.remedy) from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(field, f"{path} holds a {type(value).__name__}", "write `name: value` lines")
    return value


def dump_yaml(value: Any) -> str:
    """Write plain values; a dict that is met twice is written once, under an anchor."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=120)
