"""All statistics of an InferenceData at once, alarms, and the numbers of a report with where each comes from."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from orderppl.diagnostics import order
from orderppl.diagnostics.agreement import agreement
from orderppl.diagnostics.backend import InferenceData
from orderppl.diagnostics.importance import FEWEST, importance_report
from orderppl.errors import UserError

STATISTICS = "order_statistics"


def order_statistics(data: InferenceData, *, k: int = 1) -> xr.Dataset:
    """Every statistic of `orderppl.diagnostics.order` and `.agreement` on the posterior of an InferenceData.

    Args:
        data: from `to_inference_data`.
        k: of AR-ness@k.

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
    found = {
        "mean_step": order.mean_step(steps),
        "prior_mean_step": order.mean_step(group(data, "prior")["reveal_step"]),
        "step_probs": order.step_probs(steps, num_steps),
        "step_entropy": order.step_entropy(steps, num_steps),
        "precedence": order.precedence(steps),
        "kendall_left_to_right": order.kendall_left_to_right(steps),
        "spearman_left_to_right": order.spearman_left_to_right(steps),
        "set_sizes": order.set_sizes(steps, num_steps),
        "revealed_fraction": order.revealed_fraction(steps, num_steps),
        "visible_fraction": order.revealed_fraction(steps, num_steps, padding=True),
        "adjacency": order.adjacency(steps),
        "global_arness": order.global_arness(steps, k),
        "local_arness": order.local_arness(steps, k),
        "distinct_orders": order.distinct_orders(steps),
        "effective_orders": order.effective_orders(steps),
        "forced_share": order.forced_share(steps, num_steps),
        "empty_steps": order.empty_steps(steps, num_steps),
        "type_step": types["mean_step"],
        "type_place": types["mean_place"],
        "type_tokens": types["tokens"],
    }
    if steps.sizes["draw"] > 1:
        found["kendall_between_draws"] = order.kendall_between_draws(steps)
    stats = group(data, "sample_stats")
    if "kl_step" in stats:
        found["kl_step"] = stats["kl_step"].mean(order.SAMPLE)
    if "correlation" in data.groups():
        found["set_correlation"] = data["correlation"]["set_correlation"].mean(order.SAMPLE)
    if "states" in data.groups():
        found |= {str(name): value.mean(order.SAMPLE) for name, value in agreement(data).items()}
    return xr.Dataset(found, attrs={**data["posterior"].attrs, "k": k})


def add_order_statistics(data: InferenceData, *, k: int = 1) -> InferenceData:
    """A copy of the data with the group `order_statistics`; see `order_statistics`."""
    joined = InferenceData(attrs=data.attrs)
    kept = {name: data[name] for name in data.groups() if name != STATISTICS}
    joined.add_groups(kept | {STATISTICS: order_statistics(data, k=k)}, warn_on_custom_groups=False)
    return joined


def alarms(data: InferenceData, *, share: float = 0.9, entropy: float = 0.01) -> list[str]:
    """What looks like a collapsed order distribution, in plain words; empty when nothing does.

    Args:
        data: with the group `order_statistics`.
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


def summarise(data: InferenceData) -> dict[str, dict[str, Any]]:
    """The numbers of a report, each with its unit and the variables it is made of.

    Args:
        data: with the group `order_statistics`.

    Returns:
        name -> `value`, `unit`, `source`: the variable and what was done with it. Numbers that are not defined (k-hat
        of fewer than 25 draws, tau of a single step) are left out; an infinite one is None, with the sign in `note`.
    """
    stats, sample = group(data, STATISTICS), group(data, "sample_stats")
    log_likelihood = group(data, "log_likelihood")["tokens"]
    size = group(data, "observed_data").sizes
    draws = sample.sizes["chain"] * sample.sizes["draw"]
    found: dict[str, dict[str, Any]] = {}

    def add(name: str, value: Any, unit: str, source: str) -> None:
        number = float(value)
        if np.isnan(number):
            return
        found[name] = {"value": number, "unit": unit, "source": source}
        if np.isinf(number):
            found[name] |= {"value": None, "note": "infinite" if number > 0 else "minus infinity"}

    def mean(name: str, unit: str, *, of: str | None = None) -> None:
        if (of or name) in stats:
            add(name, stats[of or name].mean(), unit, f"{STATISTICS}.{of or name}, mean of all entries")

    add("sequences", size["sequence"], "sequences", "observed_data, size of sequence")
    add("tokens", (data["constant_data"]["attention_mask"]).sum(), "tokens", "constant_data.attention_mask, sum")
    add("draws", draws, "orders per sequence", "sample_stats, size of chain times draw")
    add("elbo", sample["log_weight"].mean(), "nats per sequence", "sample_stats.log_weight, mean")
    add("log_likelihood", log_likelihood.mean(), "nats per sequence", "log_likelihood.tokens, mean")
    add("kl", (sample["log_q"] - sample["log_prior"]).mean(), "nats", "sample_stats.log_q - log_prior, mean")
    if draws >= FEWEST:
        prior_weight = group(data, "sample_stats_prior")["log_weight"]
        report = importance_report(sample["log_weight"], prior_weight)
        shape = report["pareto_k"].values
        source = "importance_report(sample_stats.log_weight, sample_stats_prior.log_weight)"
        add("k_hat_largest", shape.max(), "", f"{source}.pareto_k, maximum")
        add("k_hat_median", np.median(shape), "", f"{source}.pareto_k, median")
        add("k_hat_threshold", report.attrs["threshold"], "", f"{source}, min(1 - 1/log10(draws), 0.7)")
        add("missed_largest", report["missed"].max(), "nats", f"{source}.missed, maximum")
        add("trusted", report["trusted"].mean(), "share of sequences", f"{source}.trusted, mean")
        add("log_evidence", report["log_evidence"].mean(), "nats per sequence", f"{source}.log_evidence, mean")
        found["k_hat_largest"]["verdict"] = report.attrs["summary"]
    add("steps_used", sample["steps_used"].mean(), "steps", "sample_stats.steps_used, mean")
    mean("step_entropy", "nats")
    for name in ("kendall_left_to_right", "spearman_left_to_right", "kendall_between_draws", "adjacency"):
        mean(name, "")
    for name in ("global_arness", "local_arness"):
        mean(f"{name}@{stats.attrs['k']}", "", of=name)
    mean("effective_orders", "orders")
    mean("distinct_orders", "orders")
    mean("forced_share", "share of positions")
    mean("empty_steps", "steps")
    if "set_correlation" in stats:
        total = stats["set_correlation"].sum("step").mean()
        add("set_correlation", total, "nats per sequence", f"{STATISTICS}.set_correlation, sum over step, mean")
    for kind in stats["token_type"].values:
        source = f"{STATISTICS}.type_step, token_type {kind}"
        add(f"mean_step_{kind}", stats["type_step"].sel(token_type=kind), "steps", source)
    if "score" in stats.dims:
        for name in ("auroc", "overlap", "correlation"):
            for score in stats["score"].values:
                source = f"{STATISTICS}.{name}, score {score}, mean of all entries"
                add(f"{name}_{score}", stats[name].sel(score=score).mean(), "", source)
        mean("overlap_chance", "")
    for step in stats["step"].values:
        source = f"{STATISTICS}.set_sizes, step {step}, mean"
        add(f"set_size_{step}", stats["set_sizes"].sel(step=step).mean(), "positions", source)
    if "kl_step" in stats:
        for step in stats["step"].values:
            source = f"{STATISTICS}.kl_step, step {step}, mean"
            add(f"kl_step_{step}", stats["kl_step"].sel(step=step).mean(), "nats", source)
    return found


def group(data: InferenceData, name: str) -> xr.Dataset:
    """A group of the data.

    Raises:
        UserError: it is missing.
    """
    if name not in data.groups():
        has = ", ".join(data.groups()) or "none"
        remedy = "call add_order_statistics first" if name == STATISTICS else "make the data with to_inference_data"
        raise UserError(name, f"no such group; there are: {has}", remedy)
    found: xr.Dataset = data[name]
    return found
