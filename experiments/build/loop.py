"""What every training loop can be told about the machine it runs on; nothing of it alters a result beyond rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from orderppl.errors import UserError, first_line
from orderppl.experiments.config import setting


@dataclass(frozen=True)
class LoopConfig:
    """Options of a training loop that fit it to a machine. A run may be resumed with others."""

    accumulate: int = setting(
        1, "pieces of each process's share of a batch, one after another, to save memory", at_least=1, alters=False
    )
    log_every: int = setting(10, "updates between two points of the log", at_least=1, alters=False)
    checkpoint_every: int | None = setting(100, "updates between two checkpoints", at_least=1, alters=False)
    compile: bool = setting(False, "run the denoiser through torch.compile", alters=False)
    compile_backend: str = setting("inductor", "of torch.compile", alters=False)


@contextmanager
def compiling(denoiser: nn.Module, config: LoopConfig) -> Iterator[None]:
    """Compile the denoiser in place, if the config says so: its parameters keep their names.

    Batches are trimmed to their longest row, so it is compiled for shapes that change.

    Raises:
        UserError: it cannot be compiled here, which shows when it is called.
    """
    if not config.compile:
        yield
        return
    try:
        denoiser.compile(backend=config.compile_backend, dynamic=True)
        yield
    except Exception as error:  # what a compiler raises depends on the backend
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = first_line(error)
        raise UserError(
            "compile", f"the denoiser cannot be compiled here ({reason})", "set compile to false"
        ) from error


def piece_size(config: LoopConfig, batch_size: int) -> int:
    """Sequences that are read at a time where nothing is learned from them: as many as in a piece of an update."""
    return -(-batch_size // config.accumulate)


def loop_options(config: LoopConfig) -> dict[str, Any]:
    """The arguments of `optimise` that a config of any loop gives."""
    return {name: getattr(config, name) for name in ("accumulate", "log_every", "checkpoint_every")}
