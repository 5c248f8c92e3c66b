"""Statistics of drawn orders.

Every function takes `reveal_step` with the dimensions chain, draw, sequence and position, as in the groups `posterior`
and `prior` of an InferenceData, NaN or -1 where nothing is revealed: at given positions and padding. These never count:
neighbours are neighbours among the positions to reveal, and n below is their number. r_i is the step that reveals
position i, z_t the set revealed at step t, M_t the positions still masked before it. What is undefined is NaN.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import xarray as xr
from scipy.stats import rankdata

from orderppl.diagnostics.backend import Array
from orderppl.errors import UserError

SAMPLE = ("chain", "draw")
TYPES = ("digit", "operator", "=", "####", "word", "other")

# ---- of positions, over draws


def mean_step(reveal_step: xr.DataArray) -> xr.DataArray:
    """E[r_i], float [sequence, position]."""
    return revealed_steps(reveal_step).mean(SAMPLE)


def step_probs(reveal_step: xr.DataArray, num_steps: int) -> xr.DataArray:
    """P(r_i = t), float [sequence, position, step]."""
    return (reveal_step == _steps(num_steps)).where(reveal_step >= 0).mean(SAMPLE)


def step_entropy(reveal_step: xr.DataArray, num_steps: int) -> xr.DataArray:
    """H[r_i] = - sum_t P(r_i = t) log P(r_i = t), nats, float [sequence, position]; at most log T."""
    probs = step_probs(reveal_step, num_steps)
    return -(probs * np.log(probs.where(probs > 0, 1.0))).sum("step", skipna=False)


def precedence(reveal_step: xr.DataArray) -> xr.DataArray:
    """P(r_i < r_j), float [sequence, position, other]; 1 - P_ij - P_ji is the probability of the same step."""
    steps = revealed_steps(reveal_step).transpose(*SAMPLE, "sequence", "position")
    values = steps.values.reshape((-1,) + steps.shape[2:])  # [N, B, S]
    found = np.empty(values.shape[1:] + values.shape[-1:])
    for row in range(len(found)):  # all sequences at once would need N B S^2 entries
        one, two = values[:, row, :, None], values[:, row, None, :]
        found[row] = np.where(np.isnan(one[0]) | np.isnan(two[0]), np.nan, (one < two).mean(0))
    coords = {name: steps[name] for name in ("sequence", "position", "token") if name in steps.coords}
    return xr.DataArray(
        found, dims=("sequence", "position", "other"), coords=coords | {"other": steps["position"].values}
    )


# ---- of whole orders, by draw


def kendall_left_to_right(reveal_step: xr.DataArray) -> xr.DataArray:
    """Kendall's tau-b of reveal steps and positions, float [chain, draw, sequence]: 1 is left to right, -1 the reverse.

        tau_b = sum_{i < j} sign(r_j - r_i) / sqrt(n0 (n0 - ties)),    n0 = n (n - 1) / 2,  ties = #{i < j : r_i = r_j}

    NaN where everything is revealed in one step.
    """

    def tau(steps: Array) -> Array:
        signs = _pair_signs(steps)
        return _ratio(signs.sum(-1), np.sqrt((signs != 0).sum(-1) * float(signs.shape[-1])))

    return _by_draw(reveal_step, tau)


def spearman_left_to_right(reveal_step: xr.DataArray) -> xr.DataArray:
    """Spearman's rho of reveal steps and positions, ties at their mean rank, float [chain, draw, sequence]."""

    def rho(steps: Array) -> Array:
        return rank_correlation(steps.astype(float), np.broadcast_to(np.arange(steps.shape[-1]), steps.shape))

    return _by_draw(reveal_step, rho)


def set_sizes(reveal_step: xr.DataArray, num_steps: int) -> xr.DataArray:
    """|z_t|, int [chain, draw, sequence, step]."""
    return (reveal_step == _steps(num_steps)).sum("position")


def revealed_fraction(reveal_step: xr.DataArray, num_steps: int) -> xr.DataArray:
    """Share of the positions to reveal that are visible after each step, float [chain, draw, sequence, step]."""
    return set_sizes(reveal_step, num_steps).cumsum("step") / (reveal_step >= 0).sum("position")


def forced_share(reveal_step: xr.DataArray, num_steps: int) -> xr.DataArray:
    """Share of the positions that the last step reveals because nothing else is left, float [chain, draw, sequence]."""
    return (reveal_step == num_steps - 1).sum("position") / (reveal_step >= 0).sum("position")


def empty_steps(reveal_step: xr.DataArray, num_steps: int) -> xr.DataArray:
    """Steps before the last used one that reveal nothing: forwards for nothing, int [chain, draw, sequence]."""
    sizes = set_sizes(reveal_step, num_steps)
    return ((sizes == 0) & (sizes.step <= reveal_step.max("position"))).sum("step")


def adjacency(reveal_step: xr.DataArray) -> xr.DataArray:
    """How much more often neighbours are revealed together than any two positions, float [chain, draw, sequence].

        share of i with r_i = r_{i+1}  /  share of pairs i < j with r_i = r_j

    1 is what chance gives, 0 means that neighbours are never revealed together, n/2 is the largest value. NaN where no
    two positions are revealed together.
    """

    def ratio(steps: Array) -> Array:
        return _ratio((np.diff(steps, axis=-1) == 0).mean(-1), (_pair_signs(steps) == 0).mean(-1))

    return _by_draw(reveal_step, ratio)


def global_arness(reveal_step: xr.DataArray, k: int = 1) -> xr.DataArray:
    """Global AR-ness@k for reveal sets, after Gong et al., arXiv 2506.20639; float [chain, draw, sequence].

        share of positions i that are among the leftmost |z_t| - 1 + k positions of M_t,    t = r_i

    With one position a step it is the share of steps that reveal one of the k leftmost masked positions. 1 is left to
    right, in blocks or not.
    """
    _check_k(k)

    def share(steps: Array) -> Array:
        hits = np.zeros(len(steps))
        for step in range(int(steps.max(initial=-1)) + 1):
            revealed, rank = steps == step, (steps >= step).cumsum(-1) - 1
            hits += (revealed & (rank < revealed.sum(-1, keepdims=True) - 1 + k)).sum(-1)
        return hits / steps.shape[-1]

    return _by_draw(reveal_step, share, at_least=1)


def local_arness(reveal_step: xr.DataArray, k: int = 1) -> xr.DataArray:
    """Local AR-ness@k for reveal sets, after Gong et al., arXiv 2506.20639; float [chain, draw, sequence].

        share of the n - k spans i-k..i in which r_{j-1} <= r_j <= r_{j-1} + 1 for every neighbour

    With one position a step it is the share of spans of k + 1 positions that are revealed one right after the other
    from the left. A set counts as revealed from left to right within itself; everything in one step has the value 1.
    """
    _check_k(k)

    def share(steps: Array) -> Array:
        follows = np.isin(np.diff(steps, axis=-1), (0, 1))
        return np.lib.stride_tricks.sliding_window_view(follows, k, axis=-1).all(-1).mean(-1)

    return _by_draw(reveal_step, share, at_least=k + 1)


# ---- of all draws together, by sequence


def kendall_between_draws(reveal_step: xr.DataArray) -> xr.DataArray:
    """Kendall's tau-b between draws, mean over the disjoint pairs of successive draws, float [sequence].

        tau_b(r, r') = sum_{i < j} sign(r_j - r_i) sign(r'_j - r'_i) / sqrt((n0 - ties) (n0 - ties'))

    1 where all draws have the same order; near 0 where draws share nothing.
    """

    def tau(steps: Array) -> float:
        signs = _pair_signs(steps[: len(steps) // 2 * 2])
        one, two = signs[::2].astype(np.int64), signs[1::2]
        values = _ratio((one * two).sum(-1), np.sqrt((one != 0).sum(-1) * (two != 0).sum(-1).astype(float)))
        return float(np.nanmean(values)) if np.isfinite(values).any() else np.nan

    if reveal_step.sizes["chain"] * reveal_step.sizes["draw"] < 2:
        raise UserError("reveal_step", "a single draw cannot be compared", "draw at least two orders")
    return _by_sequence(reveal_step, tau)


def distinct_orders(reveal_step: xr.DataArray) -> xr.DataArray:
    """Number of different orders among the draws, int [sequence]."""
    return _by_sequence(reveal_step, lambda steps: len(np.unique(steps, axis=0)))


def effective_orders(reveal_step: xr.DataArray) -> xr.DataArray:
    """Effective number of different orders, exp of the entropy of their frequencies, float [sequence].

    At most the number of draws: a value close to it says that there are more orders than draws can show.
    """

    def number(steps: Array) -> float:
        share = np.unique(steps, axis=0, return_counts=True)[1] / len(steps)
        return float(np.exp(-(share * np.log(share)).sum()))

    return _by_sequence(reveal_step, number)


# ---- of kinds of tokens


def token_types(token: Array) -> Array:
    """Kind of every token string: `digit` (whole numerals too), `operator`, `=`, `####`, `word`, `other` or `padding`.

    Marks of word pieces and white space around a token are left out; an empty string is padding.
    """
    patterns = {
        "=": "=",
        "####": "#+",  # some tokenisers split the answer mark
        "digit": r"[0-9]+(\.[0-9]+)?",
        "operator": r"[-+*/\u00d7\u00f7\u2212]",
        "word": r"[^\W\d_]+(['\u2019\-][^\W\d_]+)*",
    }

    def kind(text: str) -> str:
        bare = re.sub("^(##(?!#)|\u0120|\u2581)", "", text).strip()
        found = (name for name, pattern in patterns.items() if re.fullmatch(pattern, bare))
        return next(found, "other") if text else "padding"

    return np.vectorize(kind, otypes=[np.dtype("<U8")])(token)


def token_type_steps(reveal_step: xr.DataArray) -> xr.Dataset:
    """When tokens of a kind are revealed, over all sequences and draws.

    Args:
        reveal_step: see the module, with the coordinate `token` [sequence, position].

    Returns:
        Over `token_type`, kinds that do not occur left out: `mean_step`; `mean_place`, the mean of (r_i + 1) / steps
        used by that order; `tokens`, how many there are.

    Raises:
        UserError: no token strings.
    """
    if "token" not in reveal_step.coords:
        raise UserError("reveal_step", "has no coordinate `token`", "make it with to_inference_data(token_string=...)")
    kinds = xr.DataArray(token_types(reveal_step["token"].values), dims=("sequence", "position"))
    steps = revealed_steps(reveal_step).drop_vars("token")
    kinds = kinds.where(steps.isel(chain=0, draw=0).notnull().values, "padding")
    found = {
        "mean_step": [float(steps.where(kinds == kind).mean()) for kind in TYPES],
        "mean_place": [
            float(((steps + 1) / (steps.max("position") + 1)).where(kinds == kind).mean()) for kind in TYPES
        ],
        "tokens": [int((kinds == kind).sum()) for kind in TYPES],
    }
    whole = xr.Dataset(
        {name: ("token_type", values) for name, values in found.items()}, coords={"token_type": list(TYPES)}
    )
    return whole.isel(token_type=whole["tokens"] > 0)


# ---- shared


def revealed_steps(reveal_step: xr.DataArray) -> xr.DataArray:
    """The steps as floats, NaN where nothing is revealed.

    Raises:
        UserError: an array of other dimensions.
    """
    missing = {*SAMPLE, "sequence", "position"} - set(reveal_step.dims)
    if missing:
        problem = f"lacks the dimensions {', '.join(sorted(missing))}"
        raise UserError("reveal_step", problem, "give that of a posterior or prior group")
    return reveal_step.where(reveal_step >= 0)


def rank_correlation(one: Array, two: Array) -> Array:
    """Spearman's rho along the last dimension, ties at their mean rank, NaN left out in pairs; NaN for a constant."""
    both = np.isfinite(one) & np.isfinite(two)
    ranks = [rankdata(np.where(both, values, np.nan), axis=-1, nan_policy="omit") for values in (one, two)]
    count = np.maximum(both.sum(-1, keepdims=True), 1)
    centred = [np.where(both, rank - np.nansum(rank, -1, keepdims=True) / count, 0.0) for rank in ranks]
    spread = np.sqrt((centred[0] ** 2).sum(-1) * (centred[1] ** 2).sum(-1))
    return _ratio((centred[0] * centred[1]).sum(-1), spread)


def _steps(num_steps: int) -> xr.DataArray:
    return xr.DataArray(np.arange(num_steps), dims="step", coords={"step": np.arange(num_steps)})


def _pair_signs(steps: Array) -> Array:
    """sign(r_j - r_i) of all pairs i < j, int8 [N, n (n - 1) / 2]."""
    first, second = np.triu_indices(steps.shape[-1], 1)
    small = steps.astype(np.int16)
    return np.sign(small[:, second] - small[:, first]).astype(np.int8)


def _ratio(top: Array, bottom: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(bottom > 0, top / bottom, np.nan))


def _by_sequence(reveal_step: xr.DataArray, function: Callable[[Array], Array | float]) -> xr.DataArray:
    """A function of the steps of the positions to reveal, int [N, n] -> a number or [N], of every sequence."""
    values = revealed_steps(reveal_step).transpose(*SAMPLE, "sequence", "position").values
    values = values.reshape((-1,) + values.shape[2:])  # [N, B, S]
    there = ~np.isnan(values[0])
    found = np.stack([function(values[:, row, there[row]].astype(np.int64)) for row in range(values.shape[1])], -1)
    dims = ("draw", "sequence")[-found.ndim :]
    return xr.DataArray(found, dims=dims, coords={"sequence": reveal_step["sequence"].values})


def _by_draw(reveal_step: xr.DataArray, function: Callable[[Array], Array], at_least: int = 2) -> xr.DataArray:
    """The same for functions [N, n] -> [N], as [chain, draw, sequence]; NaN for shorter sequences."""

    def safe(steps: Array) -> Array:
        return function(steps) if steps.shape[-1] >= at_least else np.full(len(steps), np.nan)

    like = reveal_step.isel(position=0, drop=True).transpose(*SAMPLE, "sequence")
    return like.drop_vars("token", errors="ignore").copy(
        data=_by_sequence(reveal_step, safe).values.reshape(like.shape)
    )


def _check_k(k: int) -> None:
    if k < 1:
        raise UserError("k", f"{k} is not positive", "use 1 or more")
