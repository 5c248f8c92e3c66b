"""What the page about arviz says is so."""

from __future__ import annotations

import arviz as az
import numpy as np
import pytest
import torch

from orderppl import Batch
from orderppl.diagnostics import importance_report, to_inference_data
from orderppl.diagnostics.backend import InferenceData
from orderppl.diagnostics.importance import pareto_k
from orderppl.guides import PolicyGuide
from orderppl.models import PositionTable, UnmaskingModel
from orderppl.models.denoisers import MarkovChainDenoiser
from orderppl.policies import Plan, RandomSteps


@pytest.fixture(scope="module")
def idata() -> InferenceData:
    torch.manual_seed(0)
    denoiser = MarkovChainDenoiser(4, 0.85, 6)
    guide = PolicyGuide(Plan(PositionTable(6, 3, noise=0.5)), denoiser, 3)
    tokens = torch.randint(0, 4, (5, 6))
    attended = torch.arange(6) < torch.tensor([6, 5, 6, 4, 6])[:, None]
    model = UnmaskingModel(denoiser, RandomSteps(), 3)
    return to_inference_data(model, guide, Batch(tokens, attended), num_samples=400)


def test_draws_are_several_chains_and_padding_is_missing(idata: InferenceData) -> None:
    order = idata.posterior["reveal_step"]
    assert (order.sizes["chain"], order.sizes["draw"]) == (4, 100)
    attended = idata.constant_data["attention_mask"].to_numpy()
    assert np.array_equal(np.isnan(order.to_numpy()).all((0, 1)), ~attended)
    assert not np.isnan(order.mean(("chain", "draw")).to_numpy()[attended]).any()
    assert (idata.observed_data["tokens"].to_numpy()[~attended] == -1).all()


def test_psis_and_k_hat_are_of_the_weights(idata: InferenceData) -> None:
    weights = idata.sample_stats["log_weight"]
    _, theirs = az.psislw(weights.stack(__sample__=("chain", "draw")))
    ours = pareto_k(weights)
    assert np.asarray(theirs).shape == ours.shape == (5,)
    report = importance_report(weights, idata.sample_stats_prior["log_weight"])
    assert set(report) >= {"pareto_k", "ess", "log_evidence", "missed", "trusted"}


def test_functions_for_chains_run_and_see_independent_draws(idata: InferenceData) -> None:
    found = az.summary(idata.sample_stats[["log_weight"]])
    assert (found["r_hat"] < 1.1).all()
    assert len(found) == 5


def test_leave_one_out_is_no_score_of_held_out_rows(idata: InferenceData) -> None:
    """It differs from the evidence, row by row, although the denoiser is the same whatever row is left out."""
    loo = np.asarray(az.loo(idata, pointwise=True, var_name="tokens").loo_i)
    report = importance_report(idata.sample_stats["log_weight"])
    assert not np.allclose(loo, report["log_evidence"], atol=0.1)
