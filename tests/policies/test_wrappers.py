"""Policies around others, by hand: blocks, ends last, early commitment, smoothing, eagerness, prices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from written_denoisers import Confident, Table, chosen, chosen_and_kept, masks, state_of

from orderppl import Policy, State, UserError, decode, follow
from orderppl.data.answer_tokens import AnswerTokens
from orderppl.decoding import RevealScheduler
from orderppl.distributions import DecidedSet, IndependentSet
from orderppl.distributions.finishing_set import FinishingSet
from orderppl.models import LearnedPolicy
from orderppl.policies import (
    AtPrice,
    Blocks,
    Eager,
    EarlyCommit,
    EndStop,
    EosAware,
    Factor,
    FixedOrder,
    Klass,
    LookAhead,
    Plan,
    PriceRange,
    Ranked,
    Smoothed,
    Spaced,
    Threshold,
)
from orderppl.policies.policy import LOGIT_LIMIT

from programs import PricedTable, TableDenoiser, make_batch


class Fixed(Policy):
    """The same reveal probabilities at every state."""

    def __init__(self, probs: list[float], non_empty: bool = False) -> None:
        super().__init__()
        self.q, self.non_empty = torch.tensor(probs, dtype=torch.float64), non_empty

    def forward(self, state: State) -> IndependentSet:
        return IndependentSet(self.q.log().expand(state.shape), (1 - self.q).log(), state.masked, self.non_empty)


class Constant(nn.Module):
    """A policy network with the same logit everywhere."""

    def __init__(self, logit: float) -> None:
        super().__init__()
        self.logit = logit

    def forward(self, state: State) -> Tensor:
        return torch.full(state.shape, self.logit, dtype=torch.float64)


# ---- blocks


def test_blocks_keep_to_the_leftmost_one_that_is_not_finished():
    ramp = Confident([0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.97])
    out = decode(ramp, Blocks(Ranked("top_prob"), 3), masks(ramp, 7, 4), max_steps=6)
    # row 0: blocks of 3, 3, 1 with steps up to 2, 4, 6; row 1: blocks of 3, 1 with steps up to 3, 6
    assert out.reveal_step.tolist() == [[1, 1, 0, 3, 3, 2, 4], [2, 1, 0, 3, -1, -1, -1]]
    assert out.nfe.tolist() == [5, 4]


def test_blocks_count_the_positions_to_reveal():
    """Here 0, 2, 3, 5: what is given between them takes no place."""
    denoiser = Confident([0.6, 0.5, 0.7, 0.8, 0.5, 0.9])
    tokens = torch.tensor([[2, 1, 2, 2, 1, 2]])
    out = decode(denoiser, Blocks(Ranked("top_prob"), 2), tokens, max_steps=4)
    assert out.reveal_step.tolist() == [[1, -1, 0, 3, -1, 2]]
    assert out.sequences.tolist() == [[0, 1, 0, 0, 1, 0]]


def test_blocks_force_their_last_step_and_pass_on_unused_ones():
    slow = Confident([0.6, 0.7, 0.8, 0.9])
    out = decode(slow, Blocks(Threshold(0.99), 2), masks(slow, 4), max_steps=2)
    assert out.reveal_step.tolist() == [[0, 0, 1, 1]]
    fast = Confident([0.99, 0.99, 0.8, 0.9, 0.7, 0.6])
    out = decode(fast, Blocks(Threshold(0.95), 2), masks(fast, 4), max_steps=4)
    assert out.reveal_step.tolist() == [[0, 0, 2, 1]]


def test_the_last_step_of_a_block_completes_what_its_policy_keeps_for_last():
    """Ends are kept for last within the block, and all of it is revealed in the step that ends it."""
    end = [0.1, 0.9]
    denoiser = Table([end, [0.8, 0.2], end, [0.7, 0.3]])
    policy = Blocks(EosAware(Ranked("left_to_right", 1.0), [1]), 2)
    assert decode(denoiser, policy, masks(denoiser, 4), max_steps=4).reveal_step.tolist() == [[1, 0, 3, 2]]
    assert decode(denoiser, policy, masks(denoiser, 4), max_steps=2).reveal_step.tolist() == [[0, 0, 1, 1]]


def test_a_learned_policy_sees_the_steps_left_in_the_block():
    seen = []

    class Spy(Policy):
        def forward(self, state: State) -> DecidedSet:
            seen.append((state.steps_left.tolist(), state.masked.long().tolist(), state.latent.long().tolist()))
            return DecidedSet(torch.zeros_like(state.masked), state.masked)

    denoiser = Confident([0.6, 0.7, 0.8, 0.9])
    decode(denoiser, Blocks(Spy(), 2), masks(denoiser, 4), max_steps=4)
    first, second = [[1, 1, 0, 0]], [[0, 0, 1, 1]]
    assert seen == [([2], first, first), ([1], [[1, 0, 0, 0]], first), ([2], second, second)]


def test_a_plan_of_the_whole_row_is_followed_block_by_block():
    """Its later blocks keep the order that was planned for them."""
    denoiser = Confident([0.6] * 6)
    for policy in (FixedOrder([3, 0, 5, 1, 4, 2]), Plan(_Steps([3, 0, 5, 1, 4, 2]))):
        free = decode(denoiser, policy, masks(denoiser, 6), max_steps=6, mode=True)
        assert free.reveal_step.tolist() == [[3, 0, 5, 1, 4, 2]]
        blocked = decode(denoiser, Blocks(policy, 3), masks(denoiser, 6, 5), max_steps=6, mode=True)
        assert blocked.reveal_step.tolist() == [[1, 0, 2, 3, 5, 4], [1, 0, 2, 3, 4, -1]]


class _Steps(nn.Module):
    """Step logits without much randomness."""

    def __init__(self, steps: list[int]) -> None:
        super().__init__()
        self.steps = torch.tensor(steps)

    def forward(self, opening: State) -> Tensor:
        place = (opening.latent.cumsum(-1) - 1).clamp(min=0)
        return 20 * torch.nn.functional.one_hot(self.steps[place], 6).double()


# ---- ends last


def test_eos_aware_keeps_end_predictions_for_last():
    end = [0.0, 0.02, 0.98]
    denoiser = Table([[0.6, 0.4, 0.0], end, [0.3, 0.7, 0.0], end, [0.9, 0.1, 0.0]])
    plain = decode(denoiser, Ranked("top_prob", 1.0), masks(denoiser, 5), max_steps=9)
    aware = decode(denoiser, EosAware(Ranked("top_prob", 1.0), [2]), masks(denoiser, 5), max_steps=9)
    assert plain.reveal_step.tolist() == [[4, 0, 3, 1, 2]]
    assert aware.reveal_step.tolist() == [[2, 3, 1, 4, 0]]
    # 3 positions are left of the other kind where 4 are due
    four = EosAware(Ranked("top_prob", 4.0), [2])
    assert chosen(four, state_of(denoiser, [[1, 1, 1, 1, 1]])) == [[0, 2, 4]]
    threshold = EosAware(Threshold(0.8), [2])
    assert chosen(threshold, state_of(denoiser, [[1, 1, 1, 1, 1], [0, 1, 0, 1, 0]])) == [[4], [1, 3]]
    factor = EosAware(Factor(1.0), [2])
    assert chosen(factor, state_of(denoiser, [[1, 1, 1, 0, 0]])) == [[2]]
    everything = EosAware(Fixed([0.9] * 5), [2])
    assert chosen(everything, state_of(denoiser, [[1, 1, 1, 1, 1]])) == [[0, 2, 4]]


def test_what_is_held_back_still_counts_as_hidden():
    """Set sizes of the other policy refer to the whole row: one revealed, two due at step 0, nothing is made up for."""
    end = [0.02, 0.98]
    denoiser = Table([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], end, end, end])
    policy = EosAware(Ranked("left_to_right"), [1])
    out = decode(denoiser, policy, masks(denoiser, 6), max_steps=3)
    assert out.reveal_step.tolist() == [[0, 0, 1, 2, 2, 2]]


# ---- early commitment


def second_and_later(tokens: Tensor, latent: Tensor) -> Tensor:
    """The answer is what follows token 2, or everything."""
    found = (tokens == 2).long().cumsum(-1)
    return ((found - (tokens == 2).long() > 0) | (found.amax(-1, keepdim=True) == 0)) & latent


def test_a_row_ends_once_its_answer_is_sure():
    mark = [0.0, 0.02, 0.98]
    denoiser = Table([[0.6, 0.4, 0.0], mark, [0.3, 0.7, 0.0], [0.75, 0.25, 0.0]])

    def sets(sure: float, masked: list[list[int]]) -> list[list[int]]:
        return chosen(EarlyCommit(Ranked("left_to_right"), second_and_later, sure), state_of(denoiser, masked))

    assert sets(0.7, [[1, 1, 1, 1]]) == [[0, 1, 2, 3]]  # 0.7 and 0.75 behind the mark
    assert sets(0.72, [[1, 1, 1, 1]]) == [[0]]
    assert sets(0.72, [[1, 1, 0, 1]]) == [[0, 1, 3]]  # one of the two has been written
    assert sets(1.0, [[1, 1, 0, 0]]) == [[0, 1]]  # nothing of the answer is left to write
    no_mark = Table([[0.6, 0.4, 0.0], [0.9, 0.1, 0.0]])
    assert chosen(EarlyCommit(Ranked("left_to_right"), second_and_later, 0.6), state_of(no_mark, [[1, 1]])) == [[0, 1]]
    assert chosen(EarlyCommit(Ranked("left_to_right"), second_and_later, 0.7), state_of(no_mark, [[1, 1]])) == [[0]]


def test_its_log_odds_by_hand():
    """(logit min c - logit sure) / temperature + the mean of a network; towards 0 the hard rule."""
    denoiser = Confident([0.7, 0.9, 0.6, 0.99])
    answer = AnswerTokens(marks=[1], ends=[])  # token 0 is predicted everywhere: without a mark all is the answer
    masked = [[1, 1, 1, 0], [1, 1, 0, 1], [0] * 4]
    state = state_of(denoiser, masked)
    soft = EarlyCommit(Threshold(0.95), answer, sure=0.8, temperature=2.0)
    by_hand = torch.tensor([math.log(1.5 / 4) / 2, math.log(7 / 3 / 4) / 2]).double()
    found = soft.finish_logit(state)
    torch.testing.assert_close(found[:2], by_hand, atol=1e-4, rtol=0)
    assert 6 < found[2] <= LOGIT_LIMIT  # nothing of it is left to write
    both = EarlyCommit(Threshold(0.95), answer, 0.8, 2.0, network=Constant(-0.5))
    torch.testing.assert_close(both.finish_logit(state)[:2], by_hand - 0.5, atol=1e-4, rtol=0)
    alone = EarlyCommit(Threshold(0.95), network=Constant(-0.5))
    torch.testing.assert_close(alone.finish_logit(state)[:2], torch.full((2,), -0.5).double())
    sharp = EarlyCommit(Threshold(0.95), answer, 0.65, temperature=1e-3)
    hard = EarlyCommit(Threshold(0.95), answer, 0.65)
    assert chosen(sharp, state) == chosen(hard, state)
    assert chosen(hard, state)[1] == [0, 1, 3]


def test_finishing_reveals_everything_whatever_the_other_policy_was_shown():
    """Also what blocks or ends hold back."""
    denoiser = Confident([0.6, 0.7, 0.8, 0.9])
    state = state_of(denoiser, [[1, 1, 1, 1]])
    for inner in (Blocks(Threshold(0.95), 2), EosAware(Threshold(0.95), [1]), Blocks(EosAware(Factor(), [0]), 2)):
        yes = EarlyCommit(inner, network=Constant(5.0))
        sets, _ = yes.at_step(state)
        assert isinstance(sets, FinishingSet)
        assert chosen(yes, state) == [[0, 1, 2, 3]]
        assert len(chosen(EarlyCommit(inner, network=Constant(-5.0)), state)[0]) < 4


def test_finishing_depends_on_the_price():
    """logit f = slope u + mean network, with u = -0.75, -0.25, 0.25, 0.75 for four sequences; +-1 at the ends."""
    prices = PriceRange(0.1, 1.6)
    finishing = EarlyCommit(Threshold(0.9), network=Constant(-0.5), prices=prices, slope=4.0)
    state = state_of(Confident([0.6] * 3), [[1, 1, 0]] * 4, is_scored=True)
    by_hand = torch.tensor([-3.5, -1.5, 0.5, 2.5]).double()
    torch.testing.assert_close(finishing.finish_logit(state), by_hand, atol=1e-5, rtol=0)
    one = state_of(Confident([0.6] * 3), [[1, 1, 0]])
    for price, logit in ((0.1, -4.5), (0.4, -0.5), (1.6, 3.5)):
        found = AtPrice(finishing, price)(one).logit.item()
        assert found == pytest.approx(logit, abs=1e-5)
    assert chosen(AtPrice(finishing, 1.6), one) == [[0, 1]]
    with pytest.raises(UserError, match="^price: "):
        finishing(one)


# ---- smoothed


def test_what_is_selected_is_kept_apart():
    """The surest first; of 8 hidden positions of 8 the gap is 3, of 4 it is max(2, floor(1.5)) = 2."""
    denoiser = Confident([0.9, 0.95, 0.7, 0.65, 0.8, 0.55, 0.61, 0.99])
    policy = Spaced(Threshold(0.6), spread=3.0)
    assert chosen(policy, state_of(denoiser, [[1, 1, 1, 1, 1, 1, 1, 1]])) == [[1, 4, 7]]
    assert chosen(policy, state_of(denoiser, [[1, 0, 1, 1, 0, 0, 1, 0]])) == [
        [0, 2, 6]
    ]  # 3 is beside 2, which is surer
    assert chosen(Spaced(Fixed([0.0] * 8)), state_of(denoiser, [[1] * 8])) == [[]]  # nothing selected, nothing kept


def test_smoothed_flips_decisions():
    """Two of three masked positions are the most confident: revealed with 1 - eps, the third with eps, given any."""
    state = state_of(Confident([0.6, 0.9, 0.8, 0.99]), [[1, 1, 1, 0]])
    loose = Smoothed(Threshold(0.75), 0.1, non_empty=False)
    assert torch.allclose(loose(state).probs, torch.tensor([[0.1, 0.9, 0.9, 0.0]]))
    given = Smoothed(Threshold(0.75), 0.1)(state).probs
    assert torch.allclose(given, torch.tensor([[0.1, 0.9, 0.9, 0.0]]) / (1 - 0.9 * 0.1 * 0.1), atol=1e-6)
    assert chosen(loose, state) == [[1, 2]]
    stacked = state_of(Confident([0.6, 0.9, 0.8, 0.99]), state.masked.expand(3, 2, 1, 4))
    assert torch.equal(loose(stacked).probs, loose(state).probs.expand(3, 2, 1, 4))
    assert Smoothed(Fixed([0.9])).non_empty and not loose.non_empty


@pytest.mark.parametrize(
    "policy",
    [Klass(0.3, eps=0.5), Blocks(Ranked(), 2), EosAware(Ranked(), [1]), Threshold(0.5), Factor(), Ranked("random")],
    ids=lambda policy: type(policy).__name__,
)
@pytest.mark.parametrize("canvas", ["padded", "scattered", "prompted"])
def test_the_mode_of_a_smoothed_policy_is_the_policy(policy: Policy, canvas: str):
    """With the decoder's memory; also where rows of several lengths leave the batch."""
    denoiser, batch = TableDenoiser(), make_batch(canvas)
    theirs = decode(denoiser, policy, batch, max_steps=4, mode=True) if batch.given is not None else None
    tokens = batch.tokens.masked_fill(batch.latent, denoiser.mask_index).masked_fill(~batch.attention_mask, 0)
    theirs, ours = (
        decode(denoiser, one, {"tokens": tokens, "attention_mask": batch.attention_mask}, max_steps=4, mode=True)
        for one in (policy, Smoothed(policy, 0.2))
    )
    assert torch.equal(ours.reveal_step, theirs.reveal_step)
    paths = [follow(one, denoiser, batch, 4, mode=True) for one in (policy, Smoothed(policy, 0.2))]
    assert torch.equal(paths[0].reveal_step, paths[1].reveal_step)


# ---- draws, modes and eagerness


def test_draws_and_modes_by_hand():
    policy, noise = Fixed([0.2, 0.5, 0.6, 0.9]), [[0.1, 0.6, 0.5, 0.95]]
    same = Table([[0.7, 0.3]] * 4)
    drawn = state_of(same, [[1, 1, 1, 1]], noise=noise)
    assert chosen(policy, state_of(same, [[1, 1, 1, 1]])) == [[2, 3]]
    assert chosen(policy, drawn) == [[0, 2]]
    assert chosen(Eager(policy, 2.0), drawn) == [[0, 1, 2, 3]]
    assert chosen(Eager(policy, 0.4), drawn) == [[]]
    assert chosen(policy, state_of(same, [[1, 1, 0, 1]])) == [[3]]
    assert torch.allclose(Eager(policy, 2.0)(drawn).probs, torch.tensor([[0.4, 1.0, 1.0, 1.0]]).double())


def test_draws_have_their_frequencies():
    # n = 20,000 rows, first step; |z| < 4 per position.
    q, n = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64), 20_000
    same = Table([[0.7, 0.3]] * 3)
    out = decode(same, Fixed(q.tolist()), masks(same, *[3] * n), max_steps=9)
    empty = 0.8 * 0.5 * 0.1  # the arg-max of p, position 2, is revealed then
    expected = q + torch.tensor([0.0, 0.0, empty])
    z = ((out.reveal_step == 0).double().mean(0) - expected) / (expected * (1 - expected) / n).sqrt()
    assert z.abs().max() < 4


def test_draws_of_sets_that_are_not_empty():
    # n = 20,000 rows; every subset of 3 positions has the frequency of the exact distribution; |z| < 4.
    policy, n = Fixed([0.2, 0.5, 0.3], non_empty=True), 20_000
    same = Table([[0.7, 0.3]] * 3)
    out = decode(same, policy, masks(same, *[3] * n), max_steps=9)
    assert (out.fallback == 0).all()
    first = out.reveal_step == 0
    q = policy(state_of(same, [[1, 1, 1]])).at(0)
    for subset in q.enumerate_support():
        p = q.log_prob(subset).exp()
        found = (first == subset).all(-1).double().mean()
        if subset.any():
            assert abs(found - p) / (p * (1 - p) / n).sqrt() < 4
        else:
            assert found == 0


def test_eager_needs_probabilities_per_position():
    state = state_of(Confident([0.6, 0.7]), [[1, 1]])
    with pytest.raises(UserError, match="^policy: .* has no probabilities to scale"):
        Eager(Ranked("random"), 2.0)(state)
    decided = Eager(Threshold(0.65), 2.0)  # a hard rule leaves nothing to scale
    assert chosen(decided, state) == [[1]]


# ---- prices


def test_a_range_prices_every_sequence_for_itself():
    """price_b = low (high / low)^u_b, with log-prices even over the range; one price for all when decoding."""
    prices = PriceRange(0.1, 1.6)
    by_hand = 0.1 * 16 ** torch.tensor([0.125, 0.375, 0.625, 0.875])
    torch.testing.assert_close(prices.spread(4, torch.device("cpu")), by_hand)
    denoiser, batch = TableDenoiser(), make_batch("padded")
    scored = LearnedPolicy(PricedTable(prices)).order(batch, denoiser, 3).path.opening()
    torch.testing.assert_close(prices.places(scored), torch.tensor([-0.75, -0.25, 0.25, 0.75]))
    torch.testing.assert_close(prices.places(scored.replace(price=0.4)), torch.zeros(4), atol=1e-6, rtol=0)
    policy = LearnedPolicy(PricedTable(prices))
    spread = policy(scored).probs
    for row, price in enumerate(by_hand.tolist()):
        torch.testing.assert_close(AtPrice(policy, price)(scored).probs[row], spread[row])
    assert not torch.allclose(AtPrice(policy, 0.1)(scored).probs, spread)


def test_a_price_reaches_through_other_wrappers():
    prices = PriceRange(0.1, 1.6)
    policy = LearnedPolicy(PricedTable(prices))
    state = policy.order(make_batch("padded"), TableDenoiser(), 3).path.opening()
    inside, outside = (
        make(policy) for make in (lambda p: EosAware(AtPrice(p, 0.3), [0]), lambda p: AtPrice(EosAware(p, [0]), 0.3))
    )
    assert torch.equal(inside(state).probs, outside(state).probs)
    blocks, kept = chosen_and_kept(AtPrice(Blocks(policy, 2), 0.3), state_of(Confident([0.6] * 3), [[1, 1, 1]]))
    assert len(blocks) == 1 and kept is not None


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Blocks(Ranked(), 0), "block_size"),
        (lambda: EosAware(Ranked(), []), "token_ids"),
        (lambda: Smoothed(Ranked(), 0.0), "smoothing"),
        (lambda: Smoothed(Ranked(), 0.5), "smoothing"),
        (lambda: Smoothed(Ranked(), math.nan), "smoothing"),
        (lambda: Eager(Ranked(), 0.0), "factor"),
        (lambda: Eager(Ranked(), math.nan), "factor"),
        (lambda: Spaced(Ranked(), 0.0), "spread"),
        (lambda: AtPrice(Ranked(), 0.0), "price"),
        (lambda: AtPrice(Ranked(), -1.0), "price"),
        (lambda: PriceRange(0.0, 1.0), "price"),
        (lambda: PriceRange(2.0, 1.0), "price"),
        (lambda: EarlyCommit(Ranked()), "answer"),
        (lambda: EarlyCommit(Ranked(), second_and_later, 1.5), "sure"),
        (lambda: EarlyCommit(Ranked(), second_and_later, 1.0, temperature=1.0), "sure"),
        (lambda: EarlyCommit(Ranked(), second_and_later, temperature=-1.0), "temperature"),
        (lambda: EarlyCommit(Ranked(), second_and_later, network=Constant(0.0)), "temperature"),
    ],
)
def test_bad_settings_are_refused(make, field: str):
    with pytest.raises(UserError, match=f"^{field}: ") as caught:
        make()
    assert "\n" not in str(caught.value)


# ---- stopping at the end, looking ahead


def test_stops_at_the_end():
    """Token 2 ends a text. What stands behind it is revealed with it; what stands before it waits."""
    sure_of_end = [[0.6, 0.4, 0.0], [0.05, 0.0, 0.95], [0.5, 0.4, 0.1], [0.5, 0.4, 0.1]]
    denoiser = Table(sure_of_end)
    one = Ranked("top_prob", 1.0)
    assert chosen(EndStop(one, [2]), state_of(denoiser, [[1, 1, 1, 1]])) == [[1, 2, 3]]  # the end is selected
    right = Ranked("left_to_right", 1.0)
    assert chosen(EndStop(right, [2]), state_of(denoiser, [[1, 1, 1, 1]])) == [[0]]  # a token before it is open
    assert chosen(EndStop(right, [2], sure=0.9), state_of(denoiser, [[0, 1, 1, 1]])) == [[1, 2, 3]]  # first hidden
    assert chosen(EndStop(right, [2], sure=0.96), state_of(denoiser, [[0, 1, 1, 1]])) == [[1, 2, 3]]  # selected as well
    quiet = Ranked("top_prob", 1.0)
    revealed = state_of(denoiser, [[1, 0, 1, 1]]).replace(tokens=torch.tensor([[3, 2, 3, 3]]))
    assert chosen(EndStop(quiet, [2]), revealed) == [[0, 2, 3]]
    output = decode(denoiser, EndStop(one, [2]), masks(denoiser, 4), max_steps=4)
    assert output.nfe.tolist() == [2] and output.sequences.tolist() == [[0, 2, 0, 0]]
    with pytest.raises(UserError, match="token_ids: no end id"):
        EndStop(one, [])
    with pytest.raises(UserError, match=r"sure: 2 is no confidence"):
        EndStop(one, [2], sure=2)


class Pairs:
    """Four positions of two tokens: 0 and 1 are always equal, so are 2 and 3; nothing else is known."""

    vocab_size, mask_index = 2, 2

    def __call__(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        other = state[:, [1, 0, 3, 2]]
        known = torch.nn.functional.one_hot(other, 3)[..., :2] * 20.0
        return known + torch.tensor([0.1, 0.0])


def test_looks_ahead_to_what_is_left_to_guess():
    """Of random pairs the one that leaves nothing to guess has one position of either couple; four forwards a step."""
    denoiser, policy = Pairs(), LookAhead(Ranked("random", 2.0), candidates=4)
    split = {(0, 2), (0, 3), (1, 2), (1, 3)}
    alone, ahead = [], []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        for found, rule in ((alone, Ranked("random", 2.0)), (ahead, policy)):
            output = decode(denoiser, rule, masks(denoiser, 4), max_steps=2, generator=generator)
            first = tuple((output.reveal_step[0] == 0).nonzero()[:, 0].tolist())
            found.append(first in split)
            assert output.nfe.tolist() == [8 if rule is policy else 2]
    assert sum(alone) < 36 < sum(ahead)  # 2 in 3 of random pairs are split; 1 - (1/3)^4 of the best of four at most
    held = decode(denoiser, policy, masks(denoiser, 4), max_steps=2, mode=True)
    assert held.reveal_step.equal(decode(denoiser, policy, masks(denoiser, 4), max_steps=2, mode=True).reveal_step)
    with pytest.raises(UserError, match="candidates: 1 leaves no choice"):
        LookAhead(policy, 1)


def test_a_scheduler_without_the_denoiser_cannot_look_ahead():
    scheduler = RevealScheduler(LookAhead(Ranked("random", 2.0)), mask_token_id=2)
    scheduler.set_timesteps(2)
    canvas = torch.full((1, 4), 2)
    with pytest.raises(UserError, match="use decode, which has the denoiser"):
        scheduler.step(Pairs()(canvas, torch.ones(1, 4)), 1, canvas)


def test_the_cost_of_a_step_goes_through_wrappers():
    assert Blocks(LookAhead(Ranked("random"), 3), 2).forwards_per_step == 3
    assert Ranked().forwards_per_step == 1
