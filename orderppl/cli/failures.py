"""What happens to every user sooner or later, as one line with its remedy: no memory, no disk, no permission."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from typing import Any

from orderppl.errors import UserError, is_out_of_memory

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
NO_PATH = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.EEXIST)


def explain(error: BaseException, config: Any) -> UserError | None:
    """A known failure as what the user is told; None for anything else.

    Args:
        error: what ended the command.
        config: of the command, with `out` and `device` where it has them.
    """
    again = "then repeat the command, with --resume where it has one"
    out = getattr(config, "out", None)
    if is_out_of_memory(error):
        remedy = f"lower the batch size or the number of particles, raise fit.accumulate, or use bfloat16; {again}"
        return UserError("memory", f"{getattr(config, 'device', 'the machine')} has none left", remedy)
    number, path = next(_system_errors(error), (0, None))
    if number in FULL:
        remedy = f"free some space, {again}; or choose another --out"
        return UserError("disk", f"{path or out} cannot be written ({os.strerror(number)})", remedy)
    if number in FORBIDDEN:
        return UserError("out", f"{path or out}: {os.strerror(number)}", "choose a folder that you may write to")
    if number in NO_PATH or (number == errno.ENOENT and str(path).startswith(str(out))):
        return UserError("out", f"{str(path or out)[:80]}: {os.strerror(number)}", "choose another path")
    return None


def _system_errors(error: BaseException | None) -> Iterator[tuple[int, str | None]]:
    """Number and path of the system errors behind an exception: libraries that write files wrap or only quote them."""
    while error is not None:
        quoted = re.search(r"(?:os error |Os \{ code: )(\d+)", str(error))
        if isinstance(error, OSError) and error.errno is not None:
            yield error.errno, error.filename
        elif quoted:
            yield int(quoted[1]), None
        elif "inline_container" in str(error) and re.search("unexpected pos|write failed|writing file", str(error)):
            yield errno.ENOSPC, None  # torch.save says no more
        error = error.__cause__ or error.__context__
