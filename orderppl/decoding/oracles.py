"""Policies that rank by the true tokens: upper bounds, never deployable."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from orderppl.decoding.memory import ROW, TRUTH
from orderppl.decoding.ranking import RankPolicy
from orderppl.errors import UserError
from orderppl.states import UnmaskingState


@dataclass(frozen=True)
class OracleRank(RankPolicy):
    """Ranks by the true token: an upper-bound arm, never deployable.

    Args:
        sizes: set sizes; uniform when left out.
        tokens: int64 [B, L], the truth of the batch when decoding; path evaluation supplies its own.
    """

    tokens: Tensor | None = field(default=None, compare=False)
    needs_truth = True

    def truth(self, state: UnmaskingState) -> Tensor:
        """True tokens of the rows still in the batch: int64 [B, L]."""
        if TRUTH in state.memory:
            return state.memory[TRUTH]
        if self.tokens is None:
            raise UserError("policy", f"{self.name} needs the true tokens", "pass tokens=, or only follow true paths")
        return self.tokens.to(state.tokens.device)[state.memory[ROW]]


@dataclass(frozen=True)
class OracleMargin(OracleRank):
    """K largest p(x_i) - max over other tokens of p (the oracle of arXiv 2602.09501)."""

    name = "oracle_margin"

    def score(self, state: UnmaskingState) -> Tensor:
        """Return p(x_i) - max other p."""
        truth, probs = state.pack(self.truth(state))[..., None], state.packed_log_probs.exp()
        margin = probs.gather(-1, truth) - probs.scatter(-1, truth, 0.0).amax(-1, keepdim=True)
        return state.unpack(margin[..., 0])


@dataclass(frozen=True)
class GreedyOracle(OracleRank):
    """K largest log p(x_i)."""

    name = "greedy_oracle"

    def score(self, state: UnmaskingState) -> Tensor:
        """Return log p(x_i), nats."""
        return state.token_log_prob(self.truth(state))
