"""Can the guide be trusted? What the importance weights p(x, r) / q(r | x) of its draws say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from orderppl.diagnostics.backend import Array, psis
from orderppl.errors import UserError
from orderppl.inference.importance_weighted import log_mean_exp

Weights = Tensor | xr.DataArray | Array
FEWEST = 25  # draws below which no tail can be fitted: PSIS wants five in the upper fifth
SAME = 2e-5  # nats; log-weights closer than this differ by rounding in float32
MISSED = 3.0  # nats of evidence that other draws may find more
SEEN_OFTEN = 5  # draws of the largest weight that make it an atom instead of the start of a tail


def khat_threshold(num_samples: int) -> float:
    """Largest acceptable k: min(1 - 1 / log10(K), 0.7) (Vehtari et al., JMLR 25(72), 2024, section 3)."""
    return float(min(1 - 1 / np.log10(num_samples), 0.7))


def importance_report(log_weight: Weights, reference: Weights | None = None) -> xr.Dataset:
    """PSIS k-hat of every sequence, and whether the guide can be trusted.

    k is the shape of the generalised Pareto distribution fitted to the largest weights: moments of order above 1/k do
    not exist. Orders are discrete: where the largest weight occurs five times or more there is no tail to fit and k is
    -inf; so it is for the exact posterior, and for a guide that always draws the same order. No k-hat can see orders
    that a guide never draws. The evidence is therefore compared with that of other draws, such as the prior's: the mean
    weight of any proposal exceeds p(x) by c nats with a probability of at most exp(-c), so where they find 3 nats more
    than the guide does, the guide misses orders.

    Args:
        log_weight: nats, [K, B], or [chain, draw, sequence]; -inf where a draw is outside the model's support.
        reference: the same for draws of another proposal, see `prior_log_weights`.

    Returns:
        Variables over `sequence`: `pareto_k`; `ess`, the effective number of draws 1 / sum_k w_k^2 of the normalised
        raw weights; `log_evidence`, log mean_k w_k in nats, the importance-sampling estimate of log p(x); `elbo`, the
        mean log-weight in nats; with a reference `missed`, its log-evidence minus that of the guide, nats; `trusted`:
        k is below its threshold, nothing is missed, and where k is -inf there was a reference to say so. Attributes:
        `num_samples`, `threshold`, and `summary`, one sentence.

    Raises:
        UserError: fewer than 25 draws, or weights that are not numbers.
    """
    weights = _draws_first(log_weight)
    size = len(weights)
    if size < FEWEST:
        raise UserError("num_samples", f"{size} draws have no tail to fit", f"draw at least {FEWEST}, better 1000")
    threshold = khat_threshold(size)
    shape = pareto_k(weights)
    log_mean = _log_mean(weights)
    with np.errstate(invalid="ignore"):
        normalised = np.exp(weights - log_mean) / size
    found = {
        "pareto_k": shape,
        "ess": 1 / (normalised**2).sum(0),
        "log_evidence": log_mean,
        "elbo": weights.mean(0),
    }
    missed = np.full_like(log_mean, np.nan)
    if reference is not None:
        other = _draws_first(reference)
        if other.shape[1] != weights.shape[1]:
            problem = f"{other.shape[1]} sequences for {weights.shape[1]}"
            raise UserError("reference", problem, "draw them for the same batch")
        missed = found["missed"] = _log_mean(other) - log_mean
    trusted = (shape <= threshold) & ~(missed > MISSED) & ~(np.isneginf(shape) & np.isnan(missed))
    found["trusted"] = trusted
    summary = (
        f"importance weights can be used for {int(trusted.sum())} of {len(shape)} sequences: k-hat is at most "
        f"{threshold:.2f} for {int((shape <= threshold).sum())} (largest {shape.max():.2f}, {size} draws each)"
    )
    if reference is not None:
        summary += f", other draws find more evidence for {int((missed > MISSED).sum())}"
    attrs = {"num_samples": size, "threshold": threshold, "summary": summary}
    return xr.Dataset({name: ("sequence", values) for name, values in found.items()}, attrs=attrs)


def pareto_k(log_weight: Weights) -> Array:
    """k-hat of every sequence, float64 [B]; see `importance_report`."""
    weights = _draws_first(log_weight)
    tail = int(np.ceil(min(len(weights) / 5, 3 * len(weights) ** 0.5)))
    weights, repeats = _ties_merged(weights, 2 * tail)
    shape = psis(np.ascontiguousarray(weights.T))
    return np.where(repeats >= SEEN_OFTEN, -np.inf, shape)


def _ties_merged(weights: Array, top: int) -> tuple[Array, Array]:
    """Weights [K, B] whose `top` largest are equal where only rounding differs, and the count of the largest.

    Orders are discrete and are drawn again and again: exceedances made of rounding errors would pass for a heavy tail.
    """
    merged = np.sort(weights, 0)
    start = max(len(merged) - top, 1)
    for rank in range(start, len(merged)):
        close = merged[rank] - merged[rank - 1] < SAME
        merged[rank] = np.where(close, merged[rank - 1], merged[rank])
    return merged, (merged == merged[-1]).sum(0)


def bound_curve(log_weight: Weights, evidence: Weights | None = None, sizes: Sequence[int] | None = None) -> xr.Dataset:
    """Importance-weighted bound L_K as a function of K (Burda et al., arXiv 1509.00519).

        L_K = E[ log 1/K sum_{k <= K} w_k ] <= L_{K+1} <= log p(x)

    For each K the draws are cut into disjoint groups of K, so that every point is unbiased for L_K; with a single
    group there is no standard error (NaN).

    Args:
        log_weight: nats, [N, B], or [chain, draw, sequence].
        evidence: exact log p(x) of the model, nats [B], where it is known.
        sizes: values of K, each at most N; about three a decade from 1 to N when left out.

    Returns:
        Over `K` and `sequence`: `bound`, `standard_error` and, with an evidence, `gap` = log p(x) - L_K; over `K` their
        means over sequences, `mean_bound`, `mean_standard_error` (of the draws, for fixed sequences), `mean_gap`.
        `groups` over `K` counts the groups. All in nats per sequence.

    Raises:
        UserError: a size below 1 or above N.
    """
    weights = _draws_first(log_weight)
    total, batch = weights.shape
    chosen = _sizes(total) if sizes is None else sorted(set(sizes))
    if not chosen or chosen[0] < 1 or chosen[-1] > total:
        raise UserError("sizes", f"{list(chosen)} are not within 1..{total}", "draw more, or ask for smaller K")
    bound, error = np.empty((len(chosen), batch)), np.full((len(chosen), batch), np.nan)
    for index, size in enumerate(chosen):
        groups = total // size
        values = _log_mean(weights[: groups * size].reshape(size, groups, batch))  # [groups, B], as `importance_bound`
        bound[index] = values.mean(0)
        if groups > 1:
            with np.errstate(invalid="ignore"):
                error[index] = values.std(0, ddof=1) / groups**0.5
    both = ("K", "sequence")
    curve = xr.Dataset({"bound": (both, bound), "standard_error": (both, error)}, coords={"K": list(chosen)})
    curve["groups"] = ("K", [total // size for size in chosen])
    curve["mean_bound"] = ("K", bound.mean(1))
    curve["mean_standard_error"] = ("K", (error**2).sum(1) ** 0.5 / batch)
    if evidence is not None:
        exact = np.asarray(evidence, dtype=np.float64)
        if exact.shape != (batch,):
            remedy = f"give [{batch}], one number per sequence"
            raise UserError("evidence", f"has the shape {list(exact.shape)}", remedy)
        curve["evidence"] = ("sequence", exact)
        curve["gap"] = curve["evidence"] - curve["bound"]
        curve["mean_gap"] = curve["gap"].mean("sequence")
    return curve.transpose("K", "sequence", ...)


def _sizes(total: int) -> list[int]:
    steps = [base * 10**power for power in range(int(np.log10(total)) + 1) for base in (1, 2, 5)]
    return sorted({size for size in steps if size <= total} | {total})


def _log_mean(weights: Array) -> Array:
    return np.asarray(log_mean_exp(torch.from_numpy(weights)).numpy())


def _draws_first(log_weight: Weights) -> Array:
    """Weights as float64 [K, B]."""
    if isinstance(log_weight, xr.DataArray):
        if "chain" in log_weight.dims:
            log_weight = log_weight.stack(sample=("chain", "draw")).transpose("sample", "sequence")
        log_weight = log_weight.values
    weights = np.asarray(log_weight, dtype=np.float64)
    if weights.ndim != 2 or weights.size == 0:
        raise UserError("log_weight", f"has the shape {list(weights.shape)}", "give draws by sequences, [K, B]")
    if np.isnan(weights).any() or np.isposinf(weights).any():
        raise UserError("log_weight", "holds NaN or infinity", "look for a log-density that is no number")
    return weights
