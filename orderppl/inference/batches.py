"""Batches of in-memory tensors whose order depends on the seed and the epoch only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orderppl.errors import UserError
from orderppl.randomness import BatchKeys

MASK_OF = {"attention_mask": "tokens", "context_mask": "context"}  # mask -> the tensor it covers


class BatchStream:
    """An endless stream of shuffled batches that can be stopped and continued exactly.

    Every epoch is a fresh permutation drawn from `(seed, epoch)` alone, so the batches do not depend on the global
    random state, on the device or on how often the stream was interrupted. Several processes (`share`) go through the
    same batches, each with its own rows of every batch; `batch_size` is that of the whole batch.

    Args:
        tensors: tensors with the same first dimension N; keys are the keyword arguments of a model.
            `attention_mask` (bool [N, L]) covers `tokens`, `context_mask` (bool [N, C]) covers `context`.
        batch_size: sequences per batch.
        seed: non-negative seed of the permutations.
        shuffle: False keeps the rows in their order in every epoch.
        drop_last: leave out the short last batch of an epoch.
        trim: cut columns at the right end that are padding in the whole batch. Lengths are measured once, on the
            host, so trimming never waits for the device.
        group: sort the rows of this many batches by length before cutting them into batches, then shuffle the
            batches: less padding, and still every row once an epoch. 1 leaves rows unsorted.
        device: where batches are moved to; left where they are when None.

    Attributes:
        weight: 1, or 0 where the last batch had no row for this process.

    Raises:
        UserError: an empty set, tensors of different lengths, or a batch size the set cannot fill.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        trim: bool = True,
        group: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        sizes = {name: len(tensor) for name, tensor in tensors.items()}
        if not sizes or 0 in sizes.values():
            raise UserError("tensors", "there are no sequences to draw batches from", "check the data split")
        if len(set(sizes.values())) > 1:
            raise UserError("tensors", f"first dimensions differ: {sizes}", "give one row per sequence in every tensor")
        if batch_size < 1:
            raise UserError("batch_size", f"{batch_size} is not positive", "use at least 1")
        if group < 1:
            raise UserError("group", f"{group} is not positive", "use 1 for unsorted batches")
        if seed < 0:
            raise UserError("seed", f"{seed} is negative", "use a seed of 0 or more")
        self.tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        self.num_sequences = next(iter(sizes.values()))
        if drop_last and batch_size > self.num_sequences:
            raise UserError(
                "batch_size",
                f"{batch_size} exceeds the {self.num_sequences} sequences and short batches are dropped",
                "use a smaller batch or keep the last batch",
            )
        self.batch_size, self.seed, self.group = batch_size, seed, group
        self.shuffle, self.drop_last = shuffle, drop_last
        self.device = None if device is None else torch.device(device)
        self.widths: dict[str, Tensor] = {}  # mask -> columns each row needs, int64 [N]
        for name in MASK_OF if trim else ():
            if name in self.tensors:
                mask = self.tensors[name].bool()  # [N, W]
                columns = torch.arange(1, mask.shape[1] + 1)
                self.widths[name] = (mask * columns).amax(1)  # [N]
        total = torch.zeros(self.num_sequences, dtype=torch.long)
        for name in MASK_OF:
            if name in self.tensors:
                total += self.tensors[name].sum(-1)
        self._length = total.numpy()  # attended tokens of each row
        self.epoch, self.position = 0, 0
        self.process, self.num_processes = 0, 1
        self._batches = self._permutation()
        self._keys: BatchKeys | None = None
        self.weight = 1

    def share(self, process: int, num_processes: int) -> None:
        """Give out every `num_processes`-th row of each batch from now on, beginning at row `process`.

        The checkpointed position does not depend on the processes.
        """
        self.process, self.num_processes = process, num_processes

    @property
    def keys(self) -> BatchKeys:
        """Identity of the rows of the last batch, on the stream's device; what `keyed_draws` needs."""
        if self._keys is None:
            raise UserError("stream", "no batch has been drawn yet", "call next on it first")
        return self._keys

    def checksum(self) -> str:
        """Digest of the data and of what decides the batches: equal on processes that go through the same ones."""
        digest = hashlib.blake2b(repr(sorted(self._identity().items())).encode(), digest_size=8)
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches in one pass over the sequences."""
        whole, rest = divmod(self.num_sequences, self.batch_size)
        return whole if self.drop_last or not rest else whole + 1

    def _permutation(self) -> list[Tensor]:
        """Row indices of every batch of this epoch."""
        order = np.arange(self.num_sequences)
        rng = np.random.default_rng([self.seed, self.epoch])
        if self.shuffle:
            order = rng.permutation(order)
        if self.drop_last:
            order = order[: self.batches_per_epoch * self.batch_size]
        if self.shuffle and self.group > 1:
            pool = self.group * self.batch_size
            pools = [order[start : start + pool] for start in range(0, len(order), pool)]
            order = np.concatenate([rows[np.argsort(self._length[rows], kind="stable")] for rows in pools])
        batches = [
            torch.from_numpy(order[start : start + self.batch_size]) for start in range(0, len(order), self.batch_size)
        ]
        if self.shuffle and self.group > 1:
            batches = [batches[i] for i in rng.permutation(len(batches))]
        return batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        return next(self.pieces(1))

    def pieces(self, count: int) -> Iterator[dict[str, Tensor]]:
        """This process's share of the next batch in `count` pieces; `keys` and `weight` are those of the latest one.

        A piece of a short batch that has no row gets the batch's first one, with weight 0.
        """
        if self.position >= self.batches_per_epoch:
            self.epoch, self.position = self.epoch + 1, 0
            self._batches = self._permutation()
        self.position += 1
        rows = self._batches[self.position - 1]
        for piece in range(count):
            mine = torch.arange(len(rows))[self.process + piece * self.num_processes :: count * self.num_processes]
            self.weight = int(len(mine) > 0)
            if not len(mine):
                mine = torch.zeros(1, dtype=torch.long)
            self._keys = BatchKeys(self.epoch, *self._moved({"rows": rows, "mine": mine}).values())
            yield self.batch(rows[mine])

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        """The rows `index` (int64 [B], on the host) as one trimmed batch on the stream's device."""
        rows = {name: tensor[index] for name, tensor in self.tensors.items()}
        for mask, widths in self.widths.items():
            width = max(int(widths[index].max()), 1)
            for name in (mask, MASK_OF[mask]):
                if name in rows:
                    rows[name] = rows[name][:, :width].contiguous()
        return self._moved(rows)

    def _moved(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.device is None or self.device.type == "cpu":
            return rows
        if self.device.type == "cuda":
            rows = {name: tensor.pin_memory() for name, tensor in rows.items()}
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in rows.items()}

    def once(self) -> Iterator[dict[str, Tensor]]:
        """One pass over all rows in their stored order, the short last batch included; the stream stays where it is."""
        for start in range(0, self.num_sequences, self.batch_size):
            yield self.batch(torch.arange(start, min(start + self.batch_size, self.num_sequences)))

    def _identity(self) -> dict[str, Any]:
        return {
            "num_sequences": self.num_sequences,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            "group": self.group,
        }

    def state_dict(self) -> dict[str, Any]:
        """Position of the next batch, with what the position refers to."""
        return {"epoch": self.epoch, "position": self.position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position.

        Raises:
            UserError: the position was saved by a stream over other rows, batches or another seed.
        """
        for name, value in self._identity().items():
            if state[name] != value:
                raise UserError(
                    name,
                    f"the checkpoint was written with {state[name]}, this run has {value}",
                    "resume with the settings and data of the interrupted run",
                )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self._batches = self._permutation()
