"""Fit a generation order: maximise an objective of an unmasking model and its guide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from orderppl.inference.annealing import Anneal, set_number
from orderppl.inference.batches import BatchStream, Data, as_batch, check_tokens, training_rows
from orderppl.inference.objective import as_objective
from orderppl.inference.programs import local_parameters, make_local
from orderppl.inference.reveal_elbo import RevealTraceGraph_ELBO
from orderppl.inference.trainer import (
    VALIDATION_SEED,
    FitResult,
    TrainSettings,
    described,
    frozen,
    module_device,
    train,
)
from orderppl.randomness import keyed_draws
from orderppl.unmasking import Batch


class PairLoss(nn.Module):
    """Negative objective of a model and its guide, a mean over the sequences of a batch.

    Args:
        model: program with a `reveal_step` latent, called as `model(batch)`.
        guide: program with the same call signature and latent sites.
        objective: any objective of this package, or Pyro's `Trace_ELBO`, `TraceGraph_ELBO`, `RenyiELBO`.
    """

    def __init__(self, model: nn.Module, guide: nn.Module, objective: ELBO) -> None:
        super().__init__()
        for program in (model, guide):
            make_local(program)
        self.model, self.guide, self.objective = model, guide, as_objective(objective)

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Numbers of the last call, 0-dim tensors (`elbo` in nats per sequence, `steps`, ...)."""
        metrics: dict[str, Tensor] = getattr(self.objective, "metrics", {})
        return metrics

    def forward(self, batch: Batch) -> Tensor:
        """Differentiable loss in nats per sequence: a 0-dim tensor."""
        # Networks live in the programs, not in Pyro's global store: two programs cannot collide by name, and any
        # torch optimiser works. The setting is local because SVI needs the opposite one.
        with local_parameters():
            loss: Tensor = self.objective.differentiable_loss(self.model, self.guide, batch) / len(batch)
        return loss

    def explain(self, batch: Batch) -> str | None:
        """Why the loss of a batch is not finite, where the objective can tell."""
        explain = getattr(self.objective, "explain", None)
        if explain is None:
            return None
        with local_parameters():
            cause: str | None = explain(self.model, self.guide, batch)
        return cause


@dataclass(frozen=True, kw_only=True)
class FitSettings(TrainSettings):
    """How an order is fitted: the settings of `TrainSettings`, and two more.

    Args:
        anneal: numbers that change over the fit by their dotted names, which begin with `model`, `guide` or
            `objective`: `{"objective.kl_weight": Anneal(0.1, 1.0, 200)}`.
        train_denoiser: train the denoiser too, which is frozen and in evaluation mode otherwise.
    """

    anneal: dict[str, Anneal] | None = None
    train_denoiser: bool = False


def fit(
    model: nn.Module,
    guide: nn.Module,
    data: Data,
    *,
    objective: ELBO | None = None,
    optimizer: Any = torch.optim.Adam,
    updates: int = 1000,
    batch_size: int = 32,
    validation: Data = None,
    anneal: Mapping[str, Anneal] | None = None,
    train_denoiser: bool = False,
    out: Path | str | None = None,
    resume: bool = False,
    **settings: Any,
) -> FitResult:
    """Train the order: what model and guide learn, except the denoiser's parameters.

        fit(model, guide, tokens, optimizer=partial(torch.optim.Adam, lr=0.01), updates=500, out="runs/mine")

    The denoiser (`model.denoiser`) stays frozen and in evaluation mode for the whole fit, and is afterwards as it was.
    Parameters stay in the programs (Pyro's `module_local_params`, set for the length of each call); the same pair can
    be given to `pyro.infer.SVI` afterwards.

    A script that calls this can be launched by `torchrun --nproc_per_node 2 script.py`: the processes share every batch
    and end with the parameters of a one-process run, up to rounding; see `train`. What the script does besides, it does
    on every process.

    Args:
        model: the unmasking model.
        guide: posterior over `reveal_step`.
        data: a `Batch`, tokens, a dict of columns, a data set of `orderppl.data` or `datasets`, a `DataLoader` or any
            iterable of batches, which is read into memory.
        objective: any objective of this package (`RevealTraceGraph_ELBO()` when left out), or Pyro's `Trace_ELBO`,
            `TraceGraph_ELBO`, `RenyiELBO`.
        optimizer: makes the optimiser: `torch.optim.AdamW`, or `partial(torch.optim.Adam, lr=0.1)`.
        updates: total number of updates, those before a resume included.
        batch_size: sequences per update.
        validation: data on which the bound is measured every `validate_every` updates and at the end; of data with
            splits that of validation, if it is asked for by `validate_every`.
        anneal: numbers that change over the fit, such as `{"objective.kl_weight": Anneal(0.1, 1.0, 200)}`.
        train_denoiser: train the denoiser too.
        out: folder of the run, which every command reads: config, log, checkpoints, weights.
        resume: continue from the newest checkpoint in `out`; from the start when there is none.
        **settings: further fields of `FitSettings`: `lr` (also by part), `schedule`, `warmup`, `grad_clip`,
            `ema_decay`, `seed`, `group`, `drop_last`, `accumulate`, `bfloat16`, `device`, `log_every`,
            `validate_every`, `checkpoint_every`, `progress`.

    Returns:
        The trace; `elbo` in nats per sequence.

    Raises:
        UserError: see `train`; with `out`, also an object that a config cannot describe.
    """
    chosen = FitSettings(
        optimizer=optimizer,
        updates=updates,
        batch_size=batch_size,
        anneal=None if anneal is None else dict(anneal),
        train_denoiser=train_denoiser,
        **settings,
    )
    objective = RevealTraceGraph_ELBO() if objective is None else objective
    programs = {"model": model, "guide": guide, "objective": objective}
    denoiser = getattr(model, "denoiser", None)
    rows, held = training_rows(data, denoiser)
    if validation is None and chosen.validate_every is not None:
        validation = held

    def annealed(update: int) -> dict[str, float]:
        values = {name: change(update) for name, change in (anneal or {}).items()}
        for name, value in values.items():
            set_number(programs, name, value)
        return values

    batch = as_batch(rows)
    check_tokens(batch, denoiser)
    with frozen(denoiser, unless=train_denoiser):
        return train(
            PairLoss(model, guide, objective),
            batch,
            chosen,
            anneal=annealed,
            validate=None if validation is None else held_out(model, guide, validation, objective, batch_size),
            out=None if out is None else Path(out),
            resume=resume,
            parts={**programs, "data": described(data), "fit": chosen},
        )


def held_out(
    model: nn.Module, guide: nn.Module, data: Data, objective: ELBO | None = None, batch_size: int = 32
) -> Callable[[], dict[str, float]]:
    """What measures the bound on held-out data: always the plain one, so that different objectives can be compared.

    Orders are functions of the row, so that two measurements differ by the parameters only.

    Args:
        model: the unmasking model.
        guide: posterior over `reveal_step`.
        data: see `fit`.
        objective: of the fit: as many orders are drawn per sequence.
        batch_size: sequences at a time.

    Returns:
        A function that gives the metrics' means per sequence: `elbo`, `log_likelihood`, `kl` in nats, `steps`.
    """
    loss = PairLoss(model, guide, RevealTraceGraph_ELBO(8 if objective is None else objective.num_particles))
    stream = BatchStream(data, batch_size)

    @torch.no_grad()
    def measure() -> dict[str, float]:
        stream.device = module_device(loss)
        sums: dict[str, float] = {}
        for piece in stream.once():
            with keyed_draws(VALIDATION_SEED, piece.keys):
                loss(piece.batch)
            for name, value in loss.metrics.items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(piece.batch)
        return {name: total / len(stream.data) for name, total in sums.items()}

    return measure
