"""Many tiny programs under every objective: its three forms agree, or the call is refused as Pyro does or in a line."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceGraph_ELBO, config_enumerate
from pyro.nn import PyroModule
from torch import Tensor, nn

from orderppl import Batch, UserError
from orderppl.distributions import StepwiseOrder
from orderppl.guides import Guide, SequentialGuide
from orderppl.inference import EnumeratedELBO, ImportanceWeightedELBO, RevealTraceGraph_ELBO, SequenceWakeSleep
from orderppl.inference.objective import as_objective
from orderppl.models import SequentialUnmaskingModel, UnmaskingModel

from programs import (
    CANVASES,
    GUIDES,
    MODELS,
    WHOLE,
    TableDenoiser,
    TokenTable,
    is_finite_pair,
    learned,
    make_batch,
    make_guide,
    make_pair,
)

STEPS = 2
STOCK = {"max_plate_nesting": 1, "vectorize_particles": True}
ELBOS: dict[str, Callable[[], ELBO]] = {
    "reveal": lambda: RevealTraceGraph_ELBO(3),
    "no_control": lambda: RevealTraceGraph_ELBO(3, control_variate=0),
    "full_control": lambda: RevealTraceGraph_ELBO(3, control_variate=1.0),
    "tempered": lambda: RevealTraceGraph_ELBO(3, kl_weight=0.3),
    "one_particle": lambda: RevealTraceGraph_ELBO(1),
    "looped": lambda: RevealTraceGraph_ELBO(2, vectorize_particles=False, kl_weight=0.5),
    "importance": lambda: ImportanceWeightedELBO(3),
    "tempered_looped_importance": lambda: ImportanceWeightedELBO(2, vectorize_particles=False, kl_weight=0.3),
    "wake_sleep": lambda: SequenceWakeSleep(3),
    "enumerated": lambda: EnumeratedELBO(),
    "trace": lambda: as_objective(Trace_ELBO(3, **STOCK)),
    "trace_graph": lambda: as_objective(TraceGraph_ELBO(3, **STOCK)),
}
FORMS = ["stacked", "sequential"]
BATCHES = [*CANVASES, "tokens", "columns", "one_row", "nothing_hidden"]
DENOISERS = ["trained", "frozen"]

Program = Callable[..., object]
Data = Batch | Tensor | dict[str, Tensor]


def every_second(tokens: Tensor, latent: Tensor) -> Tensor:
    """An answer at every second position to reveal: bool [*, S]."""
    return (latent.cumsum(-1) % 2 == 0) & latent


LIKELIHOODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "robustness": {"robustness": 0.1},
    "answer": {"answer": every_second},
    "cold": {"temperature": 0.5},
    "all": {"robustness": 0.1, "answer": every_second, "temperature": 0.5},
}


@pytest.fixture(autouse=True)
def local_parameters() -> Iterator[None]:
    with pyro.settings.context(module_local_params=True):
        yield


def tensors(data: Data) -> list[Tensor]:
    if isinstance(data, Batch):
        return [part for part in (data.tokens, data.attention_mask, data.given) if part is not None]
    return list(data.values()) if isinstance(data, dict) else [data]


def assert_ok(model: Program, guide: Program, elbo: ELBO, data: Data) -> float:
    """The three forms of an objective give one value and one finite gradient, and leave their input alone."""
    assert torch.distributions.Distribution._validate_args  # as programs are: see conftest.py
    over = list(dict.fromkeys(p for one in (model, guide) if isinstance(one, nn.Module) for p in one.parameters()))
    before, found = [part.clone() for part in tensors(data)], [p.detach().clone() for p in over]

    def left() -> Tensor:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in over]
        assert all(p.requires_grad or p.grad is None for p in over)
        for p in over:
            p.grad = None
        return torch.cat([torch.zeros(1), *(grad.flatten() for grad in grads)])

    for p in over:
        p.grad = None
    pyro.set_rng_seed(7)
    plain = elbo.loss(model, guide, data)
    assert not left().any()

    pyro.set_rng_seed(7)
    differentiable = elbo.differentiable_loss(model, guide, data)
    assert differentiable.dim() == 0
    if differentiable.requires_grad:
        differentiable.backward()
    one = left()

    pyro.set_rng_seed(7)
    stepped = elbo.loss_and_grads(model, guide, data)
    other = left()

    assert isinstance(plain, float)
    assert abs(plain) < float("inf")
    assert float(differentiable.detach()) == pytest.approx(plain, rel=1e-5, abs=1e-4)
    assert float(stepped) == pytest.approx(plain, rel=1e-5, abs=1e-4)
    assert torch.isfinite(one).all()
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)
    for part, kept in zip(tensors(data), before, strict=True):
        assert torch.equal(part, kept) and not part.requires_grad
    assert all(torch.equal(p, kept) for p, kept in zip(over, found, strict=True))
    return plain


def assert_error(
    model: Program, guide: Program, elbo: ELBO, data: Data, match: str, kind: type[Exception] = UserError
) -> None:
    """All three forms refuse with the same line."""
    for form in (elbo.loss, elbo.differentiable_loss, elbo.loss_and_grads):
        with pytest.raises(kind, match=match):
            form(model, guide, data)


def assert_warning(model: Program, guide: Program, elbo: ELBO, data: Data, match: str) -> None:
    """All three forms warn, and give a value all the same."""
    for form in (elbo.loss, elbo.differentiable_loss, elbo.loss_and_grads):
        with pytest.warns(UserWarning, match=match):
            form(model, guide, data)


# ---- unmasking programs


def make_data(name: str) -> Data:
    if name in CANVASES:
        return make_batch(name)
    if name == "tokens":
        return make_batch("plain").tokens
    batch = make_batch("scattered")
    if name == "columns":
        return {"input_ids": batch.tokens, "attention_mask": batch.attention_mask.long(), "given": batch.given}
    if name == "one_row":
        return batch.rows(slice(2, 3))
    return replace(batch, given=batch.attention_mask)


class Case(NamedTuple):
    """One unmasking program, one batch and one objective, by their names."""

    model: str
    guide: str
    elbo: str
    form: str
    likelihood: str
    batch: str
    denoiser: str

    def supported(self) -> bool:
        if self.form == "sequential" and (self.elbo == "enumerated" or self.likelihood != "plain"):
            return False
        if self.form == "sequential" and WHOLE & {self.model, self.guide}:  # whole orders only
            return False
        return is_finite_pair(self.guide, self.model)

    def programs(self) -> tuple[Program, Program]:
        denoiser = TableDenoiser().requires_grad_(self.denoiser == "trained")
        build, options = MODELS[self.model]
        policy = build(STEPS)
        guide = make_guide(self.guide, policy, denoiser, STEPS)
        if self.form == "sequential":
            return SequentialUnmaskingModel(denoiser, policy, STEPS), SequentialGuide(guide)
        return UnmaskingModel(denoiser, policy, STEPS, **options, **LIKELIHOODS[self.likelihood]), guide


CHOICES = [list(MODELS), GUIDES, list(ELBOS), FORMS, list(LIKELIHOODS), BATCHES, DENOISERS]
FIELDS = list(itertools.combinations(range(len(CHOICES)), 2))


def covering_cases() -> list[Case]:
    """Few cases in which every supported pair of choices occurs: each prior with each guide, objective, batch, ..."""
    draws = random.Random(0)
    drawn = []
    for model in MODELS:
        guides = [guide for guide in GUIDES if is_finite_pair(guide, model)]
        drawn += [Case(model, guide, *map(draws.choice, CHOICES[2:])) for guide in guides * (900 // len(guides))]
    draws.shuffle(drawn)
    candidates = [case for case in drawn if case.supported()]
    covered: set[tuple[int, str, int, str]] = set()
    cases = []
    for enough in range(len(FIELDS), 0, -1):
        rest = []
        for case in candidates:
            new = {(i, case[i], j, case[j]) for i, j in FIELDS} - covered
            if len(new) >= enough:
                cases.append(case)
                covered |= new
            elif new:
                rest.append(case)
        candidates = rest
    return cases


CASES = covering_cases()


def test_the_cases_cover_every_pair_of_choices() -> None:
    """All that some supported case has."""
    for i, j in FIELDS:
        occurs = {(case[i], case[j]) for case in CASES}
        for pair in itertools.product(CHOICES[i], CHOICES[j]):
            others = [[pair[0]] if k == i else [pair[1]] if k == j else choices for k, choices in enumerate(CHOICES)]
            assert pair in occurs or not any(Case(*chosen).supported() for chosen in itertools.product(*others)), pair


@pytest.mark.parametrize("case", CASES, ids="/".join)
def test_unmasking_programs(case: Case) -> None:
    value = assert_ok(*case.programs(), ELBOS[case.elbo](), make_data(case.batch))
    if case.batch == "nothing_hidden":  # nothing to explain, and no steps to pay for
        assert value == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("elbo", [name for name in ELBOS if name != "enumerated"])
@pytest.mark.parametrize(("model", "guide"), [("learned", "other_policy"), ("random_sizes", "plackett_luce")])
def test_validation_changes_nothing(model: str, guide: str, elbo: str) -> None:
    """Densities that are looked at when validating only are not what the value is made of."""
    values = []
    for form in FORMS:
        pair = Case(model, guide, elbo, form, "plain", "scattered", "trained").programs()
        for enabled in (True, False):
            pyro.set_rng_seed(7)
            with pyro.validation_enabled(enabled):
                values.append(ELBOS[elbo]().loss(*pair, make_batch("scattered")))
    assert values[0] == pytest.approx(values[1], abs=1e-5)
    assert values[2] == pytest.approx(values[3], abs=1e-5)


# ---- other programs


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


class ThinnedModel(Pair):
    """Looks at two of the data at a time."""

    def forward(self, y: Tensor) -> None:
        with pyro.plate("data", len(y), subsample=torch.tensor([0, 2]), dim=-1) as some:
            z = pyro.sample("z", dist.Bernoulli(logits=self.weight[0].expand(len(some))))
            pyro.sample("y", dist.Normal(z, self.weight[1].exp()), obs=y[some])


class ThinnedGuide(Pair):
    def forward(self, y: Tensor) -> None:
        with pyro.plate("data", len(y), subsample=torch.tensor([0, 2]), dim=-1) as some:
            pyro.sample("z", dist.Bernoulli(logits=self.weight[0] * y[some]))


ORDINARY = {
    "reparameterised": (NormalModel, NormalGuide),
    "discrete_and_reparameterised": (MixedModel, MixedGuide),
    "observed_only": (ObservedModel, EmptyGuide),
    "subsampled": (ThinnedModel, ThinnedGuide),
}
OBSERVATIONS = torch.tensor([-0.5, 0.7, 2.4])


@pytest.mark.parametrize("elbo", [name for name in ELBOS if name != "enumerated"])
@pytest.mark.parametrize("pair", ORDINARY)
def test_ordinary_programs(pair: str, elbo: str) -> None:
    model, guide = ORDINARY[pair]
    assert_ok(model("model"), guide("guide"), ELBOS[elbo](), OBSERVATIONS)


# ---- what Pyro says of programs that do not fit, it says under every objective


class Around(Guide):
    """Another guide's order, in a program that was written differently."""

    def __init__(self, guide: Guide) -> None:
        super().__init__(guide.num_steps)
        self.guide = guide


class Renamed(Around):
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        with pyro.plate("batch", len(batch), dim=-1):
            return {"order": pyro.sample("order", self.guide.order(batch))}


class WithoutPlate(Around):
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"reveal_step": pyro.sample("reveal_step", self.guide.order(batch))}


class OfFewerRows(Around):
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.guide(batch.rows(slice(2)))


class OfOneStep(Around):
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        rows, places = batch.tokens.shape
        with pyro.plate("batch", rows, dim=-2), pyro.plate("places", places, dim=-1):
            return {"reveal_step": pyro.sample("reveal_step", dist.Categorical(torch.ones(STEPS)))}


class WithSomethingElse(Around):
    """A coin decides which of two plans is drawn from; `is_auxiliary` says that the model knows nothing of it."""

    def __init__(self, guide: Guide, is_auxiliary: bool) -> None:
        super().__init__(guide)
        self.plans = nn.ModuleList([TokenTable(STEPS), TokenTable(STEPS)])
        self.is_auxiliary = is_auxiliary

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        with pyro.plate("batch", len(batch), dim=-1):
            coin = pyro.sample("coin", dist.Bernoulli(0.3), infer={"is_auxiliary": self.is_auxiliary})
            first, second = (network(batch) for network in self.plans)
            logits = torch.where(coin[..., None, None] == 1, first, second)
            return {"reveal_step": pyro.sample("reveal_step", StepwiseOrder(logits, batch.latent))}


TRACED = [name for name in ELBOS if name not in ("enumerated", "looped", "tempered_looped_importance")]


def random_pair() -> tuple[UnmaskingModel, Guide]:
    return make_pair("uniform", "mean_field", STEPS)


@pytest.mark.parametrize("elbo", TRACED)
@pytest.mark.parametrize("canvas", ["padded", "scattered"])
def test_a_site_of_another_name_is_warned_of(canvas: str, elbo: str) -> None:
    model, guide = random_pair()
    match = "Found vars in model but not guide: {'reveal_step'}|Found non-auxiliary vars in guide but not model"
    batch = make_batch(canvas)
    if elbo in ("importance", "wake_sleep"):  # which only need the sums
        assert_warning(model, Renamed(guide), ELBOS[elbo](), batch, match)
    else:  # Pyro's gradient has no score for what the prior drew
        with pytest.warns(UserWarning, match=match), pytest.raises(KeyError, match="reveal_step"):
            ELBOS[elbo]().loss_and_grads(model, Renamed(guide), batch)


@pytest.mark.parametrize("elbo", TRACED)
def test_a_site_that_the_model_lacks_is_warned_of(elbo: str) -> None:
    model, guide = random_pair()
    for canvas in ("padded", "scattered"):
        batch = make_batch(canvas)
        said = "Found non-auxiliary vars in guide but not model"
        assert_warning(model, WithSomethingElse(guide, False), ELBOS[elbo](), batch, said)
        assert_ok(model, WithSomethingElse(guide, True), ELBOS[elbo](), batch)


@pytest.mark.parametrize("elbo", TRACED)
def test_rows_that_are_not_those_of_the_model_are_refused(elbo: str) -> None:
    model, guide = random_pair()
    batch = make_batch("scattered")
    said = "Shape mismatch inside plate|shapes disagree at site 'reveal_step'"
    assert_error(model, OfFewerRows(guide), ELBOS[elbo](), batch, said, ValueError)


@pytest.mark.parametrize("kind", [RevealTraceGraph_ELBO, ImportanceWeightedELBO, SequenceWakeSleep, TraceGraph_ELBO])
def test_sites_of_another_shape_are_refused(kind: Any) -> None:
    """No plate, more plates than were announced, one site per position instead of one per sequence."""
    model, guide = random_pair()
    batch = make_batch("scattered")
    one, none, two = (as_objective(kind(1, max_plate_nesting=nesting)) for nesting in (1, 0, 2))
    assert_error(model, WithoutPlate(guide), one, batch, 'at site "reveal_step", invalid log_prob shape', ValueError)
    assert_error(model, guide, none, batch, "plate stack overflow", ValueError)
    assert_error(model, OfOneStep(guide), two, batch, "Model and guide event_dims disagree", ValueError)


@pytest.mark.parametrize("elbo", TRACED)
def test_enumeration_is_warned_of(elbo: str) -> None:
    model, guide = random_pair()
    assert_warning(model, config_enumerate(guide), ELBOS[elbo](), make_batch("scattered"), "you need to use TraceEnum")


@pytest.mark.parametrize("elbo", TRACED)
def test_an_order_that_is_fixed_in_the_guide_is_refused(elbo: str) -> None:
    """Conditioned, the guide draws nothing."""
    model, guide = random_pair()
    batch = make_batch("scattered")
    fixed = poutine.condition(guide, data={"reveal_step": torch.where(batch.latent, 1, -1)})
    assert_error(model, fixed, ELBOS[elbo](), batch, "site reveal_step must be sampled in trace", RuntimeError)


# ---- what the library refuses


@pytest.mark.parametrize("elbo", [name for name in ELBOS if name != "enumerated"])
def test_orders_that_are_known_as_a_whole_are_refused_site_by_site(elbo: str) -> None:
    """In one line, although Pyro rebuilds an error inside a traced program from its text."""
    for model, guide in (("uniform", "scan"), ("scan", "policy"), ("scan", "mean_field")):
        pair = Case(model, guide, elbo, "sequential", "plain", "scattered", "trained").programs()
        said = r"\A(guide|policy): draws whole orders, whose sets are not known one by one; [^\n]*\Z"
        assert_error(*pair, ELBOS[elbo](), make_batch("scattered"), match=said)


@pytest.mark.parametrize("elbo", ["reveal", "looped", "importance", "wake_sleep"])
def test_another_number_of_steps_is_refused(elbo: str) -> None:
    model, _ = make_pair("uniform", "mean_field", STEPS)
    _, guide = make_pair("uniform", "mean_field", STEPS - 1)
    assert_error(
        model, guide, ELBOS[elbo](), make_batch("scattered"), r"\Anum_steps: 1 in the guide and 2 in the model"
    )


def test_more_orders_than_can_be_enumerated_are_refused() -> None:
    pair, elbo = make_pair("uniform", "random", STEPS), EnumeratedELBO(max_orders=7)
    assert_error(*pair, elbo, make_batch(), match=r"max_orders: 2\^3 = 8 orders")
    said = r"max_orders: 2\^3 = 8 orders of 3 positions"  # given ones do not count
    assert_error(*pair, elbo, make_batch("prompted"), match=said)


@pytest.mark.parametrize("pair", ORDINARY)
def test_ordinary_programs_are_not_enumerated(pair: str) -> None:
    model, guide = ORDINARY[pair]
    said = "reveal_step: the guide has no such site"
    assert_error(model("model"), guide("guide"), EnumeratedELBO(), OBSERVATIONS, match=said)


def test_what_is_drawn_besides_the_order_is_not_enumerated() -> None:
    model, guide = random_pair()
    for is_auxiliary in (True, False):
        other = WithSomethingElse(guide, is_auxiliary)
        assert_error(model, other, EnumeratedELBO(), make_batch("scattered"), match="coin: is drawn besides the order")


def test_the_check_notices_forms_that_disagree() -> None:
    class Twice(RevealTraceGraph_ELBO):
        def loss_and_grads(self, *args: Any) -> float:
            return super().loss_and_grads(*args) + super().loss_and_grads(*args)

    class Biased(RevealTraceGraph_ELBO):
        def value_and_surrogate(self, *args: Any) -> tuple[Tensor, Tensor]:
            value, surrogate = super().value_and_surrogate(*args)
            return (value + 1, surrogate) if torch.is_grad_enabled() else (value, surrogate)

    class Writes(RevealTraceGraph_ELBO):
        def value_and_surrogate(self, *args: Any) -> tuple[Tensor, Tensor]:
            args[2][0].tokens.zero_()
            return super().value_and_surrogate(*args)

    pair = make_pair("learned", "renormalised", STEPS)
    assert learned(*pair)
    for wrong in (Twice(3), Biased(3), Writes(3)):
        for canvas in ("padded", "scattered"):
            with pytest.raises(AssertionError):
                assert_ok(*pair, wrong, make_batch(canvas))
