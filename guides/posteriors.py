"""Guides that see the tokens at once and draw a whole order from one network pass."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from orderppl.distributions import OrderDistribution, StepwiseOrder
from orderppl.distributions.ranked_order import RankedOrder, RenormalisedOrder
from orderppl.errors import UserError
from orderppl.guides.guide import Guide
from orderppl.policies.schedules import SetSizes, UniformSizes, make_sizes
from orderppl.unmasking import Batch


class MeanFieldGuide(Guide):
    """q(r | x) = prod_i Categorical(r_i; softmax(network(x)_i)).

    Blind to the tokens it would be a plan that can be deployed: `PolicyGuide(Plan(network))`.

    Args:
        network: batch -> step logits, float [B, S, T].
        num_steps: step budget T.
    """

    def __init__(self, network: nn.Module, num_steps: int) -> None:
        super().__init__(num_steps)
        self.network = network

    def order(self, batch: Batch) -> OrderDistribution:
        """One categorical per position.

        Raises:
            UserError: a network of another number of steps.
        """
        logits = self.network(batch)
        if logits.shape[-1] != self.num_steps:
            problem = f"gives {logits.shape[-1]} numbers per position for {self.num_steps} steps"
            raise UserError("network", problem, f"set its output size to {self.num_steps}")
        return StepwiseOrder(logits, batch.latent)


def _scores(network: nn.Module, batch: Batch) -> Tensor:
    """One score per position, float [B, S]."""
    scores: Tensor = network(batch)
    if scores.shape[-1] != 1 or scores.dim() != 3:
        problem = f"gives {tuple(scores.shape)} where one score per position is needed"
        raise UserError("network", problem, "set its output size to 1")
    return scores.squeeze(-1)


class RenormalisedScoreGuide(Guide):
    """q(z_t | M_t, x) = prod_{i in M_t} Bernoulli( exp((s_i - max_{j in M_t} s_j) / temperature) ),  s = network(x).

    The scores are computed once per sequence; sampling T steps costs no further network pass, and every step reveals
    at least one position (arXiv 2602.23968; the formula is our reconstruction).

    Args:
        network: batch -> scores, float [B, S, 1].
        num_steps: step budget T.
        temperature: positive; 0.05-0.1 in the paper. May be annealed while training.

    Raises:
        UserError: a temperature that is not positive.
    """

    def __init__(self, network: nn.Module, num_steps: int, temperature: float = 0.1) -> None:
        super().__init__(num_steps)
        if not temperature > 0:
            raise UserError("temperature", f"{temperature} is not positive", "use a value such as 0.1")
        self.network = network
        self.temperature = temperature

    def order(self, batch: Batch) -> OrderDistribution:
        """A chain of renormalised sets."""
        return RenormalisedOrder(_scores(self.network, batch), self.temperature, self.num_steps, batch.latent)


class PlackettLuceGuide(Guide):
    """q(z_t | M_t, x) = p(the next k_t positions of a Plackett-Luce ranking with scores s = network(x) are z_t).

    The order comes from the scores, how many at a time from a schedule. The scores are computed once per sequence and
    an order is drawn by one sort. With num_steps >= L and uniform sizes it reveals one position a step: the guide of
    LO-ARM (arXiv 2503.05979), whose step-wise divergences are exact; otherwise the bound takes sampled log-ratios.

    Args:
        network: batch -> scores, float [B, S, 1].
        num_steps: step budget T.
        sizes: schedule of set sizes: "uniform", "cosine" or mean positions per step.

    Raises:
        UserError: an unknown schedule.
    """

    def __init__(
        self, network: nn.Module, num_steps: int, sizes: SetSizes | Literal["uniform", "cosine"] | float = "uniform"
    ) -> None:
        super().__init__(num_steps)
        self.network = network
        self.sizes = make_sizes(sizes)

    def order(self, batch: Batch) -> OrderDistribution:
        """Rank each row's own positions and cut by its own length."""
        scores, latent = _scores(self.network, batch), batch.latent
        step = torch.arange(self.num_steps, device=scores.device)
        sizes = self.sizes.sizes(latent.sum(-1, keepdim=True), step, self.num_steps)  # [B, T]
        one_each = isinstance(self.sizes, UniformSizes) and self.sizes.num_steps is None
        single = one_each and self.num_steps >= latent.shape[-1] - batch.prefix
        return RankedOrder(scores, sizes, latent, single=single)
