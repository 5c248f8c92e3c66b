"""A rule that looks a step ahead before it decides."""

from __future__ import annotations

import torch
from torch import Tensor

from orderppl.distributions import DecidedSet
from orderppl.errors import UserError
from orderppl.policies.policy import Policy
from orderppl.policies.scores import entropy, predicted_tokens
from orderppl.policies.wrappers import Wrapper
from orderppl.randomness import SELECTION, row_noise
from orderppl.unmasking import State
from orderppl.unmasking.denoiser import Reader
from orderppl.unmasking.predictions import Window

_GOLDEN = 0.6180339887498949


class LookAhead(Wrapper):
    """Of several sets that another policy draws, the one that leaves least to guess (Info-Gain, arXiv 2602.18176).

        z_t = argmin_n  sum_{i in z_n} H_i(s_t) + sum_{i in M_t - z_n} H_i(s_t with z_n filled in)

    z_n are filled in with the most likely tokens, and all candidates are read in one batched call: a step is charged as
    many forwards as there are candidates. It decodes only: the choice leaves no density.

    Args:
        policy: one that draws, such as `Ranked("top_prob", temperature=0.1)`.
        candidates: sets to choose from, at least 2.

    Raises:
        UserError: fewer candidates.
    """

    def __init__(self, policy: Policy, candidates: int = 4) -> None:
        super().__init__(policy)
        if candidates < 2:
            raise UserError("candidates", f"{candidates} leaves no choice", "give 2 or more")
        self.candidates = candidates

    @property
    def forwards_per_step(self) -> int:  # type: ignore[override]
        """One for every candidate."""
        return self.candidates

    def forward(self, state: State) -> DecidedSet:
        """The best of the candidates."""
        sets = super().forward(state)
        drawn = torch.stack([sets.draw(noise) & state.masked for noise in self._noises(state)])  # [N, *, S]
        tokens = torch.where(drawn, predicted_tokens(state), state.tokens)
        after = Window(Reader(state.denoiser, state.batch), tokens).per_position(entropy)
        nats = torch.where(drawn, state.per_position(entropy), after).masked_fill(~state.masked, 0.0)
        best = nats.sum(-1).argmin(0)  # [*]
        return DecidedSet(drawn.gather(0, best[None, ..., None].expand(drawn[:1].shape))[0], state.masked)

    def _noises(self, state: State) -> list[Tensor]:
        """Uniform numbers of every candidate, float64 [*, S] each; always the same ones where modes are taken."""
        if state.takes_mode:
            first = torch.zeros_like(state.step).flatten()  # row and step: the same numbers everywhere
            latent = state.latent.reshape(-1, state.shape[-1])
            noise = row_noise(0, first, first, latent, SELECTION).reshape(state.shape)
        else:
            noise = state.noise
        return [(noise + number * _GOLDEN) % 1.0 for number in range(self.candidates)]
