"""Policies at the two ends of what a policy may select."""

from __future__ import annotations

import torch

from orderppl import Policy, State
from orderppl.distributions import DecidedSet


class Nothing(Policy):
    """Selects nothing: the decoder decides by confidence."""

    def forward(self, state: State) -> DecidedSet:
        return DecidedSet(torch.zeros_like(state.masked), state.masked)


class Everything(Policy):
    """Selects all positions, given ones and padding included."""

    def forward(self, state: State) -> DecidedSet:
        return DecidedSet(torch.ones_like(state.masked), state.masked)
