"""What the experiments on pretrained models of molecules share: learn an order, then compare it on held-out rows."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from orderppl.decoding import NetworkPlan, Policy, decode, follow
from orderppl.errors import UserError
from orderppl.evaluation import Interval, batch_canvas, bootstrap_mean, evaluate_policies
from orderppl.experiments.build import (
    AntibodyTask,
    BoundedEntropyConfig,
    EasyFirstConfig,
    HeldBackConfig,
    MeanFieldConfig,
    OrderConfig,
    OrderProblem,
    PolicyGuideConfig,
    RankedPolicyConfig,
    ReactionTask,
    SizesConfig,
    UniformSizesConfig,
    build_problem,
    build_task,
    learned_policy,
)
from orderppl.experiments.config import setting
from orderppl.experiments.evaluate import heuristics
from orderppl.experiments.fit_order import fit_problem, save_order
from orderppl.experiments.results import Record, real, results_table
from orderppl.guides import MeanFieldGuide
from orderppl.inference.batches import BatchStream
from orderppl.models import HeldBack, RankedPolicy
from orderppl.path import RevealPath

Batches = list[dict[str, Tensor]]
M = TypeVar("M", bound="MoleculeConfig")
SHOWN_DRAWS = 16  # orders of which the probabilities of a figure are the shares, where they have no closed form


@dataclass(frozen=True)
class OverruleConfig:
    """What is certain overrules the plan: positions are ranked by certainty, with later sets of the plan held back."""

    base: EasyFirstConfig | BoundedEntropyConfig = setting(EasyFirstConfig, "what ranks by certainty")
    weight: float = setting(1.0, "log-odds per step of the plan by which later sets are held back", at_least=0)
    sizes: SizesConfig = setting(UniformSizesConfig, "positions revealed at each step")


@dataclass(frozen=True)
class MoleculeConfig(OrderConfig):
    """Settings that the experiments share."""

    decision: Literal["mode", "sample", "rank"] = setting(
        "mode", "how the learned probabilities become the reveal sets of the arm `learned`"
    )
    threshold: float = setting(0.9, "confidence of the threshold policy", above=0, below=1)
    plan_steps: int | None = setting(
        None, "steps of the learned plan, which is played more slowly; null: those of all arms", at_least=1
    )
    overrule: OverruleConfig | None = setting(None, "let what is certain overrule the plan; null: follow the plan")
    denoiser_rows: int | None = setting(
        None,
        "what the fit may spend at most, rows read by the denoiser: bounds fit.updates whatever the number of steps",
        at_least=1,
    )
    rows: int = setting(1000, "held-out rows that are compared, from the first", at_least=1)
    draws: int = setting(1, "times that arms with random sets are played; a row has the mean over them", at_least=1)
    rows_written: int = setting(32, "held-out rows that are also written freely; 0: none", at_least=0)

    def __post_init__(self) -> None:
        """Check what belongs together."""
        super().__post_init__()
        plan = isinstance(self.guide, MeanFieldConfig) and not self.guide.sees_tokens
        if self.overrule is not None and not plan:
            raise UserError("overrule", f"{self.guide.name} is no plan", "set guide=mean_field, or overrule=null")
        if self.overrule is not None and self.decision == "rank":
            raise UserError("decision", "what overrules a plan ranks already", "use mode or sample")
        if self.plan_steps is not None and self.overrule is None:
            raise UserError("plan_steps", "a plan alone has all steps", "set overrule, or leave it out")
        if self.plan_steps is not None and self.plan_steps > self.num_steps:
            problem = f"{self.plan_steps} for {self.num_steps} steps"
            raise UserError("plan_steps", problem, "give at most as many as num_steps")


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
    plan_config = within_budget(replace(config, num_steps=config.plan_steps or config.num_steps))
    problem = build_problem(plan_config, build_task(task, config.seed))
    if not resume:  # the same command again replaces its own run
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    fit_problem(plan_config, problem, out, resume=resume)
    plan = learned_policy(problem, "mode")
    settings = {name: getattr(plan_config, name) for name in OrderConfig.__dataclass_fields__}
    order = replace(OrderConfig(**settings), task=task)
    if config.overrule is not None:
        order, problem = overruled(order, config.overrule, config.num_steps, problem)
    save_order(order, problem, out)

    test = first_rows(problem, config.rows, config.device)
    policies: dict[str, Policy] = {"learned": learned_policy(problem, config.decision)}
    decisions = {"mode": "learned, most likely", "sample": "learned, sampled"}
    if config.overrule is None and isinstance(problem.guide, MeanFieldGuide):
        decisions["rank"] = "learned, ranked"
    policies |= {arm: learned_policy(problem, to) for to, arm in decisions.items() if to != config.decision}  # type: ignore[arg-type]
    if config.overrule is not None and plan_config.num_steps == config.num_steps:
        policies["learned, the plan alone"] = plan
    policies |= heuristics(threshold=config.threshold)
    shared = {"steps": config.num_steps, "seed": config.seed, "train_n": len(problem.task.held("train")["tokens"])}
    records = evaluate_policies(
        problem.model.denoiser,
        policies,
        by_length(test),
        config.num_steps,
        seed=config.seed,
        draws=config.draws,
        baseline="learned",
        labels={**labels, "train_n": shared["train_n"]},
    )
    shown = [record for record in records if record["metric"] in ("path_nats", "nfe")]
    held_out = sum(len(batch["tokens"]) for batch in test)
    Console().print(results_table(shown, title=f"{title}, {held_out} held-out, {config.num_steps} steps"))
    return Comparison(problem, policies, test, list(records), {**labels, **shared})


def overruled(
    config: OrderConfig, settings: OverruleConfig, num_steps: int, planned: OrderProblem
) -> tuple[OrderConfig, OrderProblem]:
    """The policy that follows a learned plan where nothing is certain, and the settings that rebuild it.

    Args:
        config: of the plan.
        settings: what overrules it.
        num_steps: step budget T of the policy.
        planned: the fitted objects.
    """
    assert isinstance(config.guide, MeanFieldConfig)
    assert isinstance(planned.guide, MeanFieldGuide)
    held_back = HeldBackConfig(
        base=settings.base, network=config.guide.network, steps=config.num_steps, weight=settings.weight
    )
    ranked = RankedPolicyConfig(prior=held_back, sizes=settings.sizes)
    config = replace(config, num_steps=num_steps, prior=ranked, guide=PolicyGuideConfig(), refine=None)
    problem = build_problem(config, planned.task, planned.denoiser)
    prior = problem.model.prior
    assert isinstance(prior, RankedPolicy)
    assert isinstance(prior.prior, HeldBack)
    prior.prior.network.load_state_dict(planned.guide.network.state_dict())
    prior.to(config.device)
    return config, problem


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
    """The first held-out rows, in batches, with their numbers."""
    held = {name: tensor[:rows] for name, tensor in problem.task.held("test").items()}
    held["row_ids"] = torch.arange(len(held["tokens"]))
    return list(BatchStream(held, 64, shuffle=False, device=device).once())


def by_length(batches: Batches, size: int = 16) -> Batches:
    """The rows of batches again, long ones together, so that little of a batch is padding."""
    sorted_batches: Batches = []
    for batch in batches:
        length = sum(batch[name].sum(-1) for name in ("attention_mask", "context_mask") if name in batch)
        assert isinstance(length, Tensor)
        order = length.argsort(stable=True).cpu()
        rows = {name: tensor.cpu()[order] for name, tensor in batch.items()}
        sorted_batches += BatchStream(rows, size, shuffle=False, device=batch["tokens"].device).once()
    return sorted_batches


def best_heuristic(records: Sequence[Record]) -> str:
    """The arm that neither learns nor sees the truth with the lowest `path_nats`."""
    arms = {
        str(record["arm"]): real(record)
        for record in records
        if record["metric"] == "path_nats" and not str(record["arm"]).startswith(("learned", "greedy_oracle"))
    }
    return min(arms, key=lambda arm: arms[arm])


def revealed_steps(comparison: Comparison, batch: Mapping[str, Tensor]) -> Tensor:
    """The step at which the arm `learned` reveals every position of the rows of a batch, int64 [B, L], on the CPU."""
    canvas, tokens = batch_canvas(comparison.problem.model.denoiser, batch)
    with torch.no_grad():
        path = follow(
            comparison.policies["learned"],
            canvas,
            tokens,
            int(comparison.labels["steps"]),
            generator=torch.Generator().manual_seed(int(comparison.labels["seed"])),
            row_ids=batch["row_ids"],
        )
    return path.reveal_step.cpu()


def step_probabilities(comparison: Comparison, batch: Mapping[str, Tensor]) -> Tensor:
    """P(step | position) of the rows of a batch, float [B, L, T], on the CPU; without a closed form shares of draws."""
    problem, num_steps = comparison.problem, int(comparison.labels["steps"])
    canvas, tokens = batch_canvas(problem.model.denoiser, batch)
    with torch.no_grad():
        if isinstance(problem.guide, MeanFieldGuide):
            return NetworkPlan(problem.guide.network)(canvas).softmax(-1).cpu()
        draws = [problem.guide.law(RevealPath(canvas, tokens, num_steps)).sample() for _ in range(SHOWN_DRAWS)]
    steps = torch.stack(draws).clamp(min=0)  # [draws, B, L]
    return F.one_hot(steps, num_steps).float().mean(0).cpu()
