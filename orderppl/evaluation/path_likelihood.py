"""Likelihood of the true tokens along a policy's own reveal order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from orderppl.decoding import Policy, follow
from orderppl.denoising import Canvas, Denoiser
from orderppl.errors import UserError

Batch = Mapping[str, Tensor]


def batch_canvas(denoiser: Denoiser, batch: Batch, device: torch.device | str | None = None) -> tuple[Canvas, Tensor]:
    """Canvas and true tokens int64 [B, L] of a batch (`tokens`, `attention_mask`, and `context`, `context_mask`)."""
    where = batch["tokens"].device if device is None else torch.device(device)
    tokens = batch["tokens"].to(where)
    attention = batch.get("attention_mask")
    attention = torch.ones_like(tokens, dtype=torch.bool) if attention is None else attention.to(where)
    context, context_mask = batch.get("context"), batch.get("context_mask")
    context = None if context is None else context.to(where)
    context_mask = None if context_mask is None else context_mask.to(where)
    return Canvas(denoiser, attention, context, context_mask), tokens


def batch_rows(batch: Batch, first: int) -> Tensor:
    """Identities of the rows of a batch for the noise: its `row_ids` int64 [B], else the numbers from `first` on."""
    return batch["row_ids"] if "row_ids" in batch else torch.arange(first, first + len(batch["tokens"]))


@dataclass
class PathLikelihood:
    """Teacher-forced path likelihood of a data set, one entry per row, on the CPU.

    Attributes:
        nats: float64 [N], negative log-likelihood of the row's tokens along the policy's order.
        tokens: int64 [N], response tokens without padding.
        nfe: int64 [N], denoiser forwards.
        nfe_batch_max: int64 [batches], forwards of the slowest row of each batch.
        fallback: int64 [N], steps decided by the decoder's arg-max rule.
    """

    nats: Tensor
    tokens: Tensor
    nfe: Tensor
    nfe_batch_max: Tensor
    fallback: Tensor

    @property
    def path_nats(self) -> float:
        """Nats per revealed token, over all tokens of the data set; lower is better."""
        return float(self.nats.sum() / self.tokens.sum())


def path_likelihood(
    denoiser: Denoiser,
    policy: Policy,
    batches: Iterable[Batch],
    num_steps: int,
    *,
    block_size: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> PathLikelihood:
    """Reveal the true tokens of every batch along the policy's order.

    Args:
        denoiser: see `Denoiser`.
        policy: decides the reveal sets.
        batches: dictionaries of tensors; rows are numbered in order, or have numbers of their own (`row_ids` int64
            [B]), so the result does not depend on the batch size.
        num_steps: step budget T.
        block_size: semi-autoregressive blocks of this many positions.
        seed: of stochastic policies.
        device: where to run; that of the batches when left out.

    Raises:
        UserError: when there are no rows.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, outputs = 0, []
    for batch in batches:
        canvas, tokens = batch_canvas(denoiser, batch, device)
        ids = batch_rows(batch, rows)
        rows += len(tokens)
        path = follow(policy, canvas, tokens, num_steps, block_size=block_size, generator=generator, row_ids=ids)
        sizes = path.attention_mask.sum(-1)
        outputs.append((path.nats, sizes, path.nfe, path.nfe.amax(0, keepdim=True), path.fallback))
    if not outputs:
        raise UserError("batches", "no rows", "give a split that is not empty")
    return PathLikelihood(*(torch.cat(parts).cpu() for parts in zip(*outputs, strict=True)))
