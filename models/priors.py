"""Distributions over the order of revealing: schedules, heuristics and learned policies.

Every prior is also a decoding policy: `distribution(state)` is its law of the next reveal set.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from orderppl.decoding.decisions import NetworkPlan
from orderppl.decoding.memory import first_memory
from orderppl.decoding.policy import Policy
from orderppl.decoding.ranking import due_count
from orderppl.decoding.schedules import SetSizes, make_sizes
from orderppl.decoding.scores import entropy_before, prediction_entropy
from orderppl.decoding.step import or_best
from orderppl.denoising import Canvas
from orderppl.distributions import (
    BernoulliSet,
    HeuristicReveal,
    OrderedPartition,
    PlackettLuceSet,
    PricedReveal,
    RevealSet,
    SequentialReveal,
    SetLaw,
    SmoothedSet,
    StepwiseReveal,
    UniformSet,
)
from orderppl.errors import UserError
from orderppl.models.price import PriceRange
from orderppl.path import RevealPath
from orderppl.states import UnmaskingState

LOGIT_LIMIT = 12.0  # keeps reveal probabilities away from 0 and 1, so that every KL stays finite


class RevealPrior(nn.Module):
    """Base: a law of the next reveal set given what is visible, and the law of whole orders that it implies.

    Subclasses define `distribution`. Those whose steps do not depend on the tokens also override `forward` with a
    closed form.

    Attributes:
        non_empty: whether every set has at least one position.
        sizes: the schedule that the set sizes always follow, if there is one.
    """

    non_empty = False
    sizes: SetSizes | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that make a prior like this one, which it keeps under their names."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def distribution(self, state: UnmaskingState) -> SetLaw:
        """Law of z_t given s_t, batch shape [*], event [L]. The last step's completion is the caller's."""
        raise NotImplementedError

    def forward(self, path: RevealPath) -> OrderedPartition:
        """Law of the whole order of a batch, batch shape [B], event [L]."""
        return SequentialReveal(path, self.distribution)

    def select(self, state: UnmaskingState) -> Tensor:
        """Most probable reveal set, bool [*, L]: the prior as a greedy decoding policy."""
        return self.distribution(state).mode & state.masked


class ScheduledSteps(RevealPrior):
    """r_i independent over the steps with given probabilities, whatever the tokens.

        P(r_i = t) = alpha(t / T) - alpha((t + 1) / T)

    where alpha(u) is the fraction still masked at time u, falling from 1 to 0.

    Args:
        alpha: float [..] -> float [..], on [0, 1].
    """

    def __init__(self, alpha: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.alpha = alpha

    def step_logits(self, num_steps: int, device: torch.device) -> Tensor:
        """log P(r_i = t), float [T]."""
        remaining = self.alpha(torch.linspace(0, 1, num_steps + 1, dtype=torch.float64, device=device))
        return (remaining[:-1] - remaining[1:]).log().to(torch.get_default_dtype())

    def _steps(self, masked: Tensor, num_steps: int) -> StepwiseReveal:
        return StepwiseReveal(self.step_logits(num_steps, masked.device)[None], masked)

    def distribution(self, state: UnmaskingState) -> SetLaw:
        """Reveal by hazard P(r_i = t | r_i >= t)."""
        return self._steps(state.masked, state.num_steps).set_at(state.masked, state.step)

    def forward(self, path: RevealPath) -> OrderedPartition:
        """Closed form over orders."""
        return self._steps(path.attention_mask, path.num_steps)


class UniformSteps(ScheduledSteps):
    """r_i uniform on the T steps: hazard 1 / (T - t), the usual masked diffusion schedule discretised."""

    def __init__(self) -> None:
        super().__init__(lambda u: 1 - u)


class CosineSteps(ScheduledSteps):
    """Few positions early, many late: alpha(u) = cos(pi u / 2) (MaskGIT, arXiv 2202.04200)."""

    def __init__(self) -> None:
        super().__init__(lambda u: torch.cos(u * math.pi / 2))


class LearnedSchedule(ScheduledSteps):
    """A learned schedule: P(r_i = t) = softmax(logits)_t, the same for all positions, whatever the tokens.

    Starts as `UniformSteps`.

    Args:
        num_steps: step budget T.
    """

    def __init__(self, num_steps: int) -> None:
        super().__init__(self._remaining)
        self.num_steps = num_steps
        self.logits = nn.Parameter(torch.zeros(num_steps))

    def _remaining(self, u: Tensor) -> Tensor:
        """The fraction alpha(u) still masked, linear between the steps."""
        masked = torch.cat([self.logits.new_ones(1), 1 - self.logits.softmax(-1).cumsum(-1)])  # [T + 1]
        place = u.to(masked.dtype) * len(self.logits)
        before = place.long().clamp(max=len(self.logits) - 1)
        return torch.lerp(masked[before], masked[before + 1], place - before)

    def step_logits(self, num_steps: int, device: torch.device) -> Tensor:
        """log P(r_i = t), float [T].

        Raises:
            UserError: another number of steps than was learned.
        """
        if num_steps != len(self.logits):
            problem = f"{num_steps} steps for a schedule learned for {len(self.logits)}"
            raise UserError("num_steps", problem, "use as many steps as it was learned for")
        return self.logits.log_softmax(-1)


class FixedSizes(RevealPrior):
    """Uniform over the ordered partitions with k_t positions at step t: one set of k_t after another, all alike.

        p(z_t | M_t) = 1 / C(|M_t|, k_t),      p(r) = prod_t k_t! / L!

    With one position a step it is uniform over the L! orders, the prior of any-order autoregressive models. A guide
    of other sizes has an infinite KL to it.

    Args:
        sizes: schedule of the set sizes, or what `make_sizes` reads: "uniform", "cosine" or mean positions per step.

    Raises:
        UserError: an unknown schedule.
    """

    non_empty = True
    sizes: SetSizes

    def __init__(self, sizes: SetSizes | str | float = "uniform") -> None:
        super().__init__()
        self.sizes = make_sizes(sizes)

    def distribution(self, state: UnmaskingState) -> SetLaw:
        """Reveal as many as are due."""
        return UniformSet(due_count(self.sizes, state), state.masked)


class LogitPrior(RevealPrior):
    """Base of priors that reveal each position by log-odds of its own; a subclass defines `logits`.

    p_i = sigmoid(logits_i),  divided by Z = 1 - prod_{j in M_t} (1 - p_j) when `non_empty`
    """

    non_empty = True

    def logits(self, state: UnmaskingState) -> Tensor:
        """Log-odds of revealing each position, float [*, L]."""
        raise NotImplementedError

    def distribution(self, state: UnmaskingState) -> SetLaw:
        """Reveal by the log-odds, kept away from certainty."""
        logits = self.logits(state).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
        return BernoulliSet(logits, state.masked, non_empty=self.non_empty)


class LeftToRight(LogitPrior):
    """The leftmost masked positions first, an equal share of what is left at each step.

        logit p_i = (K - 1/2 - rank_i) / temperature,    K = ceil(|M_t| / steps left),  rank_i = 0 for the leftmost

    Args:
        temperature: positive; the smaller, the closer to the fixed order (and the larger its KL to any other).
    """

    def __init__(self, temperature: float = 0.25) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature: {temperature} is not positive; use a value such as 0.25")
        self.temperature = temperature

    def logits(self, state: UnmaskingState) -> Tensor:
        """Log-odds of revealing each position, float [*, L]."""
        rank = state.masked.long().cumsum(-1) - 1  # [*, L]
        size = -(-state.masked.sum(-1) // state.steps_left)  # [*]
        return ((size.unsqueeze(-1) - 0.5 - rank) / self.temperature).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)


class EasyFirst(LogitPrior):
    """Confident positions first: a confidence threshold made soft.

        logit p_i = (logit c_i - logit threshold) / temperature,    c_i = max_v p(x_i = v | s_t)

    Args:
        threshold: confidence at which a position is as likely revealed as not, in (0, 1).
        temperature: positive; towards 0 this is the threshold decoder of Fast-dLLM (arXiv 2505.22618).
    """

    def __init__(self, threshold: float = 0.9, temperature: float = 1.0) -> None:
        super().__init__()
        if not 0 < threshold < 1:
            raise ValueError(f"threshold: {threshold} is not in (0, 1); use a value such as 0.9")
        if not temperature > 0:
            raise ValueError(f"temperature: {temperature} is not positive; use a value such as 1.0")
        self.threshold = threshold
        self.temperature = temperature

    def logits(self, state: UnmaskingState) -> Tensor:
        """Log-odds of revealing each position, float [*, L]."""
        confidence = state.log_probs.amax(-1).exp()  # [*, L]
        odds = torch.logit(confidence, eps=1e-6) - math.log(self.threshold / (1 - self.threshold))
        return (odds / self.temperature).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)


class BoundedEntropy(LogitPrior):
    """Certain positions first, as many as their entropies allow: an entropy bound made soft.

        logit p_i = (bound - sum_{j in M : H_j < H_i} H_j) / temperature,    H_i the entropy of p(x_i | s_t)

    Unlike a confidence, the sum tells equally uncertain positions apart (ties go to the left), so that one of two cells
    that depend on each other can be revealed without the other.

    Args:
        bound: entropy of the others at which a position is as likely revealed as not, nats, at least 0.
        temperature: positive, nats; towards 0 this is the entropy-bound decoder (arXiv 2505.24857).
    """

    def __init__(self, bound: float = 0.5, temperature: float = 0.1) -> None:
        super().__init__()
        if not bound >= 0:
            raise ValueError(f"bound: {bound} is negative; use a value such as 0.5")
        if not temperature > 0:
            raise ValueError(f"temperature: {temperature} is not positive; use a value such as 0.1")
        self.bound = bound
        self.temperature = temperature

    def logits(self, state: UnmaskingState) -> Tensor:
        """Log-odds of revealing each position, float [*, L]."""
        before = entropy_before(prediction_entropy(state), state.masked)  # [*, L]
        return ((self.bound - before) / self.temperature).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)


class LearnedPolicy(LogitPrior):
    """A network decides from what is visible.

        logit p_i = network(s_t, t)_i

    Args:
        network: state -> logits, float [*, L].
        non_empty: condition every set on revealing something.
    """

    def __init__(self, network: nn.Module, non_empty: bool = True) -> None:
        super().__init__()
        self.network = network
        self.non_empty = non_empty

    def logits(self, state: UnmaskingState) -> Tensor:
        """Log-odds of revealing each position, float [*, L]."""
        logits: Tensor = self.network(state)
        return logits


class ResidualPolicy(LearnedPolicy):
    """A heuristic and a learned correction to it.

        logit p_i = logit base_i + network(s_t, t)_i

    With a network whose output starts at zero it starts as the heuristic and can only be trained away from it.

    Args:
        base: the heuristic, such as `EasyFirst`.
        network: state -> logits, float [*, L].
        non_empty: condition every set on revealing something.
    """

    def __init__(self, base: LogitPrior, network: nn.Module, non_empty: bool = True) -> None:
        super().__init__(network, non_empty)
        if not isinstance(base, LogitPrior):
            raise ValueError(
                f"base: {type(base).__name__} has no logits to correct; use EasyFirst or another LogitPrior"
            )
        self.base = base

    def logits(self, state: UnmaskingState) -> Tensor:
        """Log-odds of revealing each position, float [*, L]."""
        correction = super().logits(state)  # first: a network that reads hidden states spares the base a denoiser call
        return self.base.logits(state) + correction


class LearnedSteps(LogitPrior):
    """A learned plan of the whole order from prompt and positions alone: r_i ~ Categorical(softmax(network_i)).

    Shares its network with a `MeanFieldGuide` that does not see the tokens to tie the two (KL 0); then the guide is
    deployable as it is. A `ResidualPolicy` corrects its hazard,

        logit p_i = log P(r_i = t) - log P(r_i > t),

    by what has been revealed. A plan of fewer steps S than there are is played more slowly, in the same order:

        P(r_i = t) = P(s_i = s(t)) / #{u : s(u) = s(t)},    s(t) = floor(t S / T)

    Args:
        network: (None, attention_mask, context, context_mask) -> step logits, float [B, L, S].
    """

    non_empty = False

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def _plan(self, canvas: Canvas, num_steps: int) -> StepwiseReveal:
        logits = NetworkPlan(self.network)(canvas)  # [B, L, S]
        planned = logits.shape[-1]
        if planned < num_steps:
            part = torch.arange(num_steps, device=logits.device) * planned // num_steps  # s(t), [T]
            begin, end = ((s * num_steps + planned - 1) // planned for s in (part, part + 1))
            logits = logits[..., part] - (end - begin).log()
        return StepwiseReveal(logits, canvas.attention_mask)

    def logits(self, state: UnmaskingState) -> Tensor:
        """Log-odds of the hazard, float [*, L]."""
        hazard = self.distribution(state)
        return (hazard.log_reveal - hazard.log_keep).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)

    def distribution(self, state: UnmaskingState) -> RevealSet:
        """Reveal by the plan's hazard."""
        return self._plan(state.canvas, state.num_steps).set_at(state.masked, state.step)

    def forward(self, path: RevealPath) -> OrderedPartition:
        """Closed form over orders."""
        return self._plan(path.canvas, path.num_steps)


class HeldBack(LogitPrior):
    """Another policy, with the later sets of a plan held back.

        logit p_i = logit base_i - weight * max(E[s_i] - t S / T, 0),    s_i ~ Categorical(softmax(network_i))

    A plan keeps apart what depends on each other, which the certainty of single positions cannot show.

    Args:
        base: the other policy, such as `EasyFirst`.
        network: of the plan of S steps: (None, attention_mask, context, context_mask) -> step logits, float [B, L, S].
        weight: log-odds per step of the plan, learned from this value.
    """

    def __init__(self, base: LogitPrior, network: nn.Module, weight: float = 0.5) -> None:
        super().__init__()
        self.base = base
        self.network = network
        self.non_empty = base.non_empty
        self.weight = nn.Parameter(torch.tensor(weight))

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that make a policy like this one."""
        return {"base": self.base, "network": self.network, "weight": self.weight.item()}

    def logits(self, state: UnmaskingState) -> Tensor:
        """Log-odds of revealing each position, float [*, L]."""
        plan = NetworkPlan(self.network)(state.canvas).softmax(-1)  # [B, L, S]
        num_sets = plan.shape[-1]
        planned = plan @ torch.arange(num_sets, dtype=plan.dtype, device=plan.device)  # [B, L]
        now = (state.step * num_sets / state.num_steps).to(plan.dtype)  # in sets, [*]
        early = (planned - now[..., None]).clamp(min=0)  # [*, L]
        return self.base.logits(state) - self.weight * early


class RankedPolicy(RevealPrior):
    """The best positions by the log-odds of another policy, as many as a schedule says.

        p(z_t | s_t) = Plackett-Luce(logit p_1, .., logit p_L; k_t)

    which reveals the k_t largest of logit p_i + Gumbel noise; its mode ranks. With `EasyFirst` it is a soft top-prob.

    Args:
        prior: the other policy, of whose sizes nothing is left.
        sizes: schedule of the set sizes, or what `make_sizes` reads.
    """

    non_empty = True
    sizes: SetSizes

    def __init__(self, prior: LogitPrior, sizes: SetSizes | str | float = "uniform") -> None:
        super().__init__()
        self.prior = prior
        self.sizes = make_sizes(sizes)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that make a policy like this one.

        Raises:
            UserError: a schedule that `make_sizes` does not read.
        """
        mean = getattr(self.sizes, "mean", self.sizes.name)
        if make_sizes(mean) != self.sizes:
            raise UserError("sizes", f"{self.sizes} has no name", 'use "uniform", "cosine" or positions per step')
        return {"prior": self.prior, "sizes": mean}

    def distribution(self, state: UnmaskingState) -> SetLaw:
        """Reveal as many as are due."""
        return PlackettLuceSet(self.prior.logits(state), due_count(self.sizes, state), state.masked)


class HeuristicPrior(RevealPrior):
    """The set that a decoding policy selects, each position's decision flipped with probability `smoothing`.

        p(z_t | s_t) = prod_{i in M_t} (1 - smoothing)^[z_ti = d_ti] smoothing^[z_ti != d_ti],     d_t = policy(s_t)

    divided by Z when `non_empty`. The flips keep every KL finite; the fewer, the closer to the heuristic. Policies that
    keep a memory are followed step by step along each order.

    Args:
        policy: any object with `select(state)` that reads neither noise nor the true tokens.
        smoothing: probability of a flip, above 0 and below 1/2.
        non_empty: condition every set on revealing something.

    Raises:
        UserError: smoothing outside (0, 1/2), or a policy that no prior can be made of.
    """

    def __init__(self, policy: Policy, smoothing: float = 0.05, non_empty: bool = True) -> None:
        super().__init__()
        if not 0 < smoothing < 0.5:
            raise UserError("smoothing", f"{smoothing} is not in (0, 0.5)", "give a number such as 0.05")
        if getattr(policy, "needs_truth", False):
            raise UserError("policy", "reads the true tokens, which a prior cannot see", "use it in a HeuristicGuide")
        if getattr(policy, "needs_noise", False):
            problem = "draws its sets: its law is not that of single decisions"
            raise UserError("policy", problem, "use FixedSizes for random sets, and leftmost ties")
        self.policy = policy
        self.smoothing = smoothing
        self.non_empty = non_empty

    def distribution(self, state: UnmaskingState) -> SetLaw:
        """Flip what the policy decides; its memory is that of the state."""
        flat = state.flat()
        rows = torch.arange(state.masked.shape[-2], device=state.masked.device).expand(state.masked.shape[:-1])
        for key, kept in (first_memory(self.policy, rows.flatten()) | state.memory).items():
            copies = len(flat.step) // len(kept)  # particles may come in after the first step of a program
            state.memory[key] = kept.repeat((copies,) + (1,) * (kept.dim() - 1))
        flat.noise, flat.memory = state.noise, state.memory
        decided = or_best(self.policy, flat, self.policy.select(flat)).reshape(state.masked.shape)
        return SmoothedSet(decided, state.masked, self.smoothing, self.non_empty)

    def forward(self, path: RevealPath) -> OrderedPartition:
        """Follow the policy along an order."""
        return HeuristicReveal(path, self.policy, self.smoothing, self.non_empty)


class StepPrice(RevealPrior):
    """Any prior times exp(-price) per executed step: a geometric prior on the number of steps, up to a constant.

    Without a price nothing in the bound asks for fewer than T steps. With a `PriceRange` every sequence has a price of
    its own, and a policy that reads it (feature `price` of `PolicyNetwork`) is learned for all prices at once.

    Args:
        prior: the prior to put a price on.
        price: nats per executed step, at least 0; or a range of prices.
    """

    def __init__(self, prior: RevealPrior, price: float | PriceRange) -> None:
        super().__init__()
        if not isinstance(price, PriceRange) and price < 0:
            raise ValueError(f"price: {price} is negative; use 0 or more nats per step")
        self.prior = prior
        self.price = price
        self.non_empty = prior.non_empty
        self.sizes = prior.sizes

    def at(self, price: float) -> StepPrice:
        """The policy for one price of the range, nats: the same weights, for all sequences alike.

        Raises:
            UserError: the prior was made for one price, or the price is not positive.
        """
        if not isinstance(self.price, PriceRange):
            raise UserError("price", f"this prior has the one price {self.price:g}", "leave the price out")
        if not price > 0:
            raise UserError("price", f"{price} is not positive", "give nats per step above 0")
        copied = copy.deepcopy(self, {id(weight): weight for weight in (*self.parameters(), *self.buffers())})
        assert isinstance(copied.price, PriceRange)
        copied.price.chosen = price  # the copy's network reads the copy's range
        return copied

    def _prices(self, masked: Tensor) -> float | Tensor:
        """Price of a number of sequences: a number or float [B]."""
        price = self.price
        return price.prices(masked.shape[-2], masked.device) if isinstance(price, PriceRange) else price

    def forward(self, path: RevealPath) -> OrderedPartition:
        """The law of the prior, priced."""
        return PricedReveal(self.prior(path), self._prices(path.attention_mask))

    def distribution(self, state: UnmaskingState) -> SetLaw:
        """Same sets as the prior, each step weighed by its price while anything is masked."""
        executed = state.masked.any(-1).to(torch.get_default_dtype())  # [*, B]
        return state.law(self.prior.distribution).weighted(-self._prices(state.masked) * executed)

    def select(self, state: UnmaskingState) -> Tensor:
        """Selects as the prior does.

        Raises:
            UserError: no price has been chosen from the range.
        """
        if isinstance(self.price, PriceRange) and self.price.chosen is None:
            raise UserError("price", "a range decides nothing", "decode with the policy `at` one price")
        return self.prior.select(state)
