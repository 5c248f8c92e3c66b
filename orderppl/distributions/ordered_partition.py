"""Ordered partitions of the response positions: one reveal set after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from torch import Tensor

from orderppl.distributions.set_law import SetLaw
from orderppl.path import RevealPath
from orderppl.states import (
    VISIBLE,
    UnmaskingState,
    enumerate_partitions,
    masked_before,
    reveal_set,
    same_step,
    stacked_steps,
)


class OrderedPartition(dist.TorchDistribution):
    """A chain of reveal sets z_1, .., z_T that together reveal every masked position.

        log p(r) = sum_{t < T} log p(z_t | M_t),      z_t = {i : r_i = t},  M_t = {i : r_i >= t},  z_T = M_T

    The value is `reveal_step`, int64 [*, L]: 0-based, -1 where nothing is ever masked. A subclass says how one set is
    distributed (`set_at`); everything else follows from the chain.

    Args:
        masked: bool [*, L], positions masked before the first step.
        num_steps: T.
        steps: int64 [S, *], the steps that `log_prob` looks at; all T when left out. With fewer, `log_prob` is the
            unbiased estimate (T / S) sum_s log p(z_s | M_s) for steps drawn uniformly.
    """

    arg_constraints: dict[str, Any] = {}
    has_enumerate_support = True

    def __init__(
        self, masked: Tensor, num_steps: int, steps: Tensor | None = None, validate_args: bool | None = None
    ) -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps: {num_steps} is below 1; use at least one step")
        self.masked = masked
        self.num_steps = num_steps
        self.steps = steps
        self._last: tuple[Tensor, Tensor | None, SetLaw, bool] | None = None
        super().__init__(masked.shape[:-1], masked.shape[-1:], validate_args=validate_args)

    def set_at(self, masked: Tensor, step: Tensor) -> SetLaw:
        """Distribution of z_t given M_t, before the last step's completion.

        Args:
            masked: bool [*, L], M_t.
            step: int64 [*], t.
        """
        raise NotImplementedError

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Steps 0..T-1, and -1 for positions that are never masked."""
        return constraints.independent(constraints.integer_interval(VISIBLE, self.num_steps - 1), 1)

    def reveal_sets(self, reveal_step: Tensor, steps: Tensor | None = None) -> SetLaw:
        """The set distributions met along an order.

        Args:
            reveal_step: int64 [*, L].
            steps: int64 [S, *] or [S, 1, .., 1]; all T steps when left out.

        Returns:
            A `SetLaw` with batch shape [S, *] and the masked sets M_t of that order.
        """
        reveal_step, with_gradient = detach_provenance(reveal_step), torch.is_grad_enabled()
        if (
            self._last is None
            or self._last[0] is not reveal_step
            or self._last[1] is not steps
            or (with_gradient and not self._last[3])
        ):
            self._last = reveal_step, steps, self._sets_along(reveal_step, steps), with_gradient
        return self._last[2]

    def looked_at(self, reveal_step: Tensor, steps: Tensor) -> tuple[SetLaw, Tensor]:
        """The sets met at some steps of an order, and the log-probability of what came before.

        Args:
            reveal_step: int64 [*, L].
            steps: int64 [S, *].

        Returns:
            A `SetLaw` with batch shape [S, *], and sum_{u < t} log p(z_u | M_u), float [S, *].
        """
        by_step = self.step_log_prob(reveal_step)  # [T, *]
        index = steps.expand(steps.shape[:1] + by_step.shape[1:])
        return self.reveal_sets(reveal_step).at(steps), (by_step.cumsum(0) - by_step).gather(0, index)

    def share(self, reveal_step: Tensor, tokens: Tensor, states: UnmaskingState) -> None:
        """Let the sets along an order serve all who follow the same policy; nothing to share without one.

        Args:
            reveal_step: int64 [*, L], the order.
            tokens: int64 [*, L], the clean tokens.
            states: the states of the order as another program has built them.
        """

    def _sets_along(self, reveal_step: Tensor, steps: Tensor | None) -> SetLaw:
        step = stacked_steps(self.num_steps, reveal_step).squeeze(-1) if steps is None else steps
        step = step.expand((step.shape[0],) + reveal_step.shape[:-1])  # [S, *]
        sets = self.set_at(masked_before(reveal_step, step.unsqueeze(-1)), step)
        return sets.certain(step == self.num_steps - 1)

    def step_log_prob(self, reveal_step: Tensor, steps: Tensor | None = None) -> Tensor:
        """log p(z_t | M_t) for each step of an order, float [S, *]."""
        reveal_step = detach_provenance(reveal_step)
        step = stacked_steps(self.num_steps, reveal_step) if steps is None else steps.unsqueeze(-1)
        return self.reveal_sets(reveal_step, steps).log_prob(reveal_set(reveal_step, step))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of an order, int64 [*, L] -> float [*]."""
        if self._validate_args:
            self._validate_sample(value)
        by_step = self.step_log_prob(value, self.steps)
        total = by_step.sum(0) * (self.num_steps / by_step.shape[0])
        wrong = (detach_provenance(value) >= 0) != self.masked  # reveals padding, or leaves a masked position out
        return track_provenance(total.masked_fill(wrong.any(-1), -torch.inf), get_provenance(value))

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Draw orders step by step, int64 [*sample_shape, *, L]."""
        with torch.no_grad():
            masked = self.masked.expand(torch.Size(sample_shape) + self.masked.shape)
            reveal_step = torch.full_like(masked, VISIBLE, dtype=torch.int64)
            for t in range(self.num_steps):
                reveal = masked if t == self.num_steps - 1 else self.set_at(masked, same_step(t, masked)).sample()
                reveal_step = reveal_step.masked_fill(reveal, t)
                masked = masked & ~reveal
            return reveal_step

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All T**L assignments, int64 [T**L, *, L]; with padding, repeats of an order have log-probability -inf."""
        values = enumerate_partitions(self.event_shape[0], self.num_steps).to(self.masked.device)
        values = values.reshape((-1,) + (1,) * len(self.batch_shape) + tuple(self.event_shape))
        if expand or not bool(self.masked.all()):
            values = torch.where(self.masked | (values > 0), values, VISIBLE)
        return values


class SequentialReveal(OrderedPartition):
    """An ordered partition whose sets depend on the tokens revealed so far: a policy followed along a path.

    Args:
        path: the sequences on which the order is played out.
        distribution: state -> distribution of its reveal set.
    """

    def __init__(
        self,
        path: RevealPath,
        distribution: Callable[..., SetLaw],
        batch_shape: torch.Size | None = None,
        validate_args: bool | None = None,
    ) -> None:
        masked = path.attention_mask
        if batch_shape is not None:
            masked = masked.expand(torch.Size(batch_shape) + masked.shape[-1:])
        self.path = path
        self.distribution = distribution
        super().__init__(masked, path.num_steps, path.steps, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> SequentialReveal:
        """Return the same distribution at a broader batch shape."""
        return SequentialReveal(self.path, self.distribution, batch_shape, validate_args=self._validate_args)

    def set_at(self, masked: Tensor, step: Tensor) -> SetLaw:
        """Ask the policy at the states of `masked`."""
        return self.distribution(self.path.state_at(masked, step))

    def _sets_along(self, reveal_step: Tensor, steps: Tensor | None) -> SetLaw:
        if steps is not self.path.steps:
            return super()._sets_along(reveal_step, steps)
        state = self.path(reveal_step)  # the likelihood asks for the same states: one denoiser call for both
        return state.law(self.distribution).certain(state.is_last)

    def share(self, reveal_step: Tensor, tokens: Tensor, states: UnmaskingState) -> None:
        """Read those states, and leave the policy's sets there; see `OrderedPartition.share`."""
        if self.path.adopt(reveal_step, tokens, states):
            states.laws[self.distribution] = self.reveal_sets(reveal_step)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Draw orders by following the policy, int64 [*sample_shape, *, L].

        Where gradients are on, states and sets met on the way keep theirs to denoiser and policy: scoring the order
        asks neither again.
        """
        lead = torch.Size(sample_shape) + self.masked.shape[:-1]
        sets: list[SetLaw] = []

        def law(state: UnmaskingState) -> SetLaw:
            sets.append(self.distribution(state).expand(lead))
            return sets[-1]

        reveal_step, states = self._play(law, lead)
        if torch.is_grad_enabled() and sets and all(one.stacks for one in sets):
            self._keep_sets(reveal_step, states[-1], sets)
        return reveal_step

    def _play(self, law: Callable[[UnmaskingState], SetLaw], lead: torch.Size) -> tuple[Tensor, list[UnmaskingState]]:
        """Draw orders by following a law of sets with batch shape `lead`; also the states before each step."""
        states: list[UnmaskingState] = []
        masked = self.path.attention_mask  # [B, L]: the first state is that of all particles
        reveal_step = torch.full(lead + masked.shape[-1:], VISIBLE, device=masked.device)
        for t in range(self.num_steps):
            state = self.path.state_at(masked, same_step(t, masked))
            states.append(state)
            reveal = masked if t == self.num_steps - 1 else law(state).sample()
            reveal_step = reveal_step.masked_fill(reveal, t)
            masked = masked & ~reveal
        self.path.remember(reveal_step, states)
        return reveal_step, states

    def _keep_sets(self, reveal_step: Tensor, last: UnmaskingState, sets: list[SetLaw]) -> None:
        if all(one.is_normalised for one in sets):
            end = sets[-1].everything(last.masked)  # no choice is left, so there is no need to ask
        else:
            end = self.distribution(last).certain(last.is_last)
        stacked = end.stack([*sets, end])
        self._last = reveal_step, None, stacked.certain(self.path(reveal_step).is_last, already=True), True
