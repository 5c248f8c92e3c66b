"""What an objective reads off the two traces of an unmasking program."""

from __future__ import annotations

from typing import Any, NamedTuple

from pyro.poutine import Trace
from torch import Tensor

from orderppl.distributions import OrderedPartition, RevealedTokens
from orderppl.errors import UserError
from orderppl.states import steps_used

Site = dict[str, Any]


class RevealSites(NamedTuple):
    """The sites of a (model, guide) pair that make it an unmasking program."""

    guide: Site  # q(r | x), an OrderedPartition
    prior: Site  # p(r), an OrderedPartition
    tokens: Site  # p(x | r), RevealedTokens


def reveal_sites(model_trace: Trace, guide_trace: Trace) -> RevealSites | None:
    """The three sites of an unmasking program, or None when the pair has another shape."""
    latent = [s for s in guide_trace.nodes.values() if s["type"] == "sample"]
    observed = [s for s in model_trace.nodes.values() if s["type"] == "sample" and s["is_observed"]]
    if len(latent) != 1 or len(observed) != 1 or latent[0]["name"] not in model_trace.nodes:
        return None
    guide, tokens = latent[0], observed[0]
    prior = model_trace.nodes[guide["name"]]
    kinds = ((guide, OrderedPartition), (prior, OrderedPartition), (tokens, RevealedTokens))
    if not all(isinstance(site["fn"], kind) for site, kind in kinds):
        return None
    return RevealSites(guide, prior, tokens)


def require_all_steps(likelihood: Any, objective: str) -> None:
    """Refuse a likelihood of tokens that is only an estimate from some of the steps.

    Raises:
        UserError: it looks at fewer than T steps.
    """
    if isinstance(likelihood, RevealedTokens) and len(likelihood.state.step) < likelihood.state.num_steps:
        raise UserError(
            "one_step",
            f"{objective} needs log p(x, r) itself, a one-step program gives an estimate of it",
            "use one_step=False, or RevealTraceGraph_ELBO",
        )


def order_metrics(log_likelihood: Tensor, kl: Tensor, order: Tensor) -> dict[str, Tensor]:
    """Detached numbers per sequence.

    Args:
        log_likelihood: log p(x | r) of every drawn order, summed: float [].
        kl: KL(q || p) or its estimate, summed over the same draws: float [].
        order: int64 [*, L], the drawn orders.

    Returns:
        `elbo`, `log_likelihood`, `kl` (nats) and `steps`, the mean number of steps used; 0-dim tensors.
    """
    drawn = order[..., 0].numel()
    log_likelihood, kl = log_likelihood.detach() / drawn, kl.detach() / drawn
    return {
        "elbo": log_likelihood - kl,
        "log_likelihood": log_likelihood,
        "kl": kl,
        "steps": steps_used(order).float().mean(),
    }
