"""The bound as an estimator: its forms, scales, noise and refusals, programs of other shapes, rounded denoisers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from orderppl import Batch, State, UserError
from orderppl.distributions import IndependentSet, OrderDistribution, StepwiseOrder
from orderppl.guides import Guide, MeanFieldGuide, PolicyGuide
from orderppl.inference import EnumeratedELBO, RevealTraceGraph_ELBO
from orderppl.inference.exact import all_orders, exact_elbo, exact_evidence, exact_terms
from orderppl.inference.objective import as_objective
from orderppl.models import LearnedPolicy, SequentialUnmaskingModel, UnmaskingModel
from orderppl.policies import RandomSteps
from orderppl.unmasking.trajectory import steps_used

from programs import (
    LENGTH,
    MODELS,
    VOCAB,
    StateTable,
    TableDenoiser,
    TokenTable,
    copies,
    flat_gradient,
    largest_z,
    learned,
    make_batch,
    make_guide,
    make_pair,
)

STEPS = 3
Program = Callable[..., Any]


@pytest.fixture(autouse=True)
def local_parameters() -> Iterator[None]:
    with pyro.settings.context(module_local_params=True):
        yield


# ---- programs that are no unmasking programs


class BernoulliNormal(nn.Module):
    """z ~ Bernoulli, y ~ Normal(2 z, 1), and an amortised guide."""

    def __init__(self) -> None:
        super().__init__()
        self.prior_logit = nn.Parameter(torch.tensor(-0.4))
        self.guide_weight = nn.Parameter(torch.tensor([0.3, 0.8]))

    def model(self, y: Tensor) -> None:
        with pyro.plate("data", len(y), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(logits=self.prior_logit.expand(len(y))))
            pyro.sample("y", dist.Normal(2 * z, 1.0), obs=y)

    def guide(self, y: Tensor) -> None:
        with pyro.plate("data", len(y), dim=-1):
            pyro.sample("z", dist.Bernoulli(logits=self.guide_weight[0] + self.guide_weight[1] * y))

    def exact(self, y: Tensor, kl_weight: float = 1.0) -> Tensor:
        q = (self.guide_weight[0] + self.guide_weight[1] * y).sigmoid()
        total = torch.zeros(())
        for z, weight in ((0.0, 1 - q), (1.0, q)):
            log_prior = dist.Bernoulli(logits=self.prior_logit).log_prob(torch.tensor(z))
            fit = dist.Normal(2 * z, 1.0).log_prob(y)
            total = total + (weight * (fit + kl_weight * (log_prior - weight.log()))).sum()
        return total


class TwoLatents(nn.Module):
    """One latent after another, the second reparameterised and depending on the first."""

    def __init__(self) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(0.5))
        self.loc = nn.Parameter(torch.tensor([0.2, -0.3]))

    def model(self, y: Tensor) -> None:
        with pyro.plate("data", len(y), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            x = pyro.sample("x", dist.Normal(z, 1.0))
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    def guide(self, y: Tensor) -> None:
        with pyro.plate("data", len(y), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(logits=self.logit.expand(len(y))))
            pyro.sample("x", dist.Normal(self.loc[0] + self.loc[1] * z + 0.4 * y, 0.7))

    def exact(self, y: Tensor, kl_weight: float = 1.0) -> Tensor:
        q, prior = dist.Bernoulli(logits=self.logit), dist.Bernoulli(0.3)
        total = -kl_weight * len(y) * torch.distributions.kl_divergence(q, prior)
        for z in (0.0, 1.0):
            loc = self.loc[0] + self.loc[1] * z + 0.4 * y
            fit = dist.Normal(loc, 1.0).log_prob(y) - 0.49 / 2  # E of a quadratic
            kl = torch.distributions.kl_divergence(dist.Normal(loc, 0.7), dist.Normal(torch.tensor(z), 1.0))
            total = total + (q.log_prob(torch.tensor(z)).exp() * (fit - kl_weight * kl)).sum()
        return total


class SetwiseGuide(nn.Module):
    """A guide of T - 1 sites for the sequential program, each seeing the tokens and what is still masked."""

    def __init__(self) -> None:
        super().__init__()
        self.network = TokenTable(STEPS - 1)

    def forward(self, batch: Batch) -> None:
        logits, masked = self.network(batch), batch.latent
        with pyro.plate("batch", len(batch), dim=-1):
            for t in range(STEPS - 1):
                reveal = pyro.sample(f"reveal_{t}", IndependentSet.bernoulli(logits[..., t], masked, non_empty=True))
                masked = masked & ~reveal

    def exact(self, model: Program, batch: Batch, kl_weight: float = 1.0) -> Tensor:
        """The ELBO summed over all orders; gradients included."""
        total = torch.zeros(())
        for steps in itertools.product(range(STEPS), repeat=batch.tokens.shape[-1]):
            order = torch.tensor(steps).expand_as(batch.tokens)
            data = {f"reveal_{t}": (order == t) & batch.latent for t in range(STEPS - 1)}
            once = ((order == 0) | batch.latent).all(-1)  # what is visible repeats orders; the one with 0 there counts
            log_q, _ = log_densities(self, data, batch)
            log_p, fit = log_densities(model, data, batch)
            possible = once & (log_q > -torch.inf)
            log_q, log_p = log_q.masked_fill(~possible, 0.0), log_p.masked_fill(~possible, 0.0)
            value = fit + kl_weight * (log_p - log_q)
            total = total + torch.where(possible, log_q.exp() * value, 0.0).sum()
        return total


def log_densities(program: Program, data: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor | float]:
    """Of the sets (the last one is certain) and of the tokens, float [B] each; 0 without tokens."""
    with poutine.trace() as tracer, poutine.condition(data=data):
        program(batch)
    tracer.trace.compute_log_prob()
    sites = [(name, site["log_prob"]) for name, site in tracer.trace.nodes.items() if site["type"] == "sample"]
    sets = sum(density for name, density in sites if name.startswith("reveal_"))
    return sets, sum(density for name, density in sites if name.startswith("tokens_"))


FOREIGN = {"bernoulli_normal": BernoulliNormal, "two_latents": TwoLatents}


def foreign(name: str) -> tuple[Program, Program, Any, Callable[[float], Tensor]]:
    """(model, guide, data, exact bound of a KL weight)."""
    if name in FOREIGN:
        pair, y = FOREIGN[name](), torch.tensor([-0.5, 0.7, 2.4])
        return pair.model, pair.guide, y, lambda weight: pair.exact(y, weight)
    canvas = name.removeprefix("setwise_")
    model, guide = SequentialUnmaskingModel(TableDenoiser(), LearnedPolicy(StateTable()), STEPS), SetwiseGuide()
    batch = make_batch(canvas)
    return model, guide, batch, lambda weight: guide.exact(model, batch, weight)


def tiny(name: str) -> tuple[Program, Program, Any]:
    """(model, guide, data): unmasking pairs as model/guide/canvas, other programs by name."""
    if "/" not in name:
        return foreign(name)[:3]
    model, guide, canvas = name.split("/")
    return *make_pair(model, guide, STEPS), make_batch(canvas)


PROGRAMS = [
    "uniform/random/scattered",
    "uniform/mean_field/padded",
    "uniform/mean_field/prompted",
    "cosine/plan/scattered",
    "plan/plan/long_prompt",
    "learned/policy/padded",
    "learned/policy/scattered",
    "learned/renormalised/prompted",
    "priced/other_policy/scattered",
    "price_range_commit/policy/long_prompt",
    "residual/mean_field/scattered",
    "random_sizes/plackett_luce/scattered",
    "uniform/scan/scattered",
    "looking_back/klass/prompted",
    "bernoulli_normal",
    "two_latents",
    "setwise_padded",
    "setwise_scattered",
]
ELBOS: dict[str, Callable[[], RevealTraceGraph_ELBO]] = {
    "default": lambda: RevealTraceGraph_ELBO(4),
    "one_particle": lambda: RevealTraceGraph_ELBO(1),
    "two_particles": lambda: RevealTraceGraph_ELBO(2),
    "looped": lambda: RevealTraceGraph_ELBO(3, vectorize_particles=False),
    "no_control": lambda: RevealTraceGraph_ELBO(4, control_variate=0),
    "full_control": lambda: RevealTraceGraph_ELBO(4, control_variate=1.0),
    "tempered": lambda: RevealTraceGraph_ELBO(4, kl_weight=0.2),
    "two_of_the_steps": lambda: RevealTraceGraph_ELBO(4, scored_steps=2),
    "more_plates": lambda: RevealTraceGraph_ELBO(4, max_plate_nesting=2),
}


def parameters(*programs: Program) -> list[Tensor]:
    """Those of modules, and of modules whose methods are programs."""
    return learned(*(p if isinstance(p, nn.Module) else p.__self__ for p in programs))


def value_and_gradient(elbo: ELBO, model: Program, guide: Program, data: Any, over: list[Tensor]) -> Tensor:
    """The loss and its gradient by one call with a seed of its own, float [1 + P]."""
    pyro.set_rng_seed(3)
    loss = elbo.differentiable_loss(model, guide, data)
    return torch.cat([loss.detach()[None], flat_gradient(loss, over)])


@pytest.mark.parametrize("kind", ELBOS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_three_forms_agree(name: str, kind: str):
    """Equal seeds: one value from all three forms, one gradient from the two that have one."""
    model, guide, data = tiny(name)
    elbo, over = ELBOS[kind](), parameters(model, guide)
    pyro.set_rng_seed(3)
    plain = elbo.loss(model, guide, data)
    both = value_and_gradient(elbo, model, guide, data, over)
    pyro.set_rng_seed(3)
    stepped = elbo.loss_and_grads(model, guide, data)
    left = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in over])
    assert plain == pytest.approx(both[0].item(), abs=1e-4)
    assert plain == pytest.approx(stepped, abs=1e-4)
    assert torch.isfinite(both).all()
    assert both[1:].abs().sum() > 0
    assert torch.allclose(both[1:], left, atol=1e-5)
    if isinstance(model, nn.Module):  # as a module with the programs' parameters
        module = elbo(model, guide)
        pyro.set_rng_seed(3)
        assert module(data).item() == pytest.approx(plain, abs=1e-4)
        assert {id(p) for p in module.parameters()} == {id(p) for p in over}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *itertools.product(FOREIGN, ("default", "looped", "tempered")),
        *itertools.product(("setwise_padded", "setwise_scattered"), ("default", "tempered")),
    ],
)
def test_foreign_pairs_are_unbiased(name: str, kind: str):
    """Value and every gradient coordinate over 30 calls on 16 copies of the data; |z| < 5 against exact sums."""
    model, guide, data, exact = foreign(name)
    over, elbo = parameters(model, guide), ELBOS[kind]()
    bound = exact(elbo.kl_weight)
    wanted = torch.cat([bound.detach()[None], flat_gradient(bound, over)])
    many = copies(data, 16) if isinstance(data, Batch) else data.repeat(16)
    draws = []
    for _ in range(30):
        value = -elbo.differentiable_loss(model, guide, many) / 16
        draws.append(torch.cat([value.detach()[None], flat_gradient(value, over)]))
    sample = torch.stack(draws)
    error, spread = sample.mean(0) - wanted, sample.std(0) / 30**0.5
    is_random = spread > 1e-6
    assert is_random.any()
    assert (error / spread)[is_random].abs().max() < 5
    assert not (~is_random).any() or error[~is_random].abs().max() < 2e-3
    assert elbo.metrics == {}  # they are those of unmasking programs


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_pairs_are_tempered(name: str):
    """kl_weight scales the divergence of any pair; 4,000 particles, |z| < 5, and the plain bound is far away."""
    model, guide, data, exact = foreign(name)
    sample = torch.tensor([-RevealTraceGraph_ELBO(400, kl_weight=0.25).loss(model, guide, data) for _ in range(10)])
    error = sample.std() / 10**0.5
    assert abs(sample.mean() - exact(0.25)) < 5 * error
    assert abs(sample.mean() - exact(1.0)) > 10 * error


def test_enumeration_agrees_with_the_foreign_exact_sum():
    """The sums above against Pyro's own enumeration."""
    model, guide, data, exact = foreign("bernoulli_normal")
    enumerated = -TraceEnum_ELBO(max_plate_nesting=1).loss(model, config_enumerate(guide), data)
    assert enumerated == pytest.approx(exact(1.0).item(), abs=1e-4)


# ---- what surrounds the programs


@pytest.mark.parametrize(
    "name",
    [
        "uniform/mean_field/padded",
        "learned/other_policy/scattered",
        "price_range_commit/policy/prompted",
        "setwise_padded",
    ],
)
def test_scale_multiplies_the_bound(name: str):
    """poutine.scale around both programs: value and gradient are multiplied, with the same draws."""
    model, guide, data = tiny(name)
    over, elbo = parameters(model, guide), RevealTraceGraph_ELBO(4)
    plain = value_and_gradient(elbo, model, guide, data, over)
    scaled = value_and_gradient(elbo, *(poutine.scale(p, scale=2.5) for p in (model, guide)), data, over)
    assert torch.allclose(scaled, 2.5 * plain, rtol=1e-3, atol=1e-4)


class ScaledOrder(Messenger):
    """What Pyro's tutorials anneal the KL with: a scale of the latent site alone."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.factor = scale

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] == "reveal_step":
            msg["scale"] = self.factor * msg["scale"]


@pytest.mark.parametrize(
    "name", ["uniform/mean_field/scattered", "learned/other_policy/prompted", "random_sizes/plackett_luce/padded"]
)
def test_a_scale_of_the_order_alone_is_a_kl_weight(name: str):
    """In both programs: the same value and gradient, with the same draws."""
    model, guide, data = tiny(name)
    over = parameters(model, guide)
    weighted = value_and_gradient(RevealTraceGraph_ELBO(4, kl_weight=0.3), model, guide, data, over)
    pair = (ScaledOrder(0.3)(program) for program in (model, guide))
    assert torch.allclose(
        value_and_gradient(RevealTraceGraph_ELBO(4), *pair, data, over), weighted, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "name", ["uniform/mean_field/padded", "learned/other_policy/scattered", "priced/policy/prompted"]
)
def test_masked_rows_drop_out(name: str):
    """poutine.mask over the batch plate: the loss and the gradient are those of the rows left, with the same draws."""
    model, guide, data = tiny(name)
    over, elbo = parameters(model, guide), RevealTraceGraph_ELBO(4)
    odd = torch.arange(len(data)) % 2 == 1
    everything, some, others, none = (
        value_and_gradient(elbo, *(poutine.mask(p, mask=keep) for p in (model, guide)), data, over)
        for keep in (odd | ~odd, odd, ~odd, odd & ~odd)
    )
    assert torch.allclose(everything, some + others, rtol=1e-3, atol=1e-3)
    assert (none == 0).all()
    assert not torch.allclose(some, others)


@pytest.mark.parametrize("canvas", ["padded", "scattered", "long_prompt"])
def test_loss_is_summed_over_the_batch_and_averaged_over_particles(canvas: str):
    """At KL 0 and one step there is nothing to draw: the loss is the exact sum whatever the particles."""
    denoiser, policy, batch = TableDenoiser(), RandomSteps(), make_batch(canvas)
    model, guide = UnmaskingModel(denoiser, policy, 1), PolicyGuide(RandomSteps(), denoiser, 1)
    evidence = exact_evidence(model, all_orders(guide, batch), batch).sum().item()
    for kind in ELBOS.values():
        assert -kind().loss(model, guide, batch) == pytest.approx(evidence, abs=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "uniform/mean_field/padded",
        "learned/other_policy/scattered",
        "priced/policy/prompted",
        "price_range_commit/policy/scattered",
        "random_sizes/plackett_luce/scattered",
    ],
)
def test_metrics(name: str):
    """Per sequence, untempered, detached; 20 calls of 400 particles against enumeration, |z| < 5."""
    model, guide, batch = tiny(name)
    elbo, calls = RevealTraceGraph_ELBO(400, kl_weight=0.2), []
    for _ in range(20):
        loss = elbo(model, guide)(batch)
        m = elbo.metrics
        assert set(m) == {"elbo", "log_likelihood", "kl", "steps"}
        assert all(value.dim() == 0 and not value.requires_grad for value in m.values())
        assert torch.allclose(m["elbo"], m["log_likelihood"] - m["kl"], atol=1e-5)
        assert torch.allclose(-loss / len(batch), m["log_likelihood"] - 0.2 * m["kl"], atol=1e-4)
        calls.append(torch.stack([m["elbo"], m["log_likelihood"], m["kl"], m["steps"]]))
    exact = EnumeratedELBO()
    exact.loss(model, guide, batch)  # checked in tests/exact
    wanted = torch.stack([exact.metrics[key] for key in ("elbo", "log_likelihood", "kl", "steps")])
    sample = torch.stack(calls)
    assert ((sample.mean(0) - wanted).abs() < 5 * sample.std(0) / 20**0.5 + 1e-4).all()


@pytest.mark.parametrize("name", ["uniform/mean_field/scattered", "priced/policy/prompted"])
def test_metrics_are_those_of_all_particles_drawn_one_by_one(name: str):
    model, guide, batch = tiny(name)
    elbo = RevealTraceGraph_ELBO(3, vectorize_particles=False)
    pyro.set_rng_seed(5)
    loss = elbo.loss(model, guide, batch)
    assert elbo.metrics["elbo"].item() == pytest.approx(-loss / len(batch), abs=1e-5)
    pyro.set_rng_seed(5)
    orders = torch.stack([guide(batch)["reveal_step"] for _ in range(3)])  # the model draws nothing
    assert elbo.metrics["steps"].item() == pytest.approx(steps_used(orders).float().mean().item())


@pytest.mark.parametrize(
    "name",
    [
        "learned/plackett_luce/padded",
        "learned/plackett_luce/scattered",
        "random_sizes/plackett_luce/prompted",
        "uniform/scan/scattered",
        "plan/scan/long_prompt",
    ],
)
@pytest.mark.parametrize("stock", [Trace_ELBO, TraceGraph_ELBO])
def test_value_is_that_of_the_stock_bounds_without_closed_forms(stock: Any, name: str):
    """Same draws, sampled KL: the same number."""
    model, guide, batch = tiny(name)
    values = []
    for elbo in (stock(4, max_plate_nesting=1, vectorize_particles=True), RevealTraceGraph_ELBO(4)):
        pyro.set_rng_seed(3)
        values.append(elbo.loss(model, guide, batch))
    assert values[0] == pytest.approx(values[1], abs=1e-3)


# ---- noise


def draws_of(elbo: ELBO, model: Program, guide: Program, batch: Batch, calls: int) -> Tensor:
    """Gradients of the loss by calls with seeds of their own, float [R, P]."""
    found = []
    for seed in range(calls):
        pyro.set_rng_seed(seed)
        found.append(flat_gradient(elbo.differentiable_loss(model, guide, batch), learned(guide)))
    return torch.stack(found)


@pytest.mark.parametrize(
    "name",
    [
        "uniform/mean_field/padded",
        "plan/plan/prompted",
        pytest.param("learned/policy/scattered", marks=pytest.mark.slow),
        pytest.param("uniform/scan/scattered", marks=pytest.mark.slow),
    ],
)
def test_other_particles_are_a_baseline(name: str):
    """200 calls of 4 orders, drawn together or one by one, no control variate: at least 4 times less variance."""
    model, guide = make_pair(*name.split("/")[:2], STEPS, frozen=True)
    batch = make_batch(name.split("/")[2])
    together, alone = (
        draws_of(elbo, model, guide, batch, 200).var(0).sum()
        for elbo in (
            RevealTraceGraph_ELBO(4, control_variate=0),
            RevealTraceGraph_ELBO(4, vectorize_particles=False, control_variate=0),
        )
    )
    assert together < alone / 4


@pytest.mark.parametrize(
    ("name", "helps"),
    [
        ("uniform/mean_field/padded", True),
        ("learned/policy/scattered", False),  # less than the noise of the check
        pytest.param("learned/renormalised/prompted", False, marks=pytest.mark.slow),
        pytest.param("price_range_commit/policy/scattered", True, marks=pytest.mark.slow),
        pytest.param("residual/policy/long_prompt", True, marks=pytest.mark.slow),
    ],
)
def test_a_fitted_control_variate_is_never_worse_than_a_fixed_one(name: str, helps: bool):
    """200 calls of 32 orders, the same for all: within 4 standard errors of the better of 0 and 1.

    The errors are those of the difference, call by call, of the squared distance to the mean.
    """
    model, guide = make_pair(*name.split("/")[:2], STEPS, frozen=True)
    batch, squares = make_batch(name.split("/")[2]), {}
    for control in ("fitted", 0, 1.0):
        sample = draws_of(RevealTraceGraph_ELBO(32, control_variate=control), model, guide, batch, 200)
        squares[control] = (sample - sample.mean(0)).square().sum(1)  # [R]

    def excess(fixed: float) -> float:
        """Mean squared distance beyond that of a fixed coefficient, in standard errors."""
        difference = squares["fitted"] - squares[fixed]
        return float(difference.mean() / (difference.std() / 200**0.5))

    better = min((0, 1.0), key=lambda fixed: float(squares[fixed].mean()))
    assert excess(better) < 4
    assert squares["fitted"].mean() < 1.05 * squares[better].mean()
    assert not helps or excess(0) < -4


def test_the_check_notices_a_control_variate_that_makes_it_worse():
    """A slope of the wrong sign, by the same numbers."""
    model, guide = make_pair("uniform", "mean_field", STEPS, frozen=True)
    batch = make_batch()
    none = draws_of(RevealTraceGraph_ELBO(32, control_variate=0), model, guide, batch, 200)
    wrong = draws_of(RevealTraceGraph_ELBO(32, control_variate=-1.0), model, guide, batch, 200)
    difference = (wrong - wrong.mean(0)).square().sum(1) - (none - none.mean(0)).square().sum(1)
    assert difference.mean() > 4 * difference.std() / 200**0.5


class Counting(nn.Module):
    """A denoiser that counts the rows that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.rows = TableDenoiser(), 0
        self.mask_index, self.vocab_size = self.table.mask_index, self.table.vocab_size

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        self.rows += len(state)
        found: Tensor = self.table(state, attention_mask)
        return found


@pytest.mark.parametrize(("scored", "rows"), [(None, 1 + 4 * (STEPS - 1)), (1, 4), (2, 8), (3, 9), (50, 9)])
def test_steps_that_are_not_scored_are_not_read(scored: int | None, rows: int):
    """Of 4 orders per sequence: the first state is the same for all, where all are scored."""
    denoiser, batch = Counting(), make_batch()
    model, guide = UnmaskingModel(denoiser, RandomSteps(), STEPS), MeanFieldGuide(TokenTable(STEPS), STEPS)
    RevealTraceGraph_ELBO(4, scored_steps=scored).loss(model, guide, batch)
    assert denoiser.rows == rows * len(batch)


def test_steps_that_were_read_anyway_are_all_scored():
    """A policy that reads the denoiser at every step: the same draws, the same gradient."""
    model, guide = make_pair("price_range_commit", "policy", STEPS)
    over, batch = learned(model, guide), make_batch("scattered")
    found = [value_and_gradient(RevealTraceGraph_ELBO(4, scored_steps=n), model, guide, batch, over) for n in (1, None)]
    assert torch.equal(*found)


def test_every_step_has_the_same_chance_to_be_scored():
    """Two of three steps, each 2,000 times in 3,000 calls, within 5 standard errors."""
    model, _ = make_pair("uniform", "mean_field", STEPS)
    elbo, batch, seen = RevealTraceGraph_ELBO(1, scored_steps=2), make_batch(), torch.zeros(STEPS)
    likelihood = poutine.trace(model).get_trace(batch).nodes["tokens"]["fn"]
    for _ in range(3000):
        steps = elbo._steps_to_score(likelihood, likelihood.trajectory)
        assert steps is not None and bool((steps[1] > steps[0]).all())
        seen += torch.bincount(steps[..., 0].flatten(), minlength=STEPS)
    share = seen / 3000
    assert bool((share - 2 / 3).abs().max() < 5 * (2 / 9 / 3000) ** 0.5)


def test_what_cannot_be_scored_by_steps_is_refused():
    with pytest.raises(UserError, match="^scored_steps: 0 is below 1"):
        RevealTraceGraph_ELBO(scored_steps=0)
    model = UnmaskingModel(TableDenoiser(), RandomSteps(), STEPS, robustness=0.5)
    with pytest.raises(UserError, match="^scored_steps: a robust likelihood is no sum over steps"):
        RevealTraceGraph_ELBO(scored_steps=2).loss(model, MeanFieldGuide(TokenTable(STEPS), STEPS), make_batch())


def test_an_unknown_control_variate_is_refused():
    with pytest.raises(UserError, match="^control_variate: 'best'; use fitted, none, gain or a number"):
        RevealTraceGraph_ELBO(control_variate="best")


# ---- pairs that fit together less well


class OtherTokens(PolicyGuide):
    """A guide that looks at other tokens than the model's, as one that is shown a corrupted batch."""

    def order(self, batch: Batch) -> OrderDistribution:
        return super().order(replace(batch, tokens=(batch.tokens + 1) % VOCAB))


@pytest.mark.parametrize("canvas", ["padded", "scattered"])
@pytest.mark.parametrize("kind", ["other_denoiser", "other_denoiser_tied", "other_tokens"])
def test_a_guide_may_read_something_else_than_the_model(kind: str, canvas: str):
    """What it has read is no part of the likelihood, nor of the prior: 60 calls of 64 particles, |z| < 5."""
    denoiser, policy = TableDenoiser(), LearnedPolicy(StateTable())
    own = policy if kind == "other_denoiser_tied" else LearnedPolicy(StateTable())
    make = OtherTokens if kind == "other_tokens" else PolicyGuide
    guide = make(own, denoiser if kind == "other_tokens" else TableDenoiser(), STEPS)
    model, batch = UnmaskingModel(denoiser, policy, STEPS), make_batch(canvas)
    over = learned(model, guide)
    exact = exact_elbo(model, guide, all_orders(guide, batch), batch).sum()
    wanted = torch.cat([exact.detach()[None], flat_gradient(exact, over)])
    sample = []
    for _ in range(60):
        value = -RevealTraceGraph_ELBO(64).differentiable_loss(model, guide, batch)
        sample.append(torch.cat([value.detach()[None], flat_gradient(value, over)]))
    assert largest_z(torch.stack(sample), wanted) < 5


class Forgetful(Guide):
    """A guide that does not look at what is given, or not even at padding."""

    def __init__(self, is_blind: bool) -> None:
        super().__init__(STEPS)
        self.is_blind, self.network = is_blind, TokenTable(STEPS)

    def order(self, batch: Batch) -> StepwiseOrder:
        return StepwiseOrder(self.network(batch), None if self.is_blind else batch.attention_mask)


@pytest.mark.parametrize(
    ("canvas", "is_blind"), [("scattered", False), ("prompted", False), ("padded", True), ("scattered", True)]
)
@pytest.mark.parametrize("model", ["uniform", "plan", "learned"])
def test_orders_of_what_is_not_hidden_have_no_bound(model: str, canvas: str, is_blind: bool):
    """The prior cannot have drawn them, as the stock bound says, and the reason is given."""
    program, _ = make_pair(model, "policy", STEPS)
    guide, batch = Forgetful(is_blind), make_batch(canvas)
    elbo = RevealTraceGraph_ELBO(4)
    assert Trace_ELBO(4, max_plate_nesting=1, vectorize_particles=True).loss(program, guide, batch) == torch.inf
    assert not torch.isfinite(elbo.differentiable_loss(program, guide, batch))
    assert "given positions or padding" in elbo.explain(program, guide, batch)


@pytest.mark.parametrize("guide", ["mean_field", "plan", "policy", "plackett_luce", "scan"])
@pytest.mark.parametrize("steps", [2, 4])
def test_another_number_of_steps_is_refused(guide: str, steps: int):
    denoiser, policy = TableDenoiser(), LearnedPolicy(StateTable(), non_empty=False)
    model = UnmaskingModel(denoiser, policy, STEPS)
    other = make_guide(guide, policy, denoiser, steps)
    with pytest.raises(UserError, match=f"^num_steps: {steps} in the guide and 3 in the model; give both the same"):
        RevealTraceGraph_ELBO(2).loss(model, other, make_batch("scattered"))


class WithWholeFactor(UnmaskingModel):
    """A user's model with a term of the whole batch: the longest row's steps are paid for once."""

    def forward(self, batch: Batch) -> Tensor:
        order = super().forward(batch)
        pyro.factor("longest", -0.7 * steps_used(order).amax(-1, keepdim=True))
        return order


@pytest.mark.parametrize("canvas", ["padded", "scattered"])
@pytest.mark.parametrize("guide", ["mean_field", "other_policy"])
def test_a_factor_outside_of_the_plate_counts_once(guide: str, canvas: str):
    """60 calls of 64 particles; |z| < 5 against E[max] from each row's own distribution of steps."""
    denoiser, policy, batch = TableDenoiser(), LearnedPolicy(StateTable(), non_empty=False), make_batch(canvas)
    program = make_guide(guide, policy, denoiser, STEPS)
    exact = exact_terms(UnmaskingModel(denoiser, policy, STEPS), program, all_orders(program, batch), batch)
    used = steps_used(exact.orders)  # [N, B]
    within = torch.stack([(exact.log_guide.exp() * (used <= steps)).sum(0).prod() for steps in range(STEPS)])
    bound = exact.elbo().sum() - 0.7 * (1 - within).sum()  # E[max] = sum_t P(max > t)
    model = WithWholeFactor(denoiser, policy, STEPS)
    over = learned(model, program)
    wanted, sample, elbo = torch.cat([bound.detach()[None], flat_gradient(bound, over)]), [], RevealTraceGraph_ELBO(64)
    for _ in range(60):
        value = -elbo.differentiable_loss(model, program, batch)
        sample.append(torch.cat([value.detach()[None], flat_gradient(value, over)]))
        assert elbo.metrics["elbo"].item() == pytest.approx(value.item() / len(batch), abs=1e-4)
    assert largest_z(torch.stack(sample), wanted) < 5
    with pytest.raises(UserError, match="^longest: is no term of one sequence"):
        EnumeratedELBO().loss(model, program, batch)


class WithFurtherPlate(UnmaskingModel):
    """A user's model with a term within a plate of its own."""

    def forward(self, batch: Batch) -> Tensor:
        order = super().forward(batch)
        with pyro.plate("rows", len(batch), dim=-1), pyro.plate("extra", 3, dim=-2):
            pyro.factor("each", -0.1 * steps_used(order))
        return order


class WithAnotherLatent(UnmaskingModel):
    """A user's model that draws something besides the order."""

    def forward(self, batch: Batch) -> Tensor:
        order = super().forward(batch)
        with pyro.plate("rows", len(batch), dim=-1):
            rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
            pyro.factor("price", -0.1 * rate * steps_used(order))
        return order


class WithAnotherGuess(PolicyGuide):
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        with pyro.plate("rows", len(batch), dim=-1):
            pyro.sample("rate", dist.LogNormal(-0.5, 0.3))
        return super().forward(batch)


@pytest.mark.parametrize("canvas", ["padded", "scattered"])
@pytest.mark.parametrize(("model", "guide"), [(WithFurtherPlate, PolicyGuide), (WithAnotherLatent, WithAnotherGuess)])
def test_programs_of_another_shape_are_left_to_pyro(model: Any, guide: Any, canvas: str):
    """The same draws, value and gradient as stock TraceGraph_ELBO."""
    denoiser, policy = TableDenoiser(), LearnedPolicy(StateTable())
    program, proposal = model(denoiser, policy, STEPS), guide(LearnedPolicy(StateTable()), denoiser, STEPS)
    over, batch = learned(program, proposal), make_batch(canvas)
    found = value_and_gradient(RevealTraceGraph_ELBO(4, 2), program, proposal, batch, over)
    stock = TraceGraph_ELBO(4, max_plate_nesting=2, vectorize_particles=True)
    torch.testing.assert_close(value_and_gradient(as_objective(stock), program, proposal, batch, over), found)


# ---- why there is no bound


class Says(TableDenoiser):
    """A denoiser with given logits at one position."""

    def __init__(self, place: int, logits: list[float]) -> None:
        super().__init__()
        self.place, self.logits = place, torch.tensor(logits)

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        there = torch.arange(state.shape[-1]) == self.place
        return torch.where(there[:, None], self.logits, super().forward(state, attention_mask))


class Broken(LearnedPolicy):
    """A policy whose network gives NaN where a token stands at the second position."""

    def logits(self, state: State) -> Tensor:
        return super().logits(state) + torch.where(state.masked[..., 1:2], 0.0, torch.nan)


nan, inf = torch.nan, torch.inf
CAUSES = {
    "nan": (lambda: Says(1, [0.0, nan, 0.0, 0.0]), "learned", "policy", "denoiser gives NaN"),
    "impossible": (
        lambda: Says(1, [0.0, -inf, -inf, -inf]),
        "learned",
        "policy",
        r"token [123] at position 1 has prob",
    ),
    "policy": (TableDenoiser, "broken", "other_policy", "guide or the model's policy gives NaN"),
    "guide": (TableDenoiser, "learned", "broken", "guide or the model's policy gives NaN"),
    "empty": (TableDenoiser, "learned", "mean_field", "guide reveals sets that the model's policy forbids"),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_explains_why_a_bound_is_not_finite(cause: str):
    """On the row at fault; one without a token to reveal there has a bound, and no explanation."""
    make, policy, guide, said = CAUSES[cause]
    denoiser = make()
    prior = Broken(StateTable()) if policy == "broken" else MODELS[policy][0](STEPS)
    own = PolicyGuide(Broken(StateTable()), denoiser, STEPS) if guide == "broken" else None
    own = own or make_guide(guide, prior, denoiser, STEPS)
    model, elbo = UnmaskingModel(denoiser, prior, STEPS), RevealTraceGraph_ELBO(64)
    tokens = torch.tensor([[0, 2, 3], [0, 2, 3]])
    given = torch.tensor([[False, False, False], [True, True, True]])
    with pyro.validation_enabled(False):
        rows = Batch(tokens, given=given)
        assert elbo.explain(model, own, rows.rows(slice(1, 2))) is None
        for wrong in (rows, rows.rows(slice(0, 1))):
            assert not torch.isfinite(elbo.differentiable_loss(model, own, wrong))
            found = elbo.explain(model, own, wrong)
            assert found is not None and re.search(said, found), found


def test_a_mask_is_a_cause_only_where_it_is_to_be_revealed():
    model, guide = make_pair("learned", "policy", STEPS)
    elbo, batch = RevealTraceGraph_ELBO(4), make_batch("scattered")
    for hidden, said in ((batch.latent, "MASK token is among the tokens to reveal"), (~batch.latent, None)):
        place = torch.zeros_like(hidden).index_put_(tuple(hidden.nonzero()[0]), torch.tensor(True))
        assert elbo.explain(model, guide, replace(batch, tokens=batch.tokens.masked_fill(place, VOCAB))) == (
            said and f"the {said}"
        )


@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_is_to_be_explained_of_a_finite_bound(name: str):
    """Nor of programs that are no unmasking programs."""
    assert RevealTraceGraph_ELBO(4).explain(*tiny(name)) is None


# ---- denoisers of other kinds


class SmallNetwork(nn.Module):
    """A denoiser made of matrix products, which autocast runs in low precision."""

    mask_index = VOCAB
    vocab_size = VOCAB

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB + 1, 16)
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(16, VOCAB)
        with torch.no_grad():
            self.head.weight.mul_(20)  # large logits, where low precision loses most

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(state) * attention_mask.unsqueeze(-1)
        return self.head((self.mix(x) + x.sum(-2, keepdim=True)).tanh())


@pytest.mark.parametrize("canvas", ["padded", "prompted"])
@pytest.mark.parametrize("tied", [False, True])
def test_compiled_denoiser_gives_the_same_loss_and_gradient(tied: bool, canvas: str):
    denoiser, network, policy = SmallNetwork(), TokenTable(STEPS), LearnedPolicy(StateTable())
    batch, results = make_batch(canvas), []
    over = learned(denoiser, policy if tied else network)
    for one in (denoiser, torch.compile(denoiser, backend="eager")):
        model = UnmaskingModel(one, policy if tied else RandomSteps(), STEPS)
        guide = PolicyGuide(policy, one, STEPS) if tied else MeanFieldGuide(network, STEPS)
        results.append(value_and_gradient(RevealTraceGraph_ELBO(4), model, guide, batch, over))
    assert torch.isfinite(results[0]).all()
    assert torch.allclose(*results, atol=1e-5)


@pytest.mark.parametrize("prompt", [0, 5])
@pytest.mark.parametrize("width", [LENGTH, 64])
def test_low_precision_denoiser(width: int, prompt: int):
    """Under bf16 autocast only the denoiser's products lose digits: the loss is off by the rounding of its logits."""
    denoiser = SmallNetwork()
    guide = PolicyGuide(RandomSteps(), denoiser, STEPS)
    tokens = torch.randint(0, VOCAB, (8, prompt + width))
    batch = Batch(tokens, given=(torch.arange(prompt + width) < prompt).expand_as(tokens))
    model, losses = UnmaskingModel(denoiser, RandomSteps(), STEPS), []
    for enabled in (False, True):
        pyro.set_rng_seed(3)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = RevealTraceGraph_ELBO(4)(model, guide)(batch)
        assert loss.dtype == torch.float32
        denoiser.zero_grad()
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in denoiser.parameters())
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)


@pytest.mark.parametrize("canvas", ["padded", "scattered"])
def test_normalisation_keeps_full_precision(canvas: str):
    """Of bf16 logits: the loss is that of the same logits in float32, not of sums rounded to eight bits."""

    class Rounded(TableDenoiser):
        precise = False

        def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
            logits = (20 * super().forward(state, attention_mask)).to(torch.bfloat16)
            return logits.float() if self.precise else logits

    denoiser = Rounded()
    model, guide = UnmaskingModel(denoiser, RandomSteps(), STEPS), PolicyGuide(RandomSteps(), denoiser, STEPS)
    losses = []
    for denoiser.precise in (True, False):
        pyro.set_rng_seed(3)
        losses.append(RevealTraceGraph_ELBO(8)(model, guide)(make_batch(canvas)).item())
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)
