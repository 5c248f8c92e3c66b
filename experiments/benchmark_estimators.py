"""Every gradient estimator against ground truth: bias, variance at equal denoiser forwards, time and memory.

    orderppl benchmark estimators --out runs/benchmark-estimators

Three kinds of problem have exact gradients. `tiny` has a random denoiser table, 3 positions and 3 steps, and sums over
all orders; guide, prior and denoiser are trainable, and the gradients of the order (guide and prior) and of the
denoiser are measured apart. `chain` is the exact Markov chain of 16 positions and 4 steps, where the gradient of a
mean-field plan has a closed form, at the start of a fit and at a plan that is half learned. `short chain` has 8 of its
positions and a policy that is its own guide, and sums over all orders.

Where all orders can be summed over, two `limit` rows say how little variance any baseline could leave to the default
estimator (`baseline_limits`): one that knows the best constant for every step and all that was drawn before it, and one
that may also differ between the parameters.

`bias_z` is the largest |z| over the coordinates of the mean gradient, `bias` the length of its error over that of the
exact gradient. `gradient_variance` is the summed variance of one sequence's gradient, times the denoiser rows spent
relative to all steps of all particles, so that an estimator that looks at one step is compared at equal forwards.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import matplotlib
import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO, TraceGraph_ELBO
from rich.console import Console
from torch import Tensor
from tqdm.auto import tqdm

from orderppl.data.chains import sample_chains
from orderppl.data.collate import tensors
from orderppl.distributions import StepwiseReveal
from orderppl.errors import UserError
from orderppl.experiments.baseline_limits import baseline_limits
from orderppl.experiments.benchmark_speed import denoiser_rows, peak_bytes
from orderppl.experiments.config import RunConfig, setting
from orderppl.experiments.replicates import Problem, Replicates, chain_policy_problem, chain_problem, tiny_problem
from orderppl.experiments.results import Record, results_table, save_figure
from orderppl.guides import MeanFieldGuide
from orderppl.inference import (
    EnumeratedELBO,
    ExactTerms,
    ImportanceWeightedELBO,
    OrderLoss,
    RelaxedELBO,
    RevealTraceGraph_ELBO,
    SequenceWakeSleep,
    all_orders,
    exact_terms,
)
from orderppl.models.denoisers import MarkovChainDenoiser


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of benchmark estimators."""

    draws: int = setting(40_000, "gradient draws per estimator and problem", at_least=100, option="--draws")
    rows: int = setting(400, "draws of one backward pass", at_least=2)
    particles: int = setting(4, "orders per sequence, K", at_least=2, option="--particles")
    rounds: int = setting(30, "timed updates per estimator, interleaved", at_least=1)

    def __post_init__(self) -> None:
        """Refuse other devices."""
        if self.device != "cpu":
            raise UserError("device", f"{self.device}: exact gradients are enumerated on the CPU", "leave it out")


@dataclass(frozen=True)
class Estimator:
    """One way to estimate a gradient.

    Attributes:
        make: particles -> objective.
        one_step: whether the model looks at one random step per sequence.
        target: what its gradient is compared with, a key of `EXACT`.
        unbiased: whether it claims that gradient in expectation.
        small: for enumerable problems only.
        independent: for guides of independent steps only.
    """

    make: Callable[[int], ELBO]
    one_step: bool = False
    target: str = "elbo"
    unbiased: bool = True
    small: bool = False
    independent: bool = False


def _stock(kind: type[ELBO], particles: int) -> ELBO:
    return kind(particles, max_plate_nesting=1, vectorize_particles=True)


ESTIMATORS = {
    "default": Estimator(RevealTraceGraph_ELBO),
    "default, one step": Estimator(RevealTraceGraph_ELBO, one_step=True),
    "expected credit": Estimator(partial(RevealTraceGraph_ELBO, credit="expected")),
    "without leave-one-out": Estimator(partial(RevealTraceGraph_ELBO, leave_one_out=False)),
    "sampled KL": Estimator(partial(RevealTraceGraph_ELBO, analytic_kl=False)),
    "stock TraceGraph": Estimator(partial(_stock, TraceGraph_ELBO)),
    "stock Trace": Estimator(partial(_stock, Trace_ELBO)),
    "enumerated": Estimator(lambda particles: EnumeratedELBO(), small=True),
    "importance weighted": Estimator(ImportanceWeightedELBO, target="importance weighted"),
    "wake-sleep": Estimator(SequenceWakeSleep, target="wake-sleep", unbiased=False),
    "relaxed": Estimator(RelaxedELBO, unbiased=False, independent=True),
}
STOCK = "stock TraceGraph"
COSTS = ("seconds_per_update", "time_ratio", "peak_megabytes", "memory_ratio")
SHOWN = ("bias_z", "bias", "denoiser_rows", "gradient_variance", "variance_ratio")


@dataclass(frozen=True)
class Case:
    """A problem with its exact gradients.

    Attributes:
        task: `tiny`, `chain` or `short chain`.
        point: which guide, or where the parameters stand.
        problem: makes replicates.
        exact: target -> group of parameters -> gradient of that objective, float64 [P]; a target that is missing has
            no ground truth here.
    """

    task: str
    point: str
    problem: Problem
    exact: dict[str, dict[str, Tensor]]

    def admits(self, estimator: Estimator) -> bool:
        """Whether an estimator works here, and has something to be compared with."""
        if estimator.small and self.task != "tiny":
            return False
        if estimator.independent and not isinstance(self.problem(1, False).guide, MeanFieldGuide):
            return False
        return estimator.target in self.exact


def run(config: Config, out: Path) -> Iterable[Record]:
    """Measure bias and variance case by case, then time all estimators side by side."""
    records: list[Record] = []
    for case in make_cases(config):
        measured = {
            name: measure(estimator, case, config)
            for name, estimator in tqdm(ESTIMATORS.items(), desc=f"{case.task}, {case.point}")
            if case.admits(estimator)
        }
        default = measured["default"]["order"]
        forwards = default["gradient_variance"] / default["variance_per_update"]
        limits = {} if case.task == "chain" else baseline_limits(case.problem, config.particles)
        for name, variance in limits.items():
            measured[name] = {"order": {"variance_per_update": variance, "gradient_variance": variance * forwards}}
        for name, groups in measured.items():
            for group, numbers in groups.items():
                stock = measured[STOCK][group]["gradient_variance"]
                labels = {
                    "estimator": name,
                    "task": case.task,
                    "point": case.point,
                    "gradient": group,
                    "particles": config.particles,
                    "seed": config.seed,
                }
                if name in ESTIMATORS:
                    labels["mode"] = "one step" if ESTIMATORS[name].one_step else "stacked"
                    labels |= {"unbiased": ESTIMATORS[name].unbiased, "draws": config.draws}
                numbers["variance_ratio"] = numbers["gradient_variance"] / stock
                records += [{"metric": metric, "value": value, **labels} for metric, value in numbers.items()]
    records += time_estimators(config)
    console = Console()
    for task, point in dict.fromkeys((record["task"], record["point"]) for record in records if "point" in record):
        shown = [record for record in records if (record["task"], record.get("point")) == (task, point)]
        shown = [record for record in shown if record["metric"] in SHOWN]
        console.print(results_table(shown, rows=("estimator", "gradient"), title=f"{task}, {point}"))
    costs = [record for record in records if record["metric"] in COSTS]
    console.print(results_table(costs, rows=("estimator",), title="One update of a mean-field plan on the chain"))
    plot_variance(records, out / "variance.png")
    return records


# ------------------------------------------------------------------------------------------------------- ground truth


def make_cases(config: Config) -> list[Case]:
    """All problems with their exact gradients."""
    cases = []
    for guide in ("mean_field", "policy", "renormalised"):
        problem = tiny_problem(guide, seed=config.seed)
        cases.append(Case("tiny", guide, problem, enumerated_gradients(problem, config.particles)))
    num_steps, length = 4, 16
    sequences = tensors(sample_chains(65, length=length, seed=config.seed))["tokens"]
    tokens, rest = sequences[0], sequences[1:]
    start = 0.1 * torch.randn(length, num_steps, generator=torch.Generator().manual_seed(config.seed))
    for point, logits in {"start": start, "half learned": half_learned(start, rest)}.items():
        exact = {"elbo": {"order": chain_gradient(tokens, logits)}}
        cases.append(Case("chain", point, chain_problem(tokens, num_steps, logits), exact))
    problem = chain_policy_problem(tokens[: length // 2], start[: length // 2].T - 1.0)
    cases.append(Case("short chain", "policy", problem, enumerated_gradients(problem)))
    return cases


def enumerated_gradients(problem: Problem, particles: int | None = None) -> dict[str, dict[str, Tensor]]:
    """Sums over all orders of one row, or over all tuples of orders for the bounds of several particles.

    Args:
        problem: what makes the row.
        particles: K of the bounds of several particles; without it only the ELBO.
    """
    targets = {"elbo": _elbo}
    if particles is not None:
        targets["importance weighted"] = partial(_importance_weighted, particles=particles)
        targets["wake-sleep"] = partial(_wake_sleep, particles=particles)
    exact = {}
    for name, objective in targets.items():
        one = problem(1, False)
        terms = exact_terms(one.model, one.guide, all_orders(one.guide, **one.batch), **one.batch)
        objective(terms).backward()
        exact[name] = {group: gradient[0] for group, gradient in one.gradients().items()}
    return exact


def _elbo(terms: ExactTerms) -> Tensor:
    return terms.elbo().sum()


def _importance_weighted(terms: ExactTerms, particles: int) -> Tensor:
    """E[ log mean_k w_k ] over all K-tuples of the orders that the guide can draw."""
    possible = terms.log_guide[:, 0] > -torch.inf
    log_q = terms.log_guide[possible, 0].double()
    return _expected_bound(log_q, terms.log_joint()[possible, 0].double() - log_q, particles)


def _expected_bound(log_q: Tensor, log_weight: Tensor, particles: int) -> Tensor:
    probability, summed = log_q, log_weight  # of tuples, one dimension per particle
    for _ in range(particles - 1):
        probability = probability.unsqueeze(-1) + log_q
        summed = torch.logaddexp(summed.unsqueeze(-1), log_weight)
    return (probability.exp() * (summed - math.log(particles))).sum()


def _wake_sleep(terms: ExactTerms, particles: int) -> Tensor:
    """Where wake-sleep points as K grows: E_posterior[log q] for the guide; the bound of K particles for the model."""
    possible = terms.log_guide[:, 0] > -torch.inf
    log_q, log_joint = terms.log_guide[possible, 0].double(), terms.log_joint()[possible, 0].double()
    fixed = log_q.detach()
    return (log_joint.detach().softmax(0) * log_q).sum() + _expected_bound(fixed, log_joint - fixed, particles)


def chain_gradient(tokens: Tensor, logits: Tensor) -> Tensor:
    """Gradient of the ELBO of a mean-field plan against a uniform prior, float64 [P]."""
    logits = logits.double().requires_grad_()
    _chain_bound(tokens.unsqueeze(0), logits, kl_weight=1.0).sum().backward()
    assert logits.grad is not None
    return logits.grad.flatten()


def half_learned(logits: Tensor, tokens: Tensor, updates: int = 20) -> Tensor:
    """Where a plan stands after some updates along the exact gradient."""
    logits = logits.double().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(updates):
        optimizer.zero_grad()
        (-_chain_bound(tokens, logits, kl_weight=0.0).mean()).backward()
        optimizer.step()
    return logits.detach().float()


def _chain_bound(tokens: Tensor, logits: Tensor, kl_weight: float) -> Tensor:
    denoiser = MarkovChainDenoiser(num_states=4, stay=0.85, length=tokens.shape[-1])
    plan = StepwiseReveal(logits)
    uniform = StepwiseReveal(torch.zeros_like(logits))
    divergence = torch.distributions.kl_divergence(plan, uniform)
    return denoiser.plan_log_likelihood(tokens, plan.probs) - kl_weight * divergence


# -------------------------------------------------------------------------------------------------------- measurement


def measure(estimator: Estimator, case: Case, config: Config) -> dict[str, dict[str, float]]:
    """Bias and variance of one estimator on one problem, by group of parameters."""
    pair = case.problem(config.rows, estimator.one_step)
    update = _updater(pair, estimator, config.particles)
    pyro.set_rng_seed(config.seed)
    calls = -(-config.draws // config.rows)
    means: dict[str, list[Tensor]] = {group: [] for group in pair.parameters}
    squares: dict[str, list[Tensor]] = {group: [] for group in pair.parameters}
    for _ in range(calls):
        update()
        for group, gradient in pair.gradients().items():
            draws = -gradient * config.rows  # of the bound of each row, [R, P]
            means[group].append(draws.mean(0))
            squares[group].append(draws.square().mean(0))
    assert isinstance(pair.model.denoiser, torch.nn.Module)
    rows = denoiser_rows(pair.model.denoiser, update) / config.rows
    numbers = {}
    for group, exact in case.exact[estimator.target].items():
        compared = _compare(torch.stack(means[group]), torch.stack(squares[group]), exact)
        compared["denoiser_rows"] = rows
        compared["gradient_variance"] = (
            compared["variance_per_update"] * rows / (pair.model.num_steps * config.particles)
        )
        numbers[group] = compared
    return numbers


def _compare(means: Tensor, squares: Tensor, exact: Tensor) -> dict[str, float]:
    """Bias against the exact gradient (float64 [P]) from the means of independent calls (float64 [C, P])."""
    mean, spread = means.mean(0), means.std(0) / len(means) ** 0.5  # rows of a call may share a stratified draw
    error = mean - exact
    random = spread > 1e-6 * (1 + exact.abs())  # elsewhere only rounding is left
    z = (error / spread)[random].abs()
    return {
        "bias_z": float(z.max()) if len(z) else 0.0,
        "bias": float(error.norm() / exact.norm()),
        "bias_noise": float(spread.norm() / exact.norm()),
        "variance_per_update": float((squares.mean(0) - mean.square()).clamp_min(0).sum()),
    }


def _updater(pair: Replicates, estimator: Estimator, particles: int) -> Callable[[], None]:
    """What draws a gradient into the leaves, per sequence."""
    loss = OrderLoss(pair.model, pair.guide, estimator.make(particles))

    def step() -> None:
        for leaves in pair.parameters.values():
            for leaf in leaves:
                leaf.grad = None
        loss(**pair.batch).backward()

    return step


def time_estimators(config: Config, batch_size: int = 16, num_steps: int = 4) -> list[Record]:
    """Time and memory of one update of every estimator, taken in turns, and their ratios to the default's."""
    tokens = tensors(sample_chains(1, seed=config.seed))["tokens"][0]
    problem = chain_problem(tokens, num_steps, torch.zeros(len(tokens), num_steps))
    steps = {
        name: _updater(problem(batch_size, estimator.one_step), estimator, config.particles)
        for name, estimator in ESTIMATORS.items()
        if not estimator.small
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(config.rounds + 2):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if turn >= 2:  # the first turns pay for first times
                seconds[name].append(time.perf_counter() - begin)
    memory = {name: peak_bytes(step, torch.device("cpu")) for name, step in steps.items()}
    records: list[Record] = []
    for name, times in seconds.items():
        labels = {"estimator": name, "task": "chain", "particles": config.particles, "batch": batch_size}
        ratio = median(a / b for a, b in zip(times, seconds["default"], strict=True))
        records += [
            {"metric": "seconds_per_update", "value": median(times), **labels},
            {"metric": "time_ratio", "value": ratio, "of": "default", **labels},
            {"metric": "peak_megabytes", "value": memory[name] / 2**20, **labels},
            {"metric": "memory_ratio", "value": memory[name] / memory["default"], "of": "default", **labels},
        ]
    return records


def plot_variance(records: Iterable[Record], path: Path) -> None:
    """Draw the variance of the order's gradient relative to stock TraceGraph; hollow marks are biased estimators.

    Sums over all orders, whose variance is rounding, are left out.
    """
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [r for r in records if r["metric"] == "variance_ratio" and r["gradient"] == "order"]
    shown = [record for record in shown if float(str(record["value"])) > 1e-9]
    names = list(dict.fromkeys(str(record["estimator"]) for record in shown))
    cases = list(dict.fromkeys(f"{record['task']}, {record['point']}" for record in shown))
    colours = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
    figure, axes = plt.subplots(figsize=(7, 0.4 * len(names) + 1.6), layout="constrained")
    for index, (case, colour) in enumerate(zip(cases, colours, strict=False)):
        for record in shown:
            if f"{record['task']}, {record['point']}" != case:
                continue
            height = names.index(str(record["estimator"])) + 0.12 * (index - len(cases) / 2)
            face = colour if record.get("unbiased", True) else "none"
            axes.plot(float(str(record["value"])), height, "o", color=colour, markerfacecolor=face)
        axes.plot([], [], "o", color=colour, label=case)
    axes.set(xscale="log", xlabel="gradient variance at equal denoiser forwards / stock TraceGraph_ELBO")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.axvline(1.0, color="0.6", linewidth=1)
    axes.axvline(0.1, color="0.6", linewidth=1, linestyle=":")
    axes.legend(fontsize="small")
    save_figure(figure, path)
