"""The unmasking process as a Pyro program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from torch import Tensor

from orderppl.distributions import DecidedSet, SetDistribution
from orderppl.distributions.order_distribution import PolicyOrder
from orderppl.distributions.revealed_tokens import HiddenTokens, RevealedTokens
from orderppl.distributions.tracked import Tracked
from orderppl.errors import UserError
from orderppl.policies import Policy, PriceRange
from orderppl.program import PyroProgram, rows_plate
from orderppl.unmasking import Batch, Denoiser, State
from orderppl.unmasking.trajectory import Path, same_step, steps_used


class UnmaskingModel(PyroProgram):
    """The generative program of masked diffusion with the order as its latent variable, scored in one piece.

        r ~ policy                                 ordered partition of the positions to reveal, site `reveal_step`
        x ~ prod_t prod_{i : r_i = t} Denoiser(s_t)_i           site `tokens`; see `RevealedTokens`
        exp(-step_price * number of steps of r)    factor `step_price`, where there is a price

    All T states of an order are stacked and go through the denoiser in one call. The states are built from the
    observed tokens: to generate, use `SequentialUnmaskingModel`, or decode with the policy.

    Args:
        denoiser: see `Denoiser`; `fit` trains it only when asked to.
        policy: the prior over reveal sets.
        num_steps: step budget T.
        step_price: nats per executed step, at least 0: a geometric prior on the number of steps, up to a constant.
            Without it nothing in the bound asks for fewer than T steps. A range gives every sequence a price of its
            own, for a policy that reads it.
        robustness: share of sequences that may be anything, at least 0 and below 1.
        answer: which tokens are wanted: (tokens int64 [B, S], -1 at padding; latent bool [B, S]) -> bool [B, S], such
            as `AnswerTokens`; all when left out.
        temperature: at which tokens are drawn, that of the decoder; positive. Greedy tokens are the limit 0, towards
            which the likelihood becomes a yes or no per token: 0.25 with a robust mixture comes close.
        expected: score every token by what the denoiser expects of it, minus the entropy of its prediction, instead of
            by the token that comes: the same on average where the denoiser is exact, with far less noise. A denoiser
            that is badly calibrated is not scored by the data any more: an antibody model learned worse orders so.

    Raises:
        UserError: a number outside its bounds.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        policy: Policy,
        num_steps: int,
        *,
        step_price: float | PriceRange = 0.0,
        robustness: float = 0.0,
        answer: Callable[[Tensor, Tensor], Tensor] | None = None,
        temperature: float = 1.0,
        expected: bool = False,
    ) -> None:
        if num_steps < 1:
            raise UserError("num_steps", f"{num_steps} is below 1", "use at least one step")
        if not isinstance(step_price, PriceRange) and not step_price >= 0:
            raise UserError("step_price", f"{step_price} is negative", "use 0 or more nats per step")
        if not 0 <= robustness < 1:
            raise UserError("robustness", f"{robustness} is not in [0, 1)", "use 0 for none, or a share such as 0.5")
        if not temperature > 0:
            remedy = "use 1, or 0.25 to come close to greedy tokens"
            raise UserError("temperature", f"{temperature} is not positive", remedy)
        super().__init__("model")  # a root name of its own, or pyro.infer.SVI confuses its parameters with the guide's
        self.denoiser = denoiser
        self.policy = policy
        self.num_steps = num_steps
        self.step_price = step_price
        self.robustness = robustness
        self.answer = answer
        self.temperature = temperature
        self.expected = expected

    def forward(self, batch: Batch | Tensor) -> Tensor:
        """Score a batch: everything that is not given is revealed.

        Args:
            batch: clean sequences; see `Batch.of`.

        Returns:
            The order, int64 [*, B, S].
        """
        batch = Batch.of(batch)
        path = Path(batch, self.denoiser, self.num_steps)
        wanted = None if self.answer is None else batch.wanted(self.answer)
        order = self.policy.order(batch, self.denoiser, self.num_steps)
        order = order.as_prior() if isinstance(order, PolicyOrder) else order
        with rows_plate(len(batch)):
            reveal_step = pyro.sample("reveal_step", order)
            settings = (self.robustness, wanted, self.temperature, self.expected)
            likelihood = RevealedTokens(path, reveal_step, *settings)
            pyro.sample("tokens", likelihood, obs=batch.readable)
            if self.step_price != 0:
                pyro.factor("step_price", -self._prices(batch) * steps_used(reveal_step))
        return reveal_step

    def _prices(self, batch: Batch) -> Any:
        """Nats per step: a number, or float [B]."""
        if isinstance(self.step_price, PriceRange):
            return self.step_price.spread(len(batch), batch.device)
        return self.step_price


class SequentialUnmaskingModel(PyroProgram):
    """The same process step by step, with a site per step; generative under `poutine.uncondition`.

        z_t ~ policy(s_t)               site `reveal_{t}`, bool [B, S]; observed at the last step: everything left
        x_i ~ Denoiser(s_t)_i           site `tokens_{t}`, for i in z_t
        s_{t+1} = s_t with z_t filled in

    Args:
        denoiser: see `Denoiser`.
        policy: the prior over reveal sets.
        num_steps: step budget T.
    """

    def __init__(self, denoiser: Denoiser, policy: Policy, num_steps: int) -> None:
        super().__init__("model")
        self.denoiser = denoiser
        self.policy = policy
        self.num_steps = num_steps

    def forward(self, batch: Batch | Tensor) -> Tensor:
        """Score or generate a batch; see `UnmaskingModel.forward`.

        Under `poutine.uncondition` the values of the tokens to reveal are ignored.

        Returns:
            The completed sequences, int64 [B, S].
        """
        batch = Batch.of(batch)
        masked, scored = batch.latent, batch.readable
        tokens = torch.where(masked, self.denoiser.mask_index, scored)
        provenance: frozenset[str] = frozenset()  # of all that was drawn so far; the steps work on plain tensors
        carry = None
        path, policy = Path(batch, self.denoiser, self.num_steps), self.policy
        order = policy.order(batch, self.denoiser, self.num_steps)
        with rows_plate(len(batch)):
            for t in range(self.num_steps):
                # The sampled values build the next state: they are the generated ones under uncondition.
                state = path.state(masked, same_step(t, masked), tokens=tokens).replace(carry=carry, truth=None)
                if t < self.num_steps - 1:
                    sets, carry = _next_sets(policy, order, state)
                    reveal = pyro.sample(f"reveal_{t}", Tracked(sets, provenance))
                    provenance |= get_provenance(reveal)
                    reveal = detach_provenance(reveal)
                else:  # no choice is left
                    reveal = masked
                    pyro.sample(f"reveal_{t}", Tracked(DecidedSet(masked, masked), provenance), obs=masked)
                value = pyro.sample(f"tokens_{t}", Tracked(HiddenTokens(state, reveal), provenance), obs=scored)
                provenance |= get_provenance(value)
                tokens = torch.where(reveal, detach_provenance(value), tokens)
                masked = masked & ~reveal
        return track_provenance(tokens, provenance)


def _next_sets(policy: Policy, order: Any, state: State) -> tuple[SetDistribution, Any]:
    """The distribution of the next set, and what the policy keeps."""
    if isinstance(order, PolicyOrder):
        return policy.at_step(state)
    if not order.has_steps:
        problem = "draws whole orders, whose sets are not known one by one"
        raise UserError("policy", problem, "use UnmaskingModel, which scores them whole")
    return order.set_at(state.masked, state.step), None
