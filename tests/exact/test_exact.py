"""Bounds and gradients of every enumerable (model, guide) pair against sums over all orders."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from torch import Tensor

from orderppl.errors import UserError
from orderppl.guides import RandomGuide
from orderppl.inference import RelaxedELBO, RevealTraceGraph_ELBO, exact_elbo, exact_evidence
from orderppl.inference.exact import all_orders, exact_terms
from orderppl.models import UniformSteps, UnmaskingModel

from programs import GUIDES, LENGTH, PRIORS, VOCAB, TableDenoiser, TokenTable, is_finite_pair, make_batch, make_pair

PAIRS = [(prior, guide) for prior in PRIORS for guide in GUIDES if is_finite_pair(guide, prior)]
# The gradient of every pair is checked; by default, of the later guides and priors with some of the others.
BRIEF = {"uniform", "learned_policy", "fixed_sizes", "priced_one_each", "random", "policy", "one_each"}
LATER = {"posterior", "plackett_luce", "learned_schedule", "point", "oracle", "smoothed", "klass", "heuristic"}
LATER |= {"looking_back", "priced_looking_back", "priced_range", "residual_plan", "ranked_policy"}
GRADIENT_PAIRS = [
    pytest.param(*pair, marks=[pytest.mark.slow] if LATER & {*pair} and not BRIEF & {*pair} else []) for pair in PAIRS
]


@pytest.fixture(autouse=True)
def local_parameters():
    with pyro.settings.context(module_local_params=True):
        yield


def parameters(*modules: torch.nn.Module) -> list[Tensor]:
    return [p for p in dict.fromkeys(p for module in modules for p in module.parameters()) if p.requires_grad]


def gradient(value: Tensor, over: list[Tensor]) -> Tensor:
    grads = torch.autograd.grad(value, over, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, over, strict=True)])


def largest_z(model, guide, elbo, batch, replicates: int, kl_weight: float = 1.0) -> float:
    """Largest |z| of the mean gradient over `replicates` independent calls against the enumerated gradient."""
    over = parameters(model, guide)
    orders = all_orders(guide, **batch)
    model.one_step, one_step = False, model.one_step
    exact = gradient(exact_elbo(model, guide, orders, kl_weight, **batch).sum(), over)
    model.one_step = one_step
    loss = elbo(model, guide) if hasattr(elbo, "differentiable_loss") else None
    draws = []
    for _ in range(replicates):
        if loss is not None:
            draws.append(gradient(-loss(**batch), over))
            continue
        for p in over:
            p.grad = None
        elbo.loss_and_grads(model, guide, **batch)  # stock TraceGraph_ELBO has no differentiable_loss
        draws.append(torch.cat([(torch.zeros_like(p) if p.grad is None else -p.grad).flatten() for p in over]))
    sample = torch.stack(draws)
    error, spread = sample.mean(0) - exact, sample.std(0)
    exact_part = spread < 1e-5  # no randomness in these coordinates
    assert not exact_part.any() or error[exact_part].abs().max() < 2e-3
    return (error / (spread / replicates**0.5))[~exact_part].abs().max().item() if (~exact_part).any() else 0.0


@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize(("prior", "guide"), PAIRS)
def test_elbo_is_below_evidence(prior: str, guide: str, num_steps: int):
    model, guide_program = make_pair(prior, guide, num_steps)
    batch = make_batch()
    orders = all_orders(guide_program, **batch)
    evidence = exact_evidence(model, orders, **batch)
    elbo = exact_elbo(model, guide_program, orders, **batch)
    assert torch.isfinite(elbo).all()
    assert (elbo <= evidence + 1e-4).all()


@pytest.mark.parametrize(("prior", "guide"), GRADIENT_PAIRS)
def test_gradient_is_unbiased(prior: str, guide: str):
    """60 calls of 128 particles for each pair; |z| < 5 in every coordinate."""
    model, guide_program = make_pair(prior, guide, num_steps=3)
    assert largest_z(model, guide_program, RevealTraceGraph_ELBO(128), make_batch(), replicates=60) < 5


@pytest.mark.parametrize(
    ("prior", "guide"),
    [
        ("uniform", "mean_field"),
        ("learned_policy", "renormalised"),
        ("residual_policy", "policy"),
        ("priced_policy", "other_policy"),
        ("priced_finishing", "policy"),
        ("priced_finishing_range", "policy"),
        ("learned_steps", "plan"),
        ("learned_policy", "plackett_luce"),
        ("uniform", "one_each"),
        ("looking_back", "klass"),
    ],
)
@pytest.mark.parametrize("kind", ["one_step", "expected", "sampled_kl", "tempered", "one_particle", "stock"])
def test_every_gradient_path_is_unbiased(prior: str, guide: str, kind: str):
    """60 calls or more of 64 particles (of one on 64 copies for `one_particle`); |z| < 5 in every coordinate."""
    model, guide_program = make_pair(prior, guide, num_steps=3, one_step=kind == "one_step")
    elbo = {
        "one_step": RevealTraceGraph_ELBO(64),
        "expected": RevealTraceGraph_ELBO(64, credit="expected"),
        "sampled_kl": RevealTraceGraph_ELBO(64, analytic_kl=False),
        "tempered": RevealTraceGraph_ELBO(64, kl_weight=0.3),
        "one_particle": RevealTraceGraph_ELBO(1),
        "stock": TraceGraph_ELBO(64, max_plate_nesting=1, vectorize_particles=True),
    }[kind]
    weight = 0.3 if kind == "tempered" else 1.0
    batch = make_batch()
    if kind == "one_particle":  # as many draws as the others, by repeating the sequences
        batch = {name: rows.repeat(64, 1) for name, rows in batch.items()}
    # One step of a policy that hardly varies has rare, large gradients: 60 draws miss their spread for 3 seeds of 10.
    replicates = 300 if (kind, guide) == ("one_step", "klass") else 60
    assert largest_z(model, guide_program, elbo, batch, replicates, kl_weight=weight) < 5


@pytest.mark.parametrize(
    ("prior", "guide", "frozen"),
    [("learned_policy", "policy", False), ("uniform", "mean_field", True), ("priced_range", "policy", True)],
)
def test_gradient_with_outliers_is_unbiased(prior: str, guide: str, frozen: bool):
    """60 calls of 64 particles, the likelihood of whole sequences mixed with outliers; |z| < 5 in every coordinate."""
    model, guide_program = make_pair(prior, guide, num_steps=3, frozen=frozen)
    model.outlier = 0.05  # sequences of three tokens of four have about this probability
    assert largest_z(model, guide_program, RevealTraceGraph_ELBO(64), make_batch(), replicates=60) < 5


def test_outliers_enter_the_likelihood_of_whole_sequences():
    """log[(1 - e) p(x | r) + e] for every order, and the bounds of both objectives are those of the enumeration."""
    model, guide = make_pair("learned_policy", "policy", num_steps=3)
    batch = make_batch()
    orders = all_orders(guide, **batch)
    plain = exact_terms(model, guide, orders, **batch).log_likelihood
    model.outlier = 0.25
    mixed = exact_terms(model, guide, orders, **batch).log_likelihood
    torch.testing.assert_close(mixed, (0.75 * plain.exp() + 0.25).log())
    exact = exact_elbo(model, guide, orders, **batch).sum().detach()
    elbo = RevealTraceGraph_ELBO(4000)
    with torch.no_grad():
        drawn = -elbo.differentiable_loss(model, guide, **batch)
    assert abs(float(drawn - exact)) < 0.1  # 4,000 orders whose terms have a standard deviation below 1.5: |z| < 5
    torch.testing.assert_close(elbo.metrics["elbo"] * 4, drawn, atol=1e-3, rtol=0)


def test_outliers_are_refused_where_only_parts_of_a_sequence_are_scored():
    for options, field in (({"outlier": 1.0}, "outlier"), ({"outlier": 0.1, "one_step": True}, "outlier")):
        with pytest.raises(UserError, match=f"^{field}: "):
            UnmaskingModel(TableDenoiser(), UniformSteps(), 3, **options)
    model, guide = make_pair("uniform", "mean_field", num_steps=3)
    model.outlier = 0.1
    for elbo, field in ((RevealTraceGraph_ELBO(2, credit="expected"), "credit"), (RelaxedELBO(2), "outlier")):
        with pytest.raises(UserError, match=f"^{field}: "):
            elbo.differentiable_loss(model, guide, **make_batch())


def every_second(tokens: Tensor) -> Tensor:
    """An answer at positions 1, 3, ..: bool [B, L]."""
    return (torch.arange(tokens.shape[-1]) % 2 == 1).expand_as(tokens)


@pytest.mark.parametrize("outlier", [0.0, 0.05])
@pytest.mark.parametrize(
    ("prior", "guide", "frozen"),
    [
        ("learned_policy", "policy", False),
        ("uniform", "mean_field", True),
        ("priced_range", "policy", True),
        ("priced_finishing_range", "policy", True),
    ],
)
def test_gradient_with_an_answer_is_unbiased(prior: str, guide: str, frozen: bool, outlier: float):
    """60 calls of 64 particles where part of a sequence is asked for; |z| < 5 in every coordinate."""
    model, guide_program = make_pair(prior, guide, num_steps=3, frozen=frozen)
    model.asked, model.outlier = every_second, outlier
    assert largest_z(model, guide_program, RevealTraceGraph_ELBO(64), make_batch(), replicates=60) < 5


def test_what_is_revealed_with_the_answer_or_later_is_summed_out():
    """For every order, log p of the answer and of what stands before it equals the sum over all other tokens."""
    model, guide = make_pair("learned_policy", "policy", num_steps=3)
    batch = make_batch(padded=False)
    orders = all_orders(guide, **batch)  # [N, B, L]
    tokens, asked = batch["tokens"], every_second(batch["tokens"])
    last = torch.where(asked, orders, -1).amax(-1, keepdim=True)
    observed = asked | (orders < last)  # [N, B, L]
    everything = torch.cartesian_prod(*[torch.arange(VOCAB)] * LENGTH)  # [V^L, L]
    total = torch.full(orders.shape[:-1], -torch.inf)
    for filled in everything:
        plain = exact_terms(model, guide, orders, tokens=filled.expand_as(tokens)).log_likelihood  # [N, B]
        same = ((filled == tokens) | ~observed).all(-1)
        total = torch.logaddexp(total, plain.masked_fill(~same, -torch.inf))
    model.asked = every_second
    torch.testing.assert_close(exact_terms(model, guide, orders, **batch).log_likelihood, total)
    model.asked = lambda tokens: torch.ones_like(tokens, dtype=torch.bool)  # nothing is summed out
    asked_all = exact_terms(model, guide, orders, **batch).log_likelihood
    model.asked = None
    torch.testing.assert_close(asked_all, exact_terms(model, guide, orders, **batch).log_likelihood)


def test_an_answer_is_refused_where_only_parts_of_a_sequence_are_scored():
    with pytest.raises(UserError, match="^asked: "):
        UnmaskingModel(TableDenoiser(), UniformSteps(), 3, one_step=True, asked=every_second)
    model, guide = make_pair("uniform", "mean_field", num_steps=3)
    model.asked = every_second
    for elbo, field in ((RevealTraceGraph_ELBO(2, credit="expected"), "credit"), (RelaxedELBO(2), "asked")):
        with pytest.raises(UserError, match=f"^{field}: "):
            elbo.differentiable_loss(model, guide, **make_batch())


@pytest.mark.parametrize(
    ("prior", "guide", "frozen", "one_step"),
    [
        ("learned_policy", "policy", False, False),
        ("uniform", "mean_field", False, True),
        ("priced_finishing_range", "policy", True, False),
    ],
)
def test_gradient_at_another_temperature_is_unbiased(prior: str, guide: str, frozen: bool, one_step: bool):
    """60 calls of 64 particles, tokens at temperature 0.4; |z| < 5 in every coordinate."""
    model, guide_program = make_pair(prior, guide, num_steps=3, frozen=frozen, one_step=one_step)
    model.temperature = 0.4
    assert largest_z(model, guide_program, RevealTraceGraph_ELBO(64), make_batch(), replicates=60) < 5


def test_the_likelihood_has_the_temperature_of_the_tokens():
    """For every order as with logits divided by it; towards 0 it is 0 or -inf, whether tokens are the most likely."""
    model, guide = make_pair("learned_policy", "policy", num_steps=3)
    batch = make_batch()
    orders = all_orders(guide, **batch)
    model.temperature = 0.4
    cold = exact_terms(model, guide, orders, **batch).log_likelihood
    drawn = pyro.poutine.trace(model).get_trace(**batch).nodes["tokens"]["fn"]
    state = drawn.state
    by_hand = (
        (state.logits / 0.4).log_softmax(-1).gather(-1, batch["tokens"].expand(state.tokens.shape)[..., None])[..., 0]
    )
    torch.testing.assert_close(drawn.token_log_prob(batch["tokens"]), by_hand.masked_fill(~state.masked, 0.0))
    torch.testing.assert_close(state.token_log_prob(batch["tokens"], 0.4), drawn.token_log_prob(batch["tokens"]))
    assert not torch.allclose(state.token_log_prob(batch["tokens"]), drawn.token_log_prob(batch["tokens"]))
    model.temperature = 1e-4
    coldest = exact_terms(model, guide, orders, **batch).log_likelihood
    assert (coldest <= 1e-4).all() and ((coldest > -1e-4) | (coldest < -10)).all()
    assert not torch.allclose(cold, coldest)
    with pytest.raises(UserError, match="^temperature: "):
        UnmaskingModel(TableDenoiser(), UniformSteps(), 3, temperature=0.0)
    model, guide = make_pair("uniform", "mean_field", num_steps=3)
    model.temperature = 0.5
    with pytest.raises(UserError, match="^temperature: "):
        RelaxedELBO(2).differentiable_loss(model, guide, **batch)


def test_the_check_notices_a_biased_gradient():
    """The same z-score on a surrogate with the score function's sign reversed."""

    class SignError(RevealTraceGraph_ELBO):
        def _centred(self, cost):
            return -super()._centred(cost)

    model, guide = make_pair("uniform", "mean_field", num_steps=3)
    assert largest_z(model, guide, SignError(64), make_batch(), replicates=100) > 5


@pytest.mark.parametrize("prior", sorted(PRIORS))
def test_bound_is_tight_at_the_exact_posterior(prior: str):
    """log p(x, r) - log p(r | x) is the evidence for every order, whatever the prior."""
    model, _ = make_pair(prior, "policy", num_steps=2)
    batch = make_batch(padded=False)
    orders = all_orders(RandomGuide(2), **batch)
    evidence = exact_evidence(model, orders, **batch)
    for order in orders[:4]:
        trace = pyro.poutine.trace(pyro.poutine.condition(model, data={"reveal_step": order})).get_trace(**batch)
        joint = trace.nodes["reveal_step"]["fn"].log_prob(order) + trace.nodes["tokens"]["fn"].log_prob(batch["tokens"])
        posterior = joint - evidence
        possible = joint > -torch.inf
        assert torch.allclose((joint - posterior)[possible], evidence[possible], atol=1e-4)
        assert (posterior <= 1e-5).all()


@pytest.mark.parametrize("prior", [name for name in PRIORS if not name.startswith("priced")])
def test_priors_over_orders_sum_to_one(prior: str):
    model, _ = make_pair(prior, "random", num_steps=3)
    batch = make_batch()
    orders = all_orders(RandomGuide(3), **batch)
    mass = exact_evidence(pyro.poutine.block(model, expose=["reveal_step"]), orders, **batch)
    assert torch.allclose(mass, torch.zeros_like(mass), atol=1e-4)


@pytest.mark.parametrize("prior", ["uniform", "cosine", "may_wait_policy"])
def test_pyro_enumeration_agrees(prior: str):
    """TraceEnum_ELBO over the model's site is the evidence; over the guide's site it is our exact ELBO."""
    model, guide = make_pair(prior, "mean_field", num_steps=2)
    batch = make_batch(padded=False)
    orders = all_orders(guide, **batch)
    enum = TraceEnum_ELBO(max_plate_nesting=1)
    evidence = -enum.loss(config_enumerate(model), lambda **_: None, **batch)
    assert evidence == pytest.approx(exact_evidence(model, orders, **batch).sum().item(), abs=1e-3)
    elbo = -enum.loss(model, config_enumerate(guide), **batch)
    assert elbo == pytest.approx(exact_elbo(model, guide, orders, **batch).sum().item(), abs=1e-3)


@pytest.mark.parametrize(("prior", "guide"), PAIRS)
def test_every_guide_parameter_gets_a_gradient(prior: str, guide: str):
    model, guide_program = make_pair(prior, guide, num_steps=3)
    loss = RevealTraceGraph_ELBO(16)(model, guide_program)(**make_batch())
    loss.backward()
    for name, parameter in guide_program.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("one_step", [False, True])
def test_loss_forms_agree(one_step: bool):
    """`loss`, `differentiable_loss` and `loss_and_grads` see the same draws and give the same value."""
    model, guide = make_pair("learned_policy", "renormalised", num_steps=3, one_step=one_step)
    batch, elbo = make_batch(), RevealTraceGraph_ELBO(4)
    values = []
    for call in (elbo.loss, elbo.differentiable_loss, elbo.loss_and_grads):
        pyro.set_rng_seed(3)
        values.append(float(torch.as_tensor(call(model, guide, **batch)).detach()))
    assert values[0] == pytest.approx(values[1], abs=1e-4) == pytest.approx(values[2], abs=1e-4)


def test_leave_one_out_cuts_the_variance_of_stock_trace_graph():
    """200 calls each of 4 particles: our default against stock TraceGraph_ELBO, at least 10 times less variance."""
    model, guide = make_pair("uniform", "mean_field", num_steps=3, frozen=True)
    batch, over = make_batch(), list(guide.parameters())

    def variance(elbo) -> float:
        draws = []
        for _ in range(200):
            guide.zero_grad()
            elbo.loss_and_grads(model, guide, **batch)
            draws.append(torch.cat([p.grad.flatten() for p in over]))
        return torch.stack(draws).var(0).sum().item()

    stock = variance(TraceGraph_ELBO(4, max_plate_nesting=1, vectorize_particles=True))
    assert variance(RevealTraceGraph_ELBO(4)) < stock / 10


def test_stock_svi_trains_the_same_pair():
    """Plain pyro.infer.SVI with stock TraceGraph_ELBO raises the exact ELBO of the pair (README's paragraph)."""
    with pyro.settings.context(module_local_params=False):
        model, guide = make_pair("uniform", "mean_field", num_steps=2)
        model.denoiser.eval().requires_grad_(False)
        batch = make_batch()
        orders = all_orders(guide, **batch)
        before = exact_elbo(model, guide, orders, **batch).sum().item()
        svi = SVI(
            model,
            guide,
            pyro.optim.Adam({"lr": 0.05}),
            TraceGraph_ELBO(8, max_plate_nesting=1, vectorize_particles=True),
        )
        for _ in range(200):
            svi.step(**batch)
        after = exact_elbo(model, guide, orders, **batch).sum().item()
        evidence = exact_evidence(model, orders, **batch).sum().item()
    assert before + 0.5 < after <= evidence + 1e-4


def test_stock_elbos_agree_in_value():
    """Trace_ELBO and TraceGraph_ELBO estimate the exact ELBO; 4,000 particles, |z| < 5."""
    model, guide = make_pair("may_wait_policy", "mean_field", num_steps=3)
    batch = make_batch()
    exact = exact_elbo(model, guide, all_orders(guide, **batch), **batch).sum().item()
    for kind in (Trace_ELBO, TraceGraph_ELBO, RevealTraceGraph_ELBO):
        elbo = kind(400, max_plate_nesting=1, vectorize_particles=True)
        values = torch.tensor([-elbo.loss(model, guide, **batch) for _ in range(10)])
        assert abs(values.mean().item() - exact) < 5 * (values.std().item() / 10**0.5) + 1e-3


def test_modules_have_the_expected_networks():
    """Tying shares one network, so that the KL is zero in value and gradient."""
    model, guide = make_pair("learned_steps", "plan", num_steps=3)
    assert isinstance(guide.network, TokenTable) and guide.network is model.prior.network
    elbo = RevealTraceGraph_ELBO(4)
    elbo(model, guide)(**make_batch())
    assert abs(elbo.metrics["kl"].item()) < 1e-6
