"""Orders drawn from a guide, scored by guide and model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from orderppl.distributions import OrderedPartition
from orderppl.errors import UserError
from orderppl.inference.programs import Program, local_parameters, positional

Batch = Mapping[str, Tensor]
STATES = 4096  # partially revealed sequences that go through the denoiser in one call


@dataclass(frozen=True)
class OrderDraws:
    """K orders per sequence and what both programs say about them, on the CPU.

    Attributes:
        reveal_step: int64 [K, B, L].
        log_q: float64 [K, B], log q(r | x), nats.
        log_prior: float64 [K, B], log p(r), nats.
        log_likelihood: float64 [K, B], log p(x | r), nats.
    """

    reveal_step: Tensor
    log_q: Tensor
    log_prior: Tensor
    log_likelihood: Tensor

    @property
    def log_joint(self) -> Tensor:
        """log p(x, r), float64 [K, B]."""
        return self.log_prior + self.log_likelihood

    @property
    def log_weight(self) -> Tensor:
        """log p(x, r) - log q(r | x), float64 [K, B]: the importance weights of the draws."""
        return self.log_joint - self.log_q

    @staticmethod
    def concatenated(parts: list[OrderDraws]) -> OrderDraws:
        """Draws of the same sequences, one after another."""
        return OrderDraws(*(torch.cat([getattr(part, item.name) for part in parts]) for item in fields(OrderDraws)))


def draw_orders(
    model: Program, guide: Program, batch: Batch, num_samples: int, *, max_states: int = STATES
) -> OrderDraws:
    """Draw orders from a guide and score them, without gradient.

    Args:
        model: an unmasking program that looks at all steps.
        guide: its guide.
        batch: `tokens` int64 [B, L] and, where there are, `attention_mask`, `context`, `context_mask`.
        num_samples: K.
        max_states: at most so many states per denoiser call, where a single draw allows it.

    Raises:
        UserError: an empty batch, no draws, or programs without the sites `reveal_step` and `tokens`.
    """
    traces = traced_draws(model, guide, batch, num_samples, max_states=max_states)
    return OrderDraws.concatenated([scored(guide_trace, model_trace) for guide_trace, model_trace in traces])


def traced_draws(
    model: Program, guide: Program, batch: Batch, num_samples: int, *, max_states: int = STATES
) -> Iterator[tuple[Trace, Trace]]:
    """Traces of guide and model on a few draws at a time; see `draw_orders`."""
    check_batch(batch)
    if num_samples < 1:
        raise UserError("num_samples", f"{num_samples} is not positive", "draw at least one order per sequence")
    if getattr(model, "one_step", False):
        raise UserError("model.one_step", "weights need every step of an order", "build the model with one_step=False")
    states = len(batch["tokens"]) * int(getattr(model, "num_steps", 1))
    chunk = max(1, max_states // states)
    for start in range(0, num_samples, chunk):
        size = min(chunk, num_samples - start)
        guide_trace = traced(guide, batch, size)
        _site(guide_trace, "guide", "reveal_step")
        yield guide_trace, traced(model, batch, size, guide_trace.nodes["reveal_step"]["value"])


def scored(guide_trace: Trace, model_trace: Trace) -> OrderDraws:
    """The numbers of a pair of traces."""
    guide, prior = _site(guide_trace, "guide", "reveal_step"), _site(model_trace, "model", "reveal_step")
    tokens = _site(model_trace, "model", "tokens")
    shape = guide["value"].shape[:-1]
    log_probs = (site["log_prob"].expand(shape).double().cpu() for site in (guide, prior, tokens))
    return OrderDraws(guide["value"].cpu(), *log_probs)


def prior_log_weights(model: Program, batch: Batch, num_samples: int, *, max_states: int = STATES) -> Tensor:
    """Log-weights p(x, r) / p(r) of orders drawn from the prior itself, float64 [K, B], nats."""
    check_batch(batch)
    chunk = max(1, max_states // (len(batch["tokens"]) * int(getattr(model, "num_steps", 1))))
    sizes = [min(chunk, num_samples - start) for start in range(0, num_samples, chunk)]
    return torch.cat([prior_log_weight(traced(model, batch, size)) for size in sizes])


def prior_log_weight(trace: Trace) -> Tensor:
    """The log-weights in a trace of the model: log p(x | r), and what an unnormalised prior adds to it."""
    prior, tokens = _site(trace, "model", "reveal_step"), _site(trace, "model", "tokens")
    order, law = prior["value"], prior["fn"]
    factor = law.reveal_sets(order, law.steps).log_weight.sum(0) if isinstance(law, OrderedPartition) else 0.0
    return (tokens["log_prob"] + factor).expand(order.shape[:-1]).double().cpu()


def score_orders(model: Program, batch: Batch, orders: Tensor, *, max_states: int = STATES) -> tuple[Tensor, Tensor]:
    """Compute log p(r) and log p(x | r) of given orders (int64 [K, B, L]): float64 [K, B] each, on the CPU."""
    chunk = max(1, max_states // (len(batch["tokens"]) * int(getattr(model, "num_steps", 1))))
    parts = []
    for some in orders.split(chunk):
        trace = traced(model, batch, len(some), some.to(batch["tokens"].device))
        sites = (_site(trace, "model", name) for name in ("reveal_step", "tokens"))
        parts.append(torch.stack([site["log_prob"].expand(some.shape[:-1]).double().cpu() for site in sites]))
    log_prior, log_likelihood = torch.cat(parts, 1)
    return log_prior, log_likelihood


def traced(program: Program, batch: Batch, size: int, reveal_step: Tensor | None = None) -> Trace:
    """Run a program `size` times per sequence, in a plate left of the batch, with log-densities.

    Args:
        program: a model or a guide.
        batch: its arguments.
        size: number of runs.
        reveal_step: the value of that site, int64 [size, B, L]; drawn when left out.
    """
    data = {} if reveal_step is None else {"reveal_step": reveal_step}
    with torch.no_grad(), local_parameters(program), pyro.plate("draws", size, dim=-2):
        trace = poutine.trace(poutine.condition(program, data=data)).get_trace(*positional(batch))
        trace.compute_log_prob()
    return trace


def check_batch(batch: Batch) -> None:
    """Refuse a batch without sequences.

    Raises:
        UserError: no tokens, or no row.
    """
    tokens = batch.get("tokens")
    if tokens is None:
        raise UserError("batch", f"has no tokens, only {', '.join(batch) or 'nothing'}", "give batch['tokens']")
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise UserError("batch", f"tokens have the shape {list(tokens.shape)}", "give at least one sequence, [B, L]")


def _site(trace: Trace, program: str, name: str) -> dict[str, Any]:
    site: dict[str, Any] | None = trace.nodes.get(name)
    if site is None or site["type"] != "sample":
        found = ", ".join(k for k, v in trace.nodes.items() if v["type"] == "sample" and k != "draws") or "none"
        raise UserError(program, f"has no site {name!r}, its sample sites: {found}", "give an unmasking program")
    return site


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from a seed for a while and leave torch's global random state as it was."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
