"""From a (model, guide) pair and a batch to an arviz InferenceData."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import kl_divergence

from orderppl import __version__
from orderppl.decoding import Entropy, Margin, OracleMargin, TopProb
from orderppl.decoding.memory import TRUTH
from orderppl.diagnostics.backend import InferenceData, inference_data
from orderppl.diagnostics.draws import (
    STATES,
    Batch,
    check_batch,
    prior_log_weight,
    scored,
    seeded,
    traced,
    traced_draws,
)
from orderppl.distributions import OrderedPartition, RevealedTokens
from orderppl.errors import UserError
from orderppl.inference.programs import Program
from orderppl.path import RevealPath
from orderppl.states import UnmaskingState, masked_before, reveal_set, steps_used

Array = NDArray[Any]
SCORES = (TopProb(), Margin(), Entropy(), OracleMargin())  # of every heuristic: the higher, the sooner it reveals

BY_SEQUENCE = ["sequence"]
BY_STEP = ["sequence", "step"]
BY_POSITION = ["sequence", "position"]
BY_STATE = ["sequence", "step", "position"]
DIMS = {
    "reveal_step": BY_POSITION,
    "tokens": BY_POSITION,
    "attention_mask": BY_POSITION,
    **dict.fromkeys(("log_q", "log_prior", "log_joint", "log_weight", "log_likelihood", "steps_used"), BY_SEQUENCE),
    **dict.fromkeys(("kl_step", "log_likelihood_step", "set_correlation"), BY_STEP),
    **dict.fromkeys(("masked", "guide_prob", "prior_prob", *(score.name for score in SCORES)), BY_STATE),
}


def to_inference_data(
    model: Program,
    guide: Program,
    batch: Batch,
    *,
    num_samples: int = 200,
    num_state_draws: int = 20,
    num_correlation_draws: int = 0,
    token_string: Callable[[int], str] = str,
    seed: int = 0,
    max_states: int = STATES,
    attrs: Mapping[str, str | int | float] | None = None,
) -> InferenceData:
    """Draw orders for a batch and keep everything that order diagnostics need.

    Groups (dimensions after chain, of size 1, and draw):

    - `posterior`: `reveal_step` [sequence, position] from the guide, -1 at padding; `prior`: the same from the model's
      prior, followed along the observed tokens where it depends on them; `sample_stats_prior`: `log_weight`,
      p(x, r) / p(r) of these, nats
    - `posterior_predictive`: `tokens`, each redrawn at the true state in which the drawn order reveals it;
      `observed_data`: `tokens`
    - `log_likelihood`: `tokens` [sequence], log p(x | r), nats
    - `sample_stats`: `log_q`, `log_prior`, `log_joint`, `log_weight` (nats) and `steps_used` [sequence]; by step,
      `log_likelihood_step`, the log-likelihood of what the step reveals, and `kl_step`, KL(guide || prior) of the set
      given what is masked, or the log-ratio of the drawn set where that has no closed form (missing for a guide that is
      no `OrderedPartition`): the parts of the ELBO
    - `states`, for the first draws only: what guide, prior and heuristics want in every state [sequence, step,
      position], NaN where nothing is masked: `guide_prob` and `prior_prob` of revealing, where the sets have a closed
      form for it, and the score by which each heuristic ranks (`top_prob`, `margin`, `entropy` as minus the entropy,
      `oracle_margin`, which sees the truth)
    - `correlation`, on demand: `set_correlation` [sequence, step], see `set_correlation`
    - `constant_data`: `attention_mask`

    The token strings are a coordinate `token` [sequence, position] of all groups with positions, empty at padding.

    Args:
        model: an unmasking program that looks at all steps.
        guide: its guide.
        batch: `tokens` int64 [B, L] and, where there are, `attention_mask`, `context`, `context_mask`.
        num_samples: draws per sequence from guide and prior.
        num_state_draws: draws whose states are kept; 0 for none.
        num_correlation_draws: draws whose set correlation is measured, with one denoiser row per position; 0 for none.
        token_string: token id -> what to show for it.
        seed: of the draws; torch's global random state is left as it was.
        max_states: see `draw_orders`.
        attrs: further attributes of every group.

    Raises:
        UserError: see `draw_orders`.
    """
    check_batch(batch)
    if num_state_draws < 0 or num_correlation_draws < 0:
        raise UserError("num_state_draws", "is negative", "use 0 to leave the group out")
    tokens = batch["tokens"]
    attention = batch.get("attention_mask")
    attention = torch.ones_like(tokens, dtype=torch.bool) if attention is None else attention.bool()
    drawn: defaultdict[str, list[Array]] = defaultdict(list)
    state_draws: defaultdict[str, list[Array]] = defaultdict(list)
    correlation: list[Array] = []
    done = 0
    with torch.no_grad(), seeded(seed, tokens.device):
        for guide_trace, model_trace in traced_draws(model, guide, batch, num_samples, max_states=max_states):
            order: Tensor = guide_trace.nodes["reveal_step"]["value"]  # [K, B, L]
            q, p = guide_trace.nodes["reveal_step"]["fn"], model_trace.nodes["reveal_step"]["fn"]
            likelihood: RevealedTokens = model_trace.nodes["tokens"]["fn"]
            size = len(order)
            prior_trace = traced(model, batch, size)
            for name, value in {
                **_chunk(scored(guide_trace, model_trace)),
                **_by_step(order, q, p, likelihood, tokens),
                "prior": prior_trace.nodes["reveal_step"]["value"].expand(order.shape),
                "prior_log_weight": prior_log_weight(prior_trace),
                "predicted": torch.where(attention, likelihood.sample().expand(order.shape), tokens),
            }.items():
                drawn[name].append(_array(value))
            if done < num_state_draws:
                for name, value in _states(order, num_state_draws - done, q, p, likelihood, tokens).items():
                    state_draws[name].append(_array(value))
            for one in order[: max(num_correlation_draws - done, 0)]:
                correlation.append(_array(set_correlation(likelihood.state, one, tokens, max_states)[None]))
            done += size
    arrays = {name: np.concatenate(parts)[None] for name, parts in drawn.items()}  # [chain, draw, ..]
    stats = ("log_q", "log_prior", "log_joint", "log_weight", "steps_used", "log_likelihood_step", "kl_step")
    groups = {
        "posterior": {"reveal_step": arrays["reveal_step"]},
        "posterior_predictive": {"tokens": arrays["predicted"]},
        "log_likelihood": {"tokens": arrays["log_likelihood"]},
        "sample_stats": {name: arrays[name] for name in stats if name in arrays},
        "prior": {"reveal_step": arrays["prior"]},
        "sample_stats_prior": {"log_weight": arrays["prior_log_weight"]},
        "observed_data": {"tokens": _array(tokens)},
        "constant_data": {"attention_mask": _array(attention)},
    }
    extra = {
        "states": {name: np.concatenate(parts)[None] for name, parts in state_draws.items()},
        "correlation": {"set_correlation": np.concatenate(correlation)[None]} if correlation else {},
    }
    rows, length = tokens.shape
    num_steps = arrays["log_likelihood_step"].shape[-1]
    strings = [
        [token_string(index) if kept else "" for index, kept in zip(*row, strict=True)]
        for row in zip(tokens.tolist(), attention.tolist(), strict=True)
    ]
    return inference_data(
        groups,
        {name: group for name, group in extra.items() if group},
        dims=DIMS,
        by_group={"log_likelihood": {"tokens": BY_SEQUENCE}},
        coords={"sequence": np.arange(rows), "position": np.arange(length), "step": np.arange(num_steps)},
        labels={"token": (BY_POSITION, np.array(strings, dtype=np.str_))},
        attrs={
            "inference_library": "orderppl",
            "inference_library_version": __version__,
            "num_steps": num_steps,
            "num_samples": num_samples,
            "seed": seed,
            "model": type(model).__name__,
            "guide": type(guide).__name__,
            **(attrs or {}),
        },
    )


def set_correlation(state: UnmaskingState, reveal_step: Tensor, tokens: Tensor, max_states: int = STATES) -> Tensor:
    """What revealing the positions of a set together costs against one after another from the left, by step.

        c_t = sum_{i in z_t} [ log p(x_i | s_t, x_j for j < i in z_t) - log p(x_i | s_t) ]

    The pointwise conditional total correlation of z_t given s_t under the denoiser, at the true tokens: its mean over x
    is the total correlation if the denoiser's conditionals are consistent. The sum over t is what the order loses
    against revealing one position a step, log p(x) - log p(x | r) for an exact denoiser.

    Args:
        state: stacked states of any order of the batch; gives the canvas.
        reveal_step: int64 [B, L].
        tokens: int64 [B, L].
        max_states: rows of a denoiser call.

    Returns:
        Nats, float [B, T].
    """
    length, num_steps = tokens.shape[-1], state.num_steps
    place = torch.arange(length, device=tokens.device)
    alone = (reveal_step * length + place).argsort(-1).argsort(-1)  # visible positions come first, in whatever order
    alone = (alone - (reveal_step < 0).sum(-1, keepdim=True)).masked_fill(reveal_step < 0, -1)  # one position a step
    together = _log_prob_at(RevealPath(state.canvas, tokens, num_steps), reveal_step, num_steps, max_states)
    gain = _log_prob_at(RevealPath(state.canvas, tokens, length), alone, length, max_states) - together  # [B, L]
    by_step = [gain.masked_fill(~reveal_set(reveal_step, t), 0.0).sum(-1) for t in range(num_steps)]
    return torch.stack(by_step, -1)


def _log_prob_at(path: RevealPath, order: Tensor, num_steps: int, max_states: int) -> Tensor:
    """log p(x_i | s_{r_i}) of every position of one order, float [B, L]; 0 at padding."""
    total = torch.zeros(order.shape, device=order.device)
    rows = max(1, max_states // len(order))
    for steps in torch.arange(num_steps, device=order.device).split(rows):
        step = steps.unsqueeze(-1).expand(-1, len(order))  # [S, B]
        state = path.state_at(masked_before(order, step.unsqueeze(-1)), step)
        log_prob = RevealedTokens(state, order).token_log_prob(path.tokens)  # [S, B, L]
        total = total + log_prob.masked_fill(~reveal_set(order, step.unsqueeze(-1)), 0.0).sum(0)
    return total


def _chunk(draws: Any) -> dict[str, Tensor]:
    names = ("reveal_step", "log_q", "log_prior", "log_likelihood", "log_joint", "log_weight")
    return {name: getattr(draws, name) for name in names} | {"steps_used": steps_used(draws.reveal_step)}


def _by_step(order: Tensor, q: Any, p: Any, likelihood: RevealedTokens, tokens: Tensor) -> dict[str, Tensor]:
    """Parts of the ELBO by step, each [K, B, T]."""
    hidden = likelihood.token_log_prob(tokens)  # [T, K, B, L]
    revealed = reveal_set(order, likelihood.state.step.unsqueeze(-1))
    found = {"log_likelihood_step": hidden.masked_fill(~revealed, 0.0).sum(-1).movedim(0, -1)}
    if isinstance(q, OrderedPartition) and isinstance(p, OrderedPartition):
        q_sets, p_sets = q.reveal_sets(order), p.reveal_sets(order, p.steps)
        try:
            kl = kl_divergence(q_sets, p_sets)
        except NotImplementedError:  # no closed form for these sets
            kl = q_sets.log_prob(revealed) - p_sets.log_prob(revealed)
        found["kl_step"] = kl.expand(revealed.shape[:-1]).movedim(0, -1)
    return found


def _states(order: Tensor, kept: int, q: Any, p: Any, likelihood: RevealedTokens, tokens: Tensor) -> dict[str, Tensor]:
    """What programs and heuristics want in the states of the first draws, each float [K, B, T, L]."""
    stack = likelihood.state
    masked = stack.masked[:, :kept]
    state = UnmaskingState(stack.tokens[:, :kept], masked, stack.step[:, :kept], stack.num_steps, stack.canvas)
    state.logits = stack.logits[:, :kept]
    state.memory[TRUTH] = torch.where(masked, tokens, 0)
    values = {score.name: score.score(state) for score in SCORES}
    for name, law in (("guide_prob", q), ("prior_prob", p)):
        with suppress(NotImplementedError):  # sets without a closed form
            if isinstance(law, OrderedPartition):
                values[name] = law.reveal_sets(order).probs.expand(stack.masked.shape)[:, :kept]
    shown = {name: value.masked_fill(~masked, torch.nan).float() for name, value in values.items()}
    return {name: value.movedim(0, 2) for name, value in {**shown, "masked": masked}.items()}


def _array(value: Tensor) -> Array:
    return np.asarray(value.detach().cpu().numpy())
