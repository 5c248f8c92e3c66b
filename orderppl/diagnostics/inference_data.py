"""From a (model, guide) pair and a batch to an arviz InferenceData."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from orderppl import __version__
from orderppl.decoding.decode import evaluation_mode
from orderppl.diagnostics.backend import Array, InferenceData, add_groups
from orderppl.diagnostics.draws import STATES, checked, drawn, numbers, scored, seeded
from orderppl.diagnostics.statistics import STATISTICS, order_statistics
from orderppl.distributions import SetDistribution
from orderppl.distributions.order_distribution import SetSequence, kl_by_step
from orderppl.errors import UserError
from orderppl.inference.programs import Program, RevealSites
from orderppl.policies import Oracle
from orderppl.policies.scores import confidence, margin, prediction_entropy
from orderppl.unmasking import Batch
from orderppl.unmasking.trajectory import VISIBLE, Path, Trajectory, steps_used

POSITION_SCORES: dict[str, Callable[[Any], Tensor]] = {  # of every heuristic: the higher, the sooner it reveals
    "top_prob": confidence,
    "margin": margin,
    "entropy": lambda state: -prediction_entropy(state),
    "oracle_margin": Oracle("margin").scores,
}
Parts = dict[tuple[str, str], Tensor]
"""Tensors [K, B, ..] by group and variable."""

LEAD = ("chain", "draw")
SEQUENCE, POSITION = ("sequence",), ("sequence", "position")
STEP, STATE = ("sequence", "step"), ("sequence", "step", "position")
DIMS: dict[tuple[str, str], tuple[str, ...]] = {  # of what has more than a number per sequence, by group and variable
    ("posterior", "reveal_step"): POSITION,
    ("prior", "reveal_step"): POSITION,
    ("posterior_predictive", "tokens"): POSITION,
    **{("sample_stats", name): STEP for name in ("kl_step", "log_likelihood_step")},
    ("correlation", "set_correlation"): STEP,
    **{("states", name): STATE for name in ("masked", "guide_prob", "prior_prob", *POSITION_SCORES)},
}


def to_inference_data(
    model: Program,
    guide: Program,
    batch: Batch | Tensor,
    *,
    num_samples: int = 200,
    num_state_draws: int = 20,
    num_correlation_draws: int = 0,
    token_string: Callable[[int], str] = str,
    seed: int = 0,
    max_states: int = STATES,
) -> InferenceData:
    """Draw orders for a batch and keep everything that order diagnostics need.

    Draws are independent; they are laid out as 4, 2 or 1 chains, whatever divides their numbers, for functions of arviz
    that want several. Groups (dimensions after chain and draw):

    - `posterior`: `reveal_step` [sequence, position] from the guide, missing (NaN) where nothing is revealed: at given
      positions and padding; `prior`: the same from the model's policy, followed along the observed tokens where it
      depends on them; `sample_stats_prior`: `log_weight`, p(x, r) / p(r) of these, nats
    - `posterior_predictive`: `tokens`, each redrawn at the true state in which the drawn order reveals it;
      `observed_data`: `tokens`; -1 at padding
    - `log_likelihood`: `tokens` [sequence], log p(x | r), nats. `arviz.loo` of it means nothing: an order belongs to
      its own sequence. Whether the guide can be trusted is said by `importance_report`
    - `sample_stats`: `log_q`, `log_prior`, `log_factor` (further factors, such as the price of the steps), `log_joint`,
      `log_weight` (nats) and `steps_used` [sequence]; by step, `log_likelihood_step`, the log-likelihood of what the
      step reveals, and `kl_step`, KL(guide || prior) of the set given what is masked, or the log-ratio of the drawn set
      where that has no closed form: the parts of the ELBO
    - `states`, for the first draws only: what guide, prior and heuristics want in every state [sequence, step,
      position], NaN where nothing is masked: `guide_prob` and `prior_prob` of revealing, where the sets have a closed
      form for it, and the score by which each heuristic ranks (`top_prob`, `margin`, `entropy` as minus the entropy,
      `oracle_margin`, which sees the truth)
    - `correlation`, on demand: `set_correlation` [sequence, step], see `set_correlation`
    - `constant_data`: `attention_mask`, `given`
    - `order_statistics`, see `order_statistics`

    The token strings are a coordinate `token` [sequence, position] of all groups with positions, empty at padding.

    Args:
        model: an unmasking program.
        guide: its guide.
        batch: clean sequences.
        num_samples: draws per sequence from guide and prior.
        num_state_draws: draws whose states are kept; 0 for none.
        num_correlation_draws: draws whose set correlation is measured, with one denoiser row per position; 0 for none.
        token_string: token id -> what to show for it.
        seed: of the draws; torch's global random state is left as it was.
        max_states: see `draw_orders`.

    Raises:
        UserError: see `draw_orders`.
    """
    batch = checked(batch)
    if num_state_draws < 0 or num_correlation_draws < 0:
        raise UserError("num_state_draws", "is negative", "use 0 to leave the group out")
    parts: defaultdict[tuple[str, str], list[Tensor]] = defaultdict(list)
    done = 0
    with torch.no_grad(), evaluation_mode(model, guide), seeded(seed, batch.device):
        for sites in drawn(model, guide, batch, num_samples, max_states):
            orders, likelihood = sites.guide["value"], sites.tokens["fn"]
            found = _numbers(sites) | _by_step(sites, num_state_draws - done)
            prior = numbers(scored(model, batch, len(orders)))
            found["prior", "reveal_step"] = _missing(prior.reveal_step)
            found["sample_stats_prior", "log_weight"] = prior.log_weight
            predicted = likelihood.sample().expand(orders.shape)
            found["posterior_predictive", "tokens"] = predicted.masked_fill(~batch.attention_mask, VISIBLE)
            for order in orders[: max(num_correlation_draws - done, 0)]:
                by_step = set_correlation(likelihood.path, order, max_states)
                parts["correlation", "set_correlation"].append(by_step[None].cpu())
            for key, values in found.items():
                parts[key].append(values.cpu())
            done += len(orders)
    counts = (num_samples, min(num_state_draws, num_samples), min(num_correlation_draws, num_samples))
    chains = next(count for count in (4, 2, 1) if all(number % count == 0 for number in counts))
    arrays = {key: _chained(torch.cat(values), chains) for key, values in parts.items()}
    num_steps = arrays["sample_stats", "log_likelihood_step"].shape[-1]
    notes = {"num_steps": num_steps, "num_samples": num_samples, "seed": seed}
    notes |= {"model": type(model).__name__, "guide": type(guide).__name__}
    strings = [
        [token_string(token) if is_there else "" for token, is_there in zip(*row, strict=True)]
        for row in zip(batch.readable.tolist(), batch.attention_mask.tolist(), strict=True)
    ]
    data = _inference_data(arrays, batch, np.array(strings, dtype=np.str_), notes)
    add_groups(data, {STATISTICS: order_statistics(data)})
    return data


def _inference_data(
    arrays: Mapping[tuple[str, str], Array], batch: Batch, strings: Array, notes: Mapping[str, Any]
) -> InferenceData:
    """Groups of arrays [chain, draw, ..] by group and variable, and what is observed."""
    attrs = {"inference_library": "orderppl", "inference_library_version": __version__, **notes}
    variables: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for key, values in arrays.items():
        variables[key[0]][key[1]] = ((*LEAD, *DIMS.get(key, SEQUENCE)), values)
    given = batch.attention_mask & ~batch.latent
    tokens = batch.tokens.masked_fill(~batch.attention_mask, VISIBLE)
    variables["observed_data"]["tokens"] = (POSITION, _array(tokens))
    variables["constant_data"] = {
        "attention_mask": (POSITION, _array(batch.attention_mask)),
        "given": (POSITION, _array(given)),
    }
    data = InferenceData(attrs=attrs)
    for name, own in variables.items():
        dataset = xr.Dataset(own, attrs=attrs)
        dataset = dataset.assign_coords({dim: np.arange(size) for dim, size in dataset.sizes.items()})
        if "position" in dataset.dims:
            dataset = dataset.assign_coords(token=(POSITION, strings))
        add_groups(data, {name: dataset})
    return data


def set_correlation(path: Path, reveal_step: Tensor, max_states: int = STATES) -> Tensor:
    """What revealing the positions of a set together costs against one after another from the left, by step.

        c_t = sum_{i in z_t} [ log p(x_i | s_t, x_j for j < i in z_t) - log p(x_i | s_t) ]

    The pointwise conditional total correlation of z_t given s_t under the denoiser, at the true tokens: its mean over x
    is the total correlation if the denoiser's conditionals are consistent. The sum over t is what the order loses
    against revealing one position a step, log p(x) - log p(x | r) for an exact denoiser.

    Args:
        path: the sequences.
        reveal_step: int64 [B, S], an order of them.
        max_states: rows of a denoiser call.

    Returns:
        Nats, float [B, T].
    """
    length = reveal_step.shape[-1]
    place = torch.arange(length, device=reveal_step.device)
    hidden = reveal_step >= 0
    alone = (reveal_step * length + place).argsort(-1).argsort(-1)  # visible positions come first, in whatever order
    alone = (alone - (~hidden).sum(-1, keepdim=True)).masked_fill(~hidden, VISIBLE)  # one position a step
    one_by_one = Path(path.batch, path.denoiser, max(int(alone.max()) + 1, 1))
    together = _log_prob_at(path, reveal_step, max_states)
    gain = _log_prob_at(one_by_one, alone, max_states) - together  # [B, S]
    steps = torch.arange(path.num_steps, device=reveal_step.device)
    return gain.unsqueeze(-1).masked_fill(reveal_step.unsqueeze(-1) != steps, 0.0).sum(-2)


def _log_prob_at(path: Path, order: Tensor, max_states: int) -> Tensor:
    """log p(x_i | s_{r_i}) of every position of one order, float [B, S]; 0 where nothing is revealed."""
    total = torch.zeros(order.shape, device=order.device)
    for steps in torch.arange(path.num_steps, device=order.device).split(max(1, max_states // len(order))):
        step = steps.unsqueeze(-1).expand(-1, len(order))  # [s, B]
        log_prob = path.state(order >= step.unsqueeze(-1), step).token_log_prob(path.batch.readable)  # [s, B, S]
        total = total + log_prob.masked_fill(order != step.unsqueeze(-1), 0.0).sum(0)
    return total


def _numbers(sites: RevealSites) -> Parts:
    draws = numbers(sites)
    names = ("log_q", "log_prior", "log_factor", "log_joint", "log_weight")
    return {
        ("posterior", "reveal_step"): _missing(draws.reveal_step),
        ("log_likelihood", "tokens"): draws.log_likelihood,
        ("sample_stats", "steps_used"): steps_used(draws.reveal_step),
        **{("sample_stats", name): getattr(draws, name) for name in names},
    }


def _by_step(sites: RevealSites, kept: int) -> Parts:
    """Parts of the ELBO by step, each [K, B, T], and what all want in the states of the first `kept` draws."""
    q, p, likelihood = sites.guide["fn"], sites.prior["fn"], sites.tokens["fn"]
    order, trajectory = sites.guide["value"], likelihood.trajectory  # [K, B, S]; its states are [T, K, B, S]
    by_step = likelihood.observed(likelihood.said(trajectory), trajectory.revealed, trajectory.masked)
    q_sets, p_sets = q.sets(order, trajectory), p.sets(order, trajectory)
    try:
        kl = kl_by_step(q_sets, p_sets, q.num_steps)
    except NotImplementedError:  # no closed form for these sets
        kl = q_sets.log_prob(trajectory.revealed) - p_sets.log_prob(trajectory.revealed)
    found: Parts = {("sample_stats", "log_likelihood_step"): by_step}
    found["sample_stats", "kl_step"] = kl.expand(by_step.shape)
    if kept > 0:
        masked = trajectory.masked[:, :kept]
        state = Trajectory(likelihood.path, order[:kept]).states
        values = {name: score(state) for name, score in POSITION_SCORES.items()}
        for name, sets in (("guide_prob", q_sets), ("prior_prob", p_sets)):
            with suppress(NotImplementedError):
                values[name] = _inclusion(sets).expand(trajectory.masked.shape)[:, :kept]
        found |= {("states", name): one.masked_fill(~masked, torch.nan).float() for name, one in values.items()}
        found["states", "masked"] = masked
    return {key: value.movedim(0, 2) for key, value in found.items()}


def _inclusion(sets: SetDistribution | SetSequence) -> Tensor:
    """Probability of revealing each position, float [T, *, S]."""
    return torch.stack([one.probs for one in sets.steps]) if isinstance(sets, SetSequence) else sets.probs


def _missing(reveal_step: Tensor) -> Tensor:
    """Steps as float32, NaN where nothing is revealed: arviz's statistics leave it out."""
    return reveal_step.float().masked_fill(reveal_step < 0, torch.nan)


def _chained(draws: Tensor, chains: int) -> Array:
    """[K, ..] -> [chain, draw, ..]; the first draws of all are the first of each chain."""
    return _array(draws.unflatten(0, (-1, chains)).movedim(1, 0))


def _array(value: Tensor) -> Array:
    return np.asarray(value.detach().cpu().numpy())
