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

from orderppl.errors import UserError

T = TypeVar("T")
TIMEOUT = timedelta(hours=2)  # a validation of the first process may keep the others waiting for long


@dataclass(frozen=True)
class Processes:
    """This process among those that fit together.

    Attributes:
        rank: its number, from 0; the first process writes files and validates.
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
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
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
        if self.size == 1:
            return loss
        return nn.parallel.DistributedDataParallel(loss, find_unused_parameters=True)

    def apart(self, loss: nn.Module) -> AbstractContextManager[None]:
        """Let gradients of a wrapped loss add up on each process, without exchanging them."""
        return loss.no_sync() if isinstance(loss, nn.parallel.DistributedDataParallel) else nullcontext()

    def means(
        self, sums: Mapping[str, Tensor], counts: Mapping[str, Tensor | int]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Means over the global batch, in one message.

        Args:
            sums: 0-dim tensors, sums over this process's share.
            counts: under the same names, over how many items.

        Returns:
            The means, and the number of items of all processes under each name. Both 0-dim float64.
        """
        device = next(iter(sums.values())).device
        zero = torch.zeros((), dtype=torch.float64, device=device)
        both = [[(zero + of[name]).detach() for name in sums] for of in (sums, counts)]
        total = torch.stack([torch.stack(row) for row in both])  # [2, names]
        if self.size > 1:
            dist.all_reduce(total)
        means = total[0] / total[1]
        return dict(zip(sums, means, strict=True)), dict(zip(sums, total[1], strict=True))

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

    def check_same(self, name: str, value: object, remedy: str) -> None:
        """Refuse to go on when the processes hold different values.

        Raises:
            UserError: on every process.
        """
        if self.size == 1:
            return
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        if any(other != found[0] for other in found):
            raise UserError(name, "differs between the processes", remedy)


def _leave() -> None:
    with suppress(Exception):  # at exit, perhaps after another process has gone
        if dist.is_initialized():
            dist.destroy_process_group()
