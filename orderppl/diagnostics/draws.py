"""Orders drawn from a guide, scored by guide and model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from orderppl.decoding.decode import evaluation_mode
from orderppl.distributions import OrderDistribution
from orderppl.distributions.revealed_tokens import RevealedTokens
from orderppl.errors import UserError
from orderppl.inference.programs import Program, RevealSites, Site, local_parameters
from orderppl.unmasking import Batch

STATES = 4096  # partially revealed sequences that go through the denoiser in one call,
POSITIONS, LOGITS = 2**18, 2**27  # their positions, and the numbers that it answers with: half a GiB


@dataclass(frozen=True)
class OrderDraws:
    """K orders per sequence and what both programs say about them, on the CPU.

    Attributes:
        reveal_step: int64 [K, B, S], -1 where nothing is revealed: at given positions and padding.
        log_q: float64 [K, B], log q(r | x), nats.
        log_prior: float64 [K, B], log p(r), nats.
        log_likelihood: float64 [K, B], log p(x | r), nats.
        log_factor: float64 [K, B], further factors of the model, such as the price of the steps, nats.
    """

    reveal_step: Tensor
    log_q: Tensor
    log_prior: Tensor
    log_likelihood: Tensor
    log_factor: Tensor

    @property
    def log_joint(self) -> Tensor:
        """log p(x, r), float64 [K, B]."""
        return self.log_prior + self.log_likelihood + self.log_factor

    @property
    def log_weight(self) -> Tensor:
        """log p(x, r) - log q(r | x), float64 [K, B]: the importance weights of the draws."""
        return self.log_joint - self.log_q


def draw_orders(
    model: Program, guide: Program, batch: Batch | Tensor, num_samples: int, *, max_states: int = STATES
) -> OrderDraws:
    """Draw orders from a guide and score them, without gradient and in evaluation mode.

    Args:
        model: an unmasking program.
        guide: its guide.
        batch: clean sequences.
        num_samples: K.
        max_states: at most so many states per denoiser call, where a single draw allows it.

    Raises:
        UserError: an empty batch, no draws, or programs without the sites `reveal_step` and tokens.
    """
    parts = [numbers(sites) for sites in drawn(model, guide, checked(batch), num_samples, max_states)]
    return OrderDraws(*(torch.cat([getattr(part, item.name) for part in parts]) for item in fields(OrderDraws)))


def prior_log_weights(model: Program, batch: Batch | Tensor, num_samples: int, *, max_states: int = STATES) -> Tensor:
    """Log-weights p(x, r) / p(r) of orders drawn from the prior itself, float64 [K, B], nats."""
    batch = checked(batch)
    sizes = chunks(model, batch, num_samples, max_states)
    return torch.cat([numbers(scored(model, batch, size)).log_weight for size in sizes])


def drawn(model: Program, guide: Program, batch: Batch, num_samples: int, max_states: int) -> Iterator[RevealSites]:
    """The sites of guide and model on a few draws at a time; see `draw_orders`."""
    for size in chunks(model, batch, num_samples, max_states):
        site = order_site(traced(guide, batch, size), "guide")
        yield scored(model, batch, size, site["value"])._replace(guide=site)


def numbers(sites: RevealSites) -> OrderDraws:
    """What the programs say of the orders at their sites."""
    order = sites.guide["value"]
    factor = sum((site["log_prob"] for site in sites.factors), torch.zeros(()))
    terms = (sites.guide["log_prob"], sites.prior["log_prob"], sites.tokens["log_prob"], factor)
    return OrderDraws(order.cpu(), *(term.expand(order.shape[:-1]).double().cpu() for term in terms))


def scored(model: Program, batch: Batch, size: int, reveal_step: Tensor | None = None) -> RevealSites:
    """Run a model on given orders, or on draws from its prior, which then is its own guide; see `traced`.

    Raises:
        UserError: it is no unmasking program.
    """
    trace = traced(model, batch, size, reveal_step)
    prior = order_site(trace, "model")
    observed = [site for site in trace.nodes.values() if site["type"] == "sample" and site["is_observed"]]
    tokens = next((site for site in observed if isinstance(site["fn"], RevealedTokens)), None)
    if tokens is None:
        raise UserError("model", "observes no tokens by their order", "give an unmasking program")
    return RevealSites(prior, prior, tokens, [site for site in observed if site is not prior and site is not tokens])


def traced(program: Program, batch: Batch, size: int, reveal_step: Tensor | None = None) -> Trace:
    """Run a program `size` times per sequence, in a plate left of the batch, with log-densities.

    Args:
        program: a model or a guide.
        batch: its argument.
        size: number of runs.
        reveal_step: the value of that site, int64 [size, B, S]; drawn when left out.
    """
    data = {} if reveal_step is None else {"reveal_step": reveal_step}
    with torch.no_grad(), local_parameters(program), evaluation_mode(program), pyro.plate("draws", size, dim=-2):
        trace = poutine.trace(poutine.condition(program, data=data)).get_trace(batch)
        trace.compute_log_prob()
    return trace


def order_site(trace: Trace, program: str) -> Site:
    """The site of the order.

    Raises:
        UserError: there is none, or it has a distribution of another kind.
    """
    site: Site | None = trace.nodes.get("reveal_step")
    if site is None or site["type"] != "sample":
        names = [name for name, node in trace.nodes.items() if node["type"] == "sample" and name != "draws"]
        problem = f"has no site 'reveal_step', its sample sites: {', '.join(names) or 'none'}"
        raise UserError(program, problem, "give an unmasking program and its guide")
    if not isinstance(site["fn"], OrderDistribution):
        problem = f"its site 'reveal_step' is a {type(site['fn']).__name__}, no OrderDistribution"
        raise UserError(program, problem, "sample one of orderppl.distributions")
    return site


def chunks(model: Program, batch: Batch, num_samples: int, max_states: int = STATES) -> list[int]:
    """Numbers of draws that go through the denoiser together; they add up to `num_samples`."""
    if num_samples < 1:
        raise UserError("num_samples", f"{num_samples} is not positive", "draw at least one order per sequence")
    length, classes = batch.tokens.shape[1], int(getattr(getattr(model, "denoiser", None), "vocab_size", 1))
    together = min(max_states, POSITIONS // length, LOGITS // (length * classes))
    size = max(1, together // (len(batch) * int(getattr(model, "num_steps", 1))))
    return [min(size, num_samples - start) for start in range(0, num_samples, size)]


def checked(batch: Batch | Tensor) -> Batch:
    """The batch of a program's argument.

    Raises:
        UserError: no sequence, or nothing to reveal in any.
    """
    batch = Batch.of(batch)
    if not bool(batch.latent.any()):
        what = "has nothing to reveal" if batch.tokens.numel() else f"is empty, {list(batch.tokens.shape)}"
        raise UserError("batch", what, "give at least one sequence with positions that are not given")
    return batch


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from a seed for a while and leave torch's global random state as it was."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
