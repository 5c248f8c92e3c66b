"""Fit a guide and a reveal prior to a denoiser.

    orderppl fit-order --config chain --out runs/chain-order
    orderppl fit-order --config chain --out runs/chain-order --resume        # after an interruption
    orderppl fit-order --config chain --set prior=cosine_steps --set guide.network=transformer
    torchrun --nproc_per_node 2 -m orderppl.experiments.cli fit-order --config chain --out runs/chain-order

The run folder holds order.safetensors (what was learned), order.yaml (what rebuilds its objects), log.jsonl (every
update), checkpoints, config.yaml and results.json, and warm-start/ the log and checkpoints of a warm start
(`--set fit.warm_start.policy=threshold`); `orderppl evaluate --run` compares the learned policy with the heuristics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from orderppl.errors import UserError
from orderppl.evaluation import evaluate_policies
from orderppl.experiments.build import (
    OrderConfig,
    OrderProblem,
    RefineConfig,
    WarmStartConfig,
    autocast_dtype,
    build_imitation,
    build_optimizer,
    build_problem,
    build_schedule,
    compiling,
    learned_policy,
    loop_options,
    piece_size,
)
from orderppl.experiments.config import dump_config
from orderppl.experiments.results import Record, results_table
from orderppl.inference import RevealTraceGraph_ELBO
from orderppl.inference.batches import BatchStream
from orderppl.inference.checkpoints import save_weights, write_text
from orderppl.inference.fit import OrderLoss, fit
from orderppl.inference.processes import Processes
from orderppl.inference.refine import Refinement, refine_plan
from orderppl.models.networks import PositionTable
from orderppl.models.plans import OpeningPlan

CONFIG = "chain"
DISTRIBUTED = True
ORDER_FILE, ORDER_SETTINGS, LOG_FILE = "order.safetensors", "order.yaml", "log.jsonl"
WARM_START = "warm-start"  # folder of a warm start inside that of its run
METRICS = {"elbo": "elbo", "log_likelihood": "log_likelihood", "kl": "kl", "steps": "mean_steps"}  # ours: reported as


class Config(OrderConfig):
    """Settings of fit-order."""


def run(config: Config, out: Path, resume: bool = False) -> Iterable[Record]:
    """Fit, save what was learned, and measure it on the test split."""
    problem = build_problem(config)
    fit_problem(config, problem, out, resume=resume)
    if not Processes.join(config.device).is_first:
        return []
    save_order(config, problem, out)
    test = _read_only(config, problem, "test")
    labels = {"task": problem.task.name, "steps": config.num_steps, "seed": config.seed, "split": "test"}
    bound = held_out_bound(problem, test, final_kl_weight(config))
    records: list[Record] = [
        {"metric": name, "value": value, "n": test.num_sequences, **labels} for name, value in bound().items()
    ]
    records += evaluate_policies(
        problem.model.denoiser,
        {"learned": learned_policy(problem)},
        list(test.once()),
        config.num_steps,
        seed=config.seed,
        labels={"task": problem.task.name, "split": "test"},
    )
    Console().print(results_table(records, rows=("task", "steps"), title="Test split, nats (path_nats per token)"))
    return records


def fit_problem(config: OrderConfig, problem: OrderProblem, out: Path, resume: bool = False) -> Refinement | None:
    """Run the fit that a config describes, with its log and checkpoints in `out`; what it learned is not saved yet.

    Returns:
        What the local search after the fit did, where the config asks for one.
    """
    settings = config.fit
    problem.model.to(config.device)
    problem.guide.to(config.device)
    held_out = _read_only(config, problem, "validation")
    validate = held_out_bound(problem, held_out, final_kl_weight(config))
    refinement = None
    if config.refine is not None and config.refine.first:
        refinement = refine_problem(config.refine, problem, config.seed)
    with compiling(problem.denoiser, settings):
        if settings.warm_start is not None:
            imitate_teacher(config, settings.warm_start, problem, out / WARM_START, resume)
        climb_bound(config, problem, validate, out, resume)
    if config.refine is not None and not config.refine.first:
        refinement = refine_problem(config.refine, problem, config.seed)
    return refinement


def climb_bound(
    config: OrderConfig, problem: OrderProblem, validate: Callable[[], dict[str, float]], out: Path, resume: bool
) -> None:
    """Maximise the objective; the arguments as of `fit_problem`, and what measures the bound on held-out data."""
    settings = config.fit
    fit(
        problem.model,
        problem.guide,
        problem.task.stream("train", settings.batch_size, seed=config.seed, group=settings.group),
        elbo=problem.elbo,
        kl_weight=settings.kl_weight,
        temperature=settings.temperature,
        step_price=settings.step_price,
        updates=settings.updates,
        optimizer=build_optimizer(config.optimizer),
        scheduler=build_schedule(config.optimizer, settings.updates),
        grad_clip=settings.grad_clip,
        validate=None if settings.validate_every is None else validate,
        validate_every=settings.validate_every,
        patience=settings.patience,
        monitor="objective",
        monitor_mode="max",
        ema_decay=settings.ema_decay,
        device=config.device,
        autocast_dtype=autocast_dtype(config),
        out=out,
        resume=resume,
        **loop_options(settings),
    )


def _read_only(config: OrderConfig, problem: OrderProblem, split: str) -> BatchStream:
    rows = piece_size(config.fit, config.fit.batch_size)
    return problem.task.stream(split, rows, shuffle=False, device=config.device)


def imitate_teacher(
    config: OrderConfig, settings: WarmStartConfig, problem: OrderProblem, out: Path, resume: bool = False
) -> None:
    """Learn what a decoding policy reveals, with log and checkpoints in `out`; the denoiser stays as it is."""
    problem.denoiser.requires_grad_(False)
    fit(
        problem.model,
        problem.guide,
        problem.task.stream("train", config.fit.batch_size, seed=config.seed, group=config.fit.group),
        elbo=build_imitation(settings, problem),
        updates=settings.updates,
        optimizer=build_optimizer(config.optimizer),
        scheduler=build_schedule(config.optimizer, settings.updates),
        grad_clip=config.fit.grad_clip,
        device=config.device,
        autocast_dtype=autocast_dtype(config),
        out=out,
        resume=resume,
        description="imitation",
        **loop_options(config.fit),
    )
    problem.denoiser.requires_grad_(not config.freeze_denoiser)


def refine_problem(config: RefineConfig, problem: OrderProblem, seed: int) -> Refinement:
    """Search on from a plan, on training rows, and make the result the plan."""
    table = plan_table(problem)
    if config.start == "alternating":
        start = alternating_steps(table.length, problem.model.num_steps)
    else:
        start = table.logits.argmax(-1)
    refinement = search_plan(config, problem, start, seed)
    table.set_steps(refinement.steps, config.margin)
    return refinement


def alternating_steps(length: int, num_steps: int) -> Tensor:
    """A plan without neighbours in a set, but for the last one: int64 [length], such as 0 3 1 3 2 3 for 4 steps."""
    place, last = torch.arange(length), num_steps - 1
    return torch.where(place % 2 == 0, place // 2 % max(last, 1), last).clamp(max=last)


def plan_table(problem: OrderProblem) -> PositionTable:
    """The table of a plan, or the pattern that a plan with a correction begins as."""
    network = problem.guide.network
    table = network.pattern if isinstance(network, OpeningPlan) else network
    assert isinstance(table, PositionTable)
    return table


def search_plan(config: RefineConfig, problem: OrderProblem, start: Tensor, seed: int) -> Refinement:
    """Search for a better plan than `start` (int64 [P]), on training rows; see `refine_plan`."""
    table = plan_table(problem)
    rows = short_rows(problem.task.held("train"), config.longest, config.rows)
    batch = {name: held.to(table.logits.device) for name, held in rows.items()}
    return refine_plan(
        problem.model.denoiser,
        batch,
        start,
        problem.model.num_steps,
        index=table.index(batch["attention_mask"]),
        kicks=config.kicks,
        screen=config.screen,
        block=config.block,
        max_evaluations=config.max_evaluations,
        seed=seed,
    )


def short_rows(held: Mapping[str, Tensor], longest: int | None, rows: int) -> dict[str, Tensor]:
    """The first `rows` sequences of at most `longest` tokens, without columns that are padding in all of them.

    Raises:
        UserError: there are none.
    """
    masks = [held[name].bool() for name in ("attention_mask", "context_mask") if name in held]
    size = torch.stack([mask.sum(-1) for mask in masks]).sum(0)
    kept = (size <= (size.max() if longest is None else longest)).nonzero()[:rows, 0]
    if not len(kept):
        raise UserError("refine.longest", f"no training sequence has at most {longest} tokens", "give a larger number")
    part = {name: tensor[kept] for name, tensor in held.items()}
    for tokens, name in (("tokens", "attention_mask"), ("context", "context_mask")):
        if name in part:
            used = part[name].bool().any(0)
            part |= {tokens: part[tokens][:, used], name: part[name][:, used]}
    return part


def save_order(config: OrderConfig, problem: OrderProblem, folder: Path) -> None:
    """Keep a learned order where `load_order` finds it: its weights, and the settings that rebuild their objects.

    Args:
        config: of the fit; a subclass's own settings are left out, `task` and `seed` must be those of the data.
        problem: the fitted objects.
        folder: where the two files go.
    """
    settings = OrderConfig(**{item.name: getattr(config, item.name) for item in fields(OrderConfig)})
    save_weights(learned_modules(problem), folder / ORDER_FILE)
    write_text(folder / ORDER_SETTINGS, dump_config(settings))


def learned_modules(problem: OrderProblem) -> nn.ModuleDict:
    """What a fit may have changed: the prior, the network of the guide, a denoiser that is not frozen."""
    modules = nn.ModuleDict({"prior": problem.model.prior})
    network = getattr(problem.guide, "network", None)
    if network is not None:
        modules["guide"] = nn.ModuleDict({"network": network})
    if any(parameter.requires_grad for parameter in problem.denoiser.parameters()):
        modules["denoiser"] = problem.denoiser
    return modules


def final_kl_weight(config: OrderConfig) -> float:
    """Weight of the KL in the objective that a fit ends with."""
    if config.fit.kl_weight is not None:
        return config.fit.kl_weight.end
    return float(getattr(config.elbo, "kl_weight", 1.0))


def held_out_bound(problem: OrderProblem, stream: BatchStream, kl_weight: float) -> Callable[[], dict[str, float]]:
    """What measures the bound on a split: always the plain one, so that fits of different objectives can be compared.

    Returns:
        Means per sequence: `elbo`, `log_likelihood` and `kl` in nats, `mean_steps`, and `objective`, the log-likelihood
        minus `kl_weight` times the KL, which compares the updates of a fit whatever weight is being annealed.
    """
    loss = OrderLoss(problem.model, problem.guide, RevealTraceGraph_ELBO(problem.elbo.num_particles))

    def batches() -> Iterator[tuple[int, dict[str, float]]]:
        for batch in stream.once():
            loss(**batch)
            yield len(batch["tokens"]), {name: float(loss.metrics[own]) for own, name in METRICS.items()}

    def measure() -> dict[str, float]:
        with torch.no_grad():
            parts = list(batches())
        total = sum(size for size, _ in parts)
        means = {name: sum(size * numbers[name] for size, numbers in parts) / total for name in METRICS.values()}
        return {"objective": means["log_likelihood"] - kl_weight * means["kl"], **means}

    return measure
