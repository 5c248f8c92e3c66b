"""Tiny unmasking programs with a table denoiser, small enough to enumerate every order."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from orderppl.data.answer_tokens import AnswerTokens
from orderppl.decoding import (
    EosAware,
    FractionalSizes,
    GreedyOracle,
    Klass,
    Threshold,
    TopProb,
    UniformSizes,
)
from orderppl.decoding import LeftToRight as FixedLeftToRight
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
from orderppl.models import (
    AnswerOdds,
    BoundedEntropy,
    CosineSteps,
    EasyFirst,
    FinishingPolicy,
    FixedSizes,
    HeldBack,
    HeuristicPrior,
    LearnedPolicy,
    LearnedSchedule,
    LearnedSteps,
    LeftToRight,
    PriceRange,
    RankedPolicy,
    ResidualPolicy,
    RevealPrior,
    StepPrice,
    UniformSteps,
    UnmaskingModel,
)
from orderppl.states import UnmaskingState

LENGTH, VOCAB = 3, 4


class TableDenoiser(nn.Module):
    """Arbitrary conditionals: one row of logits per partially revealed sequence."""

    mask_index = VOCAB
    vocab_size = VOCAB

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn((VOCAB + 1,) * LENGTH + (LENGTH, VOCAB)))

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        seen = torch.where(attention_mask, state, 0)
        return self.table[seen[..., 0], seen[..., 1], seen[..., 2]]


class TokenTable(nn.Module):
    """Sequence network: outputs looked up by token and position, or by position alone when tokens are hidden."""

    def __init__(self, out: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(VOCAB + 1, LENGTH, out))

    def forward(self, tokens: Tensor | None, attention_mask: Tensor, *_: Tensor | None) -> Tensor:
        seen = torch.full_like(attention_mask, VOCAB, dtype=torch.int64) if tokens is None else tokens
        return self.table[seen, torch.arange(LENGTH)]


class StateTable(nn.Module):
    """Policy network: a logit per position, its state and the step."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(VOCAB + 1, LENGTH))
        self.confidence = nn.Parameter(torch.randn(()))
        self.step = nn.Parameter(torch.randn(()))

    def forward(self, state: UnmaskingState) -> Tensor:
        # The mean over the sequence makes every logit depend on all revealed tokens.
        local = self.table[state.tokens, torch.arange(LENGTH)]
        certainty = state.log_probs.amax(-1)
        return local + local.mean(-1, keepdim=True) + self.confidence * certainty + self.step * state.step.unsqueeze(-1)


class PricedTable(StateTable):
    """Policy network: the logits of a state, moved by the price of a step."""

    def __init__(self, prices: PriceRange) -> None:
        super().__init__()
        self.prices = prices
        self.slope = nn.Parameter(torch.randn(LENGTH))

    def forward(self, state: UnmaskingState) -> Tensor:
        places = self.prices.places(state.masked.shape[-2], state.masked.device)  # [B]
        return super().forward(state) + self.slope * places[:, None]


def priced_range(steps: int) -> StepPrice:
    """A policy for every price of a range."""
    prices = PriceRange(0.2, 1.5)
    return StepPrice(LearnedPolicy(PricedTable(prices)), prices)


def finishing_range(steps: int) -> StepPrice:
    """The same, with a decision to finish that the price moves."""
    prices = PriceRange(0.2, 1.5)
    other = LearnedPolicy(PricedTable(prices))
    odds = AnswerOdds(AnswerTokens([0], [1]), 0.5, temperature=2.0)
    return StepPrice(FinishingPolicy(other, StateTable(), prices, slope=1.5, base=odds), prices)


class PosteriorTable(nn.Module):
    """Posterior network: the policy's logits and one per true token and position."""

    def __init__(self) -> None:
        super().__init__()
        self.state = StateTable()
        self.token = TokenTable(1)

    def forward(self, state: UnmaskingState, tokens: Tensor) -> Tensor:
        return self.state(state) + self.token(tokens, state.canvas.attention_mask)[..., 0]


PRIORS = {
    "uniform": lambda steps: UniformSteps(),
    "cosine": lambda steps: CosineSteps(),
    "left_to_right": lambda steps: LeftToRight(temperature=1.0),
    "easy_first": lambda steps: EasyFirst(0.5, temperature=2.0),
    "bounded_entropy": lambda steps: BoundedEntropy(0.5, temperature=0.5),
    "learned_policy": lambda steps: LearnedPolicy(StateTable()),
    "may_wait_policy": lambda steps: LearnedPolicy(StateTable(), non_empty=False),
    "residual_policy": lambda steps: ResidualPolicy(EasyFirst(0.5), StateTable(), non_empty=False),
    "residual_plan": lambda steps: ResidualPolicy(LearnedSteps(TokenTable(2)), StateTable(), non_empty=False),
    "ranked_policy": lambda steps: RankedPolicy(HeldBack(EasyFirst(0.5, 2.0), TokenTable(2), 0.5), 2.0),
    "finishing_policy": lambda steps: FinishingPolicy(LearnedPolicy(StateTable()), StateTable()),
    "learned_steps": lambda steps: LearnedSteps(TokenTable(steps)),
    "learned_schedule": lambda steps: LearnedSchedule(steps),
    "fixed_sizes": lambda steps: FixedSizes(2.0),
    "heuristic": lambda steps: HeuristicPrior(TopProb(), 0.3),
    "looking_back": lambda steps: HeuristicPrior(Klass(0.3, eps=0.5), 0.2, non_empty=False),
    "priced_looking_back": lambda steps: StepPrice(HeuristicPrior(Klass(0.3, eps=0.5), 0.2), 0.7),
    "priced_one_each": lambda steps: StepPrice(FixedSizes(UniformSizes(LENGTH)), 0.7),
    "priced_uniform": lambda steps: StepPrice(UniformSteps(), 0.7),
    "priced_policy": lambda steps: StepPrice(LearnedPolicy(StateTable()), 0.7),
    "priced_finishing": lambda steps: StepPrice(PRIORS["finishing_policy"](steps), 0.7),
    "priced_range": priced_range,
    "priced_finishing_range": finishing_range,
}
GUIDES = ["random", "mean_field", "plan", "renormalised", "policy", "other_policy", "posterior"]
GUIDES += ["plackett_luce", "one_each", "point", "oracle", "smoothed", "klass"]


def make_guide(name: str, prior: RevealPrior, denoiser: TableDenoiser, num_steps: int) -> RevealGuide:
    """Build a guide; `policy` is tied to the prior, `other_policy` is a state-dependent guide of its own."""
    if name == "random":
        return RandomGuide(num_steps)
    if name == "mean_field":
        return MeanFieldGuide(TokenTable(num_steps), num_steps)
    if name == "plan":
        network = prior.network if isinstance(prior, LearnedSteps) else TokenTable(num_steps)
        return MeanFieldGuide(network, num_steps, sees_tokens=False)
    if name == "renormalised":
        return RenormalisedScoreGuide(TokenTable(1), num_steps, temperature=1.5)
    if name == "policy":
        return PolicyGuide(prior.prior if isinstance(prior, StepPrice) else prior, denoiser, num_steps)
    if name == "point":
        return HeuristicGuide(FixedLeftToRight(FractionalSizes(2.0)), denoiser, num_steps)
    if name == "oracle":
        return HeuristicGuide(GreedyOracle(UniformSizes(2)), denoiser, num_steps)
    if name == "smoothed":
        policy = EosAware(Threshold(0.5), (0,))
        return HeuristicGuide(policy, denoiser, num_steps, smoothing=0.2, non_empty=prior.non_empty)
    if name == "klass":
        return HeuristicGuide(Klass(0.3, eps=0.5), denoiser, num_steps, smoothing=0.1, non_empty=prior.non_empty)
    if name == "plackett_luce":
        return PlackettLuceGuide(TokenTable(1), num_steps, sizes=2.0)
    if name == "one_each":
        return PlackettLuceGuide(TokenTable(1), num_steps, sizes=UniformSizes(LENGTH))
    if name == "posterior":
        return PosteriorGuide(PosteriorTable(), denoiser, num_steps, non_empty=prior.non_empty)
    return PolicyGuide(LearnedPolicy(StateTable(), non_empty=prior.non_empty), denoiser, num_steps)


def is_finite_pair(guide: str, prior: str) -> bool:
    """Whether KL(guide || prior) is finite: a guide must not wait or take other sizes where the prior cannot."""
    same_sizes = {
        "fixed_sizes": {"plackett_luce", "point", "policy"},
        "ranked_policy": {"point", "policy"},
        "priced_one_each": {"one_each", "policy"},
    }
    if prior in same_sizes:
        return guide in same_sizes[prior]
    waits = {"random", "mean_field", "plan"}
    never_waits = {"left_to_right", "easy_first", "bounded_entropy", "learned_policy", "heuristic"}
    never_waits |= {"priced_policy", "priced_range", "priced_looking_back"}
    never_waits |= {"finishing_policy", "priced_finishing", "priced_finishing_range"}
    return not (guide in waits and prior in never_waits)


def make_pair(
    prior_name: str, guide_name: str, num_steps: int, one_step: bool = False, frozen: bool = False
) -> tuple[UnmaskingModel, RevealGuide]:
    """Build a (model, guide) pair with random weights."""
    denoiser = TableDenoiser().requires_grad_(not frozen)
    prior = PRIORS[prior_name](num_steps)
    model = UnmaskingModel(denoiser, prior, num_steps, one_step)
    return model, make_guide(guide_name, prior, denoiser, num_steps)


def make_batch(padded: bool = True) -> dict[str, Tensor]:
    """Four sequences, one of them with a padded end."""
    tokens = torch.randint(0, VOCAB, (4, LENGTH))
    attention_mask = torch.ones_like(tokens, dtype=torch.bool)
    if padded:
        attention_mask[-1, -1] = False
    return {"tokens": tokens, "attention_mask": attention_mask}


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
