"""InferenceData of a pair: what is in it, that it adds up, and that it survives netCDF."""

from __future__ import annotations

import sys

import arviz
import numpy as np
import pytest
import torch

from orderppl.diagnostics import draw_orders, order_statistics, to_inference_data
from orderppl.diagnostics.backend import InferenceData, load, save
from orderppl.diagnostics.inference_data import set_correlation
from orderppl.diagnostics.statistics import alarms, summarise
from orderppl.errors import UserError
from orderppl.guides import PlackettLuceGuide, PolicyGuide
from orderppl.models import LearnedPolicy, PositionTable, UnmaskingModel
from orderppl.policies import RandomSteps, Ranked, Threshold
from orderppl.unmasking import Batch
from orderppl.unmasking.trajectory import Path

from chain_programs import chain_batch, chain_programs, fixed_guide, left_to_right, plan_guide, random_guide, with_holes

GIVEN, PADDING = [[2, 1], [2, 4], [3, 2], [3, 3]], [[1, 4], [1, 5], [3, 0]]


@pytest.fixture
def batch() -> Batch:
    """Four sequences: all to be revealed, padded, with given positions in the middle, and with both."""
    return with_holes(chain_batch(4, 6), GIVEN, PADDING)


def make(batch: Batch, policy=None, guide=None, price: float = 0.0, **options) -> InferenceData:
    model, _ = chain_programs(6, 3, policy, step_price=price)
    guide = random_guide(3) if guide is None else guide(model)
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
        "order_statistics",
    }
    posterior = data["posterior"]["reveal_step"]
    assert posterior.dims == ("chain", "draw", "sequence", "position")
    assert posterior.shape == (2, 20, 4, 6)  # 40, 20 and 2 draws fit into two chains
    latent = data["constant_data"]["attention_mask"] & ~data["constant_data"]["given"]
    assert latent.values.tolist() == batch.latent.tolist()
    assert (posterior.isnull() == ~latent).all() and (posterior.where(latent) >= 0).sum() == 40 * latent.sum()
    assert (data["prior"]["reveal_step"].isnull() == ~latent).all()
    assert data["sample_stats"]["kl_step"].dims == ("chain", "draw", "sequence", "step")
    assert data["states"]["prior_prob"].shape == (2, 10, 4, 3, 6)
    assert data["correlation"]["set_correlation"].shape == (2, 1, 4, 3)
    assert data["posterior"]["token"].values[1].tolist()[-2:] == ["", ""]
    assert set(data["posterior"]["token"].values[0]) <= set("abc")
    assert data["posterior"]["token"].values[2, 1] == "abc"[batch.tokens[2, 1]]  # given tokens are shown
    for predicted in (data["posterior_predictive"]["tokens"], data["observed_data"]["tokens"]):
        assert (predicted.where(~data["constant_data"]["attention_mask"], -1) == -1).all()
    predicted = data["posterior_predictive"]["tokens"].values
    given = data["constant_data"]["given"].values
    assert (predicted[..., given] == batch.tokens.numpy()[given]).all() and predicted[:, :, 0].min() >= 0
    assert predicted.max() < 3
    assert data["posterior"].attrs["guide"] == "PolicyGuide" and data["posterior"].attrs["num_steps"] == 3


def test_arviz_reads_it(batch):
    """A table of arviz has no warnings, and nothing but missing numbers where nothing is revealed."""
    data = make(batch)
    table = arviz.summary(data, var_names=["reveal_step"])
    there = np.array([batch.latent[row, place] for row in range(4) for place in range(6)])
    assert table["mean"].notnull().to_numpy().tolist() == there.tolist()
    assert (table["mean"][there] >= 0).all() and table["r_hat"][there].notnull().all()


def to_the_truth(state):
    """A network of a posterior."""
    return state.truth.expand(state.shape) % 3 - 1.0


@pytest.mark.parametrize(
    ("policy", "guide", "price"),
    [
        (RandomSteps(), lambda model: plan_guide(6, 3, noise=1.0), 0.0),
        (Threshold(0.5, 1.0), lambda model: PolicyGuide(Threshold(0.3, 1.0), model.denoiser, 3), 0.0),
        (RandomSteps(), lambda model: random_guide(3), 0.5),
        (RandomSteps(), lambda model: PlackettLuceGuide(PositionTable(6, 1, noise=1.0), 3), 0.0),
        (
            Ranked("random", sizes=2.0),
            lambda model: PlackettLuceGuide(PositionTable(6, 1, noise=1.0), 3, sizes=2.0),
            0.0,
        ),
        (
            RandomSteps(),
            lambda model: PolicyGuide(LearnedPolicy(to_the_truth), model.denoiser, 3),
            0.0,
        ),
    ],
)
def test_the_parts_add_up(batch, policy, guide, price):
    """Steps add up to the log-likelihood; the mean KL by step to that of log q - log p, |z| < 5 over 4,000 draws."""
    data = make(batch, policy, guide, price, num_samples=1000, max_states=4000, num_state_draws=1)
    sample, log_likelihood = data["sample_stats"], data["log_likelihood"]["tokens"]
    assert np.allclose(sample["log_likelihood_step"].sum("step"), log_likelihood, atol=1e-4)
    assert np.allclose(sample["log_factor"], -price * sample["steps_used"])
    assert np.allclose(sample["log_joint"], sample["log_prior"] + log_likelihood + sample["log_factor"], atol=1e-5)
    assert np.allclose(sample["log_weight"], sample["log_joint"] - sample["log_q"], atol=1e-5)
    difference = sample["kl_step"].sum("step") - (sample["log_q"] - sample["log_prior"])
    error = difference.std() / np.sqrt(difference.size)
    assert abs(float(difference.mean())) < 5 * float(error) + 1e-5
    ranked = data["posterior"].attrs["guide"] == "PlackettLuceGuide"  # its sets have no closed forms: log-ratios
    assert ("guide_prob" in data["states"]) != ranked
    assert ("prior_prob" in data["states"]) or isinstance(policy, Ranked)
    if not ranked:
        assert (sample["kl_step"] > -1e-5).all()
    for name in ("guide_prob", "prior_prob"):
        if name in data["states"]:
            assert (data["states"][name].isnull() == ~data["states"]["masked"]).all()


def test_the_same_draws_as_draw_orders(batch):
    """A seed gives the same data; 400 weights have the mean of as many from `draw_orders`, |z| < 5."""
    one, two, other = (make(batch, seed=seed) for seed in (0, 0, 1))
    assert one["posterior"].equals(two["posterior"]) and not one["posterior"].equals(other["posterior"])
    model, _ = chain_programs(6, 3)
    weights = draw_orders(model, random_guide(3), batch, 400).log_weight
    mine = make(batch, num_samples=400, max_states=5000)["sample_stats"]["log_weight"].values.reshape(400, 4)
    error = np.sqrt((weights.numpy().var(0) + mine.var(0)) / 400)
    assert (np.abs(weights.numpy().mean(0) - mine.mean(0)) < 5 * error).all()


def evidence_of(model, batch: Batch) -> torch.Tensor:
    """log p(x | what is given) of an exact chain: of all that is attended, less that of the given tokens, float [B]."""
    found = []
    for row in range(len(batch)):
        attended, given = batch.attention_mask[row], batch.attention_mask[row] & ~batch.latent[row]
        whole = model.denoiser.log_evidence(batch.tokens[row, attended])
        places = given[attended].nonzero()[:, 0]
        known = batch.tokens[row, attended][places]
        power = torch.linalg.matrix_power
        transition = model.denoiser.log_power[1].exp()
        part = torch.zeros(()) if len(places) == 0 else -torch.tensor(float(model.denoiser.num_states)).log()
        for left, right, gap in zip(known, known[1:], places.diff(), strict=False):
            part = part + power(transition, int(gap))[left, right].log()
        found.append(whole - part)
    return torch.stack(found)


def test_set_correlation_is_the_gap_of_an_exact_denoiser(batch):
    """On the exact chain sum_t c_t = log p(x) - log p(x | r), for every order, with padding and given positions."""
    model, _ = chain_programs(6, 3)
    data = make(batch, num_correlation_draws=8, max_states=11)
    gap = evidence_of(model, batch).numpy() - data["log_likelihood"]["tokens"][:, :2]
    assert data["correlation"]["set_correlation"].shape == (4, 2, 4, 3)
    assert np.allclose(data["correlation"]["set_correlation"].sum("step"), gap, atol=1e-4)
    assert np.abs(gap).max() > 0.5
    alone = torch.arange(6).expand(4, -1).masked_fill(~batch.latent, -1)
    path = Path(batch, model.denoiser, 6)
    assert set_correlation(path, alone).abs().max() < 1e-5  # nothing is revealed together


@pytest.mark.parametrize("given", [False, True])
def test_posterior_predictive_is_drawn_at_the_true_states(given):
    """1,000 draws: with one position left, its redrawn token follows the chain between its neighbours, |z| < 5.

    Whether these were given or revealed before makes no difference.
    """
    model, _ = chain_programs(3, 2)
    batch = with_holes(Batch(torch.tensor([[0, 2, 0]])), [[0, 0], [0, 2]] if given else [], [])
    guide = fixed_guide(torch.tensor([1] if given else [0, 1, 0]), 2, 60.0)
    data = to_inference_data(model, guide, batch, num_samples=1000)
    seen = (data["posterior_predictive"]["tokens"].values[:, :, 0, 1] == 0).mean()
    expected = 0.85**2 / (0.85**2 + 2 * 0.075**2)
    assert abs(seen - expected) < 5 * (expected * (1 - expected) / 1000) ** 0.5


def test_dropout_is_off(batch):
    """A denoiser in training mode is asked as a decoder asks it, for every group."""
    model, _ = chain_programs(6, 3)
    plain = model.denoiser

    class Noisy(torch.nn.Module):
        mask_index, vocab_size = plain.mask_index, plain.vocab_size

        def forward(self, state, attention_mask):
            return torch.nn.functional.dropout(plain(state, attention_mask), 0.5, self.training)

    made = []
    for denoiser in (plain, Noisy().train()):
        pair = UnmaskingModel(denoiser, RandomSteps(), 3).train(), random_guide(3)
        options = {"num_samples": 8, "num_state_draws": 4, "num_correlation_draws": 2, "max_states": 100}
        made.append(to_inference_data(*pair, batch, **options))
    for name in made[0].groups():
        assert made[0][name].equals(made[1][name]), name


def test_netcdf_round_trip(batch, tmp_path):
    data = make(batch, Threshold(0.5, 1.0), lambda model: PolicyGuide(model.policy, model.denoiser, 3))
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


def test_order_statistics_are_in_the_data(batch):
    data = make(batch, num_correlation_draws=1)
    statistics = data["order_statistics"]
    assert statistics["mean_step"].dims == ("sequence", "position")
    assert statistics["auroc"].dims == ("score", "sequence", "step")
    assert (np.isnan(statistics["mean_step"].values) == ~batch.latent.numpy()).all()
    assert set(statistics["set_sizes"].sum("step").values[..., 2].ravel()) == {4}  # of six, two are given
    assert order_statistics(data).equals(statistics)


def test_given_positions_are_like_none(batch):
    """Given positions in the middle change no statistic of the order of the others."""
    order = torch.tensor([2, 0, 1, 0])
    whole = make(chain_batch(1, 4), guide=lambda model: fixed_guide(order, 3, 40.0))["order_statistics"]
    parted = with_holes(chain_batch(1, 6), [[0, 1], [0, 4]], [])
    parted = make(parted, guide=lambda model: fixed_guide(order, 3, 40.0))["order_statistics"]
    names = ("kendall_left_to_right", "adjacency", "global_arness", "local_arness", "set_sizes", "revealed_fraction")
    for name in names:
        assert np.array_equal(whole[name], parted[name], equal_nan=True), name
    kept = [0, 2, 3, 5]
    assert np.array_equal(whole["precedence"], parted["precedence"].isel(position=kept, other=kept))


def test_every_number_of_the_summary_can_be_traced(batch):
    """The sources name variables that exist, and following them gives the numbers."""
    data = make(batch, num_correlation_draws=2)
    numbers = summarise(data)
    for name, entry in numbers.items():
        variables = [word.strip("(),") for word in entry["source"].split() if "." in word.strip("().,0123456789")]
        for word in variables:
            for part in word.replace("importance_report(", "").split(","):
                group, _, variable = part.strip("()").partition(".")
                if group in data.groups():
                    assert variable.split(")")[0].split(".")[0] in data[group], (name, part)
    assert numbers["elbo"]["value"] == pytest.approx(float(data["sample_stats"]["log_weight"].mean()))
    assert numbers["tokens"]["value"] == int(batch.latent.sum()) == 17
    assert numbers["mean_step_digit"]["value"] == pytest.approx(float(data["posterior"]["reveal_step"].mean()))
    assert sum(numbers[f"set_size_{t}"]["value"] for t in range(3)) == pytest.approx(17 / 4)
    assert numbers["kl"]["value"] == pytest.approx(0, abs=1e-6)


def test_a_price_is_a_number_of_its_own(batch):
    numbers = summarise(make(batch, price=0.5))
    assert numbers["log_factor"]["value"] == pytest.approx(-0.5 * numbers["steps_used"]["value"])
    parts = numbers["log_likelihood"]["value"] - numbers["kl"]["value"] + numbers["log_factor"]["value"]
    assert numbers["elbo"]["value"] == pytest.approx(parts)
    assert "log_factor" not in summarise(make(batch))


def test_alarms(batch):
    assert alarms(make(batch)) == []
    one_step = make(batch, guide=lambda m: fixed_guide(torch.ones(6).long(), 3, 30.0))
    assert [text.split(":")[0] for text in alarms(one_step)] == ["collapse into one step", "collapse onto one order"]
    assert "step 1 of 3 reveals 100%" in alarms(one_step)[0]
    one_order = make(batch, guide=lambda m: fixed_guide(left_to_right(6, 3), 3, 30.0))
    assert [text.split(":")[0] for text in alarms(one_order)] == ["collapse onto one order"]


def test_an_infinite_kl_is_kept_and_named(batch):
    """A guide that may wait under a prior that may not."""
    data = make(batch, Threshold(0.5, 1.0))
    assert np.isposinf(data["sample_stats"]["kl_step"]).any()
    assert summarise(data)["elbo"] | {"source": ""} == {
        "value": None,
        "unit": "nats per sequence",
        "source": "",
        "note": "minus infinity",
    }


def test_a_row_with_nothing_to_reveal_counts_for_nothing():
    """The other rows have their numbers as without it."""
    tokens = chain_batch(2, 4)
    rows = with_holes(tokens, [[1, place] for place in range(4)], [])
    data = make(rows)
    assert data["order_statistics"]["mean_step"].isel(sequence=1).isnull().all()
    assert (data["log_likelihood"]["tokens"].isel(sequence=1) == 0).all()
    numbers, alone = summarise(data), summarise(make(tokens.rows(slice(0, 1))))
    assert numbers["tokens"]["value"] == 4
    assert numbers["step_entropy"]["value"] == pytest.approx(alone["step_entropy"]["value"], abs=0.2)


def test_faults_are_named(batch, tmp_path):
    data = make(batch, num_state_draws=0)
    del data.order_statistics
    with pytest.raises(UserError, match="order_statistics: no such group"):
        summarise(data)
    del data.sample_stats
    with pytest.raises(UserError, match="sample_stats: no such group"):
        order_statistics(data)
    with pytest.raises(UserError, match="at least one sequence"):
        make(batch.rows(slice(0, 0)))
    with pytest.raises(UserError, match="negative"):
        make(batch, num_state_draws=-1)
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "none.nc")
    (tmp_path / "bad.nc").write_text("no netCDF")
    with pytest.raises(UserError, match="no InferenceData"):
        load(tmp_path / "bad.nc")
    with pytest.raises(UserError, match="cannot be written"):
        save(make(batch, num_state_draws=0), tmp_path / "missing" / "draws.nc")
