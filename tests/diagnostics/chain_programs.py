"""Small programs with known posteriors: the exact chain, and its exact posterior as a guide."""

from __future__ import annotations

import torch
from torch import Tensor

from orderppl.data import Chains
from orderppl.distributions import OrderDistribution
from orderppl.distributions.revealed_tokens import RevealedTokens
from orderppl.guides import Guide, MeanFieldGuide, PolicyGuide
from orderppl.inference.exact import all_orders, exact_evidence
from orderppl.inference.programs import local_parameters
from orderppl.models import PositionTable, SequentialUnmaskingModel, UnmaskingModel
from orderppl.models.denoisers import MarkovChainDenoiser
from orderppl.policies import Policy, RandomSteps
from orderppl.unmasking import Batch
from orderppl.unmasking.trajectory import Path


def chain_programs(
    length: int = 5, num_steps: int = 3, policy: Policy | None = None, num_states: int = 3, **options: float
) -> tuple[UnmaskingModel, SequentialUnmaskingModel]:
    """The stacked and the sequential model of an exact chain."""
    denoiser = MarkovChainDenoiser(num_states, 0.85, length)
    policy = RandomSteps() if policy is None else policy
    return UnmaskingModel(denoiser, policy, num_steps, **options), SequentialUnmaskingModel(denoiser, policy, num_steps)


def chain_tokens(rows: int, length: int = 5, num_states: int = 3, seed: int = 1) -> Tensor:
    """Sequences of that chain, int64 [rows, length]."""
    return torch.from_numpy(Chains(num_states=num_states, stay=0.85, length=length).sample(rows, seed))


def chain_batch(rows: int, length: int = 5, num_states: int = 3, seed: int = 1) -> Batch:
    """The same, all to be revealed."""
    return Batch(chain_tokens(rows, length, num_states, seed))


def with_holes(batch: Batch, given: list[list[int]], padding: list[list[int]]) -> Batch:
    """The same sequences with given positions and padding (which may hold anything), by (row, position)."""
    tokens, attended = batch.tokens.clone(), batch.attention_mask.clone()
    told = torch.zeros_like(attended)
    for row, position in given:
        told[row, position] = True
    for row, position in padding:
        attended[row, position] = False
        tokens[row, position] = 77
    return Batch(tokens, attended, told)


class EnumeratedOrders(OrderDistribution):
    """Orders with given log-probabilities (float [N, B]) over all T**S."""

    def __init__(self, log_probs: Tensor, masked: Tensor, num_steps: int, validate_args: bool | None = None) -> None:
        self.log_probs = log_probs
        super().__init__(masked, num_steps, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> EnumeratedOrders:
        masked = self.masked.expand(torch.Size(batch_shape) + self.event_shape)
        return EnumeratedOrders(self.log_probs, masked, self.num_steps, validate_args=False)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        rows = len(self.log_probs.T)
        orders = EnumeratedOrders(self.log_probs, self.masked.reshape(-1, rows, *self.event_shape)[0], self.num_steps)
        index = torch.distributions.Categorical(logits=self.log_probs.T).sample(
            torch.Size(sample_shape) + self.batch_shape[:-1]
        )
        return orders.enumerate_support()[index, torch.arange(rows)]

    def log_prob(self, value: Tensor) -> Tensor:
        code = self.num_steps ** torch.arange(self.event_shape[0] - 1, -1, -1)
        index = (value.clamp(min=0) * code).sum(-1)  # [*, B]
        return self.log_probs[index, torch.arange(index.shape[-1])]


class ExactPosterior(Guide):
    """q(r | x) = p(r | x), by enumeration; `power` other than 1 makes it too wide (below) or too narrow (above)."""

    def __init__(self, model: UnmaskingModel, power: float = 1.0) -> None:
        super().__init__(model.num_steps)
        self.score = model
        self.power = power

    def order(self, batch: Batch) -> OrderDistribution:
        prior = self.score.policy.order(batch, self.score.denoiser, self.num_steps)
        orders = RandomSteps().order(batch, self.score.denoiser, self.num_steps).enumerate_support()  # [N, B, S]
        path = Path(batch, self.score.denoiser, self.num_steps)
        log_joint = prior.log_prob(orders) + RevealedTokens(path, orders).log_prob(batch.tokens)
        return EnumeratedOrders((self.power * log_joint).log_softmax(0), batch.latent, self.num_steps)


def random_guide(num_steps: int) -> PolicyGuide:
    """Draws every position's step uniformly; the denoiser is not asked."""
    return PolicyGuide(RandomSteps(), MarkovChainDenoiser(2, 0.5, 1), num_steps)


def plan_guide(length: int, num_steps: int, noise: float = 0.0) -> MeanFieldGuide:
    """A learned plan, by position."""
    return MeanFieldGuide(PositionTable(length, num_steps, noise=noise), num_steps)


def fixed_guide(order: Tensor, num_steps: int, strength: float = 4.0) -> MeanFieldGuide:
    """A plan that follows one order, at strength 4 with probability 0.95 per position (T = 4)."""
    guide = plan_guide(len(order), num_steps)
    (table,) = guide.parameters()
    with torch.no_grad():
        table.copy_(strength * torch.nn.functional.one_hot(order, num_steps).float())
    return guide


def left_to_right(length: int, num_steps: int) -> Tensor:
    """Equal blocks from the left."""
    return torch.arange(length) * num_steps // length


def enumerated_evidence(model: UnmaskingModel, batch: Batch) -> Tensor:
    """log p(x) of the model by enumeration, float [B]."""
    with local_parameters(model):
        return exact_evidence(model, all_orders(random_guide(model.num_steps), batch), batch)
