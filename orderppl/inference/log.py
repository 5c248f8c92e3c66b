"""The log of a training run, what is said meanwhile, and how a run is interrupted."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from tqdm.auto import tqdm

from orderppl.files import write_text

Record = dict[str, Any]


class Log:
    """What happened in every update, in memory and as one JSON object per line of a file.

    Numbers stay on the device until `flush`, which fetches all of them with one synchronisation.

    Args:
        path: the file; None keeps the records in memory only.
        writes: whether this process writes them; all keep them.

    Attributes:
        trace: one record per update.
        validations: one record per validation.
    """

    def __init__(self, path: Path | None, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self.trace: list[Record] = []
        self.validations: list[Record] = []
        self._pending: list[tuple[Record, dict[str, Tensor]]] = []

    def restart(self, update: int) -> None:
        """Go on after `update`: records that a killed run wrote past its last checkpoint are forgotten."""
        if self.path is None:
            return
        kept: list[Record] = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() and update else []:
            try:
                record = json.loads(line)
            except ValueError:  # the line the kill cut short
                break
            if record["update"] <= update:
                kept.append(record)
        if self.writes:
            write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self.trace = [record for record in kept if "validation" not in record]
        self.validations = [{"update": r["update"], **r["validation"]} for r in kept if "validation" in r]

    def add(self, update: int, values: Mapping[str, Tensor], known: Mapping[str, float]) -> None:
        """Note an update: 0-dim tensors that nothing overwrites, and numbers that the host knows."""
        self._pending.append(({"update": update, **known}, dict(values)))

    def flush(self, check: Callable[[Record], None]) -> None:
        """Write what is pending, each record after a check that may refuse it."""
        held = [value.double() for _, values in self._pending for value in values.values()]
        numbers = iter(torch.stack(held).tolist() if held else [])
        pending, self._pending = self._pending, []
        for known, values in pending:
            fetched = {name: next(numbers) for name in values}
            record = {"update": known["update"], **fetched, **known}
            check(record)
            self.trace.append(record)
            self._write(record)

    def validated(self, update: int, numbers: dict[str, float]) -> None:
        """Note a validation."""
        self.validations.append({"update": update, **numbers})
        self._write({"update": update, "validation": numbers})

    def _write(self, record: Record) -> None:
        if self.path is not None and self.writes:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def say(text: str) -> None:
    """Tell the user something on standard error, past a progress bar."""
    tqdm.write(text, file=sys.stderr)


class Interrupt:
    """Takes down the first Ctrl-C or SIGTERM, so that the update can be finished; a second one stops at once.

    Attributes:
        signal: its number; 0 while there was none.
    """

    def __init__(self, armed: bool) -> None:
        self.signal = 0
        self._armed = armed and threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM) if self._armed else ():
            self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _: object) -> None:
        self.signal = number
        self.__exit__()

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._before = {}
