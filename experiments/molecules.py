"""What the experiments on pretrained models of molecules share: learn an order, then compare it on held-out rows."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import torch
from rich.console import Console
from torch import Tensor

from orderppl.decoding import PlannedOrder, Policy, SplitPlan, decode
from orderppl.errors import UserError
from orderppl.evaluation import Interval, bootstrap_mean, evaluate_policies
from orderppl.experiments.build import (
    AntibodyTask,
    OrderConfig,
    OrderProblem,
    ReactionTask,
    build_problem,
    build_task,
    learned_policy,
)
from orderppl.experiments.config import setting
from orderppl.experiments.evaluate import heuristics
from orderppl.experiments.fit_order import fit_problem, save_order
from orderppl.experiments.results import Record, real, results_table
from orderppl.guides import MeanFieldGuide

Batches = list[dict[str, Tensor]]
M = TypeVar("M", bound="MoleculeConfig")


@dataclass(frozen=True)
class MoleculeConfig(OrderConfig):
    """Settings that the experiments share."""

    decision: Literal["mode", "sample", "rank"] = setting(
        "mode", "how the learned probabilities become the reveal sets of the arm `learned`"
    )
    threshold: float = setting(0.9, "confidence of the threshold policy", above=0, below=1)
    plan_steps: int | None = setting(
        None,
        "steps of the learned plan, whose sets are split by confidence; null: those of all arms",
        at_least=1,
    )
    plan_weight: float = setting(0.5, "log-odds by which such a plan holds later sets back, per set", at_least=0)
    denoiser_rows: int | None = setting(
        None,
        "what the fit may spend at most, rows read by the denoiser: bounds fit.updates whatever the number of steps",
        at_least=1,
    )
    rows: int = setting(1000, "held-out rows that are compared, from the first", at_least=1)
    rows_written: int = setting(32, "held-out rows that are also written freely; 0: none", at_least=0)


@dataclass
class Comparison:
    """A learned order and what it was compared with.

    Attributes:
        problem: the fitted objects.
        policies: every arm.
        test: batches of the held-out rows.
        records: `path_nats` and `nfe` of every arm, and differences to the learned one.
        labels: of every record.
    """

    problem: OrderProblem
    policies: dict[str, Policy]
    test: Batches
    records: list[Record]
    labels: dict[str, str | int]

    def written(self, arm: str, rows: int, num_steps: int, temperature: float, seed: int) -> list[list[int]]:
        """Responses that an arm writes for the first held-out rows, each of its row's length; token ids."""
        found: list[list[int]] = []
        for batch in self.test:
            part = {name: held[: rows - len(found)] for name, held in batch.items()}
            if not len(part["tokens"]):
                break
            output = decode(
                self.problem.model.denoiser,
                self.policies[arm],
                part.get("context"),
                part.get("context_mask"),
                length=part["attention_mask"].sum(-1),
                max_steps=num_steps,
                temperature=temperature,
                generator=torch.Generator().manual_seed(seed),
                row_ids=torch.arange(len(found), len(found) + len(part["tokens"])),
            )
            kept = zip(output.sequences.tolist(), output.attention_mask.sum(-1).tolist(), strict=True)
            found += [row[:size] for row, size in kept]
        return found

    def record(self, metric: str, values: Tensor, arm: str, **labels: str | int | float) -> Record:
        """Mean over rows with its bootstrap interval."""
        interval: Interval = bootstrap_mean(values, seed=0)
        head: Record = {"metric": metric, "value": interval.value, "low": interval.low, "high": interval.high}
        return {**head, "arm": arm, "n": len(values), **self.labels, **labels}


def learn_and_compare(
    config: MoleculeConfig,
    task: AntibodyTask | ReactionTask,
    out: Path,
    resume: bool,
    labels: Mapping[str, str | int],
    title: str,
) -> Comparison:
    """Learn an order on the training rows and follow every arm along the held-out ones.

    Args:
        config: the settings; `task` replaces theirs.
        task: the data.
        out: folder of the run.
        resume: go on with the run there.
        labels: added to every record.
        title: of the printed table.
    """
    num_steps = config.num_steps
    config = within_budget(replace(config, num_steps=config.plan_steps or num_steps))
    problem = build_problem(config, build_task(task, config.seed))
    if not resume:  # the same command again replaces its own run
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    fit_problem(config, problem, out, resume=resume)
    settings = {name: getattr(config, name) for name in OrderConfig.__dataclass_fields__}
    save_order(replace(OrderConfig(**settings), task=task), problem, out)

    test = first_rows(problem, config.rows, config.device)
    policies: dict[str, Policy] = {"learned": learned_policy(problem, config.decision)}
    decisions = {"mode": "learned, most likely", "sample": "learned, sampled"}
    if isinstance(problem.guide, MeanFieldGuide):
        decisions["rank"] = "learned, ranked"
    policies |= {arm: learned_policy(problem, to) for to, arm in decisions.items() if to != config.decision}  # type: ignore[arg-type]
    if num_steps > config.num_steps:
        policies = {arm: split(policy, config.num_steps, config.plan_weight) for arm, policy in policies.items()}
    policies |= heuristics(threshold=config.threshold)
    shared = {"steps": num_steps, "seed": config.seed, "train_n": len(problem.task.held("train")["tokens"])}
    records = evaluate_policies(
        problem.model.denoiser,
        policies,
        test,
        num_steps,
        seed=config.seed,
        baseline="learned",
        labels={**labels, "train_n": shared["train_n"]},
    )
    shown = [record for record in records if record["metric"] in ("path_nats", "nfe")]
    held_out = sum(len(batch["tokens"]) for batch in test)
    Console().print(results_table(shown, title=f"{title}, {held_out} held-out, {num_steps} steps"))
    return Comparison(problem, policies, test, list(records), {**labels, **shared})


def split(policy: Policy, num_sets: int, weight: float) -> Policy:
    """A plan whose sets are split over more steps.

    Raises:
        UserError: what was learned is no plan.
    """
    if not isinstance(policy, PlannedOrder):
        raise UserError("plan_steps", "what was learned is no plan", "set guide=mean_field, or plan_steps=null")
    return SplitPlan(policy, num_sets, weight)


def within_budget(config: M) -> M:
    """The settings with no more updates than `denoiser_rows` pays for; annealing keeps its share of them.

    An update reads the fully hidden state of each sequence once and the T - 1 later ones once per particle.
    """
    if config.denoiser_rows is None:
        return config
    particles = int(getattr(config.elbo, "num_particles", 1))
    later = 1 if config.elbo.one_step else config.num_steps - 1
    paid = max(config.denoiser_rows // (config.fit.batch_size * (1 + later * particles)), 1)
    updates = min(config.fit.updates, paid)
    anneal = config.fit.kl_weight
    if anneal is not None:
        anneal = replace(anneal, updates=max(anneal.updates * updates // config.fit.updates, 1))
    return replace(config, fit=replace(config.fit, updates=updates, kl_weight=anneal))


def first_rows(problem: OrderProblem, rows: int, device: str) -> Batches:
    """The first held-out rows, in batches."""
    held = {name: tensor[:rows] for name, tensor in problem.task.held("test").items()}
    part = replace(problem.task, splits={**problem.task.splits, "test": held})
    return list(part.stream("test", 64, shuffle=False, device=device).once())


def best_heuristic(records: Sequence[Record]) -> str:
    """The arm that neither learns nor sees the truth with the lowest `path_nats`."""
    arms = {
        str(record["arm"]): real(record)
        for record in records
        if record["metric"] == "path_nats" and not str(record["arm"]).startswith(("learned", "greedy_oracle"))
    }
    return min(arms, key=lambda arm: arms[arm])


def plan_probabilities(problem: OrderProblem, batch: Mapping[str, Tensor]) -> Tensor:
    """P(step | position) of the rows of a batch, float [B, L, T], on the CPU."""
    assert isinstance(problem.guide, MeanFieldGuide)
    with torch.no_grad():
        logits: Tensor = problem.guide.network(
            None, batch["attention_mask"], batch.get("context"), batch.get("context_mask")
        )
    return logits.softmax(-1).cpu()
