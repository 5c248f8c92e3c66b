"""The `orderppl` command: finds the subcommand, and turns whatever goes wrong into one line.

A subcommand is a module of this package with a dataclass `Config`, whose fields and docstring are its options and its
help, and `run(config)`. Only the module that was asked for is imported.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from orderppl.errors import UserError, first_line

COMMANDS = {
    "train-denoiser": "Train a small masked-diffusion transformer, or go on with a trained one.",
    "fit-order": "Fit a guide and a policy to a denoiser; can be interrupted and resumed.",
    "evaluate": "Compare what a run has learned with the heuristics, at its number of steps.",
    "frontier": "Learned orders against every heuristic at equal numbers of forwards.",
    "generate": "Write behind prompts or fill holes, and watch the text being revealed.",
    "share": "Make a learned order a folder to publish.",
    "diagnose": "Can a fitted order be trusted, and what is it like?",
    "report": "One HTML file of a run: tables, figures, and a replay of decoding.",
    "env": "Versions and devices, for a bug report.",
}
"""Name -> one line of help. The module has the same name, with underscores."""
STALE = 3600  # seconds after which the mark of a failed launch is of another one
USAGE = """usage: orderppl COMMAND [options]

Learn the generation order of masked language models.

{commands}

orderppl COMMAND --help shows the options of a command. With all of them:
  --config NAME|FILE   start from a packaged config or a YAML file
  --print_config       print the complete config and stop
  --debug              show the traceback of an error
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (`sys.argv` when no arguments are given).

    Returns:
        The exit status: 0, 2 after an error, 130 after an interrupt.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [item for item in given if item != "--debug"]
    if not given or given[0] in ("-h", "--help", "help"):
        lines = "\n".join(f"  {name:<16} {summary}" for name, summary in COMMANDS.items())
        print(USAGE.format(commands=lines))
        return 0
    if given[0] == "--version":
        from orderppl import __version__

        print(f"orderppl {__version__}")
        return 0
    config: Any = None
    try:
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())  # where a user's own modules are
        config = _parse(given[0], given[1:])
        if config is not None:
            import_module(_module(given[0])).run(config)
    except KeyboardInterrupt:
        _say("interrupted; repeat the command with --resume where it has one, else repeat it")
        return 130
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except BaseException as error:  # foreign code ends by other than exceptions too
        if isinstance(error, SystemExit) and not error.code:
            return 0
        if debug:
            traceback.print_exc()
        if _is_first_to_fail():
            _say(f"error: {_line(error, config)}")
        return 2
    return 0


def _module(command: str) -> str:
    return f"orderppl.cli.{command.replace('-', '_')}"


def _parse(command: str, arguments: list[str]) -> Any:
    """The command's config; None where help was asked for."""
    if command not in COMMANDS:
        from orderppl.import_paths import suggest

        raise UserError(command[:60], "no such command", suggest(command, COMMANDS))
    from orderppl.cli.parser import parse

    return parse(import_module(_module(command)).Config, arguments, command)


def _say(text: str) -> None:
    """One line on standard error; of which process, where a launcher has started several."""
    rank = os.environ.get("RANK", "0")
    shown = " ".join(text.split())
    print(f"process {rank}: {shown}" if rank != "0" else shown, file=sys.stderr)


def _is_first_to_fail() -> bool:
    """Whether no other process of a launch on this machine has said what went wrong: the others fail in its wake."""
    launch = os.environ.get("TORCHELASTIC_RUN_ID")
    if launch is None or os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    name = f"orderppl-{os.getppid()}-{os.environ.get('MASTER_PORT')}-{os.environ.get('TORCHELASTIC_RESTART_COUNT')}"
    mark = Path(tempfile.gettempdir()) / f"{name}.failed"
    try:
        if mark.exists() and time.time() - mark.stat().st_mtime > STALE:
            mark.unlink(missing_ok=True)
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def _line(error: BaseException, config: Any) -> str:
    """An error as one line; of one that nothing has foreseen, the traceback goes into a log file."""
    from orderppl.cli.failures import explain

    log = Path(getattr(config, "out", None) or os.devnull) / "error.log"
    is_kept = False
    with suppress(Exception):  # whatever the error is, there is a line
        if log.parent.is_dir():
            log.write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="replace")
            is_kept = True
    try:
        known = error if isinstance(error, UserError) else explain(error, config)
        if known is not None:
            return str(known)
        text = f"{type(error).__name__}: {first_line(error)}"
    except Exception:  # one that cannot be read
        text = type(error).__name__
    return (
        f"{text}; the traceback is in {log}"
        if is_kept
        else f"{text}; repeat the command with --debug for the traceback"
    )


if __name__ == "__main__":
    sys.exit(main())
