"""Pure functions of the table that `evaluate` makes: means with intervals, paired differences, pass@k.

The table has one row per arm, run, seed and example. What stands left of `run` describes the arm; what stands right of
it was measured. A column that somebody adds at the right, such as a gap to the evidence, is a metric by its name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from orderppl.errors import UserError
from orderppl.evaluation.intervals import Array, Interval, Resamples, bootstrap_mean

METRICS = {"accuracy": "correct", "path_nats": "nats"}  # metric -> column; any other metric is a column itself
PER_TOKEN = ("path_nats", "marginal_nats")  # of teacher-forced runs


@dataclass(frozen=True)
class ByRow:
    """One metric of P arms on the same N rows, each the mean over the seeds of the arm.

    Attributes:
        arms: what describes each arm, by its name.
        values: float64 [N, P]; nats are per token.
        nfe: float64 [N, P], forwards of the run that measured the metric.
        weights: float64 [N], tokens of the row for nats per token, otherwise 1.
        part: the rows of the table behind it, with a column `value`.
    """

    arms: pd.DataFrame
    values: Array
    nfe: Array
    weights: Array
    part: pd.DataFrame


def higher_is_better(metric: str) -> bool:
    """Whether a metric is better when higher: all but forwards, and what ends in `nats`."""
    return metric != "nfe" and not metric.endswith("nats")


def metrics_of(table: pd.DataFrame) -> list[str]:
    """Which of accuracy and `path_nats` a table has."""
    return [metric for metric, column in METRICS.items() if column in table and table[column].notna().any()]


def by_row(table: pd.DataFrame, metric: str) -> ByRow:
    """Values of every arm that has a metric.

    Raises:
        UserError: no arm has it, arms on different rows, a value that is not finite, or shards that are not done.
    """
    if table.attrs.get("missing"):
        problem = f"{table.attrs['missing']} parts are left to other shards"
        raise UserError("table", problem, "evaluate again when they are done")
    if metric == "marginal_nats":
        table = marginal(table)
    column = METRICS.get(metric, metric)
    part = table[table[column].notna()] if column in table else table[:0]
    if part.empty:
        raise UserError("metric", f"{metric} was not measured", "give it to evaluate, or leave it out")
    decoded = part["run"] == "decoding"  # what both runs have is read from the decoding
    part = part[decoded | ~part["arm"].isin(part["arm"][decoded].unique())]
    per_token = metric in PER_TOKEN
    part = part.assign(value=part[column] / part["tokens"].clip(lower=1) if per_token else part[column])
    infinite = part[~np.isfinite(part["value"].to_numpy(np.float64))]
    if len(infinite):
        first = infinite.iloc[0]
        problem = f"row {first['row']} of arm {first['arm']!r} has {metric} {first['value']:g}"
        raise UserError("metric", problem, "leave such rows out, or look at what the denoiser rules out")
    names = list(part["arm"].unique())
    means = part.groupby(["row", "arm"])[["value", "nfe", "tokens"]].mean()
    wide = {name: means[name].unstack("arm")[names].to_numpy(np.float64) for name in means}
    missing = np.isnan(wide["value"]).sum(0)
    if missing.any():
        arm = names[int(missing.argmax())]
        problem = f"arm {arm!r} lacks {missing.max()} of {len(wide['value'])} rows"
        raise UserError("rows", problem, "compare arms on the same rows")
    labels = list(table.columns[: list(table.columns).index("run")])
    arms = part.drop_duplicates("arm")[labels].set_index("arm", drop=False)
    weights = wide["tokens"][:, 0] if per_token else np.ones(len(wide["tokens"]))
    return ByRow(arms, wide["value"], wide["nfe"], weights, part)


def marginal(table: pd.DataFrame) -> pd.DataFrame:
    """The likelihood of every row under a policy that draws its orders, in a column `marginal_nats`.

        -log 1/K sum_k p(x | r_k),      r_k ~ policy                               the K seeds of an arm are its orders

    An importance-weighted bound with the policy as proposal (Burda et al., arXiv 1509.00519): in expectation an upper
    bound of -log p(x), tighter with more seeds. With one seed, and for an order that is certain, it is the path's. The
    policy is taken as it decodes: where a set is empty, it reveals a token. A guide as proposal:
    `orderppl.diagnostics.bound_curve`.

    Args:
        table: of `evaluate`, with teacher-forced runs.

    Returns:
        These runs, one row per arm and example.
    """
    part = table[table["run"] == "teacher_forced"]
    orders = part.groupby(["arm", "row"])
    least = orders["nats"].transform("min")
    share = np.exp(least - part["nats"]).groupby([part["arm"], part["row"]])  # of the largest probability
    part = part.assign(
        marginal_nats=least - np.log(share.transform("mean")),
        **{name: orders[name].transform("mean") for name in ("nfe", "fallback")},
    ).drop_duplicates(["arm", "row"])
    part.attrs.update(table.attrs)
    return part


def summary(
    table: pd.DataFrame,
    metrics: Iterable[str] | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Mean and bootstrap interval over rows of every metric and arm, with what the arm cost.

    Args:
        table: of `evaluate`.
        metrics: accuracy, path_nats, marginal_nats (see `marginal`), nfe or any column; those that were measured, and
            nfe, when left out.
        resamples: number of bootstrap samples of the rows.
        seed: of the resampling.

    Returns:
        One row per metric and arm: `metric`, `value`, `low`, `high`, `seed_low`, `seed_high` (over seeds), `n` (rows),
        `seeds`, what describes the arm, `run`, and the forwards of that run: `nfe`, `nfe_se`, `nfe_min`, `nfe_max`,
        `tokens_per_forward` (ratio of totals), `fallback`.

    Raises:
        UserError: see `by_row`.
    """
    found = []
    for metric in [*metrics_of(table), "nfe"] if metrics is None else metrics:
        rows = by_row(table, metric)
        samples = Resamples(len(rows.weights), resamples=resamples, seed=seed)
        means = samples.means(rows.values, rows.weights)
        intervals = [samples.interval(means[:, place]) for place in range(means.shape[1])]
        part = rows.part.assign(weight=rows.part["tokens"] if metric in PER_TOKEN else 1.0)
        sums = part.assign(value=part["value"] * part["weight"]).groupby(["arm", "seed"])[["value", "weight"]].sum()
        by_seed = (sums["value"] / sums["weight"]).groupby("arm")
        arms = part.groupby("arm")
        totals = arms[["tokens_written", "nfe"]].sum()
        frame = rows.arms.assign(
            **{name: [getattr(interval, name) for interval in intervals] for name in ("value", "low", "high")},
            metric=metric,
            seed_low=by_seed.min(),
            seed_high=by_seed.max(),
            n=len(rows.weights),
            seeds=by_seed.size(),
            run=arms["run"].first(),
            nfe=rows.nfe.mean(0),
            nfe_se=rows.nfe.std(0, ddof=1) / np.sqrt(len(rows.nfe)) if len(rows.nfe) > 1 else 0.0,
            nfe_min=arms["nfe"].min(),
            nfe_max=arms["nfe"].max(),
            tokens_per_forward=totals["tokens_written"] / totals["nfe"].clip(lower=1),
            fallback=arms["fallback"].mean(),
        )
        first = ["metric", "value", "low", "high"]
        found.append(frame[first + [name for name in frame if name not in first]])
    return pd.concat(found, ignore_index=True)


def paired_difference(
    table: pd.DataFrame,
    arm: str,
    baseline: str,
    metric: str,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of the difference of two arms, both resampled by the same rows.

    Args:
        table: of `evaluate`.
        arm: an arm, or a family with one arm per training seed, whose rows then have the mean over them.
        baseline: the same of the other side.
        metric: see `summary`.
        resamples: number of bootstrap samples of the rows.
        seed: of the resampling.

    Raises:
        UserError: no such arm, a family of several settings, or arms on different rows.
    """
    chosen = [_named(table, name, field) for name, field in ((arm, "arm"), (baseline, "baseline"))]
    rows = by_row(table[table["arm"].isin([*chosen[0], *chosen[1]])], metric)
    means = [rows.values[:, rows.arms.index.isin(names)].mean(1) for names in chosen]
    return bootstrap_mean(means[0] - means[1], rows.weights, resamples=resamples, seed=seed)


def _named(table: pd.DataFrame, name: str, field: str) -> list[str]:
    """Arms of that name or, without one, of that family."""
    arms = table.drop_duplicates("arm").set_index("arm")
    if name in arms.index:
        return [name]
    family = arms[arms["family"] == name]
    if family.empty:
        raise UserError(field, f"no arm {name!r}", f"use one of {', '.join(arms.index)}")
    if family["training_seed"].duplicated().any():
        raise UserError(field, f"{name!r} has several settings", f"name one of {', '.join(family.index)}")
    return list(family.index)


def pass_at_k(table: pd.DataFrame, ks: Iterable[int] = (1, 4), *, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Probability that one of k samples is right; the seeds of an arm that samples its tokens are the samples.

    1 - C(samples - right, k) / C(samples, k), without bias for k independent samples (Chen et al., arXiv 2107.03374).

    Args:
        table: of `evaluate`, with accuracy.
        ks: values of k; those above the number of samples of an arm are left out.
        resamples: number of bootstrap samples of the rows.
        seed: of the resampling.

    Returns:
        One row per arm and k: as in `summary`, with `metric` "pass_at_k", and `k`.
    """
    heads = summary(table, ["accuracy"], resamples=0).set_index("arm", drop=False)
    rows = by_row(table, "accuracy")
    samples = Resamples(len(rows.weights), resamples=resamples, seed=seed)
    found = []
    for place, (arm, head) in enumerate(heads.iterrows()):
        count = int(head["seeds"])
        wrong = np.rint(count * (1 - rows.values[:, place]))  # [N]
        for k in (k for k in ks if k <= count):
            draws = np.arange(k)
            value = 1 - ((wrong[:, None] - draws).clip(min=0) / (count - draws)).prod(-1)
            interval = samples.interval(samples.means(value[:, None])[:, 0])
            found.append(head.to_dict() | {"metric": "pass_at_k", **vars(interval), "k": k, "arm": arm})
    return pd.DataFrame(found).drop(columns=["seed_low", "seed_high"], errors="ignore")
