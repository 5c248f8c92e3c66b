"""How noisy the gradient estimators are on real denoisers, and whether they are unbiased."""
# ruff: noqa: B008  (what defaults call makes frozen dataclasses)

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyro
import torch
from gradients import DEFAULT, TASKS, Files, Pair, Task, estimators
from torch import Tensor, nn
from tqdm import tqdm

from orderppl.data import Chains
from orderppl.errors import UserError
from orderppl.inference import RevealTraceGraph_ELBO
from orderppl.inference.exact import all_orders, exact_elbo
from orderppl.inference.programs import local_parameters
from orderppl.models import LearnedPolicy, PolicyNetwork, PositionTable
from orderppl.models.denoisers import MarkovChainDenoiser
from orderppl.policies import Plan

from timing import Records, command, finish

POINTS = 8  # of a fit, at which its likelihood is measured
KL_WEIGHT = 0.05  # a plan's entropy bonus, small at the end
Name = Literal["chain", "antibodies", "reactions", "programs", "sudoku"]


def main(
    out: Path | None = None,
    tasks: tuple[Name, ...] = ("chain", "antibodies", "reactions", "programs", "sudoku"),
    draws: int = 40,
    particles: int = 8,
    updates: int = 300,
    bias_draws: int = 400,
    fits: int = 3,
    files: Files = Files(),
    seed: int = 0,
) -> None:
    """Compare the estimators of the gradient of an order: how noisy they are, and whether they are unbiased.

    `default`: a control variate whose coefficient is fitted on the other orders (`RevealTraceGraph_ELBO`);
    `leave-one-out`: without it; `gain`: with coefficient 1; `expected`: the inner expectation over each set in closed
    form; `stock`: Pyro's `TraceGraph_ELBO`. All see the same drawn orders.

    `gradient_sd` is the length of the standard deviation of one gradient (of K orders of each of a few sequences, per
    sequence) over all parameters of the order, `relative_sd` the same over that of the default: at the start of a fit,
    after a quarter of it and at its end. On the tiny tasks `bias_z` is the largest |z| over the coordinates of the mean
    gradient against the sum over all orders, `bias` the length of the error over that of the exact gradient.
    `path_nats` is what each estimator has learned after the same number of denoiser rows, at eight points of a fit:
    nats per token along drawn orders of held-out sequences, from one start per seed. `rows_ratio` is the share of
    another's rows that the default needs to what the other has at the end.

    Args:
        out: folder for results.json.
        tasks: on which the noise is measured.
        draws: gradients per state.
        particles: orders per sequence, K.
        updates: of a fit; fewer where they are dear.
        bias_draws: gradients per tiny task, each of 64 sequences; 0 leaves them out.
        fits: seeds of the fits by every estimator; 0 leaves them out.
        files: where data and denoisers are.
        seed: of everything.
    """
    config = {key: value if isinstance(value, int) else str(value) for key, value in locals().items() if key != "out"}
    records: Records = []
    for kind in ("tiny plan", "tiny policy") if bias_draws else ():
        pyro.set_rng_seed(seed)
        records += bias(kind, bias_draws, particles)
    for name in tqdm(tasks, dynamic_ncols=True):
        pyro.set_rng_seed(seed)
        try:
            task = TASKS[name](files)
        except UserError as error:
            tqdm.write(f"{name} is left out: {error}")
            continue
        records += measure(name, task, draws, particles, updates) if draws else []
        learned = [record for fit in range(fits) for record in likelihoods(name, files, particles, updates, fit)]
        records += learned + (rows_ratios(name, learned) if learned else [])
    noise: dict[str, Any] = {"rows": ("task", "state"), "columns": ("estimator",)}
    tables = [noise | {"metrics": (metric,), "title": metric} for metric in ("gradient_sd", "relative_sd")]
    biases = {"rows": ("task", "estimator"), "columns": ("metric",), "metrics": ("bias_z", "bias"), "title": "Bias"}
    tables.append(noise | {"metrics": ("path_nats",), "title": "Learned, nats per token", "rows": ("task", "rows")})
    tables.append(noise | {"metrics": ("rows_ratio",), "title": "Rows of the default over theirs", "rows": ("task",)})
    finish(out, "estimators", config, records, [*tables, biases])


def measure(name: str, task: Task, draws: int, particles: int, updates: int) -> Records:
    """Standard deviations at the start, after a quarter of the updates, and after all."""
    batch = task.data["train"].batch.rows(slice(task.batch_size)).trimmed()
    quarter = max(int(task.effort * updates) // 4, 1)
    records: Records = []
    for state, more in (("start", 0), ("half", quarter), ("learned", 3 * quarter)):
        if more:
            task.fit(RevealTraceGraph_ELBO(particles, kl_weight=KL_WEIGHT), more)
        found = task.pair.draws(batch, particles, draws)
        squares = {kind: (gradients - gradients.mean(0)).square().sum(-1) for kind, gradients in found.items()}  # [R]
        for kind, own in squares.items():
            labels = {"task": name, "state": state, "estimator": kind, "n": draws}
            records.append({"metric": "gradient_sd", **root(own), **labels})
            records.append({"metric": "relative_sd", **root(own, squares[DEFAULT]), "of": DEFAULT, **labels})
    return records


def likelihoods(name: str, files: Files, particles: int, updates: int, seed: int) -> Records:
    """What every estimator learns from the same start."""
    records: Records = []
    for kind, objective in estimators(particles, KL_WEIGHT).items():
        pyro.set_rng_seed(seed)
        task = TASKS[name](files)
        total = max(int(task.effort * updates), POINTS)
        with TemporaryDirectory() as folder:
            for point in range(1, POINTS + 1):
                rows = task.fit(objective, total * point // POINTS, seed, Path(folder))
                labels = {"task": name, "estimator": kind, "training_seed": seed, "rows": rows}
                records.append({"metric": "path_nats", **vars(task.nats()), **labels})
    return records


def rows_ratios(name: str, learned: Records) -> Records:
    """Rows that the default needs to what another estimator has at the end, over that one's; above 1: the other way."""
    curves = pd.DataFrame(learned).groupby(["estimator", "rows"])["value"].mean().unstack(0)  # means over the seeds
    records: Records = []
    for kind in curves.columns.drop(DEFAULT):
        own, other = curves[DEFAULT], curves[kind]
        needed = rows_to(own, other.iloc[-1])
        ratio = needed if math.isfinite(needed) else 1 / rows_to(other, own.iloc[-1])
        records.append({"metric": "rows_ratio", "value": ratio, "task": name, "estimator": kind, "of": DEFAULT})
    return records


def rows_to(curve: pd.Series, goal: float) -> float:
    """Share of the rows at which a curve, nats by rows, first has a goal; infinite where it does not get there."""
    reached = (curve <= goal).to_numpy().nonzero()[0]
    if len(reached) == 0:
        return math.inf
    around = [reached[0], max(reached[0] - 1, 0)]  # the point that is below the goal, and the one before
    rows, nats = curve.index.to_numpy(float), curve.to_numpy()
    return float(np.interp(goal, nats[around], rows[around]) / rows[-1])


def root(squares: Tensor, of: Tensor | None = None) -> dict[str, float]:
    """Root of a variance, or of a ratio of two, from squared deviations float64 [R]; 95% by the delta method."""
    count, own = len(squares), squares / squares.mean()
    other = torch.ones_like(own) if of is None else of / of.mean()
    scale = count / (count - 1) if of is None else 1 / of.mean()
    value = float((squares.mean() * scale).sqrt())
    half = 1.96 * float((own - other).std()) / (2 * count**0.5)  # of the logarithm
    return {"value": value, "low": value * math.exp(-half), "high": value * math.exp(half)}


def tiny(kind: str) -> Pair:
    """A pair on a chain of four positions in three steps, all of whose 81 orders can be summed over."""
    if kind == "tiny plan":
        return Pair(MarkovChainDenoiser(3, 0.8, 4), Plan(PositionTable(4, 3, noise=1.0)), 3)
    network = PolicyNetwork(4, width=8, layers=1, heads=2)
    nn.init.normal_(network.head.weight)
    return Pair(MarkovChainDenoiser(3, 0.8, 4), LearnedPolicy(network), 3)


def bias(kind: str, draws: int, particles: int, copies: int = 32) -> Records:
    """Largest |z| of the mean gradient against the sum over all orders, coordinate by coordinate."""
    pair = tiny(kind)
    rows = Chains(num_states=3, stay=0.8, length=4, train=2).splits()["train"].batch
    model, guide = pair.programs
    with local_parameters(model, guide):
        exact = pair.flat(exact_elbo(model, guide, all_orders(guide, rows), rows).mean())
    records: Records = []
    for name, gradients in pair.draws(rows.rows(torch.arange(2).repeat(copies)), particles, draws).items():
        error, scale = gradients.mean(0) - exact, gradients.std(0) / draws**0.5
        random = scale > 1e-6 * (1 + exact.abs())  # elsewhere only rounding is left
        z = float((error / scale)[random].abs().max())
        labels = {"task": kind, "estimator": name, "n": draws * copies}
        records.append({"metric": "bias_z", "value": z, **labels})
        records.append({"metric": "bias", "value": float(error.norm() / exact.norm()), **labels})
    return records


if __name__ == "__main__":
    command(main)
