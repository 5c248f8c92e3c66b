"""Diagnose a fitted run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orderppl.cli.hints import any_class


@dataclass(frozen=True, kw_only=True)
class Config:
    """Can a fitted order be trusted, and what is it like?

        orderppl diagnose runs/chain
        orderppl diagnose runs/chain --simulations 320      # simulation-based calibration, too

    Orders are drawn from the guide for held-out sequences. RUN/results/diagnosis then holds draws.nc (an arviz
    InferenceData), summary.json (numbers with their sources, and alarms) and figures; `orderppl report` shows them.
    k-hat and calibration ask whether the guide is the posterior: a plan that was fitted without the KL, to be
    deployed, is not, and need not be.

    Args:
        run: run folder.
        split: rows to use.
        rows: how many of them, from the first.
        draws: orders drawn per sequence; k-hat needs 25.
        state_draws: draws whose states are compared with policy and heuristics.
        correlation_draws: draws whose set correlation is measured; costs a denoiser row per token.
        simulations: simulations of a calibration, at least 80; 0: none.
        data: other data than the run's.
        seed: of everything random.
        out: folder of the files; RUN/results/diagnosis when left out.
        device: such as cpu or cuda:0.
    """

    run: str
    split: Literal["train", "validation", "test"] = "test"
    rows: int = 8
    draws: int = 200
    state_draws: int = 20
    correlation_draws: int = 2
    simulations: int = 0
    data: any_class("orderppl.data.DataSet") | None = None  # type: ignore[valid-type]
    seed: int = 0
    out: str | None = None
    device: str = "cpu"
    POSITIONAL = "run"


def run(config: Config) -> None:
    """Load the run, draw, summarise and show."""
    from pathlib import Path

    import matplotlib

    from orderppl.cli.assemble import check_device
    from orderppl.cli.held_out import read_examples
    from orderppl.cli.tables import show
    from orderppl.diagnostics import diagnose
    from orderppl.errors import UserError
    from orderppl.models import SequentialUnmaskingModel
    from orderppl.runs import load_run

    matplotlib.use("Agg")
    check_device(config.device)
    loaded = load_run(config.run, device=config.device)
    if loaded.model is None:
        raise UserError("run", f"{config.run} holds a {loaded.kind}, no fit", "give a run of fit-order")
    sequential = SequentialUnmaskingModel(loaded.denoiser, loaded.model.policy, loaded.num_steps)
    out = Path(config.out or Path(config.run) / "results" / "diagnosis")
    found = diagnose(
        loaded,
        read_examples(loaded, config.data, config.split, config.rows),
        out,
        num_samples=config.draws,
        num_state_draws=config.state_draws,
        num_correlation_draws=config.correlation_draws,
        sequential=sequential if config.simulations else None,
        num_simulations=config.simulations,
        seed=config.seed,
    )
    rows = [{"metric": name, "value": entry["value"], "unit": entry["unit"]} for name, entry in found.numbers.items()]
    shown = [row for row in rows if row["value"] is not None and not str(row["metric"])[-1].isdigit()]
    show(shown, title=f"{loaded.name}, {config.split} split")
    for entry in found.numbers.values():
        if "verdict" in entry:
            print(entry["verdict"])
    for text in found.alarms:
        print(f"alarm: {text}")
    for name, reason in found.left_out.items():
        print(f"left out: {name} ({reason})")
    print(f"files: {out}")
