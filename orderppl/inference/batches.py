"""Data in any form that users hold, and batches of it whose order depends on the seed and the epoch only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, RandomSampler

from orderppl.errors import UserError, first_line
from orderppl.randomness import BatchKeys
from orderppl.unmasking import Batch

Data = Any
"""What `as_batch` takes."""


def as_batch(data: Data) -> Batch:
    """All sequences of a data set as one batch on the host.

    Args:
        data: a `Batch`; tokens, int64 [N, S]; columns `tokens` (or `input_ids`), `attention_mask` and `given` in a dict
            or a `datasets.Dataset`, whose rows may have different lengths; examples of `orderppl.data`; a `DataLoader`
            or another iterable of batches, which is read once, into memory (without the shuffling of a loader).

    Raises:
        UserError: none of these, or no sequence.
    """
    batch = _as_batch(data).to("cpu")
    if not len(batch):
        raise UserError("data", "there are no sequences to draw batches from", "check the data split")
    return batch


def _as_batch(data: Data) -> Batch:
    if isinstance(own := getattr(data, "batch", None), Batch):
        return own
    if isinstance(data, Batch | Tensor | np.ndarray):
        return Batch.of(data if isinstance(data, Batch) else torch.as_tensor(data))
    if hasattr(data, "column_names"):
        data = {name: list(data[name]) for name in data.column_names}
    if isinstance(data, Mapping):
        return _from_columns(data)
    if isinstance(data, DataLoader) and isinstance(data.sampler, RandomSampler) and not data.sampler.replacement:
        # The stream shuffles, and finds the same rows when a fit is resumed.
        data = DataLoader(data.dataset, data.batch_size, collate_fn=data.collate_fn, num_workers=data.num_workers)
    if isinstance(data, list | tuple) and data and not isinstance(data[0], Mapping | Batch) and not _is_batches(data):
        return _from_columns({"tokens": data})  # rows of ids
    if not isinstance(data, Iterable) or isinstance(data, str):
        raise UserError("data", f"a {type(data).__name__} holds no batches", "give a Batch, a dict or a DataLoader")
    parts = [Batch(*part) if isinstance(part, list | tuple) else _as_batch(part) for part in data]
    rows: dict[str, list[Tensor]] = {"tokens": [], "attention_mask": [], "given": []}
    for part in parts:
        rows["tokens"] += part.tokens
        rows["attention_mask"] += part.attention_mask
        rows["given"] += part.attention_mask & ~part.latent
    return _from_columns(rows)


def _is_batches(parts: Sequence[Any]) -> bool:
    """Whether each part is a batch of its own: an array of rows, or (tokens, attention mask, given)."""
    first = parts[0]
    return getattr(first, "ndim", 0) == 2 or (isinstance(first, list | tuple) and isinstance(first[0], Tensor))


def _from_columns(columns: Mapping[str, Any]) -> Batch:
    """A batch from columns whose rows may have different lengths."""
    found: dict[str, Tensor] = {}
    for name, values in columns.items():
        if isinstance(values, Tensor | np.ndarray):
            found[name] = torch.as_tensor(values)
            continue
        try:
            rows = [torch.as_tensor(row) for row in values]
            found[name] = pad_sequence(rows, batch_first=True) if rows else torch.zeros(0, 1, dtype=torch.long)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(name, f"is no column of token ids ({first_line(error)})", "leave it out") from error
        if name in ("tokens", "input_ids") and "attention_mask" not in columns:
            sizes = torch.tensor([len(row) for row in rows])
            found["attention_mask"] = torch.arange(found[name].shape[-1]) < sizes[:, None]
    return Batch.of(found)


def training_rows(data: Data, denoiser: object) -> tuple[Data, Data]:
    """Training and validation rows of a data set of `orderppl.data`, as the denoiser's tokeniser reads them.

    Other data have no rows for validation: None.
    """
    if not hasattr(data, "splits"):
        return data, None
    splits = data.splits(getattr(denoiser, "tokenizer", None))
    return splits["train"], splits.get("validation")


def check_tokens(batch: Batch, denoiser: object) -> None:
    """Refuse tokens to reveal that a denoiser (anything with `mask_index` and `vocab_size`) has no class for.

    Raises:
        UserError: names the first row and position.
    """
    mask, classes = getattr(denoiser, "mask_index", None), getattr(denoiser, "vocab_size", None)
    if mask is None or classes is None:
        return
    wrong = batch.latent & ((batch.tokens == mask) | (batch.tokens < 0) | (batch.tokens >= classes))
    for row, place in wrong.nonzero()[:1].tolist():
        token = int(batch.tokens[row, place])
        what = f"{'MASK' if token == mask else 'no token'} (id {token})"
        problem = f"row {row} has {what} at position {place}, which is to be revealed"
        raise UserError("data", problem, "correct it, or mark the position as given")


class Piece(NamedTuple):
    """A process's part of a batch, or a piece of it.

    Attributes:
        batch: the sequences.
        keys: which rows of the data they are; what `keyed_draws` needs.
        share: what they count for in the whole batch; 0 where a row stands in for none.
    """

    batch: Batch
    keys: BatchKeys
    share: float


class BatchStream:
    """An endless stream of shuffled batches that can be stopped and continued exactly.

    Every epoch is a fresh permutation drawn from `(seed, epoch)` alone, so the batches do not depend on the global
    random state, on the device or on how often the stream was interrupted. Batches are without the columns that are
    padding in all their rows.

    Args:
        data: see `as_batch`.
        batch_size: sequences per batch.
        seed: non-negative seed of the permutations.
        drop_last: leave out the short last batch of an epoch, unless it is the only one.
        group: sort the rows of this many batches by length before cutting them into batches, then shuffle the
            batches: less padding, and still every row once an epoch. 1 leaves rows unsorted.
        per_token: pieces of a batch weigh by their positions to reveal, not by their rows.
        device: where batches are moved to.

    Raises:
        UserError: see `as_batch`, or a batch size the data cannot fill.
    """

    def __init__(
        self,
        data: Data,
        batch_size: int,
        *,
        seed: int = 0,
        drop_last: bool = False,
        group: int = 1,
        per_token: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value, least in (("batch_size", batch_size, 1), ("group", group, 1), ("seed", seed, 0)):
            if value < least:
                raise UserError(name, f"{value} is too small", f"use at least {least}")
        self.data = as_batch(data)
        self.batch_size, self.seed, self.group = batch_size, seed, group
        self.drop_last, self.device = drop_last, torch.device(device)
        self.weight = self.data.latent.sum(-1) if per_token else torch.ones(len(self.data), dtype=torch.long)  # [N]
        self.epoch, self.position = 0, 0
        self._batches = self._permutation()

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches in one pass over the sequences."""
        whole, rest = divmod(len(self.data), self.batch_size)
        return max(whole, 1) if self.drop_last or not rest else whole + 1

    def _permutation(self) -> list[Tensor]:
        """Row indices of every batch of this epoch."""
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.data))
        if self.drop_last:
            order = order[: self.batches_per_epoch * self.batch_size]
        if self.group > 1:
            length = self.data.attention_mask.sum(-1).numpy()
            pool = self.group * self.batch_size
            pools = [order[start : start + pool] for start in range(0, len(order), pool)]
            order = np.concatenate([rows[np.argsort(length[rows], kind="stable")] for rows in pools])
        batches = list(torch.from_numpy(order).split(self.batch_size))
        if self.group > 1:
            batches = [batches[i] for i in rng.permutation(len(batches))]
        return batches

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield next(self.pieces()).batch

    def pieces(self, count: int = 1, rank: int = 0, size: int = 1) -> Iterator[Piece]:
        """The next batch, or the part of process `rank` of `size`, in `count` pieces.

        Every process gets each `size`-th row of the batch. A piece without a row gets the batch's first one.
        """
        if self.position >= self.batches_per_epoch:
            self.epoch, self.position = self.epoch + 1, 0
            self._batches = self._permutation()
        self.position += 1
        rows = self._batches[self.position - 1]
        for piece in range(count):
            mine = torch.arange(len(rows))[rank + piece * size :: count * size]
            share = int(self.weight[rows[mine]].sum()) / max(int(self.weight[rows].sum()), 1)
            yield self._piece(rows, mine if len(mine) else torch.zeros(1, dtype=torch.long), share)

    def once(self) -> Iterator[Piece]:
        """One pass over all rows in their stored order, the short last batch included; the stream stays where it is."""
        for rows in torch.arange(len(self.data)).split(self.batch_size):
            yield self._piece(rows, torch.arange(len(rows)), 1.0)

    def _piece(self, rows: Tensor, mine: Tensor, share: float) -> Piece:
        batch = self.data.rows(rows[mine]).trimmed()
        places = (batch.latent.cumsum(-1) - 1).clamp(
            min=0
        )  # among the positions to reveal: padding may be cut anywhere
        if self.device.type == "cuda":
            rows, mine, places = rows.pin_memory(), mine.pin_memory(), places.pin_memory()
            given = None if batch.given is None else batch.given.pin_memory()
            batch = Batch(batch.tokens.pin_memory(), batch.attention_mask.pin_memory(), given)
        _ = batch.prefix  # found on the host, and kept
        rows, mine, places = (index.to(self.device, non_blocking=True) for index in (rows, mine, places))
        return Piece(batch.to(self.device), BatchKeys(self.epoch, rows, mine, places), share)

    @cached_property
    def digest(self) -> str:
        """Of the data: equal on processes, and before and after a resume, that hold the same."""
        digest = hashlib.blake2b(digest_size=8)
        for tensor in (self.data.tokens, self.data.attention_mask, self.data.given):
            if tensor is not None:
                digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _identity(self) -> dict[str, Any]:
        names = ("batch_size", "seed", "drop_last", "group")
        return {"num_sequences": len(self.data), **{name: getattr(self, name) for name in names}, "data": self.digest}

    def state_dict(self) -> dict[str, Any]:
        """Position of the next batch, with what the position refers to."""
        return {"epoch": self.epoch, "position": self.position, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a saved position.

        Raises:
            UserError: the position was saved by a stream over other data, batches or another seed.
        """
        for name, value in self._identity().items():
            if state[name] != value:
                problem = f"the checkpoint was written with {state[name]}, this run has {value}"
                raise UserError(name, problem, "resume with the settings and data of the interrupted run")
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self._batches = self._permutation()
