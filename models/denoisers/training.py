"""Masked-diffusion training of a denoiser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from orderppl.inference.batches import BatchStream, Data, as_batch, check_tokens, training_rows
from orderppl.inference.trainer import (
    VALIDATION_SEED,
    FitResult,
    TrainSettings,
    described,
    frozen,
    module_device,
    train,
)
from orderppl.randomness import keyed_draws, stratified_uniform, uniform
from orderppl.unmasking import Batch
from orderppl.unmasking.denoiser import Reader

ADAMW = partial(torch.optim.AdamW, weight_decay=0.01, betas=(0.9, 0.98))


def random_masking(latent: Tensor) -> tuple[Tensor, Tensor]:
    """Hide a random part of every row, with parts of all sizes spread evenly over the batch.

    The number of hidden positions is uniform on 1..n for a row of n positions to reveal, drawn from one uniform number
    per row, stratified over the batch (Sahoo et al. 2024); the positions are uniform given their number.

    Args:
        latent: bool [B, S], the positions to reveal.

    Returns:
        masked: bool [B, S], never at padding or given positions.
        weight: float [B], n over the number of hidden positions: 1 / mask ratio. 0 for a row with nothing to reveal.
    """
    size = latent.sum(-1)  # [B]
    ratio = stratified_uniform(len(latent), latent.device)  # [B]
    count = torch.minimum((ratio * size).long() + 1, size)  # uniform on 1..n
    score = uniform(latent.shape, latent.device).masked_fill(~latent, 2.0)
    rank = score.argsort(-1).argsort(-1)
    return (rank < count[:, None]) & latent, size / count.clamp(min=1)


class MaskedDiffusionLoss(nn.Module):
    """Negative ELBO of a masked diffusion model, in nats per token.

    Mask ratio t = m/n with m uniform on 1..n, weight 1/t, cross-entropy at hidden positions. This is the any-order form
    of the continuous-time bound and equals it in expectation (Ou et al. 2024, theorem 2; Hoogeboom et al. 2021),
    without rows where nothing is hidden. Given positions stay visible, padding is never hidden or counted.

    Args:
        denoiser: what is trained.
    """

    per_token = True

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def nelbo(self, batch: Batch) -> Tensor:
        """One-sample estimate of the negative ELBO of every row: float [B], nats."""
        reader = Reader(self.denoiser, batch)  # type: ignore[arg-type]
        masked, weight = random_masking(batch.latent)
        state = batch.readable.masked_fill(masked, reader.denoiser.mask_index)
        logits = reader.logits(reader.read(state))  # [B, S - start, V]
        masked, tokens = masked[:, reader.start :], batch.tokens[:, reader.start :]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.masked_fill(~masked, 0).flatten(), reduction="none")
        return weight * torch.where(masked, loss.view_as(masked), 0.0).sum(-1)

    def forward(self, batch: Batch) -> Tensor:
        """Mean over the positions to reveal: a 0-dim tensor."""
        return self.nelbo(batch).sum() / batch.latent.sum().clamp(min=1)

    def explain(self, batch: Batch) -> str | None:
        """Why the loss of a batch is not finite, where that can be told."""
        reader = Reader(self.denoiser, batch)  # type: ignore[arg-type]
        logits = reader.logits(reader.read(batch.readable.masked_fill(batch.latent, reader.denoiser.mask_index)))
        return "the denoiser gives NaN" if bool(logits.isnan().any()) else None


@dataclass(frozen=True, kw_only=True)
class DenoiserSettings(TrainSettings):
    """How a denoiser is trained: `TrainSettings` with other defaults, AdamW and a moving average among them."""

    updates: int = 3000
    batch_size: int = 64
    optimizer: Callable[..., Optimizer] | Optimizer | PyroOptim = ADAMW
    lr: float | dict[str, float] | None = 1e-3
    schedule: Literal["constant", "cosine"] | Callable[[Optimizer], LRScheduler] = "cosine"
    warmup: int = 100
    grad_clip: float | None = 1.0
    ema_decay: float | None = 0.999
    drop_last: bool = True
    log_every: int = 50
    validate_every: int | None = 500
    checkpoint_every: int | None = 500


def train_denoiser(
    denoiser: nn.Module,
    data: Data,
    *,
    validation: Data = None,
    out: Path | str | None = None,
    resume: bool = False,
    **settings: Any,
) -> FitResult:
    """Train a denoiser by its masked-diffusion bound; its parameters end as their moving average.

    All its parameters are trained when all of them come frozen, as from `load_denoiser`; else those that are not.

    Args:
        denoiser: module behind the `Denoiser` protocol; it stays in the mode (training or evaluation) it is in.
        data: see `orderppl.fit`.
        validation: held-out sequences, the validation split where the data have splits; their bound is logged as
            `nelbo` and `nats_per_token`.
        out: folder of the run, which every command reads: config, log, checkpoints, weights.
        resume: continue from the newest checkpoint in `out`; from the start when there is none.
        **settings: fields of `DenoiserSettings`: `updates`, `batch_size`, `lr`, `warmup`, `ema_decay`, ...

    Returns:
        The trace; losses in nats per token.

    Raises:
        UserError: see `orderppl.inference.trainer.train`.
    """
    chosen = DenoiserSettings(**settings)
    rows, held = training_rows(data, denoiser)
    if validation is None and chosen.validate_every is not None:
        validation = held
    batch = as_batch(rows)
    check_tokens(batch, denoiser)
    measure = partial(masked_diffusion_nelbo, denoiser, validation, chosen.batch_size)
    with frozen(denoiser, unless=True):
        return train(
            MaskedDiffusionLoss(denoiser),
            batch,
            chosen,
            validate=None if validation is None else measure,
            out=None if out is None else Path(out),
            resume=resume,
            description="denoiser",
            parts={"denoiser": denoiser, "data": described(data), "fit": chosen},
        )


@torch.no_grad()
def masked_diffusion_nelbo(denoiser: nn.Module, data: Data, batch_size: int = 64, draws: int = 1) -> dict[str, float]:
    """Estimate the negative ELBO of a whole data set; maskings are functions of the row.

    Args:
        denoiser: what is scored.
        data: see `orderppl.fit`.
        batch_size: sequences at a time.
        draws: maskings per sequence.

    Returns:
        `nelbo` in nats per sequence and `nats_per_token`.
    """
    loss = MaskedDiffusionLoss(denoiser)
    stream = BatchStream(data, batch_size, device=module_device(denoiser))
    total = 0.0
    for draw in range(draws):
        for piece in stream.once():
            with keyed_draws(VALIDATION_SEED + draw, piece.keys):
                total += float(loss.nelbo(piece.batch).double().sum())
    tokens = int(stream.data.latent.sum())
    return {"nelbo": total / (draws * len(stream.data)), "nats_per_token": total / (draws * tokens)}
