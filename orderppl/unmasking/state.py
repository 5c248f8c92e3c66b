"""What a policy may see before it decides."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from orderppl.errors import UserError
from orderppl.unmasking.batch import Batch
from orderppl.unmasking.denoiser import Denoiser
from orderppl.unmasking.predictions import Function, Predictions


class State:
    """A partially revealed batch before a step: everything but the hidden tokens.

    All leading shapes `*` are the same; they may stack steps and particles, e.g. [T, K, B].

    Args:
        tokens: int64 [*, S], MASK where hidden.
        masked: bool [*, S], M_t. Given positions and padding are never masked.
        step: int64 [*], 0-based index t.
        num_steps: the step budget T; int64 [*] inside blocks.
        batch: the canvas; its rows are the last leading dimension.
        denoiser: whose view of the state is asked for.
        predictions: that view.
        noise: makes one uniform number per position, float64 [*, S] in (0, 1); None takes modes instead of draws.
        carry: what a policy that looks back has kept from the step before.
        truth: int64 [*, S] or [B, S], the clean tokens where these are known: for oracles and posteriors only.
        is_scored: whether densities of orders are worked out, in a model or guide, instead of sets for a decoder.
    """

    def __init__(
        self,
        tokens: Tensor,
        masked: Tensor,
        step: Tensor,
        num_steps: int | Tensor,
        batch: Batch,
        denoiser: Denoiser,
        predictions: Predictions,
        noise: Callable[[], Tensor] | None = None,
        carry: Any = None,
        truth: Tensor | None = None,
        is_scored: bool = False,
    ) -> None:
        self.tokens, self.masked, self.step, self.num_steps = tokens, masked, step, num_steps
        self.batch, self.denoiser, self.predictions = batch, denoiser, predictions
        self.carry, self.truth, self.is_scored = carry, truth, is_scored
        self.price: float | Tensor | None = None  # of a step, where a policy is told one (see `AtPrice`)
        self._whole: State | None = None
        self._latent: Tensor | None = None
        self._num_hidden: Tensor | None = None
        self._noise = noise

    # ---- what is there

    @property
    def shape(self) -> torch.Size:
        """[*, S]."""
        return self.masked.shape

    @property
    def attention_mask(self) -> Tensor:
        """bool [*, S], False at padding."""
        return self.batch.attention_mask.expand(self.shape)

    @property
    def latent(self) -> Tensor:
        """The positions that were to be revealed at the first step (inside a block: of the block): bool [*, S]."""
        return self.batch.latent.expand(self.shape) if self._latent is None else self._latent

    @property
    def num_latent(self) -> Tensor:
        """How many these are: int64, broadcasts to [*]."""
        return self.batch.num_latent if self._latent is None else self._latent.sum(-1)

    @property
    def whole(self) -> State:
        """The state that this one was restricted from, for a policy that looks beyond a block."""
        return self if self._whole is None else self._whole

    @property
    def num_hidden(self) -> Tensor:
        """How many of the latent positions are still hidden, those that are held back included: int64 [*]."""
        return self.masked.sum(-1) if self._num_hidden is None else self._num_hidden

    @property
    def steps_left(self) -> Tensor:
        """Steps still to go, this one included: int64 [*], 1 at the last step."""
        return self.num_steps - self.step

    @property
    def is_last(self) -> Tensor:
        """Whether everything left is revealed now, bool [*]."""
        return self.steps_left == 1

    @property
    def takes_mode(self) -> bool:
        """Whether most probable sets are wanted instead of draws."""
        return self._noise is None and not self.is_scored

    @cached_property
    def noise(self) -> Tensor:
        """Uniform numbers, float64 [*, S] in (0, 1); when decoding they depend on seed, row and step only.

        Raises:
            UserError: densities are worked out, which a policy has to have without drawing.
            ValueError: the state takes modes.
        """
        if self.is_scored:
            problem = "draws on the way, which leaves no density of its orders"
            raise UserError("policy", problem, "use a plan as it is in model and guide, and wrap it for decoding only")
        if self._noise is None:
            raise ValueError("noise: there is none where modes are taken; look at state.takes_mode first")
        return self._noise()

    # ---- what the denoiser says of it

    def per_position(self, function: Function) -> Tensor:
        """A function of the token log-probabilities of every masked position.

        Args:
            function: float [.., V] -> [.., ..].

        Returns:
            [*, S, ..], 0 where nothing is masked.
        """
        return self._where_masked(self.predictions.per_position(function))

    def hidden(self, function: Function) -> Tensor:
        """A function of what the output head reads, float [.., W] -> [.., ..], of every masked position: [*, S, ..]."""
        return self._where_masked(self.predictions.hidden(function))

    def _where_masked(self, values: Tensor) -> Tensor:
        if self.predictions.masked is self.masked:
            return values
        return values.masked_fill(~self.masked.reshape(self.shape + (1,) * (values.dim() - self.masked.dim())), 0)

    def token_log_prob(self, tokens: Tensor, temperature: float = 1.0) -> Tensor:
        """l_i(s_t): log-likelihood of every hidden token, float [*, S]; 0 where it is not hidden.

        Args:
            tokens: int64 [*, S] or [B, S], the clean tokens.
            temperature: at which they are drawn, positive.
        """
        index = tokens.masked_fill(~self.batch.latent, 0)  # what is never hidden may be no class of the denoiser
        return self.predictions.token_log_prob(index, temperature).masked_fill(~self.masked, 0.0)

    # ---- the same state, seen otherwise

    def replace(self, **changes: Any) -> State:
        """The same state with other `carry`, `price`, `step`, ...; shares what the denoiser says."""
        view = copy.copy(self)
        for name, value in changes.items():
            setattr(view, name, value)
        return view

    def restricted(self, masked: Tensor, latent: Tensor | None = None, **changes: Any) -> State:
        """The same state with fewer positions to choose from.

        Args:
            masked: bool [*, S], those that are left; the others are held back: set sizes count them as hidden.
            latent: bool [*, S]; given, set sizes refer to these positions alone.
            changes: as of `replace`.
        """
        view = self.replace(masked=masked, **changes)
        view._whole = self.whole
        if latent is None:
            view._num_hidden = self.num_hidden
        else:
            view._latent, view._num_hidden = latent, None
        return view
