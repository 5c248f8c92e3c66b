"""Do policy and heuristics want what the guide draws? Statistics of the `states` group of an InferenceData.

At step t of a drawn order, before the last one, the guide reveals z_t out of M_t. A score per position (the policy's
reveal probability, or what a heuristic ranks by) agrees with it as far as it is high on z_t and low on the rest.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from scipy.stats import rankdata

from orderppl.diagnostics.backend import Array, InferenceData
from orderppl.diagnostics.order import rank_correlation
from orderppl.errors import UserError

SCORES = ("prior_prob", "guide_prob", "top_prob", "margin", "entropy", "oracle_margin")
DIGITS = 6  # decimals of a score that count; a symmetric denoiser ties positions up to rounding


def agreement(data: InferenceData) -> xr.Dataset:
    """Agreement of every score with the drawn reveal sets, over (score, chain, draw, sequence, step).

    - `auroc`: P(score of a revealed position > score of a kept one), ties count half; 0.5 is chance. NaN where all or
      nothing of M_t is revealed, and at the last step, which has no choice.
    - `overlap`: share of z_t among the |z_t| highest scores of M_t, overlap@k with k = |z_t|; ties count as if
      broken at random.
    - `overlap_chance`: what a random score would have there, |z_t| / |M_t|.
    - `correlation`: Spearman's rho of score and -r_i over M_t: 1 where the order follows the score to its end.

    Raises:
        UserError: no `states` group.
    """
    scores, steps, masked = _states(data)
    revealed = masked & (steps == _step_axis(masked))
    shape = revealed.sum(-1)
    choice = np.broadcast_to(_step_axis(masked)[..., 0] < masked.shape[-2] - 1, shape.shape)
    later = np.where(masked, -steps, np.nan)
    found = {
        "auroc": [auroc(score, revealed, masked) for score in scores.values()],
        "overlap": [overlap(score, revealed, masked) for score in scores.values()],
        "correlation": [rank_correlation(score, later) for score in scores.values()],
    }
    states = data["states"]
    dims = ("chain", "draw", "sequence", "step")
    coords = {dim: states[dim].values for dim in dims} | {"score": list(scores)}
    variables = {name: (("score", *dims), np.where(choice, parts, np.nan)) for name, parts in found.items()}
    result = xr.Dataset(variables, coords=coords)
    with np.errstate(invalid="ignore", divide="ignore"):
        chance = np.where(choice & (shape > 0), shape / masked.sum(-1), np.nan)
    return result.assign(overlap_chance=(dims, chance))


def auroc(score: Array, revealed: Array, masked: Array) -> Array:
    """Area under the ROC curve of a score (float [*, S]) for the revealed among the masked positions, float [*]."""
    ranks = rankdata(np.where(masked, score, np.nan), axis=-1, nan_policy="omit")
    positive, negative = revealed.sum(-1), (masked & ~revealed).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        area = (np.where(revealed, ranks, 0).sum(-1) - positive * (positive + 1) / 2) / (positive * negative)
    return np.where((positive > 0) & (negative > 0), area, np.nan)


def overlap(score: Array, revealed: Array, masked: Array) -> Array:
    """Expected share of the revealed set among as many highest scores, float [*]; NaN for an empty set."""
    hidden = np.where(masked, score, -np.inf)
    size = revealed.sum(-1, keepdims=True)
    least = np.take_along_axis(np.sort(hidden, -1)[..., ::-1], np.maximum(size - 1, 0), -1)
    above, tied = masked & (hidden > least), masked & (hidden == least)
    room = size - above.sum(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = room[..., 0] / tied.sum(-1)
        hits = (revealed & above).sum(-1) + share * (revealed & tied).sum(-1)
        return np.where(size[..., 0] > 0, hits / size[..., 0], np.nan)


def _states(data: InferenceData) -> tuple[dict[str, Array], Array, Array]:
    """Scores by name, reveal steps and masked positions of the kept draws, broadcast to [chain, draw, B, T, S]."""
    if "states" not in data.groups():
        raise UserError("states", "no such group", "make it with to_inference_data(num_state_draws=...)")
    states = data["states"].transpose("chain", "draw", "sequence", "step", "position")
    kept = data["posterior"]["reveal_step"].sel(draw=states["draw"], chain=states["chain"])
    kept = kept.transpose("chain", "draw", "sequence", "position")
    masked = states["masked"].values.astype(bool)
    scores = {name: states[name].values.astype(np.float64).round(DIGITS) for name in SCORES if name in states}
    return scores, np.broadcast_to(kept.values[..., None, :], masked.shape), masked


def _step_axis(masked: Array) -> Array:
    return np.asarray(np.arange(masked.shape[-2])[:, None])
