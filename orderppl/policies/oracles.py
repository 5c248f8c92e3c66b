"""Policies that look at the true tokens: upper bounds and teachers, never deployable."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from orderppl.distributions import DecidedSet
from orderppl.errors import UserError
from orderppl.policies.policy import Policy
from orderppl.policies.ranked import Ranked
from orderppl.policies.schedules import SetSizes
from orderppl.policies.scores import best_of
from orderppl.unmasking import State


class Oracle(Ranked):
    """The K positions of largest log p(x_i), or p(x_i) - max over other tokens of p (arXiv 2602.09501).

    Args:
        kind: "greedy" or "margin".
        sizes: see `Ranked`.
        temperature: see `Ranked`.

    Raises:
        UserError: another kind; when asked, a state whose true tokens are not known.

    Attributes:
        sees_truth: says so to whoever looks for something to deploy, as a network that reads the truth does.
    """

    sees_truth = True

    def __init__(
        self,
        kind: Literal["greedy", "margin"] = "greedy",
        sizes: SetSizes | Literal["uniform", "cosine"] | float = "uniform",
        temperature: float = 0.0,
    ) -> None:
        super().__init__("top_prob", sizes, temperature)
        if kind not in ("greedy", "margin"):
            raise UserError("kind", f"unknown oracle {kind!r}", "use greedy or margin")
        self.kind = kind

    def scores(self, state: State) -> Tensor:
        """What ranks the positions, float [*, S]."""
        truth = _truth_of(state)
        own = state.token_log_prob(truth)
        if self.kind == "greedy":
            return own
        top = state.per_position(lambda log_probs: log_probs.topk(2, -1).values.exp())  # [*, S, 2]
        best = state.per_position(lambda log_probs: log_probs.argmax(-1))
        return own.exp() - torch.where(best == truth, top[..., 1], top[..., 0])


class CorrectOracle(Policy):
    """All positions whose most likely token is the true one; where there are none, the one that comes closest.

    As a teacher (`Imitation`) it shows which tokens may be taken at once: the labels of Learn2PD (arXiv 2509.25188),
    whose truth is what the denoiser itself ends up writing (`orderppl.models.denoisers.OwnOutput`).

    Raises:
        UserError: when asked, a state whose true tokens are not known.
    """

    sees_truth = True
    non_empty = True

    def forward(self, state: State) -> DecidedSet:
        """What is right already."""
        truth = _truth_of(state)
        right = (state.per_position(lambda log_probs: log_probs.argmax(-1)) == truth) & state.masked
        closest = best_of(state.token_log_prob(truth), state.masked)
        return DecidedSet(torch.where(right.any(-1, keepdim=True), right, closest), state.masked, non_empty=True)


def _truth_of(state: State) -> Tensor:
    """The true tokens, int64 [*, S]."""
    if state.truth is None:
        raise UserError("policy", "an oracle needs the true tokens", "follow known sequences; it cannot decode")
    return state.truth.expand(state.shape)
