"""Orders of a followed policy: against the decoder that follows it, and against sums over all orders."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from orderppl.decoding import (
    Block,
    EosAware,
    Factor,
    GreedyOracle,
    Klass,
    LeftToRight,
    OracleMargin,
    PlannedOrder,
    Policy,
    Random,
    StochasticDecision,
    TopProb,
    follow,
)
from orderppl.decoding.memory import block_window
from orderppl.denoising import Canvas
from orderppl.distributions import HeuristicReveal, SmoothedSet
from orderppl.errors import UserError
from orderppl.models import LearnedPolicy
from orderppl.path import RevealPath
from orderppl.states import UnmaskingState

from programs import LENGTH, VOCAB, StateTable, TableDenoiser

STEPS = 3
MASKED = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 1, 0], [1, 1, 1], [1, 1, 1]]).bool()


class Waits:
    """Selects nothing before the last step, so that its best position is revealed; says nothing about itself."""

    def select(self, state: UnmaskingState) -> Tensor:
        return torch.zeros_like(state.masked)

    def score(self, state: UnmaskingState) -> Tensor:
        positions, _, _ = block_window(state)
        return -(torch.arange(state.masked.shape[-1]) - positions[:, None] / 2).abs()


POLICIES: dict[str, Policy] = {
    "top_prob": TopProb(),
    "left_to_right": LeftToRight(),
    "factor": Factor(1.0),
    "random": Random(),
    "random_ties": TopProb(ties="random"),
    "klass": Klass(0.3, eps=0.5),
    "block": Block(TopProb(), 2),
    "random_block": Block(Random(), 2),
    "eos_aware": EosAware(Klass(0.3, eps=0.5), (0,)),
    "greedy_oracle": GreedyOracle(),
    "oracle_block": Block(OracleMargin(), 2),
    "plan": PlannedOrder(torch.tensor([[1, 0, 2], [0, 2, 0], [0, 1, 0], [2, 2, 0], [0, 1, 1]])),
    "drawn_plan": PlannedOrder(
        lambda canvas: torch.linspace(0, 2, 9).reshape(3, 3).expand(len(canvas.attention_mask), 3, 3)
    ),
    "waits": Waits(),
    "learned": LearnedPolicy(StateTable()),
    "sampled": StochasticDecision(LearnedPolicy(StateTable(), non_empty=False), "sample"),
}
every_policy = pytest.mark.parametrize("name", POLICIES)


def make_path(num_steps: int = STEPS, one_step: bool = False, frozen: bool = True) -> RevealPath:
    denoiser = TableDenoiser().requires_grad_(not frozen)
    tokens = torch.randint(0, VOCAB, MASKED.shape) * MASKED  # at padding what `follow` puts there: a table reads it
    return RevealPath(Canvas(denoiser, MASKED), tokens, num_steps, one_step)


@pytest.mark.parametrize("num_steps", [1, 3])
@every_policy
def test_point_mass_is_where_the_decoder_goes(name: str, num_steps: int):
    path = make_path(num_steps)
    q = HeuristicReveal(path, POLICIES[name], seed=11)
    walked = follow(POLICIES[name], path.canvas, path.tokens, num_steps, generator=torch.Generator().manual_seed(11))
    order = q.sample()
    assert torch.equal(order, walked.reveal_step)
    assert (q.log_prob(order) == 0).all()
    assert (q.log_prob(order.clone()) == 0).all()  # also where it is walked anew
    values = q.enumerate_support()
    assert torch.equal(q.log_prob(values) == 0, (values == order).all(-1))


@pytest.mark.parametrize("non_empty", [False, True])
@every_policy
def test_smoothed_mass_is_one_on_every_order(name: str, non_empty: bool):
    q = HeuristicReveal(make_path(), POLICIES[name], 0.2, non_empty)
    values = q.enumerate_support()
    log_probs = q.log_prob(values)
    assert torch.allclose(log_probs.logsumexp(0), torch.zeros(len(MASKED)), atol=1e-5)
    proper = ((values >= 0) == MASKED).all(-1)
    if not non_empty:
        assert (log_probs[proper] > -torch.inf).all()


@pytest.mark.parametrize("name", ["top_prob", "klass", "random", "oracle_block"])
def test_samples_follow_log_prob(name: str):
    """n = 20,000 copies of each row with its noise: every order's frequency within |z| < 5 of its probability."""
    n = 20_000
    q = HeuristicReveal(make_path(), POLICIES[name], 0.2)
    draws, values = q.sample((n,)), q.enumerate_support()
    probs = q.log_prob(values).exp()
    code, size = (STEPS + 1) ** torch.arange(LENGTH), (STEPS + 1) ** LENGTH
    for row in range(len(MASKED)):
        seen = torch.bincount(((draws[:, row] + 1) * code).sum(-1), minlength=size) / n
        expected = torch.zeros(size).index_add(0, ((values[:, row] + 1) * code).sum(-1), probs[:, row])
        error = (expected * (1 - expected) / n).sqrt().clamp_min(1e-6)
        assert ((seen - expected).abs() / error).max() < 5


def test_particles_and_rows_draw_noise_of_their_own():
    """A random order per row and particle: all 6 orders of three positions, each about a sixth of 2,400."""
    q = HeuristicReveal(make_path(), Random()).expand((800, len(MASKED)))
    full = q.sample()[:, MASKED.all(-1)].flatten(0, 1)
    _, counts = full.unique(dim=0, return_counts=True)
    assert len(counts) == 6
    assert ((counts - 400).abs() / (2400 / 6 * 5 / 6) ** 0.5 < 5).all()
    again = HeuristicReveal(make_path(), Random()).expand((800, len(MASKED)))
    assert not torch.equal(again.sample(), q.sample())


@every_policy
def test_one_step_looks_at_the_same_sets(name: str):
    """The sets at one drawn step are those of the whole stack, with the memory of the steps before."""
    path = make_path()
    whole = HeuristicReveal(path, POLICIES[name], 0.2, seed=3)
    order = whole.sample()
    stack = whole.reveal_sets(order.clone())
    for t in range(STEPS):
        path.steps = torch.full((1, len(MASKED)), t)
        one = HeuristicReveal(path, POLICIES[name], 0.2, seed=3).reveal_sets(order.clone(), path.steps)
        assert torch.equal(one.probs[0], stack.probs[t])


def test_what_looks_back_is_not_asked_for_one_set():
    full = torch.ones_like(MASKED)
    assert HeuristicReveal(make_path(), TopProb()).set_at(MASKED, torch.zeros(5, dtype=torch.int64)).batch_shape == (5,)
    with pytest.raises(UserError, match="policy: looks back"):
        HeuristicReveal(make_path(), Klass()).set_at(full, torch.zeros(5, dtype=torch.int64))


def test_a_frozen_denoiser_is_asked_once_per_step():
    """Drawing makes T calls, scoring none, whether or not the policy looks back."""

    class Counting(TableDenoiser):
        calls = 0

        def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(state, attention_mask)

    for policy in (TopProb(), Klass(0.3, eps=0.5)):
        denoiser = Counting().requires_grad_(False)
        path = RevealPath(Canvas(denoiser, MASKED), torch.randint(0, VOCAB, MASKED.shape), STEPS)
        q = HeuristicReveal(path, policy, 0.2)
        order = q.sample()
        assert denoiser.calls == STEPS
        q.log_prob(order)
        HeuristicReveal(path, policy, 0.1).log_prob(order)
        assert path(order).logits is not None
        assert denoiser.calls == STEPS


def test_scoring_does_not_cut_the_denoiser_off_its_gradient():
    """Decisions have no gradient; the states that they share with the likelihood keep theirs."""
    path = make_path(frozen=False)
    q = HeuristicReveal(path, Klass(0.3, eps=0.5), 0.2)
    order = q.sample()
    q.reveal_sets(order.clone())
    value = order.clone()
    q.log_prob(value)
    assert path(value).logits.requires_grad


def test_smoothed_set_by_hand():
    decided = torch.tensor([[True, False, False], [True, True, False]])
    masked = torch.tensor([[True, True, False], [False, True, True]])
    law = SmoothedSet(decided, masked, 0.1)
    assert torch.allclose(law.probs, torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.9, 0.1]]))
    point = SmoothedSet(decided, masked, 0.0)
    assert torch.equal(point.sample(), decided & masked)
    assert torch.equal(point.log_prob(decided & masked), torch.zeros(2))
    assert (point.log_prob(masked) == -torch.inf).all()
    assert torch.equal(point.entropy(), torch.zeros(2))


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, float("nan")])
def test_smoothing_is_a_small_probability(smoothing: float):
    with pytest.raises(UserError, match="smoothing: .* is not in"):
        HeuristicReveal(make_path(), TopProb(), smoothing)
