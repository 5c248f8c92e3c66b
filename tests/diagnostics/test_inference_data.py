"""InferenceData of a pair: what is in it, that it adds up, and that it survives netCDF."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from orderppl.diagnostics import (
    InferenceData,
    add_order_statistics,
    alarms,
    draw_orders,
    load,
    order_statistics,
    save,
    set_correlation,
    summarise,
    to_inference_data,
)
from orderppl.errors import UserError
from orderppl.guides import MeanFieldGuide, PlackettLuceGuide, PolicyGuide, PosteriorGuide, RandomGuide
from orderppl.models import EasyFirst, FixedSizes, StepPrice, UniformSteps
from orderppl.models.networks import PositionTable

from chain_programs import chain_batch, chain_programs, fixed_guide, left_to_right


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    batch = chain_batch(4, 6)
    batch["attention_mask"][1, 4:] = False
    batch["tokens"][1, 4:] = 77  # padding may hold anything
    return batch


def make(batch: dict[str, torch.Tensor], prior=None, guide=None, **options) -> InferenceData:
    model, _ = chain_programs(6, 3, prior)
    guide = RandomGuide(3) if guide is None else guide(model)
    return to_inference_data(model, guide, batch, **{"num_samples": 40, "max_states": 100} | options)


def test_groups_and_dimensions(batch):
    data = make(batch, num_correlation_draws=2, token_string=lambda index: "abc"[index])
    assert set(data.groups()) == {
        "posterior",
        "posterior_predictive",
        "log_likelihood",
        "sample_stats",
        "sample_stats_prior",
        "prior",
        "observed_data",
        "constant_data",
        "states",
        "correlation",
    }
    posterior = data["posterior"]["reveal_step"]
    assert posterior.dims == ("chain", "draw", "sequence", "position")
    assert posterior.shape == (1, 40, 4, 6)
    assert (posterior.values[:, :, 1, 4:] == -1).all() and (posterior.values[:, :, 0] >= 0).all()
    assert data["sample_stats"]["kl_step"].dims == ("chain", "draw", "sequence", "step")
    assert data["states"]["prior_prob"].shape == (1, 20, 4, 3, 6)
    assert data["correlation"]["set_correlation"].shape == (1, 2, 4, 3)
    assert data["posterior"]["token"].values[1].tolist()[-2:] == ["", ""]
    assert set(data["posterior"]["token"].values[0]) <= set("abc")
    predicted = data["posterior_predictive"]["tokens"].values
    assert (predicted[:, :, 1, 4:] == 77).all() and predicted[:, :, 0].max() < 3
    assert data["posterior"].attrs["guide"] == "RandomGuide" and data["posterior"].attrs["num_steps"] == 3


@pytest.mark.parametrize(
    ("prior", "guide"),
    [
        (UniformSteps(), lambda model: MeanFieldGuide(PositionTable(6, 3, noise=1.0), 3, sees_tokens=False)),
        (EasyFirst(0.5), lambda model: PolicyGuide(EasyFirst(0.3), model.denoiser, 3)),
        (StepPrice(UniformSteps(), 0.5), lambda model: RandomGuide(3)),
        (UniformSteps(), lambda model: PlackettLuceGuide(PositionTable(6, 1, noise=1.0), 3)),
        (FixedSizes(2.0), lambda model: PlackettLuceGuide(PositionTable(6, 1, noise=1.0), 3, sizes=2.0)),
        (UniformSteps(), lambda model: PosteriorGuide(lambda state, tokens: tokens % 3 - 1.0, model.denoiser, 3)),
    ],
)
def test_the_parts_add_up(batch, prior, guide):
    """Steps add up to the log-likelihood; the mean KL by step to that of log q - log p, |z| < 5 over 4,000 draws."""
    data = make(batch, prior, guide, num_samples=1000, max_states=4000, num_state_draws=1)
    sample, log_likelihood = data["sample_stats"], data["log_likelihood"]["tokens"]
    assert np.allclose(sample["log_likelihood_step"].sum("step"), log_likelihood, atol=1e-4)
    assert np.allclose(sample["log_joint"], sample["log_prior"] + log_likelihood, atol=1e-5)
    assert np.allclose(sample["log_weight"], sample["log_joint"] - sample["log_q"], atol=1e-5)
    difference = sample["kl_step"].sum("step") - (sample["log_q"] - sample["log_prior"])
    error = difference.std() / np.sqrt(difference.size)
    assert abs(float(difference.mean())) < 5 * float(error) + 1e-5
    ranked = data["posterior"].attrs["guide"] == "PlackettLuceGuide"  # its sets have no closed forms: log-ratios
    assert ("guide_prob" in data["states"]) != ranked and "prior_prob" in data["states"]
    if not ranked and not isinstance(prior, StepPrice):
        assert (sample["kl_step"] > -1e-5).all()


def test_the_same_draws_as_draw_orders(batch):
    """A seed gives the same data; 400 weights have the mean of as many from `draw_orders`, |z| < 5."""
    one, two, other = (make(batch, seed=seed) for seed in (0, 0, 1))
    assert one["posterior"].equals(two["posterior"]) and not one["posterior"].equals(other["posterior"])
    model, _ = chain_programs(6, 3)
    weights = draw_orders(model, RandomGuide(3), batch, 400).log_weight
    mine = make(batch, num_samples=400, max_states=5000)["sample_stats"]["log_weight"].values[0]
    error = np.sqrt((weights.numpy().var(0) + mine.var(0)) / 400)
    assert (np.abs(weights.numpy().mean(0) - mine.mean(0)) < 5 * error).all()


def test_set_correlation_is_the_gap_of_an_exact_denoiser(batch):
    """On the exact chain sum_t c_t = log p(x) - log p(x | r), for every order and with padding."""
    model, _ = chain_programs(6, 3)
    data = make(batch, num_correlation_draws=8, max_states=11)
    evidence = model.denoiser.log_evidence(batch["tokens"], batch["attention_mask"]).numpy()
    gap = evidence - data["log_likelihood"]["tokens"][0, :8]
    assert np.allclose(data["correlation"]["set_correlation"][0].sum("step"), gap, atol=1e-4)
    assert np.abs(gap).max() > 0.5
    alone = torch.arange(6).expand(4, -1).masked_fill(~batch["attention_mask"], -1)
    trace_state = model_state(model, batch, alone)
    assert set_correlation(trace_state, alone, batch["tokens"]).abs().max() < 1e-5  # nothing is revealed together


def model_state(model, batch, order):
    from orderppl.denoising import Canvas
    from orderppl.path import RevealPath

    return RevealPath(Canvas(model.denoiser, batch["attention_mask"]), batch["tokens"], 6)(order)


def test_posterior_predictive_is_drawn_at_the_true_states():
    """1,000 draws: with one position left, its redrawn token follows the chain between its neighbours, |z| < 5."""
    model, _ = chain_programs(3, 2)
    batch = {"tokens": torch.tensor([[0, 2, 0]]), "attention_mask": torch.ones(1, 3, dtype=torch.bool)}
    guide = fixed_guide(torch.tensor([0, 1, 0]), 2, 60.0)
    data = to_inference_data(model, guide, batch, num_samples=1000)
    seen = (data["posterior_predictive"]["tokens"].values[0, :, 0, 1] == 0).mean()
    expected = 0.85**2 / (0.85**2 + 2 * 0.075**2)
    assert abs(seen - expected) < 5 * (expected * (1 - expected) / 1000) ** 0.5


def test_netcdf_round_trip(batch, tmp_path):
    data = add_order_statistics(make(batch, EasyFirst(0.5), lambda model: PolicyGuide(model.prior, model.denoiser, 3)))
    path = save(data, tmp_path / "draws.nc")
    assert [item.name for item in tmp_path.iterdir()] == ["draws.nc"]
    again = load(path)
    assert set(again.groups()) == set(data.groups())
    for name in data.groups():
        assert again[name].equals(data[name]), name
    assert summarise(again) == summarise(data)


def test_a_missing_netcdf_library_is_named(batch, tmp_path, monkeypatch):
    data = make(batch, num_samples=2, num_state_draws=0)
    path = save(data, tmp_path / "draws.nc")
    monkeypatch.setitem(sys.modules, "h5netcdf", None)
    with pytest.raises(UserError, match="pip install h5netcdf"):
        save(data, tmp_path / "other.nc")
    with pytest.raises(UserError, match="pip install h5netcdf"):
        load(path)
    assert [item.name for item in tmp_path.iterdir()] == ["draws.nc"]


def test_order_statistics_join_the_data(batch):
    data = make(batch, num_correlation_draws=1)
    assert "order_statistics" not in data.groups()
    joined = add_order_statistics(data)
    statistics = joined["order_statistics"]
    assert set(joined.groups()) == {*data.groups(), "order_statistics"}
    assert statistics["mean_step"].dims == ("sequence", "position")
    assert statistics["auroc"].dims == ("score", "sequence", "step")
    assert np.isnan(statistics["mean_step"].values[1, 4:]).all()
    assert set(joined["order_statistics"]) == set(order_statistics(data))
    assert set(add_order_statistics(joined)["order_statistics"]) == set(statistics)  # twice is once


def test_every_number_of_the_summary_can_be_traced(batch):
    """The sources name variables that exist, and following them gives the numbers."""
    data = add_order_statistics(make(batch, num_correlation_draws=2))
    numbers = summarise(data)
    for name, entry in numbers.items():
        variables = [word.strip("(),") for word in entry["source"].split() if "." in word.strip("().,0123456789")]
        for word in variables:
            for part in word.replace("importance_report(", "").split(","):
                group, _, variable = part.strip("()").partition(".")
                if group in data.groups():
                    assert variable.split(")")[0].split(".")[0] in data[group], (name, part)
    assert numbers["elbo"]["value"] == pytest.approx(float(data["sample_stats"]["log_weight"].mean()))
    assert numbers["tokens"]["value"] == 22
    assert numbers["mean_step_digit"]["value"] == pytest.approx(
        float(data["posterior"]["reveal_step"].where(data["constant_data"]["attention_mask"]).mean())
    )
    assert sum(numbers[f"set_size_{t}"]["value"] for t in range(3)) == pytest.approx(22 / 4)
    assert numbers["kl"]["value"] == pytest.approx(0, abs=1e-6)


def test_alarms(batch):
    assert alarms(add_order_statistics(make(batch))) == []
    one_step = add_order_statistics(make(batch, guide=lambda m: fixed_guide(torch.ones(6).long(), 3, 30.0)))
    assert [text.split(":")[0] for text in alarms(one_step)] == ["collapse into one step", "collapse onto one order"]
    assert "step 1 of 3 reveals 100%" in alarms(one_step)[0]
    one_order = add_order_statistics(make(batch, guide=lambda m: fixed_guide(left_to_right(6, 3), 3, 30.0)))
    assert [text.split(":")[0] for text in alarms(one_order)] == ["collapse onto one order"]


def test_an_infinite_kl_is_kept_and_named(batch):
    """A guide that may wait under a prior that may not."""
    data = add_order_statistics(make(batch, EasyFirst(0.5)))
    assert np.isposinf(data["sample_stats"]["kl_step"]).any()
    assert summarise(data)["elbo"] | {"source": ""} == {
        "value": None,
        "unit": "nats per sequence",
        "source": "",
        "note": "minus infinity",
    }


def test_faults_are_named(batch, tmp_path):
    data = make(batch, num_state_draws=0)
    with pytest.raises(UserError, match="call add_order_statistics first"):
        summarise(data)
    del data.sample_stats
    with pytest.raises(UserError, match="sample_stats: no such group"):
        order_statistics(data)
    with pytest.raises(UserError, match="at least one sequence"):
        make({name: rows[:0] for name, rows in batch.items()})
    with pytest.raises(UserError, match="negative"):
        make(batch, num_state_draws=-1)
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "none.nc")
    (tmp_path / "bad.nc").write_text("no netCDF")
    with pytest.raises(UserError, match="no InferenceData"):
        load(tmp_path / "bad.nc")
    with pytest.raises(UserError, match="cannot be written"):
        save(make(batch, num_state_draws=0), tmp_path / "missing" / "draws.nc")
