"""Compare what a run has learned with the heuristics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from orderppl.cli.hints import any_class

RANKINGS = ["random", "left_to_right", "top_prob", "entropy"]
HEURISTICS: list[dict[str, Any]] = [
    {"policy": "Ranked", "score": RANKINGS, "sizes": ["uniform", "cosine"]},
    {"policy": "Oracle", "sizes": ["uniform", "cosine"]},
    {"policy": "Threshold", "tau": 0.9},
]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Compare what a run has learned with the heuristics on held-out rows, at the run's number of steps.

        orderppl evaluate runs/chain
        orderppl evaluate runs/gsm8k --split validation --rows 200 --mode false
        orderppl evaluate runs/priced --policy AtPrice --policy.price 0.1
        orderppl evaluate runs/mine --heuristics '[{policy: my_module.MyPolicy, tau: [0.5, 0.9]}]'

    Every arm reveals the true tokens in its own order (`path_nats`, nats per token, lower is better; with several seeds
    also `marginal_nats`, over the orders that it draws). Rows with answers are also decoded and graded (`accuracy`),
    exact denoisers tell the gap to the log evidence (`gap_nats`, per row). RUN/results/evaluate then has table.csv, one
    line per arm and row, and results.json, the means.

    Args:
        run: run folder, or folder or hub name of a shared order.
        split: rows to use.
        rows: how many of them, from the first; all when left out.
        policy: a wrapper of the learned policy, such as AtPrice; none when left out.
        mode: the learned policy plays the most probable sets; false: it draws them.
        heuristics: grids of policies without parameters, see `orderppl.evaluation.sweep`.
        seeds: times that arms with random sets are played.
        temperature: of decoded tokens; 0 takes the most likely.
        data: other data than the run's.
        denoiser: another denoiser than the run's.
        batch_size: rows played together.
        out: folder of the files; RUN/results/evaluate (-SPLIT-ROWS) when left out.
        device: such as cpu or cuda:0.
    """

    run: str
    split: Literal["train", "validation", "test"] = "test"
    rows: int | None = None
    policy: any_class("orderppl.policies.Policy") | None = None  # type: ignore[valid-type]
    mode: bool = True
    heuristics: list[dict[str, Any]] = field(default_factory=lambda: [dict(spec) for spec in HEURISTICS])
    seeds: int = 1
    temperature: float = 0.0
    data: any_class("orderppl.data.DataSet") | None = None  # type: ignore[valid-type]
    denoiser: any_class("orderppl.unmasking.Denoiser") | None = None  # type: ignore[valid-type]
    batch_size: int = 64
    out: str | None = None
    device: str = "cpu"
    POSITIONAL = "run"


def run(config: Config) -> None:
    """Load the run, play every arm, and print one line per arm."""
    from dataclasses import asdict
    from pathlib import Path

    from orderppl.cli.assemble import check_device
    from orderppl.cli.held_out import known_of, log_evidence, open_run, read_examples
    from orderppl.cli.tables import show, write_csv, write_table
    from orderppl.evaluation import Arm, summary, sweep
    from orderppl.evaluation.engine import evaluate
    from orderppl.policies import FixedOrder

    check_device(config.device)
    loaded = open_run(config.run, config.denoiser, config.device, policy=config.policy, needs_order=True)
    examples = read_examples(loaded, config.data, config.split, config.rows)
    seeds = range(config.seeds)
    learned = Arm("learned", loaded.policy, loaded.num_steps, mode=config.mode, seeds=seeds, training_seed=0)
    specs = [{"budgets": loaded.num_steps, **spec} for spec in config.heuristics]
    arms = [learned, *sweep(specs, known=known_of(examples), seeds=seeds)]
    evidence = log_evidence(loaded.denoiser, examples)
    if evidence is not None:
        order, _ = loaded.denoiser.best_order(loaded.num_steps)
        arms.append(Arm("best fixed order", FixedOrder(order.tolist()), loaded.num_steps))
    if hasattr(loaded.denoiser, "best_policy"):
        arms.append(Arm("best policy", loaded.denoiser.best_policy(loaded.num_steps)[0], loaded.num_steps))
    metrics = ["path_nats", "marginal_nats"] if config.seeds > 1 else ["path_nats"]
    metrics += ["accuracy"] if examples.answers is not None else []
    which = [word for word in (config.split, config.rows) if word not in ("test", None)]
    out = Path(config.out or Path(config.run) / "results" / "-".join(["evaluate", *map(str, which)]))
    table = evaluate(
        arms, loaded.denoiser, examples, metrics=metrics, batch_size=config.batch_size, device=config.device, out=out
    )
    if evidence is not None:
        metrics.append("gap_nats")
        table["gap_nats"] = evidence.numpy()[table["row"]] + table["nats"]
    found = summary(table, metrics)
    write_csv(out / "table.csv", table)
    write_table(out, "evaluate", found, asdict(config))
    title = f"{loaded.name}: {len(examples)} rows of the {config.split} split, {loaded.num_steps} steps"
    show(found.sort_values(["metric", "value"]), ("metric", "arm", "value", "low", "high", "nfe"), title)
    if not any(True for _ in loaded.policy.parameters()):
        kind = type(loaded.policy).__name__
        print(f"note: {kind}, which decodes, has learned nothing: the guide of this run sees the tokens")
    print(f"files: {out}")
