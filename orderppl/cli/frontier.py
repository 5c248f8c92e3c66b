"""Learned orders against every heuristic at equal numbers of forwards."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from orderppl.cli.hints import any_class
from orderppl.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from orderppl.data.dataset import Examples
    from orderppl.evaluation import Arm
    from orderppl.runs import Run

PRICES = 7  # of a policy that was learned for a range of them


@dataclass(frozen=True, kw_only=True)
class Config:
    r"""Learned orders against every heuristic at equal numbers of denoiser forwards.

        orderppl frontier runs/order-0 runs/order-1 --split validation --out runs/frontier
        orderppl frontier runs/mine --heuristics '[{policy: Threshold, tau: [0.5, 0.7, 0.9]}]' --rows 200
        orderppl frontier --data JsonLines --data.test rows.jsonl --denoiser load_denoiser \
            --denoiser.name_or_path bert-base-uncased            # heuristics alone
        torchrun --nproc_per_node 2 -m orderppl.cli.main frontier runs/mine

    Each learned order is compared with the best heuristic interpolated at the same mean number of forwards
    (`advantage`, positive is better), paired over rows, the choice of the best heuristic included. Tune on
    --split validation; look at the test rows once. Runs that differ in their seed alone are training seeds of one
    order. Finished parts are kept in the folder: repeat the command after a kill, or with more arms, and it goes on.
    The folder then has table.csv (one line per arm and row), results.json (means, advantages) and frontier.png.

    Args:
        runs: run folders, or folders or hub names of shared orders; that of a denoiser for heuristics alone.
        split: rows to use.
        rows: how many of them, from the first; all when left out.
        choose_on_validation: choose the best heuristic at every number of forwards on the validation split.
        heuristics: grids of policies, see `orderppl.evaluation.sweep`; every heuristic there is when left out.
        learned: grids of wrappers around the learned policies, such as {policy: Eager, factor: [1.5, 2]}.
        budgets: step budgets of the learned policies; that of the run when left out.
        mode: the learned policies play their most probable sets; false: they draw them.
        metrics: accuracy of decoded answers, path_nats; what the rows allow when left out.
        seeds: times that arms with random sets are played.
        targets: mean numbers of forwards at which curves are compared.
        samples: times that tokens are sampled for pass@k; 0: not at all.
        temperature: of sampled tokens.
        k: of pass@k.
        data: other data than those of the first run.
        denoiser: another denoiser than that of the first run.
        batch_size: rows played together.
        shard: this process's share of the work, 1/4 to 4/4; all when left out.
        out: folder of the files.
        device: such as cpu or cuda:0.
    """

    runs: list[str] = field(default_factory=list)
    split: Literal["train", "validation", "test"] = "test"
    rows: int | None = None
    choose_on_validation: bool = False
    heuristics: list[dict[str, Any]] | None = None
    learned: list[dict[str, Any]] = field(default_factory=list)
    budgets: list[int] = field(default_factory=list)
    mode: bool = True
    metrics: list[Literal["accuracy", "path_nats"]] | None = None
    seeds: int = 3
    targets: list[float] = field(default_factory=lambda: [2.0, 2.5, 3.0, 4.0])
    samples: int = 0
    temperature: float = 1.0
    k: list[int] = field(default_factory=lambda: [1, 4])
    data: any_class("orderppl.data.DataSet") | None = None  # type: ignore[valid-type]
    denoiser: any_class("orderppl.unmasking.Denoiser") | None = None  # type: ignore[valid-type]
    batch_size: int = 256
    shard: str | None = None
    out: str = "runs/frontier"
    device: str = "cpu"
    POSITIONAL = "runs"


def run(config: Config) -> None:
    """Play every arm on every row that is not played yet; with all there, compare and show."""
    from orderppl.cli.assemble import check_device
    from orderppl.cli.held_out import known_of
    from orderppl.evaluation import standard_heuristics, sweep

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
    missing = sum(int(table.attrs["missing"]) for table in tables.values())
    if missing:
        print(f"{missing} parts are left to other processes; the last one, or the command without --shard, compares")
        return
    report(config, tables, out)


def _open(config: Config) -> tuple[list[Run], Any, Examples, Examples | None]:
    """Runs, the denoiser of the comparison, its rows, and those on which heuristics are chosen."""
    from orderppl.cli.assemble import Known, make_data, make_denoiser
    from orderppl.cli.held_out import open_run, read_examples
    from orderppl.config import Builder
    from orderppl.runs import Run

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
    from orderppl.evaluation import Arm, sweep
    from orderppl.identity import identity_of
    from orderppl.policies import PriceRange

    groups: dict[str, list[Run]] = {}
    for loaded in runs:
        fit = {**loaded.config.get("fit", {}), "seed": None}
        groups.setdefault(json.dumps({**loaded.config, "fit": fit}, sort_keys=True, default=str), []).append(loaded)
    arms = []
    for members in groups.values():
        for number, loaded in enumerate(members):
            own = loaded.denoiser if identity_of(loaded.denoiser) != identity_of(denoiser) else None
            if own is not None and not loaded.config.get("fit", {}).get("train_denoiser"):
                raise UserError("runs", f"{loaded.name} was learned for another denoiser", "compare it on its own")
            prices = getattr(loaded.model, "step_price", None)
            specs = config.learned
            if not specs and isinstance(prices, PriceRange):
                ratio = prices.high / prices.low
                specs = [
                    {"policy": "AtPrice", "price": [prices.low * ratio ** (i / (PRICES - 1)) for i in range(PRICES)]}
                ]
            seeds = range(config.seeds) if not config.mode else (0,)
            options: dict[str, Any] = {"family": members[0].name, "training_seed": number}
            budgets = config.budgets or [loaded.num_steps]
            if specs:
                grid = [{"mode": config.mode, "budgets": budgets, **spec} for spec in specs]
                found = sweep(grid, known={"policy": loaded.policy}, seeds=seeds, **options)
            else:
                name = f"{members[0].name} #{number}" if len(members) > 1 else members[0].name
                found = [
                    Arm(f"{name} T={steps}", loaded.policy, steps, mode=config.mode, seeds=seeds, **options)
                    for steps in budgets
                ]
            arms += [_with(arm, denoiser=own) for arm in found]
    return arms


def _with(arm: Arm, **changes: Any) -> Arm:
    from dataclasses import replace

    return replace(arm, **changes)


def _sampled(arm: Arm, config: Config) -> Arm:
    return _with(arm, temperature=config.temperature, seeds=range(config.samples))


def _play(
    arms: Sequence[Arm],
    denoiser: Any,
    examples: Examples,
    config: Config,
    out: Path,
    metrics: Sequence[str] | None = None,
) -> pd.DataFrame:
    from orderppl.evaluation import evaluate

    allowed = ("path_nats", "accuracy") if examples.answers is not None else ("path_nats",)
    wanted = metrics or config.metrics or allowed
    return evaluate(
        arms,
        denoiser,
        examples,
        metrics=wanted,
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


def report(config: Config, tables: dict[str, pd.DataFrame], out: Path) -> None:
    """Write and show what was found."""
    import matplotlib.pyplot as plt
    import pandas as pd

    from orderppl.cli.tables import show, write_csv, write_table
    from orderppl.evaluation import advantages, frontier_figure, pass_at_k, summary
    from orderppl.files import appearing

    table = tables[config.split]
    means = summary(table)
    gains = advantages(table, config.targets, validation=tables.get("chosen on"))
    found = [means, gains]
    if "sampled" in tables:
        found.append(pass_at_k(tables["sampled"], config.k))
    write_csv(out / "table.csv", table)
    write_table(out, "frontier", pd.concat(found, ignore_index=True), asdict(config))
    figure = frontier_figure(table)
    with appearing(out / "frontier.png") as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)
    for lines, title, columns in _shown(means, gains, found[2:]):
        show(lines, columns, title)
    print(f"files: {out}")


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
