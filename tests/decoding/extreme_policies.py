"""Policies at the two ends of what a policy may select."""

from __future__ import annotations

import torch


class Nothing:
    """Selects nothing, has no score: the decoder decides by confidence."""

    def select(self, state):
        return torch.zeros_like(state.masked)


class Everything:
    """Selects all positions, visible ones and padding included."""

    def select(self, state):
        return torch.ones_like(state.masked)
