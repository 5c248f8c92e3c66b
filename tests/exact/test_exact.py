"""Bounds and gradients of every enumerable (model, guide) pair against sums over all orders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from torch import Tensor, nn

from orderppl import Batch, UserError
from orderppl.guides import PolicyGuide
from orderppl.inference import RevealTraceGraph_ELBO
from orderppl.inference.exact import all_orders, exact_elbo, exact_evidence, exact_terms
from orderppl.models import LearnedPolicy, UnmaskingModel
from orderppl.models.denoisers import MarkovChainDenoiser
from orderppl.policies import RandomSteps
from orderppl.policies.schedules import UniformSizes

from programs import (
    CANVASES,
    GUIDES,
    LENGTH,
    MODELS,
    PAIRS,
    VOCAB,
    PlaceTable,
    StateTable,
    TableDenoiser,
    copies,
    flat_gradient,
    is_finite_pair,
    largest_z,
    learned,
    make_batch,
    make_pair,
)

HARD = ["padded", "scattered", "prompted", "long_prompt"]  # canvases with padding, or with given positions too
# By default, every pair with every number of steps, each on one canvas.
EVERYWHERE = [
    pytest.param(
        *pair,
        canvas,
        steps,
        marks=[] if (number + steps) % len(HARD) == place else [pytest.mark.slow],
        id=f"{'-'.join(pair)}-{canvas}-{steps}",
    )
    for number, pair in enumerate(PAIRS)
    for place, canvas in enumerate(HARD)
    for steps in (1, 2, 3)
]
IN_THREE_STEPS = [each for each in EVERYWHERE if each.values[-1] == 3]
# The gradient of every pair is checked, each on one canvas; by default those of every policy as its own guide, of every
# guide beside one model, and of the one model beside every guide.
GRADIENTS = [
    pytest.param(
        *pair,
        HARD[number % len(HARD)],
        marks=[] if pair[1] == "policy" or pair[0] == "learned" else [pytest.mark.slow],
        id="-".join(pair),
    )
    for number, pair in enumerate(PAIRS)
]


@pytest.fixture(autouse=True)
def local_parameters() -> Iterator[None]:
    with pyro.settings.context(module_local_params=True):
        yield


def drawn(elbo: Any, model: nn.Module, guide: nn.Module, batch: Batch, over: list[Tensor]) -> Tensor:
    """Value of the bound and its gradient, float [1 + P], by one call."""
    if hasattr(elbo, "differentiable_loss"):
        value = -elbo.differentiable_loss(model, guide, batch)
        return torch.cat([value.detach()[None], flat_gradient(value, over)])
    for p in over:
        p.grad = None
    value = -elbo.loss_and_grads(model, guide, batch)  # stock TraceGraph_ELBO has no differentiable_loss
    return torch.cat(
        [torch.tensor([value]), *((0 * p if p.grad is None else -p.grad).detach().flatten() for p in over)]
    )


def assert_unbiased(
    elbo: Any, model: nn.Module, guide: nn.Module, batch: Batch, calls: int = 60, times: int = 1, weight: float = 1.0
) -> None:
    """Value and gradient of independent calls on copies of a batch against the sums over all orders: |z| < 5.

    Of a coordinate with rare, large gradients few calls miss the spread: what fails is tried again with ten times as
    many new ones, where a bias would only show more.
    """
    if z_score(elbo, model, guide, batch, calls, times, weight) >= 5:
        assert z_score(elbo, model, guide, batch, 10 * calls, times, weight) < 5


def z_score(
    elbo: Any, model: nn.Module, guide: nn.Module, batch: Batch, calls: int = 60, times: int = 1, weight: float = 1.0
) -> float:
    over, many = learned(model, guide), copies(batch, times) if times > 1 else batch
    exact = exact_elbo(model, guide, all_orders(guide, many), many, weight).sum()
    wanted = torch.cat([exact.detach()[None], flat_gradient(exact, over)])
    sample = torch.stack([drawn(elbo, model, guide, many, over) for _ in range(calls)])
    return largest_z(sample / times, wanted / times)


# ---- sets of numbers that have to be normal


@pytest.mark.parametrize(("model", "guide", "canvas", "num_steps"), EVERYWHERE)
def test_elbo_is_below_evidence(model: str, guide: str, canvas: str, num_steps: int):
    program, guide_program = make_pair(model, guide, num_steps)
    batch = make_batch(canvas)
    orders = all_orders(guide_program, batch)
    evidence = exact_evidence(program, orders, batch)
    elbo = exact_elbo(program, guide_program, orders, batch)
    assert torch.isfinite(elbo).all()
    assert (elbo <= evidence + 1e-4).all()


@pytest.mark.parametrize("model", MODELS)
def test_a_guide_that_the_prior_forbids_has_an_infinite_bound(model: str):
    """Exactly the pairs that are left out: in some row the guide has orders that the prior cannot have."""
    batch = make_batch("padded")
    for guide in ("random", "mean_field", "plan", "renormalised"):  # others may happen to fit
        if not is_finite_pair(guide, model):
            program, guide_program = make_pair(model, guide, 3)
            elbo = exact_elbo(program, guide_program, all_orders(guide_program, batch), batch)
            assert (elbo == -torch.inf).any(), guide


@pytest.mark.parametrize("canvas", CANVASES)
@pytest.mark.parametrize("model", MODELS)
def test_priors_over_orders_sum_to_one(model: str, canvas: str):
    program, _ = make_pair(model, "random", num_steps=3)
    batch = make_batch(canvas)
    orders = all_orders(PolicyGuide(RandomSteps(), program.denoiser, 3), batch)
    mass = exact_evidence(poutine.block(program, expose=["reveal_step"]), orders, batch)
    torch.testing.assert_close(mass, torch.zeros_like(mass), atol=1e-4, rtol=0)


@pytest.mark.parametrize("canvas", CANVASES)
@pytest.mark.parametrize("guide", GUIDES)
def test_guides_over_orders_sum_to_one(guide: str, canvas: str):
    _, program = make_pair("learned", guide, num_steps=3)
    batch = make_batch(canvas)
    mass = exact_evidence(program, all_orders(program, batch), batch)
    torch.testing.assert_close(mass, torch.zeros_like(mass), atol=1e-4, rtol=0)


@pytest.mark.parametrize("canvas", ["plain", "scattered"])
@pytest.mark.parametrize("model", MODELS)
def test_bound_is_tight_at_the_exact_posterior(model: str, canvas: str):
    """log p(x, r) - log p(r | x) is the evidence for every order, whatever the prior."""
    program, _ = make_pair(model, "policy", num_steps=2)
    batch = make_batch(canvas)
    random = PolicyGuide(RandomSteps(), program.denoiser, 2)
    orders = all_orders(random, batch)
    evidence = exact_evidence(program, orders, batch)
    terms = exact_terms(program, random, orders, batch)
    joint, posterior = terms.log_joint(), terms.posterior()
    possible = joint > -torch.inf
    assert torch.allclose((joint - posterior.log())[possible], evidence.expand_as(joint)[possible], atol=1e-4)
    assert torch.allclose(posterior.sum(0), torch.ones(len(batch)), atol=1e-5)


@pytest.mark.parametrize("canvas", CANVASES)
def test_what_is_given_is_never_revealed_nor_scored(canvas: str):
    """The joint of every order is that of the row with its own positions alone, whatever stands at padding."""
    program, guide = make_pair("learned", "other_policy", num_steps=3)
    batch = make_batch(canvas)
    orders = all_orders(guide, batch)
    proper = ((orders >= 0) == batch.latent).all(-1)  # [N, B]
    assert proper.sum(0).tolist() == (3 ** batch.latent.sum(-1)).tolist()  # each once
    possible = exact_terms(program, guide, orders, batch).log_guide > -torch.inf
    assert not (possible & ~proper).any()
    likelihood = exact_terms(program, guide, orders, batch).log_likelihood
    garbled = replace(batch, tokens=torch.where(batch.attention_mask, batch.tokens, 99))
    assert torch.equal(exact_terms(program, guide, orders, garbled).log_likelihood, likelihood)
    hidden, mask = batch.readable.clone(), program.denoiser.mask_index
    hidden[batch.latent] = mask
    logits = program.denoiser(hidden, batch.attention_mask).log_softmax(-1)
    by_hand = logits.gather(-1, batch.readable[..., None])[..., 0].masked_fill(~batch.latent, 0.0).sum(-1)
    at_once = (orders <= 0).all(-1) & proper  # everything in the first step
    assert (at_once.sum(0) == 1).all()
    torch.testing.assert_close(likelihood.T[at_once.T], by_hand)


# ---- gradients


@pytest.mark.parametrize(("model", "guide", "canvas"), GRADIENTS)
def test_value_and_gradient_are_unbiased(model: str, guide: str, canvas: str):
    """60 calls of 128 particles for each pair; |z| < 5 in every coordinate."""
    program, guide_program = make_pair(model, guide, num_steps=3)
    assert_unbiased(RevealTraceGraph_ELBO(128), program, guide_program, make_batch(canvas))


PATHS = [
    ("uniform", "mean_field", "padded"),
    ("uniform", "mean_field", "scattered"),
    ("learned", "renormalised", "prompted"),
    ("residual", "policy", "scattered"),
    ("priced", "other_policy", "long_prompt"),
    ("priced_early_commit", "policy", "scattered"),
    ("price_range_commit", "policy", "prompted"),
    ("plan", "plan", "scattered"),
    ("learned", "plackett_luce", "scattered"),
    ("random_sizes", "plackett_luce", "long_prompt"),
    ("looking_back", "klass", "scattered"),
    ("blocks", "policy", "prompted"),
    ("eos_aware", "policy", "scattered"),
    ("uniform", "scan", "scattered"),
]


KINDS = ["no_control", "full_control", "tempered", "looped", "one_particle", "three", "stock", "one_step", "two_steps"]


@pytest.mark.parametrize(
    ("model", "guide", "canvas", "kind"),
    [
        pytest.param(*path, kind, marks=[] if (place + number) % 4 == 0 else [pytest.mark.slow])
        for place, path in enumerate(PATHS)
        for number, kind in enumerate(KINDS)
    ],
)
def test_every_gradient_path_is_unbiased(model: str, guide: str, canvas: str, kind: str):
    """60 calls of 64 particles, or of one or three on many copies of the batch; |z| < 5 in every coordinate."""
    elbo, times = {
        "no_control": (RevealTraceGraph_ELBO(64, control_variate=0), 1),
        "full_control": (RevealTraceGraph_ELBO(64, control_variate=1.0), 1),
        "tempered": (RevealTraceGraph_ELBO(64, kl_weight=0.3), 1),
        "looped": (RevealTraceGraph_ELBO(2, vectorize_particles=False), 32),
        "one_particle": (RevealTraceGraph_ELBO(1), 64),
        "three": (RevealTraceGraph_ELBO(3), 24),  # where a slope that looked at its own order would show
        "one_step": (RevealTraceGraph_ELBO(3, scored_steps=1), 24),
        "two_steps": (RevealTraceGraph_ELBO(64, scored_steps=2, control_variate=1.0), 1),
        "stock": (TraceGraph_ELBO(64, max_plate_nesting=1, vectorize_particles=True), 1),
    }[kind]
    program, guide_program = make_pair(model, guide, num_steps=3)
    weight = 0.3 if kind == "tempered" else 1.0
    assert_unbiased(elbo, program, guide_program, make_batch(canvas), times=times, weight=weight)


FROZEN = [
    ("learned", "policy"),
    ("uniform", "mean_field"),
    ("price_range", "policy"),
    ("price_range_commit", "policy"),
    ("learned", "posterior"),
    ("plan", "plan"),
    ("learned", "plackett_luce"),
    ("blocks", "policy"),
]


@pytest.mark.parametrize("canvas", ["scattered", pytest.param("prompted", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("model", "guide"), FROZEN)
def test_gradient_beside_a_frozen_denoiser_is_unbiased(model: str, guide: str, canvas: str):
    """60 calls of 64 particles; |z| < 5 in every coordinate."""
    program, guide_program = make_pair(model, guide, num_steps=3, frozen=True)
    assert_unbiased(RevealTraceGraph_ELBO(64), program, guide_program, make_batch(canvas))


@pytest.mark.parametrize("control", ["fitted", 0, 1.0])
@pytest.mark.parametrize(
    ("model", "guide", "frozen", "canvas"),
    [
        ("learned", "policy", False, "padded"),
        ("uniform", "mean_field", True, "scattered"),
        pytest.param("price_range", "policy", True, "prompted", marks=pytest.mark.slow),
    ],
)
def test_gradient_with_outliers_is_unbiased(model: str, guide: str, frozen: bool, canvas: str, control: Any):
    """60 calls of 64 particles, the likelihood of whole sequences mixed with outliers; |z| < 5 in every coordinate."""
    program, guide_program = make_pair(model, guide, 3, frozen, robustness=0.05)  # about that of three tokens of four
    elbo = RevealTraceGraph_ELBO(64, control_variate=control)
    assert_unbiased(elbo, program, guide_program, make_batch(canvas))


def test_outliers_enter_the_likelihood_of_whole_sequences():
    """log[(1 - e) p(x | r) + e] for every order, and the bound is that of the enumeration."""
    model, guide = make_pair("learned", "policy", num_steps=3)
    batch = make_batch("scattered")
    orders = all_orders(guide, batch)
    plain = exact_terms(model, guide, orders, batch).log_likelihood
    model.robustness = 0.25
    mixed = exact_terms(model, guide, orders, batch).log_likelihood
    torch.testing.assert_close(mixed, (0.75 * plain.exp() + 0.25).log())
    exact = exact_elbo(model, guide, orders, batch).sum().detach()
    elbo = RevealTraceGraph_ELBO(4000)
    with torch.no_grad():
        value = -elbo.differentiable_loss(model, guide, batch)
    assert abs(float(value - exact)) < 0.1  # 4,000 orders whose terms have a standard deviation below 1.5: |z| < 5
    torch.testing.assert_close(elbo.metrics["elbo"] * len(batch), value, atol=1e-3, rtol=0)


def test_expected_tokens_are_scored_alike_on_average_where_the_denoiser_is_exact():
    """For every order, over all sequences of a chain, each with its probability; and with far less variance."""
    denoiser = MarkovChainDenoiser(2, 0.8, 4)
    tokens = torch.cartesian_prod(*[torch.arange(2)] * 4)  # [16, 4]
    batch = Batch(tokens)
    weight = denoiser.log_evidence(tokens).exp().float()
    model = UnmaskingModel(denoiser, RandomSteps(), 2)
    guide = PolicyGuide(RandomSteps(), denoiser, 2)
    orders = all_orders(guide, batch)
    plain = exact_terms(model, guide, orders, batch).log_likelihood  # [N, 16]
    model.expected = True
    expected = exact_terms(model, guide, orders, batch).log_likelihood
    torch.testing.assert_close((expected * weight).sum(-1), (plain * weight).sum(-1))
    assert (expected.var(0) * weight).sum() < (plain.var(0) * weight).sum() / 2  # of the orders of one sequence


def test_gradient_with_expected_tokens_is_unbiased():
    """60 calls of 64 particles; |z| < 5 in every coordinate."""
    program, guide_program = make_pair("learned", "policy", 3, frozen=False, expected=True)
    assert_unbiased(RevealTraceGraph_ELBO(64), program, guide_program, make_batch("scattered"))


def every_second(tokens: Tensor, latent: Tensor) -> Tensor:
    """An answer at every second position to reveal: bool [*, S]."""
    return (latent.cumsum(-1) % 2 == 0) & latent


@pytest.mark.parametrize("robustness", [0.0, 0.05])
@pytest.mark.parametrize(
    ("model", "guide", "frozen", "canvas"),
    [
        ("learned", "policy", False, "padded"),
        ("uniform", "mean_field", True, "scattered"),
        ("price_range", "policy", True, "prompted"),
        ("price_range_commit", "policy", True, "scattered"),
    ],
)
def test_gradient_with_an_answer_is_unbiased(model: str, guide: str, frozen: bool, canvas: str, robustness: float):
    """60 calls of 64 particles where part of a sequence is wanted; |z| < 5 in every coordinate."""
    options = {"answer": every_second, "robustness": robustness}
    program, guide_program = make_pair(model, guide, 3, frozen, **options)
    assert_unbiased(RevealTraceGraph_ELBO(64), program, guide_program, make_batch(canvas))


@pytest.mark.parametrize("canvas", ["plain", "prompted", "scattered"])
def test_what_is_revealed_with_the_answer_or_later_is_summed_out(canvas: str):
    """For every order, log p of the answer and of what stands before it equals the sum over all other tokens."""
    model, guide = make_pair("learned", "policy", num_steps=3)
    batch = make_batch(canvas)
    orders, tokens = all_orders(guide, batch), batch.readable
    wanted = every_second(tokens, batch.latent)
    last = torch.where(wanted, orders, -1).amax(-1, keepdim=True)
    observed = wanted | (orders < last)  # [N, B, S]
    size = tokens.shape[-1]
    total = torch.full(orders.shape[:-1], -torch.inf)
    for filled in torch.cartesian_prod(*[torch.arange(VOCAB)] * size):  # [V^S, S]
        completed = torch.where(batch.latent, filled, tokens)
        met_before = (completed != filled).any(-1)  # the same completion of what is to be revealed, again
        plain = exact_terms(model, guide, orders, replace(batch, tokens=completed)).log_likelihood  # [N, B]
        same = ((completed == tokens) | ~observed).all(-1) & ~met_before
        total = torch.logaddexp(total, plain.masked_fill(~same, -torch.inf))
    model.answer = every_second
    found = exact_terms(model, guide, orders, batch).log_likelihood
    proper = ((orders >= 0) == batch.latent).all(-1)  # others have probability 0
    torch.testing.assert_close(found[proper], total[proper], atol=1e-4, rtol=1e-4)
    model.answer = lambda tokens, latent: latent  # nothing is summed out
    everything = exact_terms(model, guide, orders, batch).log_likelihood
    model.answer = None
    torch.testing.assert_close(everything[proper], exact_terms(model, guide, orders, batch).log_likelihood[proper])


@pytest.mark.parametrize(
    ("model", "guide", "frozen", "canvas"),
    [
        ("learned", "policy", False, "scattered"),
        ("uniform", "mean_field", False, "prompted"),
        ("price_range_commit", "policy", True, "scattered"),
    ],
)
def test_gradient_at_another_temperature_is_unbiased(model: str, guide: str, frozen: bool, canvas: str):
    """60 calls of 64 particles, tokens at temperature 0.4; |z| < 5 in every coordinate."""
    program, guide_program = make_pair(model, guide, 3, frozen, temperature=0.4)
    assert_unbiased(RevealTraceGraph_ELBO(64), program, guide_program, make_batch(canvas))


def test_the_likelihood_has_the_temperature_of_the_tokens():
    """For every order as with logits divided by it; towards 0 it is 0 or -inf, whether tokens are the most likely."""
    model, guide = make_pair("learned", "policy", num_steps=3)
    batch = make_batch("scattered")
    orders = all_orders(guide, batch)
    model.temperature = 0.4
    cold = exact_terms(model, guide, orders, batch).log_likelihood
    trajectory = poutine.trace(model).get_trace(batch).nodes["tokens"]["fn"].trajectory
    state = trajectory.states
    attended = batch.attention_mask.expand(state.tokens.shape).flatten(0, -2)
    logits = model.denoiser(state.tokens.flatten(0, -2), attended).reshape(*state.tokens.shape, VOCAB)
    index = batch.readable.expand(state.tokens.shape)[..., None]
    by_hand = (logits / 0.4).log_softmax(-1).gather(-1, index)[..., 0].masked_fill(~state.masked, 0.0)
    torch.testing.assert_close(trajectory.token_log_prob(temperature=0.4), by_hand)
    torch.testing.assert_close(state.token_log_prob(batch.tokens, 0.4), by_hand)
    assert not torch.allclose(state.token_log_prob(batch.tokens), by_hand)
    model.temperature = 1e-4
    coldest = exact_terms(model, guide, orders, batch).log_likelihood
    assert (coldest <= 1e-4).all() and ((coldest > -1e-4) | (coldest < -10)).all()
    assert not torch.allclose(cold, coldest)


@pytest.mark.parametrize(
    ("option", "value"),
    [("temperature", 0.0), ("robustness", 1.0), ("robustness", -0.1), ("step_price", -1.0), ("num_steps", 0)],
)
def test_settings_no_model_can_have_are_refused(option: str, value: float):
    settings = {"num_steps": 3} | {option: value}
    with pytest.raises(UserError, match=f"^{option}: "):
        UnmaskingModel(TableDenoiser(), RandomSteps(), **settings)


def test_the_check_notices_a_biased_gradient():
    """The same z-score on a surrogate with the score function's sign reversed, and on slopes of all orders."""

    class SignError(RevealTraceGraph_ELBO):
        def _advantage(self, cost: Tensor, baseline: Tensor, masked: Tensor) -> Tensor:
            return -super()._advantage(cost, baseline, masked)

    class OwnOrderToo(RevealTraceGraph_ELBO):
        """Fits the coefficient of the control variate to all orders, its own included."""

        def _advantage(self, cost: Tensor, baseline: Tensor, masked: Tensor) -> Tensor:
            cost, baseline = torch.broadcast_tensors(cost, baseline)
            cost, baseline = cost - cost.mean(1, keepdim=True), baseline - baseline.mean(1, keepdim=True)
            slope = (cost * baseline).sum(1, keepdim=True) / baseline.square().sum(1, keepdim=True).clamp(min=1e-9)
            return (cost - slope.clamp(0, 1) * baseline) * 3 / 2

    model, guide = make_pair("uniform", "mean_field", num_steps=3, frozen=True)
    assert z_score(SignError(64), model, guide, make_batch("scattered"), calls=100) > 5
    assert z_score(OwnOrderToo(3), model, guide, make_batch("scattered"), times=100) > 5
    assert z_score(RevealTraceGraph_ELBO(3), model, guide, make_batch("scattered"), times=100) < 5


# ---- Pyro's own machinery on the same pairs


@pytest.mark.parametrize("canvas", ["plain", "scattered", "prompted"])
@pytest.mark.parametrize("model", ["uniform", "cosine", "may_wait"])
def test_pyro_enumeration_agrees(model: str, canvas: str):
    """TraceEnum_ELBO over the model's site is the evidence; over the guide's site it is our exact ELBO."""
    program, guide = make_pair(model, "mean_field", num_steps=2)
    batch = make_batch(canvas)
    if canvas != "plain":  # repeats of an order have probability 0 there, which Pyro's sum turns into NaN
        batch = Batch(batch.tokens[:, batch.latent.all(0)]) if bool(batch.latent.all(0).any()) else make_batch("plain")
    orders = all_orders(guide, batch)
    enum = TraceEnum_ELBO(max_plate_nesting=1)
    evidence = -enum.loss(config_enumerate(program), lambda *_: None, batch)
    assert evidence == pytest.approx(exact_evidence(program, orders, batch).sum().item(), abs=1e-3)
    elbo = -enum.loss(program, config_enumerate(guide), batch)
    assert elbo == pytest.approx(exact_elbo(program, guide, orders, batch).sum().item(), abs=1e-3)


@pytest.mark.parametrize(("model", "guide", "canvas", "num_steps"), IN_THREE_STEPS)
def test_every_guide_parameter_gets_a_gradient(model: str, guide: str, canvas: str, num_steps: int):
    program, guide_program = make_pair(model, guide, num_steps)
    loss = RevealTraceGraph_ELBO(64)(program, guide_program)(make_batch(canvas))
    loss.backward()
    for name, parameter in guide_program.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_loss_forms_agree():
    """`loss`, `differentiable_loss` and `loss_and_grads` see the same draws and give the same value."""
    model, guide = make_pair("learned", "renormalised", num_steps=3)
    batch, elbo = make_batch("scattered"), RevealTraceGraph_ELBO(4)
    values = []
    for call in (elbo.loss, elbo.differentiable_loss, elbo.loss_and_grads):
        pyro.set_rng_seed(3)
        values.append(float(torch.as_tensor(call(model, guide, batch)).detach()))
    assert values[0] == pytest.approx(values[1], abs=1e-4) == pytest.approx(values[2], abs=1e-4)


@pytest.mark.parametrize("canvas", ["padded", pytest.param("scattered", marks=pytest.mark.slow)])
def test_leave_one_out_cuts_the_variance_of_stock_trace_graph(canvas: str):
    """200 calls each of 4 particles: our default against stock TraceGraph_ELBO, at least 10 times less variance."""
    model, guide = make_pair("uniform", "mean_field", num_steps=3, frozen=True)
    batch, over = make_batch(canvas), list(guide.parameters())

    def variance(elbo: Any) -> float:
        draws = []
        for _ in range(200):
            guide.zero_grad()
            elbo.loss_and_grads(model, guide, batch)
            draws.append(torch.cat([p.grad.flatten() for p in over]))
        return torch.stack(draws).var(0).sum().item()

    stock = variance(TraceGraph_ELBO(4, max_plate_nesting=1, vectorize_particles=True))
    assert variance(RevealTraceGraph_ELBO(4)) < stock / 10


@pytest.mark.parametrize(
    ("model", "guide", "canvas"),
    [("uniform", "mean_field", "padded"), ("learned", "policy", "scattered"), ("plan", "plan", "prompted")],
)
def test_stock_svi_trains_the_same_pair(model: str, guide: str, canvas: str):
    """Plain pyro.infer.SVI with stock TraceGraph_ELBO raises the exact ELBO of the pair (README's paragraph)."""
    with pyro.settings.context(module_local_params=False):
        program, guide_program = make_pair(model, guide, num_steps=2)
        program.denoiser.eval().requires_grad_(False)
        batch = make_batch(canvas)
        orders = all_orders(guide_program, batch)
        before = exact_elbo(program, guide_program, orders, batch).sum().item()
        svi = SVI(
            program,
            guide_program,
            pyro.optim.Adam({"lr": 0.05}),
            TraceGraph_ELBO(8, max_plate_nesting=1, vectorize_particles=True),
        )
        for _ in range(200):
            svi.step(batch)
        after = exact_elbo(program, guide_program, orders, batch).sum().item()
        evidence = exact_evidence(program, orders, batch).sum().item()
    assert before + 0.2 < after <= evidence + 1e-4


@pytest.mark.parametrize(
    ("model", "guide", "canvas"),
    [
        ("may_wait", "mean_field", "padded"),
        ("priced_early_commit", "blocks", "scattered"),
        ("price_range_commit", "policy", "prompted"),
    ],
)
def test_stock_elbos_agree_in_value(model: str, guide: str, canvas: str):
    """Trace_ELBO and TraceGraph_ELBO estimate the exact ELBO; 4,000 particles, |z| < 5."""
    program, guide_program = make_pair(model, guide, num_steps=3)
    batch = make_batch(canvas)
    exact = exact_elbo(program, guide_program, all_orders(guide_program, batch), batch).sum().item()
    for kind in (Trace_ELBO, TraceGraph_ELBO, RevealTraceGraph_ELBO):
        elbo = kind(400, max_plate_nesting=1, vectorize_particles=True)
        values = torch.tensor([-elbo.loss(program, guide_program, batch) for _ in range(10)])
        assert abs(values.mean().item() - exact) < 5 * (values.std().item() / 10**0.5) + 1e-3


@pytest.mark.parametrize("model", ["plan", "learned", "looking_back", "early_commit", "random_sizes", "blocks"])
def test_a_tied_pair_has_no_divergence(model: str):
    """One policy in both roles: the KL is zero in value and gradient."""
    program, guide = make_pair(model, "policy", num_steps=3)
    assert guide.policy is program.policy
    elbo = RevealTraceGraph_ELBO(4)
    elbo(program, guide)(make_batch("scattered"))
    assert elbo.metrics["kl"].item() == pytest.approx(0, abs=1e-6)


def test_sizes_of_a_guide_and_a_prior_count_the_same_positions():
    """One position a step on both sides, with given positions between: a finite KL, that of the rankings."""
    program, guide = make_pair("priced_one_each", "one_each", num_steps=LENGTH)
    assert isinstance(guide.sizes, UniformSizes)
    batch = make_batch("scattered")
    terms = exact_terms(program, guide, all_orders(guide, batch), batch)
    counts = (terms.log_guide > -torch.inf).sum(0)
    factorial = torch.tensor([1, 1, 2, 6])[batch.latent.sum(-1)]
    assert torch.equal(counts, factorial)
    assert torch.isfinite(terms.elbo()).all()


def test_a_policy_is_a_distribution_of_the_visible_only():
    """The prior's density of an order does not change with tokens that are hidden whenever the policy decides."""
    model, guide = make_pair("learned", "random", num_steps=2)
    assert isinstance(model.policy, LearnedPolicy) and isinstance(model.policy.network, StateTable)
    batch = make_batch("scattered")
    changed = replace(batch, tokens=torch.where(batch.latent, (batch.tokens + 1) % VOCAB, batch.tokens))
    order = torch.where(batch.latent, 0, -1)[None]
    values = [exact_terms(model, guide, order, each) for each in (batch, changed)]
    torch.testing.assert_close(values[0].log_prior, values[1].log_prior)
    assert not torch.allclose(values[0].log_likelihood, values[1].log_likelihood)
    assert PlaceTable(2)(batch).shape == (*batch.tokens.shape, 2)
