"""The likelihood of the tokens, each at the step that reveals it."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from torch import Tensor

from orderppl.randomness import sample_categorical, uniform
from orderppl.states import UnmaskingState


class RevealedTokens(dist.TorchDistribution):
    """Tokens given the order in which they were revealed.

        log p(x | r) = sum_t sum_{i : r_i = t} log p(x_i | s_t)

    With a state stack of S < T uniformly drawn steps this is the unbiased estimate T / S times the sum over those.

    With a share of outliers it is the robust likelihood of a sequence that may be anything instead,

        log[ (1 - outlier) p(x | r) + outlier ]

    so that sequences which no order makes likely stop to matter. Towards 1 it is affine in p(x | r): what is maximised
    is then the probability of the whole sequence, not its logarithm.

    Where only some tokens A are asked for, such as the answer at the end of a chain of equations, what is revealed
    together with the last of them, or later, is not observed: nothing was conditioned on it, so that it sums to 1,

        log p(x_A, x_{i : r_i < max r_A} | r)   <=   log p(x_A | r)

    A token counts if it is asked for, or revealed before all that is asked for is there.

    Args:
        state: the stacked states of the order, leading shape [S, *].
        reveal_step: int64 [*, L], the order; its provenance is carried by `log_prob`.
        outlier: share of outliers, at least 0 and below 1; all T states are needed unless it is 0.
        asked: bool [B, L], the tokens A; None asks for all. All T states are needed.
        temperature: at which tokens are drawn, positive; towards 0 these are the most likely ones.
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(
        self,
        state: UnmaskingState,
        reveal_step: Tensor,
        outlier: float = 0.0,
        asked: Tensor | None = None,
        temperature: float = 1.0,
        batch_shape: torch.Size | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.state = state
        self.reveal_step = reveal_step
        self.outlier = outlier
        self.asked = asked
        self.temperature = temperature
        shape = state.masked.shape[1:]
        super().__init__(
            shape[:-1] if batch_shape is None else torch.Size(batch_shape), shape[-1:], validate_args=validate_args
        )

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Token ids; padding may hold any id."""
        return constraints.independent(constraints.nonnegative_integer, 1)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> RevealedTokens:
        """Return the same distribution at a broader batch shape."""
        return RevealedTokens(
            self.state,
            self.reveal_step,
            self.outlier,
            self.asked,
            self.temperature,
            batch_shape,
            validate_args=self._validate_args,
        )

    @property
    def is_whole(self) -> bool:
        """Whether only whole sequences have a likelihood, which is no sum over the decisions of single positions."""
        return bool(self.outlier) or self.asked is not None

    def counted(self, revealed: Tensor) -> Tensor:
        """Those of the tokens revealed at every state (bool [S, *, L]) that are observed."""
        if self.asked is None:
            return revealed
        asked = self.asked & self.state.masked  # [S, *, L], not revealed before
        goes_on = (asked & ~revealed).any(-1, keepdim=True)
        return revealed & (asked | goes_on)

    def observed(self, token_log_prob: Tensor, revealed: Tensor) -> Tensor:
        """log p(x_z | s_t) of sets z at every state, bool [S, *, L], as far as it is observed: float [S, *].

        Args:
            token_log_prob: float [S, *, L], of the method of this name.
            revealed: the sets.
        """
        return token_log_prob.masked_fill(~self.counted(revealed), 0.0).sum(-1)

    def robust(self, log_likelihood: Tensor) -> Tensor:
        """The log-likelihood of whole sequences among outliers, float of any shape."""
        if self.outlier == 0:
            return log_likelihood
        anything = torch.full_like(log_likelihood, math.log(self.outlier))
        return torch.logaddexp(log_likelihood + math.log1p(-self.outlier), anything)

    def token_log_prob(self, tokens: Tensor) -> Tensor:
        """l_i(s_t): log-likelihood of every hidden token at every state, float [S, *, L]; 0 where it is not hidden."""
        return self.state.token_log_prob(detach_provenance(tokens), self.temperature)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Draw each token at the true state that reveals it (posterior predictive), int64 [*sample_shape, *, L]."""
        with torch.no_grad():
            step = detach_provenance(self.reveal_step).clamp_min(0)
            logits = self.state.logits
            if len(logits) != self.state.num_steps:
                raise ValueError("one_step: tokens cannot be drawn from a single step; use one_step=False")
            index = step.expand(logits.shape[1:-1])[None, ..., None].expand((1,) + logits.shape[1:])
            chosen = logits.gather(0, index).squeeze(0).expand(torch.Size(self.batch_shape) + logits.shape[-2:])
            return sample_categorical(
                chosen / self.temperature, uniform(torch.Size(sample_shape) + chosen.shape[:-1], chosen.device)
            )

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-likelihood of the tokens, int64 [*, L] -> float [*]."""
        if self._validate_args:
            self._validate_sample(value)
        state = self.state
        revealed = detach_provenance(self.reveal_step) == state.step.unsqueeze(-1)  # [S, *, L]
        by_step = self.observed(self.token_log_prob(value), revealed)  # [S, *]
        total = by_step.sum(0) * (state.num_steps / by_step.shape[0])
        return track_provenance(self.robust(total).expand(self.batch_shape), get_provenance(self.reveal_step))


class HiddenTokens(dist.TorchDistribution):
    """Tokens of the positions revealed at one state.

        log p(x_{z_t} | s_t) = sum_{i in z_t} log p(x_i | s_t)

    Args:
        state: s_t, leading shape [*]; it may lack the particles of `revealed`.
        revealed: bool [*, L], z_t.
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(self, state: UnmaskingState, revealed: Tensor, validate_args: bool | None = None) -> None:
        self.state, self.revealed = state, revealed
        super().__init__(revealed.shape[:-1], revealed.shape[-1:], validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Token ids; positions that are not revealed may hold any id."""
        return constraints.independent(constraints.nonnegative_integer, 1)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> HiddenTokens:
        """Return the same distribution at a broader batch shape."""
        revealed = self.revealed.expand(torch.Size(batch_shape) + self.event_shape)
        return HiddenTokens(self.state, revealed, validate_args=self._validate_args)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Draw a token for every position, int64 [*sample_shape, *, L]."""
        with torch.no_grad():
            noise = uniform(torch.Size(sample_shape) + self.revealed.shape, self.revealed.device)
            return sample_categorical(self.state.logits, noise)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-likelihood of the revealed tokens, int64 [*, L] -> float [*]."""
        if self._validate_args:
            self._validate_sample(value)
        return self.state.token_log_prob(value).masked_fill(~self.revealed, 0.0).sum(-1)
