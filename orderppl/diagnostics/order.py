"""Statistics of drawn orders.

Every function takes `reveal_step`, int64 with the dimensions chain, draw, sequence and position, as in the groups
`posterior` and `prior` of an InferenceData, -1 at padding. Padding never counts: neighbours are neighbouring attended
positions, and n below is the number of attended positions of a sequence. r_i is the step that reveals position i, z_t
the set revealed at step t, M_t the positions still masked before it. What is undefined is NaN.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.stats import rankdata

from orderppl.errors import UserError

Array = NDArray[Any]
SAMPLE = ("chain", "draw")


def mean_step(reveal_step: xr.DataArray) -> xr.DataArray:
    """E[r_i], float [sequence, position]."""
    return attended(reveal_step).mean(SAMPLE)


def step_probs(reveal_step: xr.DataArray, num_steps: int) -> xr.DataArray:
    """P(r_i = t), float [sequence, position, step]."""
    steps = xr.DataArray(np.arange(num_steps), dims="step", coords={"step": np.arange(num_steps)})
    return (attended(reveal_step) == steps).where(reveal_step >= 0).mean(SAMPLE)


def step_entropy(reveal_step: xr.DataArray, num_steps: int) -> xr.DataArray:
    """H[r_i] = - sum_t P(r_i = t) log P(r_i = t), nats, float [sequence, position]; at most log T."""
    probs = step_probs(reveal_step, num_steps)
    terms = probs * np.log(probs.where(probs > 0, 1.0))
    return -terms.sum("step", skipna=False)


def precedence(reveal_step: xr.DataArray) -> xr.DataArray:
    """P(r_i < r_j), float [sequence, position, other]; 1 - P_ij - P_ji is the probability of the same step."""
    steps = attended(reveal_step).transpose(*SAMPLE, "sequence", "position")
    values = steps.values.reshape((-1,) + steps.shape[2:])  # [N, B, L]
    found = np.empty(values.shape[1:] + values.shape[-1:])
    for row in range(len(found)):  # all sequences at once would need N B L^2 entries
        one, two = values[:, row, :, None], values[:, row, None, :]
        found[row] = np.where(np.isnan(one[0]) | np.isnan(two[0]), np.nan, (one < two).mean(0))
    coords = {name: steps[name] for name in ("sequence", "position", "token") if name in steps.coords}
    other = steps["position"].values
    return xr.DataArray(found, dims=("sequence", "position", "other"), coords={**coords, "other": other})


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


def kendall_between_draws(reveal_step: xr.DataArray) -> xr.DataArray:
    """Kendall's tau-b between draws, mean over the disjoint pairs of successive draws, float [sequence].

        tau_b(r, r') = sum_{i < j} sign(r_j - r_i) sign(r'_j - r'_i) / sqrt((n0 - ties) (n0 - ties'))

    1 where all draws have the same order; near 0 where draws share nothing.
    """

    def tau(steps: Array) -> Array:
        signs = _pair_signs(steps[: len(steps) // 2 * 2])
        one, two = signs[::2].astype(np.int64), signs[1::2]
        scale = np.sqrt((one != 0).sum(-1) * (two != 0).sum(-1).astype(float))
        values = _ratio((one * two).sum(-1), scale)
        return np.array([np.nanmean(values) if np.isfinite(values).any() else np.nan])

    if reveal_step.sizes["chain"] * reveal_step.sizes["draw"] < 2:
        raise UserError("reveal_step", "a single draw cannot be compared", "draw at least two orders")
    return _by_sequence(reveal_step, tau).isel(value=0)


def set_sizes(reveal_step: xr.DataArray, num_steps: int) -> xr.DataArray:
    """|z_t|, int [chain, draw, sequence, step]."""
    steps = xr.DataArray(np.arange(num_steps), dims="step", coords={"step": np.arange(num_steps)})
    return (reveal_step == steps).sum("position")


def revealed_fraction(reveal_step: xr.DataArray, num_steps: int, padding: bool = False) -> xr.DataArray:
    """Share of the positions that are visible after each step, float [chain, draw, sequence, step].

    Args:
        reveal_step: see the module.
        num_steps: T.
        padding: count padding as visible from the start, as in the canvas that a denoiser reads.
    """
    revealed = set_sizes(reveal_step, num_steps).cumsum("step")
    visible = (reveal_step < 0).sum("position")
    if padding:
        return (revealed + visible) / reveal_step.sizes["position"]
    return revealed / (reveal_step.sizes["position"] - visible)


def adjacency(reveal_step: xr.DataArray) -> xr.DataArray:
    """How much more often neighbours are revealed together than any two positions, float [chain, draw, sequence].

        share of i with r_i = r_{i+1}  /  share of pairs i < j with r_i = r_j

    1 is what chance gives, 0 means that neighbours are never revealed together, n/2 is the largest value. NaN where no
    two positions are revealed together.
    """

    def ratio(steps: Array) -> Array:
        neighbours = (np.diff(steps, axis=-1) == 0).mean(-1)
        return _ratio(neighbours, (_pair_signs(steps) == 0).mean(-1))

    return _by_draw(reveal_step, ratio, at_least=2)


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
            revealed, masked = steps == step, steps >= step
            rank = masked.cumsum(-1) - 1
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


def distinct_orders(reveal_step: xr.DataArray) -> xr.DataArray:
    """Number of different orders among the draws, int [sequence]."""
    return _by_sequence(reveal_step, lambda steps: np.array([len(np.unique(steps, axis=0))])).isel(value=0)


def effective_orders(reveal_step: xr.DataArray) -> xr.DataArray:
    """Effective number of different orders, exp of the entropy of their frequencies, float [sequence].

    At most the number of draws: a value close to it says that there are more orders than draws can show.
    """

    def number(steps: Array) -> Array:
        _, counts = np.unique(steps, axis=0, return_counts=True)
        share = counts / counts.sum()
        return np.array([np.exp(-(share * np.log(share)).sum())])

    return _by_sequence(reveal_step, number).isel(value=0)


def forced_share(reveal_step: xr.DataArray, num_steps: int) -> xr.DataArray:
    """Share of the positions that the last step reveals because nothing else is left, float [chain, draw, sequence]."""
    return (reveal_step == num_steps - 1).sum("position") / (reveal_step >= 0).sum("position")


def empty_steps(reveal_step: xr.DataArray, num_steps: int) -> xr.DataArray:
    """Steps before the last used one that reveal nothing: forwards for nothing, int [chain, draw, sequence]."""
    sizes = set_sizes(reveal_step, num_steps)
    return ((sizes == 0) & (sizes.step <= reveal_step.max("position"))).sum("step")


TYPES = ("digit", "operator", "=", "####", "word", "other")


def token_types(token: Array) -> Array:
    """Kind of every token string: `digit` (whole numerals too), `operator`, `=`, `####`, `word`, `other` or `padding`.

    Marks of word pieces and white space around a token are left out; an empty string is padding.
    """

    def kind(text: str) -> str:
        bare = re.sub("^(##(?!#)|\u0120|\u2581)", "", text).strip()
        if not text:
            return "padding"
        if bare == "=":
            return "="
        if re.fullmatch("#+", bare):  # some tokenisers split the answer mark
            return "####"
        if re.fullmatch(r"[0-9]+(\.[0-9]+)?", bare):
            return "digit"
        if re.fullmatch(r"[-+*/\u00d7\u00f7\u2212]", bare):
            return "operator"
        return "word" if re.fullmatch(r"[^\W\d_]+(['\u2019\-][^\W\d_]+)*", bare) else "other"

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
    steps = attended(reveal_step).drop_vars("token")
    place = (steps + 1) / (steps.max("position") + 1)
    there = (reveal_step.drop_vars("token") >= 0).isel(chain=0, draw=0)
    found = [kind for kind in TYPES if bool(((kinds == kind) & there).any())]
    return xr.Dataset(
        {
            "mean_step": ("token_type", [float(steps.where(kinds == kind).mean()) for kind in found]),
            "mean_place": ("token_type", [float(place.where(kinds == kind).mean()) for kind in found]),
            "tokens": ("token_type", [int(((kinds == kind) & there).sum()) for kind in found]),
        },
        coords={"token_type": found},
    )


# ---- shared


def attended(reveal_step: xr.DataArray) -> xr.DataArray:
    """Reveal steps as floats, NaN at padding."""
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


def _pair_signs(steps: Array) -> NDArray[np.int8]:
    """sign(r_j - r_i) of all pairs i < j, int8 [N, n (n - 1) / 2]."""
    first, second = np.triu_indices(steps.shape[-1], 1)
    small = steps.astype(np.int16)
    return np.sign(small[:, second] - small[:, first]).astype(np.int8)


def _ratio(top: Array, bottom: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(bottom > 0, top / bottom, np.nan))


def _by_sequence(reveal_step: xr.DataArray, function: Callable[[Array], Array]) -> xr.DataArray:
    """Apply a function of the attended positions' steps, int [N, n], to every sequence: [value, sequence]."""
    attended(reveal_step)
    values = reveal_step.transpose(*SAMPLE, "sequence", "position").values
    values = values.reshape((-1,) + values.shape[2:])  # [N, B, L]
    columns = [function(values[:, row][:, values[0, row] >= 0]) for row in range(values.shape[1])]
    return xr.DataArray(
        np.stack(columns, -1), dims=("value", "sequence"), coords={"sequence": reveal_step["sequence"].values}
    )


def _by_draw(reveal_step: xr.DataArray, function: Callable[[Array], Array], at_least: int = 2) -> xr.DataArray:
    """The same for functions [N, n] -> [N], as [chain, draw, sequence]; NaN for shorter sequences."""

    def safe(steps: Array) -> Array:
        return function(steps) if steps.shape[-1] >= at_least else np.full(len(steps), np.nan)

    flat = _by_sequence(reveal_step, safe)
    shape = [reveal_step.sizes[dim] for dim in (*SAMPLE, "sequence")]
    coords = {dim: reveal_step[dim].values for dim in (*SAMPLE, "sequence") if dim in reveal_step.coords}
    return xr.DataArray(flat.values.reshape(shape), dims=(*SAMPLE, "sequence"), coords=coords)


def _check_k(k: int) -> None:
    if k < 1:
        raise UserError("k", f"{k} is not positive", "use 1 or more")
