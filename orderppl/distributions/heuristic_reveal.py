"""A decoding policy without parameters, followed along the true tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from orderppl.decoding.memory import first_memory
from orderppl.decoding.policy import Policy, needs_noise, remembers
from orderppl.decoding.step import or_best
from orderppl.distributions.ordered_partition import SequentialReveal
from orderppl.distributions.reveal_set import SmoothedSet
from orderppl.distributions.set_law import SetLaw
from orderppl.errors import UserError
from orderppl.path import RevealPath
from orderppl.randomness import random_row_ids, uniform_noise
from orderppl.states import UnmaskingState


class HeuristicReveal(SequentialReveal):
    """The sets a policy selects on the way, each position's decision flipped with probability `smoothing`.

        q(z_t | s_t) = prod_{i in M_t} (1 - smoothing)^[z_ti = d_ti] smoothing^[z_ti != d_ti],     d_t = policy(s_t)

    divided by Z where it is conditioned on revealing something. Where the policy selects nothing, d_t is its best
    position, as when decoding. A policy finds in the state what the decoder puts there. Its noise is drawn once per
    distribution, for each row, particle and step, so that an order is scored by the decisions that drew it: a policy
    that uses it is a point mass (or its smoothed form) given the noise.

    Args:
        path: the sequences on which the order is played out.
        policy: any object with `select(state)`.
        smoothing: probability of a flip, at least 0 and below 1/2.
        non_empty: condition every set on revealing something.
        seed: of the noise, an integer, or int64 [B], one for each sequence; drawn when left out.

    Raises:
        UserError: smoothing outside [0, 1/2).
    """

    def __init__(
        self,
        path: RevealPath,
        policy: Policy,
        smoothing: float = 0.0,
        non_empty: bool = False,
        seed: int | Tensor | None = None,
        batch_shape: torch.Size | None = None,
        validate_args: bool | None = None,
    ) -> None:
        check_smoothing(smoothing)
        self.policy = policy
        self.smoothing = smoothing
        self.non_empty = non_empty
        if seed is None and needs_noise(policy):
            seed = random_row_ids(len(path.tokens), path.tokens.device)
        self.seed = seed
        super().__init__(path, self._set, batch_shape, validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> HeuristicReveal:
        """Return the same distribution at a broader batch shape; the noise of every row is its own."""
        return HeuristicReveal(
            self.path, self.policy, self.smoothing, self.non_empty, self.seed, batch_shape, self._validate_args
        )

    def _decider(self) -> Callable[[UnmaskingState], Tensor]:
        """What asks the policy at one state after another, with a memory of its own: states [*] -> bool [*, L]."""
        memory: dict[str, Tensor] = {}

        def decide(state: UnmaskingState) -> Tensor:
            shape = state.masked.shape
            flat = state.flat()
            if not memory:
                rows = torch.arange(shape[-2], device=flat.tokens.device).expand(shape[:-1]).flatten()
                truth = self.path.tokens.masked_fill(~self.path.attention_mask, 0).expand(shape).flatten(0, -2)
                memory.update(first_memory(self.policy, rows, truth))
            flat.memory = memory
            if self.seed is not None:
                seed, ids = self._noise_ids()
                flat.noise = uniform_noise(seed, ids.expand(shape[:-1]).flatten(), flat.step, shape[-1])
            return or_best(self.policy, flat, self.policy.select(flat)).reshape(shape)

        return decide

    def _noise_ids(self) -> tuple[int, Tensor]:
        """Seed, and identity of each row and particle, int64 [*]."""
        number = torch.arange(self.batch_shape.numel(), device=self.masked.device).reshape(self.batch_shape)
        if not isinstance(self.seed, Tensor):
            return self.seed or 0, number
        return 0, self.seed + number // len(self.seed) * 0x5851F42D4C957F2D  # some odd number: particles differ

    def _smoothed(self, decided: Tensor, masked: Tensor) -> SmoothedSet:
        return SmoothedSet(decided, masked, self.smoothing, self.non_empty)

    def _set(self, state: UnmaskingState) -> SetLaw:
        if remembers(self.policy):
            problem = "looks back at earlier steps: its sets cannot be asked for one at a time"
            raise UserError("policy", problem, "use a policy without a memory, or the stacked programs")
        return self._smoothed(self._decider()(state), state.masked)

    def _sets_along(self, reveal_step: Tensor, steps: Tensor | None) -> SetLaw:
        if not remembers(self.policy):
            return super()._sets_along(reveal_step, steps)
        path = self.path if self.path.steps is None else RevealPath(self.path.canvas, self.path.tokens, self.num_steps)
        state, decide = path(reveal_step), self._decider()
        asked = [decide(state.part(t)) for t in range(self.num_steps - 1)]
        decided = torch.stack([*asked, state.masked[-1]])  # [T, *, L]; the last step reveals what is left
        sets = self._smoothed(decided, state.masked).certain(state.is_last)
        return sets if steps is None else sets.at(steps)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Draw orders by following the policy, int64 [*sample_shape, *, L]."""
        lead = torch.Size(sample_shape) + self.masked.shape[:-1]
        decide = self._decider()
        decided: list[Tensor] = []

        def law(state: UnmaskingState) -> SetLaw:
            seen = state.expand(lead)
            decided.append(decide(seen))
            return self._smoothed(decided[-1], seen.masked)

        with torch.no_grad():
            reveal_step, states = self._play(law, lead)
            # Scored by the decisions that were made: rounding in another denoiser call could turn one over.
            masked = torch.stack([state.expand(lead).masked for state in states])
            last = torch.stack([state.expand(lead).is_last for state in states])
            sets = self._smoothed(torch.stack([*decided, masked[-1]]), masked).certain(last)
        self._last = reveal_step, None, sets, True  # decisions have no gradient
        return reveal_step

    def share(self, reveal_step: Tensor, tokens: Tensor, states: UnmaskingState) -> None:
        """Read those states; see `OrderedPartition.share`."""
        self.path.adopt(reveal_step, tokens, states)


def check_smoothing(smoothing: float) -> None:
    """Refuse probabilities of a flip that are none, or that turn the policy over."""
    if not 0 <= smoothing < 0.5:
        raise UserError("smoothing", f"{smoothing} is not in [0, 0.5)", "give the probability of a flip, such as 0.05")
