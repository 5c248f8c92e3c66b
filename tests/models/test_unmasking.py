"""The stacked and the sequential program: one joint, exact samples, padding, given positions, denoiser calls."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

from orderppl import Batch, Policy, State, UserError
from orderppl.distributions.order_distribution import PolicyOrder
from orderppl.guides import PolicyGuide, RenormalisedScoreGuide, SequentialGuide
from orderppl.inference import RevealTraceGraph_ELBO
from orderppl.inference.exact import all_orders, exact_evidence
from orderppl.models import LearnedPolicy, SequentialUnmaskingModel, UnmaskingModel
from orderppl.policies import Blocks, LogitPolicy, Oracle, Plan, RandomSteps, Ranked, Smoothed, Threshold
from orderppl.unmasking.trajectory import Path

from programs import (
    CANVASES,
    GUIDES,
    LENGTH,
    MODELS,
    VOCAB,
    WHOLE,
    PlaceTable,
    StateTable,
    TableDenoiser,
    TokenTable,
    TruthTable,
    copies,
    make_batch,
    make_guide,
)

STEPS = 3
POLICIES = [name for name, (_, options) in MODELS.items() if not options and name not in WHOLE]  # step by step
every_policy = pytest.mark.parametrize("name", POLICIES)
every_canvas = pytest.mark.parametrize("canvas", CANVASES)


@pytest.fixture(autouse=True)
def local_parameters() -> Iterator[None]:
    with pyro.settings.context(module_local_params=True):
        yield


class WholeDenoiser(nn.Module):
    """Reads the whole canvas: every logit depends on all attended tokens and their places, counted as they are seen."""

    mask_index = VOCAB
    vocab_size = VOCAB

    def __init__(self, classes: int = VOCAB) -> None:
        super().__init__()
        self.vocab_size = classes
        self.token = nn.Embedding(VOCAB + 1, 8)
        self.place = nn.Embedding(16, 8)
        self.head = nn.Linear(8, classes)
        self.calls: list[tuple[int, ...]] = []

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        self.calls.append(tuple(state.shape))
        place = (attention_mask.cumsum(-1) - 1).clamp_min(0)
        seen = self.token(torch.where(attention_mask, state, 0)) * self.place(place)
        seen = seen * attention_mask.unsqueeze(-1)
        return self.head((seen + seen.sum(-2, keepdim=True)).tanh())


def log_joint(program: nn.Module, data: dict[str, Tensor], batch: Batch | Tensor) -> Tensor:
    """log p(x, r) of each sequence, [B]."""
    with poutine.trace() as tracer, poutine.condition(data=data):
        program(batch)
    tracer.trace.compute_log_prob()
    return sum(site["log_prob"] for site in tracer.trace.nodes.values() if site["type"] == "sample")


def as_sets(order: Tensor, num_steps: int = STEPS) -> dict[str, Tensor]:
    """The order as the values of the sequential program's sites."""
    return {f"reveal_{t}": order == t for t in range(num_steps - 1)}


def make_programs(policy: Policy, denoiser: nn.Module | None = None, num_steps: int = STEPS):
    denoiser = TableDenoiser() if denoiser is None else denoiser
    return UnmaskingModel(denoiser, policy, num_steps), SequentialUnmaskingModel(denoiser, policy, num_steps)


def orders_of(batch: Batch, num_steps: int = STEPS) -> Tensor:
    return all_orders(PolicyGuide(RandomSteps(), TableDenoiser(), num_steps), batch)


@pytest.mark.parametrize(
    ("canvas", "num_steps"), [*((canvas, 3) for canvas in CANVASES), ("padded", 1), ("scattered", 2)]
)
@every_policy
def test_both_programs_have_one_joint(name: str, canvas: str, num_steps: int):
    """For all orders, those of probability zero included."""
    stacked, sequential = make_programs(MODELS[name][0](num_steps), num_steps=num_steps)
    batch = make_batch(canvas)
    orders = orders_of(batch, num_steps)
    one = log_joint(stacked, {"reveal_step": orders}, batch)
    other = log_joint(sequential, as_sets(orders, num_steps), batch).expand_as(one)
    proper = ((orders >= 0) == batch.latent).all(-1)  # padding and given positions repeat some orders with no mass
    torch.testing.assert_close(one[proper], other[proper], atol=1e-4, rtol=1e-5)
    assert one[~proper].isinf().all()


@pytest.mark.parametrize("canvas", ["padded", "scattered", "prompted"])
@pytest.mark.parametrize("guide", [name for name in GUIDES if name not in WHOLE])
def test_both_guides_have_one_density(guide: str, canvas: str):
    """For all orders; the sequential guide has a site per step."""
    stacked = make_guide(guide, LearnedPolicy(StateTable(), non_empty=False), TableDenoiser(), STEPS)
    batch = make_batch(canvas)
    orders = orders_of(batch)
    one = log_joint(stacked, {"reveal_step": orders}, batch)
    other = log_joint(SequentialGuide(stacked), as_sets(orders), batch)
    proper = ((orders >= 0) == batch.latent).all(-1)
    torch.testing.assert_close(one[proper], other[proper], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("canvas", ["padded", "scattered", "prompted"])
@every_policy
def test_rows_that_are_finished_contribute_nothing(name: str, canvas: str):
    """All at the first step: what comes after adds 0, so the joint is that of the first step."""
    _, sequential = make_programs(MODELS[name][0](STEPS))
    batch = make_batch(canvas)
    order = torch.where(batch.latent, 0, -1)
    trace = poutine.trace(poutine.condition(sequential, data=as_sets(order))).get_trace(batch)
    trace.compute_log_prob()
    for t in range(1, STEPS):
        for site in ("reveal", "tokens"):
            assert (trace.nodes[f"{site}_{t}"]["log_prob"] == 0).all(), (site, t)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("uniform", False),
        ("left_to_right", True),
        ("threshold", False),
        ("learned", True),
        ("may_wait", True),
        ("early_commit", True),
        ("looking_back", False),
        ("blocks", True),
        ("eos_aware", False),
    ],
)
def test_generated_sequences_follow_the_exact_evidence(name: str, given: bool):
    """n = 40,000 samples of the unconditioned sequential program: frequency of every x against p(x), |z| < 5.

    Also behind a given token, with another one inside: of p(x | given).
    """
    n, width = 40_000, LENGTH + 2 * given
    stacked, sequential = make_programs(MODELS[name][0](STEPS))
    everything = torch.tensor(list(itertools.product(range(VOCAB), repeat=LENGTH)))  # [V**L, L]
    fixed = torch.zeros(width, dtype=torch.bool)
    if given:
        fixed[[0, 2]] = True
    sequences = torch.full((len(everything), width), 3).masked_scatter(~fixed, everything)
    batch = Batch(sequences, given=fixed.expand_as(sequences))
    with torch.no_grad():
        expected = exact_evidence(stacked, orders_of(batch), batch).exp()
        assert expected.sum().item() == pytest.approx(1, abs=1e-4)
        empty = Batch(torch.where(fixed, 3, 0).expand(n, width), given=fixed.expand(n, width))
        drawn = poutine.uncondition(sequential)(empty)
    assert (drawn[:, fixed] == 3).all()
    drawn = drawn[:, ~fixed]
    assert drawn.min() >= 0
    assert drawn.max() < VOCAB  # nothing is left masked
    code = VOCAB ** torch.arange(LENGTH - 1, -1, -1)
    seen = torch.bincount((drawn * code).sum(-1), minlength=VOCAB**LENGTH) / n
    error = (expected * (1 - expected) / n).sqrt()
    often = expected * n > 10
    assert often.sum() > 30
    assert ((seen - expected) / error)[often].abs().max() < 5
    rare, p_rare = seen[~often].sum(), expected[~often].sum()
    assert abs(rare - p_rare) < 5 * (p_rare / n).sqrt() + 1e-6


def test_generated_tokens_ignore_what_is_to_be_revealed_and_keep_the_rest():
    _, sequential = make_programs(LearnedPolicy(StateTable()))
    batch = make_batch("scattered")
    drawn = []
    for shift in (0, 1):
        tokens = torch.where(batch.latent, (batch.tokens + shift) % VOCAB, batch.tokens)
        pyro.set_rng_seed(1)
        drawn.append(poutine.uncondition(sequential)(replace(batch, tokens=tokens)))
    assert torch.equal(*drawn)
    kept = batch.attention_mask & ~batch.latent
    assert torch.equal(drawn[0][kept], batch.tokens[kept])


def test_posterior_predictive_of_the_stacked_program():
    """n = 20,000 draws of `tokens` at the true states of one order: marginals of each position, |z| < 5."""
    n = 20_000
    stacked, _ = make_programs(RandomSteps())
    batch = Batch(torch.tensor([[1, 2, 3, 0]]), given=torch.tensor([[False, True, False, False]]))
    order = torch.tensor([[2, -1, 0, 1]])
    trace = poutine.trace(poutine.condition(stacked, data={"reveal_step": order})).get_trace(batch)
    draws = trace.nodes["tokens"]["fn"].sample((n,))
    assert draws.shape == (n, 1, 4)
    assert (draws[..., 1] == 2).all()  # given tokens stay what they are
    mask = VOCAB
    states = {2: [mask, 2, mask, mask], 3: [mask, 2, 3, mask], 0: [mask, 2, 3, 0]}  # seen when position i is revealed
    for i, state in states.items():
        logits = stacked.denoiser(torch.tensor([state]), torch.ones(1, 4, dtype=torch.bool))
        p = logits[0, i].softmax(-1).detach()
        seen = torch.bincount(draws[:, 0, i], minlength=VOCAB) / n
        assert ((seen - p) / (p * (1 - p) / n).sqrt()).abs().max() < 5


@every_canvas
def test_a_step_price_counts_executed_steps(canvas: str):
    """The joint less the price for each step up to the last one that reveals something."""
    batch = make_batch(canvas)
    for policy in (RandomSteps(), LearnedPolicy(StateTable(), non_empty=False)):
        plain, _ = make_programs(policy)
        orders = orders_of(batch)
        orders = torch.where(batch.latent, orders, -1)
        free = log_joint(plain, {"reveal_step": orders}, batch)
        plain.step_price = 0.7
        paid = log_joint(plain, {"reveal_step": orders}, batch)
        executed = orders.amax(-1) + 1.0
        torch.testing.assert_close(paid, free - 0.7 * executed)


@pytest.mark.parametrize("pad", [0, 3, VOCAB, VOCAB + 7, -100])
@pytest.mark.parametrize("canvas", ["padded", "scattered", "prompted", "long_prompt"])
@pytest.mark.parametrize("name", ["uniform", "cosine", "left_to_right", "threshold", "plan", "blocks", "early_commit"])
def test_padding_counts_nothing(name: str, canvas: str, pad: int):
    """Other ids at padding, even ones outside the vocabulary, change nothing in either program."""
    batch = make_batch(canvas)
    padded = replace(batch, tokens=batch.tokens.masked_fill(~batch.attention_mask, pad))
    order = RandomSteps().order(batch, TableDenoiser(), STEPS).sample()
    for program, data in zip(
        make_programs(MODELS[name][0](STEPS)), ({"reveal_step": order}, as_sets(order)), strict=True
    ):
        assert torch.equal(log_joint(program, data, batch), log_joint(program, data, padded))


@pytest.mark.parametrize("places", [[0, 1], [2, 3], [0, 3], [1, 2]])
def test_a_padded_row_is_the_shorter_sequence(places: list[int]):
    """Prior and likelihood of a padded row are those of the row without its padding, wherever that stands."""
    denoiser = WholeDenoiser()
    attended = torch.zeros(1, 4, dtype=torch.bool)
    attended[0, places] = True
    tokens = torch.zeros(1, 4, dtype=torch.int64).masked_scatter(attended, torch.tensor([2, 3]))
    order = torch.full((1, 4), -1).masked_scatter(attended, torch.tensor([1, 0]))
    for policy in (RandomSteps(), Threshold(0.5, temperature=1.0)):
        for program, cut in zip(make_programs(policy, denoiser), (lambda r: {"reveal_step": r}, as_sets), strict=True):
            padded = log_joint(program, cut(order), Batch(tokens, attended))
            short = log_joint(program, cut(torch.tensor([[1, 0]])), torch.tensor([[2, 3]]))
            torch.testing.assert_close(padded, short, atol=1e-5, rtol=0)


def test_a_row_with_nothing_to_reveal_contributes_nothing():
    """A row of padding, and one in which everything is given."""
    tokens = torch.zeros(2, LENGTH, dtype=torch.int64)
    attended = torch.tensor([[False] * LENGTH, [True] * LENGTH])
    batch = Batch(tokens, attended, attended)
    for policy in (RandomSteps(), LearnedPolicy(StateTable()), Blocks(Ranked("random"), 2), Smoothed(Ranked())):
        stacked, sequential = make_programs(policy)
        order = torch.full((2, LENGTH), -1)
        assert (log_joint(stacked, {"reveal_step": order}, batch) == 0).all()
        assert (log_joint(sequential, as_sets(order), batch) == 0).all()


def test_given_tokens():
    """Visible from the start, read by the denoiser, never scored; padding may stand anywhere between."""
    denoiser = WholeDenoiser()
    stacked, sequential = make_programs(Threshold(0.5, temperature=1.0), denoiser)

    def both(cells: str) -> Tensor:
        """Tokens to reveal in capitals A, B, C at steps 0, 1, 2, given ones as digits, padding as dots."""
        tokens = torch.tensor([["ABC".index(c) + 1 if c.isalpha() else int(c) if c.isdigit() else 0 for c in cells]])
        order = torch.tensor([["ABC".index(c) if c.isalpha() else -1 for c in cells]])
        attended = torch.tensor([[c != "." for c in cells]])
        batch = Batch(tokens, attended, attended & (order < 0))
        one = log_joint(stacked, {"reveal_step": order}, batch)
        other = log_joint(sequential, as_sets(order), batch)
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
        return one

    plain = both("12ABC")
    assert denoiser.calls[0] == (STEPS, 5)  # the canvas once per state
    assert not torch.allclose(plain, both("21ABC"))
    assert not torch.allclose(plain, both("ABC"))
    assert not torch.allclose(plain, both("1A2BC"))  # where a token stands matters
    for padded in ("12.ABC", ".12ABC", "1.2ABC", "12AB.C", "12ABC..", ".1.2.A.B.C."):
        torch.testing.assert_close(plain, both(padded), atol=1e-5, rtol=0)
    infilled = both("1A2BC3")
    for padded in ("1A.2BC3", "1A2.BC3", ".1A2BC.3"):
        torch.testing.assert_close(infilled, both(padded), atol=1e-5, rtol=0)


def test_mask_token_is_never_predicted():
    """A head with a class for MASK is renormalised without it."""
    denoiser = WholeDenoiser(VOCAB + 1)
    stacked, sequential = make_programs(Threshold(0.5, temperature=1.0), denoiser)
    drawn = poutine.uncondition(sequential)(torch.zeros(500, LENGTH, dtype=torch.int64))
    assert drawn.max() < VOCAB
    tokens, order = torch.tensor([[1, 2, 3]]), torch.tensor([[0, 0, 0]])
    logits = denoiser(torch.full((1, LENGTH), VOCAB), torch.ones(1, LENGTH, dtype=torch.bool))
    by_hand = logits[..., :VOCAB].log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).sum()
    trace = poutine.trace(poutine.condition(stacked, data={"reveal_step": order})).get_trace(tokens)
    assert torch.allclose(trace.nodes["tokens"]["fn"].log_prob(tokens), by_hand)


@pytest.mark.parametrize(("policy", "reads"), [("uniform", False), ("threshold", True), ("learned", True)])
@pytest.mark.parametrize("frozen", [False, True])
def test_denoiser_calls_of_a_policy_guide(policy: str, reads: bool, frozen: bool):
    """The stacked program makes one call. After a policy that has read the denoiser it makes one for the last state.

    The first state of a sequence is read once for its five particles.
    """
    denoiser = WholeDenoiser().requires_grad_(not frozen)
    prior, batch = MODELS[policy][0](STEPS), make_batch("scattered")
    rows, width = batch.tokens.shape
    loss = RevealTraceGraph_ELBO(5)(UnmaskingModel(denoiser, prior, STEPS), PolicyGuide(prior, denoiser, STEPS))
    with pyro.validation_enabled(False):
        loss(batch)
    if reads:
        assert denoiser.calls == [(rows, width)] + [(5 * rows, width)] * (STEPS - 1)
    else:
        assert denoiser.calls == [((1 + (STEPS - 1) * 5) * rows, width)]


def test_denoiser_calls_of_the_programs():
    """Stacked: one call. Sequential: T calls. Of all steps, the first state is the same for the five particles."""
    batch = make_batch("padded")
    denoiser = WholeDenoiser()
    for policy in (RandomSteps(), Threshold(0.5, temperature=1.0)):
        stacked, sequential = make_programs(policy, denoiser)
        denoiser.calls.clear()
        with pyro.validation_enabled(False):
            RevealTraceGraph_ELBO(5)(stacked, RenormalisedScoreGuide(TokenTable(1), STEPS))(batch)
        assert denoiser.calls == [((1 + (STEPS - 1) * 5) * 4, LENGTH)]
        denoiser.calls.clear()
        sequential(batch)
        assert sum(rows for rows, _ in denoiser.calls) <= 4 * STEPS


class CountedPolicy(LogitPolicy):
    """A learned policy that knows how often it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.calls = StateTable(), 0

    def logits(self, state: State) -> Tensor:
        self.calls += 1
        return self.network(state)


def test_a_tied_policy_is_asked_once_per_choice():
    """T - 1 times, while the order is drawn; its KL is 0, and what the steps cost is a term of the model."""
    denoiser, policy, batch = WholeDenoiser().requires_grad_(False), CountedPolicy(), make_batch("scattered")
    guide = PolicyGuide(policy, denoiser, STEPS)
    fits = []
    for price in (0.0, 0.7):
        elbo = RevealTraceGraph_ELBO(5)
        drawn: list[Tensor] = []
        handle = guide.register_forward_hook(lambda module, inputs, out, drawn=drawn: drawn.append(out["reveal_step"]))
        policy.calls = 0
        pyro.set_rng_seed(2)
        with pyro.validation_enabled(False):
            elbo(UnmaskingModel(denoiser, policy, STEPS, step_price=price), guide)(batch).backward()
        handle.remove()
        assert policy.calls == STEPS - 1
        executed = (drawn[0].amax(-1) + 1.0).mean()
        assert elbo.metrics["kl"].item() == 0
        assert elbo.metrics["steps"].item() == pytest.approx(executed.item())
        fits.append(elbo.metrics["log_likelihood"].item() + price * executed.item())
    assert fits[0] == pytest.approx(fits[1], abs=1e-4)
    assert policy.network.table.grad.abs().sum() > 0


def test_an_untied_policy_is_asked_anew():
    """Sets of another policy, or of the same one after an update, are never taken for its own."""
    denoiser, batch = WholeDenoiser().requires_grad_(False), make_batch("scattered")
    policy, other = CountedPolicy(), CountedPolicy()
    elbo, guide = RevealTraceGraph_ELBO(5), PolicyGuide(policy, denoiser, STEPS)
    elbo(UnmaskingModel(denoiser, other, STEPS), guide)(batch)
    assert other.calls > 0
    assert elbo.metrics["kl"] > 0.01
    order = guide(batch)["reveal_step"]
    before = policy.order(batch, denoiser, STEPS).log_prob(order)
    with torch.no_grad():
        policy.network.table.add_(torch.randn_like(policy.network.table))
    assert not torch.allclose(before, policy.order(batch, denoiser, STEPS).log_prob(order))


def test_a_step_by_step_trace_holds_no_logits():
    """Neither before it is scored nor after."""
    _, sequential = make_programs(Threshold(0.5, temperature=1.0), WholeDenoiser())
    trace = poutine.trace(sequential).get_trace(make_batch("scattered"))
    trace.compute_log_prob()
    states = [trace.nodes[f"tokens_{t}"]["fn"].base.state for t in range(STEPS)]
    assert not any({"states", "logits", "log_probs"} & vars(state.predictions).keys() for state in states)


def test_a_plan_is_shown_the_opening():
    """Given tokens and MASK: what a decoder knows before its first step, in both programs and as a guide."""
    seen: list[Any] = []

    class Network(nn.Module):
        def forward(self, opening: State) -> Tensor:
            seen.append(opening.tokens)
            return torch.zeros(opening.shape + (STEPS,))

    policy, denoiser, batch = Plan(Network()), WholeDenoiser(), make_batch("scattered")
    for program in (*make_programs(policy, denoiser), PolicyGuide(policy, denoiser, STEPS)):
        program(batch)
    assert len(seen) == 3
    for tokens in seen:
        assert torch.equal(tokens, torch.where(batch.latent, VOCAB, batch.readable))


@pytest.mark.parametrize("policy", [Oracle(), LearnedPolicy(TruthTable()), Blocks(Oracle("margin"), 2)])
def test_a_prior_that_reads_the_truth_is_refused(policy: Policy):
    """It would be no distribution of the order before the tokens; in both programs, and drawn or scored."""
    batch = make_batch("scattered")
    order = torch.where(batch.latent, 0, -1)
    for program, data in zip(make_programs(policy), ({"reveal_step": order}, as_sets(order)), strict=True):
        with pytest.raises((ValueError, AssertionError), match=r"true tokens|^$"):
            program(batch)
        with pytest.raises((ValueError, AssertionError), match=r"true tokens|^$"):
            log_joint(program, data, batch)


def test_what_users_hand_over():
    """A tensor, a mapping, a batch: the same joint; a key nobody knows is refused."""
    stacked, sequential = make_programs(LearnedPolicy(StateTable()))
    tokens, order = torch.randint(0, VOCAB, (4, LENGTH)), torch.tensor([[0, 1, 2]] * 4)
    for program, data in ((stacked, {"reveal_step": order}), (sequential, as_sets(order))):
        values = [log_joint(program, data, source) for source in (tokens, {"input_ids": tokens}, Batch(tokens))]
        assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])
        with pytest.raises(UserError, match="unknown entry 'attn_mask'"):
            log_joint(program, data, {"tokens": tokens, "attn_mask": torch.ones_like(tokens)})


def test_particles_of_the_sequential_program():
    """log p(r) by sites equals that of the stacked distribution, for a policy that looks back; particles differ."""
    policy, denoiser, batch = MODELS["looking_back"][0](STEPS), TableDenoiser(), make_batch("scattered")
    q = PolicyOrder(policy, Path(batch, denoiser, STEPS))
    order = q.sample((5,)).detach()
    with poutine.trace() as tracer, poutine.condition(data=as_sets(order)), pyro.plate("particles", 5, dim=-2):
        SequentialUnmaskingModel(denoiser, policy, STEPS)(batch)
    tracer.trace.compute_log_prob()
    by_site = sum(tracer.trace.nodes[f"reveal_{t}"]["log_prob"] for t in range(STEPS))
    torch.testing.assert_close(by_site, q.log_prob(order), atol=1e-5, rtol=0)
    assert q.log_prob(order)[:, 0].unique().numel() > 1  # particles went different ways


@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: Smoothed(p, 0.1), lambda p: Blocks(p, 2)])
def test_rows_do_not_influence_each_other(wrap: Callable[[Policy], Policy]):
    """A row's joint is the same in a larger batch, also of other rows."""
    stacked, _ = make_programs(wrap(LearnedPolicy(StateTable())))
    batch = make_batch("scattered")
    order = RandomSteps().order(batch, stacked.denoiser, STEPS).sample()
    one = log_joint(stacked, {"reveal_step": order}, batch)
    many = log_joint(stacked, {"reveal_step": order.repeat(3, 1)}, copies(batch, 3))
    torch.testing.assert_close(many, one.repeat(3), atol=1e-5, rtol=0)
    assert PlaceTable(2)(batch).shape[-1] == 2
