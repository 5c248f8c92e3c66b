"""Learned policies by hand, and what every policy promises: subsets, rows by themselves, a config of its own."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from written_denoisers import Confident, state_of

from orderppl import Policy, State, UserError, decode
from orderppl.config import Configurable, build, describe
from orderppl.models import LearnedPolicy, PolicyNetwork, PositionTable
from orderppl.models.networks import GroupedNetwork, ScanNetwork
from orderppl.policies import (
    AtPrice,
    Blocks,
    Eager,
    EarlyCommit,
    EntropyBound,
    EosAware,
    Factor,
    FixedOrder,
    Klass,
    Plan,
    PriceRange,
    RandomSteps,
    Ranked,
    Renormalised,
    ScanPlan,
    ScanPolicy,
    Smoothed,
    Spaced,
    Threshold,
)
from orderppl.policies.policy import LOGIT_LIMIT
from orderppl.policies.schedules import CosineSizes

from programs import MODELS, VOCAB, TableDenoiser, make_batch

STEPS = 3


class Constant(Configurable, nn.Module):
    """A policy network with the same logit everywhere."""

    def __init__(self, logit: float) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(logit))

    def forward(self, state: State) -> Tensor:
        return self.logit.expand(state.shape)


@pytest.mark.parametrize("non_empty", [False, True])
def test_learned_policy(non_empty: bool):
    """sigmoid(logit), divided by 1 - (1 - p)^3 when conditioned on revealing something."""
    policy, state = LearnedPolicy(Constant(0.4), non_empty=non_empty), state_of(Confident([0.6] * 3), [[1] * 3])
    p = 1 / (1 + math.exp(-0.4))
    wanted = p / (1 - (1 - p) ** 3) if non_empty else p
    assert torch.allclose(policy(state).probs, torch.full((1, 3), wanted), atol=1e-5)
    assert policy.non_empty is non_empty
    for logit in (1e4, -1e4):  # kept away from certainty
        extreme = LearnedPolicy(Constant(logit), non_empty=non_empty)(state)
        rarer = extreme.log_keep if logit > 0 else extreme.log_reveal
        assert torch.allclose(rarer, torch.full((1, 3), -LOGIT_LIMIT), atol=1e-4)


@pytest.mark.parametrize(
    "base",
    [Threshold(0.5, 1.0), EntropyBound(0.5, 1.0), Ranked("left_to_right", temperature=1.0)],
    ids=lambda base: type(base).__name__,
)
def test_a_residual_starts_as_its_base(base: Any):
    state = state_of(Confident([0.6, 0.7, 0.9]), [[1, 1, 0], [1, 1, 1]])
    at_start = LearnedPolicy(Constant(0.0), base)
    assert torch.equal(at_start.logits(state), base.logits(state))
    if not isinstance(base, Ranked):  # whose sets are of a size
        assert torch.equal(at_start(state).probs, base(state).probs)
    moved = LearnedPolicy(Constant(0.3), base)
    assert torch.allclose(moved.logits(state), base.logits(state) + 0.3)
    at_start(state).probs[0, 0].backward()
    assert at_start.network.logit.grad != 0  # and can be trained away from it


def test_a_base_without_log_odds_is_refused():
    for base in (RandomSteps(), Factor(), Blocks(Threshold(0.5, 1.0), 2)):
        with pytest.raises(UserError, match="^base: .* has no log-odds to correct"):
            LearnedPolicy(Constant(0.0), base)
    with pytest.raises(UserError, match="^temperature: Threshold at temperature 0 is a hard rule"):
        LearnedPolicy(Constant(0.0), Threshold(0.5))(state_of(Confident([0.6]), [[1]]))


@pytest.mark.parametrize("name", MODELS)
def test_every_policy_selects_among_what_is_masked(name: str):
    """Something when it never waits; rows do not influence each other; given positions and padding are left out."""
    policy = MODELS[name][0](STEPS)
    policy = AtPrice(policy, 0.5) if name.startswith("price_range") else policy  # rows pay the same price
    denoiser, batch = TableDenoiser(), make_batch("scattered")
    order = policy.order(batch, denoiser, STEPS)
    if not hasattr(order, "path"):  # a plan, which is played out from its first step on
        assert order.batch_shape == (len(batch),)
        assert torch.equal(order.sample() >= 0, batch.latent)
        return
    masked = batch.latent
    for t in range(STEPS - 1):
        step = torch.full((len(batch),), t)
        sets, _ = policy.at_step(order.path.state(masked, step))
        chosen = sets.mode
        assert chosen.dtype == torch.bool
        assert chosen.shape == masked.shape
        assert not (chosen & ~masked).any()
        if policy.non_empty:
            assert torch.equal(chosen.any(-1), masked.any(-1))
        assert not (sets.masked & ~masked).any()
        assert sets.non_empty == policy.non_empty
        one = policy.order(batch.rows(slice(1, 2)), denoiser, STEPS).path.state(masked[1:2], step[1:2])
        alone, _ = policy.at_step(one)
        assert torch.allclose(alone.log_prob(chosen[1:2]), sets.log_prob(chosen)[1:2], atol=1e-6)
        masked = masked & ~chosen


# ---- every policy can be written down


def network(**options: Any) -> PolicyNetwork:
    return PolicyNetwork(VOCAB + 1, width=8, layers=1, heads=2, **options)


def things() -> dict[str, Policy]:
    """One of everything that can be shared."""
    shared, prices = network(features=("margin",), reads_tokens=False), PriceRange(0.1, 2.0)
    commit = EarlyCommit(Threshold(0.7, 0.5), network=network(), prices=prices, slope=3.0)
    return {
        "learned": LearnedPolicy(network()),
        "residual": LearnedPolicy(network(zero_init=True), Threshold(0.7, 0.5), non_empty=False),
        "bounded": LearnedPolicy(network(features=("before", "chance")), EntropyBound(0.7, 0.5)),
        "same network twice": LearnedPolicy(shared, LearnedPolicy(shared)),
        "one of a range of prices": AtPrice(
            LearnedPolicy(network(features=("confidence", "price"), prices=prices)), price=0.4
        ),
        "finishing by price": AtPrice(commit, price=0.4),
        "plan": Plan(PositionTable(5, STEPS, noise=1.0)),
        "split plan": Plan(PositionTable(5, STEPS, split=1, noise=1.0)),
        "scan": ScanPlan(ScanNetwork(STEPS, PositionTable(5, 2, noise=1.0), width=4)),
        "scan with traces": ScanPlan(ScanNetwork(STEPS, PositionTable(5, 2, noise=1.0), width=4, rates=(0.0, 0.75))),
        "grouped scan": ScanPlan(GroupedNetwork(STEPS, PositionTable(5, 2, noise=1.0), groups=2, width=4)),
        "scan policy": ScanPolicy(ScanNetwork(2, network(vectors=3), width=4, bias=-1.0), non_empty=False),
        "renormalised": Renormalised(LearnedPolicy(network()), 0.5),
        "ranked": Ranked(LearnedPolicy(network(), Threshold(0.7, 0.5)), CosineSizes(), 0.5),
        "ranked by name": Ranked("entropy", "cosine"),
        "sizes": Ranked("random", 1.5),
        "left to right": LearnedPolicy(network(), Ranked("left_to_right", temperature=0.5)),
        "random": RandomSteps("cosine"),
        "fixed": FixedOrder([1, 0, 2], periodic=True),
        "klass": Klass(0.3, 0.4),
        "factor": Factor(2.0),
        "wrapped": Blocks(EosAware(Eager(LearnedPolicy(network()), 1.5), [1, 2]), 2),
        "smoothed": Smoothed(Threshold(0.6), 0.1),
        "spaced": Spaced(Ranked("log_odds", "dream"), 4.0),
    }


def shaken(policy: Policy) -> Policy:
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter))
    return policy


def decoded(policy: Policy, denoiser: TableDenoiser, mode: bool) -> tuple[Tensor, Tensor]:
    batch = make_batch("scattered")
    tokens = torch.where(batch.latent, denoiser.mask_index, batch.readable)
    generator = torch.Generator().manual_seed(3)
    source = {"tokens": tokens, "attention_mask": batch.attention_mask}
    out = decode(denoiser, policy, source, max_steps=STEPS, temperature=1.0, generator=generator, mode=mode)
    return out.reveal_step, out.token_log_prob


@pytest.mark.parametrize("kind", list(things()))
def test_comes_back_and_decodes_alike(kind: str):
    """From its description and its weights; a copy does too."""
    denoiser, policy = TableDenoiser(), shaken(things()[kind])
    again = build(describe(policy))
    assert type(again) is type(policy) and again is not policy
    again.load_state_dict(policy.state_dict())
    assert describe(again) == describe(policy)
    torch.manual_seed(0)
    for mode in (True, False):
        expected = None
        for one in (policy, again, copy.deepcopy(policy)):
            torch.manual_seed(1)
            found = decoded(one, denoiser, mode)
            expected = found if expected is None else expected
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])


def test_shared_parts_stay_shared():
    description = describe(things()["same network twice"])
    made = build(description)
    assert made.base.network is made.network
    assert made.network.features == ("margin",)
    priced = build(describe(things()["finishing by price"]))
    assert priced.policy.prices.low == 0.1 and priced.price == 0.4


def test_small_classes_are_written_by_their_arguments():
    assert describe(Threshold(0.5))["class_path"].endswith("Threshold")
    assert describe(Threshold(0.5))["init_args"]["tau"] == 0.5
    assert describe(Blocks(Ranked("margin"), 4))["init_args"]["policy"]["init_args"]["score"] == "margin"
