"""The canvas: sequences, what of them is attended, and what is visible from the start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from orderppl.errors import UserError, first_line

ALIASES = {"input_ids": "tokens", "tokens": "tokens", "attention_mask": "attention_mask", "given": "given"}
NOT_READ = ("token_type_ids",)  # a tokeniser gives them, and nobody needs them


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences with positions to reveal: the one argument of every model and guide.

    A prompt is given positions on the left; a template, the clues of a puzzle or the framework around a loop are given
    positions anywhere. Given positions are never masked, revealed, counted or changed.

    Args:
        tokens: int64 [B, S]; padding may hold any id, and positions to decode too.
        attention_mask: bool [B, S], False at padding, on any side; all True when left out.
        given: bool [B, S], visible from the start. When left out, everything is to be revealed; `decode` takes all that
            is not MASK as given instead.

    Raises:
        UserError: tensors of other shapes or dtypes.
    """

    tokens: Tensor
    attention_mask: Tensor = None  # type: ignore[assignment]  # filled in below
    given: Tensor | None = None

    def __post_init__(self) -> None:
        """Fill in what was left out, and check the shapes."""
        tokens: Any = self.tokens
        if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.is_floating_point():
            what = f"shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
            raise UserError("tokens", f"{what} where ids [B, S] are needed", "give an int64 tensor of two dimensions")
        object.__setattr__(self, "tokens", tokens.long())
        given_mask: Any = self.attention_mask
        if given_mask is None:
            object.__setattr__(self, "attention_mask", torch.ones_like(self.tokens, dtype=torch.bool))
        for name in ("attention_mask", "given"):
            mask = getattr(self, name)
            if mask is None:
                continue
            if not isinstance(mask, Tensor) or mask.shape != self.tokens.shape:
                shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
                raise UserError(name, f"{shape} for tokens of {tuple(self.tokens.shape)}", "give one value per token")
            object.__setattr__(self, name, mask.bool())

    @staticmethod
    def of(source: Batch | Tensor | Mapping[str, Any]) -> Batch:
        """A batch from what users hold: tokens, or a mapping such as a tokeniser's `BatchEncoding`.

        Raises:
            UserError: an entry that nobody knows, or no tokens.
        """
        if isinstance(source, Batch):
            return source
        if hasattr(source, "column_names"):  # a set of `datasets`
            source = {name: list(source[name]) for name in source.column_names}
        if isinstance(source, Mapping):
            source = {name: values for name, values in source.items() if name not in NOT_READ}
            unknown = [str(name) for name in source if name not in ALIASES]
            if unknown:
                raise UserError("batch", f"unknown entry {unknown[0]!r}", "use tokens, attention_mask and given")
            found = {ALIASES[name]: _as_tensor(name, values) for name, values in source.items()}
            if "tokens" not in found:
                raise UserError("batch", f"no tokens among {', '.join(map(str, source))}", "give tokens (or input_ids)")
            return Batch(**found)
        return Batch(_as_tensor("batch", source))

    def __repr__(self) -> str:
        """Its size, and how much of it is to be revealed."""
        given = "nothing said of what is given" if self.given is None else f"{int(self.latent.sum())} to reveal"
        return f"Batch({' x '.join(map(str, self.tokens.shape))} tokens, {given})"

    def __len__(self) -> int:
        """Number of sequences B."""
        return len(self.tokens)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.tokens.device

    @cached_property
    def latent(self) -> Tensor:
        """The positions to reveal, all that is masked before the first step: attended and not given, bool [B, S]."""
        return self.attention_mask if self.given is None else self.attention_mask & ~self.given

    @cached_property
    def num_latent(self) -> Tensor:
        """How many positions of each row are to be revealed: int64 [B]."""
        return self.latent.sum(-1)

    @cached_property
    def readable(self) -> Tensor:
        """The tokens with 0 at padding, which may hold ids that the denoiser has no class for: int64 [B, S]."""
        return self.tokens.masked_fill(~self.attention_mask, 0)

    @cached_property
    def prefix(self) -> int:
        """Leading columns that no row has to reveal; known on the host, so ask before the batch goes to a device."""
        columns = self.latent.any(0).cpu()
        return int(columns.to(torch.uint8).argmax()) if bool(columns.any()) else len(columns)

    def _keeping_prefix(self, other: Batch) -> Batch:
        if "prefix" in self.__dict__:
            other.__dict__["prefix"] = self.prefix
        return other

    def rows(self, index: Tensor | slice) -> Batch:
        """Some of the rows: int64 or bool [B], or a slice."""
        given = None if self.given is None else self.given[index]
        return self._keeping_prefix(Batch(self.tokens[index], self.attention_mask[index], given))

    def to(self, device: torch.device | str) -> Batch:
        """The same sequences on a device; from pinned memory without waiting."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        given = None if self.given is None else move(self.given)
        return self._keeping_prefix(Batch(move(self.tokens), move(self.attention_mask), given))

    def trimmed(self) -> Batch:
        """The same sequences without the columns that are padding in every row (one at least is kept)."""
        columns = self.attention_mask.any(0)
        columns[0] |= ~columns.any()
        if bool(columns.all()):
            return self
        given = None if self.given is None else self.given[:, columns]
        return Batch(self.tokens[:, columns], self.attention_mask[:, columns], given)

    def wanted(self, answer: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Which positions are the answer, bool [B, S], as a function of tokens (-1 at padding) and `latent` says."""
        return answer(self.tokens.masked_fill(~self.attention_mask, -1), self.latent)

    def hidden(self) -> Batch:
        """The same canvas with id 0 at every position to reveal: what a guide blind to the tokens may see."""
        return self._keeping_prefix(replace(self, tokens=self.tokens.masked_fill(self.latent, 0)))


def _as_tensor(name: str, values: Any) -> Tensor:
    """An array, or rows of one length."""
    if isinstance(values, list | tuple) and values and hasattr(values[0], "tolist"):
        values = [row.tolist() for row in values]
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        problem = f"a {type(values).__name__} is no array of ids ({first_line(error)})"
        raise UserError(name, problem, "give rows of one length, of a loader one batch") from error
