"""What every denoiser offers, and the canvas that puts sequences before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Protocol, cast, runtime_checkable

import torch
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from torch import Tensor

from orderppl.errors import UserError


@runtime_checkable
class Denoiser(Protocol):
    """A masked model: partially revealed sequences -> logits of the clean tokens.

    Attributes:
        mask_index: id of the MASK token. When it is below `vocab_size`, the canvas gives it zero probability.
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
class SoftDenoiser(Denoiser, Protocol):
    """A denoiser that also reads tokens revealed in part, for relaxations of the order.

    Attributes:
        reads_itself: whether the logits of a position depend on what is visible of its own token.
    """

    reads_itself: bool

    def soft_logits(self, tokens: Tensor, visible: Tensor, attention_mask: Tensor) -> Tensor:
        """Score every position, differentiably in `visible`.

        Args:
            tokens: int64 [N, S], clean tokens; padding may hold any id.
            visible: float [N, S], from 0 (as good as MASK) to 1 (the token). Where all are 0 or 1, the result is that
                of the denoiser for the partially revealed sequence.
            attention_mask: bool [N, S], False at padding.

        Returns:
            float [N, S, V], as the denoiser does.
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


@runtime_checkable
class TailDenoiser(SplitDenoiser, Protocol):
    """A denoiser that does not work out the hidden states of the prompt, which nobody reads."""

    def tail_states(self, state: Tensor, attention_mask: Tensor, start: int) -> Tensor:
        """`hidden_states` of the positions from `start` on: float [N, S - start, W]."""
        ...


@runtime_checkable
class PromptDenoiser(SplitDenoiser, Protocol):
    """A denoiser whose prompt does not attend to the response, so that decoding reads the prompt once."""

    def encode_prompt(self, context: Tensor, context_mask: Tensor) -> Tensor | None:
        """What responses attend to.

        Args:
            context: int64 [N, C], prompts.
            context_mask: bool [N, C], False at padding.

        Returns:
            float [N, ..], rows first; None when these prompts cannot be read without their responses.
        """
        ...

    def response_states(self, tokens: Tensor, attention_mask: Tensor, prompt: Tensor, context_mask: Tensor) -> Tensor:
        """The hidden states of responses behind an encoded prompt, as `hidden_states` of the whole rows gives them.

        Args:
            tokens: int64 [N, L], MASK at hidden positions.
            attention_mask: bool [N, L], False at padding.
            prompt: float [N, ..], of `encode_prompt`.
            context_mask: bool [N, C], of the prompt.

        Returns:
            float [N, L, W].
        """
        ...


_CALL, _HEAD, _TAIL, _PROMPT = (
    ("forward", "__call__"),
    ("hidden_states", "output_logits"),
    ("tail_states",),
    ("encode_prompt", "response_states"),
)


def _offers(denoiser: object, methods: Sequence[str], instead_of: Sequence[str]) -> bool:
    """Whether a denoiser has methods, and using them comes to the same as using others of it.

    Not so for a wrapper (compiled, distributed) that only passes attributes on, for a subclass that changes the others
    alone, nor for a module with hooks on its call.
    """
    if getattr(denoiser, "_forward_hooks", None) or getattr(denoiser, "_forward_pre_hooks", None):
        return False
    heirs = type(denoiser).__mro__
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


class Canvas:
    """The prompt and the padding of a batch, bound to the denoiser that reads it.

    Maps partially revealed responses to token logits; prompts are always visible. The network runs on plain tensors
    and its output carries the provenance of its input, so that a tracing ELBO can follow the dependence through
    compiled or custom kernels.

    Args:
        denoiser: see `Denoiser`.
        attention_mask: bool [B, L], False at padding of the response.
        context: int64 [B, C], prompt tokens.
        context_mask: bool [B, C], False at padding of the prompt (left or right); all True when left out.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        attention_mask: Tensor,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> None:
        if context is not None and context_mask is None:
            context_mask = torch.ones_like(context, dtype=torch.bool)
        self.denoiser = denoiser
        self.attention_mask = attention_mask.bool()
        self.context = context
        self.context_mask = None if context_mask is None else context_mask.bool()
        self._is_split = _offers(denoiser, _HEAD, _CALL)
        # What `Module.compile` makes faster is the call, not its parts.
        is_compiled = getattr(denoiser, "_compiled_call_impl", None) is not None
        has_tail = self._is_split and context is not None and not is_compiled
        self._has_tail = has_tail and _offers(denoiser, _TAIL, _HEAD + _CALL)
        self._prompt: Tensor | None = None

    @property
    def mask_index(self) -> int:
        """Id of the MASK token."""
        return self.denoiser.mask_index

    def rows(self, index: Tensor) -> Canvas:
        """Keep the rows in `index` (int64 or bool [B])."""
        if self.context is None or self.context_mask is None:
            return Canvas(self.denoiser, self.attention_mask[index])
        kept = Canvas(self.denoiser, self.attention_mask[index], self.context[index], self.context_mask[index])
        kept._prompt = None if self._prompt is None else self._prompt[index]
        return kept

    def encode_prompt(self) -> None:
        """Read the prompts once for all calls of `hidden` to come, where the denoiser allows it."""
        if self.context is None or self.context_mask is None:
            return
        if self._is_split and _offers(self.denoiser, _PROMPT, _HEAD + _CALL):
            self._prompt = cast(PromptDenoiser, self.denoiser).encode_prompt(self.context, self.context_mask)

    def hidden(self, state: Tensor) -> Tensor:
        """What the output head reads at the response positions, in one denoiser call.

        Args:
            state: int64 [B, L], MASK at hidden positions.

        Returns:
            float [B, L, W]; for a denoiser whose head is not offered by itself, its logits, W = V.
        """
        if self._prompt is not None and self.context_mask is not None:
            denoiser = cast(PromptDenoiser, self.denoiser)
            return denoiser.response_states(state, self.attention_mask, self._prompt, self.context_mask)
        rows = state if self.context is None else torch.cat([self.context, state], -1)
        return self._before_head(rows, self._attention_of_rows)

    def _before_head(self, rows: Tensor, attention: Tensor) -> Tensor:
        """The denoiser up to its output head, all of it where that is not offered by itself.

        Args:
            rows: int64 [N, C + L], prompts and responses.
            attention: bool [N, C + L].

        Returns:
            float [N, L, W], at the responses.
        """
        if self._has_tail:
            return cast(TailDenoiser, self.denoiser).tail_states(rows, attention, self._start(rows))
        read = cast(SplitDenoiser, self.denoiser).hidden_states if self._is_split else self.denoiser
        return read(rows, attention)[:, self._start(rows) :]

    def _start(self, rows: Tensor) -> int:
        """Where the responses of rows [N, C + L] begin: C."""
        return rows.shape[-1] - self.attention_mask.shape[-1]

    @cached_property
    def _attention_of_rows(self) -> Tensor:
        """bool [B, C + L], False at padding."""
        return self._with_prompt(self.attention_mask, self.context)[1]

    def scores(self, hidden: Tensor) -> Tensor:
        """Token logits of rows of `hidden`, which may be written over.

        Args:
            hidden: float [.., W], a copy of its own.

        Returns:
            float [.., V], as `logits` gives them.
        """
        provenance = get_provenance(hidden)
        hidden = detach_provenance(hidden)
        logits = cast(SplitDenoiser, self.denoiser).output_logits(hidden) if self._is_split else hidden
        logits = _wide(logits)
        if self.mask_index < logits.shape[-1]:
            logits[..., self.mask_index] = -torch.inf
        return track_provenance(logits, provenance)

    def logits(self, state: Tensor) -> Tensor:
        """Token logits of the response positions, in one denoiser call.

        Args:
            state: int64 [*, B, L], MASK at hidden positions.

        Returns:
            float [*, B, L, V], at least float32: -inf at MASK when the output head has that class.
        """
        return self._read(state, self._logits_of_rows)

    def _logits_of_rows(self, rows: Tensor, attention: Tensor) -> Tensor:
        """Logits of the responses, float [N, L, V], from rows [N, C + L]."""
        if self._has_tail:
            denoiser = cast(TailDenoiser, self.denoiser)
            return self._classes(denoiser.output_logits(self._before_head(rows, attention)))
        return self._classes(self.denoiser(rows, attention)[:, self._start(rows) :])

    def hidden_states(self, state: Tensor) -> Tensor:
        """`hidden` of states with any leading shape, int64 [*, B, L] -> float [*, B, L, W]; reads the prompts, too."""
        return self._read(state, self._before_head)

    def _read(self, state: Tensor, read: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Ask for every state (int64 [*, B, L]) once: float [*, B, L, W] from rows [N, C + L] -> float [N, L, W]."""
        provenance = get_provenance(state)
        state = detach_provenance(state)
        rows, attention = self._with_prompt(state, self.context)
        distinct = distinct_rows(state.reshape(-1, state.shape[-1]), state.shape[-2])
        if distinct is None:
            found = read(rows, attention)
        else:
            places, kind = distinct
            found = read(rows[places], attention[places])[kind]
        return track_provenance(found.reshape(*state.shape, found.shape[-1]), provenance)

    def soft_logits(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """Token logits of the response positions when tokens are visible in part, in one denoiser call.

        Args:
            tokens: int64 [*, B, L], clean tokens.
            visible: float [*, B, L] from 0 (hidden) to 1.

        Returns:
            As `logits`.

        Raises:
            UserError: a denoiser that reads tokens or MASK, nothing between.
        """
        if not isinstance(self.denoiser, SoftDenoiser):
            problem = f"{type(self.denoiser).__name__} cannot read tokens that are visible in part"
            raise UserError("denoiser", problem, "give it a `soft_logits` (see SoftDenoiser), or use another objective")
        rows, attention = self._with_prompt(tokens, self.context)
        prompt = None if self.context is None else torch.ones_like(self.context, dtype=visible.dtype)
        degrees, _ = self._with_prompt(visible, prompt)
        logits = self._classes(self.denoiser.soft_logits(rows, degrees, attention)[:, self._start(rows) :])
        return logits.reshape(*tokens.shape, logits.shape[-1])

    def _with_prompt(self, response: Tensor, prompt: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rows for the denoiser: prompt and response, and what of them is attended, [N, C + L] each."""
        lead = response.shape[:-1]  # [*, B]
        attention = self.attention_mask.expand(response.shape)
        if prompt is not None and self.context_mask is not None:
            width = prompt.shape[-1]
            response = torch.cat([prompt.expand(*lead, width), response], -1)  # [*, B, C + L]
            attention = torch.cat([self.context_mask.expand(*lead, width), attention], -1)
        size = response.shape[-1]
        return response.reshape(-1, size), attention.reshape(-1, size)

    def _classes(self, logits: Tensor) -> Tensor:
        """Logits with zero probability of MASK, float [.., V]."""
        logits = _wide(logits)
        if self.mask_index < logits.shape[-1]:
            hidden = torch.arange(logits.shape[-1], device=logits.device) == self.mask_index
            logits = logits.masked_fill(hidden, -torch.inf)
        return logits


def _wide(logits: Tensor) -> Tensor:
    """At least float32: log-probabilities are summed over positions and steps, eight bits are too few."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
