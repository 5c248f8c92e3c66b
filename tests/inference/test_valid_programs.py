"""Many tiny programs under every objective: its three forms agree, or the call is refused in one line."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import ELBO, Trace_ELBO, TraceGraph_ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn

from orderppl.errors import UserError
from orderppl.guides import SequentialGuide
from orderppl.inference import EnumeratedELBO, ImportanceWeightedELBO, RevealTraceGraph_ELBO, SequenceWakeSleep
from orderppl.inference.objective import as_objective
from orderppl.models import SequentialUnmaskingModel, UnmaskingModel

from programs import GUIDES, LENGTH, PRIORS, VOCAB, TableDenoiser, is_finite_pair, make_batch, make_guide, make_pair

STEPS = 2
STOCK = {"max_plate_nesting": 1, "vectorize_particles": True}
ELBOS = {
    "reveal": lambda: RevealTraceGraph_ELBO(3),
    "gain": lambda: RevealTraceGraph_ELBO(3, credit="gain"),
    "expected": lambda: RevealTraceGraph_ELBO(3, credit="expected"),
    "no_leave_one_out": lambda: RevealTraceGraph_ELBO(3, leave_one_out=False),
    "sampled_kl": lambda: RevealTraceGraph_ELBO(3, analytic_kl=False),
    "tempered": lambda: RevealTraceGraph_ELBO(3, kl_weight=0.3),
    "one_particle": lambda: RevealTraceGraph_ELBO(1),
    "looped": lambda: RevealTraceGraph_ELBO(2, vectorize_particles=False),
    "importance": lambda: ImportanceWeightedELBO(3),
    "tempered_looped_importance": lambda: ImportanceWeightedELBO(2, vectorize_particles=False, kl_weight=0.3),
    "wake_sleep": lambda: SequenceWakeSleep(3),
    "enumerated": lambda: EnumeratedELBO(),
    "trace": lambda: as_objective(Trace_ELBO(3, **STOCK)),
    "trace_graph": lambda: as_objective(TraceGraph_ELBO(3, **STOCK)),
}
NEEDS_ALL_STEPS = {"gain", "importance", "tempered_looped_importance", "wake_sleep", "enumerated"}
FORMS = ["stacked", "one_step", "sequential"]
BATCHES = ["padded", "unpadded", "prompted", "one_row", "no_mask"]
DENOISERS = ["trained", "frozen"]

Program = Callable[..., object]


@pytest.fixture(autouse=True)
def local_parameters() -> Iterator[None]:
    with pyro.settings.context(module_local_params=True):
        yield


def parameters(*programs: Program) -> list[nn.Parameter]:
    modules = (program for program in programs if isinstance(program, nn.Module))
    return list(dict.fromkeys(p for module in modules for p in module.parameters()))


def assert_ok(model: Program, guide: Program, elbo: ELBO, *args: Tensor | None) -> None:
    """The three forms of an objective give one value and one finite gradient, and leave their input alone."""
    assert torch.distributions.Distribution._validate_args  # as programs are: see conftest.py
    over, before = parameters(model, guide), [None if arg is None else arg.clone() for arg in args]
    found = [p.detach().clone() for p in over]

    def left() -> Tensor:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in over]
        assert all(p.requires_grad or p.grad is None for p in over)
        for p in over:
            p.grad = None
        return torch.cat([torch.zeros(1), *(grad.flatten() for grad in grads)])

    for p in over:
        p.grad = None
    pyro.set_rng_seed(7)
    plain = elbo.loss(model, guide, *args)
    assert not left().any()

    pyro.set_rng_seed(7)
    differentiable = elbo.differentiable_loss(model, guide, *args)
    assert differentiable.dim() == 0
    if differentiable.requires_grad:
        differentiable.backward()
    one = left()

    pyro.set_rng_seed(7)
    stepped = elbo.loss_and_grads(model, guide, *args)
    other = left()

    assert isinstance(plain, float)
    assert abs(plain) < float("inf")
    assert float(differentiable.detach()) == pytest.approx(plain, rel=1e-5, abs=1e-4)
    assert float(stepped) == pytest.approx(plain, rel=1e-5, abs=1e-4)
    assert torch.isfinite(one).all()
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)
    for arg, kept in zip(args, before, strict=True):
        assert arg is None or (torch.equal(arg, kept) and not arg.requires_grad)
    assert all(torch.equal(p, kept) for p, kept in zip(over, found, strict=True))


def assert_error(model: Program, guide: Program, elbo: ELBO, *args: Tensor | None, match: str) -> None:
    """All three forms refuse with the same line."""
    for form in (elbo.loss, elbo.differentiable_loss, elbo.loss_and_grads):
        with pytest.raises(UserError, match=match):
            form(model, guide, *args)


class PromptedTable(TableDenoiser):
    """The table denoiser, its logits shifted by the tokens of the prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(VOCAB, VOCAB))

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        prompt, read = state[:, :-LENGTH], attention_mask[:, :-LENGTH]
        shift = (self.shift[prompt] * read.unsqueeze(-1)).sum(-2, keepdim=True)  # [N, 1, V]
        logits = super().forward(state[:, -LENGTH:], attention_mask[:, -LENGTH:]) + shift
        return torch.cat([shift.expand(-1, prompt.shape[-1], -1), logits], 1)  # [N, C + L, V]


class Case(NamedTuple):
    """One unmasking program, one batch and one objective, by their names."""

    prior: str
    guide: str
    elbo: str
    form: str
    batch: str
    denoiser: str

    def supported(self) -> bool:
        if self.form == "one_step" and self.elbo in NEEDS_ALL_STEPS:
            return False
        looks_back = self.guide == "klass" or (self.guide == "policy" and "looking_back" in self.prior)
        if self.form == "sequential" and (self.elbo == "enumerated" or looks_back):
            return False
        return is_finite_pair(self.guide, self.prior)

    def programs(self) -> tuple[Program, Program]:
        denoiser, prior = PromptedTable().requires_grad_(self.denoiser == "trained"), PRIORS[self.prior](STEPS)
        guide = make_guide(self.guide, prior, denoiser, STEPS)
        if self.form == "sequential":
            return SequentialUnmaskingModel(denoiser, prior, STEPS), SequentialGuide(guide)
        return UnmaskingModel(denoiser, prior, STEPS, one_step=self.form == "one_step"), guide

    def arguments(self) -> tuple[Tensor | None, ...]:
        tokens, attention_mask = make_batch(padded=self.batch != "unpadded").values()
        if self.batch == "no_mask":
            return (tokens,)
        if self.batch == "one_row":
            return tokens[-1:], attention_mask[-1:]
        if self.batch == "prompted":
            context = torch.randint(0, VOCAB, (len(tokens), 2))
            return tokens, attention_mask, context, torch.arange(2) >= torch.tensor([[0], [1], [0], [1]])
        return tokens, attention_mask


def covering_cases() -> list[Case]:
    """Few cases in which every supported pair of choices occurs: each prior with each guide, objective, batch, ..."""
    choices = itertools.product(PRIORS, GUIDES, ELBOS, FORMS, BATCHES, DENOISERS)
    candidates = [case for case in (Case(*chosen) for chosen in choices) if case.supported()]
    random.Random(0).shuffle(candidates)
    covered: set[tuple[str, str]] = set()
    cases = []
    pairs_per_case = len(Case._fields) * (len(Case._fields) - 1) // 2
    for enough in range(pairs_per_case, 0, -1):
        rest = []
        for case in candidates:
            named = [f"{field}={value}" for field, value in zip(Case._fields, case, strict=True)]
            new = set(itertools.combinations(named, 2)) - covered
            if len(new) >= enough:
                cases.append(case)
                covered |= new
            elif new:
                rest.append(case)
        candidates = rest
    return cases


@pytest.mark.parametrize("case", covering_cases(), ids="/".join)
def test_unmasking_programs(case: Case) -> None:
    assert_ok(*case.programs(), ELBOS[case.elbo](), *case.arguments())


class Pair(PyroModule):
    """A model and its guide over shared data y, float [N]."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.weight = nn.Parameter(torch.tensor([0.3, -0.2]))


class NormalModel(Pair):
    def forward(self, y: Tensor) -> None:
        with pyro.plate("data", len(y), dim=-1):
            z = pyro.sample("z", dist.Normal(self.weight[0].expand(len(y)), 1.0))
            pyro.sample("y", dist.Normal(z, self.weight[1].exp()), obs=y)


class NormalGuide(Pair):
    def forward(self, y: Tensor) -> None:
        with pyro.plate("data", len(y), dim=-1):
            pyro.sample("z", dist.Normal(self.weight[0] * y, self.weight[1].exp()))


class MixedModel(Pair):
    def forward(self, y: Tensor) -> None:
        with pyro.plate("data", len(y), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(logits=self.weight[0].expand(len(y))))
            x = pyro.sample("x", dist.Normal(z, 1.0))
            pyro.sample("y", dist.Normal(x + self.weight[1], 1.0), obs=y)


class MixedGuide(Pair):
    def forward(self, y: Tensor) -> None:
        with pyro.plate("data", len(y), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(logits=self.weight[0] * y))
            pyro.sample("x", dist.Normal(self.weight[1] * z + 0.4 * y, 0.7))


class ObservedModel(Pair):
    def forward(self, y: Tensor) -> None:
        with pyro.plate("data", len(y), dim=-1):
            pyro.sample("y", dist.Normal(self.weight[0].expand(len(y)), self.weight[1].exp()), obs=y)


class EmptyGuide(Pair):
    def forward(self, y: Tensor) -> None:
        pass


ORDINARY = {
    "reparameterised": (NormalModel, NormalGuide),
    "discrete_and_reparameterised": (MixedModel, MixedGuide),
    "observed_only": (ObservedModel, EmptyGuide),
}


@pytest.mark.parametrize("elbo", [name for name in ELBOS if name != "enumerated"])
@pytest.mark.parametrize("pair", ORDINARY)
def test_ordinary_programs(pair: str, elbo: str) -> None:
    model, guide = ORDINARY[pair]
    assert_ok(model("model"), guide("guide"), ELBOS[elbo](), torch.tensor([-0.5, 0.7, 2.4]))


@pytest.mark.parametrize("elbo", sorted(NEEDS_ALL_STEPS))
def test_one_step_programs_are_refused_where_all_steps_are_needed(elbo: str) -> None:
    pair = make_pair("learned_policy", "renormalised", STEPS, one_step=True)
    field = "credit" if elbo == "gain" else "one_step"
    assert_error(*pair, ELBOS[elbo](), *make_batch().values(), match=f"{field}: ")


@pytest.mark.parametrize(("prior", "guide"), [("uniform", "klass"), ("looking_back", "policy")])
def test_guides_that_look_back_are_refused_site_by_site(prior: str, guide: str) -> None:
    """In one line, although Pyro rebuilds an error inside a traced program from its text."""
    pair = Case(prior, guide, "reveal", "sequential", "padded", "trained").programs()
    for elbo in (RevealTraceGraph_ELBO(2), ImportanceWeightedELBO(2)):
        assert_error(*pair, elbo, *make_batch().values(), match=r"\Apolicy: looks back at earlier steps: .*programs\Z")


def test_more_orders_than_can_be_enumerated_are_refused() -> None:
    pair = make_pair("uniform", "random", STEPS)
    assert_error(*pair, EnumeratedELBO(max_orders=7), *make_batch().values(), match=r"max_orders: 2\^3 = 8 orders")


@pytest.mark.parametrize("pair", ORDINARY)
def test_ordinary_programs_are_not_enumerated(pair: str) -> None:
    model, guide = ORDINARY[pair]
    y = torch.tensor([-0.5, 0.7, 2.4])
    assert_error(model("model"), guide("guide"), EnumeratedELBO(), y, match="reveal_step: the guide's site has no such")


def test_the_check_notices_forms_that_disagree() -> None:
    class Twice(RevealTraceGraph_ELBO):
        def loss_and_grads(self, *args: Tensor) -> float:
            return super().loss_and_grads(*args) + super().loss_and_grads(*args)

    class Biased(RevealTraceGraph_ELBO):
        def value_and_surrogate(self, *args):
            value, surrogate = super().value_and_surrogate(*args)
            return (value + 1, surrogate) if torch.is_grad_enabled() else (value, surrogate)

    pair = make_pair("learned_policy", "renormalised", STEPS)
    for wrong in (Twice(3), Biased(3)):
        with pytest.raises(AssertionError):
            assert_ok(*pair, wrong, *make_batch().values())
