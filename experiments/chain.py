"""The exact Markov chain: how close a learned order comes to the log evidence and to the provably best fixed order.

    orderppl chain --out runs/chain
    orderppl chain --seeds 5 --steps 3 --out runs/chain-3

For every seed a plan is learned from a few short fits with different random starts, each followed by a local search on
training rows, because fits of independent steps end in local optima; the one with the best validation bound is kept.
The best fixed order, and the best of all policies that see what is revealed, come from dynamic programming.
`gap_nats` is the log evidence minus the path log-likelihood, nats per sequence: 0 is perfect; `expected_gap_nats` is
its exact expectation. Where the denoiser is exactly symmetric, confidence rules break ties at random (leftmost-first
would make them left-to-right).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pyro
import torch
from rich.console import Console

from orderppl.decoding import PlannedOrder, Policy, make_policy
from orderppl.errors import UserError
from orderppl.experiments.build import (
    ChainTask,
    OrderConfig,
    OrderProblem,
    RefineConfig,
    TaskConfig,
    TreeTask,
    build_problem,
    learned_policy,
)
from orderppl.experiments.config import setting
from orderppl.experiments.evaluate import best_arms, chain_gaps
from orderppl.experiments.fit_order import (
    LOG_FILE,
    final_kl_weight,
    fit_problem,
    held_out_bound,
    save_order,
    search_plan,
)
from orderppl.experiments.results import Record, results_table
from orderppl.inference.checkpoints import write_text
from orderppl.inference.refine import Refinement
from orderppl.models.denoisers import ExactDenoiser

CONFIG = "chain"


@dataclass(frozen=True)
class Config(OrderConfig):
    """Settings of chain."""

    seeds: int = setting(1, "training seeds, from --seed upwards", at_least=1, option="--seeds")
    starts: int = setting(4, "fits per seed; the best on validation rows is kept", at_least=1)
    refine: RefineConfig | None = setting(RefineConfig, "a local search on the plan after each fit; null: none")

    def __post_init__(self) -> None:
        """Check what belongs together."""
        super().__post_init__()
        require_exact(self.task)


def require_exact(task: TaskConfig) -> None:
    """Refuse a task whose log evidence is not known.

    Raises:
        UserError: neither a chain nor a tree.
    """
    if not isinstance(task, ChainTask | TreeTask):
        remedy = "use task.name=chain or tree, or `orderppl fit-order`"
        raise UserError("task.name", f"is {task.name!r}", remedy)


def run(config: Config, out: Path) -> Iterable[Record]:
    """Learn per seed, then measure every arm on the test rows."""
    problem, refinement = best_of_starts(config, config.seed, out)
    denoiser, num_steps = problem.denoiser, config.num_steps
    assert isinstance(denoiser, ExactDenoiser)
    test = list(problem.task.stream("test", 500, shuffle=False, device=config.device).once())
    labels = {"task": problem.task.name}
    arms, expected = reference_arms(denoiser, num_steps)
    records: list[Record] = [{**record, **labels} for record in expected]
    records += chain_gaps(denoiser, arms, test, num_steps, config.seed, labels)
    for seed in range(config.seed, config.seed + config.seeds):
        if seed != config.seed:
            problem, refinement = best_of_starts(config, seed, out)
        learned: dict[str, Policy] = {
            "learned": learned_policy(problem, "mode"),
            "learned, sampled": learned_policy(problem, "sample"),
        }
        if config.refine is not None and refinement is not None:  # what fit and search are worth alone
            random_plan = torch.randint(num_steps, (denoiser.length,), generator=torch.Generator().manual_seed(seed))
            learned["fit without the search"] = PlannedOrder(refinement.start)
            learned["search without a fit"] = PlannedOrder(search_plan(config.refine, problem, random_plan, seed).steps)
            cost = {"metric": "expected_gap_nats", "value": denoiser.expected_cost(refinement.steps), "arm": "learned"}
            records.append({**cost, "steps": num_steps, "seed": seed, **labels})
        records += chain_gaps(denoiser, learned, test, num_steps, seed, labels)
    title = f"Exact {config.task.name}, {num_steps} steps: gap to the log evidence, nats"
    Console().print(results_table(records, title=title))
    return records


def reference_arms(denoiser: ExactDenoiser, num_steps: int) -> tuple[dict[str, Policy], list[Record]]:
    """What is best, with its exact expectation, and heuristics."""
    arms, expected = best_arms(denoiser, num_steps)
    for name in ("random", "top_prob", "entropy", "left_to_right"):
        arms[name.replace("_", " ")] = make_policy(name, ties="random")
    return arms, expected


def best_of_starts(config: Config, seed: int, out: Path) -> tuple[OrderProblem, Refinement | None]:
    """Fit from several random starts and keep the best on validation rows, in the folder of the seed."""
    found: list[tuple[float, int, OrderProblem, Refinement | None]] = []
    brief = replace(config.fit, checkpoint_every=None)  # a fit takes seconds
    for start in range(config.starts):
        pyro.set_rng_seed(1000 * seed + start)
        problem = build_problem(replace(config, seed=config.seed))  # the data are those of the first seed
        attempt = replace(config, seed=1000 * seed + start, fit=brief)
        refinement = fit_problem(attempt, problem, out / f"seed-{seed}" / f"start-{start}")
        held_out = problem.task.stream("validation", 500, shuffle=False, device=config.device)
        bound = held_out_bound(problem, held_out, final_kl_weight(config))()
        found.append((bound["objective"], start, problem, refinement))
    _, start, best, refinement = max(found, key=lambda attempt: attempt[0])
    folder = out / f"seed-{seed}"
    save_order(config, best, folder)
    write_text(folder / LOG_FILE, (folder / f"start-{start}" / LOG_FILE).read_text("utf-8"))
    return best, refinement
