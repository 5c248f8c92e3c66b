"""What a training will need, said before it begins: memory, operations, and time at a throughput."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer

from orderppl.inference.batches import BatchStream, as_batch
from orderppl.inference.cost import update_cost
from orderppl.unmasking import Batch

GIB, TERA, BATCHES = 2**30, 1e12, 4


def find_costs(loss: nn.Module, data: Any, settings: Any, tflops: float, processes: int = 1) -> dict[str, float]:
    """What each process needs for the updates of a training; nothing is computed but shapes.

    Args:
        loss: as for `train`; its trainable parameters are those that require a gradient.
        data: training rows.
        settings: `TrainSettings`.
        tflops: 10^12 floating-point operations a second of one process.
        processes: that share a batch.

    Returns:
        Bytes of `weights`, `optimiser`, `average` (a moving one, and what is exchanged), `activations` and all of it as
        `memory`; parameters `trained`; `flops` of an update, over all processes; `hours` of all updates.
    """
    every, rows = as_batch(data), -(-settings.batch_size // processes)
    stream = BatchStream(every, min(settings.batch_size, len(every)), seed=0, group=settings.group)
    widest = every.rows(every.attention_mask.sum(-1).argmax().reshape(1)).trimmed()
    given = None if widest.given is None else widest.given.expand(rows, -1)
    wide = Batch(widest.tokens.expand(rows, -1), widest.attention_mask.expand(rows, -1), given)
    make: Callable[[Iterable[Tensor]], Optimizer] = torch.optim.Adam
    options = {"accumulate": settings.accumulate, "bfloat16": settings.bfloat16}
    cost = update_cost(loss, wide, make, **options)
    drawn = [batch for _, batch in zip(range(BATCHES), stream, strict=False)]
    flops_of = {(wide.tokens.shape[1], wide.prefix): cost.flops / rows}  # of a row
    for batch in drawn:
        if (batch.tokens.shape[1], batch.prefix) not in flops_of:
            found = update_cost(loss, batch, make, **options).flops / len(batch)
            flops_of[batch.tokens.shape[1], batch.prefix] = found
    flops = sum(len(batch) * flops_of[batch.tokens.shape[1], batch.prefix] for batch in drawn) / len(drawn)
    flops *= settings.batch_size / stream.batch_size
    trained = sum(p.numel() for p in loss.parameters() if p.requires_grad)
    average = 4 * trained * ((settings.ema_decay is not None) + (processes > 1))
    return {
        "trained": trained,
        "weights": cost.weights,
        "optimiser": cost.optimizer,
        "average": average,
        "activations": cost.peak - cost.optimizer,
        "memory": cost.weights + average + cost.peak,
        "flops": flops,
        "hours": flops * settings.updates / (tflops * TERA * processes) / 3600,
    }


def show_costs(loss: nn.Module, data: Any, settings: Any, tflops: float, processes: int = 1) -> None:
    """Print `find_costs`."""
    found = find_costs(loss, data, settings, tflops, processes)
    table = Table(title="Before training: what each process needs", title_justify="left", show_header=False)
    for name, value in (
        ("parameters trained", f"{found['trained'] / 1e6:,.2f} M"),
        ("weights", _gib(found["weights"])),
        ("optimiser", _gib(found["optimiser"])),
        ("average, exchange", _gib(found["average"])),
        ("activations, gradients", _gib(found["activations"])),
        ("memory at most", _gib(found["memory"])),
        ("TFLOP of an update", f"{found['flops'] / TERA:,.3g}"),
        ("updates", f"{settings.updates:,}"),
        (f"hours of {processes} at {tflops:g} TFLOP/s each", f"{found['hours']:,.3g}"),
    ):
        table.add_row(name, value)
    Console().print(table)
    print("Not counted: validation, and what kernels and the allocator hold on top.")


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:,.2f} MiB"
