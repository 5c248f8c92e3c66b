"""The states that a batch goes through under a reveal order."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from pyro.ops.provenance import detach_provenance
from torch import Tensor

from orderppl.unmasking.batch import Batch
from orderppl.unmasking.denoiser import Denoiser, Reader
from orderppl.unmasking.predictions import Predictions, Views, Window
from orderppl.unmasking.state import State

if TYPE_CHECKING:
    from orderppl.distributions import SetDistribution

VISIBLE = -1  # reveal_step of a position that is never masked: given, or padding


def steps_used(reveal_step: Tensor) -> Tensor:
    """Number of denoiser forwards an order needs, empty steps before the last one included: int64 [*]."""
    return reveal_step.amax(-1) + 1


def same_step(step: int, like: Tensor) -> Tensor:
    """One step index for all rows of `like` [*, S]: int64 [*], expanded from a single number."""
    return torch.full((1,) * (like.dim() - 1), step, device=like.device).expand(like.shape[:-1])


class Met(NamedTuple):
    """A state that was met while an order was drawn, and the distribution of the set drawn there (None at the last)."""

    state: State
    sets: SetDistribution | None


class Path:
    """The clean tokens of a batch before a denoiser, ready to be revealed in any order.

    Args:
        batch: the canvas with its clean tokens x.
        denoiser: see `Denoiser`.
        num_steps: step budget T.
    """

    def __init__(self, batch: Batch, denoiser: Denoiser, num_steps: int) -> None:
        self.batch, self.denoiser, self.num_steps = batch, denoiser, num_steps
        self.reader = Reader(denoiser, batch)

    def is_that_of(self, other: Path | State) -> bool:
        """Whether the same denoiser reads the same tokens there, so that it need not read them again."""
        mine, theirs = self.batch, other.batch
        if self.denoiser is not other.denoiser or mine is theirs:
            return self.denoiser is other.denoiser
        names = ("readable", "attention_mask", "latent")  # the host waits: for batches that were made twice only
        return all(torch.equal(getattr(mine, name), getattr(theirs, name)) for name in names)

    def hide(self, masked: Tensor) -> Tensor:
        """s_t: the clean tokens with MASK where `masked` bool [*, S]; 0 at padding: int64 [*, S]."""
        return torch.where(masked, self.denoiser.mask_index, self.batch.readable)

    def state(
        self, masked: Tensor, step: Tensor, predictions: Predictions | None = None, tokens: Tensor | None = None
    ) -> State:
        """The state that hides `masked` (bool [*, B, S]) before `step` (int64 [*, B]).

        `tokens` (int64 [*, B, S], MASK where hidden) are what is visible where these are not the clean ones.
        """
        tokens = self.hide(masked) if tokens is None else tokens
        if predictions is None:
            predictions = Window(self.reader, tokens)
        batch, denoiser, truth = self.batch, self.denoiser, self.batch.readable
        seen = tokens, masked, step, self.num_steps, batch, denoiser, predictions
        return State(*seen, truth=truth, is_scored=True)

    def opening(self) -> State:
        """The state before the first step, leading shape [B]."""
        latent = self.batch.latent
        return self.state(latent, same_step(0, latent))


class Trajectory:
    """The T states of an order, or n of them, stacked: leading shape [T, *, B].

    Args:
        path: the sequences that are revealed.
        reveal_step: int64 [*, B, S], the order; it may lack dimensions of the batch.
        met: the states met while the order was drawn; without them they are built, and read in one denoiser call.
        step: int64 [n, *, B], the states before these steps only, which are built.
    """

    def __init__(
        self, path: Path, reveal_step: Tensor, met: Sequence[Met] | None = None, step: Tensor | None = None
    ) -> None:
        order = detach_provenance(reveal_step)
        self.path, self.num_steps = path, path.num_steps
        self.order = order.expand(torch.broadcast_shapes(order.shape, path.batch.tokens.shape))
        self.met, self.is_whole = met or None, step is None
        if step is None:
            step = torch.arange(self.num_steps, device=order.device).reshape((-1,) + (1,) * (self.order.dim() - 1))
        self.step = step.expand(step.shape[:1] + self.order.shape[:-1])  # [T, *, B]
        self.masked = self.order >= self.step.unsqueeze(-1)  # M_t, [T, *, B, S]
        self.revealed = self.order == self.step.unsqueeze(-1)  # z_t; given positions are -1: never

    @cached_property
    def states(self) -> State:
        """The states before each step; one denoiser call for all who ask, none where they were read already."""
        predictions = self._met_predictions() if self.met and self.met[0].state.predictions.was_read else self._read()
        return self.path.state(self.masked, self.step, predictions)

    def token_log_prob(self, tokens: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """l_i(s_t) of the clean (or other) tokens: float [T, *, B, S]; 0 where they are not hidden."""
        return self.states.token_log_prob(self.path.batch.readable if tokens is None else tokens, temperature)

    def _met_predictions(self) -> Predictions:
        assert self.met is not None
        lead = self.order.shape[:-1]
        dims = [state.step.dim() for state, _ in self.met]

        def join(parts: list[Tensor]) -> Tensor:
            # The first state lacks the particles.
            return torch.stack([part.expand(lead + part.shape[dim:]) for part, dim in zip(parts, dims, strict=True)])

        return Views([state.predictions for state, _ in self.met], join)

    def _read(self) -> Predictions:
        """One call on the different states: the first hides everything, whatever the order, for all particles."""
        tokens = self.path.hide(self.masked)
        lead, num_steps = self.order.shape[:-1], self.num_steps  # not self: what is read must not hold the trajectory
        copies = prod(lead[:-1])
        if copies == 1 or not self.is_whole:
            return Window(self.path.reader, tokens)
        rows = tokens.reshape((num_steps, copies) + tokens.shape[-2:])
        distinct = torch.cat([rows[0, :1], rows[1:].flatten(0, 1)])  # [1 + (T - 1) K, B, S]

        def spread(parts: list[Tensor]) -> Tensor:
            values = parts[0]
            first = values[:1].expand((copies,) + values.shape[1:])
            return torch.cat([first, values[1:]]).reshape((num_steps,) + lead + values.shape[2:])

        return _Spread([Window(self.path.reader, distinct)], spread)


class _Spread(Views):
    """Stacked states of which the first is the same for all particles."""

    def token_log_prob(self, tokens: Tensor, temperature: float = 1.0) -> Tensor:
        """See `Predictions`; tokens that are the same for all particles are looked up once per different state."""
        if tokens.dim() == 2:
            return super().token_log_prob(tokens, temperature)
        log_probs = self.per_position(lambda own: (own / temperature).log_softmax(-1))  # [T, *, B, S, V]
        index = tokens.expand(log_probs.shape[:-1]).unsqueeze(-1)
        return log_probs.gather(-1, index).squeeze(-1)
