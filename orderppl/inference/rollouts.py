"""Learning from what a policy writes: it decodes, and a reward says how good that was."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from orderppl.config import Configurable
from orderppl.distributions.order_distribution import PolicyOrder
from orderppl.errors import UserError
from orderppl.inference.objective import Objective
from orderppl.inference.reveal_elbo import centred
from orderppl.randomness import sample_categorical, uniform
from orderppl.unmasking import Batch, Denoiser, State
from orderppl.unmasking.predictions import Predictions
from orderppl.unmasking.trajectory import Path, same_step, steps_used

if TYPE_CHECKING:
    from orderppl.data import DataSet
    from orderppl.policies import Policy


@dataclass(frozen=True)
class Rollouts:
    """What a policy wrote, K times per sequence.

    Attributes:
        batch: the sequences as they are in the data.
        num_steps: step budget T.
        order: int64 [K, B, S], the step that revealed each position; -1 where it is given.
        tokens: int64 [K, B, S], what was written; given tokens as they are, 0 at padding.
        token_log_prob: float [K, B, S], of what was written when it was, nats; 0 where nothing was.
    """

    batch: Batch
    num_steps: int
    order: Tensor
    tokens: Tensor
    token_log_prob: Tensor

    @property
    def steps(self) -> Tensor:
        """Steps that were used, int64 [K, B]."""
        return steps_used(self.order)


Reward = Callable[[Rollouts], Tensor]
"""How good each rollout is: float [K, B]."""


class AnswerReward(Configurable):
    """1 where an answer is right, less for more steps.

        R = right (1 - steps / T)^speed - price steps

    Right is what has all wanted tokens of the data; with `graded_by`, what these data say of its text.

    Args:
        answer: which tokens are wanted, as in `UnmaskingModel`; all when left out.
        speed: exponent of the share of steps that were saved; 0 asks for none (arXiv 2512.09106).
        price: of a step, whether the answer is right or not.
        graded_by: data with a `grade` and a reference for every row, which is found by what is given of it; the host
            waits for the device then.

    Raises:
        UserError: when called, a row that these data do not have.
    """

    def __init__(
        self,
        answer: Callable[[Tensor, Tensor], Tensor] | None = None,
        speed: float = 0.0,
        price: float = 0.0,
        graded_by: DataSet | None = None,
    ) -> None:
        self.answer, self.speed, self.price, self.graded_by = answer, speed, price, graded_by
        self._references: dict[tuple[int, ...], str] = {}  # by the given tokens

    def __call__(self, rollouts: Rollouts) -> Tensor:
        """See `Reward`."""
        steps = rollouts.steps
        saved: Tensor = (1 - steps / rollouts.num_steps) ** self.speed
        return self._right(rollouts) * saved - self.price * steps

    def _right(self, rollouts: Rollouts) -> Tensor:
        """Which answers are right: bool or float [K, B]."""
        batch, tokens = rollouts.batch, rollouts.tokens
        if self.graded_by is not None:
            examples, count = next(iter(self.graded_by.splits().values())), len(tokens)
            many = batch.rows(torch.arange(len(batch), device=batch.device).repeat(count))
            texts = examples.texts(tokens.flatten(0, 1), many)
            return examples.grade(texts, self._references_of(batch) * count).reshape(count, -1).to(batch.device)
        wanted = batch.latent if self.answer is None else batch.wanted(self.answer)
        return ((tokens == batch.readable) | ~wanted).all(-1)

    def _references_of(self, batch: Batch) -> list[str]:
        """What the texts of a batch are compared with."""
        assert self.graded_by is not None
        if not self._references:
            for part in self.graded_by.splits().values():
                self._references |= zip(_given(part.batch), part.references or (), strict=True)
        try:
            return [self._references[given] for given in _given(batch)]
        except KeyError as error:
            problem = f"a row of the batch is none of {type(self.graded_by).__name__}"
            raise UserError("graded_by", problem, "give the data that are fitted") from error


def _given(batch: Batch) -> list[tuple[int, ...]]:
    """The given tokens of every row, by which it is known."""
    shown = (batch.attention_mask & ~batch.latent).cpu()
    return [tuple(row[own].tolist()) for row, own in zip(batch.tokens.cpu(), shown, strict=True)]


class LikelihoodReward(Configurable):
    """How likely the denoiser finds what was written, along the order in which it was: nats per sequence.

    Args:
        price: nats per step.
    """

    def __init__(self, price: float = 0.0) -> None:
        self.price = price

    def __call__(self, rollouts: Rollouts) -> Tensor:
        """See `Reward`."""
        return rollouts.token_log_prob.sum(-1) - self.price * rollouts.steps


class Rollout(Objective, Trace_ELBO):
    """Expected reward of what the guide's policy writes: policy gradient with the other rollouts as baseline.

        objective = E[ R(x, r) ],      z_t ~ policy(s_t),  x_i ~ denoiser(s_t)_i for i in z_t
        surrogate = 1/K sum_k stop(R^k - mean_{j != k} R^j) log q(r^k)

    What the tokens should be enters by the reward only, so it may be any function of the rows. Each group of rollouts
    makes one update, for which a clipped ratio of probabilities (GRPO, PPO) is the plain score function. The model
    gives the denoiser; its prior and likelihood play no part. With the likelihood of the data as reward no text has to
    be written: that is `RevealTraceGraph_ELBO(control_variate="none")`.

    Args:
        reward: how good a rollout is, see `Reward`: `AnswerReward`, `LikelihoodReward`, or a function of `Rollouts`.
        num_particles: rollouts per sequence, K, at least 2.
        temperature: of the tokens; 0 takes the most likely ones.

    Attributes:
        metrics: detached 0-dim tensors of the last call, per sequence: `reward` and `steps`.

    Raises:
        UserError: fewer than two rollouts; when called, a guide that cannot decode, or a reward of another shape.
    """

    def __init__(self, reward: Reward, num_particles: int = 8, *, temperature: float = 0.0) -> None:
        super().__init__(num_particles)
        del self.kl_weight  # a setting that this objective does not have
        if num_particles < 2:
            raise UserError("num_particles", f"{num_particles} rollout per sequence has no baseline", "use 2 or more")
        if not temperature >= 0:
            raise UserError("temperature", f"{temperature} is negative", "give 0 for the most likely token, or more")
        self.reward, self.temperature = reward, temperature

    def value_and_surrogate(
        self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """See `Objective`."""
        batch = Batch.of(*args, **kwargs)
        with getattr(guide, "_pyro_context", nullcontext()):  # where Pyro's SVI hears of parameters
            policy = guide.deployable()
        if policy is None:
            problem = f"{type(guide).__name__} sees the tokens, so it cannot write any"
            raise UserError("guide", problem, "use PolicyGuide of a policy that decodes")
        rollouts, log_q = roll_out(policy, model.denoiser, batch, guide.num_steps, self.num_particles, self.temperature)
        reward = self.reward(rollouts).detach()
        if reward.shape != log_q.shape:
            problem = f"shape {tuple(reward.shape)} for {tuple(log_q.shape)} rollouts and sequences"
            raise UserError("reward", problem, "return one number per rollout")
        reward = reward.to(log_q.dtype)
        count = self.num_particles
        advantage = centred(reward[None])[0]  # R^k - mean_{j != k} R^j, [K, B]
        self.metrics = {"reward": reward.mean(), "steps": rollouts.steps.float().mean()}
        return reward.sum() / count, (advantage * log_q).sum() / count


def roll_out(
    policy: Policy, denoiser: Denoiser, batch: Batch, num_steps: int, count: int, temperature: float = 0.0
) -> tuple[Rollouts, Tensor]:
    """Let a policy of any family write every sequence of a batch several times.

    Args:
        policy: decides the reveal sets.
        denoiser: writes the tokens.
        batch: the canvas; of the tokens to reveal nothing is read.
        num_steps: step budget T.
        count: rollouts per sequence, K.
        temperature: of the tokens; 0 takes the most likely ones.

    Returns:
        The rollouts, and the log-probability of their orders, float [K, B], with its gradient.
    """
    path = WrittenPath(batch.hidden(), denoiser, num_steps, temperature)
    order = policy.order(path.batch, denoiser, num_steps)
    lead = torch.Size((count, len(batch)))
    if isinstance(order, PolicyOrder):  # its sets depend on what has been written: both are drawn on the way
        order = PolicyOrder(order.policy, path, lead, sees_truth=False)
        drawn = order.sample()
        sets = order.met_sets()
        assert sets is not None
        steps = torch.arange(num_steps, device=drawn.device).reshape(-1, 1, 1, 1)
        log_q = sets.log_prob(drawn == steps).sum(0)
    else:  # a plan
        order = order.expand(lead)
        drawn = order.sample()
        log_q = order.log_prob(drawn)
        for t in range(num_steps):
            path.state(drawn >= t, same_step(t, drawn))
    tokens, token_log_prob = path.finished(lead)
    return Rollouts(batch, num_steps, drawn, tokens, token_log_prob), log_q


class WrittenPath(Path):
    """The states of sequences whose tokens the denoiser writes, as they are asked for one after another.

    What is masked in one state and not in the next was revealed between them.

    Args:
        batch: the canvas.
        denoiser: see `Denoiser`.
        num_steps: step budget T.
        temperature: of the tokens; 0 takes the most likely ones.
    """

    def __init__(self, batch: Batch, denoiser: Denoiser, num_steps: int, temperature: float = 0.0) -> None:
        super().__init__(batch, denoiser, num_steps)
        self.temperature = temperature
        self._tokens = batch.readable.masked_fill(batch.latent, denoiser.mask_index)
        self._log_prob = torch.zeros(self._tokens.shape, device=batch.device)
        self._last: State | None = None

    def state(
        self, masked: Tensor, step: Tensor, predictions: Predictions | None = None, tokens: Tensor | None = None
    ) -> State:
        """The next state, see `Path`; what has just been revealed is written first."""
        self._write(masked)
        self._last = super().state(masked, step, predictions, self._tokens.expand(masked.shape)).replace(truth=None)
        return self._last

    def finished(self, lead: torch.Size) -> tuple[Tensor, Tensor]:
        """Write what is left: the tokens, int64 [*lead, S], and their log-probabilities, float."""
        self._write(torch.zeros_like(self.batch.latent))
        shape = lead + self.batch.latent.shape[-1:]
        return self._tokens.expand(shape), self._log_prob.expand(shape)

    @torch.no_grad()
    def _write(self, masked: Tensor) -> None:
        """Write at the last state what `masked` (bool [*, S]) does not hide any more."""
        state, self._last = self._last, None
        if state is None:
            return
        reveal = state.masked & ~masked  # [*, S]
        if self.temperature == 0:
            best = state.per_position(_most_likely)  # [*, S, 2]
            token, log_prob = best[..., 0].long(), best[..., 1]
        else:
            log_probs = state.per_position(lambda log_probs: log_probs)  # [*, S, V], perhaps without the rollouts
            log_probs = log_probs.expand(reveal.shape + log_probs.shape[-1:])
            token = sample_categorical(log_probs / self.temperature, uniform(reveal.shape, reveal.device))
            log_prob = log_probs.gather(-1, token.unsqueeze(-1)).squeeze(-1)
        self._tokens = torch.where(reveal, token, self._tokens)
        self._log_prob = torch.where(reveal, log_prob, self._log_prob)


def _most_likely(log_probs: Tensor) -> Tensor:
    """The most likely token and its log-probability: float [.., V] -> [.., 2]."""
    best = log_probs.max(-1)
    return torch.stack([best.indices.to(best.values.dtype), best.values], -1)
