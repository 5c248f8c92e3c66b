"""All statistics of an InferenceData at once, alarms, and the numbers of a report with where each comes from."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from orderppl.diagnostics import order
from orderppl.diagnostics.agreement import agreement
from orderppl.diagnostics.backend import InferenceData, group
from orderppl.diagnostics.importance import FEWEST, importance_report

STATISTICS = "order_statistics"
Numbers = dict[str, dict[str, Any]]

MEANS: dict[str, tuple[str, str | None, str]] = {  # of a summary: variable, by what, unit
    "step_entropy": ("step_entropy", None, "nats"),
    "kendall_left_to_right": ("kendall_left_to_right", None, ""),
    "spearman_left_to_right": ("spearman_left_to_right", None, ""),
    "kendall_between_draws": ("kendall_between_draws", None, ""),
    "adjacency": ("adjacency", None, ""),
    "global_arness@1": ("global_arness", None, ""),
    "local_arness@1": ("local_arness", None, ""),
    "effective_orders": ("effective_orders", None, "orders"),
    "distinct_orders": ("distinct_orders", None, "orders"),
    "forced_share": ("forced_share", None, "share of positions"),
    "empty_steps": ("empty_steps", None, "steps"),
    "mean_step": ("type_step", "token_type", "steps"),
    "overlap_chance": ("overlap_chance", None, ""),
    "auroc": ("auroc", "score", ""),
    "overlap": ("overlap", "score", ""),
    "correlation": ("correlation", "score", ""),
    "set_size": ("set_sizes", "step", "positions"),
    "kl_step": ("kl_step", "step", "nats"),
}


def order_statistics(data: InferenceData) -> xr.Dataset:
    """Every statistic of `orderppl.diagnostics.order` and `.agreement` on the posterior of an InferenceData.

    Args:
        data: from `to_inference_data`, which has these in the group `order_statistics`.

    Returns:
        One dataset; each variable is named after its function. Of `agreement`, means over draws: `auroc`, `overlap`,
        `overlap_chance`, `correlation` [score, sequence, step], where the data have states. `kl_step` [sequence, step]
        is the mean KL(guide || prior) of each step, `set_correlation` [sequence, step] the mean of that,
        `prior_mean_step` what the prior alone would do. Of token types, `type_step`, `type_place` and `type_tokens`
        [token_type].

    Raises:
        UserError: a group is missing.
    """
    steps = group(data, "posterior")["reveal_step"]
    num_steps = int(data["posterior"].attrs["num_steps"])
    types = order.token_type_steps(steps)
    plain = ["mean_step", "precedence", "kendall_left_to_right", "spearman_left_to_right", "adjacency"]
    plain += ["distinct_orders", "effective_orders", "global_arness", "local_arness"]
    by_step = ["step_probs", "step_entropy", "set_sizes", "revealed_fraction", "forced_share", "empty_steps"]
    found = {name: getattr(order, name)(steps) for name in plain}
    found |= {name: getattr(order, name)(steps, num_steps) for name in by_step}
    found |= {"type_step": types["mean_step"], "type_place": types["mean_place"], "type_tokens": types["tokens"]}
    found["prior_mean_step"] = order.mean_step(group(data, "prior")["reveal_step"])
    found["kl_step"] = group(data, "sample_stats")["kl_step"].mean(order.SAMPLE)
    if steps.sizes["chain"] * steps.sizes["draw"] > 1:
        found["kendall_between_draws"] = order.kendall_between_draws(steps)
    if "correlation" in data.groups():
        found["set_correlation"] = data["correlation"]["set_correlation"].mean(order.SAMPLE)
    if "states" in data.groups():
        found |= {str(name): value.mean(order.SAMPLE) for name, value in agreement(data).items()}
    return xr.Dataset(found, attrs=data["posterior"].attrs)


def alarms(data: InferenceData, *, share: float = 0.9, entropy: float = 0.01) -> list[str]:
    """What looks like a collapsed order distribution, in plain words; empty when nothing does.

    Args:
        data: from `to_inference_data`.
        share: alarm when one step reveals more than this share of the positions, on average.
        entropy: alarm when the mean entropy of a reveal step is below this share of its largest value log T.
    """
    stats = group(data, STATISTICS)
    num_steps = stats.sizes["step"]
    if num_steps < 2:
        return []
    found = []
    revealed = stats["set_sizes"].mean(order.SAMPLE)
    sizes = (revealed / revealed.sum("step")).mean("sequence")
    largest = int(sizes.values.argmax())
    if float(sizes[largest]) > share:
        found.append(
            f"collapse into one step: step {largest} of {num_steps} reveals "
            f"{float(sizes[largest]):.0%} of the positions"
        )
    mean = float(stats["step_entropy"].mean())
    if mean < entropy * np.log(num_steps):
        found.append(
            f"collapse onto one order: the reveal step of a position has an entropy of {mean:.2g} nats on average "
            f"(at most {np.log(num_steps):.2f}); right for a plan that is to be deployed, wrong for a posterior"
        )
    return found


def number(value: Any, unit: str, source: str) -> dict[str, Any]:
    """An entry of `summarise`."""
    value = float(value)
    if np.isinf(value):
        return {"value": None, "unit": unit, "source": source, "note": "infinite" if value > 0 else "minus infinity"}
    return {"value": value, "unit": unit, "source": source}


def defined(numbers: Numbers) -> Numbers:
    """Those that are defined."""
    return {name: entry for name, entry in numbers.items() if entry["value"] is None or not np.isnan(entry["value"])}


def summarise(data: InferenceData) -> Numbers:
    """The numbers of a report, each with its unit and the variables it is made of.

    Args:
        data: from `to_inference_data`.

    Returns:
        name -> `value`, `unit`, `source`: the variable and what was done with it. Numbers that are not defined (k-hat
        of fewer than 25 draws, tau of a single step) are left out; an infinite one is None, with the sign in `note`.
    """
    stats, sample = group(data, STATISTICS), group(data, "sample_stats")
    steps = group(data, "posterior")["reveal_step"]
    likelihood = group(data, "log_likelihood")["tokens"]
    draws = sample.sizes["chain"] * sample.sizes["draw"]
    revealed = steps.isel(chain=0, draw=0).notnull().sum()
    kl = (sample["log_q"] - sample["log_prior"]).mean()
    per_sequence = "nats per sequence"
    found = {
        "sequences": number(steps.sizes["sequence"], "sequences", "observed_data, size of sequence"),
        "tokens": number(revealed, "tokens", "posterior.reveal_step, number that is not missing in a draw"),
        "draws": number(draws, "orders per sequence", "sample_stats, size of chain times draw"),
        "elbo": number(sample["log_weight"].mean(), per_sequence, "sample_stats.log_weight, mean"),
        "log_likelihood": number(likelihood.mean(), per_sequence, "log_likelihood.tokens, mean"),
        "kl": number(kl, "nats", "sample_stats.log_q - log_prior, mean"),
    }
    if bool((sample["log_factor"] != 0).any()):
        found["log_factor"] = number(sample["log_factor"].mean(), per_sequence, "sample_stats.log_factor, mean")
    if draws >= FEWEST:
        found |= _importance(data)
    found["steps_used"] = number(sample["steps_used"].mean(), "steps", "sample_stats.steps_used, mean")
    return defined(found | _of_orders(stats))


def _importance(data: InferenceData) -> Numbers:
    weight, prior = group(data, "sample_stats")["log_weight"], group(data, "sample_stats_prior")["log_weight"]
    report = importance_report(weight, prior)
    source = "importance_report(sample_stats.log_weight, sample_stats_prior.log_weight)"
    found = {
        "k_hat_largest": number(report["pareto_k"].max(), "", f"{source}.pareto_k, maximum"),
        "k_hat_median": number(np.median(report["pareto_k"]), "", f"{source}.pareto_k, median"),
        "k_hat_threshold": number(report.attrs["threshold"], "", f"{source}, min(1 - 1/log10(draws), 0.7)"),
        "missed_largest": number(report["missed"].max(), "nats", f"{source}.missed, maximum"),
        "trusted": number(report["trusted"].mean(), "share of sequences", f"{source}.trusted, mean"),
        "log_evidence": number(report["log_evidence"].mean(), "nats per sequence", f"{source}.log_evidence, mean"),
    }
    found["k_hat_largest"]["verdict"] = report.attrs["summary"]
    return found


def _of_orders(stats: xr.Dataset) -> Numbers:
    found = {}
    for name, (variable, dim, unit) in MEANS.items():
        labels = [None] if dim is None else stats[dim].values if dim in stats.dims else []
        for label in labels if variable in stats else []:
            values = stats[variable] if label is None else stats[variable].sel({dim: label})
            source = f"{STATISTICS}.{variable}, " + ("" if label is None else f"{dim} {label}, ") + "mean"
            found[name if label is None else f"{name}_{label}"] = number(values.mean(), unit, source)
    if "set_correlation" in stats:
        total = stats["set_correlation"].sum("step").mean()
        source = f"{STATISTICS}.set_correlation, sum over step, mean"
        found["set_correlation"] = number(total, "nats per sequence", source)
    return found
