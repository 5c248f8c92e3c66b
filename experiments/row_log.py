"""Results per row that survive a kill: finished pieces of work as JSON lines, one file per process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orderppl.errors import UserError
from orderppl.experiments.identity import first_difference


class RowLog:
    """An append-only log of finished pieces of work, shared by processes that each write a file of their own.

    The first line of a file says what its results depend on. A line is complete when it ends: what a kill leaves of a
    piece in flight is dropped, and the piece is done again. What two processes have both done counts once.

    Args:
        folder: of the files `rows-<process>-of-<processes>.jsonl`; made when first written to.
        identity: JSON value that all results depend on.
        process: number of this process, from 0.
        processes: how many there are.

    Raises:
        UserError: a file is of other settings, or no such log.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], process: int = 0, processes: int = 1) -> None:
        self.folder = folder
        self.identity = json.loads(json.dumps(identity))
        self.path = folder / f"rows-{process + 1}-of-{processes}.jsonl"
        self._begun = False
        self.read()  # refuse before anything is computed

    def read(self) -> dict[str, dict[str, Any]]:
        """All finished pieces of all processes, by their key."""
        found: dict[str, dict[str, Any]] = {}
        for path in sorted(self.folder.glob("rows-*-of-*.jsonl")):
            for number, line in enumerate(_complete_lines(path)):
                try:
                    entry = json.loads(line)
                    assert isinstance(entry, dict)
                    assert ("identity" if number == 0 else "key") in entry
                except (ValueError, AssertionError) as error:
                    remedy = "delete that file, or choose another --out"
                    raise UserError(str(path), f"line {number + 1} is not of such a log", remedy) from error
                if number == 0:
                    changed = first_difference(entry["identity"], self.identity)
                    if changed is not None:
                        problem = f"{changed} differs from that of the results in {self.folder}"
                        raise UserError("--out", problem, "choose another --out, or delete that folder")
                else:
                    found.setdefault(entry["key"], entry)
        return found

    def append(self, key: str, piece: Mapping[str, Any]) -> None:
        """Store a finished piece of work."""
        text = json.dumps({"key": key, **piece}) + "\n"
        if not self._begun:
            self._begun = True
            self.folder.mkdir(parents=True, exist_ok=True)
            if _drop_torn_line(self.path) == 0:
                text = json.dumps({"identity": self.identity}) + "\n" + text
        with open(self.path, "ab") as file:
            file.write(text.encode())


def _complete_lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1]


def _drop_torn_line(path: Path) -> int:
    """Cut what a kill has left behind the last complete line; the bytes that remain."""
    if not path.exists():
        return 0
    with open(path, "rb+") as file:
        size = file.read().rfind(b"\n") + 1
        file.truncate(size)
    return size
