"""What every denoiser offers, and how a batch is put before it."""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol, cast, runtime_checkable

import torch
from pyro.ops.provenance import detach_provenance
from torch import Tensor

from orderppl.errors import UserError
from orderppl.unmasking.batch import Batch


@runtime_checkable
class Denoiser(Protocol):
    """A masked model: partially revealed sequences -> logits of the clean tokens.

    Attributes:
        mask_index: id of the MASK token. When it is below `vocab_size`, its probability is set to zero.
        vocab_size: number of token classes V of the output head.
    """

    mask_index: int
    vocab_size: int

    def __call__(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """Score every position of whole sequences.

        Args:
            state: int64 [N, S], MASK at hidden positions.
            attention_mask: bool [N, S], False at padding. Padding may stand anywhere; it must not change other rows
                or positions, and position indices count attended tokens only.

        Returns:
            float [N, S, V]: unnormalised log-probabilities of the token at each position (no shift).
        """
        ...


@runtime_checkable
class SplitDenoiser(Denoiser, Protocol):
    """A denoiser that offers its output head by itself, so that decoding can run it at the positions it needs only.

    `denoiser(state, attention_mask)` equals `output_logits(hidden_states(state, attention_mask))`.
    """

    def hidden_states(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """Everything before the output head: float [N, S, W]; arguments as for the denoiser."""
        ...

    def output_logits(self, hidden: Tensor) -> Tensor:
        """The output head: float [.., W] -> a new tensor float [.., V]."""
        ...


class Layout(Protocol):
    """What a denoiser keeps of N rows from step to step; whatever it needs."""

    def rows(self, index: Tensor) -> Layout:
        """That of the rows in `index`, int64 or bool [N], in their order."""
        ...


@runtime_checkable
class TailDenoiser(SplitDenoiser, Protocol):
    """A denoiser that does not work out again what stays the same, nor at all what nobody reads.

    `hidden_states(state, attention_mask)[:, start:]` equals `finish(mixed_states(state, attention_mask, start))`, with
    the layout of the rows and without.
    """

    def lay_out(self, state: Tensor, attention_mask: Tensor, start: int) -> Layout | None:
        """What of rows stays the same while positions from `start` on are written.

        Args:
            state: int64 [N, S]; what stands from `start` on says nothing of what will stand there.
            attention_mask: bool [N, S], False at padding.
            start: first column that may change.

        Returns:
            What `mixed_states` can make use of, such as keys and values of prompts that do not attend to what follows;
            None where everything may change.
        """
        ...

    def mixed_states(self, state: Tensor, attention_mask: Tensor, start: int, layout: Any = None) -> Tensor:
        """Everything in which positions read one another, of those from `start` on: float [N, S - start, W].

        Args:
            state: int64 [N, S], MASK at hidden positions.
            attention_mask: bool [N, S], False at padding.
            start: columns that are not asked for.
            layout: of `lay_out`, where there is one for these rows.
        """
        ...

    def finish(self, mixed: Tensor) -> Tensor:
        """What is left before the output head, at each position by itself: float [.., W] -> [.., W]."""
        ...


_CALL, _HEAD, _TAIL = (
    ("forward", "__call__"),
    ("hidden_states", "output_logits"),
    ("lay_out", "mixed_states", "finish"),
)


def _offers(denoiser: object, methods: tuple[str, ...], instead_of: tuple[str, ...]) -> bool:
    """Whether a denoiser has methods, and using them comes to the same as using others of it.

    Not so for a wrapper (compiled, distributed) that only passes attributes on, for a subclass that changes the others
    alone, nor for a module with hooks on its call.
    """
    if getattr(denoiser, "_forward_hooks", None) or getattr(denoiser, "_forward_pre_hooks", None):
        return False
    kind: Any = type(denoiser)
    return _class_offers(kind, methods, instead_of)


@cache
def _class_offers(kind: type, methods: tuple[str, ...], instead_of: tuple[str, ...]) -> bool:
    heirs = kind.__mro__
    has = all(any(name in vars(heir) for heir in heirs) for name in methods)
    changed = (name for heir in heirs for name in (*methods, *instead_of) if name in vars(heir))  # the latest first
    return has and next(changed) in methods


LARGE = 100  # rows of a batch in which it pays to look for equal ones


def distinct_rows(rows: Tensor, sequences: int) -> tuple[Tensor, Tensor] | None:
    """Find rows that say the same about the same sequence, so that a network reads them once.

    Particles of one sequence that agree so far, and all that have finished, are such rows. Finding them has to wait for
    the device, so that this is done on the CPU only, and for batches that take a while.

    Args:
        rows: int64 [N, W], row n about sequence n % B.
        sequences: B.

    Returns:
        The place of one row of each kind, int64 [U], and the kind of every row, int64 [N]; None where there is nothing
        to gain.
    """
    if rows.device.type != "cpu" or len(rows) < max(LARGE, 2 * sequences):
        return None
    about = torch.arange(len(rows)) % sequences
    _, kind = torch.unique(torch.cat([about[:, None], rows], -1), dim=0, return_inverse=True)
    kinds = int(kind.max()) + 1
    if kinds > 0.9 * len(rows):
        return None
    return torch.empty(kinds, dtype=torch.int64).scatter_(0, kind, torch.arange(len(rows))), kind


class Reader:
    """A denoiser bound to the canvas of a batch: what it reads there, from the first column that is to be revealed on.

    It runs on plain tensors, outside of what Pyro traces, so that compiled and custom kernels work.

    Args:
        denoiser: see `Denoiser`.
        batch: the canvas.

    Attributes:
        start: first column that is read off; those before it are given or padding in every row.
    """

    def __init__(self, denoiser: Denoiser, batch: Batch) -> None:
        self.denoiser, self.batch = denoiser, batch
        self.start = batch.prefix
        self._is_split = _offers(denoiser, _HEAD, _CALL)
        self._has_tail = self._is_split and _offers(denoiser, _TAIL, _HEAD + _CALL)
        self._layout: Layout | None = None

    def rows(self, index: Tensor) -> Reader:
        """The same reader with the rows in `index` (int64 or bool [B]) only."""
        kept = Reader.__new__(Reader)
        kept.__dict__.update(self.__dict__)
        kept.batch = self.batch.rows(index)
        kept._layout = None if self._layout is None else self._layout.rows(index)
        return kept

    def lay_out(self) -> None:
        """Work out once for all reads to come what does not change from one to the next."""
        if self._has_tail:
            tokens, attention = self.batch.readable, self.batch.attention_mask
            self._layout = cast(TailDenoiser, self.denoiser).lay_out(tokens, attention, self.start)

    def read(self, tokens: Tensor) -> Tensor:
        """Everything before the output head, in one denoiser call.

        Args:
            tokens: int64 [*, B, S], MASK at hidden positions.

        Returns:
            float [*, B, S - start, W]; of a denoiser that does not offer its head by itself its logits, W = V.

        Raises:
            UserError: the denoiser returns something of another shape.
        """
        if tokens.dim() == 2:
            return self.finish(self.mix(tokens))
        tokens = detach_provenance(tokens)
        rows = tokens.reshape(-1, tokens.shape[-1])
        attention = self.batch.attention_mask.expand(tokens.shape).reshape(rows.shape)
        distinct = distinct_rows(rows, tokens.shape[-2])
        if distinct is None:
            found = self.finish(self._mix(rows, attention))
        else:
            places, kind = distinct
            found = self.finish(self._mix(rows[places], attention[places]))[kind]
        return found.reshape(*tokens.shape[:-1], found.shape[-2], found.shape[-1])

    def mix(self, tokens: Tensor) -> Tensor:
        """The part of `read` in which positions read one another: float [B, S - start, W] from int64 [B, S]."""
        return self._mix(detach_provenance(tokens), self.batch.attention_mask)

    def finish(self, mixed: Tensor) -> Tensor:
        """The part of `read` that is left, at each position by itself: float [.., W] -> [.., W]."""
        return cast(TailDenoiser, self.denoiser).finish(mixed) if self._has_tail else mixed

    def _mix(self, rows: Tensor, attention: Tensor) -> Tensor:
        """float [N, S - start, W] from int64 and bool [N, S]."""
        if self._has_tail:
            return cast(TailDenoiser, self.denoiser).mixed_states(rows, attention, self.start, self._layout)
        read = cast(SplitDenoiser, self.denoiser).hidden_states if self._is_split else self.denoiser
        found = read(rows, attention)
        is_tensor = isinstance(found, Tensor)
        if not is_tensor or not found.is_floating_point() or found.dim() != 3 or found.shape[:2] != rows.shape:
            what = f"{tuple(found.shape)} of {found.dtype}" if is_tensor else type(found).__name__
            problem = f"returned {what} for a batch of {tuple(rows.shape)}"
            raise UserError("denoiser", problem, "return logits, float [N, S, V]")
        return found[:, self.start :]

    def logits(self, hidden: Tensor) -> Tensor:
        """Token logits from what `read` gave: float [.., W] -> at least float32 [.., V], -inf at MASK."""
        logits = cast(SplitDenoiser, self.denoiser).output_logits(hidden) if self._is_split else hidden
        # Log-probabilities are summed over positions and steps: eight bits are too few.
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        if logits.shape[-1] != self.denoiser.vocab_size:
            problem = f"returned {logits.shape[-1]} token classes, it declares {self.denoiser.vocab_size}"
            raise UserError("denoiser", problem, "make vocab_size that of its output head")
        mask = self.denoiser.mask_index
        if mask >= logits.shape[-1]:
            return logits
        if self._is_split and not logits.requires_grad:
            logits.select(-1, mask).fill_(-torch.inf)  # a new tensor, nobody else's
            return logits
        is_mask = torch.arange(logits.shape[-1], device=logits.device) == mask
        return logits.masked_fill(is_mask, -torch.inf)
