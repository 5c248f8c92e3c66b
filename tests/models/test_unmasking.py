"""The stacked and the sequential program: one joint, exact samples, padding, prompts, denoiser calls."""

from __future__ import annotations

import itertools

import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

from orderppl.denoising import Canvas
from orderppl.guides import PolicyGuide, RandomGuide, RenormalisedScoreGuide
from orderppl.inference import RevealTraceGraph_ELBO, exact_evidence
from orderppl.inference.exact import all_orders
from orderppl.models import (
    EasyFirst,
    LearnedPolicy,
    LearnedSteps,
    LogitPrior,
    RevealPrior,
    SequentialUnmaskingModel,
    StepPrice,
    UniformSteps,
    UnmaskingModel,
)
from orderppl.path import RevealPath

from programs import LENGTH, PRIORS, VOCAB, StateTable, TableDenoiser, TokenTable, make_batch

STEPS = 3
every_prior = pytest.mark.parametrize("name", sorted(PRIORS))


@pytest.fixture(autouse=True)
def local_parameters():
    with pyro.settings.context(module_local_params=True):
        yield


class PromptDenoiser(nn.Module):
    """Reads the whole canvas: every logit depends on all attended tokens and their places, counted as they are seen."""

    mask_index = VOCAB
    vocab_size = VOCAB

    def __init__(self, classes: int = VOCAB) -> None:
        super().__init__()
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


def log_joint(program: nn.Module, data: dict[str, Tensor], **batch: Tensor) -> Tensor:
    """log p(x, r) of each sequence, [B]."""
    with poutine.trace() as tracer, poutine.condition(data=data):  # not wrapped: that clashes with `context`
        program(**batch)
    tracer.trace.compute_log_prob()
    return sum(site["log_prob"] for site in tracer.trace.nodes.values() if site["type"] == "sample")


def as_sets(order: Tensor, num_steps: int = STEPS) -> dict[str, Tensor]:
    """The order as the values of the sequential program's sites."""
    return {f"reveal_{t}": order == t for t in range(num_steps - 1)}


def make_programs(prior: RevealPrior, denoiser: nn.Module | None = None, num_steps: int = STEPS):
    denoiser = TableDenoiser() if denoiser is None else denoiser
    return UnmaskingModel(denoiser, prior, num_steps), SequentialUnmaskingModel(denoiser, prior, num_steps)


@pytest.mark.parametrize("num_steps", [1, 2, 3])
@every_prior
def test_both_programs_have_one_joint(name: str, num_steps: int):
    """For all orders of a padded batch, those of probability zero included."""
    stacked, sequential = make_programs(PRIORS[name](num_steps), num_steps=num_steps)
    batch = make_batch()
    for order in all_orders(RandomGuide(num_steps), **batch):
        proper = ((order >= 0) == batch["attention_mask"]).all(-1)  # padding repeats some orders with no mass
        one = log_joint(stacked, {"reveal_step": order}, **batch)
        other = log_joint(sequential, as_sets(order, num_steps), **batch)
        assert torch.allclose(one[proper], other[proper], atol=1e-4)
        assert one[~proper].isinf().all()


@every_prior
def test_rows_that_are_finished_contribute_nothing(name: str):
    """All at the first step: what comes after adds 0, so the joint is that of the first step."""
    prior = PRIORS[name](STEPS)
    _, sequential = make_programs(prior)
    batch = make_batch()
    order = torch.where(batch["attention_mask"], 0, -1)
    trace = poutine.trace(poutine.condition(sequential, data=as_sets(order))).get_trace(**batch)
    trace.compute_log_prob()
    for t in range(1, STEPS):
        for site in ("reveal", "tokens"):
            if f"{site}_{t}" in trace.nodes:
                assert (trace.nodes[f"{site}_{t}"]["log_prob"] == 0).all(), (site, t)


@pytest.mark.parametrize("name", ["uniform", "left_to_right", "easy_first", "learned_policy", "may_wait_policy"])
def test_generated_sequences_follow_the_exact_evidence(name: str):
    """n = 40,000 samples of the unconditioned sequential program: frequency of every x against p(x), |z| < 5."""
    n = 40_000
    stacked, sequential = make_programs(PRIORS[name](STEPS))
    sequences = torch.tensor(list(itertools.product(range(VOCAB), repeat=LENGTH)))  # [V**L, L]
    orders = all_orders(RandomGuide(STEPS), tokens=sequences)
    with torch.no_grad():
        expected = exact_evidence(stacked, orders, tokens=sequences).exp()
        assert expected.sum().item() == pytest.approx(1, abs=1e-4)
        drawn = poutine.uncondition(sequential)(torch.zeros(n, LENGTH, dtype=torch.int64))
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


def test_generated_tokens_ignore_the_given_ones_and_keep_padding():
    _, sequential = make_programs(LearnedPolicy(StateTable()))
    batch = make_batch()
    drawn = []
    for tokens in (batch["tokens"], (batch["tokens"] + 1) % VOCAB):
        tokens = tokens.clone()
        tokens[-1, -1] = 2
        pyro.set_rng_seed(1)
        drawn.append(poutine.uncondition(sequential)(tokens, batch["attention_mask"]))
    assert torch.equal(*drawn)
    assert drawn[0][-1, -1] == 2


def test_posterior_predictive_of_the_stacked_program():
    """n = 20,000 draws of `tokens` at the true states of one order: marginals of each position, |z| < 5."""
    n = 20_000
    stacked, _ = make_programs(UniformSteps())
    tokens = torch.tensor([[1, 3, 0]])
    order = torch.tensor([[2, 0, 1]])
    trace = poutine.trace(poutine.condition(stacked, data={"reveal_step": order})).get_trace(tokens)
    likelihood = trace.nodes["tokens"]["fn"]
    draws = likelihood.sample((n,))
    assert draws.shape == (n, 1, LENGTH)
    mask = VOCAB
    states = {1: [mask, mask, mask], 2: [mask, 3, mask], 0: [mask, 3, 0]}  # what is seen when position i is revealed
    for i, state in states.items():
        p = stacked.denoiser.table[tuple(state)][i].softmax(-1).detach()
        seen = torch.bincount(draws[:, 0, i], minlength=VOCAB) / n
        assert ((seen - p) / (p * (1 - p) / n).sqrt()).abs().max() < 5


@every_prior
def test_one_step_is_unbiased_in_value(name: str):
    """The mean of log p(x, r) over the T choices of the looked-at step is that of all steps."""
    prior = PRIORS[name](STEPS)
    prior = prior.at(0.5) if name.endswith("_range") else prior  # which prices are met depends on the batch
    stacked, _ = make_programs(prior)
    batch = make_batch()
    order = poutine.trace(stacked).get_trace(**batch).nodes["reveal_step"]["value"]
    exact = log_joint(stacked, {"reveal_step": order}, **batch)
    stacked.one_step = True
    n = 600
    repeated = {key: value.repeat(n, 1) for key, value in batch.items()}
    estimate = log_joint(stacked, {"reveal_step": order.repeat(n, 1)}, **repeated).reshape(n, 4)
    # Stratified over the batch, so the error is smaller than that of n independent draws.
    error = estimate.std(0) / n**0.5
    assert ((estimate.mean(0) - exact).abs() < 5 * error + 1e-4).all()
    assert (error > 1e-3).any()


def test_tokens_cannot_be_generated_from_one_step():
    model = UnmaskingModel(TableDenoiser(), UniformSteps(), STEPS, one_step=True)
    with pytest.raises(ValueError, match="one_step"):
        poutine.uncondition(model)(**make_batch())


@pytest.mark.parametrize("pad", [0, 3, VOCAB, VOCAB + 7])
@pytest.mark.parametrize(
    "name", ["uniform", "cosine", "left_to_right", "easy_first", "learned_steps", "priced_uniform"]
)
def test_padding_counts_nothing(name: str, pad: int):
    """Other ids at padding, even ones outside the vocabulary, change nothing in either program."""
    batch = make_batch()
    batch["tokens"][-1, -1] = 1
    padded = dict(batch, tokens=batch["tokens"].masked_fill(~batch["attention_mask"], pad))
    order = torch.tensor([[0, 1, 2], [1, 0, 2], [0, 0, 1], [0, 1, -1]])
    for program, data in zip(make_programs(PRIORS[name](STEPS)), ({"reveal_step": order}, as_sets(order)), strict=True):
        assert torch.equal(log_joint(program, data, **batch), log_joint(program, data, **padded))


def test_a_padded_row_is_the_shorter_sequence():
    """Prior and likelihood of a padded row are those of the row without its padding."""
    denoiser = PromptDenoiser()
    for prior in (UniformSteps(), EasyFirst(0.5)):
        for program, cut in zip(make_programs(prior, denoiser), (lambda r: {"reveal_step": r}, as_sets), strict=True):
            padded = log_joint(
                program,
                cut(torch.tensor([[1, 0, -1, -1]])),
                tokens=torch.tensor([[2, 3, 0, 0]]),
                attention_mask=torch.tensor([[True, True, False, False]]),
            )
            short = log_joint(program, cut(torch.tensor([[1, 0]])), tokens=torch.tensor([[2, 3]]))
            assert torch.allclose(padded, short, atol=1e-5)


def test_a_row_of_padding_contributes_nothing():
    batch = {"tokens": torch.zeros(2, LENGTH, dtype=torch.int64), "attention_mask": torch.zeros(2, LENGTH).bool()}
    for prior in (UniformSteps(), LearnedPolicy(StateTable())):
        stacked, sequential = make_programs(prior)
        order = torch.full((2, LENGTH), -1)
        assert (log_joint(stacked, {"reveal_step": order}, **batch) == 0).all()
        assert (log_joint(sequential, as_sets(order), **batch) == 0).all()


def test_prompts():
    """Visible from the start, read by the denoiser, never scored; their padding may stand left or right."""
    denoiser = PromptDenoiser()
    stacked, sequential = make_programs(EasyFirst(0.5), denoiser)
    tokens, order = torch.tensor([[1, 2, 3]]), torch.tensor([[0, 1, 2]])

    def both(**prompt: Tensor) -> Tensor:
        one = log_joint(stacked, {"reveal_step": order}, tokens=tokens, **prompt)
        other = log_joint(sequential, as_sets(order), tokens=tokens, **prompt)
        assert torch.allclose(one, other, atol=1e-5)
        return one

    plain = both(context=torch.tensor([[1, 2]]))
    assert denoiser.calls[0] == (STEPS, 5)  # the prompt stands before the response, once per state
    assert not torch.allclose(plain, both(context=torch.tensor([[2, 1]])))
    assert not torch.allclose(plain, both())
    for context, mask in (([1, 2], [1, 1]), ([1, 2, 0], [1, 1, 0]), ([0, 1, 2], [0, 1, 1]), ([1, 2, 3], [1, 1, 0])):
        padded = both(context=torch.tensor([context]), context_mask=torch.tensor([mask]).bool())
        assert torch.allclose(plain, padded, atol=1e-5)
    assert torch.allclose(both(), both(context=torch.tensor([[1]]), context_mask=torch.tensor([[False]])), atol=1e-5)


def test_mask_token_is_never_predicted():
    """A head with a class for MASK is renormalised without it."""
    denoiser = PromptDenoiser(VOCAB + 1)
    stacked, sequential = make_programs(EasyFirst(0.5), denoiser)
    drawn = poutine.uncondition(sequential)(torch.zeros(500, LENGTH, dtype=torch.int64))
    assert drawn.max() < VOCAB
    tokens, order = torch.tensor([[1, 2, 3]]), torch.tensor([[0, 0, 0]])
    logits = denoiser(torch.full((1, LENGTH), VOCAB), torch.ones(1, LENGTH, dtype=torch.bool))
    by_hand = logits[..., :VOCAB].log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).sum()
    trace = poutine.trace(poutine.condition(stacked, data={"reveal_step": order})).get_trace(tokens)
    assert torch.allclose(trace.nodes["tokens"]["fn"].log_prob(tokens), by_hand)


@pytest.mark.parametrize(("prior", "guide_calls"), [("uniform", 0), ("easy_first", STEPS)])
def test_denoiser_calls_of_a_policy_guide(prior: str, guide_calls: int):
    """The stacked program makes one call. After a policy that has read a frozen denoiser it makes none.

    The first state of a sequence is read once for its five particles.
    """
    denoiser = PromptDenoiser().requires_grad_(False)
    policy = PRIORS[prior](STEPS)
    batch = make_batch()
    loss = RevealTraceGraph_ELBO(5)(UnmaskingModel(denoiser, policy, STEPS), PolicyGuide(policy, denoiser, STEPS))
    loss(**batch)
    if guide_calls:
        assert denoiser.calls == [(4, LENGTH)] + [(5 * 4, LENGTH)] * (guide_calls - 1)
    else:
        assert denoiser.calls == [((1 + (STEPS - 1) * 5) * 4, LENGTH)]


def test_denoiser_calls_of_the_programs():
    """Stacked: one call, on one state per sequence and particle when it looks at one step. Sequential: T calls.

    Of all steps, the first state is the same for the five particles.
    """
    batch = make_batch()
    denoiser = PromptDenoiser()
    for prior in (UniformSteps(), EasyFirst(0.5)):
        stacked, sequential = make_programs(prior, denoiser)
        for stacked.one_step, states in ((False, 1 + (STEPS - 1) * 5), (True, 5)):
            denoiser.calls.clear()
            RevealTraceGraph_ELBO(5)(stacked, RenormalisedScoreGuide(TokenTable(1), STEPS))(**batch)
            assert denoiser.calls == [(states * 4, LENGTH)]
        denoiser.calls.clear()
        sequential(**batch)
        assert denoiser.calls == [(4, LENGTH)] * STEPS


def test_tied_plan_is_read_without_tokens():
    """LearnedSteps gives its network None for the tokens, in both programs."""
    seen = []

    class Plan(nn.Module):
        def forward(self, tokens, attention_mask, context, context_mask):
            seen.append((tokens, context))
            return torch.zeros(attention_mask.shape + (STEPS,))

    for program in make_programs(LearnedSteps(Plan()), PromptDenoiser()):
        program(torch.tensor([[1, 2, 3]]), context=torch.tensor([[3]]))
    assert len(seen) >= 2
    assert all(tokens is None and context.tolist() == [[3]] for tokens, context in seen)


class CountedPolicy(LogitPrior):
    """A learned policy that knows how often it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.calls = StateTable(), 0

    def logits(self, state):
        self.calls += 1
        return self.network(state)


def test_a_tied_policy_is_asked_once_per_choice():
    """Frozen denoiser: T - 1 times, while the order is drawn. Its KL is 0, or the price of the executed steps."""
    denoiser, policy, batch = PromptDenoiser().requires_grad_(False), CountedPolicy(), make_batch()
    guide = PolicyGuide(policy, denoiser, STEPS)
    for prior, price in ((policy, 0.0), (StepPrice(policy, 0.7), 0.7)):
        elbo = RevealTraceGraph_ELBO(5)
        drawn = []
        handle = guide.register_forward_hook(lambda module, inputs, out, drawn=drawn: drawn.append(out["reveal_step"]))
        policy.calls = 0
        with pyro.validation_enabled(False):
            elbo(UnmaskingModel(denoiser, prior, STEPS), guide)(**batch).backward()
        handle.remove()
        assert policy.calls == STEPS - 1
        executed = (drawn[0].amax(-1) + 1.0).mean()  # a policy that reveals something at every step leaves no gap
        assert torch.allclose(elbo.metrics["kl"], price * executed, atol=1e-5)
    assert policy.network.table.grad.abs().sum() > 0


def test_an_untied_policy_is_asked_anew():
    """Sets of another policy, or of the same one after an update, are never taken for its own."""
    denoiser, batch = PromptDenoiser().requires_grad_(False), make_batch()
    policy, other = CountedPolicy(), CountedPolicy()
    elbo, guide = RevealTraceGraph_ELBO(5), PolicyGuide(policy, denoiser, STEPS)
    elbo(UnmaskingModel(denoiser, other, STEPS), guide)(**batch)
    assert other.calls > 0
    assert elbo.metrics["kl"] > 0.01
    order = guide(**batch)["reveal_step"]
    path = RevealPath(Canvas(denoiser, batch["attention_mask"]), batch["tokens"], STEPS)
    before = policy(path).log_prob(order)
    with torch.no_grad():
        policy.network.table.add_(torch.randn_like(policy.network.table))
    assert not torch.allclose(before, policy(path).log_prob(order))


def test_a_step_by_step_trace_holds_no_logits():
    """Once scored, and never those of all steps."""
    _, sequential = make_programs(EasyFirst(0.5), PromptDenoiser())
    trace = poutine.trace(sequential).get_trace(**make_batch())
    states = [trace.nodes[f"tokens_{t}"]["fn"].base.state for t in range(STEPS)]
    assert not any({"logits", "log_probs"} & vars(state).keys() for state in states)
    trace.compute_log_prob()
    assert not any({"logits", "log_probs"} & vars(state).keys() for state in states)
