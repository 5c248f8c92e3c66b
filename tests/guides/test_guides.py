"""What every guide promises, a user's too: one signature, one site, a distribution, provenance, gradients, a state."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, TraceGraph_ELBO
from pyro.nn import PyroParam, pyro_method
from pyro.ops.provenance import get_provenance
from torch import nn

from orderppl import Batch, Policy, UserError, decode, follow
from orderppl.config import build, describe
from orderppl.distributions import OrderDistribution, StepwiseOrder
from orderppl.distributions.ranked_order import RankedOrder
from orderppl.guides import (
    Guide,
    MeanFieldGuide,
    PlackettLuceGuide,
    PolicyGuide,
    PosteriorGuide,
    RenormalisedScoreGuide,
    SequentialGuide,
)
from orderppl.inference import RevealTraceGraph_ELBO
from orderppl.inference.exact import all_orders, exact_elbo, exact_terms
from orderppl.models import LearnedPolicy, PolicyNetwork, SequenceEncoder, UnmaskingModel
from orderppl.policies import Blocks, Klass, LogitPolicy, Oracle, Plan, RandomSteps, Ranked, Renormalised
from orderppl.unmasking.trajectory import Path

from programs import (
    CANVASES,
    GUIDES,
    LENGTH,
    VOCAB,
    PlaceTable,
    StateTable,
    TableDenoiser,
    TokenTable,
    TrueTokens,
    TruthTable,
    flat_gradient,
    grouped,
    largest_z,
    make_batch,
    make_guide,
    make_pair,
    scan,
)

STEPS = 3
Make = Callable[[nn.Module], Guide]
every_canvas = pytest.mark.parametrize("canvas", CANVASES)


@pytest.fixture(autouse=True)
def local_parameters() -> Iterator[None]:
    with pyro.settings.context(module_local_params=True):
        yield


def distribution(guide: nn.Module, batch: Batch) -> OrderDistribution:
    """What a guide draws from, with the rows that its plate gives it."""
    fn: OrderDistribution = poutine.trace(guide).get_trace(batch).nodes["reveal_step"]["fn"]
    return fn


class GuideCase:
    """Checks that a guide has to pass: derive, and give a fixture `make` that builds one for a denoiser.

    Its model is one whose prior may wait, so that the divergence is finite whatever the guide reveals.
    """

    has_parameters = True
    draws_alike = 5000  # draws whose frequencies are compared, per row

    @pytest.fixture
    def make(self) -> Make:
        raise NotImplementedError

    @pytest.fixture
    def denoiser(self) -> TableDenoiser:
        return TableDenoiser()

    @pytest.fixture
    def guide(self, make: Make, denoiser: TableDenoiser) -> Guide:
        return make(denoiser)

    @pytest.fixture
    def model(self, denoiser: TableDenoiser) -> UnmaskingModel:
        return UnmaskingModel(denoiser, LearnedPolicy(StateTable(), non_empty=False), STEPS)

    def test_signature_is_that_of_the_model(self, guide: Guide, model: UnmaskingModel):
        names = list(inspect.signature(guide.forward).parameters)
        assert names == list(inspect.signature(model.forward).parameters) == ["batch"]

    @every_canvas
    def test_samples_one_site_within_its_support(self, guide: Guide, canvas: str):
        batch = make_batch(canvas)
        trace = poutine.trace(guide).get_trace(batch)
        assert [n for n in trace.stochastic_nodes if n != "batch"] == ["reveal_step"]
        site = trace.nodes["reveal_step"]
        returned = trace.nodes["_RETURN"]["value"]
        assert list(returned) == ["reveal_step"]
        assert returned["reveal_step"] is site["value"]
        assert isinstance(site["fn"], OrderDistribution)
        assert [frame.name for frame in site["cond_indep_stack"]] == ["batch"]
        order = site["value"]
        assert order.dtype == torch.int64
        assert torch.equal(order >= 0, batch.latent)  # all that is to be revealed is; what is given and padding is not
        assert order.max() < STEPS
        trace.compute_log_prob()
        assert torch.isfinite(site["log_prob"]).all()
        assert site["log_prob"].shape == (len(batch),)
        assert "reveal_step" in trace.format_shapes()

    @every_canvas
    def test_its_orders_are_a_distribution(self, guide: Guide, canvas: str):
        q = distribution(guide, make_batch(canvas))
        mass = q.log_prob(q.enumerate_support()).logsumexp(0)
        torch.testing.assert_close(mass, torch.zeros_like(mass), atol=1e-4, rtol=0)

    def test_samples_follow_the_density(self, guide: Guide):
        """Every order's frequency within |z| < 5 of its probability."""
        batch, n = make_batch("scattered"), self.draws_alike
        with pyro.plate("particles", n, dim=-2), torch.no_grad():
            draws = guide(batch)["reveal_step"]
        q = distribution(guide, batch)
        with torch.no_grad():
            values = q.enumerate_support()
            probs = q.log_prob(values).exp()
        code = (STEPS + 1) ** torch.arange(draws.shape[-1])
        for row in range(len(batch)):
            size = (STEPS + 1) ** draws.shape[-1]
            seen = torch.bincount(((draws[:, row] + 1) * code).sum(-1), minlength=size) / n
            expected = torch.zeros(size).index_add(0, ((values[:, row] + 1) * code).sum(-1), probs[:, row])
            error = (expected * (1 - expected) / n).sqrt().clamp_min(1e-6)
            assert ((seen - expected).abs() / error).max() < 5

    @pytest.mark.parametrize("form", ["tensor", "dict"])
    def test_takes_what_users_hold(self, guide: Guide, form: str):
        tokens = make_batch("plain").tokens
        order = guide(tokens if form == "tensor" else {"input_ids": tokens})["reveal_step"]
        assert (order >= 0).all()

    def test_particles_come_first(self, guide: Guide):
        with pyro.plate("particles", 5, dim=-2):
            order = guide(make_batch())["reveal_step"]
        assert order.shape == (5, 4, LENGTH)

    def test_tokens_site_knows_the_order_it_depends_on(self, guide: Guide, model: UnmaskingModel):
        """Under a tracing ELBO log p(x | r) carries the provenance of the guide's site, through the denoiser."""
        ((model_trace, _),) = TraceGraph_ELBO(max_plate_nesting=1)._get_traces(model, guide, (make_batch(),), {})
        assert get_provenance(model_trace.nodes["tokens"]["log_prob"]) == frozenset({"reveal_step"})
        assert get_provenance(model_trace.nodes["reveal_step"]["log_prob"]) == frozenset({"reveal_step"})

    @pytest.mark.parametrize("canvas", ["padded", "scattered", "prompted", "long_prompt"])
    def test_every_parameter_gets_a_gradient(self, guide: Guide, model: UnmaskingModel, canvas: str):
        RevealTraceGraph_ELBO(16)(model, guide)(make_batch(canvas)).backward()
        for label, parameter in guide.named_parameters():
            assert parameter.grad is not None, label
            assert torch.isfinite(parameter.grad).all(), label
            assert parameter.grad.abs().sum() > 0, label
        own = [label for label, _ in guide.named_parameters() if not label.startswith("denoiser")]
        assert bool(own) == self.has_parameters

    def test_state_dict_round_trip(self, guide: Guide, make: Make, denoiser: TableDenoiser):
        """Another guide of the same kind, given the first one's weights, draws the same orders; so does a copy."""
        other = make(denoiser)
        missing = other.load_state_dict(guide.state_dict())
        assert not missing.missing_keys
        assert not missing.unexpected_keys
        batch, drawn, programs = make_batch("scattered"), [], (guide, other, copy.deepcopy(guide))
        for program in programs:
            pyro.set_rng_seed(7)
            drawn.append(program(batch)["reveal_step"])
        for order, program in zip(drawn, programs, strict=True):
            assert torch.equal(order, drawn[0])
            torch.testing.assert_close(
                distribution(program, batch).log_prob(order), distribution(guide, batch).log_prob(order)
            )

    def test_its_constructor_is_its_config(self, guide: Guide):
        """Described and built again, with the first one's weights: the same distribution."""
        other = build(describe(guide))
        assert type(other) is type(guide) and other is not guide
        other.load_state_dict(guide.state_dict())
        batch = make_batch("scattered")
        order = guide(batch)["reveal_step"].detach()
        torch.testing.assert_close(
            distribution(other, batch).log_prob(order), distribution(guide, batch).log_prob(order)
        )

    @every_canvas
    def test_rows_do_not_influence_each_other(self, guide: Guide, canvas: str):
        """A row's distribution is the same beside other rows, and whatever stands at its padding."""
        batch = make_batch(canvas)
        order = guide(batch)["reveal_step"].detach()
        whole = distribution(guide, batch).log_prob(order)
        for row in range(len(batch)):
            one = slice(row, row + 1)
            alone = Batch(
                batch.tokens[one], batch.attention_mask[one], None if batch.given is None else batch.given[one]
            )
            part = distribution(guide, alone).log_prob(order[one])
            torch.testing.assert_close(whole[one], part, atol=1e-5, rtol=0)
        garbled = replace(batch, tokens=torch.where(batch.attention_mask, batch.tokens, 10_000))
        torch.testing.assert_close(distribution(guide, garbled).log_prob(order), whole)

    @pytest.mark.parametrize("frozen", [False, True])
    def test_trains_beside_the_model(self, make: Make, model: UnmaskingModel, frozen: bool):
        """A frozen denoiser and one that learns: finite loss, gradients where due."""
        model.denoiser.requires_grad_(not frozen)
        guide = make(model.denoiser)
        RevealTraceGraph_ELBO(8)(model, guide)(make_batch("scattered")).backward()
        for label, parameter in [*model.named_parameters(), *guide.named_parameters()]:
            if parameter.requires_grad:
                assert parameter.grad is not None, label
                assert torch.isfinite(parameter.grad).all(), label
        assert (model.denoiser.table.grad is None) == frozen

    @pytest.mark.parametrize("canvas", ["scattered", "prompted"])
    def test_the_bound_is_that_of_the_enumeration(self, guide: Guide, model: UnmaskingModel, canvas: str):
        """10 calls of 400 orders against the sum over all: |z| < 5, and never above the evidence."""
        batch = make_batch(canvas)
        orders = all_orders(guide, batch)
        exact = exact_elbo(model, guide, orders, batch).mean().detach()
        evidence = exact_terms(model, guide, orders, batch).log_joint().logsumexp(0).mean()
        assert exact <= evidence + 1e-4
        elbo = RevealTraceGraph_ELBO(400)
        values = torch.tensor([-elbo.loss(model, guide, batch) / len(batch) for _ in range(10)])
        assert abs(values.mean() - exact) < 5 * values.std() / 10**0.5 + 1e-3

    def test_pyro_handlers_work(self, guide: Guide, model: UnmaskingModel):
        """replay reuses the guide's order, condition fixes one, Predictive draws tokens at the orders of the guide."""
        batch = make_batch("scattered")
        trace = poutine.trace(guide).get_trace(batch)
        order = trace.nodes["reveal_step"]["value"]
        assert torch.equal(poutine.replay(model, trace=trace)(batch), order)
        fixed = poutine.condition(guide, data={"reveal_step": order})(batch)["reveal_step"]
        assert torch.equal(fixed, order)
        drawn = Predictive(poutine.uncondition(model), guide=guide, num_samples=3)(batch)
        assert drawn["tokens"].shape == (3, *batch.tokens.shape)
        kept = batch.attention_mask & ~batch.latent
        assert torch.equal(drawn["tokens"][:, kept], batch.tokens[kept].expand(3, -1))
        orders = Predictive(guide, num_samples=3)(batch)["reveal_step"]
        assert torch.equal(orders >= 0, batch.latent.expand(3, -1, -1))

    def test_goes_step_by_step(self, guide: Guide):
        """The same distribution with a site per step, where its sets are known step by step."""
        batch = make_batch("scattered")
        q = distribution(guide, batch)
        if not getattr(q, "has_steps", True):
            return
        sequential = SequentialGuide(guide)
        trace = poutine.trace(sequential).get_trace(batch)
        trace.compute_log_prob()
        sets = [trace.nodes[f"reveal_{t}"]["value"] for t in range(STEPS - 1)]
        order = torch.where(batch.latent, STEPS - 1, -1)
        for t, revealed in enumerate(sets):
            order = torch.where(revealed, t, order)
        total = sum(trace.nodes[f"reveal_{t}"]["log_prob"] for t in range(STEPS - 1))
        torch.testing.assert_close(q.log_prob(order), total, atol=1e-5, rtol=1e-5)

    def test_what_is_blind_to_the_tokens_decodes(self, guide: Guide, denoiser: TableDenoiser):
        """It has a policy, that of its orders; a posterior has none."""
        batch = make_batch("scattered")
        other = replace(batch, tokens=torch.where(batch.latent, (batch.tokens + 1) % VOCAB, batch.tokens))
        policy = guide.deployable()
        if policy is None:
            return
        assert isinstance(policy, Policy)
        if not isinstance(guide, PolicyGuide):
            order = guide(batch)["reveal_step"].detach()
            assert torch.equal(distribution(guide, batch).log_prob(order), distribution(guide, other).log_prob(order))
        hidden = replace(batch, tokens=torch.where(batch.latent, denoiser.mask_index, batch.tokens))
        for mode in (False, True):
            out = decode(denoiser, policy, hidden, max_steps=STEPS, mode=mode)
            assert torch.equal(out.reveal_step >= 0, batch.latent)
            path = follow(policy, denoiser, batch, STEPS, mode=mode)
            assert torch.equal(path.reveal_step >= 0, batch.latent)


@pytest.mark.parametrize("name", GUIDES)
class TestLibrary(GuideCase):
    """All guides of the library, in the roles of the enumeration tests."""

    @pytest.fixture
    def make(self, name: str) -> Make:
        self.has_parameters = name not in ("random", "point", "oracle", "fixed", "smoothed", "klass")
        return lambda denoiser: make_guide(name, LearnedPolicy(StateTable(), non_empty=False), denoiser, STEPS)


# ---- guides of users


class ReverseGuide(Guide):
    """A family of one's own: later tokens first, as far as a learned weight says."""

    def __init__(self, num_steps: int, weight: float = 0.5) -> None:
        super().__init__(num_steps)
        self.weight = nn.Parameter(torch.tensor(weight))

    def order(self, batch: Batch) -> OrderDistribution:
        value = batch.readable * self.weight  # [B, S]
        steps = torch.arange(self.num_steps)
        return StepwiseOrder(-(steps - value[..., None]).square(), batch.latent)


class TestUsersGuide(GuideCase):
    @pytest.fixture
    def make(self) -> Make:
        return lambda denoiser: ReverseGuide(STEPS)


class PairsGuide(Guide):
    """A family with parameters of Pyro, and sets of a known size."""

    sees_tokens = False

    def __init__(self, num_steps: int) -> None:
        super().__init__(num_steps)
        self.scores = PyroParam(torch.randn(5))

    @pyro_method
    def order(self, batch: Batch) -> OrderDistribution:
        latent = batch.latent
        sizes = (latent.sum(-1, keepdim=True) - 2 * torch.arange(self.num_steps)).clamp(0, 2)
        return RankedOrder(self.scores[: latent.shape[-1]].expand(latent.shape), sizes, latent)


class TestGuideOfPairs(GuideCase):
    @pytest.fixture
    def make(self) -> Make:
        return lambda denoiser: PairsGuide(STEPS)

    @pytest.mark.parametrize("canvas", ["padded", "long_prompt"])
    def test_every_parameter_gets_a_gradient(self, guide: Guide, model: UnmaskingModel, canvas: str):
        """Where rows have more than two positions, so that there is something to choose."""
        RevealTraceGraph_ELBO(64)(model, guide)(make_batch(canvas)).backward()
        (parameter,) = (p for label, p in guide.named_parameters() if "scores" in label)
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0


class TestGuideOfANetwork(GuideCase):
    """With the library's network, which tells positions and given tokens apart."""

    @pytest.fixture
    def make(self) -> Make:
        return lambda denoiser: MeanFieldGuide(SequenceEncoder(VOCAB, STEPS, width=8, layers=1, heads=2), STEPS)


# ---- the library's families


def test_random_guide_is_uniform():
    q = distribution(PolicyGuide(RandomSteps(), TableDenoiser(), STEPS), make_batch())
    assert torch.allclose(q.probs, torch.full((4, LENGTH, STEPS), 1 / STEPS))


def test_renormalised_guide_follows_its_temperature():
    """A float attribute, read at every call: lower means fewer positions a step."""
    guide = RenormalisedScoreGuide(TokenTable(1), STEPS, temperature=0.01)
    batch = make_batch("plain").rows(torch.arange(4).repeat(100))
    few = (guide(batch)["reveal_step"] == 0).sum(-1)
    guide.temperature = 100.0
    many = (guide(batch)["reveal_step"] == 0).sum(-1)
    assert few.min() == 1
    assert few.float().mean() < 1.2
    assert many.float().mean() > 2.8


@pytest.mark.parametrize("canvas", ["padded", "scattered", "prompted"])
@pytest.mark.parametrize("tied", ["policy", "plan"])
def test_a_tied_guide_costs_no_divergence(tied: str, canvas: str):
    denoiser = TableDenoiser()
    policy = Plan(PlaceTable(STEPS)) if tied == "plan" else LearnedPolicy(StateTable())
    elbo = RevealTraceGraph_ELBO(4)
    elbo(UnmaskingModel(denoiser, policy, STEPS), PolicyGuide(policy, denoiser, STEPS))(make_batch(canvas))
    assert abs(elbo.metrics["kl"].item()) < 1e-5


def test_plackett_luce_guide_cuts_each_row_by_its_own_length():
    batch = make_batch("scattered")
    count = batch.latent.sum(-1).tolist()
    for sizes, wanted in (("uniform", {3: [1, 1, 1], 2: [1, 1, 0], 1: [1, 0, 0]}), (2.0, {3: [2, 1, 0], 2: [2, 0, 0]})):
        guide = PlackettLuceGuide(TokenTable(1), STEPS, sizes)
        order = guide(batch)["reveal_step"]
        for row, size in zip(order, count, strict=True):
            if size in wanted:
                assert [int((row == t).sum()) for t in range(STEPS)] == wanted[size]
    assert not distribution(PlackettLuceGuide(TokenTable(1), 2), batch).single
    assert distribution(PlackettLuceGuide(TokenTable(1), 4), batch).single
    assert distribution(PlackettLuceGuide(TokenTable(1), 3), make_batch("long_prompt")).single  # behind the prefix


def test_one_position_a_step_has_exact_divergences():
    """LO-ARM against uniform orders: log L! minus the entropy of the ranking; mean of 4,000 draws, within 5%."""
    denoiser = TableDenoiser()
    model, guide = UnmaskingModel(denoiser, Ranked("random"), STEPS), PlackettLuceGuide(TokenTable(1), STEPS)
    batch = make_batch("plain")
    q = distribution(guide, batch)
    log_q = q.log_prob(q.enumerate_support())
    possible = log_q > -torch.inf
    kl = torch.where(possible, log_q.exp() * (log_q.masked_fill(~possible, 0.0) + math.log(6)), 0.0).sum(0)
    elbo = RevealTraceGraph_ELBO(4000)
    elbo(model, guide)(batch)
    assert elbo.metrics["kl"].item() == pytest.approx(kl.mean().item(), rel=0.05)


@pytest.mark.parametrize("canvas", ["padded", "scattered", "long_prompt"])
@pytest.mark.parametrize(
    "policy", [Oracle(), Klass(0.3, eps=0.5), Blocks(Ranked(), 2)], ids=["oracle", "klass", "blocks"]
)
def test_a_heuristic_as_guide_measures_what_follow_does(policy: Policy, canvas: str):
    """The log-likelihood of a point mass is minus the path nats of the policy, in one draw."""
    denoiser, batch = TableDenoiser().requires_grad_(False), make_batch(canvas)
    elbo = RevealTraceGraph_ELBO(1)
    elbo.loss(UnmaskingModel(denoiser, RandomSteps(), STEPS), PolicyGuide(policy, denoiser, STEPS), batch)
    path = follow(policy, denoiser, batch, STEPS)
    assert elbo.metrics["log_likelihood"].item() == pytest.approx(-path.nats.mean().item(), rel=1e-5)


PRIORS = {
    "learned": (lambda: LearnedPolicy(StateTable()), None),
    "may wait": (lambda: LearnedPolicy(StateTable(), non_empty=False), None),
    "plan": (lambda: Plan(PlaceTable(STEPS)), STEPS),
    "scan": (lambda: scan(STEPS), 2),
    "grouped": (lambda: grouped(STEPS), 2),
}


@every_canvas
@pytest.mark.parametrize("prior", PRIORS)
def test_a_posterior_starts_as_its_prior(prior: str, canvas: str):
    """With the correction at zero: every order as likely, so that the KL is 0; and the correction has a gradient."""
    make, out = PRIORS[prior]
    policy, denoiser, correction, batch = make(), TableDenoiser(), TrueTokens(out), make_batch(canvas)
    nn.init.zeros_(correction.table)
    guide = PosteriorGuide(policy, denoiser, STEPS, correction)
    orders = all_orders(guide, batch)
    terms = exact_terms(UnmaskingModel(denoiser, policy, STEPS), guide, orders, batch)
    q, p = terms.log_guide, terms.log_prior
    possible = p > -torch.inf
    torch.testing.assert_close(q[possible], p[possible])
    assert (q[~possible] == -torch.inf).all()
    RevealTraceGraph_ELBO(64).differentiable_loss(UnmaskingModel(denoiser, policy, STEPS), guide, batch).backward()
    assert correction.table.grad is not None and correction.table.grad.abs().sum() > 0
    assert guide.deployable() is None


def test_the_renormalised_form_starts_from_the_priors_probabilities():
    """b_i / max b at temperature 1: the odds of positions are the prior's, and the best one is certain."""
    denoiser, batch, correction = TableDenoiser(), make_batch("padded"), TrueTokens(None)
    nn.init.zeros_(correction.table)
    policy = LearnedPolicy(StateTable())
    state = Path(batch, denoiser, STEPS).opening()
    guide = PosteriorGuide(policy, denoiser, STEPS, correction, temperature=1.0)
    sets, probs = guide.policy(state), policy.logits(state).sigmoid().masked_fill(~state.masked, 0.0)
    torch.testing.assert_close(sets.probs, probs / probs.amax(-1, keepdim=True))
    assert isinstance(guide.policy, Renormalised)


def test_what_cannot_be_corrected_is_refused():
    denoiser = TableDenoiser()
    with pytest.raises(UserError, match="^policy: RandomSteps has no log-odds to correct"):
        PosteriorGuide(RandomSteps(), denoiser, STEPS, TrueTokens(None))
    with pytest.raises(UserError, match="^temperature: Plan has no log-odds to renormalise"):
        PosteriorGuide(Plan(PlaceTable(STEPS)), denoiser, STEPS, TrueTokens(STEPS), temperature=1.0)
    with pytest.raises(UserError, match="^temperature: 0 is not positive"):
        Renormalised(LearnedPolicy(StateTable()), 0)
    assert isinstance(LearnedPolicy(StateTable()).corrected(TrueTokens(None)), LogitPolicy)


@pytest.mark.parametrize("plan", [lambda: Plan(PlaceTable(STEPS)), lambda: scan(STEPS), lambda: grouped(STEPS)])
def test_orders_are_shared_where_that_is_asked_for(plan: Callable[[], Policy]):
    """One plan for all sequences draws one order for all, with the frequencies of its own; gradients stay unbiased."""
    denoiser, batch = TableDenoiser().requires_grad_(False), make_batch("plain")
    policy = plan()
    guide = PolicyGuide(policy, denoiser, STEPS, shares_orders=True)
    with pyro.plate("particles", 4000, dim=-2):
        drawn = guide(batch)["reveal_step"]
    assert (drawn == drawn[:, :1]).all()
    q = policy.order(batch, denoiser, STEPS)
    values = q.enumerate_support()[:, 0]
    probs = q.log_prob(values[:, None].expand(-1, len(batch), -1))[:, 0].exp()
    found = torch.stack([(drawn[:, 0] == value).all(-1).double().mean() for value in values])
    assert ((found - probs).abs() / (probs * (1 - probs) / 4000).sqrt().clamp(min=1e-3)).max() < 5
    over = list(policy.parameters())
    model = UnmaskingModel(denoiser, RandomSteps(), STEPS)
    exact = exact_elbo(model, guide, all_orders(guide, batch), batch).sum()
    wanted = flat_gradient(exact, over)
    draws = torch.stack(
        [-flat_gradient(RevealTraceGraph_ELBO(16).differentiable_loss(model, guide, batch), over) for _ in range(300)]
    )
    assert largest_z(draws, wanted) < 5


def test_orders_of_policies_that_see_states_are_not_shared():
    guide = PolicyGuide(LearnedPolicy(StateTable()), TableDenoiser(), STEPS, shares_orders=True)
    with pytest.raises(UserError, match="^shares_orders: PolicyOrder draws step by step"):
        guide(make_batch())


def test_a_posterior_is_not_deployed():
    denoiser = TableDenoiser()
    assert MeanFieldGuide(TokenTable(STEPS), STEPS).deployable() is None
    own = LearnedPolicy(StateTable())
    assert PolicyGuide(own, denoiser, STEPS).deployable() is own
    for policy in (LearnedPolicy(TruthTable()), Oracle(), Blocks(Oracle("margin"), 2)):
        assert PolicyGuide(policy, denoiser, STEPS).deployable() is None
    network = PolicyNetwork(VOCAB + 1, width=8, layers=1, heads=2, sees_truth=True)
    assert PolicyGuide(LearnedPolicy(network), denoiser, STEPS).deployable() is None


def test_a_posterior_sees_the_tokens_and_a_prior_does_not():
    """Hidden tokens move the posterior's distribution and leave that of the policy as it is."""
    denoiser, batch = TableDenoiser(), make_batch("scattered")
    other = replace(batch, tokens=torch.where(batch.latent, (batch.tokens + 1) % VOCAB, batch.tokens))
    first = torch.where(batch.latent, 0, -1)
    for make, moves in ((TruthTable, True), (StateTable, False)):
        guide = PolicyGuide(LearnedPolicy(make()), denoiser, STEPS)
        values = [distribution(guide, each).log_prob(first) for each in (batch, other)]
        assert torch.allclose(*values) != moves


def test_bad_settings_are_refused():
    for build_guide in (
        lambda: PolicyGuide(RandomSteps(), TableDenoiser(), 0),
        lambda: MeanFieldGuide(TokenTable(STEPS), 0),
        lambda: PolicyGuide(RandomSteps(), TableDenoiser(), -1),
        lambda: RenormalisedScoreGuide(TokenTable(1), 0),
        lambda: PlackettLuceGuide(TokenTable(1), 0),
    ):
        with pytest.raises(UserError, match="num_steps: .* is below 1; use at least one step"):
            build_guide()
    with pytest.raises(UserError, match="sizes: unknown schedule 'linear'"):
        PlackettLuceGuide(TokenTable(1), STEPS, "linear")
    with pytest.raises(UserError, match="temperature: 0.0 is not positive"):
        RenormalisedScoreGuide(TokenTable(1), STEPS, temperature=0.0)
    for guide in (MeanFieldGuide(TokenTable(STEPS + 1), STEPS), RenormalisedScoreGuide(TokenTable(2), STEPS)):
        with pytest.raises(UserError, match="^network: gives"):
            guide(make_batch())
    model, _ = make_pair("learned", "random", STEPS)
    with pytest.raises(UserError, match="^num_steps: 3 steps for a plan of 2"):
        PolicyGuide(Plan(PlaceTable(2)), model.denoiser, STEPS)(make_batch())
