"""The best policy of a short chain against all policies, by backward induction over everything that can be seen."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch

from orderppl.config import build, describe
from orderppl.decoding.decode import decode, follow
from orderppl.errors import UserError
from orderppl.models.denoisers import MarkovChainDenoiser
from orderppl.models.denoisers.chain_orders import CLOSED, CLOSED_BY_OTHERS, HALF_OPEN, OPEN, GapPolicy
from orderppl.unmasking import Batch


def smallest_loss(denoiser: MarkovChainDenoiser, state: tuple[int, ...], steps: int) -> float:
    """Expected loss of the best policy from a state (K = hidden), nats; knows nothing of chains but their joint law.

    Every policy is one choice of a set for every state that can be met: the smallest loss is that of backward
    induction over all states and sets.
    """
    states, hidden = denoiser.num_states, denoiser.num_states
    every = list(itertools.product(range(states), repeat=len(state)))
    joint = dict(zip(every, denoiser.log_evidence(torch.tensor(every)).exp().tolist(), strict=True))

    @cache
    def mass(seen: tuple[int, ...]) -> float:
        if hidden not in seen:
            return joint[seen]
        i = seen.index(hidden)
        return sum(mass((*seen[:i], k, *seen[i + 1 :])) for k in range(states))

    def revealed(seen: tuple[int, ...], places: tuple[int, ...], values: tuple[int, ...]) -> tuple[int, ...]:
        told = dict(zip(places, values, strict=True))
        return tuple(told.get(i, token) for i, token in enumerate(seen))

    @cache
    def cost(seen: tuple[int, ...], i: int) -> float:
        p = torch.tensor([mass(revealed(seen, (i,), (k,))) for k in range(states)], dtype=torch.float64) / mass(seen)
        return float(torch.special.entr(p).sum())

    @cache
    def value(seen: tuple[int, ...], left: int) -> float:
        places = [i for i, token in enumerate(seen) if token == hidden]
        if left == 1 or not places:
            return sum(cost(seen, i) for i in places)
        best = float("inf")
        for size in range(1, len(places) + 1):
            for chosen in itertools.combinations(places, size):
                after = [revealed(seen, chosen, told) for told in itertools.product(range(states), repeat=size)]
                then = sum(mass(s) / mass(seen) * value(s, left - 1) for s in after)
                best = min(best, sum(cost(seen, i) for i in chosen) + then)
        return best

    return value(state, steps)


@pytest.mark.parametrize(("states", "length", "steps"), [(2, 5, 2), (2, 5, 3), (3, 4, 2), (3, 4, 3), (2, 4, 4)])
def test_no_policy_loses_less(states: int, length: int, steps: int) -> None:
    denoiser = MarkovChainDenoiser(states, 0.8, length)
    _, gap = denoiser.best_policy(steps)
    evidence = smallest_loss(denoiser, (states,) * length, length)  # one at a time loses nothing
    assert gap == pytest.approx(smallest_loss(denoiser, (states,) * length, steps) - evidence, abs=1e-9)


@pytest.mark.parametrize(("kind", "ends"), [(CLOSED, (0, 0)), (CLOSED_BY_OTHERS, (0, 1)), (HALF_OPEN, (0,))])
def test_value_of_a_gap_given_its_ends(kind: int, ends: tuple[int, ...]) -> None:
    """A gap of 4: what is best depends on the ends, (2,) between equal tokens and (1, 3) between others."""
    denoiser = MarkovChainDenoiser(4, 0.85, 6)
    search = denoiser.search(2, None, sees_tokens=True)
    state = (ends[0], 4, 4, 4, 4, *ends[1:])
    assert search.value[2, kind, 4] == pytest.approx(smallest_loss(denoiser, state, 2), abs=1e-9)
    assert search.chosen[2, kind, 4] == {CLOSED: [2], CLOSED_BY_OTHERS: [1, 3], HALF_OPEN: [3]}[kind]


def expected_gap(denoiser: MarkovChainDenoiser, policy: GapPolicy, steps: int, length: int, padding: int = 0) -> float:
    """Exact expectation, over all sequences, of log evidence minus the log-likelihood along the policy's path."""
    tokens = torch.tensor(list(itertools.product(range(denoiser.num_states), repeat=length)))
    log_p = denoiser.log_evidence(tokens)
    tokens = torch.nn.functional.pad(tokens, (0, padding), value=1)
    mask = (torch.arange(length + padding) < length).expand(tokens.shape)
    nats = follow(policy, denoiser, Batch(tokens, mask), steps).nats.double()
    return float((log_p.exp() * (log_p + nats)).sum())


@pytest.mark.parametrize(("states", "length", "steps"), [(2, 7, 2), (2, 8, 3), (4, 6, 2), (3, 6, 9)])
def test_the_policy_loses_what_was_promised(states: int, length: int, steps: int) -> None:
    denoiser = MarkovChainDenoiser(states, 0.85, length)
    policy, gap = denoiser.best_policy(steps)
    assert expected_gap(denoiser, policy, steps, length) == pytest.approx(gap, abs=1e-5)


def test_a_part_of_the_chain_and_padding() -> None:
    denoiser = MarkovChainDenoiser(3, 0.85, 9)
    policy, _ = denoiser.best_policy(2)
    _, gap = denoiser.best_policy(2, length=6)
    assert expected_gap(denoiser, policy, 2, 6, padding=3) == pytest.approx(gap, abs=1e-5)


def test_what_seeing_is_worth_on_the_reference_chain() -> None:
    denoiser = MarkovChainDenoiser(4, 0.85, 16)
    fixed = {steps: denoiser.best_order(steps)[1] for steps in (2, 3, 4, 5)}
    seeing = {steps: denoiser.best_policy(steps)[1] for steps in (2, 3, 4, 5)}
    assert fixed[2] == pytest.approx(seeing[2], abs=1e-12)  # the first of two sets is chosen blindly
    assert fixed[3] - seeing[3] == pytest.approx(0.000286, abs=1e-6)
    assert all(seeing[steps] < fixed[steps] + 1e-12 for steps in fixed)


def test_bad_input_is_named() -> None:
    denoiser = MarkovChainDenoiser(2, 0.8, 4)
    policy, _ = denoiser.best_policy(2)
    with pytest.raises(UserError, match="num_steps: 0"):
        denoiser.best_policy(0)
    with pytest.raises(UserError, match="length: 5"):
        denoiser.best_policy(2, length=5)
    with pytest.raises(UserError, match="max_steps: 3 steps for a policy of 2"):
        expected_gap(denoiser, policy, 3, 4)
    with pytest.raises(UserError, match="length: a canvas of 5 exceeds 4"):
        expected_gap(MarkovChainDenoiser(2, 0.8, 5), policy, 2, 5)
    assert denoiser.search(1, None, sees_tokens=True).chosen[1, OPEN, 4] == [1, 2, 3, 4]


def test_given_positions_close_gaps() -> None:
    """Given ends make the gap of 4 between them: (2,) between equal tokens and (1, 3) between others."""
    denoiser = MarkovChainDenoiser(4, 0.85, 6)
    policy, _ = denoiser.best_policy(2)
    canvas = torch.tensor([[0, 4, 4, 4, 4, 0], [0, 4, 4, 4, 4, 1]])
    order = decode(denoiser, policy, Batch(canvas), max_steps=2).reveal_step
    assert order[0].tolist() == [-1, 1, 0, 1, 1, -1]
    assert order[1].tolist() == [-1, 0, 1, 0, 1, -1]


def test_is_described_by_its_arguments() -> None:
    denoiser = MarkovChainDenoiser(3, 0.85, 9)
    policy = build(describe(GapPolicy(denoiser, num_steps=3)))
    assert torch.equal(policy.chosen, denoiser.best_policy(3)[0].chosen)
    short = build(
        "orderppl.models.denoisers.chain_orders.GapPolicy", {"denoiser": denoiser, "num_steps": 2, "length": 4}
    )
    assert (short.search.num_steps, short.search.length) == (2, 4)
