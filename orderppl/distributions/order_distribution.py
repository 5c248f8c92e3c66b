"""Orders of revealing: one reveal set after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from torch import Tensor
from torch.distributions.kl import kl_divergence, register_kl

from orderppl.distributions.set_distribution import DecidedSet, SetDistribution
from orderppl.errors import UserError
from orderppl.randomness import uniform
from orderppl.unmasking import State
from orderppl.unmasking.trajectory import VISIBLE, Met, Path, Trajectory, same_step


class SetSequence:
    """The set distributions met at the steps of an order, one after another.

    Args:
        steps: T distributions of batch shape [*].
    """

    def __init__(self, steps: Sequence[SetDistribution]) -> None:
        self.steps = list(steps)

    def at(self, step: int) -> SetDistribution:
        """That of a step."""
        return self.steps[step]

    def log_prob(self, revealed: Tensor) -> Tensor:
        """log p(z_t | s_t) of the sets bool [T, *, S]: float [T, *]."""
        return torch.stack([one.log_prob(z) for one, z in zip(self.steps, revealed, strict=True)])


def kl_by_step(q: SetDistribution | SetSequence, p: SetDistribution | SetSequence, num_steps: int) -> Tensor:
    """KL(q_t || p_t) at every step, nats, float [T, *].

    Raises:
        NotImplementedError: it has no closed form.
    """
    if isinstance(q, SetDistribution) and isinstance(p, SetDistribution):
        return kl_divergence(q, p)
    return torch.stack([kl_divergence(q.at(t), p.at(t)) for t in range(num_steps)])


class OrderDistribution(dist.TorchDistribution):
    """A distribution over ordered partitions: reveal sets z_0, .., z_{T-1} that together reveal every masked position.

        log p(r) = sum_{t < T - 1} log p(z_t | M_t),      z_t = {i : r_i = t},  M_t = {i : r_i >= t},  z_{T-1} = M_{T-1}

    The value is `reveal_step`, int64 [*, S]: 0-based, -1 where nothing is ever masked (padding and given positions). A
    subclass says how one set is distributed (`set_at`); everything else follows.

    Args:
        masked: bool [*, S], positions masked before the first step.
        num_steps: T.
        validate_args: check arguments and values, as in torch; None: as `torch.distributions` is set.

    Attributes:
        has_steps: whether the distribution of a set given those before it is known; a distribution without defines
            `log_prob` and `sample` itself.
    """

    arg_constraints: dict[str, Any] = {}
    has_enumerate_support = True
    has_steps = True
    _shares_draws = False

    def __init__(self, masked: Tensor, num_steps: int, validate_args: bool | None = None) -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps: {num_steps} is below 1; use at least one step")
        self.masked = masked
        self.num_steps = num_steps
        super().__init__(masked.shape[:-1], masked.shape[-1:], validate_args=validate_args)

    def set_at(self, masked: Tensor, step: Tensor) -> SetDistribution:
        """Distribution of z_t given M_t, before the last step's completion.

        Args:
            masked: bool [*, S], M_t.
            step: int64 [*], t.
        """
        raise NotImplementedError

    @property
    def met(self) -> list[Met]:
        """What the last draw has met on its way; empty for distributions that look at no states."""
        return []

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Steps 0..T-1, and -1 for positions that are never masked."""
        return constraints.independent(constraints.integer_interval(VISIBLE, self.num_steps - 1), 1)

    def sets(self, order: Tensor, trajectory: Trajectory | None = None) -> SetDistribution | SetSequence:
        """The set distributions met along an order, the last one certain.

        Args:
            order: int64 [*, S].
            trajectory: its states, where somebody has built them already.

        Returns:
            Batch shape [T, *].
        """
        steps = torch.arange(self.num_steps, device=order.device).reshape((-1,) + (1,) * (order.dim() - 1))
        step = steps.expand((self.num_steps,) + order.shape[:-1])  # [T, *]
        masked = order >= step.unsqueeze(-1)
        return self.set_at(masked, step).certain(step == self.num_steps - 1, masked)

    def step_log_prob(self, order: Tensor, trajectory: Trajectory | None = None) -> Tensor:
        """log p(z_t | M_t) for each step of an order, float [T, *]; arguments as of `sets`."""
        order = detach_provenance(order)
        steps = torch.arange(self.num_steps, device=order.device).reshape((-1,) + (1,) * order.dim())
        return self.sets(order, trajectory).log_prob(order == steps)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of an order, int64 [*, S] -> float [*]."""
        if self._validate_args:
            self._validate_sample(value)
        total = self.step_log_prob(value).sum(0)
        wrong = (detach_provenance(value) >= 0) != self.masked  # reveals what is visible, or leaves a position out
        return track_provenance(total.masked_fill(wrong.any(-1), -torch.inf), get_provenance(value))

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Draw orders step by step, int64 [*sample_shape, *, S]."""
        with torch.no_grad():
            masked = self.masked.expand(torch.Size(sample_shape) + self.masked.shape)
            reveal_step = torch.full_like(masked, VISIBLE, dtype=torch.int64)
            for t in range(self.num_steps):
                reveal = masked if t == self.num_steps - 1 else self.set_at(masked, same_step(t, masked)).sample()
                reveal_step = reveal_step.masked_fill(reveal, t)
                masked = masked & ~reveal
            return reveal_step

    def draw(self, noise: Tensor) -> Tensor:
        """Draw an order from given noise, float [*, S] in (0, 1), so that it does not depend on the batch.

        Raises:
            NotImplementedError: the order cannot be drawn from one number per position.
        """
        raise NotImplementedError(f"{type(self).__name__} draws step by step")

    def sharing_draws(self) -> Self:
        """The same distribution, which draws the orders of all sequences of a batch from the same uniform numbers.

        Each order has the distribution that it had. One plan for all sequences draws one order for all.

        Raises:
            UserError: a distribution that does not draw from one number per position.
        """
        if type(self).draw is OrderDistribution.draw:
            problem = f"{type(self).__name__} draws step by step"
            raise UserError("shares_orders", problem, "use a plan, or let every sequence have orders of its own")
        return self.expand(self.batch_shape)._sharing_like(self, True)

    def _sharing_like(self, other: OrderDistribution, shares: bool = False) -> Self:
        self._shares_draws = shares or other._shares_draws
        return self

    def _noise(self, sample_shape: torch.Size) -> Tensor:
        """Uniform numbers for draws, float [*sample_shape, *, S]; the same for all sequences where they share them."""
        shape = torch.Size(sample_shape) + self.masked.shape
        if not (self._shares_draws and len(self.batch_shape)):
            return uniform(shape, self.masked.device)
        return uniform(shape[:-2] + (1,) + shape[-1:], self.masked.device).expand(shape)

    @property
    def mode(self) -> Tensor:
        """An order that is likely, int64 [*, S]: what a decoder follows that takes modes."""
        raise NotImplementedError(f"{type(self).__name__} has no order that stands for it")

    @property
    def columns(self) -> Tensor:
        """Where some row has a masked position, int64 [C]."""
        return self.masked.reshape(-1, self.event_shape[0]).any(0).nonzero()[:, 0]

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All T**C orders of the C columns that some row has masked, int64 [T**C, *, S].

        Rows with fewer masked positions meet some orders again, which have log-probability -inf there.
        """
        size, columns = self.event_shape[0], self.columns
        steps = torch.arange(self.num_steps, device=self.masked.device)
        grid = torch.zeros(self.num_steps ** len(columns), size, dtype=torch.int64, device=steps.device)
        if len(columns):
            grid[:, columns] = torch.cartesian_prod(*[steps] * len(columns)).reshape(-1, len(columns))
        values = grid.reshape((-1,) + (1,) * len(self.batch_shape) + (size,))
        if expand or not bool(self.masked.all()):
            values = torch.where(self.masked | (values > 0), values, VISIBLE)
        return values


class PolicyOrder(OrderDistribution):
    """The order that a policy plays out along clean tokens: its sets depend on what has been revealed.

        p(r) = prod_{t < T - 1} policy(s_t)(z_t),      s_{t+1} = s_t with the tokens of z_t

    Args:
        policy: see `orderppl.policies.Policy`.
        path: the sequences.
        batch_shape: broader than that of the path.
        sees_truth: whether the policy may read tokens that are still hidden: in a guide, never in a prior.
    """

    def __init__(
        self,
        policy: Any,
        path: Path,
        batch_shape: torch.Size | None = None,
        sees_truth: bool = True,
        validate_args: bool | None = None,
    ) -> None:
        masked = path.batch.latent
        if batch_shape is not None:
            masked = masked.expand(torch.Size(batch_shape) + masked.shape[-1:])
        self.policy, self.path, self.sees_truth = policy, path, sees_truth
        self._met: list[Met] = []
        super().__init__(masked, path.num_steps, validate_args=validate_args)

    @property
    def met(self) -> list[Met]:
        """The states and sets of the last draw, of this distribution or of its expansions."""
        return self._met

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> PolicyOrder:
        """Return the same distribution at a broader batch shape."""
        new = PolicyOrder(self.policy, self.path, batch_shape, self.sees_truth, self._validate_args)
        new._met = self._met
        return new

    def as_prior(self) -> PolicyOrder:
        """The same distribution of a policy that may see what is visible only."""
        return PolicyOrder(self.policy, self.path, self.batch_shape, False, self._validate_args)

    def _state(self, masked: Tensor, step: Tensor) -> State:
        return self._seen(self.path.state(masked, step))

    def _seen(self, state: State) -> State:
        return state if self.sees_truth else state.replace(truth=None)

    def set_at(self, masked: Tensor, step: Tensor) -> SetDistribution:
        """What the policy says of the state; not for policies that look back."""
        sets: SetDistribution = self.policy(self._state(masked, step))
        return sets

    def sets(self, order: Tensor, trajectory: Trajectory | None = None) -> SetDistribution | SetSequence:
        """See `OrderDistribution`; all states at once, or one by one for a policy that looks back."""
        if trajectory is None or not self.path.is_that_of(trajectory.path):
            trajectory = Trajectory(self.path, order)
        if not self.policy.looks_back:
            states = self._seen(trajectory.states)
            stacked: SetDistribution = self.policy(states).certain(states.is_last, states.masked)
            return stacked
        found: list[SetDistribution] = []
        carry = None
        for t in range(self.num_steps - 1):
            state = self._state(trajectory.masked[t], trajectory.step[t]).replace(carry=carry)
            carry = self.policy.look_back(state)
            found.append(self.policy(state.replace(carry=carry)))
        return SetSequence([*found, DecidedSet(trajectory.masked[-1], trajectory.masked[-1])])

    def met_sets(self) -> SetSequence | None:
        """The sets of the last draw, with their gradients; None without a draw."""
        if not self._met:
            return None
        last = self._met[-1].state.masked
        return SetSequence([*(sets for _, sets in self._met[:-1] if sets is not None), DecidedSet(last, last)])

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Draw orders by following the policy, int64 [*sample_shape, *, S].

        Where gradients are on, the states and sets met on the way keep theirs: a bound asks neither the policy nor the
        denoiser again.
        """
        lead = torch.Size(sample_shape) + self.masked.shape[:-1]
        self._met.clear()
        masked, carry = self.path.batch.latent, None  # [B, S]: the first state is that of all particles
        reveal_step = torch.full(lead + masked.shape[-1:], VISIBLE, device=masked.device)
        for t in range(self.num_steps):
            state = self._state(masked, same_step(t, masked)).replace(carry=carry)
            if t == self.num_steps - 1:
                self._met.append(Met(state, None))
                return reveal_step.masked_fill(masked, t)
            if self.policy.looks_back:
                carry = self.policy.look_back(state)
                state = state.replace(carry=carry)
            sets = self.policy(state).expand(lead)
            self._met.append(Met(state, sets))
            reveal = sets.sample()
            reveal_step = reveal_step.masked_fill(reveal, t)
            masked = masked & ~reveal
        return reveal_step


@register_kl(PolicyOrder, PolicyOrder)
def _kl_tied(q: PolicyOrder, p: PolicyOrder) -> Tensor:
    """KL(q || p) in nats, float [*]: 0 for one policy as guide and prior; no closed form otherwise."""
    if q.policy is not p.policy or not q.path.is_that_of(p.path):
        raise NotImplementedError
    return torch.zeros(q.batch_shape, device=q.masked.device)
