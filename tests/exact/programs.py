"""Tiny unmasking programs with a table denoiser, small enough to enumerate every order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from orderppl import Batch, Policy, State
from orderppl.config import Configurable
from orderppl.data.answer_tokens import AnswerTokens
from orderppl.guides import (
    Guide,
    MeanFieldGuide,
    PlackettLuceGuide,
    PolicyGuide,
    PosteriorGuide,
    RenormalisedScoreGuide,
)
from orderppl.models import LearnedPolicy, UnmaskingModel
from orderppl.models.networks import GroupedNetwork, ScanNetwork
from orderppl.policies import (
    AtPrice,
    Blocks,
    Eager,
    EarlyCommit,
    EntropyBound,
    EosAware,
    FixedOrder,
    Halved,
    Klass,
    Oracle,
    Plan,
    PriceRange,
    RandomSteps,
    Ranked,
    Renormalised,
    ScanPlan,
    ScanPolicy,
    Smoothed,
    Threshold,
)
from orderppl.policies.schedules import UniformSizes

LENGTH, VOCAB = 3, 4  # positions to reveal, at most
WIDTH = 5  # of the widest canvas, with what is given and padding

# ---- networks and a denoiser made of tables


class TableDenoiser(nn.Module):
    """Arbitrary conditionals: one row of logits per partially revealed sequence, on a canvas of at most `WIDTH`."""

    mask_index = VOCAB
    vocab_size = VOCAB

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn((VOCAB + 1,) * WIDTH + (WIDTH, VOCAB)))

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        seen = torch.where(attention_mask, state, 0)
        whole = nn.functional.pad(seen, (0, WIDTH - seen.shape[-1]))
        return self.table[whole.unbind(-1)][:, : seen.shape[-1]]


class TokenTable(Configurable, nn.Module):
    """Sequence network: outputs looked up by token and position."""

    def __init__(self, out: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(VOCAB + 1, WIDTH, out))

    def forward(self, canvas: Batch | State) -> Tensor:
        seen = torch.where(canvas.attention_mask, canvas.tokens, 0)
        return self.table[seen, torch.arange(seen.shape[-1])]


class PlaceTable(Configurable, nn.Module):
    """Sequence network: outputs looked up by position alone."""

    def __init__(self, out: int) -> None:
        super().__init__()
        self.out = out
        self.table = nn.Parameter(torch.randn(WIDTH, out))

    def forward(self, canvas: Batch | State) -> Tensor:
        return self.table[: canvas.latent.shape[-1]].expand(*canvas.latent.shape, -1)


class StateTable(Configurable, nn.Module):
    """Policy network: a logit per position, its state and, with a clock, the step."""

    def __init__(self, clock: bool = True) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(VOCAB + 1, WIDTH))
        self.confidence = nn.Parameter(torch.randn(()))
        self.step = nn.Parameter(torch.randn(())) if clock else None

    def forward(self, state: State) -> Tensor:
        # The mean over the sequence makes every logit depend on all revealed tokens.
        tokens = torch.where(state.attention_mask, state.tokens, 0)
        local = self.table[tokens, torch.arange(tokens.shape[-1])]
        certainty = state.per_position(lambda log_probs: log_probs.amax(-1))
        logits = local + local.mean(-1, keepdim=True) + self.confidence * certainty
        return logits if self.step is None else logits + self.step * state.step.unsqueeze(-1)


class PricedTable(StateTable):
    """Policy network: the logits of a state, moved by the price of a step."""

    def __init__(self, prices: PriceRange) -> None:
        super().__init__()
        self.prices = prices
        self.slope = nn.Parameter(torch.randn(WIDTH))

    def forward(self, state: State) -> Tensor:
        places = self.prices.places(state)  # [B]
        return super().forward(state) + self.slope[: state.shape[-1]] * places[:, None]


class StateNumbers(Configurable, nn.Module):
    """What a scan knows of the positions of a state: numbers that depend on all revealed tokens, float [*, S, 2]."""

    out = 2

    def __init__(self) -> None:
        super().__init__()
        self.state = StateTable()
        self.direction = nn.Parameter(torch.randn(2))

    def forward(self, state: State) -> Tensor:
        return self.state(state)[..., None] * self.direction


class TruthTable(Configurable, nn.Module):
    """Network of a posterior: the policy's logits and one per true token and position."""

    sees_truth = True

    def __init__(self) -> None:
        super().__init__()
        self.state = StateTable()
        self.token = nn.Parameter(torch.randn(VOCAB, WIDTH))

    def forward(self, state: State) -> Tensor:
        assert state.truth is not None
        return self.state(state) + self.token[state.truth, torch.arange(state.shape[-1])]


class TrueTokens(Configurable, nn.Module):
    """What corrects a prior: numbers by true token and position, float [*, S, out], without the last axis for None."""

    sees_truth = True

    def __init__(self, out: int | None) -> None:
        super().__init__()
        self.out = out
        self.table = nn.Parameter(torch.randn(VOCAB, WIDTH, out or 1))

    def forward(self, state: State) -> Tensor:
        assert state.truth is not None
        numbers = self.table[state.truth, torch.arange(state.shape[-1])]
        return numbers if self.out is not None else numbers.squeeze(-1)


# ---- models by the policy of their prior

PRICES = PriceRange(0.2, 1.5)
Options = dict[str, Any]


def early_commit() -> EarlyCommit:
    return EarlyCommit(LearnedPolicy(StateTable()), network=StateTable())


def priced_commit() -> EarlyCommit:
    """A learned decision to finish that the price moves, around a policy that reads it too."""
    other, answer = LearnedPolicy(PricedTable(PRICES)), AnswerTokens(marks=[0], ends=[1])
    return EarlyCommit(other, answer, 0.5, 2.0, StateTable(), PRICES, slope=1.5)


def scan(num_steps: int) -> ScanPlan:
    """Steps that depend on those of earlier positions, with random weights."""
    network = ScanNetwork(num_steps, PlaceTable(2), width=4)
    for parameter in network.cell.parameters():
        nn.init.normal_(parameter)
    nn.init.normal_(network.first)
    return ScanPlan(network)


def grouped(num_steps: int) -> ScanPlan:
    """Two interleaved groups, the second of which sees the first, with random weights."""
    network = GroupedNetwork(num_steps, PlaceTable(2), groups=2, width=4, kernel=3)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)
    return ScanPlan(network)


def scan_policy(waits: bool = False) -> ScanPolicy:
    """Decisions that depend on those to their left, through traces too, with random weights."""
    network = ScanNetwork(2, StateNumbers(), width=4, rates=(0.0, 0.5))
    assert network.direct is not None
    for parameter in network.cell.parameters():
        nn.init.normal_(parameter)
    nn.init.normal_(
        network.direct.weight, std=0.5
    )  # else all may wait almost surely, which float32 cannot condition on
    return ScanPolicy(network, non_empty=not waits)


MODELS: dict[str, tuple[Callable[[int], Policy], Options]] = {
    "uniform": (lambda steps: RandomSteps(), {}),
    "cosine": (lambda steps: RandomSteps("cosine"), {}),
    "left_to_right": (lambda steps: LearnedPolicy(StateTable(), Ranked("left_to_right", temperature=1.0)), {}),
    "threshold": (lambda steps: Threshold(0.5, temperature=2.0), {}),
    "entropy_bound": (lambda steps: EntropyBound(0.5, temperature=0.5), {}),
    "learned": (lambda steps: LearnedPolicy(StateTable()), {}),
    "may_wait": (lambda steps: LearnedPolicy(StateTable(), non_empty=False), {}),
    "residual": (lambda steps: LearnedPolicy(StateTable(), Threshold(0.5, 1.0), non_empty=False), {}),
    "ranked": (
        lambda steps: Ranked(LearnedPolicy(StateTable(clock=False), Threshold(0.5, 2.0)), 2.0, temperature=2.0),
        {},
    ),
    "random_sizes": (lambda steps: Ranked("random", 2.0), {}),
    "early_commit": (lambda steps: early_commit(), {}),
    "plan": (lambda steps: Plan(PlaceTable(steps)), {}),
    "scan": (scan, {}),
    "halved": (lambda steps: Halved(scan((steps + 1) // 2)), {}),
    "grouped": (grouped, {}),
    "scan_policy": (lambda steps: scan_policy(), {}),
    "scan_policy_waits": (lambda steps: scan_policy(waits=True), {}),
    "renormalised": (lambda steps: Renormalised(LearnedPolicy(StateTable(clock=False)), 1.5), {}),
    "smoothed": (lambda steps: Smoothed(Ranked("top_prob"), 0.3), {}),
    "looking_back": (lambda steps: Smoothed(Klass(0.3, eps=0.5), 0.2, non_empty=False), {}),
    "blocks": (lambda steps: Blocks(LearnedPolicy(StateTable(), non_empty=False), 2), {}),
    "eos_aware": (lambda steps: EosAware(LearnedPolicy(StateTable(), non_empty=False), [0, 1]), {}),
    "eager": (lambda steps: Eager(LearnedPolicy(StateTable()), 0.6), {}),
    "priced_looking_back": (lambda steps: Smoothed(Klass(0.3, eps=0.5), 0.2), {"step_price": 0.7}),
    "priced_one_each": (lambda steps: Ranked("random", UniformSizes(LENGTH)), {"step_price": 0.7}),
    "priced_uniform": (lambda steps: RandomSteps(), {"step_price": 0.7}),
    "priced": (lambda steps: LearnedPolicy(StateTable()), {"step_price": 0.7}),
    "priced_early_commit": (lambda steps: early_commit(), {"step_price": 0.7}),
    "price_range": (lambda steps: LearnedPolicy(PricedTable(PRICES)), {"step_price": PRICES}),
    "price_range_commit": (lambda steps: priced_commit(), {"step_price": PRICES}),
    "at_price": (lambda steps: AtPrice(LearnedPolicy(PricedTable(PRICES)), 0.5), {"step_price": 0.5}),
}
GUIDES = ["random", "mean_field", "plan", "renormalised", "policy", "other_policy", "posterior"]
GUIDES += ["plackett_luce", "one_each", "point", "oracle", "fixed", "smoothed", "klass", "blocks", "finishing", "scan"]
GUIDES += ["scan_policy", "corrected_scan_policy", "grouped", "halved"]
GUIDES += ["corrected", "corrected_plan", "corrected_scan", "renormalised_posterior"]
WHOLE = {"scan", "grouped", "halved", "corrected_scan"}  # orders whose sets are not known one by one


def make_guide(name: str, prior: Policy, denoiser: nn.Module, num_steps: int) -> Guide:
    """Build a guide; `policy` is tied to the prior, plans too if that is one. Others wait only if the prior does."""
    waits = not prior.non_empty

    def of(policy: Policy) -> PolicyGuide:
        return PolicyGuide(policy, denoiser, num_steps)

    def posterior(policy: Policy, correction: nn.Module, temperature: float | None = None) -> PosteriorGuide:
        return PosteriorGuide(policy, denoiser, num_steps, correction, temperature=temperature)

    builders: dict[str, Callable[[], Guide]] = {
        "random": lambda: of(RandomSteps()),
        "mean_field": lambda: MeanFieldGuide(TokenTable(num_steps), num_steps),
        "plan": lambda: of(prior if isinstance(prior, Plan) else Plan(PlaceTable(num_steps))),
        "scan": lambda: of(prior if isinstance(prior, ScanPlan) else scan(num_steps)),
        "grouped": lambda: of(grouped(num_steps)),
        "halved": lambda: of(Halved(scan((num_steps + 1) // 2))),
        "scan_policy": lambda: of(scan_policy(waits)),
        "corrected_scan_policy": lambda: posterior(scan_policy(waits), TrueTokens(2)),
        "corrected": lambda: posterior(LearnedPolicy(StateTable(), non_empty=not waits), TrueTokens(None)),
        "corrected_plan": lambda: posterior(
            prior if isinstance(prior, Plan) else Plan(PlaceTable(num_steps)), TrueTokens(num_steps)
        ),
        "corrected_scan": lambda: posterior(prior if isinstance(prior, ScanPlan) else scan(num_steps), TrueTokens(2)),
        "renormalised_posterior": lambda: posterior(
            LearnedPolicy(StateTable(clock=False)), TrueTokens(None), temperature=1.5
        ),
        "renormalised": lambda: RenormalisedScoreGuide(TokenTable(1), num_steps, temperature=1.5),
        "policy": lambda: of(prior),
        "other_policy": lambda: of(LearnedPolicy(StateTable(), non_empty=not waits)),
        "posterior": lambda: of(LearnedPolicy(TruthTable(), non_empty=not waits)),
        "plackett_luce": lambda: PlackettLuceGuide(TokenTable(1), num_steps, sizes=2.0),
        "one_each": lambda: PlackettLuceGuide(TokenTable(1), num_steps, sizes=UniformSizes(LENGTH)),
        "point": lambda: of(Ranked("left_to_right", 2.0)),
        "oracle": lambda: of(Oracle("greedy", UniformSizes(2))),
        "fixed": lambda: of(FixedOrder([0, 1, 0])),
        "smoothed": lambda: of(Smoothed(EosAware(Threshold(0.5), [0]), 0.2, not waits)),
        "klass": lambda: of(Smoothed(Klass(0.3, eps=0.5), 0.1, not waits)),
        "blocks": lambda: of(Blocks(LearnedPolicy(StateTable(clock=waits), non_empty=not waits), 2)),
        "finishing": lambda: of(EarlyCommit(LearnedPolicy(StateTable(), non_empty=not waits), network=StateTable())),
    }
    return builders[name]()


def is_finite_pair(guide: str, model: str) -> bool:
    """Whether KL(guide || prior) is finite: a guide must not wait or take other sets where the prior cannot."""
    same_sets = {
        "random_sizes": {"plackett_luce", "point", "policy"},
        "ranked": {"plackett_luce", "point", "policy"},
        "priced_one_each": {"one_each", "policy"},
        "halved": {"policy"},
        "blocks": {"policy"},  # of two positions, and each block is finished in its last step
        "eos_aware": {"policy"},
        "renormalised": {"policy"},  # whose sets have the best position for sure
    }
    if model in same_sets:
        return guide in same_sets[model]
    may_wait = {"uniform", "cosine", "may_wait", "residual", "plan", "scan", "grouped", "scan_policy_waits"}
    may_wait |= {"looking_back", "priced_uniform"}
    waiting = {"random", "mean_field", "plan", "scan", "grouped", "halved", "corrected_plan", "corrected_scan"}
    return model in may_wait or guide not in waiting


PAIRS = [(model, guide) for model in MODELS for guide in GUIDES if is_finite_pair(guide, model)]


def make_pair(
    model: str, guide: str, num_steps: int, frozen: bool = False, **options: Any
) -> tuple[UnmaskingModel, Guide]:
    """Build a (model, guide) pair with random weights; further options of the model."""
    denoiser = TableDenoiser().requires_grad_(not frozen)
    build, own = MODELS[model]
    prior = build(num_steps)
    program = UnmaskingModel(denoiser, prior, num_steps, **{**own, **options})
    return program, make_guide(guide, prior, denoiser, num_steps)


# ---- batches: padding and given positions anywhere

CANVASES = {  # rows: x is to be revealed, g is given, a dot is padding
    "plain": ["xxx", "xxx", "xxx", "xxx"],
    "padded": ["xxx", "xxx", "xxx", "xx."],
    "scattered": ["xgxx", ".xxx", "x.xg", "gxgx", "xx.x", "g.g."],
    "prompted": ["gxxx", ".xgx", "gx.x", "ggxg"],
    "long_prompt": ["ggxxx", ".gxgx", "..x.x", "gg.gg"],
}


def make_batch(kind: str = "padded") -> Batch:
    """A few sequences; padding holds ids that are no tokens."""
    marks = torch.tensor([[ord(mark) for mark in row] for row in CANVASES[kind]])
    tokens = torch.randint(0, VOCAB, marks.shape)
    attention, given = marks != ord("."), marks == ord("g")
    return Batch(tokens.masked_fill(~attention, VOCAB + 3), attention, given if bool(given.any()) else None)


def copies(batch: Batch, count: int) -> Batch:
    """The same rows several times."""
    return batch.rows(torch.arange(len(batch)).repeat(count))


# ---- gradients


def learned(*programs: nn.Module) -> list[Tensor]:
    """Parameters of some programs that require a gradient, shared ones once."""
    found = dict.fromkeys(p for program in programs for p in program.parameters())
    return [p for p in found if p.requires_grad]


def flat_gradient(value: Tensor, over: list[Tensor]) -> Tensor:
    """Gradient as one vector; 0 where the value does not depend on a parameter."""
    grads = torch.autograd.grad(value, over, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, over, strict=True)])


def largest_z(draws: Tensor, exact: Tensor) -> float:
    """Largest |z| of the mean of independent gradients (float [R, P]); coordinates without spread must be equal."""
    error, spread = draws.mean(0) - exact, draws.std(0)
    certain = spread < 1e-5
    assert not certain.any() or error[certain].abs().max() < 2e-3
    return (error / (spread / len(draws) ** 0.5))[~certain].abs().max().item() if (~certain).any() else 0.0
