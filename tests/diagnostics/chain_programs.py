"""Small programs with known posteriors: the exact chain, and its exact posterior as a guide."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from orderppl.data.chains import sample_chains
from orderppl.data.collate import tensors
from orderppl.denoising import Canvas
from orderppl.distributions import OrderedPartition, RevealedTokens
from orderppl.guides import MeanFieldGuide
from orderppl.guides.guide import RevealGuide
from orderppl.inference import exact_evidence
from orderppl.inference.programs import local_parameters
from orderppl.models import RevealPrior, SequentialUnmaskingModel, UniformSteps, UnmaskingModel
from orderppl.models.denoisers import MarkovChainDenoiser
from orderppl.path import RevealPath
from orderppl.states import enumerate_partitions


def chain_programs(
    length: int = 5, num_steps: int = 3, prior: RevealPrior | None = None, num_states: int = 3
) -> tuple[UnmaskingModel, SequentialUnmaskingModel]:
    """The stacked and the sequential model of an exact chain."""
    denoiser = MarkovChainDenoiser(num_states, 0.85, length)
    prior = UniformSteps() if prior is None else prior
    return UnmaskingModel(denoiser, prior, num_steps), SequentialUnmaskingModel(denoiser, prior, num_steps)


def chain_batch(rows: int, length: int = 5, num_states: int = 3, seed: int = 1) -> dict[str, Tensor]:
    """Sequences of that chain."""
    return tensors(sample_chains(rows, num_states=num_states, stay=0.85, length=length, seed=seed))


class EnumeratedOrders(OrderedPartition):
    """Orders with given log-probabilities (float [N, B]) over all T**L; for sequences without padding."""

    def __init__(self, log_probs: Tensor, masked: Tensor, num_steps: int, validate_args: bool | None = None) -> None:
        self.log_probs = log_probs
        super().__init__(masked, num_steps, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> EnumeratedOrders:
        masked = self.masked.expand(torch.Size(batch_shape) + self.event_shape)
        return EnumeratedOrders(self.log_probs, masked, self.num_steps, validate_args=False)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        orders = enumerate_partitions(self.event_shape[0], self.num_steps)
        index = torch.distributions.Categorical(logits=self.log_probs.T).sample(
            torch.Size(sample_shape) + self.batch_shape[:-1]
        )
        return orders[index]

    def log_prob(self, value: Tensor) -> Tensor:
        code = self.num_steps ** torch.arange(self.event_shape[0] - 1, -1, -1)
        index = (value * code).sum(-1)  # [*, B]
        return self.log_probs[index, torch.arange(index.shape[-1])]


class ExactPosterior(RevealGuide):
    """q(r | x) = p(r | x), by enumeration; `power` other than 1 makes it too wide (below) or too narrow (above)."""

    def __init__(self, model: UnmaskingModel, power: float = 1.0) -> None:
        super().__init__(model.num_steps)
        self.score = model
        self.power = power

    def order_distribution(self, tokens, attention_mask, context, context_mask) -> OrderedPartition:
        orders = enumerate_partitions(tokens.shape[-1], self.num_steps).unsqueeze(1)  # [N, 1, L]
        path = RevealPath(Canvas(self.score.denoiser, attention_mask), tokens, self.num_steps)
        orders = orders.expand(-1, len(tokens), -1)
        log_joint = self.score.prior(path).log_prob(orders) + RevealedTokens(path(orders), orders).log_prob(tokens)
        return EnumeratedOrders((self.power * log_joint).log_softmax(0), attention_mask, self.num_steps)


class FixedSteps(nn.Module):
    """A network that wants one order (int64 [L]) with a given log-odds."""

    def __init__(self, order: Tensor, num_steps: int, strength: float) -> None:
        super().__init__()
        self.logits = strength * nn.functional.one_hot(order, num_steps).float()

    def forward(self, tokens, attention_mask, *_):
        return self.logits.expand(attention_mask.shape + self.logits.shape[-1:])


def fixed_guide(order: Tensor, num_steps: int, strength: float = 4.0) -> MeanFieldGuide:
    """A plan that follows one order, at strength 4 with probability 0.95 per position (T = 4)."""
    return MeanFieldGuide(FixedSteps(order, num_steps, strength), num_steps, sees_tokens=False)


def left_to_right(length: int, num_steps: int) -> Tensor:
    """Equal blocks from the left."""
    return torch.arange(length) * num_steps // length


def enumerated_evidence(model: UnmaskingModel, batch: dict[str, Tensor]) -> Tensor:
    """log p(x) of the model by enumeration, float [B]."""
    length, rows = batch["tokens"].shape[1], len(batch["tokens"])
    orders = enumerate_partitions(length, model.num_steps).unsqueeze(1).expand(-1, rows, -1)
    with local_parameters(model):
        return exact_evidence(model, orders, **batch)
