from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import Tensor, nn

from orderppl.data.answer_tokens import AnswerTokens
from orderppl.data.tokenizers import WordTokenizer
from orderppl.decoding import Policy, StochasticPolicy, Threshold, decode
from orderppl.denoising import Canvas
from orderppl.errors import UserError
from orderppl.models import (
    ARCHITECTURES,
    AnswerOdds,
    BoundedEntropy,
    CosineSteps,
    DenoiserIdentity,
    EasyFirst,
    FinishingPolicy,
    HeldBack,
    HeuristicPrior,
    LearnedPolicy,
    LearnedSchedule,
    LearnedSteps,
    LeftToRight,
    OrderPolicy,
    PriceRange,
    RankedPolicy,
    ResidualPolicy,
    StepPrice,
    UniformSteps,
    as_policy,
)
from orderppl.models.architectures import build, describe
from orderppl.models.networks import PolicyNetwork, PositionTable, SequenceEncoder
from orderppl.models.plans import OpeningPlan
from orderppl.states import UnmaskingState

from programs import LENGTH, VOCAB, TableDenoiser

STEPS = 3


def network(**options: Any) -> PolicyNetwork:
    return PolicyNetwork(VOCAB + 1, width=8, layers=1, heads=2, **options)


def priced() -> StepPrice:
    prices = PriceRange(0.1, 2.0)
    return StepPrice(LearnedPolicy(network(features=("confidence", "price"), prices=prices)), prices)


def finishing_by_price() -> StepPrice:
    prices = PriceRange(0.1, 2.0)
    odds = AnswerOdds(AnswerTokens([0], [1, 2]), 0.7)
    return StepPrice(FinishingPolicy(EasyFirst(0.7, 0.5), network(), prices, slope=3.0, base=odds), prices)


def learned_things() -> dict[str, nn.Module]:
    """One of everything that can be shared."""
    shared = network(features=("margin",), reads_tokens=False)
    return {
        "residual": StepPrice(ResidualPolicy(EasyFirst(0.7, 0.5), network(zero_init=True), non_empty=False), 0.3),
        "learned": LearnedPolicy(network()),
        "finishing": StepPrice(FinishingPolicy(EasyFirst(0.7, 0.5), network()), 0.3),
        "finishing by price": finishing_by_price(),
        "bounded": ResidualPolicy(BoundedEntropy(0.7, 0.5), network(features=("before", "chance"), zero_init=True)),
        "same network twice": ResidualPolicy(LearnedPolicy(shared), shared),
        "range of prices": priced(),
        "schedule": LearnedSchedule(STEPS),
        "steps": LearnedSteps(PositionTable(LENGTH, STEPS, noise=1.0)),
        "ranked": RankedPolicy(HeldBack(EasyFirst(0.7, 0.5), PositionTable(LENGTH, 2, noise=1.0)), "cosine"),
        "left to right": LeftToRight(0.5),
        "uniform": UniformSteps(),
        "cosine": CosineSteps(),
        "table": PositionTable(LENGTH, STEPS, split=1, noise=1.0),
        "opening": OpeningPlan(TableDenoiser(), STEPS, width=8),
        "encoder": SequenceEncoder(VOCAB + 1, STEPS, width=8, layers=1, heads=2),
    }


def shaken(thing: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in thing.parameters():
            parameter.add_(torch.randn_like(parameter))
    return thing


def decoded(policy: Policy, denoiser: TableDenoiser, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([LENGTH, LENGTH - 1, LENGTH])
    output = decode(denoiser, policy, length=sizes, max_steps=STEPS, temperature=1.0, generator=generator)
    return output.sequences, output.reveal_step


@pytest.mark.parametrize("kind", list(learned_things()))
def test_comes_back_and_decodes_alike(tmp_path: Path, kind: str) -> None:
    denoiser, learned = TableDenoiser(), shaken(learned_things()[kind])
    for decision in ("mode", "sample"):
        policy = OrderPolicy(
            learned,
            STEPS,
            DenoiserIdentity.of(denoiser, name="a/b"),
            decision=decision,
            training={"temperature": 0.1, "settings": {"lr": 1e-3}},
            results=[{"metric": "elbo", "value": -1.5}],
        )
        assert isinstance(policy, StochasticPolicy)
        policy.save_pretrained(tmp_path / decision)
        again = OrderPolicy.from_pretrained(tmp_path / decision)
        for got, expected in zip(
            decoded(again, denoiser), decoded(as_policy(learned, decision), denoiser), strict=True
        ):
            assert torch.equal(got, expected)
        attended = torch.ones(2, LENGTH, dtype=torch.bool)
        hidden = torch.full((2, LENGTH), denoiser.mask_index)
        state = UnmaskingState(hidden, attended, torch.zeros(2, dtype=torch.long), STEPS, Canvas(denoiser, attended))
        law, again_law = policy.distribution(state), again.distribution(state)
        assert torch.equal(again_law.mode, law.mode)
        assert torch.equal(again_law.log_prob(law.mode), law.log_prob(law.mode))
        assert again.training_data == policy.training_data
        assert again.results == policy.results
        assert (again.num_steps, again.decision, again.denoiser) == (STEPS, decision, policy.denoiser)
        assert not any(parameter.requires_grad for parameter in again.parameters())


def test_everything_registered_is_covered_and_describes_its_constructor() -> None:
    things: list[Any] = [module for thing in learned_things().values() for module in thing.modules()]
    things += [priced().price, AnswerTokens([0], [1, 2])]
    kinds = {type(thing) for thing in things}
    assert kinds >= set(ARCHITECTURES.values())
    for thing in things:
        if type(thing) in ARCHITECTURES.values():
            arguments = set(inspect.signature(type(thing)).parameters)
            initial = {"zero_init", "bias", "noise"}  # of weights that are loaded
            assert set(thing.config) == arguments - initial


def test_shared_parts_stay_shared() -> None:
    description = describe(learned_things()["same network twice"])
    assert description["network"] == {"same": ".base.network"}
    made = build(json.loads(json.dumps(description)))
    assert made.base.network is made.network
    assert made.network.features == ("margin",)
    family = build(describe(priced()))
    assert family.price is family.prior.network.prices


def test_one_price_of_a_range(tmp_path: Path) -> None:
    denoiser, family = TableDenoiser(), priced()
    shaken(family)
    attended = torch.ones(2, LENGTH, dtype=torch.bool)
    hidden = torch.full((2, LENGTH), denoiser.mask_index)
    state = UnmaskingState(hidden, attended, torch.zeros(2, dtype=torch.long), STEPS, Canvas(denoiser, attended))
    laws = []
    for price in (0.1, 2.0, None):
        policy = OrderPolicy(family, STEPS, decision="sample", price=price)
        policy.save_pretrained(tmp_path / str(price))
        again = OrderPolicy.from_pretrained(tmp_path / str(price))
        assert torch.equal(decoded(again, denoiser)[1], decoded(policy, denoiser)[1])
        laws.append(again.distribution(state).probs)
        assert torch.equal(laws[-1], policy.distribution(state).probs)
        torch.testing.assert_close(*laws[-1])  # one price for all rows
    assert (laws[0] - laws[1]).abs().min() > 0
    middle = family.at(family.price.middle).distribution(state).probs  # type: ignore[union-attr]
    assert torch.equal(laws[2], middle)


def test_dtype_is_kept(tmp_path: Path) -> None:
    OrderPolicy(PositionTable(LENGTH, STEPS).double(), STEPS).save_pretrained(tmp_path / "p")
    learned: Any = OrderPolicy.from_pretrained(tmp_path / "p").learned
    assert learned.logits.dtype == torch.float64


def test_rank_and_beta(tmp_path: Path) -> None:
    denoiser = TableDenoiser()
    ranked = OrderPolicy(PositionTable(LENGTH, STEPS, noise=1.0), STEPS, decision="rank")
    ranked.save_pretrained(tmp_path / "rank")
    again = OrderPolicy.from_pretrained(tmp_path / "rank")
    assert torch.equal(decoded(again, denoiser)[1], decoded(ranked, denoiser)[1])
    eager = OrderPolicy(LearnedPolicy(network()), STEPS, decision="sample", beta=4.0)
    eager.save_pretrained(tmp_path / "beta")
    assert OrderPolicy.from_pretrained(tmp_path / "beta").beta == 4.0
    with pytest.raises(UserError, match="beta: a plan has no such dial"):
        OrderPolicy(PositionTable(LENGTH, STEPS), STEPS, beta=2.0)
    with pytest.raises(UserError, match="price: LearnedPolicy was not learned for a range"):
        OrderPolicy(LearnedPolicy(network()), STEPS, price=2.0)
    with pytest.raises(UserError, match="decision"):
        OrderPolicy(LearnedPolicy(network()), STEPS, decision="rank")


def test_refuses_another_denoiser(tmp_path: Path) -> None:
    denoiser = TableDenoiser()
    words, others = WordTokenizer.build(["1 + 2"]), WordTokenizer.build(["1 - 2"])
    identity = DenoiserIdentity.of(denoiser, words, name="owner/model")
    OrderPolicy(UniformSteps(), STEPS, identity).save_pretrained(tmp_path / "p")
    policy = OrderPolicy.from_pretrained(tmp_path / "p")
    policy.check(denoiser, words)
    with pytest.raises(UserError, match=r"other tokens than .*; use owner/model, or learn"):
        policy.check(denoiser, others)
    decoded(policy, denoiser)
    larger, moved = TableDenoiser(), TableDenoiser()
    larger.vocab_size += 1
    moved.mask_index -= 1
    for other, problem in ((larger, f"has {larger.vocab_size} token classes"), (moved, "has MASK")):
        with pytest.raises(UserError, match=problem):
            decoded(policy, other)


def test_only_what_can_be_rebuilt_is_saved(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it is a HeuristicPrior, which nothing rebuilds; add its class to"):
        OrderPolicy(HeuristicPrior(Threshold(0.5)), STEPS).save_pretrained(tmp_path / "p")
    with pytest.raises(UserError, match="network is a Linear"):
        OrderPolicy(LearnedPolicy(nn.Linear(2, 2)), STEPS).save_pretrained(tmp_path / "p")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        OrderPolicy(UniformSteps(), STEPS).save_pretrained(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_damaged_folders(tmp_path: Path) -> None:
    folder = OrderPolicy(PositionTable(LENGTH, STEPS, noise=1.0), STEPS).save_pretrained(tmp_path / "p")
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "order_policy.json",
        "order_policy.safetensors",
    ]
    assert list(tmp_path.iterdir()) == [folder]
    config, weights = folder / "order_policy.json", folder / "order_policy.safetensors"
    content, data = json.loads(config.read_text()), weights.read_bytes()

    def refused(problem: str) -> None:
        with pytest.raises(UserError, match=problem) as caught:
            OrderPolicy.from_pretrained(folder)
        assert "\n" not in str(caught.value)
        config.write_text(json.dumps(content))
        weights.write_bytes(data)

    weights.write_bytes(data[:-4] + bytes(4))
    refused("are not those its order_policy.json was written for")
    weights.unlink()
    refused("holds no order_policy.json with order_policy.safetensors; write one by: orderppl share")
    config.write_text("{")
    refused(r"is damaged \(JSONDecodeError")
    config.write_text(json.dumps({**content, "format": 2}))
    refused("has format 2, this version reads 1; update orderppl")
    config.write_text(json.dumps({**content, "architecture": {"name": "os.system"}}))
    refused("unknown architecture 'os.system'")
    config.write_text(json.dumps({**content, "architecture": {**content["architecture"], "width": 3}}))
    refused(r"is damaged \(TypeError")
    config.write_text(json.dumps({**content, "architecture": {**content["architecture"], "length": 4}}))
    refused("'logits' has shape")
    OrderPolicy.from_pretrained(folder)


def test_saving_again_replaces(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    OrderPolicy(UniformSteps(), STEPS).save_pretrained(folder)
    (folder / "notes.txt").write_text("mine")
    table = PositionTable(LENGTH, STEPS, noise=1.0)
    OrderPolicy(table, STEPS).save_pretrained(folder)
    learned: Any = OrderPolicy.from_pretrained(folder).learned
    assert torch.equal(learned.logits, table.logits)
    assert (folder / "notes.txt").read_text() == "mine"


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    OrderPolicy(UniformSteps(), STEPS).save_pretrained(tmp_path / "p")
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(name=name, **options)
        return str(tmp_path / "p")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert isinstance(OrderPolicy.from_pretrained("a/b", revision="v1").learned, UniformSteps)
    assert (asked["name"], asked["revision"]) == ("a/b", "v1")
    assert asked["allow_patterns"] == ["order_policy.json", "order_policy.safetensors"]
    monkeypatch.undo()
    with pytest.raises(UserError, match="policy: nobody/nothing is neither a folder here nor in the local cache"):
        OrderPolicy.from_pretrained("nobody/nothing")
