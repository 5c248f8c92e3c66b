"""What `orderppl frontier` does: arms of runs and heuristics on the same rows, and who is better at equal forwards."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import pandas as pd

from orderppl.cli.assemble import Known, check_device, make_data, make_denoiser
from orderppl.cli.frontier import Config
from orderppl.cli.held_out import known_of, open_run, read_examples
from orderppl.cli.tables import show, write_csv, write_table
from orderppl.config import Builder
from orderppl.data.dataset import Examples
from orderppl.errors import UserError
from orderppl.evaluation import Arm, advantages, frontier_figure, summary, sweep
from orderppl.evaluation.arms import standard_heuristics
from orderppl.evaluation.curves import aup
from orderppl.evaluation.engine import decoding_seconds, evaluate
from orderppl.evaluation.table import metrics_of, pass_at_k
from orderppl.figures import save_figure
from orderppl.identity import identity_of
from orderppl.policies import Blocks, EndStop, PriceRange
from orderppl.runs import Run

PRICES = 7  # of a policy that was learned for a range of them


def compare(config: Config) -> None:
    """Play every arm on every row that is not played yet; with all there, compare and show."""
    check_device(config.device)
    runs, denoiser, examples, validation = _open(config)
    known, seeds = known_of(examples), range(config.seeds)
    specs = standard_heuristics() if config.heuristics is None else config.heuristics
    arms = [*learned_arms(runs, config, denoiser), *sweep(specs, known=known, seeds=seeds)]
    out = Path(config.out)
    tables: dict[str, Any] = {config.split: _play(arms, denoiser, examples, config, out)}
    if validation is not None:
        tables["chosen on"] = _play(arms, denoiser, validation, config, out / "validation")
    if config.samples:
        sampled = [_sampled(arm, config) for arm in arms if arm.kind != "oracle"]
        tables["sampled"] = _play(sampled, denoiser, examples, config, out / "sampled", ("accuracy",))
    if _has_stop(config, examples):
        stopped = [_stopped(arm, examples) for arm in arms if arm.kind != "oracle"]
        tables["stopped"] = _play(stopped, denoiser, examples, config, out / "stopped", ("accuracy",))
    missing = sum(int(table.attrs["missing"]) for table in tables.values())
    if missing:
        print(f"{missing} parts are left to other processes; the last one, or the command without --shard, compares")
        return
    rounds = config.timed_rounds
    seconds = decoding_seconds(arms, denoiser, examples, rounds=rounds) if rounds > 0 else None
    report(config, tables, out, seconds)


def _open(config: Config) -> tuple[list[Run], Any, Examples, Examples | None]:
    """Runs, the denoiser of the comparison, its rows, and those on which heuristics are chosen."""
    runs = [open_run(name, config.denoiser, config.device) for name in config.runs]
    if runs:
        first, runs = runs[0], [loaded for loaded in runs if loaded.policy is not None]  # a denoiser alone: heuristics
    elif config.data is None or config.denoiser is None:
        raise UserError("runs", "there are none", "give run folders, or --data and --denoiser for heuristics alone")
    else:
        builder = Builder(Known())
        data = make_data(builder, config.data)
        first = Run(Path(), "policy", {}, {}, denoiser=make_denoiser(builder, config.denoiser, data))
    first.denoiser.to(config.device)
    examples = read_examples(first, config.data, config.split, config.rows)
    validation = read_examples(first, config.data, "validation") if config.choose_on_validation else None
    return runs, first.denoiser, examples, validation


def learned_arms(runs: Sequence[Run], config: Config, denoiser: Any) -> list[Arm]:
    """The arms of all runs; those that differ in their seed alone are training seeds of one family."""
    groups: dict[str, list[Run]] = {}
    for loaded in runs:
        fit = {**loaded.config.get("fit", {}), "seed": None}
        groups.setdefault(json.dumps({**loaded.config, "fit": fit}, sort_keys=True, default=str), []).append(loaded)
    arms, taken = list[Arm](), set[str]()
    for members in groups.values():
        name, common = members[0].name, re.sub(r"[-_]?\d+$", "", members[0].name)
        if len(members) > 1 and common and common not in taken:  # `learned` of `learned-0` and its other seeds
            name = common
        taken.add(name)
        for number, loaded in enumerate(members):
            own = loaded.denoiser if identity_of(loaded.denoiser) != identity_of(denoiser) else None
            if own is not None and not loaded.config.get("fit", {}).get("train_denoiser"):
                raise UserError("runs", f"{loaded.name} was learned for another denoiser", "compare it on its own")
            prices = getattr(loaded.model, "step_price", None)
            specs = config.learned
            if not specs and isinstance(prices, PriceRange):
                specs = [{"policy": "AtPrice", "price": prices.grid(PRICES)}]
            seeds = range(config.seeds) if not config.mode else (0,)
            options: dict[str, Any] = {"family": name, "training_seed": number}
            budgets = config.budgets or [loaded.num_steps]
            if specs:
                grid = [{"mode": config.mode, "budgets": budgets, **spec} for spec in specs]
                found = sweep(grid, known={"policy": loaded.policy}, seeds=seeds, **options)
            else:
                mark = f" #{number}" if len(members) > 1 else ""
                found = [
                    Arm(f"{name}{mark} T={steps}", loaded.policy, steps, mode=config.mode, seeds=seeds, **options)
                    for steps in budgets
                ]
            arms += [_with(arm, denoiser=own) for arm in found]
    return arms


def _with(arm: Arm, **changes: Any) -> Arm:
    return replace(arm, **changes)


def _sampled(arm: Arm, config: Config) -> Arm:
    return _with(arm, temperature=config.temperature, seeds=range(config.samples))


def _metrics(config: Config, examples: Examples) -> Sequence[str]:
    """What is measured: what was asked for, or what the rows allow."""
    return config.metrics or (("path_nats", "accuracy") if examples.answers is not None else ("path_nats",))


def _has_stop(config: Config, examples: Examples) -> bool:
    """Whether arms are decoded once more, with the stop at the end token."""
    decoded = "accuracy" in _metrics(config, examples)
    if config.end_stop and not (decoded and examples.end_index is not None):
        raise UserError("end_stop", "nothing is decoded up to an end token", "leave it out")
    return decoded and (examples.is_filled_up if config.end_stop is None else config.end_stop)


def _stopped(arm: Arm, examples: Examples) -> Arm:
    """The same arm, which stops: around its blocks, so that it does not go through those behind the end."""
    policy = arm.policy if arm.block_size is None else Blocks(arm.policy, arm.block_size)
    return _with(arm, policy=EndStop(policy, [cast(int, examples.end_index)]), block_size=None)


def _play(
    arms: Sequence[Arm],
    denoiser: Any,
    examples: Examples,
    config: Config,
    out: Path,
    metrics: Sequence[str] | None = None,
) -> pd.DataFrame:
    return evaluate(
        arms,
        denoiser,
        examples,
        metrics=metrics or _metrics(config, examples),
        batch_size=config.batch_size,
        out=out,
        shard=_share(config.shard),
        device=config.device,
    )


def _share(shard: str | None) -> tuple[int, int]:
    """(i, n) of `--shard i+1/n`, or of a process that a launcher has started."""
    if shard is None:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    place, _, count = shard.partition("/")
    if not (place.isdecimal() and count.isdecimal() and 1 <= int(place) <= int(count)):
        raise UserError("shard", f"{shard!r} is no share", "write 1/4 to 4/4")
    return int(place) - 1, int(count)


def report(config: Config, tables: dict[str, pd.DataFrame], out: Path, seconds: pd.DataFrame | None = None) -> None:
    """Write and show what was found; `seconds` of `decoding_seconds`."""
    table = tables[config.split]
    metrics = config.metrics or metrics_of(table)
    means = summary(table, [*metrics, "nfe"])
    gains = advantages(table, config.targets, metrics, validation=tables.get("chosen on"))
    if config.mixtures:
        mixed = advantages(table, config.targets, metrics, validation=tables.get("chosen on"), mixed=True)
        gains = pd.concat([gains, mixed], ignore_index=True)
    areas = [aup(table)] if "accuracy" in metrics else []
    costs = [] if seconds is None else [seconds]
    if "stopped" in tables:
        stopped = summary(tables["stopped"], ["accuracy", "nfe"])
        stopped = stopped[["metric", "value", "low", "high", "arm", "n"]]  # its means say what it is
        costs.insert(0, stopped.assign(metric=stopped["metric"] + "_stopped"))
    passes = [pass_at_k(tables["sampled"], config.k)] if "sampled" in tables else []
    write_csv(out / "table.csv", table)
    records = pd.concat([means, gains, *areas, *costs, *passes], ignore_index=True)
    write_table(out, "frontier", records, asdict(config))
    save_figure(frontier_figure(table, metrics, seconds=seconds), out / "frontier.svg")
    for lines, title, columns in _shown(means, gains, passes):
        show(lines, columns, title)
    for lines in areas:
        show(lines, ("arm", "points", "value", "low", "high"), "AUP: area under accuracy against tokens per forward")
    if costs:
        show(_costs([means, *costs]), title="what decoding costs: forwards, and seconds per row")
    print(f"files: {out}")


def _costs(found: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """A line per arm that decodes: how good it is, and everything that it costs, side by side."""
    records = pd.concat(found)
    wide = records.pivot(index="arm", columns="metric", values="value")[list(dict.fromkeys(records["metric"]))]
    return wide.dropna().sort_values("nfe").reset_index()


def _shown(means: Any, gains: Any, passes: Sequence[Any]) -> Iterator[tuple[Any, str, tuple[str, ...]]]:
    for metric in dict.fromkeys(means["metric"]):
        if metric != "nfe":
            lines = means[means["metric"] == metric].sort_values("nfe")
            yield lines, metric, ("arm", "nfe", "value", "low", "high")
    if len(gains) and (gains["metric"] == "advantage").any():
        lines = gains[gains["metric"] == "advantage"]
        columns = ("arm", "measured", "nfe", "own", "frontier", "value", "low", "high", "of")
        yield lines, "advantage over the best heuristic at equal forwards; positive is better", columns
    for table in passes:
        yield table, "pass@k", ("arm", "k", "value", "low", "high")
