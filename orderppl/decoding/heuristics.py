"""Reveal policies without parameters: the baselines, wrappers around any policy, and decisions for learned ones.

Conventions: a score is high where a position should be revealed first; ties go to the leftmost position; every rule is
applied to each row by itself and to masked positions only. c is the largest token probability at a position.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from orderppl.decoding.policy import Policy, StochasticPolicy
from orderppl.decoding.schedules import SetSizes, UniformSizes, make_sizes
from orderppl.denoising import Canvas
from orderppl.errors import UserError
from orderppl.randomness import sample_categorical, uniform
from orderppl.states import UnmaskingState

WINDOW = "window"  # memory key: (positions, step, num_steps) of the block a row is in, int64 [B, 3]
TRUTH = "truth"  # memory key: the true tokens, for oracles in path evaluation only, int64 [B, L]
ROW = "row"  # memory key, set by the decoder: index of the row in the batch it was called with, int64 [B]


# ---- tensor functions


def confidence(state: UnmaskingState) -> Tensor:
    """Largest token probability c at every position: float [*, L]."""
    return state.log_probs.amax(-1).exp()


def prediction_entropy(state: UnmaskingState) -> Tensor:
    """Entropy H of the token distribution at every position, nats: float [*, L]."""
    return torch.special.entr(state.log_probs.exp()).sum(-1)


def reveal_rank(score: Tensor, masked: Tensor, last: Tensor | None = None, tie_break: Tensor | None = None) -> Tensor:
    """Rank positions for revealing: 0 is first.

    Args:
        score: float [*, L], high = first.
        masked: bool [*, L]; all other positions rank behind the masked ones.
        last: bool [*, L], positions ranked behind the other masked ones whatever their score.
        tie_break: float [*, L], high = first among equal scores; the leftmost position when left out.

    Returns:
        int64 [*, L], a permutation of 0..L-1 per row.
    """
    group = torch.where(masked, 0 if last is None else last.long(), 2)
    if tie_break is None:
        by_score = score.argsort(dim=-1, descending=True, stable=True)
    else:
        by_tie = tie_break.argsort(dim=-1, descending=True)
        by_score = by_tie.gather(-1, score.gather(-1, by_tie).argsort(dim=-1, descending=True, stable=True))
    by_group = group.gather(-1, by_score).argsort(dim=-1, stable=True)
    return by_score.gather(-1, by_group).argsort(-1)


def _preferred(masked: Tensor, last: Tensor | None) -> Tensor:
    """Masked positions that are not to come last; all masked ones in rows that have no other."""
    if last is None:
        return masked
    preferred = masked & ~last
    return torch.where(preferred.any(-1, keepdim=True), preferred, masked)


def _longest_prefix(sorted_values_ok: Tensor, count: Tensor) -> Tensor:
    """Largest k in 1..count whose k-th entry holds, at least 1: int64 [*] from bool [*, L]."""
    k = torch.arange(1, sorted_values_ok.shape[-1] + 1, device=count.device)
    return torch.where(sorted_values_ok & (k <= count[..., None]), k, 0).amax(-1).clamp(min=1)


def block_window(state: UnmaskingState) -> tuple[Tensor, Tensor, Tensor]:
    """Positions, step and step budget that set sizes refer to: those of the block inside `Block`, else of the row."""
    if WINDOW in state.memory:
        positions, step, num_steps = state.memory[WINDOW].unbind(-1)
        return positions, step, num_steps
    return state.attention_mask.sum(-1), state.step, torch.full_like(state.step, state.num_steps)


def due_count(sizes: SetSizes, state: UnmaskingState) -> Tensor:
    """Positions to reveal now: int64 [*], at least 1; a row ahead of or behind its schedule returns to it."""
    positions, step, num_steps = block_window(state)
    revealed = positions - state.masked.sum(-1)
    return (sizes.cumulative(positions, step + 1, num_steps) - revealed).clamp(min=1)


# ---- heuristics


class Heuristic(ABC):
    """A policy with a score (high = reveal first) and a rule that cuts the ranking.

    Attributes:
        needs_truth: whether it reads the true tokens, which only path evaluation can give.
        needs_noise: whether it reads the noise of the state.
        remembers: whether it reads what it kept in the memory at earlier steps.
    """

    name: str
    needs_truth = False
    needs_noise = False
    remembers = False

    @abstractmethod
    def score(self, state: UnmaskingState) -> Tensor:
        """Score of every position: float [*, L]."""

    @abstractmethod
    def choose(self, state: UnmaskingState, last: Tensor | None = None) -> Tensor:
        """Reveal set when the positions in `last` (bool [*, L]) rank behind all others: bool [*, L]."""

    def select(self, state: UnmaskingState) -> Tensor:
        """Reveal set z_t: bool [*, L]."""
        return self.choose(state)


@dataclass(frozen=True)
class RankPolicy(Heuristic):
    """Reveals the K positions of highest score, K from a schedule.

    Args:
        sizes: set sizes; uniform when left out.
        ties: which of equally scored positions comes first: the "leftmost", or a "random" one by the state's noise.
            Where a denoiser is exactly symmetric, leftmost turns a confidence rule into left-to-right.
    """

    sizes: SetSizes = field(default_factory=UniformSizes)
    ties: str = "leftmost"

    def __post_init__(self) -> None:
        if self.ties not in ("leftmost", "random"):
            raise UserError("ties", f"unknown rule {self.ties!r}", "use leftmost or random")

    @property
    def needs_noise(self) -> bool:  # type: ignore[override]
        """Whether ties are broken at random."""
        return self.ties == "random"

    def choose(self, state: UnmaskingState, last: Tensor | None = None) -> Tensor:
        """Return the K first masked positions, K as `due_count` says."""
        count = due_count(self.sizes, state)
        tie_break = state.noise if self.ties == "random" else None
        return (reveal_rank(self.score(state), state.masked, last, tie_break) < count[..., None]) & state.masked


@dataclass(frozen=True)
class Random(RankPolicy):
    """K masked positions drawn uniformly without replacement: score = uniform noise."""

    name = "random"
    needs_noise = True

    def score(self, state: UnmaskingState) -> Tensor:
        """Return the noise of the state, or torch's when it has none."""
        if state.noise is not None:
            return state.noise
        return uniform(state.masked.shape, state.masked.device, torch.float64)


@dataclass(frozen=True)
class TopProb(RankPolicy):
    """K largest c = max_v p(v)."""

    name = "top_prob"

    def score(self, state: UnmaskingState) -> Tensor:
        """Return c."""
        return confidence(state)


@dataclass(frozen=True)
class Margin(RankPolicy):
    """K largest p1 - p2, the two largest token probabilities (Kim et al., arXiv 2502.06768)."""

    name = "margin"

    def score(self, state: UnmaskingState) -> Tensor:
        """Return p1 - p2."""
        first, second = state.log_probs.topk(2, -1).values.exp().unbind(-1)
        return first - second


@dataclass(frozen=True)
class Entropy(RankPolicy):
    """K smallest entropies: score = -H."""

    name = "entropy"

    def score(self, state: UnmaskingState) -> Tensor:
        """Return -H, nats."""
        return -prediction_entropy(state)


@dataclass(frozen=True)
class LeftToRight(RankPolicy):
    """K leftmost masked positions: score = -position."""

    name = "left_to_right"

    def score(self, state: UnmaskingState) -> Tensor:
        """Return -position."""
        size = state.masked.shape[-1]
        return -torch.arange(size, dtype=torch.float64, device=state.masked.device).expand(state.masked.shape)


@dataclass(frozen=True)
class Threshold(Heuristic):
    """All masked positions with c >= tau, at least the arg-max of c (Fast-dLLM, arXiv 2505.22618).

    Args:
        tau: confidence in [0, 1].
    """

    tau: float = 0.9
    name = "threshold"

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 1:
            raise UserError("tau", f"{self.tau} is no probability", "give a number from 0 to 1")

    def score(self, state: UnmaskingState) -> Tensor:
        """Return c."""
        return confidence(state)

    def choose(self, state: UnmaskingState, last: Tensor | None = None) -> Tensor:
        """Return {c >= tau} and the arg-max."""
        score, allowed = self.score(state), _preferred(state.masked, last)
        return ((score >= self.tau) | (reveal_rank(score, allowed) == 0)) & allowed


@dataclass(frozen=True)
class Factor(Heuristic):
    """The k most confident positions, k the largest with (k + 1)(1 - c_(k)) < f (Fast-dLLM, arXiv 2505.22618).

    c_(1) >= c_(2) >= ... are the sorted confidences; at least the arg-max is revealed.

    Args:
        factor: f > 0.
    """

    factor: float = 1.0
    name = "factor"

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise UserError("factor", f"{self.factor} is not positive", "give a number above 0")

    def score(self, state: UnmaskingState) -> Tensor:
        """Return c."""
        return confidence(state)

    def choose(self, state: UnmaskingState, last: Tensor | None = None) -> Tensor:
        """Return the k most confident positions."""
        score, allowed = self.score(state), _preferred(state.masked, last)
        rank = reveal_rank(score, allowed)
        ordered = score.gather(-1, rank.argsort(-1))  # [*, L], c_(1), c_(2), ...
        k = torch.arange(1, ordered.shape[-1] + 1, device=ordered.device)
        count = _longest_prefix((k + 1) * (1 - ordered) < self.factor, allowed.sum(-1))
        return (rank < count[..., None]) & allowed


@dataclass(frozen=True)
class EntropyBound(Heuristic):
    """The k lowest-entropy positions, k the largest with sum H - max H <= gamma (Ben-Hamu et al., arXiv 2505.24857).

    Args:
        gamma: bound in nats, at least 0.
    """

    gamma: float = 0.1
    name = "entropy_bound"

    def __post_init__(self) -> None:
        if not self.gamma >= 0:
            raise UserError("gamma", f"{self.gamma} is negative", "give a bound in nats, 0 or more")

    def score(self, state: UnmaskingState) -> Tensor:
        """Return -H, nats."""
        return -prediction_entropy(state)

    def choose(self, state: UnmaskingState, last: Tensor | None = None) -> Tensor:
        """Return the k lowest-entropy positions."""
        score, allowed = self.score(state), _preferred(state.masked, last)
        rank = reveal_rank(score, allowed)
        ordered = -score.gather(-1, rank.argsort(-1)).double()  # [*, L], ascending entropies
        others = ordered.cumsum(-1) - ordered  # the largest of the first k is the k-th
        count = _longest_prefix(others <= self.gamma, allowed.sum(-1))
        return (rank < count[..., None]) & allowed


@dataclass(frozen=True)
class Klass(Heuristic):
    """c > tau where the last n predictions each moved by KL < eps, at least the arg-max (KLASS, arXiv 2511.05664).

    KL is KL(p now, p one step before) of the token distribution, nats.

    Args:
        tau: confidence in [0, 1].
        eps: bound of the KL, above 0.
        stable_steps: n >= 1.
    """

    tau: float = 0.9
    eps: float = 0.01
    stable_steps: int = 1
    name = "klass"
    remembers = True

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 1:
            raise UserError("tau", f"{self.tau} is no probability", "give a number from 0 to 1")
        if not self.eps > 0:
            raise UserError("eps", f"{self.eps} is not positive", "give a KL in nats above 0")
        if self.stable_steps < 1:
            raise UserError("stable_steps", f"{self.stable_steps} steps", "give 1 or more")

    def score(self, state: UnmaskingState) -> Tensor:
        """Return c."""
        return confidence(state)

    def choose(self, state: UnmaskingState, last: Tensor | None = None) -> Tensor:
        """Return the confident and stable positions and the arg-max."""
        now, memory = state.log_probs, state.memory
        if "klass_log_probs" in memory:
            moved = torch.where(now.isneginf(), 0.0, now.exp() * (now - memory["klass_log_probs"])).sum(-1)
            memory["klass_stable"] = torch.where(moved < self.eps, memory["klass_stable"] + 1, 0)
        else:
            memory["klass_stable"] = torch.zeros_like(state.tokens)
        memory["klass_log_probs"] = now
        score, allowed = self.score(state), _preferred(state.masked, last)
        settled = (score > self.tau) & (memory["klass_stable"] >= self.stable_steps)
        return (settled | (reveal_rank(score, allowed) == 0)) & allowed


@dataclass(frozen=True)
class OracleRank(RankPolicy):
    """Ranks by the true token: an upper-bound arm, never deployable.

    Args:
        sizes: set sizes; uniform when left out.
        tokens: int64 [B, L], the truth of the batch when decoding; path evaluation supplies its own.
    """

    tokens: Tensor | None = field(default=None, compare=False)
    needs_truth = True

    def truth(self, state: UnmaskingState) -> Tensor:
        """True tokens of the rows still in the batch: int64 [B, L]."""
        if TRUTH in state.memory:
            return state.memory[TRUTH]
        if self.tokens is None:
            raise UserError("policy", f"{self.name} needs the true tokens", "pass tokens=, or only follow true paths")
        return self.tokens.to(state.tokens.device)[state.memory[ROW]]


@dataclass(frozen=True)
class OracleMargin(OracleRank):
    """K largest p(x_i) - max over other tokens of p (the oracle of arXiv 2602.09501)."""

    name = "oracle_margin"

    def score(self, state: UnmaskingState) -> Tensor:
        """Return p(x_i) - max other p."""
        truth, probs = self.truth(state)[..., None], state.log_probs.exp()
        return (probs.gather(-1, truth) - probs.scatter(-1, truth, 0.0).amax(-1, keepdim=True))[..., 0]


@dataclass(frozen=True)
class GreedyOracle(OracleRank):
    """K largest log p(x_i)."""

    name = "greedy_oracle"

    def score(self, state: UnmaskingState) -> Tensor:
        """Return log p(x_i), nats."""
        return state.log_probs.gather(-1, self.truth(state)[..., None])[..., 0]


# ---- wrappers


def needs_noise(policy: Policy) -> bool:
    """Whether a policy reads `state.noise`; a policy that does not say so may."""
    return bool(getattr(policy, "needs_noise", True))


def remembers(policy: Policy) -> bool:
    """Whether a policy reads what it kept in `state.memory` at earlier steps; a policy that does not say so may."""
    return bool(getattr(policy, "remembers", True))


def policy_score(policy: Policy, state: UnmaskingState) -> Tensor:
    """What a fallback ranks by: the policy's own score or inclusion probabilities, else confidence; float [*, L]."""
    score = getattr(policy, "score", None)
    if callable(score):
        return score(state)
    if isinstance(policy, StochasticPolicy):
        return policy.distribution(state).probs
    return confidence(state)


def _restricted(state: UnmaskingState, masked: Tensor, step: Tensor | None = None) -> UnmaskingState:
    """The same state with fewer positions to choose from; shares the logits and the memory."""
    view = copy.copy(state)
    view.masked = masked
    if step is not None:
        view.step = step
    return view


def _choose(policy: Policy, state: UnmaskingState, last: Tensor | None) -> Tensor:
    """Ask a policy for its set with some positions ranked last."""
    if last is None:
        return policy.select(state)
    choose = getattr(policy, "choose", None)
    if callable(choose):
        return choose(state, last)
    return policy.select(_restricted(state, _preferred(state.masked, last)))


@dataclass(frozen=True)
class Block(Heuristic):
    """Semi-autoregressive: the policy only sees the leftmost block that is not finished.

    A row of n blocks gives block b the steps up to floor((b + 1) T / n); steps a block does not use go to the next. The
    last step of a block reveals what is left of it. Blocks are counted from the row's own start and with the row's own
    length.

    Args:
        policy: any policy. Set sizes, and the steps left that a learned policy sees, are those of the block.
        size: positions per block.
    """

    policy: Policy
    size: int
    name = "block"
    remembers = True

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError("block_size", f"{self.size} positions", "give 1 or more")

    @property
    def needs_truth(self) -> bool:  # type: ignore[override]
        """Whether the wrapped policy reads the true tokens."""
        return bool(getattr(self.policy, "needs_truth", False))

    @property
    def needs_noise(self) -> bool:  # type: ignore[override]
        """Whether the wrapped policy reads the noise."""
        return needs_noise(self.policy)

    def _enter(self, state: UnmaskingState) -> tuple[UnmaskingState, Tensor]:
        """State of the current block, and whether this is its last step (bool [B])."""
        attention = state.attention_mask
        block = (attention.long().cumsum(-1) - 1).clamp(min=0) // self.size  # [B, L]
        length = attention.sum(-1)
        blocks = (length + self.size - 1) // self.size
        current = torch.where(state.masked, block, state.masked.shape[-1]).amin(-1)
        began = state.step
        if "block" in state.memory:
            before, before_began = state.memory["block"].unbind(-1)
            began = torch.where(before == current, before_began, state.step)
        state.memory["block"] = torch.stack([current, began], -1)
        end = (current + 1) * state.num_steps // blocks.clamp(min=1)
        num_steps = (end - began).clamp(min=1)
        step = (state.step - began).minimum(num_steps - 1)
        inside = attention & (block == current[..., None])
        state.memory[WINDOW] = torch.stack([inside.sum(-1), step, num_steps], -1)
        view = _restricted(state, state.masked & inside, state.num_steps - (num_steps - step))
        return view, step == num_steps - 1

    def score(self, state: UnmaskingState) -> Tensor:
        """Return the wrapped policy's score, -inf outside the block."""
        view, _ = self._enter(state)
        return policy_score(self.policy, view).masked_fill(~view.masked, -torch.inf)

    def choose(self, state: UnmaskingState, last: Tensor | None = None) -> Tensor:
        """Return the wrapped policy's set within the block."""
        view, final = self._enter(state)
        chosen = _choose(self.policy, view, last) & view.masked
        return torch.where(final[..., None], view.masked, chosen)


@dataclass(frozen=True)
class EosAware(Heuristic):
    """Ranks positions that are predicted to be end or padding tokens behind all others.

    With a policy that ranks or cuts scores this changes the ranking only; any other policy sees those positions when
    nothing else is masked.

    Args:
        policy: any policy.
        token_ids: the ids of end-of-sequence and padding tokens.
    """

    policy: Policy
    token_ids: Sequence[int]
    name = "eos_aware"

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise UserError("token_ids", "no end or padding id", "give at least one")

    @property
    def needs_truth(self) -> bool:  # type: ignore[override]
        """Whether the wrapped policy reads the true tokens."""
        return bool(getattr(self.policy, "needs_truth", False))

    @property
    def needs_noise(self) -> bool:  # type: ignore[override]
        """Whether the wrapped policy reads the noise."""
        return needs_noise(self.policy)

    @property
    def remembers(self) -> bool:  # type: ignore[override]
        """Whether the wrapped policy reads its memory."""
        return remembers(self.policy)

    def _last(self, state: UnmaskingState) -> Tensor:
        predicted = state.logits.argmax(-1)  # [*, L]
        return torch.isin(predicted, torch.tensor(list(self.token_ids), device=predicted.device))

    def score(self, state: UnmaskingState) -> Tensor:
        """Return minus the rank, so that the order of the wrapped policy holds within both groups."""
        return -reveal_rank(policy_score(self.policy, state), state.masked, self._last(state)).double()

    def choose(self, state: UnmaskingState, last: Tensor | None = None) -> Tensor:
        """Return the wrapped policy's set with end and padding predictions last."""
        mine = self._last(state)
        return _choose(self.policy, state, mine if last is None else mine | last)


# ---- decisions of learned policies


def _check_decision(decision: str, allowed: tuple[str, ...]) -> None:
    if decision not in allowed:
        raise UserError("decision", f"unknown decision {decision!r}", f"use one of {', '.join(allowed)}")


@dataclass(frozen=True)
class StochasticDecision:
    """Turns a distribution over reveal sets into a set.

    `mode` reveals {p > 0.5}, p the inclusion probability; an empty set falls to the decoder's arg-max rule.
    `sample` draws from the distribution (exactly, also when it is conditioned to be non-empty) with the noise of the
    state; see `RevealSet.draw`.

    Args:
        policy: a policy with a distribution.
        decision: "mode" or "sample".
        beta: factor on reveal probabilities when sampling, above 0; above 1 reveals more than was trained for.
    """

    policy: StochasticPolicy
    decision: str = "mode"
    beta: float = 1.0
    name = "stochastic"

    @property
    def needs_noise(self) -> bool:
        """Whether it samples."""
        return self.decision == "sample"

    @property
    def remembers(self) -> bool:
        """Whether the wrapped policy reads its memory."""
        return remembers(self.policy)

    def __post_init__(self) -> None:
        _check_decision(self.decision, ("mode", "sample"))
        if not self.beta > 0:
            raise UserError("beta", f"{self.beta} is not positive", "give a number above 0")

    def score(self, state: UnmaskingState) -> Tensor:
        """Return the inclusion probabilities."""
        return self.policy.distribution(state).probs

    def select(self, state: UnmaskingState) -> Tensor:
        """Return the reveal set: bool [*, L]."""
        distribution = self.policy.distribution(state)
        if self.decision == "mode":
            return (distribution.probs > 0.5) & state.masked
        noise = state.noise
        if noise is None:
            noise = uniform(state.masked.shape, state.masked.device, torch.float64)
        return distribution.draw(noise, self.beta) & state.masked


@dataclass(frozen=True)
class NetworkPlan:
    """Reads a plan from a sequence network that does not see the tokens, such as that of a tied mean-field guide.

    Args:
        network: (None, attention_mask, context, context_mask) -> step logits, float [B, L, T].
    """

    network: nn.Module

    def __call__(self, canvas: Canvas) -> Tensor:
        """Step logits of the rows of the canvas: float [B, L, T]."""
        logits: Tensor = self.network(None, canvas.attention_mask, canvas.context, canvas.context_mask)
        return logits


@dataclass(frozen=True)
class PlannedOrder:
    """Follows a plan of the whole order, made at the first step and kept in the memory of the decoding.

    A step at which nothing is planned is skipped and not charged: each forward reveals the next non-empty set.

    Args:
        plan: `reveal_step` int64 [B, L] or [L], or a callable from the canvas to logits float [B, L, T] of each
            position's step (`NetworkPlan` for a network); it is called once per decoding.
        decision: how logits become a plan. "sample": one draw per position. "mode": each position's most likely step,
            which for a flat plan puts everything into one step. "rank": sort positions by expected step and cut by the
            expected set sizes, rounded cumulatively.
    """

    plan: Tensor | Callable[[Canvas], Tensor]
    decision: str = "sample"
    name = "planned"
    remembers = True

    @property
    def needs_noise(self) -> bool:
        """Whether it samples its plan."""
        return self.decision == "sample" and not isinstance(self.plan, Tensor)

    def __post_init__(self) -> None:
        _check_decision(self.decision, ("sample", "mode", "rank"))

    def _make(self, state: UnmaskingState) -> Tensor:
        """Plan of the rows in the batch: int64 [B, L]."""
        if isinstance(self.plan, Tensor):
            plan = self.plan.to(state.tokens.device)
            return plan.expand(state.tokens.shape) if plan.dim() == 1 else plan[state.memory[ROW]]
        logits = self.plan(state.canvas)  # [B, L, T]
        if logits.shape[-1] > state.num_steps:
            problem = f"{state.num_steps} steps for a plan of {logits.shape[-1]}"
            raise UserError("max_steps", problem, "allow as many steps as the plan has")
        if self.decision == "mode":
            return logits.argmax(-1)
        if self.decision == "sample":
            noise = state.noise
            if noise is None:
                noise = uniform(state.masked.shape, logits.device, torch.float64)
            return sample_categorical(logits, noise)
        probs = logits.double().softmax(-1)
        attended = state.attention_mask
        expected = (probs * torch.arange(logits.shape[-1], device=logits.device)).sum(-1)  # [B, L]
        sizes = torch.where(attended[..., None], probs, 0.0).sum(-2)  # [B, T], expected set sizes
        cuts = (sizes.cumsum(-1) + 0.5).floor()  # positions planned up to and including each step
        rank = reveal_rank(-expected, attended)
        return (cuts[..., None, :-1] <= rank[..., None]).sum(-1)  # [B, L]

    def select(self, state: UnmaskingState) -> Tensor:
        """Return the next set of the plan: bool [B, L]."""
        if "plan" not in state.memory:
            state.memory["plan"] = self._make(state)
        plan = state.memory["plan"]
        upcoming = plan.masked_fill(~state.masked, torch.iinfo(plan.dtype).max)
        return state.masked & (plan == upcoming.amin(-1, keepdim=True))

    def score(self, state: UnmaskingState) -> Tensor:
        """Return minus the planned step."""
        if "plan" not in state.memory:
            state.memory["plan"] = self._make(state)
        return -state.memory["plan"].double()


# ---- by name

POLICIES: dict[str, type[Heuristic]] = {
    kind.name: kind
    for kind in (
        Random,
        TopProb,
        Margin,
        Entropy,
        LeftToRight,
        Threshold,
        Factor,
        EntropyBound,
        Klass,
        OracleMargin,
        GreedyOracle,
        Block,
        EosAware,
    )
}


def make_policy(name: str, **options: Any) -> Heuristic:
    """Build a heuristic policy by name.

    Args:
        name: a key of `POLICIES`.
        **options: arguments of its class. `sizes` also takes "uniform", "cosine" or a number of positions a step;
            `policy`, of a wrapper, also takes a name.

    Raises:
        UserError: for an unknown name or option, a missing option, or a value that the class refuses.
    """
    if name not in POLICIES:
        raise UserError("policy", f"unknown policy {name!r}", f"use one of {', '.join(POLICIES)}")
    kind = POLICIES[name]
    signature = inspect.signature(kind)
    for option in options:
        if option not in signature.parameters:
            known = ", ".join(signature.parameters)
            raise UserError("policy", f"{name} has no option {option!r}", f"its options are {known}")
    missing = [key for key, p in signature.parameters.items() if p.default is p.empty and key not in options]
    if missing:
        raise UserError("policy", f"{name} lacks {', '.join(missing)}", "give it")
    if "sizes" in options:
        options["sizes"] = make_sizes(options["sizes"])
    if isinstance(options.get("policy"), str):
        options["policy"] = make_policy(options["policy"])
    return kind(**options)


def describe_policy(policy: object) -> dict[str, str | int | float]:
    """Name and parameters of a policy as flat labels for records: `policy`, `sizes`, `tau`, `block_size`, ..."""
    labels: dict[str, str | int | float] = {"policy": getattr(policy, "name", type(policy).__name__)}
    if not dataclasses.is_dataclass(policy):
        return labels
    for item in dataclasses.fields(policy):
        value = getattr(policy, item.name)
        if isinstance(value, SetSizes):
            labels["sizes"] = value.name
            labels.update({f"sizes_{k}": v for k, v in vars(value).items() if v is not None})
        elif item.name == "policy":
            inner = describe_policy(value)
            labels["policy"] = f"{labels['policy']}({inner.pop('policy')})"
            labels.update(inner)
        elif isinstance(value, (str, int, float)):
            labels["block_size" if isinstance(policy, Block) else item.name] = value
        elif isinstance(value, Sequence):
            labels[item.name] = " ".join(map(str, value))
    return labels
