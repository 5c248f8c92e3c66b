"""Every rule worked by hand: sign, ties, masked positions, rows of different lengths."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from orderppl.decoding import (
    POLICIES,
    AnswerReady,
    Block,
    CosineSizes,
    EosAware,
    FractionalSizes,
    GreedyOracle,
    OracleMargin,
    PlannedOrder,
    StochasticDecision,
    decode,
    describe_policy,
    make_policy,
)
from orderppl.decoding.scores import reveal_rank
from orderppl.denoising import Canvas
from orderppl.distributions import RevealSet
from orderppl.errors import UserError
from orderppl.states import UnmaskingState


def state_of(denoiser, masked, attention=None, step=0, num_steps=4, noise=None, memory=None):
    masked = torch.tensor(masked).bool()
    attention = torch.ones_like(masked) if attention is None else torch.tensor(attention).bool()
    rows = {"row": torch.arange(len(masked))}
    return UnmaskingState(
        torch.where(masked, denoiser.mask_index, 0),
        masked,
        torch.full((len(masked),), step),
        num_steps,
        Canvas(denoiser, attention),
        noise,
        rows | (memory or {}),
    )


def chosen(policy, state):
    """Positions a policy selects, row by row."""
    selected = policy.select(state)
    assert selected.dtype == torch.bool
    assert not (selected & ~state.masked).any()
    return [row.nonzero()[:, 0].tolist() for row in selected]


def test_reveal_rank_ties_go_left_and_groups_go_last():
    score = torch.tensor([[1.0, 3.0, 3.0, 2.0, 9.0]])
    masked = torch.tensor([[1, 1, 1, 1, 0]]).bool()
    assert reveal_rank(score, masked).tolist() == [[3, 0, 1, 2, 4]]
    last = torch.tensor([[0, 1, 0, 0, 0]]).bool()
    assert reveal_rank(score, masked, last).tolist() == [[2, 3, 0, 1, 4]]


def test_top_prob_margin_and_entropy_disagree_where_they_should(table):
    # c: .5, .4, .6, .55; p1 - p2: 0, .1, .2, .35; H: .693, 1.28, .673, 1.17
    probs = [
        [0.5, 0.5, 0.0, 0.0],
        [0.4, 0.3, 0.2, 0.1],
        [0.6, 0.4, 0.0, 0.0],
        [0.55, 0.2, 0.15, 0.1],
    ]
    state = state_of(table(probs), [[1, 1, 1, 1]])
    scores = {name: make_policy(name).score(state)[0] for name in ("top_prob", "margin", "entropy")}
    assert scores["top_prob"].tolist() == pytest.approx([0.5, 0.4, 0.6, 0.55])
    assert scores["margin"].tolist() == pytest.approx([0.0, 0.1, 0.2, 0.35])
    entropies = [-sum(p * math.log(p) for p in row if p) for row in probs]
    assert scores["entropy"].tolist() == pytest.approx([-h for h in entropies])
    assert chosen(make_policy("top_prob"), state) == [[2]]
    assert chosen(make_policy("margin"), state) == [[3]]
    assert chosen(make_policy("entropy"), state) == [[2]]
    two = {name: chosen(make_policy(name, sizes=2.0), state) for name in scores}
    assert two == {"top_prob": [[2, 3]], "margin": [[2, 3]], "entropy": [[0, 2]]}


def test_exact_ties_go_to_the_left(table):
    same = table([[0.7, 0.3]] * 5)
    for name in ("top_prob", "margin", "entropy", "left_to_right"):
        assert chosen(make_policy(name, sizes=2.0), state_of(same, [[0, 1, 1, 1, 1]], step=1)) == [[1, 2, 3]]
        assert chosen(make_policy(name, sizes=2.0), state_of(same, [[1, 1, 1, 1, 1]])) == [[0, 1]]


def test_random_ties_follow_the_noise_and_never_beat_a_score(table):
    noise = torch.tensor([[0.1, 0.9, 0.2, 0.8]], dtype=torch.float64)
    policy = make_policy("top_prob", sizes=2.0, ties="random")
    same = table([[0.7, 0.3]] * 4)
    assert chosen(policy, state_of(same, [[1, 1, 1, 1]], noise=noise)) == [[1, 3]]
    clear = table([[0.9, 0.1], [0.7, 0.3], [0.7, 0.3], [0.7, 0.3]])
    assert chosen(policy, state_of(clear, [[1, 1, 1, 1]], noise=noise)) == [[0, 1]]


def test_each_row_has_its_own_quota(table):
    ramp = table([[c, 1 - c] for c in (0.6, 0.9, 0.7, 0.8, 0.95, 0.99, 0.5, 0.55)])
    attention = [[1] * 8, [1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]]
    # T = 4: 8 positions -> 2 a step, 3 -> 1, 5 -> 1, 1, 1, 2
    assert chosen(make_policy("top_prob"), state_of(ramp, attention, attention)) == [[4, 5], [1], [4]]
    assert chosen(make_policy("left_to_right"), state_of(ramp, attention, attention)) == [[0, 1], [0], [0]]
    # a padded, confident position is never chosen, and visible ones are skipped
    masked = [[0, 1, 1, 1, 0, 0, 1, 1], [1, 0, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]]
    assert chosen(make_policy("top_prob"), state_of(ramp, masked, attention, step=1)) == [[1], [2], [1]]
    # row 0 is ahead: 3 of 8 are revealed where 4 are due after this step; catching up gives 1
    behind = [[1, 1, 1, 1, 1, 1, 1, 0]]
    assert chosen(make_policy("top_prob"), state_of(ramp, behind, step=1)) == [[1, 4, 5]]


def test_random_is_uniform_over_masked_positions(table):
    # n = 20,000 rows, 2 of 4 masked positions each: inclusion probability 1/2, pair probability 1/6; |z| < 4.
    same = table([[0.7, 0.3]] * 5)
    n = 20_000
    out = decode(same, make_policy("random", sizes=2.0), length=torch.full((n,), 4), max_steps=2)
    first = out.reveal_step == 0
    assert (first.sum(-1) == 2).all()
    inclusion = first.double().mean(0)
    assert ((inclusion - 0.5).abs() / math.sqrt(0.25 / n) < 4).all()
    pair = (first[:, 0] & first[:, 1]).double().mean()
    assert abs(pair - 1 / 6) / math.sqrt(5 / 36 / n) < 4
    noise = torch.tensor([[0.1, 0.9, 0.5, 0.7, 0.3]], dtype=torch.float64)
    assert chosen(make_policy("random", sizes=2.0), state_of(same, [[1, 1, 1, 1, 1]], noise=noise)) == [[1, 3]]
    assert len(chosen(make_policy("random", sizes=2.0), state_of(same, [[1, 1, 1, 1, 1]]))[0]) == 2


def test_threshold(confident):
    ramp = confident([0.95, 0.8, 0.9, 0.6])
    assert chosen(make_policy("threshold", tau=0.85), state_of(ramp, [[1, 1, 1, 1], [0, 1, 0, 1]])) == [[0, 2], [1]]
    assert chosen(make_policy("threshold", tau=0.5), state_of(ramp, [[1, 1, 1, 1]])) == [[0, 1, 2, 3]]
    assert chosen(make_policy("threshold", tau=0.5), state_of(confident([0.9, 0.5]), [[1, 1]])) == [[0, 1]]  # c = tau
    assert chosen(make_policy("threshold", tau=1.0), state_of(confident([0.7, 0.7]), [[1, 1]])) == [[0]]


def test_factor(confident):
    # c sorted: .98, .9, .8, .6; (k + 1)(1 - c_k): .04, .3, .8, 2.0
    ramp = confident([0.8, 0.98, 0.6, 0.9])
    state = state_of(ramp, [[1, 1, 1, 1]])
    for factor, expected in ((0.03, [1]), (0.29, [1]), (0.31, [1, 3]), (0.81, [0, 1, 3]), (2.1, [0, 1, 2, 3])):
        assert chosen(make_policy("factor", factor=factor), state) == [expected]
    # the largest k, not the first that fails: (k + 1)(1 - c_k) for .7, .7 visible .99: .6, .9
    assert chosen(make_policy("factor", factor=1.0), state_of(confident([0.7, 0.99, 0.7]), [[1, 0, 1]])) == [[0, 2]]


def test_entropy_bound(confident):
    def h(c):
        return -c * math.log(c) - (1 - c) * math.log(1 - c)

    ramp = confident([0.8, 0.98, 0.6, 0.9])  # entropies ascending: 1, 3, 0, 2; sum - max: 0, h1, h1 + h3, ...
    state = state_of(ramp, [[1, 1, 1, 1]])
    one, three, zero = h(0.98), h(0.9), h(0.8)
    eps = 1e-9
    for gamma, expected in (
        (0.0, [1]),
        (one - eps, [1]),
        (one + eps, [1, 3]),
        (one + three - eps, [1, 3]),
        (one + three + eps, [0, 1, 3]),
        (one + three + zero + eps, [0, 1, 2, 3]),
    ):
        assert chosen(make_policy("entropy_bound", gamma=gamma), state) == [expected]
    assert chosen(make_policy("entropy_bound", gamma=0.0), state_of(ramp, [[1, 0, 1, 0]])) == [[0]]


def test_klass_waits_for_stable_predictions(table):
    policy = make_policy("klass", tau=0.7, eps=0.02, stable_steps=1)
    denoiser = table([[0.8, 0.2], [0.9, 0.1], [0.8, 0.2], [0.75, 0.25]])
    first = state_of(denoiser, [[1, 1, 1, 1]])
    assert chosen(policy, first) == [[1]]  # nothing to compare with: the arg-max only
    moved = table([[0.8, 0.2], [0.9, 0.1], [0.95, 0.05], [0.76, 0.24]])
    # KL: 0, -, .95 ln(.95/.8) + .05 ln(.05/.2) = .094, .76 ln(.76/.75) + .24 ln(.24/.25) = .0003
    second = state_of(moved, [[1, 0, 1, 1]], step=1, memory=first.memory)
    assert chosen(policy, second) == [[0, 2, 3]]  # 2 is the arg-max, not stable
    again = table([[0.8, 0.2], [0.9, 0.1], [0.65, 0.35], [0.72, 0.28]])
    third = state_of(again, [[0, 0, 1, 1]], step=2, memory=second.memory)
    assert chosen(policy, third) == [[3]]


# Rows of 5, 4 and 3 positions. Confidences .99 .9 .9 .6 .98: the first is visible in rows 0 and 2, the last is padding
# in rows 1 and 2, the second and third tie. Sorted among the masked: .98 .9 .9 .6 / .99 .9 .9 .6 / .9 .9.
ROWS = {
    "confidences": [0.99, 0.9, 0.9, 0.6, 0.98],
    "attention": [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]],
    "masked": [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0], [0, 1, 1, 0, 0]],
}


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("threshold", {"tau": 0.85}, [[1, 2, 4], [0, 1, 2], [1, 2]]),
        ("threshold", {"tau": 0.95}, [[4], [0], [1]]),  # the arg-max of row 2 is the leftmost of two
        # (k + 1)(1 - c_k): .04 .3 .4 2 / .02 .3 .4 2 / .2 .3
        ("factor", {"factor": 0.25}, [[4], [0], [1]]),
        ("factor", {"factor": 0.35}, [[1, 4], [0, 1], [1, 2]]),
        ("factor", {"factor": 0.45}, [[1, 2, 4], [0, 1, 2], [1, 2]]),
        # H: .098 .325 .325 .673 / .056 .325 .325 .673 / .325 .325
        # sum - max: 0 .098 .423 .748 / 0 .056 .381 .706 / 0 .325
        ("entropy_bound", {"gamma": 0.05}, [[4], [0], [1]]),
        ("entropy_bound", {"gamma": 0.1}, [[1, 4], [0, 1], [1]]),
        ("entropy_bound", {"gamma": 0.4}, [[1, 4], [0, 1, 2], [1, 2]]),
        # due at the first of T = 2 steps, of 5, 4 and 3 positions: 2, 2, 1, of which row 0 and row 2 have 1
        ("top_prob", {}, [[4], [0, 1], [1]]),
        ("margin", {}, [[4], [0, 1], [1]]),
        ("entropy", {}, [[4], [0, 1], [1]]),
        ("left_to_right", {}, [[1], [0, 1], [1]]),
        ("random", {}, [[3], [2, 3], [2]]),  # by the noise .1 .2 .3 .4 .35
    ],
)
def test_every_rule_row_by_row(confident, name, options, expected):
    noise = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.35]] * 3, dtype=torch.float64)
    denoiser = confident(ROWS["confidences"])
    state = state_of(denoiser, ROWS["masked"], ROWS["attention"], num_steps=2, noise=noise)
    assert chosen(make_policy(name, **options), state) == expected


def test_klass_row_by_row(confident):
    """At first only the arg-max; then, with predictions that have not moved, everything above tau."""
    state = state_of(confident(ROWS["confidences"]), ROWS["masked"], ROWS["attention"])
    for tau, expected in ((0.85, [[1, 2, 4], [0, 1, 2], [1, 2]]), (0.95, [[4], [0], [1]])):
        state.memory = {"row": torch.arange(3)}
        policy = make_policy("klass", tau=tau, eps=0.01)
        assert chosen(policy, state) == [[4], [0], [1]]
        assert chosen(policy, state) == expected
    state.memory = {"row": torch.arange(3)}
    patient = make_policy("klass", tau=0.85, eps=0.01, stable_steps=2)
    assert [chosen(patient, state)[0] for _ in range(3)] == [[4], [4], [1, 2, 4]]


def test_oracles_use_the_truth_of_the_row(table):
    probs = [[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.2, 0.2, 0.6]]
    truth = torch.tensor([[0, 1, 2], [1, 0, 0]])
    state = state_of(table(probs), [[1, 1, 1], [1, 1, 1]], memory={"truth": truth})
    margin = make_policy("oracle_margin").score(state)
    torch.testing.assert_close(margin, torch.tensor([[0.2, -0.3, 0.4], [-0.2, 0.3, -0.4]]).double())
    torch.testing.assert_close(
        make_policy("greedy_oracle").score(state), torch.tensor([[0.5, 0.3, 0.6], [0.3, 0.6, 0.2]]).double().log()
    )
    assert chosen(make_policy("oracle_margin"), state) == [[2], [1]]
    # decoding: the constructor's rows follow the rows that are left
    for kind in (OracleMargin, GreedyOracle):
        shifted = torch.tensor([[0, 0, 0], [0, 1, 2], [1, 0, 0]])
        out = decode(table(probs), kind(tokens=shifted), length=torch.tensor([0, 3, 3]), max_steps=3)
        assert out.reveal_step[1:, :].tolist() == [[1, 2, 0], [1, 0, 2]]
    with pytest.raises(UserError, match="oracle_margin"):
        decode(table(probs), make_policy("oracle_margin"), length=3, max_steps=3)


# ---- wrappers


def test_block_keeps_to_the_leftmost_unfinished_block(confident):
    ramp = confident([0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.97])
    out = decode(ramp, Block(make_policy("top_prob"), 3), length=torch.tensor([7, 4]), max_steps=6)
    # row 0: blocks of 3, 3, 1 with steps up to 2, 4, 6; row 1: blocks of 3, 1 with steps up to 3, 6
    assert out.reveal_step.tolist() == [[1, 1, 0, 3, 3, 2, 4], [2, 1, 0, 3, -1, -1, -1]]
    assert out.nfe.tolist() == [5, 4]


def test_block_forces_its_last_step_and_passes_on_unused_ones(confident):
    slow = confident([0.6, 0.7, 0.8, 0.9])
    out = decode(slow, Block(make_policy("threshold", tau=0.99), 2), length=4, max_steps=2)
    assert out.reveal_step.tolist() == [[0, 0, 1, 1]]
    fast = confident([0.99, 0.99, 0.8, 0.9, 0.7, 0.6])
    out = decode(fast, Block(make_policy("threshold", tau=0.95), 2), length=4, max_steps=4)
    assert out.reveal_step.tolist() == [[0, 0, 2, 1]]


def test_block_shows_a_learned_policy_the_steps_left_in_the_block(confident):
    seen = []

    class Spy:
        def select(self, state):
            seen.append((state.steps_left.tolist(), state.masked.long().tolist()))
            return torch.zeros_like(state.masked)

    decode(confident([0.6, 0.7, 0.8, 0.9]), Block(Spy(), 2), length=4, max_steps=4)
    assert seen == [([2], [[1, 1, 0, 0]]), ([1], [[1, 0, 0, 0]]), ([2], [[0, 0, 1, 1]])]


def second_and_later(tokens):
    """The answer is what follows token 2, or everything."""
    found = (tokens == 2).long().cumsum(-1)
    return (found - (tokens == 2).long() > 0) | (found.amax(-1, keepdim=True) == 0)


def test_answer_ready_reveals_everything_once_the_answer_is_sure(table):
    mark = [0.0, 0.02, 0.98]
    probs = [[0.6, 0.4, 0.0], mark, [0.3, 0.7, 0.0], [0.75, 0.25, 0.0]]

    def sets(sure, masked):
        policy = make_policy("answer_ready", policy="left_to_right", answer=second_and_later, sure=sure)
        return chosen(policy, state_of(table(probs), masked))

    assert sets(0.7, [[1, 1, 1, 1]]) == [[0, 1, 2, 3]]  # 0.7 and 0.75 behind the mark
    assert sets(0.72, [[1, 1, 1, 1]]) == [[0]]
    assert sets(0.72, [[1, 1, 0, 1]]) == [[0, 1, 3]]  # one of the two has been written
    assert sets(1.0, [[1, 1, 0, 0]]) == [[0, 1]]  # nothing of the answer is left to write
    no_mark = [[0.6, 0.4, 0.0], [0.9, 0.1, 0.0]]
    policy = AnswerReady(make_policy("left_to_right"), second_and_later, 0.6)
    assert chosen(policy, state_of(table(no_mark), [[1, 1]])) == [[0, 1]]  # all of it is the answer
    assert chosen(dataclasses.replace(policy, sure=0.7), state_of(table(no_mark), [[1, 1]])) == [[0]]


def test_eos_aware_ranks_end_predictions_last(table):
    end = [0.0, 0.02, 0.98]
    probs = [[0.6, 0.4, 0.0], end, [0.3, 0.7, 0.0], end, [0.9, 0.1, 0.0]]
    plain = decode(table(probs), make_policy("top_prob", sizes=1.0), length=5, max_steps=9)
    aware = decode(table(probs), EosAware(make_policy("top_prob", sizes=1.0), [2]), length=5, max_steps=9)
    assert plain.reveal_step.tolist() == [[4, 0, 3, 1, 2]]
    assert aware.reveal_step.tolist() == [[2, 3, 1, 4, 0]]
    # the quota is kept: 3 positions are left of the other kind where 4 are due
    four = EosAware(make_policy("top_prob", sizes=4.0), [2])
    assert chosen(four, state_of(table(probs), [[1, 1, 1, 1, 1]])) == [[0, 1, 2, 4]]
    threshold = EosAware(make_policy("threshold", tau=0.8), [2])
    assert chosen(threshold, state_of(table(probs), [[1, 1, 1, 1, 1], [0, 1, 0, 1, 0]])) == [[4], [1, 3]]
    factor = EosAware(make_policy("factor", factor=1.0), [2])
    assert chosen(factor, state_of(table(probs), [[1, 1, 1, 0, 0]])) == [[2]]
    everything = EosAware(StochasticDecision(Fixed([0.9] * 5)), [2])
    assert chosen(everything, state_of(table(probs), [[1, 1, 1, 1, 1]])) == [[0, 2, 4]]


# ---- decisions of learned policies


class Fixed:
    """The same reveal probabilities at every state."""

    def __init__(self, probs):
        self.q = torch.tensor(probs, dtype=torch.float64)

    def distribution(self, state):
        return RevealSet(self.q.log().expand(state.masked.shape), (1 - self.q).log(), state.masked)

    def select(self, state):
        return self.distribution(state).probs > 0.5


def test_stochastic_decision(table):
    policy = Fixed([0.2, 0.5, 0.6, 0.9])
    noise = torch.tensor([[0.1, 0.6, 0.5, 0.95]], dtype=torch.float64)
    state = state_of(table([[0.7, 0.3]] * 4), [[1, 1, 1, 1]], noise=noise)
    assert chosen(StochasticDecision(policy), state) == [[2, 3]]
    assert chosen(StochasticDecision(policy, "sample"), state) == [[0, 2]]
    assert chosen(StochasticDecision(policy, "sample", beta=2.0), state) == [[0, 1, 2, 3]]
    assert chosen(StochasticDecision(policy, "sample", beta=0.4), state) == [[]]
    visible = state_of(table([[0.7, 0.3]] * 4), [[1, 1, 0, 1]], noise=noise)
    assert chosen(StochasticDecision(policy), visible) == [[3]]


def test_stochastic_decision_frequencies(table):
    # n = 20,000 rows, first step; |z| < 4 per position.
    q = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    policy = StochasticDecision(Fixed(q.tolist()), "sample")
    out = decode(table([[0.7, 0.3]] * 3), policy, length=torch.full((20_000,), 3), max_steps=9)
    empty = 0.8 * 0.5 * 0.1  # the arg-max of p, position 2, is revealed then
    expected = q + torch.tensor([0.0, 0.0, empty])
    z = ((out.reveal_step == 0).double().mean(0) - expected) / (expected * (1 - expected) / 20_000).sqrt()
    assert z.abs().max() < 4


def test_stochastic_decision_draws_the_non_empty_law(table):
    # n = 20,000 rows; every subset of 3 positions has the frequency of the exact law; |z| < 4.
    q = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)

    class NonEmpty(Fixed):
        def distribution(self, state):
            return RevealSet(self.q.log().expand(state.masked.shape), (1 - self.q).log(), state.masked, non_empty=True)

    n = 20_000
    out = decode(
        table([[0.7, 0.3]] * 3),
        StochasticDecision(NonEmpty(q.tolist()), "sample"),
        length=torch.full((n,), 3),
        max_steps=9,
    )
    assert (out.fallback == 0).all()
    first = out.reveal_step == 0
    law = RevealSet(q.log(), (1 - q).log(), torch.ones(3).bool(), non_empty=True)
    for subset in law.enumerate_support():
        p = law.log_prob(subset).exp()
        found = (first == subset).all(-1).double().mean()
        if subset.any():
            assert abs(found - p) / (p * (1 - p) / n).sqrt() < 4
        else:
            assert found == 0


def test_planned_order_given_as_steps_skips_empty_ones(table):
    plan = torch.tensor([[5, 0, 5, 2], [1, 1, 0, 3]])
    out = decode(table([[0.7, 0.3]] * 4), PlannedOrder(plan), length=torch.tensor([4, 3]), max_steps=4)
    assert out.reveal_step.tolist() == [[2, 0, 2, 1], [1, 1, 0, -1]]
    assert out.nfe.tolist() == [3, 2]
    assert out.fallback.tolist() == [0, 0]
    short = decode(table([[0.7, 0.3]] * 4), PlannedOrder(plan[0]), length=4, max_steps=2)
    assert short.reveal_step.tolist() == [[1, 0, 1, 1]]


def test_planned_order_from_logits(table):
    probs = torch.tensor([[0.4, 0.3, 0.3], [0.4, 0.1, 0.5], [0.4, 0.35, 0.25], [0.6, 0.3, 0.1]], dtype=torch.float64)
    calls = []

    def network(canvas):
        calls.append(canvas)
        return probs.log().expand(*canvas.attention_mask.shape, 3)

    same = table([[0.7, 0.3]] * 4)
    mode = decode(same, PlannedOrder(network, "mode"), length=4, max_steps=3)
    assert mode.reveal_step.tolist() == [[0, 1, 0, 0]]  # nothing at step 1, which is skipped
    assert len(calls) == 1
    # expected steps .9, 1.1, .85, .5; sizes 1.8, 1.05, 1.15 -> cumulative 1.8, 2.85, 4 -> cuts 2, 3, 4
    rank = decode(same, PlannedOrder(network, "rank"), length=4, max_steps=3)
    assert rank.reveal_step.tolist() == [[1, 2, 0, 0]]
    # without position 3: sizes 1.2, .75, 1.05 -> cuts 1, 2, 3
    padded = decode(same, PlannedOrder(network, "rank"), length=torch.tensor([4, 3]), max_steps=3)
    assert padded.reveal_step.tolist() == [[1, 2, 0, 0], [1, 2, 0, -1]]
    with pytest.raises(UserError, match="max_steps"):
        decode(same, PlannedOrder(network, "mode"), length=4, max_steps=2)


def test_planned_order_sample_frequencies(table):
    # n = 20,000 rows of 2 positions; |z| < 4. Position 1 is always at step 1, so that nothing is compressed at step 0.
    probs = torch.tensor([[0.3, 0.7], [1e-12, 1.0]], dtype=torch.float64)
    policy = PlannedOrder(lambda canvas: probs.log().expand(len(canvas.attention_mask), 2, 2), "sample")
    out = decode(table([[0.7, 0.3]] * 2), policy, length=torch.full((20_000,), 2), max_steps=2)
    early = (out.reveal_step[:, 1] == 1).double().mean()  # position 0 stood alone at step 0
    assert abs(early - 0.3) / math.sqrt(0.21 / 20_000) < 4


# ---- by name


def test_make_policy_and_describe():
    assert describe_policy(make_policy("entropy", sizes="cosine")) == {
        "policy": "entropy",
        "sizes": "cosine",
        "ties": "leftmost",
    }
    assert make_policy("random", sizes=1.5).sizes == FractionalSizes(1.5)
    assert describe_policy(make_policy("random", sizes=1.5)) == {
        "policy": "random",
        "sizes": "fractional",
        "sizes_mean": 1.5,
        "ties": "leftmost",
    }
    wrapped = make_policy("block", policy=make_policy("eos_aware", policy="threshold", token_ids=[1, 2]), size=8)
    assert describe_policy(wrapped) == {
        "policy": "block(eos_aware(threshold))",
        "tau": 0.9,
        "token_ids": "1 2",
        "block_size": 8,
    }
    assert describe_policy(StochasticDecision(Fixed([0.5]), "sample"))["policy"] == "stochastic(Fixed)"
    assert make_policy("top_prob", sizes=CosineSizes(3)).sizes == CosineSizes(3)
    assert {kind.name for kind in POLICIES.values()} == set(POLICIES)


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("best", {}, "unknown policy 'best'"),
        ("top_prob", {"tau": 0.5}, "no option 'tau'"),
        ("block", {"policy": "random"}, "lacks size"),
        ("block", {"policy": "random", "size": 0}, "block_size"),
        ("threshold", {"tau": 1.5}, "tau"),
        ("threshold", {"tau": float("nan")}, "tau"),
        ("factor", {"factor": 0.0}, "factor"),
        ("entropy_bound", {"gamma": -1.0}, "gamma"),
        ("klass", {"eps": 0.0}, "eps"),
        ("klass", {"stable_steps": 0}, "stable_steps"),
        ("klass", {"tau": -1.0}, "tau"),
        ("eos_aware", {"policy": "random", "token_ids": []}, "token_ids"),
        ("answer_ready", {"policy": "random", "answer": second_and_later, "sure": 1.5}, "sure"),
        ("random", {"sizes": "linear"}, "sizes"),
    ],
)
def test_bad_policies(name, options, word):
    with pytest.raises(UserError, match=word):
        make_policy(name, **options)


def test_bad_decisions():
    with pytest.raises(UserError, match="decision"):
        StochasticDecision(Fixed([0.5]), "rank")
    with pytest.raises(UserError, match="beta"):
        StochasticDecision(Fixed([0.5]), "sample", beta=0.0)
    with pytest.raises(UserError, match="decision"):
        PlannedOrder(torch.zeros(3), "argmax")
