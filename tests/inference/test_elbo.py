"""The bound as an estimator: its three forms, scales, foreign programs, compiled and low-precision denoisers."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from torch import Tensor, nn

from orderppl.distributions import BernoulliSet
from orderppl.guides import MeanFieldGuide, RandomGuide
from orderppl.inference import RevealTraceGraph_ELBO, exact_elbo, exact_evidence
from orderppl.inference.exact import all_orders
from orderppl.models import LearnedPolicy, SequentialUnmaskingModel, UniformSteps, UnmaskingModel

from programs import LENGTH, VOCAB, StateTable, TableDenoiser, TokenTable, make_batch, make_pair

STEPS = 3
Program = Callable[..., object]


@pytest.fixture(autouse=True)
def local_parameters():
    with pyro.settings.context(module_local_params=True):
        yield


class BernoulliNormal(nn.Module):
    """A foreign pair: z ~ Bernoulli, y ~ Normal(2 z, 1), and an amortised guide."""

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
    """A foreign pair with one latent after another, the second reparameterised and depending on the first."""

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

    def exact(self, y: Tensor) -> Tensor:
        q, prior = dist.Bernoulli(logits=self.logit), dist.Bernoulli(0.3)
        total = -len(y) * torch.distributions.kl_divergence(q, prior)
        for z in (0.0, 1.0):
            loc = self.loc[0] + self.loc[1] * z + 0.4 * y
            fit = dist.Normal(loc, 1.0).log_prob(y) - 0.49 / 2  # E of a quadratic
            kl = torch.distributions.kl_divergence(dist.Normal(loc, 0.7), dist.Normal(torch.tensor(z), 1.0))
            total = total + (q.log_prob(torch.tensor(z)).exp() * (fit - kl)).sum()
        return total


class SetwiseGuide(nn.Module):
    """A guide of T - 1 sites for the sequential program, each seeing the tokens and what is still masked."""

    def __init__(self) -> None:
        super().__init__()
        self.network = TokenTable(STEPS - 1)

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> None:
        logits = self.network(tokens, attention_mask)
        masked = attention_mask
        with pyro.plate("batch", len(tokens), dim=-1):
            for t in range(STEPS - 1):
                reveal = pyro.sample(f"reveal_{t}", BernoulliSet(logits[..., t], masked, non_empty=True))
                masked = masked & ~reveal

    def exact(self, model: Program, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """The ELBO summed over all orders; gradients included."""
        total = torch.zeros(())
        for row in itertools.product(range(STEPS), repeat=LENGTH):
            order = torch.tensor(row).expand_as(tokens)
            data = {f"reveal_{t}": (order == t) & attention_mask for t in range(STEPS - 1)}
            # Padding repeats orders; the one with 0 there counts.
            once = ((order == 0) | attention_mask).all(-1)
            log_q, log_p = (
                log_density(program, data, tokens=tokens, attention_mask=attention_mask) for program in (self, model)
            )
            possible = once & (log_q > -torch.inf)
            log_q, log_p = log_q.masked_fill(~possible, 0.0), log_p.masked_fill(~possible, 0.0)
            total = total + torch.where(possible, log_q.exp() * (log_p - log_q), 0.0).sum()
        return total


def log_density(program: Program, data: dict[str, Tensor], **batch: Tensor) -> Tensor:
    with poutine.trace() as tracer, poutine.condition(data=data):
        program(**batch)
    tracer.trace.compute_log_prob()
    return sum(site["log_prob"] for site in tracer.trace.nodes.values() if site["type"] == "sample")


def foreign(name: str) -> tuple[Program, Program, dict[str, Tensor]]:
    y = {"y": torch.tensor([-0.5, 0.7, 2.4])}
    if name in ("bernoulli_normal", "two_latents"):
        pair = BernoulliNormal() if name == "bernoulli_normal" else TwoLatents()
        return pair.model, pair.guide, y
    return SequentialUnmaskingModel(TableDenoiser(), LearnedPolicy(StateTable()), STEPS), SetwiseGuide(), make_batch()


def tiny(name: str) -> tuple[Program, Program, dict[str, Tensor]]:
    """(model, guide, batch): unmasking pairs as prior/guide, other programs by name."""
    if "/" not in name:
        return foreign(name)
    prior, guide = name.split("/")
    model, guide_program = make_pair(prior, guide.removesuffix("+one_step"), STEPS, guide.endswith("+one_step"))
    return model, guide_program, make_batch()


PROGRAMS = [
    "uniform/random",
    "uniform/mean_field",
    "cosine/plan",
    "learned_steps/plan",
    "learned_policy/policy",
    "learned_policy/renormalised",
    "priced_policy/other_policy",
    "residual_policy/mean_field+one_step",
    "learned_policy/other_policy+one_step",
    "bernoulli_normal",
    "two_latents",
    "setwise",
]
ELBOS = {
    "default": lambda: RevealTraceGraph_ELBO(4),
    "one_particle": lambda: RevealTraceGraph_ELBO(1),
    "looped": lambda: RevealTraceGraph_ELBO(3, vectorize_particles=False),
    "no_baseline": lambda: RevealTraceGraph_ELBO(4, leave_one_out=False),
    "sampled_kl": lambda: RevealTraceGraph_ELBO(4, analytic_kl=False),
    "tempered": lambda: RevealTraceGraph_ELBO(4, kl_weight=0.2),
    "expected": lambda: RevealTraceGraph_ELBO(4, credit="expected"),
}


def parameters(*programs: Program) -> list[Tensor]:
    modules = [p if isinstance(p, nn.Module) else p.__self__ for p in programs]
    return list(dict.fromkeys(p for module in modules for p in module.parameters()))


def gradient(value: Tensor, over: list[Tensor]) -> Tensor:
    grads = torch.autograd.grad(value, over, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(over, grads, strict=True)])


@pytest.mark.parametrize("kind", ELBOS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_three_forms_agree(name: str, kind: str):
    """Equal seeds: one value from all three forms, one gradient from the two that have one."""
    model, guide, batch = tiny(name)
    elbo, over = ELBOS[kind](), parameters(model, guide)
    pyro.set_rng_seed(3)
    plain = elbo.loss(model, guide, **batch)
    pyro.set_rng_seed(3)
    differentiable = elbo.differentiable_loss(model, guide, **batch)
    one = gradient(differentiable, over)
    pyro.set_rng_seed(3)
    stepped = elbo.loss_and_grads(model, guide, **batch)
    other = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in over])
    assert plain == pytest.approx(float(differentiable.detach()), abs=1e-4)
    assert plain == pytest.approx(float(stepped), abs=1e-4)
    assert torch.isfinite(one).all()
    assert one.abs().sum() > 0
    assert torch.allclose(one, other, atol=1e-5)
    assert differentiable.dim() == 0
    if isinstance(model, nn.Module):  # as a module with the programs' parameters
        module = elbo(model, guide)
        pyro.set_rng_seed(3)
        assert module(**batch).item() == pytest.approx(plain, abs=1e-4)
        assert {id(p) for p in module.parameters()} == {id(p) for p in over}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("bernoulli_normal", kind) for kind in ("default", "no_baseline", "sampled_kl", "looped")),
        *(("two_latents", kind) for kind in ("default", "no_baseline", "sampled_kl")),
        *(("setwise", kind) for kind in ("default", "sampled_kl")),
    ],
)
def test_foreign_pairs_are_unbiased(name: str, kind: str):
    """Value and every gradient coordinate over 30 calls on 16 copies of the batch; |z| < 5 against exact sums."""
    model, guide, batch = tiny(name)
    over = parameters(model, guide)
    exact = guide.exact(model, **batch) if name == "setwise" else model.__self__.exact(**batch)
    wanted = torch.cat([exact.detach().reshape(1), gradient(exact, over)])
    copies = {key: value.repeat(16, *[1] * (value.dim() - 1)) for key, value in batch.items()}
    elbo = ELBOS[kind]()
    draws = []
    for _ in range(30):
        value = -elbo.differentiable_loss(model, guide, **copies) / 16
        draws.append(torch.cat([value.detach().reshape(1), gradient(value, over)]))
    sample = torch.stack(draws)
    error, spread = sample.mean(0) - wanted, sample.std(0) / 30**0.5
    random = spread > 1e-6
    assert random.any()
    assert (error / spread)[random].abs().max() < 5
    assert error[~random].abs().max() < 2e-3 if (~random).any() else True


def test_foreign_pairs_are_tempered():
    """kl_weight scales the divergence of any pair; 4,000 particles, |z| < 5."""
    pair = BernoulliNormal()
    y = torch.tensor([-0.5, 0.7, 2.4])
    values = [-RevealTraceGraph_ELBO(400, kl_weight=0.25).loss(pair.model, pair.guide, y) for _ in range(10)]
    sample = torch.tensor(values)
    assert abs(sample.mean() - pair.exact(y, 0.25)) < 5 * sample.std() / 10**0.5


def test_enumeration_agrees_with_the_foreign_exact_sum():
    """The sums above against Pyro's own enumeration."""
    pair = BernoulliNormal()
    y = torch.tensor([-0.5, 0.7, 2.4])
    enumerated = -TraceEnum_ELBO(max_plate_nesting=1).loss(pair.model, config_enumerate(pair.guide), y)
    assert enumerated == pytest.approx(pair.exact(y).item(), abs=1e-4)


@pytest.mark.parametrize("name", ["uniform/mean_field", "learned_policy/other_policy", "setwise"])
def test_scale_multiplies_the_bound(name: str):
    """poutine.scale around both programs: value and gradient are multiplied, with the same draws."""
    model, guide, batch = tiny(name)
    over = parameters(model, guide)
    elbo, results = RevealTraceGraph_ELBO(4), []
    for scale in (1.0, 2.5):
        scaled = (poutine.scale(program, scale=scale) for program in (model, guide))
        pyro.set_rng_seed(3)
        loss = elbo.differentiable_loss(*scaled, **batch)
        results.append((loss.detach(), gradient(loss, over)))
    (value, grads), (scaled_value, scaled_grads) = results
    assert torch.allclose(scaled_value, 2.5 * value, rtol=1e-4)
    assert torch.allclose(scaled_grads, 2.5 * grads, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["uniform/mean_field", "learned_policy/other_policy"])
def test_masked_rows_drop_out(name: str):
    """poutine.mask over the batch plate: the loss and the gradient are those of the rows left, with the same draws."""
    model, guide, batch = tiny(name)
    over = parameters(model, guide)
    elbo = RevealTraceGraph_ELBO(4)
    results = []
    for keep in ([1, 1, 1, 1], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]):
        masked = (poutine.mask(program, mask=torch.tensor(keep).bool()) for program in (model, guide))
        pyro.set_rng_seed(3)
        loss = elbo.differentiable_loss(*masked, **batch)
        results.append(torch.cat([loss.detach().reshape(1), gradient(loss, over)]))
    everything, some, others, none = results
    assert torch.allclose(everything, some + others, rtol=1e-3, atol=1e-3)
    assert (none == 0).all()
    assert not torch.allclose(some, others)


def test_loss_is_summed_over_the_batch_and_averaged_over_particles():
    """At KL 0 and one step there is nothing to draw: the loss is the exact sum whatever the particles."""
    denoiser, prior = TableDenoiser(), UniformSteps()
    batch = make_batch()
    model, guide = UnmaskingModel(denoiser, prior, 1), RandomGuide(1)
    evidence = exact_evidence(model, all_orders(guide, **batch), **batch).sum().item()
    for kind in ELBOS.values():
        assert -kind().loss(model, guide, **batch) == pytest.approx(evidence, abs=1e-4)


@pytest.mark.parametrize("name", ["uniform/mean_field", "learned_policy/other_policy+one_step", "priced_policy/policy"])
def test_metrics(name: str):
    """Per sequence, untempered, detached; 20 calls of 400 particles against enumeration, |z| < 5."""
    model, guide, batch = tiny(name)
    elbo = RevealTraceGraph_ELBO(400, kl_weight=0.2)
    calls = []
    for _ in range(20):
        loss = elbo(model, guide)(**batch)
        assert set(elbo.metrics) == {"elbo", "log_likelihood", "kl", "steps"}
        assert all(m.dim() == 0 and not m.requires_grad for m in elbo.metrics.values())
        m = elbo.metrics
        assert torch.allclose(m["elbo"], m["log_likelihood"] - m["kl"], atol=1e-5)
        assert torch.allclose(-loss / 4, m["log_likelihood"] - 0.2 * m["kl"], atol=1e-4)
        calls.append(torch.stack([m["elbo"], m["log_likelihood"], m["kl"], m["steps"]]))
    model.one_step = False
    orders = all_orders(guide, **batch)
    bound = exact_elbo(model, guide, orders, **batch).mean().detach()
    fit = exact_elbo(model, guide, orders, kl_weight=0.0, **batch).mean().detach()
    log_q = poutine.trace(guide).get_trace(**batch).nodes["reveal_step"]["fn"].log_prob(orders)
    steps = (log_q.exp() * (orders.amax(-1) + 1)).sum(0).mean().detach()
    wanted = torch.stack([bound, fit, fit - bound, steps])
    sample = torch.stack(calls)
    assert ((sample.mean(0) - wanted).abs() < 5 * sample.std(0) / 20**0.5 + 1e-4).all()


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


def test_compiled_denoiser_gives_the_same_loss_and_gradient():
    denoiser = SmallNetwork()
    guide = MeanFieldGuide(TokenTable(STEPS), STEPS)
    batch, results = make_batch(), []
    over = [*denoiser.parameters(), *guide.parameters()]
    for network in (denoiser, torch.compile(denoiser, backend="eager")):
        pyro.set_rng_seed(3)
        loss = RevealTraceGraph_ELBO(4)(UnmaskingModel(network, UniformSteps(), STEPS), guide)(**batch)
        results.append(torch.cat([loss.detach().reshape(1), gradient(loss, over)]))
    assert torch.isfinite(results[0]).all()
    assert torch.allclose(*results, atol=1e-5)


@pytest.mark.parametrize("width", [LENGTH, 64])
def test_low_precision_denoiser(width: int):
    """Under bf16 autocast only the denoiser's products lose digits: the loss is off by the rounding of its logits."""
    denoiser = SmallNetwork()
    guide = RandomGuide(STEPS)
    tokens = torch.randint(0, VOCAB, (8, width))
    model = UnmaskingModel(denoiser, UniformSteps(), STEPS)
    losses = []
    for enabled in (False, True):
        pyro.set_rng_seed(3)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = RevealTraceGraph_ELBO(4)(model, guide)(tokens)
        assert loss.dtype == torch.float32
        denoiser.zero_grad()
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in denoiser.parameters())
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)


def test_normalisation_keeps_full_precision():
    """Of bf16 logits: the loss is that of the same logits in float32, not of sums rounded to eight bits."""

    class Rounded(TableDenoiser):
        precise = False

        def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
            logits = (20 * super().forward(state, attention_mask)).to(torch.bfloat16)
            return logits.float() if self.precise else logits

    denoiser = Rounded()
    model, guide = UnmaskingModel(denoiser, UniformSteps(), STEPS), RandomGuide(STEPS)
    losses = []
    for denoiser.precise in (True, False):
        pyro.set_rng_seed(3)
        losses.append(RevealTraceGraph_ELBO(8)(model, guide)(**make_batch()).item())
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


@pytest.mark.parametrize("stock", [Trace_ELBO, TraceGraph_ELBO])
def test_value_is_that_of_the_stock_bounds_without_closed_forms(stock):
    """Same draws, sampled KL: the same number."""
    model, guide, batch = tiny("learned_policy/other_policy")
    values = []
    for elbo in (stock(4, max_plate_nesting=1, vectorize_particles=True), RevealTraceGraph_ELBO(4, analytic_kl=False)):
        pyro.set_rng_seed(3)
        values.append(elbo.loss(model, guide, **batch))
    assert values[0] == pytest.approx(values[1], abs=1e-3)
