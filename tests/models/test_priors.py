"""Reveal priors worked by hand, and what every prior promises as a decoding policy."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import kl_divergence

from orderppl.data.answer_tokens import AnswerTokens
from orderppl.decoding import (
    AnswerReady,
    Block,
    EntropyBound,
    EosAware,
    Factor,
    GreedyOracle,
    Klass,
    Random,
    StochasticDecision,
    Threshold,
    TopProb,
    UniformSizes,
    decode,
)
from orderppl.decoding.policy import Policy
from orderppl.denoising import Canvas
from orderppl.distributions import StepwiseReveal
from orderppl.errors import UserError
from orderppl.models import (
    AnswerOdds,
    BoundedEntropy,
    CosineSteps,
    EasyFirst,
    FinishingPolicy,
    FixedSizes,
    HeldBack,
    HeuristicPrior,
    LearnedPolicy,
    LearnedSchedule,
    LearnedSteps,
    LeftToRight,
    PriceRange,
    RankedPolicy,
    ResidualPolicy,
    ScheduledSteps,
    SequentialUnmaskingModel,
    StepPrice,
    UniformSteps,
)
from orderppl.models.priors import LOGIT_LIMIT
from orderppl.path import RevealPath
from orderppl.states import UnmaskingState

from programs import LENGTH, PRIORS, PricedTable, TableDenoiser, TokenTable, make_batch

STEPS = 4


class Confidence(nn.Module):
    """A denoiser of two classes that is as confident at each position as it is told."""

    mask_index = 2
    vocab_size = 2

    def __init__(self, confidence: list[float]) -> None:
        super().__init__()
        p = torch.tensor(confidence)
        self.register_buffer("table", torch.stack([p, 1 - p], -1).log())

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        return self.table.expand(*state.shape, 2)


class Constant(nn.Module):
    """A policy network with the same logit everywhere."""

    def __init__(self, logit: float) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(logit))

    def forward(self, state: UnmaskingState) -> Tensor:
        return self.logit.expand(state.masked.shape)


def make_state(
    masked: list[list[bool]] | Tensor, step: int = 0, num_steps: int = STEPS, denoiser: nn.Module | None = None
) -> UnmaskingState:
    masked = torch.as_tensor(masked).bool()
    denoiser = TableDenoiser() if denoiser is None else denoiser
    canvas = Canvas(denoiser, torch.ones_like(masked))
    tokens = torch.where(masked, denoiser.mask_index, 0)
    return UnmaskingState(tokens, masked, torch.full(masked.shape[:-1], step), num_steps, canvas)


def test_uniform_steps():
    """Hazard 1 / (T - t)."""
    prior = UniformSteps()
    for t in range(STEPS):
        q = prior.distribution(make_state([[True, False, True]], t))
        assert torch.allclose(q.probs, torch.tensor([[1.0, 0.0, 1.0]]) / (STEPS - t))
    assert torch.allclose(prior.step_logits(STEPS, torch.device("cpu")).exp(), torch.full((STEPS,), 0.25))


def test_cosine_steps():
    """A fraction cos(pi t / 2T) of the positions is still masked before step t."""
    probs = CosineSteps().step_logits(STEPS, torch.device("cpu")).exp()
    masked = [math.cos(math.pi * t / (2 * STEPS)) for t in range(STEPS + 1)]
    by_hand = torch.tensor([masked[t] - masked[t + 1] for t in range(STEPS)])
    assert torch.allclose(probs, by_hand, atol=1e-6)
    assert (probs.diff() > 0).all()  # few early, many late
    for t in range(STEPS):
        q = CosineSteps().distribution(make_state([[True] * 3], t))
        assert torch.allclose(q.probs, torch.full((1, 3), 1 - masked[t + 1] / masked[t]), atol=1e-5)


def test_scheduled_steps_takes_any_schedule():
    prior = ScheduledSteps(lambda u: (1 - u) ** 2)
    assert torch.allclose(prior.step_logits(2, torch.device("cpu")).exp(), torch.tensor([0.75, 0.25]))


def test_left_to_right():
    """Six masked positions in three steps: two a step, counted from the left among the masked ones."""
    prior = LeftToRight(temperature=0.5)
    masked = [[True, True, False, True, True, True, True, False]]
    logits = (torch.tensor([1.5, 0.5, 0.0, -0.5, -1.5, -2.5, -3.5, 0.0]) / 0.5).sigmoid() * torch.tensor(masked[0])
    q = prior.distribution(make_state(masked, 1, denoiser=Confidence([0.5] * 8)))  # steps 1, 2, 3 are left
    no_set = torch.where(torch.tensor(masked[0]), 1 - logits, 1.0).prod()
    assert torch.allclose(q.probs, logits / (1 - no_set), atol=1e-5)
    state = make_state(masked, 1, denoiser=Confidence([0.5] * 8))
    shown = []
    for t in (1, 2, 3):
        state = make_state(state.masked, t, denoiser=Confidence([0.5] * 8))
        chosen = prior.select(state)
        shown.append(chosen[0].nonzero().flatten().tolist())
        state = make_state(state.masked & ~chosen, t, denoiser=Confidence([0.5] * 8))
    assert shown == [[0, 1], [3, 4], [5, 6]]


@pytest.mark.parametrize(("masked", "left", "size"), [(7, 3, 3), (6, 3, 2), (2, 4, 1), (5, 1, 5)])
def test_left_to_right_takes_an_equal_share(masked: int, left: int, size: int):
    state = make_state([[True] * masked], STEPS - left, denoiser=Confidence([0.5] * masked))
    assert LeftToRight().select(state)[0].tolist() == [True] * size + [False] * (masked - size)


def test_easy_first():
    """At the threshold a position is as likely revealed as not; the log-odds grow with those of the confidence."""
    state = make_state([[True, True, True, False]], denoiser=Confidence([0.8, 0.9, 0.6, 0.99]))
    prior = EasyFirst(threshold=0.8, temperature=2.0)
    by_hand = torch.tensor([[0.0, math.log(9 / 4) / 2, math.log(1.5 / 4) / 2]])
    assert torch.allclose(prior.logits(state)[:, :3], by_hand, atol=1e-4)
    just = make_state([[True] * 3], denoiser=Confidence([0.801, 0.799, 0.95]))
    assert prior.select(just).tolist() == [[True, False, True]]
    none = make_state([[True] * 3], denoiser=Confidence([0.6, 0.75, 0.7]))
    assert prior.select(none).tolist() == [[False, True, False]]  # none is confident: the most confident
    assert not prior.select(make_state([[False] * 3], denoiser=Confidence([0.6, 0.75, 0.7]))).any()


def test_easy_first_at_certainty_stays_finite():
    state = make_state([[True, True]], denoiser=Confidence([1.0 - 1e-7, 0.5]))
    sharp = EasyFirst(0.9, temperature=0.01)
    assert sharp.logits(state).tolist() == [[LOGIT_LIMIT, -LOGIT_LIMIT]]
    assert torch.isfinite(kl_divergence(EasyFirst(0.5).distribution(state), sharp.distribution(state))).all()


def test_bounded_entropy():
    """Two tokens of probabilities c and 1 - c; the entropies before it by hand, and the decoder it is made from."""
    confidences = [0.9, 0.6, 0.9, 0.99]
    nats = [-c * math.log(c) - (1 - c) * math.log(1 - c) for c in confidences]
    state = make_state([[True, True, True, False]], denoiser=Confidence(confidences))
    before = [0.0, 2 * nats[0], nats[0]]  # the last one is not masked; of the two equal ones the left one is first
    by_hand = torch.tensor([[(0.4 - entropy) / 0.5 for entropy in before]])
    torch.testing.assert_close(BoundedEntropy(0.4, 0.5).logits(state)[:, :3], by_hand, atol=1e-4, rtol=0)
    generator = torch.Generator().manual_seed(0)
    for bound in (0.0, 0.3, 1.0, 3.0):  # towards temperature 0: 50 states of 8 positions at each
        masked = torch.rand(50, 8, generator=generator) < 0.7
        state = make_state(masked.tolist(), denoiser=Confidence(torch.rand(8, generator=generator).tolist()))
        assert torch.equal(BoundedEntropy(bound, 1e-6).select(state), EntropyBound(bound).select(state))


@pytest.mark.parametrize("non_empty", [False, True])
def test_learned_policy(non_empty: bool):
    """sigmoid(logit), divided by 1 - (1 - p)^3 when conditioned on revealing something."""
    policy = LearnedPolicy(Constant(0.4), non_empty=non_empty)
    p = 1 / (1 + math.exp(-0.4))
    wanted = p / (1 - (1 - p) ** 3) if non_empty else p
    assert torch.allclose(policy.distribution(make_state([[True] * 3])).probs, torch.full((1, 3), wanted), atol=1e-5)
    assert policy.non_empty is non_empty
    for logit in (1e4, -1e4):  # kept away from certainty
        extreme = LearnedPolicy(Constant(logit), non_empty=non_empty).distribution(make_state([[True] * 3]))
        rarer = extreme.log_keep if logit > 0 else extreme.log_reveal
        assert torch.allclose(rarer, torch.full((1, 3), -LOGIT_LIMIT), atol=1e-4)


@pytest.mark.parametrize("base", [EasyFirst(0.5), LeftToRight(1.0)], ids=["easy_first", "left_to_right"])
def test_residual_policy_starts_as_its_base(base):
    state = make_state([[True, True, False], [True, True, True]])
    at_start = ResidualPolicy(base, Constant(0.0))
    assert torch.equal(at_start.distribution(state).probs, base.distribution(state).probs)
    assert torch.equal(at_start.select(state), base.select(state))
    moved = ResidualPolicy(base, Constant(0.3))
    assert torch.allclose(moved.logits(state), base.logits(state) + 0.3)
    at_start.distribution(state).probs[0, 0].backward()
    assert at_start.network.logit.grad != 0  # and can be trained away from it


def test_learned_steps_is_the_hazard_of_its_plan():
    network = TokenTable(STEPS)
    prior = LearnedSteps(network)
    plan = StepwiseReveal(network(None, torch.ones(1, LENGTH, dtype=torch.bool)))
    reveal, _ = plan.hazard_logs()
    for t in range(STEPS):
        q = prior.distribution(make_state([[True] * LENGTH], t))
        assert torch.allclose(q.probs, reveal[..., t].exp())


def test_a_plan_of_fewer_steps_is_played_more_slowly():
    """Two steps of a plan over three: its first one at steps 0 and 1, as likely one as the other."""
    network = TokenTable(2)
    attended = torch.ones(1, LENGTH, dtype=torch.bool)
    planned = network(None, attended).softmax(-1)  # [1, L, 2]
    path = RevealPath(Canvas(TableDenoiser(), attended), torch.zeros(1, LENGTH, dtype=torch.long), 3)
    played = LearnedSteps(network)(path)
    by_hand = torch.stack([planned[..., 0] / 2, planned[..., 0] / 2, planned[..., 1]], -1)
    torch.testing.assert_close(played.probs, by_hand)


def test_a_residual_corrects_the_hazard_of_a_plan():
    """log P(r = t) - log P(r > t), plus the correction; certain at the last step."""
    network = TokenTable(STEPS)
    probs = network(None, torch.ones(1, LENGTH, dtype=torch.bool)).softmax(-1)[0]  # [L, T]
    prior = ResidualPolicy(LearnedSteps(network), Constant(0.3), non_empty=False)
    for t in range(STEPS - 1):
        by_hand = probs[:, t].log() - probs[:, t + 1 :].sum(-1).log() + 0.3
        torch.testing.assert_close(prior.logits(make_state([[True] * LENGTH], t))[0], by_hand)
    last = prior.logits(make_state([[True] * LENGTH], STEPS - 1))
    assert (last > 10).all()
    last.sum().backward()
    assert all(p.grad.isfinite().all() for p in prior.parameters())


def test_later_sets_of_a_plan_are_held_back():
    """Plan of two steps over four: E[s] - t / 2 is what a position is early by, if anything."""
    network = TokenTable(2)
    planned = network(None, torch.ones(1, LENGTH, dtype=torch.bool)).softmax(-1)[0, :, 1]  # E[s_i], [L]
    base = EasyFirst(0.5)
    for step in range(4):
        state = make_state([[True, True, False]], step, num_steps=4)
        early = (planned - step / 2).clamp(min=0)
        held_back = HeldBack(base, network, weight=3.0)
        torch.testing.assert_close(held_back.logits(state), base.logits(state) - 3.0 * early)
    held_back.logits(make_state([[True] * LENGTH], num_steps=4)).sum().backward()
    assert held_back.weight.grad == -planned.sum()
    assert network.table.grad is not None and network.table.grad.abs().sum() > 0


def test_ranked_policy_takes_the_best_that_are_due():
    """Its mode are the largest log-odds; one position of three is due at the first of three steps, with P = softmax."""
    base = EasyFirst(0.5)
    state = make_state([[True, True, True], [True, True, False]], 0)
    ranked = RankedPolicy(base, "uniform")
    law = ranked.distribution(state)
    logits = base.logits(state)
    first = F.one_hot(logits.masked_fill(~state.masked, -torch.inf).argmax(-1), LENGTH).bool()
    assert torch.equal(ranked.select(state)[0], first[0])
    probability = logits[0].softmax(-1)
    for place in range(LENGTH):
        chosen = F.one_hot(torch.tensor([place] * 2), LENGTH).bool()
        torch.testing.assert_close(law.log_prob(chosen)[0], probability[place].log(), atol=1e-5, rtol=0)
    assert ranked.config["sizes"] == "uniform"
    assert RankedPolicy(base, 2.0).config["sizes"] == 2.0
    with pytest.raises(UserError, match="sizes: UniformSizes"):
        _ = RankedPolicy(base, UniformSizes(7)).config


@pytest.mark.parametrize("base", [UniformSteps(), LearnedPolicy(Constant(0.2)), LeftToRight()])
def test_step_price_counts_executed_steps(base):
    """log p(r) less the price for each step at which something is still masked."""
    batch = make_batch()
    path = RevealPath(Canvas(TableDenoiser(), batch["attention_mask"]), batch["tokens"], STEPS)
    order = torch.tensor([[0, 0, 0], [0, 1, 1], [2, 0, 1], [0, 3, -1]])
    priced = StepPrice(base, 0.7)
    plain, paid = base(path).log_prob(order), priced(path).log_prob(order)
    executed = torch.tensor([1.0, 2.0, 3.0, 4.0])
    possible = plain > -torch.inf
    assert torch.allclose(paid[possible], (plain - 0.7 * executed)[possible], atol=1e-5)
    assert possible[:3].all()
    assert torch.equal(StepPrice(base, 0.0)(path).log_prob(order), base(path).log_prob(order))
    state = make_state([[True] * LENGTH])
    assert torch.equal(priced.select(state), base.select(state))
    assert priced.non_empty is base.non_empty


def test_a_range_prices_every_sequence_for_itself():
    """log p_b(r) = log p(r | price_b) - price_b * executed steps, with log-prices even over the range."""
    prices = PriceRange(0.1, 1.6)
    by_hand = 0.1 * 16 ** torch.tensor([0.125, 0.375, 0.625, 0.875])
    torch.testing.assert_close(prices.prices(4, torch.device("cpu")), by_hand)
    torch.testing.assert_close(prices.places(4, torch.device("cpu")), torch.tensor([-0.75, -0.25, 0.25, 0.75]))
    batch = make_batch()
    path = RevealPath(Canvas(TableDenoiser(), batch["attention_mask"]), batch["tokens"], STEPS)
    order = torch.tensor([[0, 0, 0], [0, 1, 1], [2, 0, 1], [0, 3, -1]])
    network = PricedTable(prices)
    priced = StepPrice(LearnedPolicy(network, non_empty=False), prices)
    paid = priced(path).log_prob(order)
    executed = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for row, price in enumerate(by_hand.tolist()):
        one = priced.at(price)
        assert one.prior.network.table is network.table  # the weights are shared, the price is its own
        torch.testing.assert_close(one(path).log_prob(order)[row], paid[row])
        free = one.prior(path).log_prob(order)[row]
        torch.testing.assert_close(paid[row], free - price * executed[row])
    assert priced.price.chosen is None
    assert (priced.at(0.1)(path).log_prob(order) - paid)[1:].abs().min() > 1e-3
    state = make_state([[True] * LENGTH])
    assert priced.at(0.5).select(state).shape == (1, LENGTH)
    with pytest.raises(UserError, match="price"):
        priced.select(state)
    with pytest.raises(UserError, match="price"):
        priced.at(0.0)
    with pytest.raises(UserError, match="price"):
        StepPrice(UniformSteps(), 0.5).at(0.5)


def test_finishing_depends_on_the_price():
    """logit f = slope u + mean network, with u = -0.75, -0.25, 0.25, 0.75 for four sequences; +-1 at the ends."""
    prices = PriceRange(0.1, 1.6)
    finishing = FinishingPolicy(EasyFirst(), Constant(-0.5), prices, slope=4.0)
    state = make_state([[True, True, False]] * 4)
    torch.testing.assert_close(finishing.distribution(state).logit, torch.tensor([-3.5, -1.5, 0.5, 2.5]))
    priced = StepPrice(finishing, prices)
    one = make_state([[True, True, False]])
    for price, logit in ((0.1, -4.5), (0.4, -0.5), (1.6, 3.5)):
        torch.testing.assert_close(priced.at(price).prior.distribution(one).logit, torch.tensor([logit]))
    assert priced.at(1.6).select(one).tolist() == [[True, True, False]]
    same_for_all = FinishingPolicy(EasyFirst(), Constant(-0.5))
    torch.testing.assert_close(same_for_all.distribution(state).logit, torch.full((4,), -0.5))


def test_a_known_answer_ends_a_sequence():
    """(logit min c - logit sure) / temperature, by hand; towards temperature 0 it is the wrapper of the decoder."""
    confidences = [0.7, 0.9, 0.6, 0.99]
    answer = AnswerTokens([1], [])  # Confidence predicts token 0 everywhere: without a mark everything is the answer
    odds = AnswerOdds(answer, sure=0.8, temperature=2.0)
    state = make_state(
        [[True, True, True, False], [True, True, False, True], [False] * 4], denoiser=Confidence(confidences)
    )
    by_hand = torch.tensor([math.log(1.5 / 4) / 2, math.log(7 / 3 / 4) / 2, LOGIT_LIMIT])
    torch.testing.assert_close(odds(state)[:2], by_hand[:2], atol=1e-4, rtol=0)
    assert odds(state)[2] > 6  # nothing of it is left to write
    finishing = FinishingPolicy(EasyFirst(0.95), Constant(-0.5), base=odds)
    torch.testing.assert_close(finishing.distribution(state).logit[:2], by_hand[:2] - 0.5, atol=1e-4, rtol=0)
    sharp = FinishingPolicy(EasyFirst(0.95), Constant(0.0), base=AnswerOdds(answer, 0.65, 1e-3))
    wrapped = AnswerReady(Threshold(0.95), answer, 0.65)
    assert torch.equal(sharp.select(state), wrapped.select(state))
    assert sharp.select(state).tolist()[1] == [True, True, False, True]


def test_fixed_sizes_is_uniform_over_orders_of_its_sizes():
    """p(r) = prod_t k_t! / n! for each row's own n, and no other order is possible."""
    batch = make_batch()
    path = RevealPath(Canvas(TableDenoiser(), batch["attention_mask"]), batch["tokens"], STEPS)
    law = FixedSizes(2.0)(path)
    possible = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 0, -1]])
    by_hand = torch.tensor([2 / 6, 2 / 6, 2 / 6, 2 / 2]).log()
    assert torch.allclose(law.log_prob(possible), by_hand, atol=1e-6)
    for impossible in ([0, 1, 2], [0, 0, 0], [1, 1, 0]):
        assert (law.log_prob(torch.tensor([impossible] * 4))[:3] == -torch.inf).all()
    one_each = FixedSizes()(path).log_prob(torch.tensor([[2, 0, 1], [0, 1, 2], [1, 0, 2], [1, 0, -1]]))
    assert torch.allclose(one_each, -torch.tensor([6.0, 6.0, 6.0, 2.0]).log(), atol=1e-6)


def test_fixed_sizes_decodes_with_the_noise_of_the_state():
    """A policy like any other: as many as are due, drawn by the decoder's noise, so that batching changes nothing."""
    denoiser = TableDenoiser()
    for seed in range(5):
        noise = torch.Generator().manual_seed(seed)
        out = decode(
            denoiser, StochasticDecision(FixedSizes(2.0), "sample"), length=LENGTH, max_steps=STEPS, generator=noise
        )
        assert sorted(out.reveal_step[0].tolist()) == [0, 0, 1]


def test_learned_schedule_starts_uniform_and_follows_its_logits():
    prior = LearnedSchedule(STEPS)
    state = make_state([[True, False, True]], 1)
    assert torch.allclose(prior.distribution(state).probs, UniformSteps().distribution(state).probs)
    with torch.no_grad():
        prior.logits.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]).log())
    assert torch.allclose(prior.step_logits(STEPS, torch.device("cpu")).exp(), torch.tensor([0.1, 0.2, 0.3, 0.4]))
    alpha = prior.alpha(torch.tensor([0.0, 0.25, 0.5, 0.625, 0.75, 1.0]))
    assert torch.allclose(alpha, torch.tensor([1.0, 0.9, 0.7, 0.55, 0.4, 0.0]), atol=1e-6)
    prior.distribution(state).probs[0, 0].backward()
    assert prior.logits.grad.abs().sum() > 0
    with pytest.raises(UserError, match="num_steps: 3 steps for a schedule learned for 4"):
        prior.distribution(make_state([[True]], 0, num_steps=3))


def test_heuristic_prior_flips_decisions():
    """Two of three masked positions are the most confident: revealed with 1 - eps, the third with eps, given any."""
    state = make_state([[True, True, True, False]], denoiser=Confidence([0.6, 0.9, 0.8, 0.99]))
    policy = Threshold(0.75)
    loose = HeuristicPrior(policy, 0.1, non_empty=False)
    assert torch.allclose(loose.distribution(state).probs, torch.tensor([[0.1, 0.9, 0.9, 0.0]]))
    given = HeuristicPrior(policy, 0.1).distribution(state).probs
    assert torch.allclose(given, torch.tensor([[0.1, 0.9, 0.9, 0.0]]) / (1 - 0.9 * 0.1 * 0.1), atol=1e-6)
    assert loose.select(state).tolist() == [[False, True, True, False]]
    stacked = make_state(state.masked.expand(3, 2, 1, 4), denoiser=Confidence([0.6, 0.9, 0.8, 0.99]))
    assert torch.equal(loose.distribution(stacked).probs, loose.distribution(state).probs.expand(3, 2, 1, 4))


@pytest.mark.parametrize(
    "policy", [Klass(0.3, eps=0.5), Block(TopProb(), 2), EosAware(TopProb(), (1,)), Threshold(0.5), Factor(1.0)]
)
def test_heuristic_prior_decodes_as_its_policy(policy):
    """With the decoder's memory; also where rows of several lengths leave the batch."""
    denoiser, lengths = TableDenoiser(), torch.tensor([3, 2, 3, 1, 3, 3])
    prior = HeuristicPrior(policy, 0.2)
    theirs, ours = (decode(denoiser, p, length=lengths, max_steps=STEPS) for p in (policy, prior))
    assert torch.equal(ours.reveal_step, theirs.reveal_step)


def test_sequential_program_gives_a_prior_its_memory():
    """log p(r) by sites equals that of the stacked law, for a policy that looks back."""
    prior, denoiser, batch = HeuristicPrior(Klass(0.3, eps=0.5), 0.2), TableDenoiser(), make_batch()
    law = prior(RevealPath(Canvas(denoiser, batch["attention_mask"]), batch["tokens"], STEPS))
    order = law.sample((5,))
    data = {f"reveal_{t}": order == t for t in range(STEPS - 1)}
    with poutine.trace() as tracer, poutine.condition(data=data), pyro.plate("particles", 5, dim=-2):
        SequentialUnmaskingModel(denoiser, prior, STEPS)(**batch)
    tracer.trace.compute_log_prob()
    by_site = sum(tracer.trace.nodes[f"reveal_{t}"]["log_prob"] for t in range(STEPS))
    assert torch.allclose(by_site, law.log_prob(order), atol=1e-5)
    assert law.log_prob(order)[:, 0].unique().numel() > 1  # particles went different ways


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: HeuristicPrior(TopProb(), 0.0), "smoothing"),
        (lambda: HeuristicPrior(TopProb(), 0.5), "smoothing"),
        (lambda: HeuristicPrior(GreedyOracle()), "policy"),
        (lambda: HeuristicPrior(EosAware(GreedyOracle(), (0,))), "policy"),
        (lambda: HeuristicPrior(Random()), "policy"),
        (lambda: HeuristicPrior(Block(TopProb(ties="random"), 2)), "policy"),
        (lambda: FixedSizes("linear"), "sizes"),
        (lambda: FixedSizes(0.5), "mean"),
    ],
)
def test_settings_no_prior_can_have_are_refused(build, field: str):
    with pytest.raises(UserError) as error:
        build()
    assert error.value.field == field


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: LeftToRight(temperature=0.0), "temperature"),
        (lambda: LeftToRight(temperature=math.nan), "temperature"),
        (lambda: AnswerOdds(AnswerTokens([1], []), sure=1.0), "sure"),
        (lambda: AnswerOdds(AnswerTokens([1], []), temperature=0.0), "temperature"),
        (lambda: BoundedEntropy(bound=-0.1), "bound"),
        (lambda: BoundedEntropy(temperature=0.0), "temperature"),
        (lambda: EasyFirst(threshold=0.0), "threshold"),
        (lambda: EasyFirst(threshold=1.0), "threshold"),
        (lambda: EasyFirst(temperature=-1.0), "temperature"),
        (lambda: StepPrice(UniformSteps(), -0.1), "price"),
        (lambda: PriceRange(0.0, 1.0), "price"),
        (lambda: PriceRange(2.0, 1.0), "price"),
        (lambda: ResidualPolicy(UniformSteps(), Constant(0.0)), "base"),
    ],
)
def test_bad_settings_are_refused(build, field: str):
    with pytest.raises(ValueError, match=f"^{field}: .*; use "):
        build()


@pytest.mark.parametrize("name", sorted(PRIORS))
def test_every_prior_is_a_policy(name: str):
    """Selects a subset of what is masked, something when it never waits; rows do not influence each other."""
    prior = PRIORS[name](STEPS)
    prior = prior.at(0.5) if name.endswith("_range") else prior  # rows decoded together pay the same price
    assert isinstance(prior, Policy)
    masked = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0]]).bool()
    denoiser = TableDenoiser()
    for t in range(STEPS):
        state = make_state(masked, t, denoiser=denoiser)
        chosen = prior.select(state)
        assert chosen.dtype == torch.bool
        assert chosen.shape == masked.shape
        assert not (chosen & ~masked).any()
        if prior.non_empty:
            assert torch.equal(chosen.any(-1), masked.any(-1))
        q = prior.distribution(make_state(masked, t, denoiser=denoiser))  # a policy may keep a memory in the state
        assert torch.equal(q.masked, masked)
        assert q.non_empty == prior.non_empty
        alone = prior.distribution(make_state(masked[1:2], t, denoiser=denoiser))
        assert torch.allclose(alone.log_prob(chosen[1:2]), q.log_prob(chosen)[1:2], atol=1e-6)


@pytest.mark.parametrize("name", [name for name in PRIORS if not name.startswith("priced")])
def test_law_of_orders_is_the_chain_of_the_policy(name: str):
    """The closed form over whole orders, where there is one, agrees with following `distribution` step by step."""
    prior = PRIORS[name](STEPS)
    batch = make_batch()
    path = RevealPath(Canvas(TableDenoiser(), batch["attention_mask"]), batch["tokens"], STEPS)
    law = prior(path)
    order = law.sample()
    total = torch.zeros(len(order))
    memory: dict[str, Tensor] = {}
    for t in range(STEPS - 1):
        state = path.state_at(order >= t, torch.full((len(order),), t))
        state.memory = memory
        total = total + prior.distribution(state).log_prob(order == t)
    assert torch.allclose(law.log_prob(order), total, atol=1e-5)
