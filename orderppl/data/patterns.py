"""Regular expressions of users, whose search ends even where it would take for ever."""

from __future__ import annotations

import re
import signal
import threading
from itertools import islice
from types import FrameType

from orderppl.errors import UserError

SECONDS = 1.0  # of one search


class Pattern:
    """A regular expression. The time limit holds in the main thread, on systems with POSIX signals.

    Args:
        text: the expression.
        field: what messages call it.

    Raises:
        UserError: it is none.
    """

    def __init__(self, text: str, field: str) -> None:
        self.text, self.field = text, field
        try:
            self.compiled = re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            problem = f"{text[:80]!r} is no regular expression ({error})"
            raise UserError(field, problem, "give one such as 'umab$'") from error

    def is_in(self, text: str) -> bool:
        """Whether the expression is found in a text; see `spans`."""
        return bool(self.spans(text, most=1))

    def spans(self, text: str, most: int | None = None) -> list[tuple[int, int]]:
        """Where the expression is found in a text, from the left: [start, end) in characters.

        Args:
            text: what is searched.
            most: stop after so many.

        Raises:
            UserError: the search takes longer than a second.
        """
        if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
            return self._spans(text, most)
        before = signal.signal(signal.SIGALRM, self._stop)
        try:
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            return self._spans(text, most)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _spans(self, text: str, most: int | None) -> list[tuple[int, int]]:
        return [match.span() for match in islice(self.compiled.finditer(text), most)]

    def _stop(self, number: int, frame: FrameType | None) -> None:
        problem = f"{self.text[:80]!r} takes more than {SECONDS:g} s on one text"
        raise UserError(self.field, problem, "leave out repetitions inside of repetitions")
