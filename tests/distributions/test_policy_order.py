"""Orders that a policy plays out: against the decoder that follows it, and against sums over all orders."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from orderppl import Batch, Policy, State, UserError, follow
from orderppl.data.answer_tokens import AnswerTokens
from orderppl.distributions import DecidedSet, SetDistribution
from orderppl.distributions.order_distribution import PolicyOrder
from orderppl.models import LearnedPolicy
from orderppl.policies import (
    Blocks,
    Eager,
    EarlyCommit,
    EntropyBound,
    EosAware,
    Factor,
    FixedOrder,
    Klass,
    Oracle,
    Plan,
    RandomSteps,
    Ranked,
    Smoothed,
    Threshold,
)
from orderppl.unmasking.trajectory import Path, Trajectory

from programs import CANVASES, PlaceTable, StateTable, TableDenoiser, copies, make_batch

STEPS = 3
HARD: dict[str, Callable[[], Policy]] = {
    "top_prob": lambda: Ranked("top_prob"),
    "left_to_right": lambda: Ranked("left_to_right", 2.0),
    "margin": lambda: Ranked("margin", "cosine"),
    "entropy": lambda: Ranked("entropy"),
    "by_policy": lambda: Ranked(LearnedPolicy(StateTable())),
    "threshold": lambda: Threshold(0.5),
    "entropy_bound": lambda: EntropyBound(0.7),
    "factor": lambda: Factor(1.0),
    "klass": lambda: Klass(0.3, eps=0.5),
    "blocks": lambda: Blocks(Ranked("top_prob"), 2),
    "eos_aware": lambda: EosAware(Klass(0.3, eps=0.5), [0]),
    "oracle": lambda: Oracle(),
    "oracle_blocks": lambda: Blocks(Oracle("margin"), 2),
    "commit": lambda: EarlyCommit(Ranked("margin"), AnswerTokens(marks=[0], ends=[1]), 0.5),
    "fixed": lambda: FixedOrder([0, 1, 2]),
    "fixed_blocks": lambda: Blocks(FixedOrder([0, 1, 0]), 2),
}
SOFT: dict[str, Callable[[], Policy]] = {
    "random": lambda: Ranked("random", 2.0),
    "random_one_each": lambda: Ranked("random"),
    "ranked": lambda: Ranked("top_prob", temperature=0.5),
    "threshold": lambda: Threshold(0.5, temperature=1.0),
    "entropy_bound": lambda: EntropyBound(0.5, temperature=0.7),
    "learned": lambda: LearnedPolicy(StateTable()),
    "commit": lambda: EarlyCommit(LearnedPolicy(StateTable()), network=StateTable()),
    "commit_to_answer": lambda: EarlyCommit(
        Threshold(0.5, temperature=2.0), AnswerTokens(marks=[0], ends=[1]), 0.5, temperature=1.0
    ),
    "blocks": lambda: Blocks(LearnedPolicy(StateTable()), 2),
    "random_blocks": lambda: Blocks(Ranked("random"), 2),
    "eos_aware": lambda: EosAware(LearnedPolicy(StateTable()), [0, 1]),
    "eos_blocks": lambda: EosAware(Blocks(LearnedPolicy(StateTable()), 2), [0, 1]),
    "smoothed": lambda: Smoothed(Klass(0.3, eps=0.5), 0.2),
    "eager": lambda: Eager(LearnedPolicy(StateTable()), 0.6),
    "eager_commit": lambda: Eager(EarlyCommit(LearnedPolicy(StateTable()), network=StateTable()), 1.5),
    "plan": lambda: Plan(PlaceTable(STEPS)),
}
DENOISER_SEED = 4


def make_path(canvas: str, num_steps: int = STEPS, frozen: bool = True) -> Path:
    return Path(make_batch(canvas), TableDenoiser().requires_grad_(not frozen), num_steps)


@pytest.mark.parametrize("canvas", CANVASES)
@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("name", HARD)
def test_point_mass_is_where_the_decoder_goes(name: str, num_steps: int, canvas: str):
    policy, path = HARD[name](), make_path(canvas, num_steps)
    q = policy.order(path.batch, path.denoiser, num_steps)
    walked = follow(policy, path.denoiser, path.batch, num_steps)
    order = q.sample()
    assert torch.equal(order, walked.reveal_step)
    assert (q.log_prob(order) == 0).all()
    values = q.enumerate_support()
    assert torch.equal(q.log_prob(values) == 0, (values == order).all(-1))


@pytest.mark.parametrize("canvas", CANVASES)
@pytest.mark.parametrize("non_empty", [False, True])
@pytest.mark.parametrize("name", HARD)
def test_smoothed_mass_is_one_on_every_order(name: str, non_empty: bool, canvas: str):
    path = make_path(canvas)
    q = PolicyOrder(Smoothed(HARD[name](), 0.2, non_empty), path)
    values = q.enumerate_support()
    log_probs = q.log_prob(values)
    torch.testing.assert_close(log_probs.logsumexp(0), torch.zeros(len(path.batch)), atol=1e-5, rtol=0)
    proper = ((values >= 0) == path.batch.latent).all(-1)
    assert (log_probs[~proper] == -torch.inf).all()
    if not non_empty:
        assert (log_probs[proper] > -torch.inf).all()


def frequencies(draws: Tensor, values: Tensor, probs: Tensor) -> float:
    """Largest |z| of the frequencies of orders, int64 [n, S], against probabilities float [N] of int64 [N, S]."""
    n, code = len(draws), (STEPS + 1) ** torch.arange(draws.shape[-1])
    size = (STEPS + 1) ** draws.shape[-1]
    seen = torch.bincount(((draws + 1) * code).sum(-1), minlength=size) / n
    expected = torch.zeros(size).index_add(0, ((values + 1) * code).sum(-1), probs)
    error = (expected * (1 - expected) / n).sqrt().clamp_min(1e-6)
    return ((seen - expected).abs() / error).max().item()


@pytest.mark.parametrize("name", SOFT)
def test_the_decoder_draws_from_the_distribution_that_is_scored(name: str):
    """5,000 copies of every row, with given positions and padding: every order's frequency within |z| < 5.

    Of policies that always reveal something, so that the decoder never has to.
    """
    n, policy, path = 5000, SOFT[name](), make_path("scattered")
    q = policy.order(path.batch, path.denoiser, STEPS)
    with torch.no_grad():
        values = q.enumerate_support()
        probs = q.log_prob(values).exp()
    walked = follow(policy, path.denoiser, copies(path.batch, n), STEPS, generator=torch.Generator().manual_seed(3))
    order = walked.reveal_step.unflatten(0, (n, -1))  # [n, B, S]
    if name == "plan":  # the decoder leaves out steps at which nothing is planned
        ranked = torch.full_like(values, -1)
        for t in range(STEPS):
            below = sum((values == s).any(-1, keepdim=True) for s in range(t)) if t else 0
            ranked = torch.where(values == t, torch.as_tensor(below).expand_as(values).long(), ranked)
        values = ranked
    else:
        assert not walked.fallback.any()
    for row in range(len(path.batch)):
        assert frequencies(order[:, row], values[:, row], probs[:, row]) < 5, row


@pytest.mark.parametrize("canvas", ["padded", "scattered", "prompted"])
@pytest.mark.parametrize("name", ["top_prob", "klass", "oracle_blocks", "commit"])
def test_samples_follow_log_prob(name: str, canvas: str):
    """n = 10,000 copies of each row: every order's frequency within |z| < 5 of its probability."""
    q = PolicyOrder(Smoothed(HARD[name](), 0.2), make_path(canvas))
    draws, values = q.sample((10_000,)), q.enumerate_support()
    probs = q.log_prob(values).exp()
    for row in range(draws.shape[1]):
        assert frequencies(draws[:, row], values[:, row], probs[:, row]) < 5


def test_particles_and_rows_draw_noise_of_their_own():
    """A random order per row and particle: all 6 orders of three positions, each about a sixth of 3,200."""
    path = make_path("plain")
    q = PolicyOrder(Ranked("random"), path).expand((800, len(path.batch)))
    full = q.sample().flatten(0, 1)
    _, counts = full.unique(dim=0, return_counts=True)
    assert len(counts) == 6
    assert ((counts - len(full) / 6).abs() / (len(full) / 6 * 5 / 6) ** 0.5 < 5).all()
    assert not torch.equal(q.sample(), q.sample())


class Counting(TableDenoiser):
    """Counts its calls and the rows it has scored."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        self.calls.append(len(state))
        return super().forward(state, attention_mask)


def test_a_frozen_denoiser_is_asked_once_per_step():
    """Drawing makes T - 1 calls; with the states that were met, the likelihood of the order needs one more."""
    for policy in (Ranked("top_prob"), Klass(0.3, eps=0.5)):
        denoiser = Counting().requires_grad_(False)
        path = Path(make_batch("scattered"), denoiser, STEPS)
        rows = len(path.batch)
        q = PolicyOrder(Smoothed(policy, 0.2), path)
        order = q.sample()
        assert denoiser.calls == [rows] * (STEPS - 1)
        Trajectory(path, order, q.met).token_log_prob()
        assert denoiser.calls == [rows] * STEPS
        Trajectory(path, order, q.met).token_log_prob()
        assert denoiser.calls == [rows] * STEPS


def test_scoring_does_not_cut_the_denoiser_off_its_gradient():
    """Decisions have no gradient; the states that they share with the likelihood keep theirs."""
    path = make_path("scattered", frozen=False)
    q = PolicyOrder(Smoothed(Klass(0.3, eps=0.5), 0.2), path)
    order = q.sample()
    assert Trajectory(path, order, q.met).token_log_prob().requires_grad
    q.log_prob(order)
    assert Trajectory(path, order).token_log_prob().requires_grad


class Waits(Policy):
    """Selects nothing."""

    def forward(self, state: State) -> SetDistribution:
        return DecidedSet(torch.zeros_like(state.masked), state.masked)


def test_a_policy_that_waits_reveals_everything_at_the_last_step():
    path = make_path("scattered")
    order = PolicyOrder(Waits(), path).sample()
    assert torch.equal(order, torch.where(path.batch.latent, STEPS - 1, -1))


class OddFirst(Policy):
    """A user's wrapper: shows another policy the odd positions only, while any of them is masked."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, state: State) -> SetDistribution:
        odd = state.masked & (torch.arange(state.shape[-1]) % 2 == 1)
        return self.policy(state.restricted(torch.where(odd.any(-1, keepdim=True), odd, state.masked)))


@pytest.mark.parametrize("canvas", CANVASES)
@pytest.mark.parametrize("inner", ["learned", "random", "commit"])
def test_the_last_step_completes_whatever_a_policy_was_shown(inner: str, canvas: str):
    """The orders of a policy that hides part of the state from another one are a distribution."""
    path = make_path(canvas)
    q = PolicyOrder(OddFirst(SOFT[inner]()), path)
    mass = q.log_prob(q.enumerate_support()).logsumexp(0)
    torch.testing.assert_close(mass, torch.zeros(len(path.batch)), atol=1e-5, rtol=0)
    order = q.sample().detach()
    assert torch.equal(order >= 0, path.batch.latent)
    assert (q.log_prob(order) > -torch.inf).all()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda plan: Blocks(plan, 2),
        lambda plan: EosAware(plan, [0]),
        lambda plan: EarlyCommit(plan, network=StateTable()),
        lambda plan: Smoothed(plan, 0.2),
    ],
)
def test_a_wrapped_plan_has_no_density(wrap: Callable[[Policy], Policy]):
    """It draws a whole order at its first step; fixed orders draw nothing."""
    path = make_path("scattered")
    with pytest.raises(UserError, match="^policy: draws on the way"):
        PolicyOrder(wrap(Plan(PlaceTable(STEPS))), path).sample()
    q = PolicyOrder(wrap(FixedOrder([0, 1, 2])), path)
    assert (q.log_prob(q.sample().detach()) > -torch.inf).all()


def test_random_steps_know_no_blocks():
    path = make_path("scattered")
    with pytest.raises(UserError, match="^policy: random steps know no blocks"):
        PolicyOrder(Blocks(RandomSteps(), 2), path).sample()


def test_a_prior_that_needs_the_truth_is_refused():
    path = make_path("scattered")
    for policy in (Oracle(), Blocks(Oracle("margin"), 2), Smoothed(Oracle(), 0.1)):
        PolicyOrder(policy, path).sample()
        with pytest.raises(UserError, match="needs the true tokens"):
            PolicyOrder(policy, path).as_prior().sample()


def test_an_order_without_the_batch_is_broadcast():
    batch = Batch(torch.tensor([[1, 2, 3], [3, 2, 1]]))
    q = PolicyOrder(LearnedPolicy(StateTable()), Path(batch, TableDenoiser(), STEPS))
    values = q.enumerate_support(expand=False)
    assert values.shape == (STEPS**3, 1, 3)
    assert q.log_prob(values).shape == (STEPS**3, 2)
