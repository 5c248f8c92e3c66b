"""What happens to every user sooner or later, as one line with its remedy: no memory, no disk, no permission."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from orderppl.errors import UserError, is_out_of_memory

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
SETTINGS = ("config.yaml", "stage.json")  # what a run writes before it has found anything


def explain(error: BaseException, out: Path, device: str, resumes: bool = False) -> UserError | None:
    """A known failure as what the user is told; None for anything else, bad input that was found as such included.

    Args:
        error: what ended the run.
        out: its folder.
        device: where it computed.
        resumes: the experiment has --resume.
    """
    if isinstance(error, UserError):
        return None
    if is_out_of_memory(error):
        remedy = "lower the batch size or elbo.num_particles, raise accumulate where there is one, or use bfloat16"
        return UserError("memory", f"{device} has none left", f"{remedy}; then {how_to_go_on(resumes)}")
    number, path = next(_system_errors(error), (0, None))
    if number in FULL:
        problem = f"{path or out} cannot be written ({os.strerror(number)})"
        return UserError("disk", problem, f"free some space, then {how_to_go_on(resumes)}; or choose another --out")
    if number in FORBIDDEN:
        return UserError("--out", f"{path or out}: {os.strerror(number)}", "choose a folder that you may write to")
    return None


def how_to_go_on(resumes: bool) -> str:
    """What to do once the cause is gone; an experiment without --resume keeps what is finished, or is short."""
    return "repeat the command with --resume to go on" if resumes else "repeat the command"


def holds_settings_alone(folder: Path) -> bool:
    """Whether there is nothing in a run folder that was computed."""
    files = (path for path in folder.rglob("*") if not path.is_dir())
    return all(path.name in SETTINGS or path.stat().st_size == 0 for path in files)


def _system_errors(error: BaseException | None) -> Iterator[tuple[int, str | None]]:
    """Number and path of the system errors behind an exception: libraries that write files wrap or only quote them."""
    while error is not None:
        quoted = re.search(r"(?:os error |Os \{ code: )(\d+)", str(error))
        if isinstance(error, OSError) and error.errno is not None:
            yield error.errno, error.filename
        elif quoted:
            yield int(quoted[1]), None
        error = error.__cause__ or error.__context__
