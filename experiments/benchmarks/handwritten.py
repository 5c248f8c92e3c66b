"""SVI updates written by hand in plain torch, without Pyro or distributions: what the library's speed is held against.

Each function returns the loss of one update, the negative ELBO per sequence in nats, with the gradient of
`RevealTraceGraph_ELBO` (its docstring has the formulas) for one pair of programs. Given the same order, a test finds
the same value and the same gradient. What the library handles in general is worked out here for the pair at hand:

- prompts stand on the left, so that only the columns behind them are looked at;
- the first state is the same for all particles, so it goes through the denoiser once per sequence;
- a policy that is its own guide has KL 0, and is evaluated once, while its order is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from orderppl import Batch

LOGIT_LIMIT = 12.0  # of the library's policies


class Likelihood:
    """Log-probabilities of a batch's tokens given what is visible of them, in the L columns behind the prompts.

    Args:
        denoiser: (state, attention_mask) -> logits, float [N, S, V].
        batch: clean sequences.
    """

    def __init__(self, denoiser: Any, batch: Batch) -> None:
        self.denoiser, self.batch = denoiser, batch
        self.prompt, self.tokens = batch.tokens[:, : batch.prefix], batch.tokens[:, batch.prefix :]

    def logits(self, masked: Tensor) -> Tensor:
        """Logits of R partially masked copies of the batch, float [R, B, L, V] from bool [R, B, L]."""
        copies, mask_index = len(masked), self.denoiser.mask_index
        state = torch.where(masked, mask_index, self.tokens)  # [R, B, L]
        state = torch.cat([self.prompt.expand(copies, -1, -1), state], -1)
        attention = self.batch.attention_mask.expand(state.shape)
        logits: Tensor = self.denoiser(state.flatten(0, 1), attention.flatten(0, 1))[:, self.batch.prefix :]
        if logits.dtype == torch.bfloat16:
            logits = logits.float()
        if mask_index < logits.shape[-1]:
            logits[..., mask_index] = -torch.inf
        return logits.unflatten(0, masked.shape[:2])

    def __call__(self, masked: Tensor, log_probs: Tensor | None = None) -> Tensor:
        """Log-probability of every masked token, float [R, B, L]; 0 where nothing is masked."""
        logits = self.logits(masked) if log_probs is None else log_probs
        index = torch.where(masked, self.tokens, 0).unsqueeze(-1)
        chosen = logits.gather(-1, index).squeeze(-1)
        if log_probs is None:
            chosen = chosen - logits.logsumexp(-1)
        return torch.where(masked, chosen, 0.0)


def centred(values: Tensor) -> Tensor:
    """Less the mean over the other particles: float [.., K, B]."""
    count = values.shape[-2]
    return (values - values.mean(-2, keepdim=True)) * (count / (count - 1))


def advantage(reward: Tensor, at_once: Tensor, left: Tensor) -> Tensor:
    """What every set is credited with, float [T, K, B], without gradient.

    Args:
        reward: float [K, B], R.
        at_once: float [T, K, B], v_t: R if everything left were revealed at step t.
        left: int64 [T, K, B], how many positions are.
    """
    if reward.shape[0] == 1:
        return reward.detach().expand_as(at_once)
    y, x = centred(reward.detach()), centred(at_once.detach())

    def others(values: Tensor) -> Tensor:
        return values.sum(-2, keepdim=True) - values

    # The slope of y on x among the other particles, weighted by what is left.
    total = others(left.expand_as(x)).clamp(min=1)
    mean_x, mean_y = others(left * x) / total, others(left * y) / total
    product, square = others(left * x * y) / total - mean_x * mean_y, others(left * x * x) / total - mean_x**2
    slope = torch.where(square > 1e-5 * x.square().mean(-2, keepdim=True), product / square, 0.0).clamp(0.0, 1.0)
    return y - slope * x


def draw_steps(log_q: Tensor, latent: Tensor, num_particles: int) -> Tensor:
    """Orders whose positions are independent: int64 [K, B, L] from float [B, L, T]."""
    with torch.no_grad():
        order = torch.multinomial(log_q.exp().flatten(0, 1), num_particles, replacement=True)  # [B L, K]
        return order.T.reshape(num_particles, *latent.shape).masked_fill(~latent, -1)


def hazards(log_q: Tensor) -> tuple[Tensor, Tensor]:
    """log h and log(1 - h) of h_t = q(r = t) / q(r >= t), float [B, L, T] each."""
    remaining = log_q.flip(-1).logcumsumexp(-1).flip(-1)
    later = torch.cat([remaining[..., 1:], torch.full_like(remaining[..., :1], -torch.inf)], -1)
    return log_q - remaining, later - remaining


def _to_come(by_step: Tensor) -> Tensor:
    """Sums over this and all later steps, float [T, ..]."""
    return by_step.flip(0).cumsum(0).flip(0)


def _loss(elbo: Tensor, surrogate: Tensor, num_sequences: int) -> Tensor:
    """The value of one and the gradient of the other, per sequence."""
    return ((surrogate - elbo).detach() - surrogate) / num_sequences


def stacked_update(
    denoiser: Any, network: nn.Module, batch: Batch, *, num_steps: int, num_particles: int, order: Tensor | None = None
) -> Tensor:
    """Mean-field guide, uniform prior, all states of all particles in one denoiser call.

    Args:
        denoiser: see `Likelihood`.
        network: the guide's network, float [B, S, T].
        batch: clean sequences.
        num_steps: T.
        num_particles: K.
        order: int64 [K, B, L]; drawn when left out.
    """
    K, latent = num_particles, batch.latent[:, batch.prefix :]
    log_q = network(batch)[:, batch.prefix :].log_softmax(-1)  # [B, L, T]
    if order is None:
        order = draw_steps(log_q, latent, K)
    step = torch.arange(num_steps, device=order.device)[:, None, None, None]
    masked, revealed = order >= step, order == step  # [T, K, B, L]

    rows = torch.cat([masked[0, :1], masked[1:].flatten(0, 1)])  # [1 + (T - 1) K, B, L]
    first, rest = Likelihood(denoiser, batch)(rows).split([1, len(rows) - 1])
    by_token = torch.cat([first.expand(K, -1, -1)[None], rest.unflatten(0, (num_steps - 1, K))])  # [T, K, B, L]

    by_step = torch.where(revealed, by_token, 0.0).sum(-1)  # [T, K, B]
    reward = by_step.sum(0)  # [K, B]
    at_once = (by_step.cumsum(0) - by_step + by_token.sum(-1)).detach()
    reveal, keep = (x.movedim(-1, 0)[:, None] for x in hazards(log_q))  # [T, 1, B, L]
    score = torch.where(masked, torch.where(revealed, reveal, keep), 0.0).sum(-1)  # [T, K, B]
    kl = torch.where(latent, (log_q.exp() * log_q).sum(-1) + math.log(num_steps), 0.0).sum()
    objective = reward.sum() / K - kl
    return _loss(objective, objective + (advantage(reward, at_once, masked.sum(-1)) * score).sum() / K, len(batch))


def sequential_update(
    denoiser: Any, network: nn.Module, batch: Batch, *, num_steps: int, num_particles: int, order: Tensor | None = None
) -> Tensor:
    """The same pair step by step, one denoiser call each; every choice is credited with all that follows it.

    As Pyro's own `TraceGraph_ELBO`, with a site per step: log q_t - log p_t as drawn, no baseline. Arguments as of
    `stacked_update`.
    """
    K, masked = num_particles, batch.latent[:, batch.prefix :].expand(num_particles, -1, -1)  # [K, B, L]
    log_reveal, log_keep = hazards(network(batch)[:, batch.prefix :].log_softmax(-1))  # [B, L, T]
    likelihood = Likelihood(denoiser, batch)
    terms, scores = [], []
    for t in range(num_steps):
        is_last, reveal, keep = t == num_steps - 1, log_reveal[..., t], log_keep[..., t]
        if is_last:
            revealed = masked
        elif order is None:
            revealed = masked & (torch.rand(masked.shape, device=masked.device) < reveal.detach().exp())
        else:
            revealed = order == t
        by_token = likelihood(masked[:1]).expand(K, -1, -1) if t == 0 else likelihood(masked)  # [K, B, L]
        term = torch.where(revealed, by_token, 0.0).sum(-1)
        if not is_last:
            score = torch.where(masked, torch.where(revealed, reveal, keep), 0.0).sum(-1)
            left = num_steps - t  # the prior reveals a position with probability 1 / left
            log_prior = revealed.sum(-1) * -math.log(left) + (masked & ~revealed).sum(-1) * math.log1p(-1 / left)
            term = term + log_prior - score.detach()
            scores.append(score)
        terms.append(term)
        masked = masked & ~revealed
    by_step = torch.stack(terms)  # [T, K, B]
    objective = by_step.sum() / K
    if not scores:
        return _loss(objective, objective, len(batch))
    credited = (_to_come(by_step.detach())[:-1] * torch.stack(scores)).sum() / K
    return _loss(objective, objective + credited, len(batch))


@dataclass
class Seen:
    """What a policy's network reads of R partially revealed copies of a batch; fields as of `orderppl.State`."""

    tokens: Tensor
    masked: Tensor
    step: Tensor
    num_steps: int
    batch: Batch
    denoiser: Any
    log_probs: Tensor  # float [R, B, L, V], behind the prompts

    @property
    def shape(self) -> torch.Size:
        """[R, B, S]."""
        return self.masked.shape

    @property
    def latent(self) -> Tensor:
        """bool [R, B, S]."""
        return self.batch.latent.expand(self.shape)

    @property
    def attention_mask(self) -> Tensor:
        """bool [R, B, S]."""
        return self.batch.attention_mask.expand(self.shape)

    @property
    def steps_left(self) -> Tensor:
        """int64 [R, B]."""
        return self.num_steps - self.step

    def per_position(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """A function of the log-probabilities of every masked position, [R, B, S, ..]; 0 elsewhere."""
        values = function(self.log_probs)
        extra = values.dim() - self.masked.dim()
        values = F.pad(values, (0, 0) * extra + (self.batch.prefix, 0))
        return values.masked_fill(~self.masked.reshape(self.shape + (1,) * extra), 0.0)


def tied_policy_update(
    denoiser: Any,
    policy: Callable[[Any], Tensor],
    batch: Batch,
    *,
    num_steps: int,
    num_particles: int,
    order: Tensor | None = None,
) -> Tensor:
    """A policy that reveals at least one position a step, as guide and prior; followed once, with its gradient.

    Args:
        denoiser: see `Likelihood`.
        policy: state -> reveal logits, float [R, B, S].
        batch: clean sequences.
        num_steps: T.
        num_particles: K.
        order: int64 [K, B, L]; drawn when left out.
    """
    K, start = num_particles, batch.prefix
    likelihood = Likelihood(denoiser, batch)
    masked = batch.latent[None, :, start:]  # [1, B, L] at the first step, [K, B, L] later
    rewards, everything, scores, left = [], [], [], []
    for t in range(num_steps):
        if t == num_steps - 1:
            by_token, revealed = likelihood(masked), masked
        else:
            log_probs = likelihood.logits(masked).log_softmax(-1)
            by_token = likelihood(masked, log_probs)
            hidden = F.pad(masked, (start, 0))  # [R, B, S]
            step = torch.full(masked.shape[:-1], t, device=masked.device)
            tokens = torch.where(hidden, denoiser.mask_index, batch.tokens)
            logits = policy(Seen(tokens, hidden, step, num_steps, batch, denoiser, log_probs))[..., start:]
            logits = logits.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
            log_reveal = torch.where(masked, logsigmoid(logits), -torch.inf)
            log_keep = torch.where(masked, logsigmoid(-logits), 0.0)
            done = ~masked.any(-1)
            log_some = torch.log(-torch.expm1(torch.where(done, -1.0, log_keep.sum(-1))))  # log P(not empty)
            log_some = torch.where(done, 0.0, log_some)
            revealed = _draw_non_empty(log_reveal, log_keep, log_some, masked, K) if order is None else order == t
            scores.append(torch.where(revealed, log_reveal, log_keep).sum(-1) - log_some)  # [K, B]
        rewards.append(torch.where(revealed, by_token, 0.0).sum(-1).expand(K, -1))
        everything.append(by_token.detach().sum(-1).expand(K, -1))
        left.append(masked.sum(-1).expand(K, -1))
        masked = masked & ~revealed
    by_step = torch.stack(rewards)  # [T, K, B]
    reward = by_step.sum(0)
    objective = reward.sum() / K
    if not scores:
        return _loss(objective, objective, len(batch))
    at_once = (by_step.cumsum(0) - by_step).detach() + torch.stack(everything)
    credited = (advantage(reward, at_once[:-1], torch.stack(left)[:-1]) * torch.stack(scores)).sum() / K
    return _loss(objective, objective + credited, len(batch))


def _draw_non_empty(log_reveal: Tensor, log_keep: Tensor, log_some: Tensor, masked: Tensor, copies: int) -> Tensor:
    """Sets given that they are not empty, bool [K, B, L]: the first position by inversion, the later ones freely."""
    with torch.no_grad():
        shape = (copies,) + masked.shape[1:]
        revealed_by = -torch.expm1(log_keep.cumsum(-1))  # P(a position up to here is in the set)
        threshold = torch.rand(shape[:-1], device=masked.device) * log_some.exp()
        reached = revealed_by > threshold[..., None]  # [K, B, L]
        reached[..., -1:] = True
        first = reached & (reached.cumsum(-1) == 1)
        free = torch.rand(shape, device=masked.device) < log_reveal.exp()
        last = masked & (masked.flip(-1).cumsum(-1).flip(-1) == 1)  # where rounding leaves no position
        drawn = torch.where(first, True, reached & free) & masked
        return drawn | (last & ~drawn.any(-1, keepdim=True))
