"""Diagnose a fitted run: can its order be trusted, and what is it like?

    orderppl diagnose runs/fit-order
    orderppl diagnose runs/quickstart/chain --set simulations=320   # simulation-based calibration, too

RUN is the folder of a learned order, or of a run that has learned one: fit-order, chain, antibodies, a part of a
quickstart, an arm of gsm8k. Orders are drawn from its guide for held-out sequences. RUN/diagnosis (or --out) then holds
draws.nc (an arviz InferenceData), summary.json (numbers, each with the variables of draws.nc that it is made of, and
alarms) and the figures; `orderppl report` shows them. k-hat and calibration ask whether the guide is the posterior: a
plan that was fitted without the KL, to be deployed, is not, and need not be.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import torch
import xarray as xr
from rich.console import Console
from torch import Tensor

from orderppl.diagnostics import (
    InferenceData,
    add_order_statistics,
    alarms,
    bound_curve,
    calibrate,
    read_log,
    save,
    summarise,
    to_inference_data,
    training_trace,
)
from orderppl.errors import UserError
from orderppl.evaluation import path_likelihood
from orderppl.experiments.build import OrderProblem, Task, learned_policy
from orderppl.experiments.config import RunConfig, setting
from orderppl.experiments.evaluate import load_order
from orderppl.experiments.fit_order import LOG_FILE, ORDER_FILE
from orderppl.experiments.results import Record, read_results, results_table
from orderppl.inference.checkpoints import write_text
from orderppl.models import SequentialUnmaskingModel
from orderppl.models.denoisers import AntibodyDenoiser, ExactDenoiser

DATA_FILE, SUMMARY_FILE = "draws.nc", "summary.json"
FRONTIER_METRICS = ("path_nats", "accuracy")


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of diagnose."""

    run: str = setting("runs/fit-order", "folder of the run", file=True, option="RUN")
    split: Literal["train", "validation", "test"] = setting("test", "rows to use", option="--split")
    sequences: int = setting(8, "sequences, the first of the split", at_least=1, option="--sequences")
    draws: int = setting(200, "orders drawn per sequence; k-hat needs 25", at_least=2, option="--draws")
    state_draws: int = setting(20, "draws whose states are compared with policy and heuristics", at_least=0)
    correlation_draws: int = setting(2, "draws whose set correlation is measured; costs a row per token", at_least=0)
    simulations: int = setting(0, "simulations of a calibration, at least 80; 0: none", at_least=0)
    reach: int = setting(1, "k of AR-ness@k", at_least=1)


def default_out(config: Config) -> Path:
    """The diagnosis lies in the folder of its run, where `orderppl report` finds it."""
    return Path(config.run) / "diagnosis"


@dataclass
class Fitted:
    """A fitted run.

    Attributes:
        problem: its objects, with what was learned.
        num_steps: step budget T.
        grad_clip: of the fit.
        folder: where its weights and its log are.
    """

    problem: OrderProblem
    num_steps: int
    grad_clip: float | None
    folder: Path


def run(config: Config, out: Path) -> Iterable[Record]:
    """Load the run, draw, summarise and show; files are written when all of that has worked."""
    matplotlib.use("Agg")
    folder = Path(config.run)
    fitted = open_run(folder, config.device)
    data, left_out = draw(config, fitted)
    if frontier := frontier_points(folder):
        data.add_groups({"frontier": frontier}, warn_on_custom_groups=False)
    else:
        left_out["frontier"] = "results.json of the run has no path_nats or accuracy with forwards"
    figures = draw_figures(data, left_out)
    numbers = summarise(data) | own_numbers(data)
    found = alarms(data)
    summary = {
        "run": str(folder),
        "order": str(fitted.folder / ORDER_FILE),
        "log": str(fitted.folder / LOG_FILE),
        "data": DATA_FILE,
        "alarms": found,
        "numbers": numbers,
        "figures": [f"{name}.png" for name in figures],
        "left_out": left_out,
    }
    document = json.dumps(summary, indent=1, allow_nan=False) + "\n"
    save(data, out / DATA_FILE)
    for name, image in figures.items():
        temporary = out / f".{name}.png.tmp"
        temporary.write_bytes(image)
        temporary.replace(out / f"{name}.png")
    write_text(out / SUMMARY_FILE, document)

    labels = {"task": fitted.problem.task.name, "steps": fitted.num_steps, "split": config.split, "seed": config.seed}
    records: list[Record] = [
        {
            "metric": name,
            "value": entry["value"],
            "n": int(numbers["sequences"]["value"]),
            "draws": config.draws,
            **labels,
        }
        for name, entry in numbers.items()
        if entry["value"] is not None
    ]
    console = Console()
    shown = [
        record for record in records if not re.search(r"_\d+$|^(auroc|overlap|correlation)_", str(record["metric"]))
    ]
    console.print(results_table(shown, rows=("metric",), columns=(), title=f"{folder}, {config.split} split"))
    if "verdict" in numbers.get("k_hat_largest", {}):
        console.print(numbers["k_hat_largest"]["verdict"])
    for text in found:
        console.print(f"[bold]alarm[/bold]: {text}")
    return records


# ------------------------------------------------------------------------------------------------------------- the run


def open_run(run: Path, device: str = "cpu") -> Fitted:
    """Rebuild the objects of a run's only order, or of the order in its folder `run`, and load what it learned.

    Raises:
        UserError: no folder, no learned order or several, or one of another version or architecture.
    """
    if not run.is_dir():
        raise UserError("run", f"{run} is no folder", "give the --out of a fitted run")
    found = [run / ORDER_FILE] if (run / ORDER_FILE).is_file() else sorted(run.rglob(ORDER_FILE))
    if not found:
        raise UserError("run", f"{run} holds no {ORDER_FILE}", "give the --out of a run that has fitted an order")
    if len(found) > 1:
        folders = ", ".join(str(path.parent) for path in found)
        raise UserError("run", f"{run} holds {len(found)} orders", f"give the folder of one: {folders}")
    folder = found[0].parent
    config, problem = load_order(folder, device)
    return Fitted(problem, config.num_steps, config.fit.grad_clip, folder)


# --------------------------------------------------------------------------------------------------- draws and numbers


def draw(config: Config, fitted: Fitted) -> tuple[InferenceData, dict[str, str]]:
    """Everything that is drawn or read, and why some of it is not there."""
    problem = fitted.problem
    task = problem.task
    rows = {name: value[: config.sequences].to(config.device) for name, value in task.held(config.split).items()}
    problem.model.one_step = False
    data = to_inference_data(
        problem.model,
        problem.guide,
        rows,
        num_samples=config.draws,
        num_state_draws=min(config.state_draws, config.draws),
        num_correlation_draws=min(config.correlation_draws, config.draws),
        token_string=token_strings(task),
        seed=config.seed,
        attrs={"task": task.name, "split": config.split, "run": config.run},
    )
    data = add_order_statistics(data, k=config.reach)
    groups, left_out = {"path": policy_path(fitted, rows, config.seed)}, {}
    if isinstance(problem.denoiser, ExactDenoiser):
        evidence = problem.denoiser.log_evidence(rows["tokens"], rows["attention_mask"]).cpu().numpy()
        groups["chain"] = xr.Dataset({"log_evidence": ("sequence", evidence)})
    try:
        groups["training"] = training_trace(read_log(fitted.folder / LOG_FILE), grad_clip=fitted.grad_clip)
    except UserError as error:
        left_out["training"] = str(error)
    if config.simulations:
        sequential = SequentialUnmaskingModel(problem.model.denoiser, problem.model.prior, fitted.num_steps)
        groups["calibration"] = calibrate(
            problem.model, problem.guide, sequential, rows, num_simulations=config.simulations, seed=config.seed
        )
    data.add_groups(groups, warn_on_custom_groups=False)
    return data, left_out


def token_strings(task: Task) -> Callable[[int], str]:
    """Token id -> what to show."""
    if task.tokenizer is not None:
        names = task.tokenizer.tokens
        return lambda index: str(names[index])
    if task.name == "antibodies":
        return lambda index: AntibodyDenoiser.decode(torch.tensor([index]))
    return str


def policy_path(fitted: Fitted, rows: Mapping[str, Tensor], seed: int) -> xr.Dataset:
    """The learned policy followed along the true tokens, by its mode and sampled: over `decision` and `sequence`."""
    decisions: tuple[Literal["mode", "sample"], ...] = ("mode", "sample")
    found: dict[str, list[Any]] = {"nats": [], "tokens": [], "forwards": [], "fallback": []}
    for decision in decisions:
        policy = learned_policy(fitted.problem, decision)
        path = path_likelihood(fitted.problem.model.denoiser, policy, [rows], fitted.num_steps, seed=seed)
        for name, values in zip(found, (path.nats, path.tokens, path.nfe, path.fallback), strict=True):
            found[name].append(values.numpy())
    dims = ("decision", "sequence")
    variables = {name: (dims, np.stack(values)) for name, values in found.items()}
    return xr.Dataset(variables, coords={"decision": list(decisions)})


def frontier_points(folder: Path) -> xr.Dataset | None:
    """Arms of the run's results.json with their forwards; None when there are none."""
    if not (folder / "results.json").is_file():
        return None
    records = read_results(folder)["records"]
    for metric in FRONTIER_METRICS:
        points = [item for item in records if item.get("metric") == metric and "nfe" in item and "arm" in item]
        if points:
            family = [re.sub(r"\s+(T=)?[0-9.]+$", "", str(item["arm"])) for item in points]
            columns = {"forwards": "nfe", "value": "value", "low": "low", "high": "high"}
            values = {
                name: ("point", [float(item.get(key, np.nan)) for item in points]) for name, key in columns.items()
            }
            return xr.Dataset(values, coords={"arm": ("point", family)}, attrs={"metric": metric})
    return None


def own_numbers(data: InferenceData) -> dict[str, dict[str, Any]]:
    """What the run adds to `summarise`: the learned policy, the exact chain, training and calibration."""
    found: dict[str, dict[str, Any]] = {}

    def add(name: str, value: Any, unit: str, source: str) -> None:
        if np.isfinite(float(value)):
            found[name] = {"value": float(value), "unit": unit, "source": source}

    path = data["path"]
    for decision in path["decision"].values:
        own = path.sel(decision=decision)
        where = f"decision {decision}"
        share = own["fallback"].sum() / own["forwards"].sum()
        add(f"path_nats_{decision}", own["nats"].sum() / own["tokens"].sum(), "nats per token", f"path.nats, {where}")
        add(f"forwards_{decision}", own["forwards"].mean(), "forwards", f"path.forwards, {where}, mean")
        add(f"fallback_share_{decision}", share, "share of forwards", f"path.fallback / path.forwards, {where}, sums")
    if "chain" in data.groups():
        gap = data["chain"]["log_evidence"] - data["log_likelihood"]["tokens"]
        add("gap_nats", gap.mean(), "nats per sequence", "chain.log_evidence - log_likelihood.tokens, mean")
    if "training" in data.groups():
        last = data["training"].isel(update=slice(-100, None))
        for name in ("elbo", "log_likelihood", "kl", "grad_norm", "grad_variance", "grad_snr"):
            if name in last:
                add(f"training_{name}", last[name].mean(), "", f"training.{name}, mean of the last 100 updates")
    if "calibration" in data.groups():
        source = "calibration.p_value, Bonferroni-corrected minimum"
        add("calibration_p", data["calibration"].attrs["smallest_p"], "", source)
        found["calibration_p"]["verdict"] = data["calibration"].attrs["summary"]
    return found


def draw_figures(data: InferenceData, left_out: dict[str, str]) -> dict[str, bytes]:
    """Every figure there are data for, as PNG; the others are added to `left_out`."""
    import matplotlib.pyplot as plt

    from orderppl.diagnostics import plots

    functions: dict[str, Callable[[], Any]] = {
        "order": lambda: plots.plot_order(data),
        "precedence": lambda: plots.plot_precedence(data),
        "steps_used": lambda: plots.plot_steps_used(data),
        "set_sizes": lambda: plots.plot_set_sizes(data),
        "token_types": lambda: plots.plot_token_types(data),
        "elbo_parts": lambda: plots.plot_elbo_parts(data),
        "gradient": lambda: plots.plot_gradient(data),
        "pareto_k": lambda: plots.plot_pareto_k(data),
        "bound": lambda: plots.plot_bound_curve(bound_curve(data["sample_stats"]["log_weight"])),
        "frontier": lambda: plots.plot_frontier(data),
        "calibration": lambda: plots.plot_ranks(data["calibration"], "log_joint"),
    }
    if "calibration" not in data.groups():
        del functions["calibration"]
    figures = {}
    for name, function in functions.items():
        try:
            ax = function()
        except UserError as error:  # something it shows is not there
            left_out[f"{name}.png"] = str(error)
            continue
        buffer = io.BytesIO()
        ax.figure.savefig(buffer, format="png", dpi=200)
        plt.close(ax.figure)
        figures[name] = buffer.getvalue()
    return figures
