"""Sweeps: their names and families, the policies they make, and what they refuse."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from torch import Tensor

from orderppl import evaluate
from orderppl.errors import UserError
from orderppl.evaluation import Arm, frontier, sweep
from orderppl.evaluation.arms import draws, standard_heuristics
from orderppl.policies import (
    AtPrice,
    Blocks,
    Eager,
    EarlyCommit,
    EosAware,
    FixedOrder,
    Klass,
    Oracle,
    Policy,
    RandomSteps,
    Ranked,
    Smoothed,
    Threshold,
)

from chain_rows import ROWS, Chain, padded


def names(specs: Any, **options: Any) -> dict[str, str | None]:
    return {arm.name: arm.family for arm in sweep(specs, **options)}


def first_token(tokens: Tensor, latent: Tensor) -> Tensor:
    return latent & (latent.long().cumsum(-1) == 1)


def test_every_combination_is_an_arm() -> None:
    spec = {"policy": "Ranked", "score": ["random", "margin"], "sizes": ["uniform", "cosine"], "budgets": [2, 4]}
    assert names(spec) == {
        f"{score} {sizes} T={budget}": f"{score} {sizes}"
        for score in ("random", "margin")
        for sizes in ("uniform", "cosine")
        for budget in (2, 4)
    }
    arms = {arm.name: arm for arm in sweep(spec, seeds=(3, 4))}
    assert arms["random cosine T=4"].steps == 4 and arms["random cosine T=4"].policy.score == "random"
    assert arms["random uniform T=2"].seeds == (3, 4) and arms["margin uniform T=2"].seeds == (3,)
    assert arms["margin uniform T=2"].setting == {} and arms["margin uniform T=2"].labels(2)["setting"] == "T=2"


def test_one_number_makes_the_curve_and_the_others_families() -> None:
    assert names([{"policy": "Threshold", "tau": [0.5, 0.9], "block_size": [8, 16], "budgets": 10}]) == {
        f"threshold T=10 block {size} tau={tau}": f"threshold T=10 block {size}"
        for size in (8, 16)
        for tau in (0.5, 0.9)
    }
    assert names({"policy": "Klass", "tau": [0.5, 0.9], "eps": [0.01, 0.1]}) == {
        f"klass eps={eps} tau={tau}": f"klass eps={eps}" for eps in (0.01, 0.1) for tau in (0.5, 0.9)
    }
    assert names({"policy": "Ranked", "score": "left_to_right", "sizes": [2.0, 1.5]}) == {
        "left_to_right sizes=2": "left_to_right",
        "left_to_right sizes=1.5": "left_to_right",
    }
    assert names({"policy": "Ranked", "score": "margin"}) == {"margin sequential": "margin"}
    assert names({"policy": "orderppl.policies.RandomSteps", "schedule": "cosine", "budgets": [2, 3]}) == {
        "random_steps cosine T=2": "random_steps cosine",
        "random_steps cosine T=3": "random_steps cosine",
    }
    assert names({"policy": "Smoothed", "smoothing": [0.1, 0.2]}, known={"policy": Threshold()}) == {
        "smoothed smoothing=0.1": "smoothed",  # the only number that varies
        "smoothed smoothing=0.2": "smoothed",
    }


def test_wrappers_get_what_the_data_say() -> None:
    spec = {"policy": "Threshold", "tau": [0.7, 0.9], "eos_aware": True, "sure": [0.5, 0.8], "mode": True}
    arms = sweep(spec, known={"token_ids": [1, 2], "answer": first_token})
    assert [arm.name for arm in arms][:2] == [
        "threshold eos-aware mode sure 0.5 tau=0.7",
        "threshold eos-aware mode sure 0.8 tau=0.7",
    ]
    early = arms[0].policy
    assert isinstance(early, EarlyCommit) and early.answer is first_token and early.sure == 0.5
    ends = early.policy
    assert isinstance(ends, EosAware) and ends.token_ids == [1, 2]
    assert isinstance(ends.policy, Threshold) and ends.policy.tau == 0.7
    assert arms[0].mode and arms[0].setting == {"tau": 0.7}


def test_learned_policies_are_swept_alike() -> None:
    learned = RandomSteps()
    arms = []
    for seed in (0, 1):
        options: dict[str, Any] = {"known": {"policy": learned}, "family": "learned", "training_seed": seed}
        arms += sweep(
            [{"policy": "AtPrice", "price": [0.1, 1.0]}, {"policy": "AtPrice", "price": 0.1, "mode": True}], **options
        )
    assert [arm.name for arm in arms[:3]] == ["learned price=0.1 #0", "learned price=1 #0", "learned mode price=0.1 #0"]
    assert [arm.family for arm in arms[:3]] == ["learned", "learned", "learned mode"]
    assert all(isinstance(arm.policy, AtPrice) and arm.policy.policy is learned for arm in arms)
    assert [arm.training_seed for arm in arms] == [0, 0, 0, 1, 1, 1] and arms[0].kind == "learned"
    assert arms[0].seeds == (0, 1, 2) and arms[2].seeds == (0,)


def test_the_standard_heuristics_are_played_from_end_to_end() -> None:
    """Rankings, thresholds and factors, blocks, spacing, places, a look ahead: at one forward and more."""
    specs = standard_heuristics()
    families = Counter(arm.family for arm in sweep(specs))
    assert len(families) == 10 + 3 + 2 + 2 + 1 + 5 and sum(families.values()) == 80 + 31 + 10 + 14 + 5 + 38
    few = [
        {name: v[:2] if isinstance(v, list) else v for name, v in spec.items() if name != "block_size"}
        for spec in (*specs[:5], *specs[7:])
    ]
    arms = sweep(few, seeds=(0,))
    assert "threshold spaced spread=8 tau=0.3" in [arm.name for arm in arms]
    table = evaluate(arms, Chain(), padded(ROWS), progress=False)
    assert table["nfe"].min() == 1 and table["nats"].notna().all()
    assert frontier(table, "path_nats").best(2.0) is not None


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Ranked("random"), True),
        (Ranked("margin"), False),
        (Ranked("margin", temperature=0.1), True),
        (Threshold(0.5), False),
        (Threshold(0.5, temperature=0.5), True),
        (Klass(), False),
        (RandomSteps(), True),
        (Blocks(Threshold(0.5), 2), False),
        (EosAware(Ranked("random"), [0]), True),
        (EarlyCommit(Threshold(0.5), first_token), False),
        (EarlyCommit(Threshold(0.5), first_token, sure=1 / 3, temperature=0.5), True),
        (Smoothed(Threshold(0.5)), True),
        (Eager(RandomSteps()), True),
        (AtPrice(Threshold(0.5), 0.1), False),
        (Oracle("margin"), False),
    ],
)
def test_what_draws(policy: Policy, expected: bool) -> None:
    assert draws(policy) == expected
    table = evaluate([Arm("a", policy, 3, seeds=tuple(range(8)))], Chain(), padded(ROWS), progress=False)
    assert (table.groupby("seed")["nats"].agg(tuple).nunique() > 1) == expected


def test_a_fixed_order_draws_nothing() -> None:
    import torch

    assert not draws(FixedOrder(torch.tensor([0, 1, 1])))


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ({"policy": "Ranked", "tau": [0.5]}, r"sweep\[0\].tau: Ranked has no such argument"),
        ([{"policy": "Klass"}, {"policy": "Margn"}], r"sweep\[1\].*Margn"),
        ({"policy": "Ranked", "budgets": [2, 2]}, r"sweep\[0\]: .* comes twice"),
        ([{"policy": "Ranked"}, {"policy": "Ranked"}], r"sweep\[1\]: .* comes twice"),
        ({"policy": "Threshold", "tau": []}, r"sweep\[0\].tau: an empty list"),
        ({"tau": [0.5]}, r"sweep\[0\].policy: there is none"),
        ({"policy": "Threshold", "tau": 2.0}, r"sweep\[0\].tau"),
        ({"policy": "Threshold", "eos_aware": True}, "token_ids"),
        ({"policy": "Threshold", "budgets": 0}, "budget of 0 steps"),
    ],
)
def test_bad_sweeps_are_named(specs: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sweep(specs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": ""}, "name"),
        ({"steps": 0}, "budget of 0"),
        ({"seeds": ()}, "seeds"),
        ({"seeds": (1, 1)}, "seeds"),
        ({"setting": {"nfe": 1}}, "'nfe' of a is a column"),
        ({"setting": {"family": 1}}, "'family' of a is a column"),
    ],
)
def test_bad_arms_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Arm(**{"name": "a", "policy": Ranked(), "steps": 2, **options})
