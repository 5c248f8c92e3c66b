"""How the programs of a pair are run, and what an objective reads off their traces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro
import torch
from pyro.nn import PyroModule
from pyro.poutine import Trace
from torch import Tensor, nn

from orderppl.distributions import OrderDistribution
from orderppl.distributions.revealed_tokens import RevealedTokens
from orderppl.errors import UserError
from orderppl.program import announcing
from orderppl.unmasking.trajectory import steps_used

Program = Callable[..., Any]
Site = dict[str, Any]


def make_local(program: Program) -> None:
    """Let a program built under either value of `module_local_params` run under True.

    Pyro 1.9 gives a module the place for local parameters when it is made, and fails later when that is missing.
    """
    for module in program.modules() if isinstance(program, nn.Module) else ():
        if isinstance(module, PyroModule) and not hasattr(module._pyro_context, "param_state"):
            module._pyro_context.param_state = {"params": {}, "constraints": {}}


@contextmanager
def local_parameters(*programs: Program) -> Iterator[None]:
    """Run programs on their own parameters, whatever Pyro's global setting and store hold."""
    for program in programs:
        make_local(program)
    with pyro.settings.context(module_local_params=True), announcing(False):
        yield


class RevealSites(NamedTuple):
    """The sites of a (model, guide) pair that make it an unmasking program."""

    guide: Site  # q(r | x), an OrderDistribution
    prior: Site  # p(r), an OrderDistribution
    tokens: Site  # p(x | r), RevealedTokens
    factors: list[Site]  # further terms of the model, such as the price of the steps


def reveal_sites(model_trace: Trace, guide_trace: Trace) -> RevealSites | None:
    """The sites of an unmasking program, or None when the pair has another shape.

    Raises:
        UserError: orders of different numbers of steps.
    """
    latent = [s for s in guide_trace.nodes.values() if s["type"] == "sample"]
    sites = [s for s in model_trace.nodes.values() if s["type"] == "sample"]
    observed = [s for s in sites if s["is_observed"]]
    tokens = [s for s in observed if isinstance(s["fn"], RevealedTokens)]
    if len(latent) != 1 or len(tokens) != 1 or latent[0]["name"] not in model_trace.nodes:
        return None
    guide, prior = latent[0], model_trace.nodes[latent[0]["name"]]
    if len(sites) != len(observed) + 1:
        return None
    plates = [{frame.name for frame in site["cond_indep_stack"]} for site in (*tokens, *observed)]
    if not all(plates[0] >= others for others in plates):  # a term within further plates
        return None
    if not all(isinstance(site["fn"], OrderDistribution) for site in (guide, prior)):
        return None
    if guide["fn"].num_steps != prior["fn"].num_steps:
        problem = f"{guide['fn'].num_steps} in the guide and {prior['fn'].num_steps} in the model"
        raise UserError("num_steps", problem, "give both the same")
    return RevealSites(guide, prior, tokens[0], [s for s in observed if s is not tokens[0]])


def temper(model_trace: Trace, guide_trace: Trace, weight: float) -> None:
    """Weigh log q - log p of any pair of traces, whose densities have been computed, in place."""
    latent = [site for site in model_trace.nodes.values() if site["type"] == "sample" and not site["is_observed"]]
    for site in latent + [site for site in guide_trace.nodes.values() if site["type"] == "sample"]:
        site["log_prob"], site["log_prob_sum"] = weight * site["log_prob"], weight * site["log_prob_sum"]
        if "score_parts" in site:  # path-wise; the score itself has no weight
            parts = site["score_parts"]
            site["score_parts"] = parts._replace(entropy_term=weight * parts.entropy_term)


def mean_metrics(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The means of `order_metrics` over particles that were drawn one after the other; empty without any."""
    return {name: torch.stack([each[name] for each in found]).mean() for name in found[0]} if found else {}


def order_metrics(log_likelihood: Tensor, kl: Tensor, order: Tensor) -> dict[str, Tensor]:
    """Detached numbers per sequence.

    Args:
        log_likelihood: log p(x | r) and further factors of every drawn order, summed: float [].
        kl: KL(q || p) or its estimate, summed over the same draws: float [].
        order: int64 [*, S], the drawn orders.

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
