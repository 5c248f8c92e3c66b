"""Every rule worked by hand: sign, ties, masked positions, rows of different lengths; and its smooth twin."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence
from written_denoisers import Confident, Table, chosen, chosen_and_kept, masks, state_of

from orderppl import State, UserError, decode, follow
from orderppl.distributions import DecidedSet, RankedSet
from orderppl.distributions.ranked_set import UniformSet
from orderppl.models import LearnedPolicy
from orderppl.policies import (
    CorrectOracle,
    EntropyBound,
    Factor,
    Klass,
    LogitPolicy,
    Oracle,
    PositionWeighted,
    RandomSteps,
    Ranked,
    Threshold,
)
from orderppl.policies.policy import LOGIT_LIMIT
from orderppl.policies.schedules import CosineSizes, FractionalSizes, UniformSizes
from orderppl.policies.scores import log_odds, reveal_rank


class Constant(nn.Module):
    """A policy network with the same logit everywhere."""

    def __init__(self, logit: float) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(logit))

    def forward(self, state: State) -> Tensor:
        return self.logit.expand(state.shape)


def test_reveal_rank_ties_go_left_and_what_is_not_masked_goes_last():
    score = torch.tensor([[1.0, 3.0, 3.0, 2.0, 9.0]])
    masked = torch.tensor([[1, 1, 1, 1, 0]]).bool()
    assert reveal_rank(score, masked).tolist() == [[3, 0, 1, 2, 4]]
    assert reveal_rank(torch.full((1, 3), -torch.inf), torch.tensor([[False, True, True]])).tolist() == [[2, 0, 1]]


# ---- ranked


class Sure:
    """Logits of two classes so far apart that c is 1 in float32."""

    vocab_size, mask_index = 2, 2

    def __call__(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.tensor([[30.0, 0.0], [0.0, 60.0], [40.0, 0.0]]).expand(*state.shape, -1)


def test_log_odds_rank_where_confidences_are_equal():
    """log c - log(1 - c) is the difference of the two logits: 30, 60, 40; in float64 c ranks the same way."""
    state = state_of(Sure(), [[1, 1, 1]])
    assert log_odds(state).tolist() == [[30.0, 60.0, 40.0]]
    assert chosen(Ranked("top_prob", 1), state) == [[0]]  # a tie
    assert chosen(Ranked("log_odds", 1), state) == [[1]]
    exact = Sure()(state.tokens, state.attention_mask).double().softmax(-1).amin(-1)  # 1 - c
    assert (-exact).argsort(descending=True).tolist() == log_odds(state).argsort(descending=True).tolist()
    one = state_of(Table([[0.2, 0.8], [0.6, 0.4]]), [[1, 1]])
    torch.testing.assert_close(log_odds(one)[0], torch.tensor([math.log(4), math.log(1.5)]).double())


def test_top_prob_margin_and_entropy_disagree_where_they_should():
    # c: .5, .4, .6, .55; p1 - p2: 0, .1, .2, .35; H: .693, 1.28, .673, 1.17
    probs = [
        [0.5, 0.5, 0.0, 0.0],
        [0.4, 0.3, 0.2, 0.1],
        [0.6, 0.4, 0.0, 0.0],
        [0.55, 0.2, 0.15, 0.1],
    ]
    state = state_of(Table(probs), [[1, 1, 1, 1]])
    scores = {name: Ranked(name).scores(state)[0] for name in ("top_prob", "margin", "entropy")}
    assert scores["top_prob"].tolist() == pytest.approx([0.5, 0.4, 0.6, 0.55])
    assert scores["margin"].tolist() == pytest.approx([0.0, 0.1, 0.2, 0.35])
    entropies = [-sum(p * math.log(p) for p in row if p) for row in probs]
    assert scores["entropy"].tolist() == pytest.approx([-h for h in entropies])
    assert chosen(Ranked("top_prob"), state) == [[2]]
    assert chosen(Ranked("margin"), state) == [[3]]
    assert chosen(Ranked("entropy"), state) == [[2]]
    two = {name: chosen(Ranked(name, 2.0), state) for name in scores}
    assert two == {"top_prob": [[2, 3]], "margin": [[2, 3]], "entropy": [[0, 2]]}


def test_exact_ties_go_to_the_left():
    same = Table([[0.7, 0.3]] * 5)
    for name in ("top_prob", "margin", "entropy", "left_to_right"):
        assert chosen(Ranked(name, 2.0), state_of(same, [[0, 1, 1, 1, 1]], step=1)) == [[1, 2, 3]]
        assert chosen(Ranked(name, 2.0), state_of(same, [[1, 1, 1, 1, 1]])) == [[0, 1]]


def test_a_small_temperature_breaks_ties_and_never_beats_a_score():
    noise = [[0.1, 0.9, 0.2, 0.8]]
    policy = Ranked("top_prob", 2.0, temperature=1e-6)
    same = Table([[0.7, 0.3]] * 4)
    assert chosen(policy, state_of(same, [[1, 1, 1, 1]], noise=noise)) == [[1, 3]]
    clear = Table([[0.9, 0.1], [0.7, 0.3], [0.7, 0.3], [0.7, 0.3]])
    assert chosen(policy, state_of(clear, [[1, 1, 1, 1]], noise=noise)) == [[0, 1]]


def test_each_row_has_its_own_quota():
    ramp = Table([[c, 1 - c] for c in (0.6, 0.9, 0.7, 0.8, 0.95, 0.99, 0.5, 0.55)])
    latent = [[1] * 8, [1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]]
    # T = 4: 8 positions -> 2 a step, 3 -> 1, 5 -> 1, 1, 1, 2
    assert chosen(Ranked("top_prob"), state_of(ramp, latent, latent)) == [[4, 5], [1], [4]]
    assert chosen(Ranked("left_to_right"), state_of(ramp, latent, latent)) == [[0, 1], [0], [0]]
    # a padded, confident position is never chosen, and visible ones are skipped
    masked = [[0, 1, 1, 1, 0, 0, 1, 1], [1, 0, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]]
    assert chosen(Ranked("top_prob"), state_of(ramp, masked, latent, step=1)) == [[1], [2], [1]]
    # row 0 is behind: 1 of 8 is revealed where 4 are due after this step
    behind = [[1, 1, 1, 1, 1, 1, 1, 0]]
    assert chosen(Ranked("top_prob"), state_of(ramp, behind, step=1)) == [[1, 4, 5]]


def test_random_is_uniform_over_masked_positions():
    # n = 20,000 rows, 2 of 4 masked positions each: inclusion probability 1/2, pair probability 1/6; |z| < 4.
    same = Table([[0.7, 0.3]] * 5)
    n = 20_000
    out = decode(same, Ranked("random", 2.0), masks(same, *[4] * n), max_steps=2)
    first = out.reveal_step == 0
    assert (first.sum(-1) == 2).all()
    inclusion = first.double().mean(0)
    assert ((inclusion - 0.5).abs() / math.sqrt(0.25 / n) < 4).all()
    pair = (first[:, 0] & first[:, 1]).double().mean()
    assert abs(pair - 1 / 6) / math.sqrt(5 / 36 / n) < 4
    noise = [[0.1, 0.9, 0.5, 0.7, 0.3]]
    assert chosen(Ranked("random", 2.0), state_of(same, [[1, 1, 1, 1, 1]], noise=noise)) == [[1, 3]]
    assert len(chosen(Ranked("random", 2.0), state_of(same, [[1, 1, 1, 1, 1]]))[0]) == 2


def test_random_sizes_are_uniform_over_orders():
    """p(r) = prod_t k_t! / n! for each row's own n, and no other order is possible."""
    same = Table([[0.7, 0.3]] * 3)
    batch = masks(same, 3, 3, 3, 2)
    q = Ranked("random", 2.0).order(batch, same, 4)
    possible = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 0, -1]])
    by_hand = torch.tensor([2 / 6, 2 / 6, 2 / 6, 2 / 2]).log()
    assert torch.allclose(q.log_prob(possible), by_hand, atol=1e-6)
    for impossible in ([0, 1, 2], [0, 0, 0], [1, 1, 0]):
        assert (q.log_prob(torch.tensor([impossible] * 4))[:3] == -torch.inf).all()
    one_each = (
        Ranked("random").order(batch, same, 4).log_prob(torch.tensor([[2, 0, 1], [0, 1, 2], [1, 0, 2], [1, 0, -1]]))
    )
    assert torch.allclose(one_each, -torch.tensor([6.0, 6.0, 6.0, 2.0]).log(), atol=1e-6)


def test_what_ranks_at_which_temperature():
    state = state_of(Confident([0.6, 0.9, 0.7]), [[1, 1, 1]])
    assert isinstance(Ranked("top_prob")(state), DecidedSet)
    assert isinstance(Ranked("random")(state), UniformSet)
    soft = Ranked("top_prob", temperature=0.5)(state)
    assert isinstance(soft, RankedSet)
    scores = torch.tensor([0.6, 0.9, 0.7]).double() / 0.5
    assert torch.allclose(soft.log_singles[0], scores.log_softmax(-1))
    assert soft.size.tolist() == [1]  # of three positions in four steps


def test_ranked_logits_are_the_distance_to_the_last_one_that_is_due():
    """Six masked positions in three steps: two a step, counted from the left among the masked ones."""
    policy = Ranked("left_to_right", temperature=0.5)
    same = Confident([0.5] * 8)
    masked = torch.tensor([[1, 1, 0, 1, 1, 1, 1, 0]]).bool()
    latent = [[1, 1, 0, 1, 1, 1, 1, 0]]
    wanted = torch.tensor([1.5, 0.5, 0, -0.5, -1.5, -2.5, -3.5, 0]) / 0.5
    found = policy.logits(state_of(same, masked, latent, num_steps=3))[0]
    assert torch.allclose(found[masked[0]].float(), wanted[masked[0]])
    base = LearnedPolicy(Constant(0.0), policy)
    shown = []
    for t in range(3):
        picked = chosen(base, state_of(same, masked, latent, step=t, num_steps=3))
        shown += picked
        masked[0, picked[0]] = False
    assert shown == [[0, 1], [3, 4], [5, 6]]


@pytest.mark.parametrize(("masked", "left", "size"), [(7, 3, 2), (6, 3, 2), (2, 4, 1), (5, 1, 5)])
def test_left_to_right_takes_an_equal_share(masked: int, left: int, size: int):
    """Of what was there at the first step; one at least, and everything at the last."""
    same = Confident([0.5] * masked)
    state = state_of(same, [[True] * masked], num_steps=left)
    assert chosen(Ranked("left_to_right"), state) == [list(range(size))]


def test_a_policy_ranks():
    """Ranked by log-odds of another policy: the best that are due, with P = softmax for one of them."""
    base = Threshold(0.5, temperature=2.0)
    denoiser = Confident([0.6, 0.9, 0.7])
    state = state_of(denoiser, [[1, 1, 1], [1, 0, 1]], num_steps=3)
    assert chosen(Ranked(base), state) == [[1], [2]]
    soft = Ranked(base, temperature=1.0)(state)
    logits = base.logits(state)[0]
    for place in range(3):
        single = torch.nn.functional.one_hot(torch.tensor([place] * 2), 3).bool()
        torch.testing.assert_close(soft.log_prob(single)[0], logits.softmax(-1)[place].log())
    with pytest.raises(UserError, match="hard rule, which has no log-odds"):
        chosen(Ranked(Threshold(0.5)), state)


# ---- adaptive


def test_threshold():
    ramp = Confident([0.95, 0.8, 0.9, 0.6])
    assert chosen(Threshold(0.85), state_of(ramp, [[1, 1, 1, 1], [0, 1, 0, 1]])) == [[0, 2], [1]]
    assert chosen(Threshold(0.5), state_of(ramp, [[1, 1, 1, 1]])) == [[0, 1, 2, 3]]
    assert chosen(Threshold(0.5), state_of(Confident([0.9, 0.5]), [[1, 1]])) == [[0, 1]]  # c = tau
    assert chosen(Threshold(1.0), state_of(Confident([0.7, 0.7]), [[1, 1]])) == [[0]]


def test_soft_threshold():
    """At tau a position is as likely revealed as not; the log-odds grow with those of the confidence."""
    state = state_of(Confident([0.8, 0.9, 0.6, 0.99]), [[1, 1, 1, 0]])
    policy = Threshold(0.8, temperature=2.0)
    by_hand = torch.tensor([[0.0, math.log(9 / 4) / 2, math.log(1.5 / 4) / 2]]).double()
    assert torch.allclose(policy.logits(state)[:, :3], by_hand, atol=1e-4)
    assert chosen(policy, state_of(Confident([0.801, 0.799, 0.95]), [[1] * 3])) == [[0, 2]]
    assert chosen(policy, state_of(Confident([0.6, 0.75, 0.7]), [[1] * 3])) == [[1]]  # none is: the most confident
    assert chosen(policy, state_of(Confident([0.6, 0.75, 0.7]), [[0] * 3])) == [[]]


def test_log_odds_stay_finite_at_certainty():
    state = state_of(Confident([1.0 - 1e-7, 0.5]), [[1, 1]])
    sharp = Threshold(0.9, temperature=0.01)
    assert sharp.logits(state).tolist() == [[LOGIT_LIMIT, -LOGIT_LIMIT]]
    assert torch.isfinite(kl_divergence(Threshold(0.5, temperature=1.0)(state), sharp(state))).all()


def test_factor():
    # c sorted: .98, .9, .8, .6; (k + 1)(1 - c_k): .04, .3, .8, 2.0
    state = state_of(Confident([0.8, 0.98, 0.6, 0.9]), [[1, 1, 1, 1]])
    for factor, expected in ((0.03, [1]), (0.29, [1]), (0.31, [1, 3]), (0.81, [0, 1, 3]), (2.1, [0, 1, 2, 3])):
        assert chosen(Factor(factor), state) == [expected]
    # the largest k, not the first that fails: (k + 1)(1 - c_k) for .7, .7 visible .99: .6, .9
    assert chosen(Factor(1.0), state_of(Confident([0.7, 0.99, 0.7]), [[1, 0, 1]])) == [[0, 2]]


def entropy(c: float) -> float:
    return -c * math.log(c) - (1 - c) * math.log(1 - c)


def test_entropy_bound():
    ramp = Confident([0.8, 0.98, 0.6, 0.9])  # entropies ascending: 1, 3, 0, 2; sum - max: 0, h1, h1 + h3, ...
    state = state_of(ramp, [[1, 1, 1, 1]])
    one, three, zero = entropy(0.98), entropy(0.9), entropy(0.8)
    eps = 1e-9
    for gamma, expected in (
        (0.0, [1]),
        (one - eps, [1]),
        (one + eps, [1, 3]),
        (one + three - eps, [1, 3]),
        (one + three + eps, [0, 1, 3]),
        (one + three + zero + eps, [0, 1, 2, 3]),
    ):
        assert chosen(EntropyBound(gamma), state) == [expected]
    assert chosen(EntropyBound(0.0), state_of(ramp, [[1, 0, 1, 0]])) == [[0]]


def test_soft_entropy_bound():
    """The entropies before a position by hand; towards temperature 0 its mode is the hard rule."""
    confidences = [0.9, 0.6, 0.9, 0.99]
    state = state_of(Confident(confidences), [[1, 1, 1, 0]])
    before = [0.0, 2 * entropy(0.9), entropy(0.9)]  # the last is not masked; of the two equal ones the left is first
    by_hand = torch.tensor([[(0.4 - nats) / 0.5 for nats in before]]).double()
    torch.testing.assert_close(EntropyBound(0.4, 0.5).logits(state)[:, :3], by_hand, atol=1e-4, rtol=0)
    generator = torch.Generator().manual_seed(0)
    for bound in (0.0, 0.3, 1.0, 3.0):  # 50 states of 8 positions at each
        masked = torch.rand(50, 8, generator=generator) < 0.7
        state = state_of(Confident(torch.rand(8, generator=generator).tolist()), masked)
        assert chosen(EntropyBound(bound, 1e-6), state) == chosen(EntropyBound(bound), state)


def test_towards_temperature_0_the_threshold_is_the_hard_rule():
    """In all states with a position above it; below it, all log-odds end at their limit."""
    generator = torch.Generator().manual_seed(1)
    for tau in (0.3, 0.6, 0.9):
        masked = torch.rand(50, 8, generator=generator) < 0.7
        confidences = 0.5 + 0.5 * torch.rand(8, generator=generator)
        masked &= (masked & (confidences > tau)).any(-1, keepdim=True)
        assert masked.any()
        state = state_of(Confident(confidences.tolist()), masked)
        assert chosen(Threshold(tau, 1e-6), state) == chosen(Threshold(tau), state)


def test_klass_waits_for_stable_predictions():
    policy = Klass(0.7, eps=0.02, stable_steps=1)
    denoiser = Table([[0.8, 0.2], [0.9, 0.1], [0.8, 0.2], [0.75, 0.25]])
    first, kept = chosen_and_kept(policy, state_of(denoiser, [[1, 1, 1, 1]]))
    assert first == [[1]]  # nothing to compare with: the arg-max only
    moved = Table([[0.8, 0.2], [0.9, 0.1], [0.95, 0.05], [0.76, 0.24]])
    # KL: 0, -, .95 ln(.95/.8) + .05 ln(.05/.2) = .094, .76 ln(.76/.75) + .24 ln(.24/.25) = .0003
    second, kept = chosen_and_kept(policy, state_of(moved, [[1, 0, 1, 1]], step=1, carry=kept))
    assert second == [[0, 2, 3]]  # 2 is the arg-max, not stable
    again = Table([[0.8, 0.2], [0.9, 0.1], [0.65, 0.35], [0.72, 0.28]])
    third, _ = chosen_and_kept(policy, state_of(again, [[0, 0, 1, 1]], step=2, carry=kept))
    assert third == [[3]]


# Rows of 5, 4 and 3 positions. Confidences .99 .9 .9 .6 .98: the first is visible in rows 0 and 2, the last is padding
# in rows 1 and 2, the second and third tie. Sorted among the masked: .98 .9 .9 .6 / .99 .9 .9 .6 / .9 .9.
CONFIDENCES = [0.99, 0.9, 0.9, 0.6, 0.98]
LATENT = [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]
MASKED = [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0], [0, 1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Threshold(0.85), [[1, 2, 4], [0, 1, 2], [1, 2]]),
        (Threshold(0.95), [[4], [0], [1]]),  # the arg-max of row 2 is the leftmost of two
        # (k + 1)(1 - c_k): .04 .3 .4 2 / .02 .3 .4 2 / .2 .3
        (Factor(0.25), [[4], [0], [1]]),
        (Factor(0.35), [[1, 4], [0, 1], [1, 2]]),
        (Factor(0.45), [[1, 2, 4], [0, 1, 2], [1, 2]]),
        # H: .098 .325 .325 .673 / .056 .325 .325 .673 / .325 .325
        # sum - max: 0 .098 .423 .748 / 0 .056 .381 .706 / 0 .325
        (EntropyBound(0.05), [[4], [0], [1]]),
        (EntropyBound(0.1), [[1, 4], [0, 1], [1]]),
        (EntropyBound(0.4), [[1, 4], [0, 1, 2], [1, 2]]),
        # due at the first of T = 2 steps, of 5, 4 and 3 positions: 2, 2, 1, of which row 0 and row 2 have 1
        (Ranked("top_prob"), [[4], [0, 1], [1]]),
        (Ranked("margin"), [[4], [0, 1], [1]]),
        (Ranked("entropy"), [[4], [0, 1], [1]]),
        (Ranked("left_to_right"), [[1], [0, 1], [1]]),
        (Ranked("random"), [[3], [2, 3], [2]]),  # by the noise .1 .2 .3 .4 .35
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, list) else str(value),
)
@pytest.mark.parametrize("padding", ["right", "left", "inside"])
def test_every_rule_row_by_row(policy, expected, padding):
    """The same sets with two columns of padding on the left or inside: positions are those of the row."""
    columns = {"right": [0, 1, 2, 3, 4], "left": [2, 3, 4, 5, 6], "inside": [0, 1, 3, 4, 6]}[padding]

    def spread(rows: list[list[float]], fill: float) -> Tensor:
        wide = torch.full((len(rows), 7), fill, dtype=torch.float64)
        wide[:, columns] = torch.tensor(rows, dtype=torch.float64)
        return wide

    denoiser = Confident(spread([CONFIDENCES], 0.999)[0].tolist())
    noise = spread([[0.1, 0.2, 0.3, 0.4, 0.35]] * 3, 0.9999)
    state = state_of(denoiser, spread(MASKED, 0), spread(LATENT, 0), num_steps=2, noise=noise)
    assert chosen(policy, state) == [[columns[place] for place in row] for row in expected]


def test_klass_row_by_row():
    """At first only the arg-max; then, with predictions that have not moved, everything above tau."""
    for tau, expected in ((0.85, [[1, 2, 4], [0, 1, 2], [1, 2]]), (0.95, [[4], [0], [1]])):
        policy, state = Klass(tau, eps=0.01), state_of(Confident(CONFIDENCES), MASKED, LATENT)
        first, kept = chosen_and_kept(policy, state)
        assert first == [[4], [0], [1]]
        assert chosen(policy, state.replace(carry=kept)) == expected
    patient, kept, shown = Klass(0.85, eps=0.01, stable_steps=2), None, []
    for _ in range(3):
        selected, kept = chosen_and_kept(patient, state.replace(carry=kept))
        shown.append(selected[0])
    assert shown == [[4], [4], [1, 2, 4]]


def test_oracles_use_the_truth_of_the_row():
    probs = [[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.2, 0.2, 0.6]]
    truth = torch.tensor([[0, 1, 2], [1, 0, 0]])
    state = state_of(Table(probs), [[1, 1, 1], [1, 1, 1]], truth=truth)
    margin = Oracle("margin").scores(state)
    torch.testing.assert_close(margin, torch.tensor([[0.2, -0.3, 0.4], [-0.2, 0.3, -0.4]]).double())
    greedy = Oracle("greedy").scores(state)
    torch.testing.assert_close(greedy, torch.tensor([[0.5, 0.3, 0.6], [0.3, 0.6, 0.2]]).double().log())
    assert chosen(Oracle("margin"), state) == [[2], [1]]
    for kind in ("greedy", "margin"):
        path = follow(Oracle(kind), Table(probs), truth, 3)
        assert path.reveal_step.tolist() == [[1, 2, 0], [1, 0, 2]]
    with pytest.raises(UserError, match="needs the true tokens"):
        decode(Table(probs), Oracle("margin"), masks(Table(probs), 3), max_steps=3)


def test_what_is_right_already_or_comes_closest():
    """The most likely tokens are 0, 0 and 2; the second row has none of them, its 1 at the second place is closest."""
    probs = [[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.2, 0.2, 0.6]]
    truth = torch.tensor([[0, 1, 2], [2, 1, 0]])
    assert chosen(CorrectOracle(), state_of(Table(probs), [[1, 1, 1], [1, 1, 1]], truth=truth)) == [[0, 2], [1]]
    assert chosen(CorrectOracle(), state_of(Table(probs), [[0, 1, 1], [1, 0, 1]], truth=truth)) == [[2], [0]]
    assert follow(CorrectOracle(), Table(probs), truth, 3).reveal_step.tolist() == [[0, 1, 0], [1, 0, 2]]
    with pytest.raises(UserError, match="needs the true tokens"):
        decode(Table(probs), CorrectOracle(), masks(Table(probs), 3), max_steps=3)


# ---- schedules of independent steps


def test_random_steps_have_the_hazard_of_their_schedule():
    """Uniform: 1 / (T - t). Cosine: a fraction cos(pi t / 2T) of the positions is still masked before step t."""
    denoiser = Table([[0.7, 0.3]] * 3)
    masked = [math.cos(math.pi * t / 8) for t in range(5)]
    for t in range(4):
        state = state_of(denoiser, [[1, 0, 1]], step=t)
        assert torch.allclose(RandomSteps()(state).probs, torch.tensor([[1.0, 0.0, 1.0]]) / (4 - t))
        wanted = torch.tensor([[1.0, 0.0, 1.0]]) * (1 - masked[t + 1] / masked[t])
        assert torch.allclose(RandomSteps("cosine")(state).probs, wanted, atol=1e-5)
    q = RandomSteps("cosine").order(masks(denoiser, 3), denoiser, 4)
    by_hand = torch.tensor([masked[t] - masked[t + 1] for t in range(4)])
    assert torch.allclose(q.probs[0], by_hand.expand(3, 4), atol=1e-6)
    assert (by_hand.diff() > 0).all()  # few early, many late
    assert torch.allclose(RandomSteps().order(masks(denoiser, 3), denoiser, 4).probs, torch.full((3, 4), 0.25))


# ---- settings


def test_every_rule_says_whether_it_always_reveals_something():
    for policy in (Ranked(), Threshold(), Threshold(0.5, 1.0), EntropyBound(), Factor(), Klass(), Oracle()):
        assert policy.non_empty
    assert not RandomSteps().non_empty
    assert all(isinstance(policy, LogitPolicy) for policy in (Ranked(), Threshold(), EntropyBound()))
    assert Ranked("random", 1.5).sizes == FractionalSizes(1.5)
    assert Ranked("entropy", "cosine").sizes == CosineSizes()
    assert Ranked("top_prob", UniformSizes(3)).sizes == UniformSizes(3)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Ranked("best"), "score: unknown score 'best'"),
        (lambda: Ranked("random", "linear"), "sizes: unknown schedule"),
        (lambda: Ranked("random", 0.5), "mean: "),
        (lambda: Ranked("margin", temperature=-1.0), "temperature: "),
        (lambda: Ranked("margin", temperature=math.nan), "temperature: "),
        (lambda: Threshold(1.5), "tau: "),
        (lambda: Threshold(math.nan), "tau: "),
        (lambda: Threshold(0.0, temperature=1.0), "tau: "),
        (lambda: Threshold(1.0, temperature=1.0), "tau: "),
        (lambda: Threshold(0.5, temperature=-1.0), "temperature: "),
        (lambda: Factor(0.0), "factor: "),
        (lambda: Factor(math.nan), "factor: "),
        (lambda: EntropyBound(-1.0), "gamma: "),
        (lambda: EntropyBound(temperature=-0.1), "temperature: "),
        (lambda: Klass(eps=0.0), "eps: "),
        (lambda: Klass(stable_steps=0), "stable_steps: "),
        (lambda: Klass(tau=-1.0), "tau: "),
        (lambda: Oracle("best"), "kind: unknown oracle 'best'"),
        (lambda: RandomSteps("linear"), "schedule: unknown schedule 'linear'"),
        (lambda: Threshold(0.5).logits(state_of(Confident([0.5]), [[1]])), "temperature: Threshold at temperature 0"),
        (lambda: EntropyBound(0.5).logits(state_of(Confident([0.5]), [[1]])), "temperature: EntropyBound at"),
        (lambda: Ranked().logits(state_of(Confident([0.5]), [[1]])), "temperature: Ranked at temperature 0"),
    ],
)
def test_bad_settings_are_refused(make, word: str):
    with pytest.raises(UserError, match=f"^{word}") as caught:
        make()
    assert "\n" not in str(caught.value)


def test_confidence_weighted_by_place_and_rarity():
    """c = 0.5, 0.6, 0.6 of tokens 0, 0 and 2, place 0, 1, 2; token 0 is common, token 2 rare."""
    probs = [[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.2, 0.2, 0.6]]
    state = state_of(Table(probs), [[1, 1, 1]])
    weighted = PositionWeighted(0.25).scores(state)
    expected = torch.tensor([[0.5, 0.6 * math.exp(-0.25), 0.6 * math.exp(-0.5)]]).double()
    torch.testing.assert_close(weighted, expected)
    assert chosen(PositionWeighted(0.25, sizes=1), state) == [[0]]
    assert chosen(PositionWeighted(0.0, sizes=1), state) == [[1]]
    rare = PositionWeighted(0.25, [0.9, 0.05, 0.05], sizes=1)
    nats = [-math.log(0.9), -math.log(0.9), -math.log(0.05)]
    torch.testing.assert_close(rare.scores(state), expected * torch.tensor([nats]).double())
    assert chosen(rare, state) == [[2]]
    with pytest.raises(UserError, match="decay: -1 is negative"):
        PositionWeighted(-1)
    with pytest.raises(UserError, match="frequencies: are no shares"):
        PositionWeighted(0.1, [0.5, 0.0])
