"""What every guide promises: one signature, one site, supported values, provenance, gradients, a state dict."""

from __future__ import annotations

import inspect
import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, TraceGraph_ELBO
from pyro.ops.provenance import get_provenance

from orderppl.decoding import Block, GreedyOracle, Klass, TopProb, UniformSizes, follow
from orderppl.denoising import Canvas
from orderppl.distributions import OrderedPartition
from orderppl.errors import UserError
from orderppl.guides import (
    HeuristicGuide,
    MeanFieldGuide,
    PlackettLuceGuide,
    PolicyGuide,
    PosteriorGuide,
    RandomGuide,
    RenormalisedScoreGuide,
    RevealGuide,
)
from orderppl.inference import RevealTraceGraph_ELBO
from orderppl.models import FixedSizes, LearnedPolicy, LearnedSteps, UniformSteps, UnmaskingModel

from programs import (
    GUIDES,
    LENGTH,
    PosteriorTable,
    StateTable,
    TableDenoiser,
    TokenTable,
    make_batch,
    make_guide,
    make_pair,
)

STEPS = 3
every_guide = pytest.mark.parametrize("name", GUIDES)


@pytest.fixture(autouse=True)
def local_parameters():
    with pyro.settings.context(module_local_params=True):
        yield


def build(name: str) -> tuple[UnmaskingModel, RevealGuide]:
    """A guide beside a model whose prior it fits: may-wait policies, except for the score guide."""
    return make_pair("may_wait_policy", name, STEPS)


@every_guide
def test_signature_is_that_of_the_model(name: str):
    model, guide = build(name)
    assert list(inspect.signature(guide.forward).parameters) == list(inspect.signature(model.forward).parameters)


@every_guide
def test_samples_one_site_within_its_support(name: str):
    _, guide = build(name)
    batch = make_batch()
    trace = poutine.trace(guide).get_trace(**batch)
    assert [n for n in trace.stochastic_nodes if n != "batch"] == ["reveal_step"]
    site = trace.nodes["reveal_step"]
    returned = trace.nodes["_RETURN"]["value"]
    assert list(returned) == ["reveal_step"]
    assert returned["reveal_step"] is site["value"]
    assert isinstance(site["fn"], OrderedPartition)
    assert [frame.name for frame in site["cond_indep_stack"]] == ["batch"]
    order = site["value"]
    assert order.dtype == torch.int64
    assert torch.equal(order >= 0, batch["attention_mask"])  # all that is attended is revealed, padding is not
    assert order.max() < STEPS
    trace.compute_log_prob()
    assert torch.isfinite(site["log_prob"]).all()
    assert site["log_prob"].shape == (4,)
    assert "reveal_step" in trace.format_shapes()


@every_guide
def test_runs_without_a_mask(name: str):
    _, guide = build(name)
    order = guide(make_batch()["tokens"])["reveal_step"]
    assert (order >= 0).all()


@every_guide
def test_particles_come_first(name: str):
    _, guide = build(name)
    with pyro.plate("particles", 5, dim=-2):
        order = guide(**make_batch())["reveal_step"]
    assert order.shape == (5, 4, LENGTH)


@every_guide
def test_tokens_site_knows_the_order_it_depends_on(name: str):
    """Under a tracing ELBO log p(x | r) carries the provenance of the guide's site, through the denoiser."""
    model, guide = build(name)
    batch = make_batch()
    ((model_trace, _),) = TraceGraph_ELBO(max_plate_nesting=1)._get_traces(model, guide, (), batch)
    assert get_provenance(model_trace.nodes["tokens"]["log_prob"]) == frozenset({"reveal_step"})
    assert get_provenance(model_trace.nodes["reveal_step"]["log_prob"]) == frozenset({"reveal_step"})


@every_guide
def test_every_parameter_gets_a_gradient(name: str):
    model, guide = build(name)
    RevealTraceGraph_ELBO(16)(model, guide)(**make_batch()).backward()
    for label, parameter in guide.named_parameters():
        assert parameter.grad is not None, label
        assert torch.isfinite(parameter.grad).all(), label
        assert parameter.grad.abs().sum() > 0, label
    assert (name == "random") == (not list(guide.parameters()))


@every_guide
def test_state_dict_round_trip(name: str):
    """Another guide of the same kind, given the first one's weights, draws the same orders."""
    _, guide = build(name)
    _, other = build(name)
    missing = other.load_state_dict(guide.state_dict())
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    batch, drawn = make_batch(), []
    for program in (guide, other):
        pyro.set_rng_seed(7)
        drawn.append(program(**batch))
    assert torch.equal(drawn[0]["reveal_step"], drawn[1]["reveal_step"])
    order = drawn[0]["reveal_step"]
    log_probs = [poutine.trace(g).get_trace(**batch).nodes["reveal_step"]["fn"].log_prob(order) for g in (guide, other)]
    assert torch.equal(*log_probs)


@every_guide
def test_rows_do_not_influence_each_other(name: str):
    """A row's distribution is the same beside other rows."""
    _, guide = build(name)
    batch = make_batch()
    alone = {key: value[:1] for key, value in batch.items()}
    order = guide(**batch)["reveal_step"]
    whole = poutine.trace(guide).get_trace(**batch).nodes["reveal_step"]["fn"].log_prob(order)
    part = poutine.trace(guide).get_trace(**alone).nodes["reveal_step"]["fn"].log_prob(order[:1])
    assert torch.allclose(whole[:1], part, atol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("one_step", [False, True])
@every_guide
def test_trains_beside_any_model(name: str, one_step: bool, frozen: bool):
    """Stacked and one-step models, a frozen denoiser and one that learns: finite loss, gradients where due."""
    model, guide = make_pair("may_wait_policy", name, STEPS, one_step, frozen)
    RevealTraceGraph_ELBO(8)(model, guide)(**make_batch()).backward()
    for label, parameter in [*model.named_parameters(), *guide.named_parameters()]:
        if parameter.requires_grad:
            assert parameter.grad is not None, label
            assert torch.isfinite(parameter.grad).all(), label
    assert (model.denoiser.table.grad is None) == frozen


@every_guide
def test_pyro_handlers_work(name: str):
    """replay reuses the guide's order, condition fixes one, Predictive draws tokens at the orders of the guide."""
    model, guide = build(name)
    batch = make_batch()
    trace = poutine.trace(guide).get_trace(**batch)
    order = trace.nodes["reveal_step"]["value"]
    assert torch.equal(poutine.replay(model, trace=trace)(**batch), order)
    fixed = poutine.condition(guide, data={"reveal_step": order})(**batch)["reveal_step"]
    assert torch.equal(fixed, order)
    drawn = Predictive(poutine.uncondition(model), guide=guide, num_samples=3)(**batch)
    assert drawn["tokens"].shape == (3, *batch["tokens"].shape)
    orders = Predictive(guide, num_samples=3)(**batch)["reveal_step"]
    assert torch.equal(orders >= 0, batch["attention_mask"].expand(3, 4, LENGTH))


def test_random_guide_is_uniform():
    fn = poutine.trace(RandomGuide(STEPS)).get_trace(**make_batch()).nodes["reveal_step"]["fn"]
    assert torch.allclose(fn.probs, torch.full((4, LENGTH, STEPS), 1 / STEPS))


def test_mean_field_guide_may_not_see_the_tokens():
    network = TokenTable(STEPS)
    batch = make_batch()
    other = dict(batch, tokens=(batch["tokens"] + 1) % 4)

    def probs(sees: bool, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        guide = MeanFieldGuide(network, STEPS, sees_tokens=sees)
        return poutine.trace(guide).get_trace(**batch).nodes["reveal_step"]["fn"].probs

    assert torch.equal(probs(False, batch), probs(False, other))
    assert not torch.allclose(probs(True, batch), probs(True, other))


def test_renormalised_guide_follows_its_temperature():
    """A float attribute, read at every call: lower means fewer positions a step."""
    guide = RenormalisedScoreGuide(TokenTable(1), STEPS, temperature=0.01)
    batch = {key: value.repeat(100, 1) for key, value in make_batch(padded=False).items()}
    few = (guide(**batch)["reveal_step"] == 0).sum(-1)
    guide.temperature = 100.0
    many = (guide(**batch)["reveal_step"] == 0).sum(-1)
    assert few.min() == 1
    assert few.float().mean() < 1.2
    assert many.float().mean() > 2.8


@pytest.mark.parametrize("tied", ["policy", "plan"])
def test_a_tied_guide_costs_no_divergence(tied: str):
    denoiser = TableDenoiser()
    prior = LearnedSteps(TokenTable(STEPS)) if tied == "plan" else LearnedPolicy(StateTable())
    elbo = RevealTraceGraph_ELBO(4)
    elbo(UnmaskingModel(denoiser, prior, STEPS), make_guide(tied, prior, denoiser, STEPS))(**make_batch())
    assert abs(elbo.metrics["kl"].item()) < 1e-5


def test_plackett_luce_guide_cuts_each_row_by_its_own_length():
    batch = make_batch()
    for sizes, wanted in (("uniform", [[1, 1, 1]] * 3 + [[1, 1, 0]]), (2.0, [[2, 1, 0]] * 3 + [[2, 0, 0]])):
        guide = PlackettLuceGuide(TokenTable(1), STEPS, sizes)
        order = guide(**batch)["reveal_step"]
        assert [[int((row == t).sum()) for t in range(STEPS)] for row in order] == wanted
    law = poutine.trace(PlackettLuceGuide(TokenTable(1), 2)).get_trace(**batch).nodes["reveal_step"]["fn"]
    assert not law.single
    assert poutine.trace(PlackettLuceGuide(TokenTable(1), 3)).get_trace(**batch).nodes["reveal_step"]["fn"].single
    assert not PlackettLuceGuide(TokenTable(1), 9, UniformSizes(2))._single(3)


def test_one_position_a_step_has_exact_divergences():
    """LO-ARM against uniform orders: log L! minus the entropy of the ranking; mean of 4,000 draws, within 5%."""
    model, guide = make_pair("fixed_sizes", "plackett_luce", STEPS)
    model.prior, guide = FixedSizes(), PlackettLuceGuide(TokenTable(1), STEPS)
    batch = make_batch(padded=False)
    law = poutine.trace(guide).get_trace(**batch).nodes["reveal_step"]["fn"]
    values = law.enumerate_support()
    log_q = law.log_prob(values)
    possible = log_q > -torch.inf
    kl = torch.where(possible, log_q.exp() * (log_q.masked_fill(~possible, 0.0) + math.log(6)), 0.0).sum(0)
    elbo = RevealTraceGraph_ELBO(4000)
    elbo(model, guide)(**batch)
    assert elbo.metrics["kl"].item() == pytest.approx(kl.mean().item(), rel=0.05)


@pytest.mark.parametrize("policy", [GreedyOracle(), Klass(0.3, eps=0.5), Block(TopProb(), 2)])
def test_heuristic_guide_measures_what_follow_does(policy):
    """The log-likelihood of a point mass is minus the path nats of the policy, in one draw."""
    denoiser, batch = TableDenoiser().requires_grad_(False), make_batch()
    elbo = RevealTraceGraph_ELBO(1)
    elbo.loss(UnmaskingModel(denoiser, UniformSteps(), STEPS), HeuristicGuide(policy, denoiser, STEPS), **batch)
    path = follow(policy, Canvas(denoiser, batch["attention_mask"]), batch["tokens"], STEPS)
    assert elbo.metrics["log_likelihood"].item() == pytest.approx(-path.nats.mean().item(), rel=1e-5)


def test_bad_settings_are_refused():
    for build_guide in (
        lambda: RandomGuide(0),
        lambda: MeanFieldGuide(TokenTable(STEPS), 0),
        lambda: PolicyGuide(UniformSteps(), TableDenoiser(), -1),
        lambda: RenormalisedScoreGuide(TokenTable(1), 0),
        lambda: PlackettLuceGuide(TokenTable(1), 0),
        lambda: PosteriorGuide(PosteriorTable(), TableDenoiser(), 0),
        lambda: HeuristicGuide(TopProb(), TableDenoiser(), 0),
    ):
        with pytest.raises(ValueError, match="num_steps: .* is below 1; use at least one step"):
            build_guide()
    with pytest.raises(UserError, match="sizes: unknown schedule 'linear'"):
        PlackettLuceGuide(TokenTable(1), STEPS, "linear")
    with pytest.raises(UserError, match="smoothing: 0.5 is not in"):
        HeuristicGuide(TopProb(), TableDenoiser(), STEPS, smoothing=0.5)
    with pytest.raises(ValueError, match="temperature: 0.0 is not positive"):
        RenormalisedScoreGuide(TokenTable(1), STEPS, temperature=0.0)
