"""The script that cuts lists by difficulty, on sizes at which the numbers mean nothing."""

from pathlib import Path

import lists
import numpy as np
import pandas as pd
import pytest
import torch
from difficulty import mixtures

from orderppl import evaluate, fit
from orderppl.data import Lists
from orderppl.evaluation import advantages, summary, sweep
from orderppl.evaluation.results import read_results, write_results
from orderppl.evaluation.table import ByRow
from orderppl.guides import PolicyGuide
from orderppl.models import LearnedPolicy, PolicyNetwork, UnmaskingModel
from orderppl.models.denoisers import TransformerDenoiser
from orderppl.policies import EntropyBound, PriceRange


def test_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds of an order beside heuristics: every difficulty has its forwards, its answers and its limits."""
    torch.manual_seed(0)
    data = Lists(train=40, validation=0, test=24)
    tokenizer = data.splits()["train"].tokenizer
    denoiser = TransformerDenoiser(data.vocab_size, data.mask_index, 16, 1, 2, tokenizer=tokenizer)
    prices = PriceRange(0.1, 2.0)
    for seed in range(2):
        network = PolicyNetwork(data.vocab_size, 8, 1, 2, ["confidence", "price"], zero_init=True, prices=prices)
        policy = LearnedPolicy(network, base=EntropyBound(0.5, temperature=0.1))
        model, guide = UnmaskingModel(denoiser, policy, 3, step_price=prices), PolicyGuide(policy, denoiser, 3)
        fit(model, guide, data, updates=1, batch_size=4, seed=seed, out=tmp_path / f"order-{seed}")
    grid = [{"policy": "Ranked", "score": "random", "budgets": [1, 3]}, {"policy": "Threshold", "tau": [0.1, 0.9]}]
    monkeypatch.setattr(lists, "HEURISTICS", grid)
    price = {"policy": "AtPrice", "price": [0.1, 2.0], "mode": True, "budgets": 3}
    arms = [*sweep(grid), *sweep(price, known={"policy": policy}, family="runs/order", training_seed=0)]
    table = evaluate(arms, denoiser, data.splits()["test"], metrics=["accuracy"], progress=False)
    write_results(tmp_path / "frontier", "frontier", {}, pd.concat([summary(table), advantages(table, [2.0])]))
    orders = [tmp_path / "order-0", tmp_path / "order-1"]
    lists.main(orders, tmp_path / "frontier", train=40, rows=24, target=2.0, out=tmp_path / "out")
    records = read_results(tmp_path / "out")["records"]
    forwards = {(r["arm"], r["difficulty"]): r["value"] for r in records if r["metric"] == "forwards"}
    assert {arm for arm, _ in forwards} == {"learned", "random", "threshold"}
    assert forwards["random", "all"] == pytest.approx(2)
    assert all(1 <= value <= 16 for value in forwards.values())
    limits = {(r["difficulty"], r["arm"]): r["value"] for r in records if r["metric"] == "limit"}
    assert {name for name, _ in limits} == {name for _, name in forwards} - {"all"}
    assert limits["copy 3", "limit at 1"] == 1
    assert all(limits[name, "limit at 1"] <= limits[name, "limit at 3"] <= 1 for name, _ in limits)
    assert {r["family"] for r in records if r["metric"] == "accuracy"} == {"learned", "threshold"}


def test_a_family_is_read_between_its_two_nearest_settings() -> None:
    """Forwards 1 and 3 of two rows, in equal parts at a mean of 2; beyond its range a family keeps its last setting."""
    nfe = np.array([[1.0, 4.0, 6.0], [1.0, 2.0, 4.0]])
    right = np.array([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    arms = pd.DataFrame({"family": ["t", "t", "t"], "training_seed": [None] * 3}, index=["a", "b", "c"])
    found = ByRow(arms, right, nfe, np.ones(2), pd.DataFrame())
    ((family, spent, solved),) = mixtures(found, 2.0)
    assert family == "t" and spent.tolist() == [2.5, 1.5] and solved.tolist() == [0.5, 0.0]
    ((_, spent, solved),) = mixtures(found, 9.0)
    assert spent.tolist() == [6.0, 4.0] and solved.tolist() == [1.0, 1.0]
