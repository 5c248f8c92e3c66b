"""SVI updates written by hand in plain torch, without Pyro or distributions: what orderppl's speed is held against.

Each function returns the loss of one update, the negative ELBO per sequence in nats, whose gradient is that of
`RevealTraceGraph_ELBO` (its docstring has the formulas) for one pair of programs. Given the same order, a test finds
the same value and the same gradient. What the library handles in general is worked out here for the pair at hand:

- the first state is the same for all particles, so it goes through the denoiser once per sequence;
- a policy that is its own guide has KL 0, and is evaluated once, while its order is drawn;
- without a gradient to the denoiser, the inner expectation has no gradient, so it is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from orderppl.denoising import Canvas, Denoiser
from orderppl.states import UnmaskingState

LOGIT_LIMIT = 12.0  # of the library's policies


class Likelihood:
    """Log-probabilities of a batch's tokens given what is visible of them.

    Args:
        denoiser: see `orderppl.denoising.Denoiser`.
        tokens: int64 [B, L].
        attention_mask: bool [B, L].
        context: int64 [B, C], prompt.
        context_mask: bool [B, C].
    """

    def __init__(
        self,
        denoiser: Denoiser,
        tokens: Tensor,
        attention_mask: Tensor,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> None:
        self.denoiser, self.tokens = denoiser, tokens
        self.context, self.context_mask, self.attention_mask = context, context_mask, attention_mask
        self.attention = attention_mask
        if context is not None:
            visible = torch.ones_like(context, dtype=torch.bool) if context_mask is None else context_mask
            self.attention = torch.cat([visible, attention_mask], -1)

    def logits(self, masked: Tensor) -> Tensor:
        """Logits at the response positions of R partially masked copies of the batch, float [R, B, L, V]."""
        copies, batch, length = masked.shape
        mask_index = self.denoiser.mask_index
        state = torch.where(masked, mask_index, self.tokens)  # [R, B, L]
        if self.context is not None:
            state = torch.cat([self.context.expand(copies, -1, -1), state], -1)
        attention = self.attention.expand(state.shape).flatten(0, 1)
        logits: Tensor = self.denoiser(state.flatten(0, 1), attention)[:, -length:]  # [R B, L, V]
        if logits.dtype == torch.bfloat16:
            logits = logits.float()
        if mask_index < logits.shape[-1]:
            logits[..., mask_index] = -torch.inf
        return logits.unflatten(0, (copies, batch))

    def __call__(self, masked: Tensor) -> Tensor:
        """Log-probability of every masked token, float [R, B, L]; 0 where nothing is masked."""
        logits = self.logits(masked)
        index = torch.where(masked, self.tokens, 0).unsqueeze(-1)
        chosen = logits.gather(-1, index).squeeze(-1) - logits.logsumexp(-1)
        return torch.where(masked, chosen, 0.0)


def draw_steps(log_q: Tensor, attention_mask: Tensor, num_particles: int) -> Tensor:
    """Orders whose positions are independent: int64 [K, B, L] from float [B, L, T]."""
    with torch.no_grad():
        order = torch.multinomial(log_q.exp().flatten(0, 1), num_particles, replacement=True)  # [B L, K]
        return order.T.reshape(num_particles, *attention_mask.shape).masked_fill(~attention_mask, -1)


def _hazards(log_q: Tensor) -> tuple[Tensor, Tensor]:
    """log h and log(1 - h) of h_t = q(r = t) / q(r >= t), float [B, L, T] each."""
    remaining = log_q.flip(-1).logcumsumexp(-1).flip(-1)
    later = torch.cat([remaining[..., 1:], torch.full_like(remaining[..., :1], -torch.inf)], -1)
    return log_q - remaining, later - remaining


def _uniform_kl(log_q: Tensor, attention_mask: Tensor) -> Tensor:
    """KL of independent steps to uniform ones, summed over the batch."""
    num_steps = log_q.shape[-1]
    by_position = (log_q.exp() * log_q).sum(-1) + math.log(num_steps)  # [B, L]
    return torch.where(attention_mask, by_position, 0.0).sum()


def _centred(cost: Tensor, particles_dim: int) -> Tensor:
    """Cost minus the mean over the other particles, without gradient."""
    cost, count = cost.detach(), cost.shape[particles_dim]
    return cost if count == 1 else (cost - cost.mean(particles_dim, keepdim=True)) * (count / (count - 1))


def _to_come(by_step: Tensor) -> Tensor:
    """Sums over this and all later steps, float [T, ..]."""
    return by_step.flip(0).cumsum(0).flip(0)


def _loss(elbo: Tensor, surrogate: Tensor, num_sequences: int) -> Tensor:
    """The value of one and the gradient of the other, per sequence."""
    return ((surrogate - elbo).detach() - surrogate) / num_sequences


def stacked_update(
    denoiser: Denoiser,
    network: nn.Module,
    tokens: Tensor,
    attention_mask: Tensor,
    context: Tensor | None = None,
    context_mask: Tensor | None = None,
    *,
    num_steps: int,
    num_particles: int,
    order: Tensor | None = None,
) -> Tensor:
    """Mean-field guide, uniform prior, all states of all particles in one denoiser call.

    Args:
        denoiser: see `orderppl.denoising.Denoiser`.
        network: the guide's network, float [B, L, T].
        tokens: int64 [B, L].
        attention_mask: bool [B, L].
        context: int64 [B, C], prompt.
        context_mask: bool [B, C].
        num_steps: T.
        num_particles: K.
        order: int64 [K, B, L]; drawn when left out.
    """
    batch, K = len(tokens), num_particles
    log_q = network(tokens, attention_mask, context, context_mask).log_softmax(-1)  # [B, L, T]
    if order is None:
        order = draw_steps(log_q, attention_mask, K)
    step = torch.arange(num_steps, device=tokens.device)[:, None, None, None]
    masked, revealed = order >= step, order == step  # [T, K, B, L]

    rows = torch.cat([masked[0, :1], masked[1:].flatten(0, 1)])  # [1 + (T - 1) K, B, L]
    by_row = Likelihood(denoiser, tokens, attention_mask, context, context_mask)(rows)
    first, rest = by_row.split([1, len(rows) - 1])
    likelihood = torch.cat([first.expand(K, -1, -1)[None], rest.unflatten(0, (num_steps - 1, K))])  # [T, K, B, L]

    reveal, keep = (x.movedim(-1, 0)[:, None] for x in _hazards(log_q))  # [T, 1, B, L]
    log_q_step = torch.where(masked, torch.where(revealed, reveal, keep), 0.0).sum(-1)  # [T, K, B]
    reward = torch.where(revealed, likelihood, 0.0).sum(-1)  # [T, K, B]
    gain = _to_come(reward) - likelihood.sum(-1)
    kl = _uniform_kl(log_q, attention_mask)
    surrogate = (_centred(gain, 1) * log_q_step).sum() / K - kl
    if likelihood.requires_grad:
        surrogate = surrogate + (reveal.detach().exp() * likelihood).sum() / K
    return _loss(reward.sum() / K - kl, surrogate, batch)


def one_step_update(
    denoiser: Denoiser,
    network: nn.Module,
    tokens: Tensor,
    attention_mask: Tensor,
    context: Tensor | None = None,
    context_mask: Tensor | None = None,
    *,
    num_steps: int,
    num_particles: int,
    order: Tensor | None = None,
    step: Tensor | None = None,
) -> Tensor:
    """The same pair looked at in one step per sequence; see `stacked_update`.

    Args:
        denoiser: see `orderppl.denoising.Denoiser`.
        network: the guide's network, float [B, L, T].
        tokens: int64 [B, L].
        attention_mask: bool [B, L].
        context: int64 [B, C], prompt.
        context_mask: bool [B, C].
        num_steps: T.
        num_particles: K.
        order: int64 [K, B, L]; drawn when left out.
        step: int64 [B], the step looked at; drawn evenly over the batch when left out.
    """
    batch, K = len(tokens), num_particles
    log_q = network(tokens, attention_mask, context, context_mask).log_softmax(-1)  # [B, L, T]
    if order is None:
        order = draw_steps(log_q, attention_mask, K)
    if step is None:
        slot = torch.randperm(batch, device=tokens.device) + torch.rand(batch, device=tokens.device)
        step = (slot * (num_steps / batch)).long().clamp_max(num_steps - 1)
    here = step[:, None]  # [B, 1]
    masked, revealed = order >= here, order == here  # [K, B, L]
    likelihood = Likelihood(denoiser, tokens, attention_mask, context, context_mask)(masked)

    # The earlier sets: position i was revealed at r_i, or is known to come at `here` or later.
    index = here[..., None].expand(-1, tokens.shape[1], 1)
    remaining = log_q.flip(-1).logcumsumexp(-1).flip(-1).gather(-1, index).squeeze(-1)  # [B, L]
    hazard = (log_q.gather(-1, index).squeeze(-1) - remaining).exp()  # [B, L]
    at_order = log_q.expand(K, -1, -1, -1).gather(-1, order.clamp_min(0)[..., None]).squeeze(-1)  # [K, B, L]
    before = torch.where(masked, remaining, at_order)
    log_q_before = torch.where(attention_mask, before, 0.0).sum(-1)  # [K, B]

    expected = num_steps * (hazard * likelihood).sum(-1)  # [K, B]
    reward = num_steps * torch.where(revealed, likelihood, 0.0).sum()
    kl = _uniform_kl(log_q, attention_mask)
    surrogate = (expected + _centred(expected, 0) * log_q_before).sum() / K - kl
    return _loss(reward / K - kl, surrogate, batch)


def sequential_update(
    denoiser: Denoiser,
    network: nn.Module,
    tokens: Tensor,
    attention_mask: Tensor,
    context: Tensor | None = None,
    context_mask: Tensor | None = None,
    *,
    num_steps: int,
    num_particles: int,
    order: Tensor | None = None,
) -> Tensor:
    """The same pair step by step, one denoiser call each; every choice is credited with all costs that follow it.

    Args:
        denoiser: see `orderppl.denoising.Denoiser`.
        network: the guide's network, float [B, L, T].
        tokens: int64 [B, L].
        attention_mask: bool [B, L].
        context: int64 [B, C], prompt.
        context_mask: bool [B, C].
        num_steps: T.
        num_particles: K.
        order: int64 [K, B, L]; drawn when left out.
    """
    batch, K = len(tokens), num_particles
    log_q = network(tokens, attention_mask, context, context_mask).log_softmax(-1)  # [B, L, T]
    log_reveal, log_keep = _hazards(log_q)
    likelihood = Likelihood(denoiser, tokens, attention_mask, context, context_mask)
    masked = attention_mask.expand(K, -1, -1)  # [K, B, L]
    rewards, divergences, scores = [], [], []
    for t in range(num_steps):
        reveal, keep = log_reveal[..., t], log_keep[..., t]  # [B, L]
        if t == num_steps - 1:
            revealed = masked
        elif order is None:
            revealed = masked & (torch.rand(masked.shape, device=tokens.device) < reveal.detach().exp())
        else:
            revealed = order == t
        by_token = likelihood(masked[:1]).expand(K, -1, -1) if t == 0 else likelihood(masked)  # [K, B, L]
        rewards.append(torch.where(revealed, by_token, 0.0).sum(-1))
        if t < num_steps - 1:
            scores.append(torch.where(masked, torch.where(revealed, reveal, keep), 0.0).sum(-1))
            left = num_steps - t  # the prior reveals a position with probability 1 / left
            kl = reveal.exp() * (reveal + math.log(left)) + keep.exp() * (keep - math.log1p(-1 / left))  # [B, L]
            divergences.append(torch.where(masked, kl, 0.0).sum(-1))
        masked = masked & ~revealed
    reward = torch.stack(rewards)  # [T, K, B]
    if not scores:
        return _loss(reward.sum() / K, reward.sum() / K, batch)
    divergence, score = torch.stack(divergences), torch.stack(scores)  # [T - 1, K, B]
    to_come = _to_come(reward)[:-1] - (_to_come(divergence) - divergence)
    path = (reward.sum() - divergence.sum()) / K
    return _loss(path, path + (_centred(to_come, 1) * score).sum() / K, batch)


def tied_policy_update(
    denoiser: Denoiser,
    policy: Callable[[UnmaskingState], Tensor],
    tokens: Tensor,
    attention_mask: Tensor,
    context: Tensor | None = None,
    context_mask: Tensor | None = None,
    *,
    num_steps: int,
    num_particles: int,
    order: Tensor | None = None,
) -> Tensor:
    """A policy that reveals at least one position a step, as guide and prior; followed once, with its gradient.

    Args:
        denoiser: see `orderppl.denoising.Denoiser`.
        policy: state -> reveal logits, float [*, L].
        tokens: int64 [B, L].
        attention_mask: bool [B, L].
        context: int64 [B, C], prompt.
        context_mask: bool [B, C].
        num_steps: T.
        num_particles: K.
        order: int64 [K, B, L]; drawn when left out.
    """
    batch, K = len(tokens), num_particles
    canvas = Canvas(denoiser, attention_mask, context, context_mask)  # the policy's network reads the prompt there
    likelihood = Likelihood(denoiser, tokens, attention_mask, context, context_mask)
    masked = attention_mask[None]  # [1, B, L] at the first step, [K, B, L] later
    rewards, everything, scores, expected = [], [], [], []
    for t in range(num_steps):
        last = t == num_steps - 1
        if last:
            by_token = likelihood(masked)
            revealed = masked
        else:
            log_probs = likelihood.logits(masked).log_softmax(-1)
            chosen = log_probs.gather(-1, torch.where(masked, tokens, 0).unsqueeze(-1)).squeeze(-1)
            by_token = torch.where(masked, chosen, 0.0)
            step = torch.full(masked.shape[:-1], t, device=tokens.device)
            seen = torch.where(masked, denoiser.mask_index, tokens)
            state = UnmaskingState(seen, masked, step, num_steps, canvas)
            state.log_probs = log_probs
            logits = policy(state).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
            log_reveal = torch.where(masked, logsigmoid(logits), -torch.inf)
            log_keep = torch.where(masked, logsigmoid(-logits), 0.0)
            log_empty = log_keep.sum(-1)
            done = ~masked.any(-1)
            log_some = torch.log(-torch.expm1(torch.where(done, -1.0, log_empty)))  # log P(not empty)
            log_some = torch.where(done, 0.0, log_some)
            revealed = _draw_non_empty(log_reveal, log_keep, log_some, masked, K) if order is None else order == t
            score = torch.where(revealed, log_reveal, log_keep).sum(-1) - log_some  # [K, B]
            scores.append(score)
        rewards.append(torch.where(revealed, by_token, 0.0).sum(-1).expand(K, -1))
        everything.append(by_token.sum(-1).expand(K, -1))
        if by_token.requires_grad:
            probs = masked.float() if last else (log_reveal - log_some[..., None]).detach().exp()
            expected.append((probs * by_token).sum() * (K / len(masked)))
        masked = masked & ~revealed
    reward = torch.stack(rewards)  # [T, K, B]
    gain = _to_come(reward) - torch.stack(everything)
    surrogate = (_centred(gain[:-1], 1) * torch.stack(scores)).sum() if scores else reward.new_zeros(())
    return _loss(reward.sum() / K, (surrogate + sum(expected)) / K, batch)


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
