"""Ordered partitions of the response positions, and the partially revealed states they lead through.

Everywhere, `reveal_step` is int64 [*, L]: the 0-based step at which a position is revealed, and -1 where a position
is visible from the start (padding). So `reveal_step >= t` is the set M_t still masked before step t.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from orderppl.denoising import Canvas

VISIBLE = -1  # reveal_step of a position that is never masked


def stacked_steps(num_steps: int, like: Tensor) -> Tensor:
    """All step indices, ready to broadcast against `like` [*, L] from a new leading dimension: int64 [T, 1.., 1]."""
    return torch.arange(num_steps, device=like.device).reshape((-1,) + (1,) * like.dim())


def same_step(step: int, like: Tensor) -> Tensor:
    """One step index for all rows of `like` [*, L]: int64 [*], expanded from a single number."""
    return torch.full((1,) * (like.dim() - 1), step, device=like.device).expand(like.shape[:-1])


def masked_before(reveal_step: Tensor, step: Tensor | int) -> Tensor:
    """M_t: positions still hidden before `step`; bool, broadcast of [*, L] and `step`."""
    return reveal_step >= step


def reveal_set(reveal_step: Tensor, step: Tensor | int) -> Tensor:
    """z_t: positions revealed at `step`; bool, broadcast of [*, L] and `step`."""
    return reveal_step == step


def partial_state(tokens: Tensor, masked: Tensor, mask_index: int) -> Tensor:
    """s_t: `tokens` int64 [*, L] with MASK where `masked` bool [*, L] is set."""
    return torch.where(masked, mask_index, tokens)


def steps_used(reveal_step: Tensor) -> Tensor:
    """Number of denoiser forwards an order needs, empty steps before the last one included: int64 [*]."""
    return reveal_step.amax(-1) + 1


def enumerate_partitions(num_positions: int, num_steps: int) -> Tensor:
    """Every ordered partition of `num_positions` positions into at most `num_steps` steps: int64 [T**L, L]."""
    grid = torch.cartesian_prod(*[torch.arange(num_steps)] * num_positions)
    return grid.reshape(-1, num_positions)


@dataclass
class UnmaskingState:
    """What a policy may see at one step: everything but the hidden tokens.

    All leading shapes `*` are the same; they may stack steps and particles, e.g. [T, K, B].

    Attributes:
        tokens: int64 [*, L], the partially revealed sequence s_t, MASK where hidden.
        masked: bool [*, L], M_t. Padding is never masked.
        step: int64 [*], 0-based step index t.
        num_steps: the step budget T.
        canvas: prompt, padding and denoiser of the batch; its rows are the last leading dimension.
        noise: float64 [*, L] in (0, 1), one uniform draw per position for stochastic policies when decoding;
            it depends on the seed, the row and the step only, never on the batch. None when a caller samples by torch.
        memory: tensors with the batch as first dimension that a policy keeps between the steps of one decoding;
            rows leave it as they leave the batch.
        laws: reveal sets already found here, by the method that gives them, for others that follow the same policy.
    """

    tokens: Tensor
    masked: Tensor
    step: Tensor
    num_steps: int
    canvas: Canvas
    noise: Tensor | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)
    laws: dict[Callable[..., Any], Any] = field(default_factory=dict)
    _scored: tuple[Tensor, float, Tensor] | None = None

    @cached_property
    def logits(self) -> Tensor:
        """Denoiser logits at every position, float [*, L, V]; one denoiser call, made when first asked for."""
        return self._read_logits()

    @cached_property
    def hidden(self) -> Tensor:
        """What the denoiser's output head reads, float [*, L, W]; asked for before the logits, it spares their call.

        A denoiser that does not offer its head by itself gives its logits.
        """
        return self.canvas.hidden_states(self.tokens)

    def _read_logits(self) -> Tensor:
        known = self.__dict__.get("hidden")
        return self.canvas.logits(self.tokens) if known is None else self.canvas.scores(known.clone())

    @cached_property
    def log_probs(self) -> Tensor:
        """Normalised `logits`, float [*, L, V]."""
        return self.logits.log_softmax(-1)

    def pack(self, values: Tensor) -> Tensor:
        """Leave out positions that nobody may choose, where that saves work: [*, L, ..] -> [.., ..]; here none."""
        return values

    def unpack(self, values: Tensor) -> Tensor:
        """Undo `pack`, with 0 where it left positions out."""
        return values

    @property
    def packed_log_probs(self) -> Tensor:
        """`log_probs` of the positions that `pack` keeps, float [.., V]."""
        return self.log_probs

    def per_position(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """A number per position from its token log-probabilities; for heuristics, which look at hidden positions only.

        Args:
            function: float [.., V] -> [..].

        Returns:
            [*, L], meaningful at hidden positions.
        """
        return function(self.log_probs)

    def token_log_prob(self, tokens: Tensor, temperature: float = 1.0) -> Tensor:
        """l_i(s_t): log-likelihood of every hidden token, float [*, L]; 0 where it is not hidden.

        Args:
            tokens: int64 [*, L] or [B, L], the clean tokens.
            temperature: at which they are drawn, positive.
        """
        if self._scored is None or self._scored[0] is not tokens or self._scored[1] != temperature:
            self._scored = tokens, temperature, self._score(tokens, temperature)
        return self._scored[2]

    def _score(self, tokens: Tensor, temperature: float) -> Tensor:
        """`token_log_prob`, worked out."""
        index = torch.where(self.masked, tokens, 0).unsqueeze(-1)
        if "log_probs" in self.__dict__ and temperature == 1:
            chosen = self.log_probs.gather(-1, index).squeeze(-1)
        else:  # without another tensor of the size of the logits
            logits = self.logits if temperature == 1 else self.logits / temperature
            chosen = logits.gather(-1, index).squeeze(-1) - logits.logsumexp(-1)
        return chosen.masked_fill(~self.masked, 0.0)

    def forget_logits(self) -> None:
        """Let go of what is as large as the logits; asking for it again costs another denoiser call."""
        for name in ("logits", "log_probs"):
            self.__dict__.pop(name, None)

    def law(self, distribution: Callable[[UnmaskingState], Any]) -> Any:
        """`distribution(self)`, or what is already known of it here."""
        known = self.laws.get(distribution)
        return distribution(self) if known is None else known

    @cached_property
    def is_last(self) -> Tensor:
        """Whether everything left is revealed now, bool [*]."""
        return self.step == self.num_steps - 1

    @property
    def attention_mask(self) -> Tensor:
        """bool [*, L], False at padding."""
        return self.canvas.attention_mask.expand(self.masked.shape)

    @property
    def steps_left(self) -> Tensor:
        """Steps still to go, this one included: int64 [*], 1 at the last step."""
        return self.num_steps - self.step

    def part(self, index: int) -> UnmaskingState:
        """The states at an index of the first leading dimension, such as one step; shares the denoiser call."""
        return self._view(lambda x: x[index], self.canvas)

    def expand(self, lead: torch.Size) -> UnmaskingState:
        """The same states for all particles, leading shape `lead` in place of its last dimensions; shares the call."""
        now = self.masked.dim() - 1
        return self._view(lambda x: x.expand(lead + x.shape[now:]), self.canvas)

    def flat(self) -> UnmaskingState:
        """All states as the rows of one batch, for policies that know no other leading shape; shares the denoiser call.

        Row n of [*, B] stands on row n % B of the canvas.
        """
        lead = self.masked.shape[:-1]
        rows = torch.arange(lead[-1], device=self.masked.device).expand(lead).flatten()
        canvas = self.canvas if len(lead) == 1 else self.canvas.rows(rows)
        return self._view(lambda x: x.flatten(0, len(lead) - 1), canvas)

    def _view(self, pick: Callable[[Tensor], Tensor], canvas: Canvas) -> UnmaskingState:
        view = _View(pick(self.tokens), pick(self.masked), pick(self.step), self.num_steps, canvas)
        view.source, view.pick = self, pick
        return view


class _View(UnmaskingState):
    """Rows of other states, whose denoiser output it takes its own from."""

    source: UnmaskingState
    pick: Callable[[Tensor], Tensor]

    @cached_property
    def logits(self) -> Tensor:
        return self.pick(self.source.logits)

    @cached_property
    def hidden(self) -> Tensor:
        return self.pick(self.source.hidden)


class StackedStates(UnmaskingState):
    """The states before each of the T steps of an order, leading shape [T, *, B].

    The first one hides everything, whatever the order: the denoiser reads it once per sequence, not once per particle.
    """

    @cached_property
    def distinct(self) -> UnmaskingState:
        """The states without those repeats, leading shape [1 + (T - 1) K, B]."""
        tokens, masked, step = (self._gather(x) for x in (self.tokens, self.masked, self.step))
        return UnmaskingState(tokens, masked, step, self.num_steps, self.canvas)

    @property
    def _copies(self) -> int:
        return prod(self.step.shape[1:-1])

    def _gather(self, values: Tensor) -> Tensor:
        """[T, *, B, ..] -> [1 + (T - 1) K, B, ..]."""
        rows = values.reshape((len(values), self._copies) + values.shape[self.step.dim() - 1 :])
        return torch.cat([rows[0, :1], rows[1:].flatten(0, 1)])

    def _spread(self, rows: Tensor) -> Tensor:
        """[1 + (T - 1) K, B, ..] -> [T, *, B, ..]."""
        first = rows[:1].expand((self._copies,) + rows.shape[1:])
        return torch.cat([first, rows[1:]]).reshape(self.step.shape + rows.shape[2:])

    @cached_property
    def logits(self) -> Tensor:
        """Denoiser logits at every position, float [T, *, B, L, V]."""
        return self._read_logits() if self._copies == 1 else self._spread(self.distinct.logits)

    @cached_property
    def hidden(self) -> Tensor:
        """What the output head reads at every position, float [T, *, B, L, W]."""
        return self.canvas.hidden_states(self.tokens) if self._copies == 1 else self._spread(self.distinct.hidden)

    @cached_property
    def log_probs(self) -> Tensor:
        """Normalised `logits`, float [T, *, B, L, V]."""
        return self.logits.log_softmax(-1) if self._copies == 1 else self._spread(self.distinct.log_probs)

    def _score(self, tokens: Tensor, temperature: float) -> Tensor:
        if self._copies == 1 or tokens.dim() > 2:  # tokens of their own for every particle
            return super()._score(tokens, temperature)
        return self._spread(self.distinct.token_log_prob(tokens, temperature))


class FollowedStates(StackedStates):
    """Stacked states that were met one by one, and read by the denoiser then.

    Args:
        met: the T states; the first without particles, leading shape [B], the others [*, B].
    """

    def __init__(self, met: list[UnmaskingState]) -> None:
        lead = met[-1].step.shape
        tokens = torch.stack([state.tokens.expand(lead + state.tokens.shape[-1:]) for state in met])
        masked = torch.stack([state.masked.expand(lead + state.masked.shape[-1:]) for state in met])
        step = torch.stack([state.step.expand(lead) for state in met])
        super().__init__(tokens, masked, step, met[0].num_steps, met[0].canvas)
        self.met = met

    @cached_property
    def logits(self) -> Tensor:
        """Denoiser logits at every position, float [T, *, B, L, V]."""
        return self._stacked(lambda state: state.logits)

    @cached_property
    def hidden(self) -> Tensor:
        """What the output head reads at every position, float [T, *, B, L, W]."""
        return self._stacked(lambda state: state.hidden)

    def _stacked(self, read: Callable[[UnmaskingState], Tensor]) -> Tensor:
        """What every state says, [*, ..] each or without particles, along a new first dimension."""
        lead, by_step = self.step.shape[1:], [(state.step.dim(), read(state)) for state in self.met]
        return torch.stack([values.expand(lead + values.shape[size:]) for size, values in by_step])

    @cached_property
    def log_probs(self) -> Tensor:
        """Normalised `logits`, float [T, *, B, L, V]."""
        return self.logits.log_softmax(-1)

    def _score(self, tokens: Tensor, temperature: float) -> Tensor:
        if tokens.dim() > 2:
            return UnmaskingState._score(self, tokens, temperature)
        return self._stacked(lambda state: state.token_log_prob(tokens, temperature))
