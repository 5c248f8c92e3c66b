"""The processes that share a fit: one by default, several under `torchrun` or `accelerate launch`."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from orderppl.errors import UserError

T = TypeVar("T")
TIMEOUT = timedelta(hours=2)  # a validation of the first process may keep the others waiting for long


@dataclass(frozen=True)
class Processes:
    """This process among those that fit together.

    Attributes:
        rank: its number, from 0; the first process writes files, validates and talks to the user.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, device: torch.device | str) -> Processes:
        """Find out which process this is, and connect to the others.

        A process group that the script has made is used as it is. Otherwise the variables that `torchrun` and
        `accelerate launch` set (RANK, WORLD_SIZE, LOCAL_RANK) decide: several processes are joined by gloo, or by NCCL
        on CUDA, where the process takes the GPU of its local rank.

        Args:
            device: where this process computes.

        Raises:
            UserError: fewer GPUs than processes.
        """
        if not (dist.is_available() and dist.is_initialized()):
            if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
                return cls()
            cuda = torch.device(device).type == "cuda"
            if cuda:
                local = int(os.environ.get("LOCAL_RANK", "0"))
                if local >= torch.cuda.device_count():
                    problem = f"process {local} of this machine finds {torch.cuda.device_count()} GPUs"
                    raise UserError("device", problem, "start one process per GPU, or use cpu")
                torch.cuda.set_device(local)
            dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT)
            atexit.register(_leave)
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def wrapped(self, loss: nn.Module) -> nn.Module:
        """The loss, with gradients averaged over the processes and the first one's parameters everywhere.

        Parameters that only some batches reach are allowed.
        """
        return loss if self.size == 1 else DistributedDataParallel(loss, find_unused_parameters=True)

    def apart(self, loss: nn.Module) -> AbstractContextManager[None]:
        """Let gradients of a wrapped loss add up on each process, without exchanging them."""
        return loss.no_sync() if isinstance(loss, DistributedDataParallel) else nullcontext()

    def sums(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """0-dim tensors of the same names on all processes, added up in one message."""
        total = torch.stack(list(values.values()))
        if self.size > 1:
            dist.all_reduce(total)
        return dict(zip(values, total, strict=True))

    def gathered(self, value: T) -> list[T]:
        """The value of every process, in the order of their ranks."""
        found: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value)
        return found

    def from_first(self, action: Callable[[], T]) -> T:
        """Let the first process act, and give its result, or its `UserError`, to all."""
        if self.size == 1:
            return action()
        answer: list[Any] = [None, None]
        error: Exception | None = None
        if self.is_first:
            try:
                answer[0] = action()
            except UserError as caught:
                error, answer[1] = caught, (caught.field, caught.problem, caught.remedy)
            except Exception as caught:
                error, answer[1] = caught, ("process 0", f"{type(caught).__name__}: {caught}", "see its traceback")
        dist.broadcast_object_list(answer)
        if error is not None:
            raise error
        if answer[1] is not None:
            raise UserError(*answer[1])
        result: T = answer[0]
        return result


def _leave() -> None:
    with suppress(Exception):  # at exit, perhaps after another process has gone
        if dist.is_initialized():
            dist.destroy_process_group()
