"""The variance of the gradient, from the log of a fit."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from orderppl.diagnostics.training import read_log, training_trace
from orderppl.errors import UserError
from orderppl.inference.trainer import TrainSettings, train
from orderppl.unmasking import Batch


class Noisy(nn.Module):
    """Loss whose gradient is `mean` plus standard normal noise of scale `sigma` in each of 50 coordinates."""

    def __init__(self, mean: float, sigma: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(50))
        self.mean, self.sigma = mean, sigma
        self.gradients: list[torch.Tensor] = []

    def forward(self, batch: Batch) -> torch.Tensor:
        gradient = self.mean + self.sigma * torch.randn(50)
        self.gradients.append(gradient)
        return (self.w * gradient).sum()


def run(loss: nn.Module, out=None, validate=None, **options) -> list[dict[str, float]]:
    options = {"optimizer": partial(torch.optim.Adam, lr=0.01), "log_every": 5, "progress": False} | options
    data = torch.zeros(4, 2, dtype=torch.int64)
    return train(loss, data, TrainSettings(batch_size=2, **options), out=out, validate=validate).trace


def test_variance_is_that_of_the_gradients():
    """400 updates: mean over log points of the estimate against 50 sigma^2 = 12.5; windows of 19 updates, |z| < 5."""
    trace = training_trace(run(Noisy(0.3, 0.5), updates=400))
    variance = trace["grad_variance"].dropna("update")
    assert list(variance["update"].values) == list(range(5, 401, 5))
    # The square of a coordinate's noise has the variance 2 sigma^4; there are 50 coordinates and 400 updates.
    error = 0.25 * (2 * 50 / (19 * 20)) ** 0.5
    assert abs(float(variance.mean()) - 12.5) < 5 * error
    assert float(trace["grad_snr"].mean()) == pytest.approx((50 * 0.09 / 12.5) ** 0.5, rel=0.3)


def test_variance_by_hand():
    """Weights 0.1 * 0.9 and 0.1, normalised, on the two logged gradients of two updates."""
    loss = Noisy(1.0, 2.0)
    trace = training_trace(run(loss, updates=2, log_every=2))
    weight = torch.tensor([0.09, 0.1]) / 0.19
    g = torch.stack(loss.gradients)
    expected = (weight @ (g**2).sum(1) - (weight @ g).pow(2).sum()) / (1 - (weight**2).sum())
    assert float(trace["grad_variance"][-1]) == pytest.approx(float(expected), rel=1e-4)
    assert np.isnan(trace["grad_variance"][0])


def test_clipped_gradients_are_what_adam_saw():
    """Clipped to norm 1 a constant direction has no variance, whatever its length."""

    class Growing(Noisy):
        def forward(self, batch: Batch) -> torch.Tensor:
            return (self.w * (2.0 + len(self.gradients))).sum()

    records = run(Growing(0.0, 0.0), updates=20, grad_clip=1.0)
    assert float(training_trace(records, grad_clip=1.0)["grad_variance"].dropna("update").max()) < 1e-5
    assert float(training_trace(records)["grad_variance"].dropna("update").max()) > 1


def test_other_optimisers_have_no_variance():
    trace = training_trace(run(Noisy(0.3, 0.5), updates=5, optimizer=partial(torch.optim.SGD, lr=0.1)))
    assert "grad_variance" not in trace and trace["grad_norm"].notnull().all()


def test_logs_are_read(tmp_path):
    records = run(Noisy(0.3, 0.5), tmp_path, lambda: {"loss": 1.5}, updates=4, validate_every=2)
    log = read_log(tmp_path / "log.jsonl")
    assert training_trace(log).equals(training_trace(records))
    assert [record["validation"] for record in log if "validation" in record] == [{"loss": 1.5}] * 2


def test_faults_are_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_log(tmp_path / "log.jsonl")
    (tmp_path / "log.jsonl").write_text('{"update": 1, "loss": 2}\n{"upd')
    with pytest.raises(UserError, match=r"log.jsonl:2"):
        read_log(tmp_path / "log.jsonl")
    with pytest.raises(UserError, match="no update"):
        training_trace([{"update": 1, "validation": {}}])
