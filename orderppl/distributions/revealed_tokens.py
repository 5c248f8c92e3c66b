"""The likelihood of the tokens, each at the step that reveals it."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from torch import Tensor
from torch.distributions import Categorical

from orderppl.randomness import sample_categorical, uniform
from orderppl.unmasking import State
from orderppl.unmasking.trajectory import Path, Trajectory


class RevealedTokens(dist.TorchDistribution):
    """Tokens given the order in which they were revealed.

        log p(x | r) = sum_t sum_{i : r_i = t} log p(x_i | s_t)

    As a robust mixture it is the likelihood of a sequence that may be anything instead,

        log[ (1 - robustness) p(x | r) + robustness ]

    so that sequences which no order makes likely stop to matter. Towards 1 it is affine in p(x | r): what is maximised
    is then the probability of the whole sequence, not its logarithm.

    Where only some tokens A are wanted, such as the answer at the end of a chain of equations, what is revealed
    together with the last of them, or later, is not observed: nothing was conditioned on it, so that it sums to 1,

        log p(x_A, x_{i : r_i < max r_A} | r)   <=   log p(x_A | r)

    A token counts if it is wanted, or revealed before all that is wanted is there.

    Where the denoiser is exact or well calibrated, a token's log-probability may be replaced by what the denoiser
    expects of it before it comes,

        sum_v p(v | s_t) log p(v | s_t)                              minus the entropy of the prediction

    which is the same on average over sequences, and far less noisy: the luck of single tokens is gone.

    Args:
        path: the sequences and the denoiser.
        reveal_step: int64 [*, S], the order; its provenance is carried by `log_prob`.
        robustness: share of outliers, at least 0 and below 1.
        wanted: bool [B, S], the tokens A; None wants all.
        temperature: at which tokens are drawn, positive; towards 0 these are the most likely ones.
        expected: whether tokens are scored by what the denoiser expects of them.
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(
        self,
        path: Path,
        reveal_step: Tensor,
        robustness: float = 0.0,
        wanted: Tensor | None = None,
        temperature: float = 1.0,
        expected: bool = False,
        batch_shape: torch.Size | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.path, self.reveal_step = path, reveal_step
        self.robustness, self.wanted, self.temperature = robustness, wanted, temperature
        self.expected = expected
        event_shape = path.batch.tokens.shape[-1:]
        if batch_shape is None:
            batch_shape = torch.broadcast_shapes(reveal_step.shape[:-1], (len(path.batch),))
        super().__init__(torch.Size(batch_shape), event_shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Token ids; padding may hold any id."""
        return constraints.independent(constraints.nonnegative_integer, 1)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> RevealedTokens:
        """Return the same distribution at a broader batch shape."""
        settings = (self.robustness, self.wanted, self.temperature, self.expected)
        return RevealedTokens(self.path, self.reveal_step, *settings, batch_shape, validate_args=self._validate_args)

    @cached_property
    def trajectory(self) -> Trajectory:
        """The states of the order; one denoiser call."""
        return Trajectory(self.path, self.reveal_step)

    def said(self, trajectory: Trajectory, tokens: Tensor | None = None) -> Tensor:
        """l_i(s_t): what the denoiser says of the clean (or other) tokens, float [T, *, S]; 0 where nothing is hidden.

        Args:
            trajectory: the states.
            tokens: int64 [*, S].
        """
        if not self.expected:
            return trajectory.token_log_prob(tokens, self.temperature)
        return trajectory.states.per_position(
            lambda log_probs: -Categorical(logits=log_probs / self.temperature, validate_args=False).entropy()
        )

    def observed(self, token_log_prob: Tensor, revealed: Tensor, masked: Tensor) -> Tensor:
        """log p(x_z | s_t) of sets z at every state, as far as it is observed: float [T, *].

        Args:
            token_log_prob: float [T, *, S], l_i(s_t).
            revealed: bool [T, *, S], the sets z.
            masked: bool [T, *, S], M_t.
        """
        if self.wanted is not None:
            wanted = self.wanted & masked  # not revealed before
            goes_on = (wanted & ~revealed).any(-1, keepdim=True)
            revealed = revealed & (wanted | goes_on)
        return token_log_prob.masked_fill(~revealed, 0.0).sum(-1)

    def robust(self, log_likelihood: Tensor) -> Tensor:
        """The log-likelihood of whole sequences in the robust mixture, float of any shape."""
        if self.robustness == 0:
            return log_likelihood
        anything = torch.full_like(log_likelihood, math.log(self.robustness))
        return torch.logaddexp(log_likelihood + math.log1p(-self.robustness), anything)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-likelihood of the tokens, int64 [*, S] -> float [*]."""
        if self._validate_args:
            self._validate_sample(value)
        trajectory = self.trajectory
        said = self.said(trajectory, detach_provenance(value))  # [T, *, S]
        by_step = self.observed(said, trajectory.revealed, trajectory.masked)  # [T, *]
        total = self.robust(by_step.sum(0)).expand(self.batch_shape)
        return track_provenance(total, get_provenance(self.reveal_step))

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Draw each token at the true state that reveals it (posterior predictive), int64 [*sample_shape, *, S].

        Given tokens stay what they are.
        """
        with torch.no_grad():
            trajectory = self.trajectory
            logits = trajectory.states.per_position(lambda log_probs: log_probs)  # [T, *, S, V]
            step = trajectory.order.clamp_min(0)
            index = step[None, ..., None].expand((1,) + logits.shape[1:])
            chosen = logits.gather(0, index).squeeze(0).expand(torch.Size(self.batch_shape) + logits.shape[-2:])
            noise = uniform(torch.Size(sample_shape) + chosen.shape[:-1], chosen.device)
            drawn = sample_categorical(chosen / self.temperature, noise)
            return torch.where(self.path.batch.latent, drawn, self.path.batch.readable)


class HiddenTokens(dist.TorchDistribution):
    """Tokens of the positions revealed at one state.

        log p(x_{z_t} | s_t) = sum_{i in z_t} log p(x_i | s_t)

    Args:
        state: s_t, leading shape [*]; it may lack the particles of `revealed`.
        revealed: bool [*, S], z_t.
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(self, state: State, revealed: Tensor, validate_args: bool | None = None) -> None:
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
        """Draw a token for every position, int64 [*sample_shape, *, S]."""
        with torch.no_grad():
            noise = uniform(torch.Size(sample_shape) + self.revealed.shape, self.revealed.device)
            return sample_categorical(self.state.per_position(lambda log_probs: log_probs), noise)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-likelihood of the revealed tokens, int64 [*, S] -> float [*]."""
        if self._validate_args:
            self._validate_sample(value)
        said = self.state.token_log_prob(value)
        self.state.predictions.forget()  # the last who asks: a trace would keep the logits of all its steps
        return said.masked_fill(~self.revealed, 0.0).sum(-1)
