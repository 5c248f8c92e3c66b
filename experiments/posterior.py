"""What a guide that sees the tokens adds: a random order, and a posterior over it, against the best fixed order.

    orderppl posterior --seeds 3 --out runs/posterior

A fixed order is the same for every sequence, and on a chain so, nearly, is the best policy. With a random order the
model is a mixture, p(x) = E_p(r)[ p(x | r) ], and a guide that sees the tokens puts its weight on the orders that make
them likely, at the price of KL(q(r | x) || p(r)). Here prior and guide are learned together by the plain bound: the
steps of all positions are independent, in the prior by a table and in the guide by a transformer over the tokens. The
weight of the KL rises to 1, so that the guide finds out what orders are good for before it pays for them.

`gap_nats` is the log evidence minus the bound (ELBO, or importance-weighted with `draws` orders), for arms without a
guide minus the path log-likelihood: nats per sequence, 0 is perfect. posterior.png shows it along the fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import pyro
import torch
from rich.console import Console
from torch import Tensor

from orderppl.decoding import Policy
from orderppl.diagnostics import read_log
from orderppl.evaluation import bootstrap_mean
from orderppl.experiments.build import OrderConfig, OrderProblem, build_problem, learned_policy
from orderppl.experiments.chain import require_exact
from orderppl.experiments.config import setting
from orderppl.experiments.evaluate import best_arms, chain_gaps
from orderppl.experiments.fit_order import LOG_FILE, fit_problem, save_order
from orderppl.experiments.results import Record, real, results_table, save_figure
from orderppl.inference import ImportanceWeightedELBO
from orderppl.inference.batches import BatchStream
from orderppl.inference.importance_weighted import log_mean_exp
from orderppl.models.denoisers import ExactDenoiser

CONFIG = "posterior"


@dataclass(frozen=True)
class Config(OrderConfig):
    """Settings of posterior."""

    seeds: int = setting(3, "training seeds, from --seed upwards", at_least=1, option="--seeds")
    draws: int = setting(64, "orders per sequence of the bounds on the test split", at_least=2)

    def __post_init__(self) -> None:
        """Check what belongs together."""
        super().__post_init__()
        require_exact(self.task)


def run(config: Config, out: Path) -> Iterable[Record]:
    """Fit per seed and measure the bounds on the test split, beside what is best without a guide."""
    problem = build_problem(config)
    denoiser, num_steps = problem.denoiser.to(config.device), config.num_steps
    assert isinstance(denoiser, ExactDenoiser)
    held_out, test = (
        problem.task.stream(split, 100, shuffle=False, device=config.device) for split in ("validation", "test")
    )
    labels = {"task": problem.task.name}
    best, expected = best_arms(denoiser, num_steps)
    records: list[Record] = [{**record, **labels} for record in expected]
    records += chain_gaps(denoiser, best, list(test.once()), num_steps, config.seed, labels)
    evidence, logs = log_evidence(denoiser, test), []
    for seed in range(config.seed, config.seed + config.seeds):
        pyro.set_rng_seed(seed)
        problem = build_problem(config, problem.task)  # the data are those of the first seed
        folder = out / f"seed-{seed}"
        fit_problem(replace(config, seed=seed), problem, folder)
        save_order(config, problem, folder)
        logs.append(folder / LOG_FILE)
        for arm, bound in bounds(problem, test, config.draws).items():
            gap = bootstrap_mean(evidence - bound, seed=seed)
            record: Record = {"metric": "gap_nats", "value": gap.value, "low": gap.low, "high": gap.high, "arm": arm}
            records.append({**record, "steps": num_steps, "n": len(evidence), "seed": seed, **labels})
        alone: dict[str, Policy] = {"its prior, sampled": learned_policy(problem, "sample")}
        records += chain_gaps(denoiser, alone, list(test.once()), num_steps, seed, labels)
    gaps = {str(record["arm"]): real(record) for record in expected}
    plot_fits(logs, float(log_evidence(denoiser, held_out).mean()), gaps, out / "posterior.png")
    title = f"Exact {config.task.name}, {num_steps} steps: gap to the log evidence, nats"
    Console().print(results_table(records, title=title))
    return records


def log_evidence(denoiser: ExactDenoiser, stream: BatchStream) -> Tensor:
    """Log probability of every sequence of a split: float64 [N], nats."""
    return torch.cat([denoiser.log_evidence(batch["tokens"], batch["attention_mask"]).cpu() for batch in stream.once()])


def bounds(problem: OrderProblem, stream: BatchStream, draws: int) -> dict[str, Tensor]:
    """Both bounds of every sequence, from the same orders: arm -> float64 [N], nats."""
    elbo = ImportanceWeightedELBO(draws)
    with torch.no_grad():
        parts = [elbo.densities(problem.model, problem.guide, (), batch).log_weight(1.0) for batch in stream.once()]
    log_weight = torch.cat(parts, -1).double().cpu()  # [K, N]
    return {"posterior guide": log_weight.mean(0), "posterior guide, importance-weighted": log_mean_exp(log_weight)}


def plot_fits(logs: Sequence[Path], evidence: float, best: dict[str, float], path: Path) -> None:
    """Draw the validation gap of every fit, and what the best arms without a guide are expected to lose."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for log in logs:
        points = [(entry["update"], entry["validation"]["elbo"]) for entry in read_log(log) if "validation" in entry]
        axes.plot([update for update, _ in points], [evidence - elbo for _, elbo in points], label=log.parent.name)
    for (arm, gap), style in zip(best.items(), ("-", ":"), strict=False):
        axes.axhline(gap, color="black", linewidth=1, linestyle=style, label=arm)
    axes.set(xlabel="updates", ylabel="log evidence - ELBO, nats", ylim=(0, 2.5 * max(best.values())))
    axes.legend(fontsize="small")
    save_figure(figure, path)
