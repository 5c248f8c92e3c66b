"""Masked-diffusion training of a denoiser."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from orderppl.denoising import Canvas, Denoiser
from orderppl.inference.batches import BatchStream
from orderppl.inference.optimise import FitResult, optimise
from orderppl.randomness import stratified_uniform, uniform
from orderppl.states import partial_state


def random_masking(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Hide a random part of every row, with parts of all sizes spread evenly over the batch.

    The number of hidden positions is uniform on 1..n for a row of n tokens, drawn from one uniform number per row,
    stratified over the batch (Sahoo et al. 2024); the positions are uniform given their number.

    Args:
        attention_mask: bool [B, L].

    Returns:
        masked: bool [B, L], never at padding.
        weight: float [B], n over the number of hidden positions: 1 / mask ratio. 0 for an empty row.
    """
    rows = len(attention_mask)
    device = attention_mask.device
    size = attention_mask.sum(-1)  # [B]
    ratio = stratified_uniform(rows, device)  # [B]
    count = torch.minimum((ratio * size).long() + 1, size)  # uniform on 1..n
    score = uniform(attention_mask.shape, device).masked_fill(~attention_mask, 2.0)
    rank = score.argsort(-1).argsort(-1)
    masked = (rank < count[:, None]) & attention_mask
    return masked, size / count.clamp(min=1)


class MaskedDiffusionLoss(nn.Module):
    """Negative ELBO of a masked diffusion model, in nats per token.

    Mask ratio t = m/n with m uniform on 1..n, weight 1/t, cross-entropy at hidden response positions. This is the
    any-order form of the continuous-time bound and equals it in expectation (Ou et al. 2024, theorem 2; Hoogeboom
    et al. 2021), without rows where nothing is hidden. Prompts stay visible, padding is never hidden or counted.

    Args:
        denoiser: what is trained.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.metrics: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def nelbo(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """One-sample estimate of the negative ELBO of every row: float [B], nats.

        Args:
            tokens: int64 [B, L].
            attention_mask: bool [B, L].
            context: int64 [B, C].
            context_mask: bool [B, C].
        """
        attention = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        denoiser: Denoiser = self.denoiser  # type: ignore[assignment]
        canvas = Canvas(denoiser, attention, context, context_mask)
        masked, weight = random_masking(attention)
        logits = canvas.logits(partial_state(tokens, masked, canvas.mask_index))  # [B, L, V]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.masked_fill(~masked, 0).flatten(), reduction="none")
        return weight * torch.where(masked, loss.view_as(tokens), 0.0).sum(-1)

    def forward(self, **batch: Tensor) -> Tensor:
        """Negative ELBO of the batch over its number of tokens: float scalar, nats per token."""
        nelbo = self.nelbo(**batch)  # [B]
        mask = batch.get("attention_mask")
        count = mask.sum() if mask is not None else torch.tensor(batch["tokens"].numel(), device=nelbo.device)
        loss = nelbo.sum() / count
        self.metrics = {"nelbo": nelbo.detach().mean(), "nats_per_token": loss.detach()}
        self.counts = {"loss": count, "nats_per_token": count}
        return loss


@torch.no_grad()
def masked_diffusion_nelbo(denoiser: nn.Module, stream: BatchStream, draws: int = 1) -> dict[str, float]:
    """Estimate the negative ELBO of a whole data set.

    Args:
        denoiser: what is scored.
        stream: the data, read once per draw in stored order.
        draws: maskings per sequence.

    Returns:
        `nelbo` in nats per sequence and `nats_per_token`.
    """
    loss = MaskedDiffusionLoss(denoiser)
    total, tokens = 0.0, 0
    for _ in range(draws):
        for batch in stream.once():
            total += float(loss.nelbo(**batch).double().sum())
            tokens += int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["tokens"].numel()
    return {"nelbo": total / (draws * stream.num_sequences), "nats_per_token": total / tokens}


def _warmup_cosine(optimizer: Optimizer, warmup: int, updates: int) -> LambdaLR:
    def factor(update: int) -> float:
        if update < warmup:
            return (update + 1) / warmup
        part = min((update - warmup) / max(updates - warmup, 1), 1.0)
        return 0.02 + 0.98 * (1 + math.cos(math.pi * part)) / 2

    return LambdaLR(optimizer, factor)


def train_denoiser(
    denoiser: nn.Module,
    stream: BatchStream,
    *,
    updates: int,
    validation: BatchStream | None = None,
    validation_draws: int = 1,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    warmup: int = 100,
    ema_decay: float | None = 0.999,
    grad_clip: float | None = 1.0,
    description: str = "denoiser",
    **options: Any,
) -> FitResult:
    """Train a denoiser by its masked-diffusion bound; its parameters end as their moving average.

    AdamW with a linear warm-up and a cosine decay to 2% of the learning rate.

    Args:
        denoiser: module behind the `Denoiser` protocol.
        stream: training batches.
        updates: number of updates.
        validation: held-out sequences; their bound is logged as `nelbo` and `nats_per_token`.
        validation_draws: maskings per held-out sequence.
        lr: largest learning rate.
        weight_decay: decay of AdamW.
        warmup: updates of the linear warm-up.
        ema_decay: decay of the moving average; None trains without.
        grad_clip: largest gradient norm.
        description: label of the progress bar.
        options: every other argument of `optimise` (`out`, `resume`, `patience`, `device`, ...).

    Returns:
        The trace; losses in nats per token.

    Raises:
        UserError: see `optimise`.
    """
    validate = None
    if validation is not None:

        def validate() -> dict[str, float]:
            validation.device = stream.device
            return masked_diffusion_nelbo(denoiser, validation, validation_draws)

    options.setdefault("monitor", "nats_per_token")
    return optimise(
        MaskedDiffusionLoss(denoiser),
        stream,
        updates=updates,
        optimizer=partial(torch.optim.AdamW, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98)),
        scheduler=partial(_warmup_cosine, warmup=min(warmup, updates), updates=updates),
        validate=validate,
        ema_decay=ema_decay,
        grad_clip=grad_clip,
        description=description,
        **options,
    )
