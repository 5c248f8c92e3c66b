"""All diagnostics of a fitted pair at once: draws, numbers, alarms and figures, in a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from orderppl.data.dataset import Examples
from orderppl.decoding.decode import follow
from orderppl.diagnostics.backend import InferenceData, add_groups, save
from orderppl.diagnostics.calibration import calibrate
from orderppl.diagnostics.draws import STATES
from orderppl.diagnostics.importance import bound_curve
from orderppl.diagnostics.inference_data import to_inference_data
from orderppl.diagnostics.statistics import Numbers, alarms, defined, number, summarise
from orderppl.diagnostics.training import read_log, training_trace
from orderppl.errors import UserError
from orderppl.files import write_text
from orderppl.inference.programs import Program
from orderppl.inference.trainer import module_device
from orderppl.policies import Policy, Ranked
from orderppl.runs import Run, policy_of
from orderppl.unmasking import Batch, Denoiser

DATA_FILE, SUMMARY_FILE, LOG_FILE = "draws.nc", "summary.json", "log.jsonl"


@dataclass(repr=False)
class Diagnosis:
    """What `diagnose` has found.

    Attributes:
        data: see `to_inference_data`; besides, where there are: `path`, what decodes followed along the true tokens;
            `exact`, the evidence under an exact denoiser; `training`, the log of the fit; `calibration`.
        numbers: see `summarise`.
        alarms: see `alarms`.
        left_out: what is not there, and why.
        source: of the fit, for the summary.
    """

    data: InferenceData
    numbers: Numbers
    alarms: list[str]
    left_out: dict[str, str] = field(default_factory=dict)
    source: str | None = None

    def __repr__(self) -> str:
        verdict = self.numbers.get("k_hat_largest", {}).get("verdict", "too few draws for k-hat")
        return f"Diagnosis({len(self.numbers)} numbers; {'; '.join([verdict, *self.alarms])})"

    def figures(self) -> dict[str, str]:
        """Every figure there are data for, as SVG by its name."""
        from orderppl.diagnostics import plots
        from orderppl.figures import to_svg

        data, groups = self.data, self.data.groups()
        makers: dict[str, Callable[[], Any]] = {
            name: lambda name=name: getattr(plots, f"plot_{name}")(data)  # type: ignore[misc]
            for name in ("order", "precedence", "steps_used", "set_sizes", "token_types", "elbo_parts", "gradient")
        }
        makers["pareto_k"] = lambda: plots.plot_pareto_k(data)
        makers["bound"] = lambda: plots.plot_bound_curve(bound_curve(data["sample_stats"]["log_weight"]))
        if "calibration" in groups:
            makers["calibration"] = lambda: plots.plot_ranks(data["calibration"], "log_joint")
        found = {}
        for name, maker in makers.items():
            try:
                ax = maker()
            except UserError as error:  # something it shows is not there
                self.left_out[f"{name}.svg"] = str(error)
                continue
            found[name] = to_svg(ax.figure)
        return found

    def write(self, out: str | os.PathLike[str]) -> Path:
        """Write draws.nc, summary.json and the figures into a folder, where a report finds them."""
        figures, out = self.figures(), Path(out)
        summary = {
            "run": self.source,
            "data": DATA_FILE,
            "alarms": self.alarms,
            "numbers": self.numbers,
            "figures": [f"{name}.svg" for name in figures],
            "left_out": self.left_out,
        }
        document = json.dumps(summary, indent=1, allow_nan=False) + "\n"
        out.mkdir(parents=True, exist_ok=True)
        save(self.data, out / DATA_FILE)
        for name, image in figures.items():
            write_text(out / f"{name}.svg", image)
        write_text(out / SUMMARY_FILE, document)
        return out


def diagnose(
    fitted: Run | tuple[Program, Program],
    examples: Examples | Batch | Tensor,
    out: str | os.PathLike[str] | None = None,
    *,
    log: Iterable[Mapping[str, Any]] | None = None,
    num_samples: int = 200,
    num_state_draws: int = 20,
    num_correlation_draws: int = 2,
    sequential: Program | None = None,
    num_simulations: int = 512,
    seed: int = 0,
    max_states: int = STATES,
) -> Diagnosis:
    """Ask of a fitted pair whether its order can be trusted, and what it is like.

    k-hat and calibration ask whether the guide is the posterior: a plan that was fitted without the KL, to be deployed,
    is not, and need not be.

    Args:
        fitted: a run, or a pair (model, guide).
        examples: sequences that were held out; orders are drawn for all of them.
        out: folder for draws.nc, summary.json and the figures; None: nothing is written.
        log: records of the fit, such as `FitResult.trace`; those of the run when left out.
        num_samples: orders drawn per sequence; k-hat needs 25.
        num_state_draws: draws whose states are compared with policy and heuristics.
        num_correlation_draws: draws whose set correlation is measured; costs a denoiser row per token.
        sequential: the model step by step, `SequentialUnmaskingModel`: calibrate by simulations, too.
        num_simulations: of that.
        seed: of all that is drawn.
        max_states: see `draw_orders`.

    Raises:
        UserError: a run without a model and a guide, or see `to_inference_data` and `calibrate`.
    """
    model, guide, policy, source = _parts(fitted)
    batch = examples.batch if isinstance(examples, Examples) else Batch.of(examples)
    batch = batch.trimmed().to(module_device(model) if isinstance(model, torch.nn.Module) else "cpu")
    left_out: dict[str, str] = {}
    data = to_inference_data(
        model,
        guide,
        batch,
        num_samples=num_samples,
        num_state_draws=min(num_state_draws, num_samples),
        num_correlation_draws=min(num_correlation_draws, num_samples),
        token_string=examples.spell if isinstance(examples, Examples) else str,
        seed=seed,
        max_states=max_states,
    )
    num_steps = int(data["posterior"].attrs["num_steps"])
    denoiser: Any = getattr(model, "denoiser", None)
    makers = {
        "path": lambda: followed(policy, denoiser, batch, num_steps, seed),
        "training": lambda: _training(fitted, log),
    }
    if hasattr(denoiser, "log_evidence"):
        makers["exact"] = lambda: exact(denoiser, batch)
    for name, maker in makers.items():
        try:
            add_groups(data, {name: maker()})
        except UserError as error:
            left_out[name] = str(error)
    if sequential is not None:
        found = calibrate(model, guide, sequential, batch, num_simulations=num_simulations, seed=seed)
        add_groups(data, {"calibration": found})
    diagnosis = Diagnosis(data, summarise(data) | _own_numbers(data), alarms(data), left_out, source)
    if out is not None:
        diagnosis.write(out)
    return diagnosis


def followed(
    policy: Policy | None, denoiser: Denoiser | None, batch: Batch, num_steps: int, seed: int = 0
) -> xr.Dataset:
    """What decodes, followed along the true tokens by its modes and by draws: over `decision` and `sequence`.

    Returns:
        `nats` of the tokens, `tokens`, `forwards`, and `fallback`, forwards in which the policy chose nothing.

    Raises:
        UserError: there is no policy.
    """
    if policy is None or denoiser is None:
        raise UserError("policy", "the pair has none that decodes", "give a model with a policy and a denoiser")
    found: dict[str, list[Any]] = {"nats": [], "tokens": [], "forwards": [], "fallback": []}
    for mode in (True, False):
        generator = torch.Generator().manual_seed(seed)
        path = follow(policy, denoiser, batch, num_steps, mode=mode, generator=generator)
        for name, values in zip(found, (path.nats, path.latent.sum(-1), path.nfe, path.fallback), strict=True):
            found[name].append(values.cpu().numpy())
    variables = {name: (("decision", "sequence"), np.stack(values)) for name, values in found.items()}
    return xr.Dataset(variables, coords={"decision": ["mode", "sample"]})


def exact(denoiser: Denoiser, batch: Batch) -> xr.Dataset:
    """Log-probability of the tokens to reveal under an exact denoiser, nats: over `sequence`."""
    longest = int(batch.latent.sum(-1).max())
    path = follow(Ranked("left_to_right", sizes=1.0), denoiser, batch, longest)  # one by one, in any order
    return xr.Dataset({"log_evidence": ("sequence", -path.nats.cpu().numpy())})


def _parts(fitted: Run | tuple[Program, Program]) -> tuple[Program, Program, Any, str | None]:
    """Model, guide, what decodes, and the name of the run."""
    if not isinstance(fitted, Run):
        model, guide = fitted
        return model, guide, policy_of(model, guide) if hasattr(model, "policy") else None, None
    if fitted.model is None or fitted.guide is None:
        problem = f"{fitted.folder} holds no model and guide, it is of kind {fitted.kind!r}"
        raise UserError("run", problem, "give a run of fit-order")
    return fitted.model, fitted.guide, fitted.policy, str(fitted.folder)


def _training(fitted: Run | tuple[Program, Program], log: Iterable[Mapping[str, Any]] | None) -> xr.Dataset:
    grad_clip = fitted.config.get("fit", {}).get("grad_clip") if isinstance(fitted, Run) else None
    if log is None:
        if not isinstance(fitted, Run):
            raise UserError("log", "there is none", "give the trace of the fit")
        log = read_log(fitted.folder / LOG_FILE)
    return training_trace(log, grad_clip=grad_clip)


def _own_numbers(data: InferenceData) -> Numbers:
    """What the groups of a diagnosis add to `summarise`."""
    found: Numbers = {}
    for decision in data["path"]["decision"].values if "path" in data.groups() else ():
        own, where = data["path"].sel(decision=decision), f"decision {decision}"
        nats = own["nats"].sum() / own["tokens"].sum()
        share = own["fallback"].sum() / own["forwards"].sum()
        found[f"path_nats_{decision}"] = number(nats, "nats per token", f"path.nats, {where}, sum / sum of tokens")
        found[f"forwards_{decision}"] = number(own["forwards"].mean(), "forwards", f"path.forwards, {where}, mean")
        source = f"path.fallback / path.forwards, {where}, sums"
        found[f"fallback_share_{decision}"] = number(share, "share of forwards", source)
    if "exact" in data.groups():
        gap = (data["exact"]["log_evidence"] - data["log_likelihood"]["tokens"]).mean()
        source = "exact.log_evidence - log_likelihood.tokens, mean"
        found["gap_nats"] = number(gap, "nats per sequence", source)
    for name in ("elbo", "log_likelihood", "kl", "grad_norm", "grad_variance", "grad_snr"):
        if "training" in data.groups() and name in data["training"]:
            last = data["training"][name].isel(update=slice(-100, None)).mean()
            found[f"training_{name}"] = number(last, "", f"training.{name}, mean of the last 100 updates")
    if "calibration" in data.groups():
        source = "calibration.p_value, Bonferroni-corrected minimum"
        found["calibration_p"] = number(data["calibration"].attrs["smallest_p"], "", source)
        found["calibration_p"]["verdict"] = data["calibration"].attrs["summary"]
    return defined(found)
