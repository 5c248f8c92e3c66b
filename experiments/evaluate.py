"""Compare the policy of a fitted run with the heuristics on held-out data.

    orderppl evaluate --run runs/chain-order --out runs/chain-comparison
    orderppl evaluate --run runs/gsm8k-order --decision sample

Every arm reveals the true tokens in its own order (`path_nats`, nats per token, lower is better) with the step budget
of the run; text tasks are also decoded and scored by exact match, exact tasks by their gap to the log evidence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor

from orderppl.decoding import PlannedOrder, Policy, make_policy
from orderppl.denoising import Denoiser
from orderppl.errors import UserError
from orderppl.evaluation import bootstrap_mean, evaluate_policies, path_likelihood
from orderppl.experiments.build import OrderConfig, OrderProblem, Task, build_problem, learned_policy
from orderppl.experiments.config import RunConfig, load_config, setting
from orderppl.experiments.fit_order import ORDER_FILE, ORDER_SETTINGS, learned_modules
from orderppl.experiments.results import Record, results_table
from orderppl.inference.checkpoints import load_weights
from orderppl.models.denoisers import ExactDenoiser, MarkovChainDenoiser


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of evaluate."""

    run: str = setting("runs/fit-order", "folder with an order.safetensors", file=True, option="--run")
    split: Literal["train", "validation", "test"] = setting("test", "rows to use", option="--split")
    decision: Literal["mode", "sample", "rank"] = setting(
        "mode", "how the learned probabilities become reveal sets: mode, sample or (plans) rank", option="--decision"
    )
    sizes: tuple[str, ...] = setting(("uniform", "cosine"), "set sizes of the heuristics with fixed sizes")
    threshold: float = setting(0.9, "confidence of the threshold policy", above=0, below=1)
    draws: int = setting(1, "times that arms with random sets are played; a row has the mean over them", at_least=1)
    batch_size: int = setting(100, "rows decoded together", at_least=1)


def run(config: Config, out: Path) -> Iterable[Record]:
    """Load the run, follow every arm, and print one line per arm."""
    fitted, problem = load_order(config.run, config.device)
    task, num_steps = problem.task, fitted.num_steps
    batches = list(task.stream(config.split, config.batch_size, shuffle=False, device=config.device).once())
    policies: dict[str, Policy] = {"learned": learned_policy(problem, config.decision)}
    policies |= heuristics(config.sizes, config.threshold)
    labels = {"task": task.name, "split": config.split}
    records: list[Record] = []
    if task.tokenizer is not None and task.references:
        playable = {arm: policy for arm, policy in policies.items() if not getattr(policy, "needs_truth", False)}
        records += evaluate_policies(
            problem.model.denoiser,
            playable,
            batches,
            num_steps,
            metrics=("accuracy",),
            decode_text=task.tokenizer.decode,
            references=task.references[config.split],
            grade=task.grade,
            seed=config.seed,
            draws=config.draws,
            labels=labels,
        )
    if isinstance(problem.denoiser, ExactDenoiser):
        optima, expected = best_arms(problem.denoiser, num_steps)
        policies |= optima
        records += [{**record, **labels} for record in expected]
        records += chain_gaps(problem.denoiser, policies, batches, num_steps, seed=config.seed, labels=labels)
    records += evaluate_policies(
        problem.model.denoiser,
        policies,
        batches,
        num_steps,
        seed=config.seed,
        draws=config.draws,
        baseline="learned",
        labels=labels,
    )
    shown = [record for record in records if not str(record["metric"]).endswith("_difference")]
    Console().print(results_table(shown, title=f"{task.name}, {config.split} split, {num_steps} steps"))
    return records


def load_settings(folder: str | Path) -> OrderConfig:
    """Settings of the order that `save_order` kept in a folder.

    Raises:
        UserError: the folder holds no learned order, or settings of another version.
    """
    if not (Path(folder) / ORDER_FILE).is_file():
        raise UserError("run", f"{folder} holds no {ORDER_FILE}", "run fit-order there to the end first")
    settings = Path(folder) / ORDER_SETTINGS
    if not settings.is_file():  # runs of fit-order from before there was such a file
        settings = Path(folder) / "config.yaml"
    if not settings.is_file():
        raise UserError("run", f"{folder} holds no {ORDER_SETTINGS}", "run its experiment again with this version")
    try:
        return load_config(OrderConfig, settings)
    except UserError as error:
        raise UserError(str(settings), f"{error.field}: {error.problem}", error.remedy) from error


def load_order(folder: str | Path, device: str = "cpu", task: Task | None = None) -> tuple[OrderConfig, OrderProblem]:
    """Rebuild the objects of a learned order and load its weights.

    Args:
        folder: where `save_order` put it: a fit-order or antibodies run, a seed of a chain run, an arm of a gsm8k run.
        device: where the programs go.
        task: its data, when they are already there.

    Raises:
        UserError: the folder holds no learned order, or one of another architecture.
    """
    config = load_settings(folder)
    problem = build_problem(config, task)
    load_weights(learned_modules(problem), Path(folder) / ORDER_FILE)
    problem.model.to(device)
    problem.guide.to(device)
    return config, problem


def heuristics(sizes: Sequence[str] = ("uniform", "cosine"), threshold: float = 0.9) -> dict[str, Policy]:
    """The arms that nothing is learned for; the oracle ranks positions by the probability of the true token."""
    named: dict[str, Policy] = {
        f"{name} {size}": make_policy(name, sizes=size)
        for name in ("random", "left_to_right", "top_prob", "entropy", "greedy_oracle")
        for size in sizes
    }
    return named | {f"threshold {threshold:g}": make_policy("threshold", tau=threshold)}


def best_arms(denoiser: ExactDenoiser, num_steps: int) -> tuple[dict[str, Policy], list[Record]]:
    """What dynamic programming finds: the best fixed order and, on a chain, the best policy; no data are needed.

    Returns:
        The arms, and the exact expectation of their gap: `expected_gap_nats`, nats per sequence.
    """
    order, gap = denoiser.best_order(num_steps)
    arms: dict[str, Policy] = {"best fixed order": PlannedOrder(order)}
    gaps = {"best fixed order": gap}
    if isinstance(denoiser, MarkovChainDenoiser):
        arms["best policy"], gaps["best policy"] = denoiser.best_policy(num_steps)
    return arms, [
        {"metric": "expected_gap_nats", "value": gap, "arm": arm, "steps": num_steps} for arm, gap in gaps.items()
    ]


def chain_gaps(
    denoiser: ExactDenoiser,
    policies: Mapping[str, Policy],
    batches: Sequence[Mapping[str, Tensor]],
    num_steps: int,
    seed: int = 0,
    labels: Mapping[str, str | int | float] | None = None,
) -> list[Record]:
    """`gap_nats` of every arm: log evidence minus path log-likelihood, nats per sequence; 0 is perfect."""
    records: list[Record] = []
    reader: Denoiser = denoiser
    for arm, policy in policies.items():
        path = path_likelihood(reader, policy, batches, num_steps, seed=seed)
        evidence = [denoiser.log_evidence(batch["tokens"], batch["attention_mask"]).cpu() for batch in batches]
        gap = path.nats.double() + torch.cat(evidence)
        interval = bootstrap_mean(gap, seed=seed)
        record = {"metric": "gap_nats", "value": interval.value, "low": interval.low, "high": interval.high}
        records.append({**record, "arm": arm, "steps": num_steps, "n": len(gap), "seed": seed, **(labels or {})})
    return records
