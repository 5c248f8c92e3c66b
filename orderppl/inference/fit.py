"""Fit a generation order: maximise an objective of an unmasking model and its guide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyro.infer import ELBO
from torch import Tensor, nn

from orderppl.inference.annealing import Anneal
from orderppl.inference.batches import BatchStream
from orderppl.inference.objective import as_objective
from orderppl.inference.optimise import FitResult, optimise
from orderppl.inference.programs import local_parameters, make_local, positional


class OrderLoss(nn.Module):
    """Negative objective per sequence of a batch.

    Args:
        model: program with a `reveal_step` latent, called as `model(**batch)`.
        guide: program with the same call signature and latent sites.
        elbo: any objective of this package, or Pyro's `Trace_ELBO`, `TraceGraph_ELBO`, `RenyiELBO`.
    """

    def __init__(self, model: nn.Module, guide: nn.Module, elbo: ELBO) -> None:
        super().__init__()
        for program in (model, guide):
            make_local(program)
        self.objective = as_objective(elbo)(model, guide)

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Numbers of the last call, 0-dim tensors (`elbo` in nats per sequence, `steps`, ...)."""
        metrics: dict[str, Tensor] = getattr(self.objective.elbo, "metrics", {})
        return metrics

    def forward(self, **batch: Tensor) -> Tensor:
        """Differentiable loss in nats per sequence; `tokens` int64 [B, L] gives the number of sequences."""
        # Networks live in the programs, not in Pyro's global store: two programs cannot collide by name, and any
        # torch optimiser works. The setting is local because SVI needs the opposite one.
        with local_parameters():
            loss: Tensor = self.objective(*positional(batch)) / batch["tokens"].shape[0]
        return loss


def _dial(value: Anneal | float) -> Anneal:
    return value if isinstance(value, Anneal) else Anneal(value, value, 0)


def fit(
    model: nn.Module,
    guide: nn.Module,
    stream: BatchStream,
    *,
    elbo: ELBO,
    kl_weight: Anneal | float | None = None,
    temperature: Anneal | float | None = None,
    step_price: Anneal | float | None = None,
    dials: Mapping[str, Anneal] | None = None,
    description: str = "order",
    **options: Any,
) -> FitResult:
    """Train the order, and whatever else of the two programs requires a gradient.

    Freeze the denoiser beforehand with `denoiser.requires_grad_(False)` to learn the order only. Parameters stay in
    the programs (Pyro's `module_local_params`, set for the length of each call), whatever the global setting was when
    they were built; the same pair can be given to `pyro.infer.SVI` afterwards.

    A script that calls this can be launched by `torchrun --nproc_per_node 2 script.py` or, on GPUs, `accelerate launch`
    (which starts a single process on CPUs): the processes share every batch and end with the parameters of a
    one-process run, up to rounding; see `optimise`. What the script does besides, it does on every process.

    Args:
        model: the unmasking model.
        guide: posterior over `reveal_step`.
        stream: batches with `tokens`, `attention_mask` and, where there is a prompt, `context`, `context_mask`.
        elbo: any objective of this package, or Pyro's `Trace_ELBO`, `TraceGraph_ELBO`, `RenyiELBO`.
        kl_weight: dial `elbo.kl_weight`, weight of the KL term.
        temperature: dial `guide.temperature`.
        step_price: dial `model.prior.price`, nats per executed step.
        dials: further dials by dotted name, starting with `model`, `guide` or `elbo`.
        description: label of the progress bar.
        options: every other argument of `optimise`.

    Returns:
        The trace; `elbo` in nats per sequence.

    Raises:
        UserError: see `optimise`.
    """
    every = dict(dials or {})
    for name, value in {
        "elbo.kl_weight": kl_weight,
        "guide.temperature": temperature,
        "model.prior.price": step_price,
    }.items():
        if value is not None:
            every[name] = _dial(value)
    return optimise(
        OrderLoss(model, guide, elbo),
        stream,
        dials=every,
        targets={"model": model, "guide": guide, "elbo": elbo},
        description=description,
        **options,
    )
